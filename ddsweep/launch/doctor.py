"""Looks for what goes wrong on clusters before it does: one finding on each line.

Without a Slurm site it checks this machine. With one it asks Slurm on the login node, and runs one short job
that looks at the nodes (`ddsweep.launch.probe`). It leaves nothing in the queue or on disk.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

from ddsweep.catalog import is_code
from ddsweep.catalog.numbers import counted
from ddsweep.data.files import list_datasets, resolve_dataset
from ddsweep.errors import UserError
from ddsweep.launch.probe import Facts, Request, look
from ddsweep.launch.site import LONGEST_TEMPORARY, PORTS_OF_A_JOB, Site
from ddsweep.launch.slurm import ask, check_site, partitions, srun_options
from ddsweep.machine import LEAST_FILES, NONCE, TOKEN, folder_trouble, missing_data, token_trouble, versions
from ddsweep.report.data import remark_lines
from ddsweep.results.files import results_error
from ddsweep.spec import SweepSpec

__all__ = ["Finding", "examine"]

State = Literal["ok", "warn", "FAIL"]

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
ALWAYS_THERE = "digits"

_LITTLE_SPACE = 2 * 10**9
_LITTLE_SHARED = 10**9
_FEW_FILES = 1024
_LEAST_SHARED = 120 * 2**20
"""Ray's object store takes at least 100 MiB, and at most nine tenths of what is free."""

_SKEW_S = (10.0, 150.0)
"""Differences that are a warning, and a failure: a lock is stale when its heartbeat is 300 s old."""

_JOB_MIN = 5
_RUN_S = 150.0
_LOOK_S = 1.0


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, what was found and, unless it is ``ok``, what to do."""

    state: State
    name: str
    text: str


def examine(
    site: Site | None, results: Path, data_root: Path | None, sweep: SweepSpec | None, patience_s: float
) -> Iterator[Finding]:
    """All findings, as they come. The job may wait in the queue for ``patience_s``."""
    data = data_of(sweep, data_root)
    with _shared_folder(results) as (folder, nonce, trouble):
        request = Request(
            shared=str(folder),
            nonce=nonce,
            temporary=_temporary(site),
            first_port=site.first_port if site else 0,
            ports=site.ports if site else 0,
            data_root=None if data_root is None else str(data_root.resolve()),
            data=data,
        )
        yield check_packages(versions())
        if site is None or site.scheduler == "local":
            here = [look(request)]
            yield Finding("FAIL", "results", trouble) if trouble else check_results(here, str(results))
            if not trouble:
                yield check_token(here)
            yield check_temporary(here, request.temporary)
            if site is not None:
                yield check_ports(here, site)
            yield check_gpus(here, site)
            yield check_shared_memory(here, site)
            yield check_open_files(here)
            yield check_data_here(data_root, data, sweep)
            return
        yield check_results_here(results, folder, trouble)
        yield check_data_here(data_root, data, sweep)
        ready = True
        for check in (check_commands, check_accounting, check_partition, check_request):
            finding = check(site)
            yield finding
            if finding.state == "FAIL":
                ready = False
                break
        if ready and not trouble:
            yield from examine_nodes(site, request, patience_s)
        else:
            yield Finding("warn", "nodes", "not looked at; put the above right first")


def examine_nodes(site: Site, request: Request, patience_s: float) -> Iterator[Finding]:
    """The findings on the nodes, from one short job of the site's shape."""
    answers = ask_nodes(site, request, patience_s)
    yield check_reported(answers, site)
    nodes = answers.facts
    if not nodes:
        return
    yield check_same_versions(nodes, versions())
    yield check_results(nodes, str(Path(request.shared).parent))
    yield check_token(nodes)
    yield check_temporary(nodes, request.temporary)
    yield check_ports(nodes, site)
    yield check_gpus(nodes, site)
    yield check_shared_memory(nodes, site)
    yield check_open_files(nodes)
    yield check_data(nodes, request.data)
    yield check_clocks(nodes, answers.arrived)


# ------------------------------------------------------------------------------------- this machine


def check_packages(found: dict[str, str]) -> Finding:
    absent = [name for name, version in found.items() if version == "none"]
    if absent:
        return Finding("FAIL", "packages", f"not installed: {', '.join(absent)}; pip install ddsweep again")
    return Finding("ok", "packages", ", ".join(f"{name} {version}" for name, version in found.items()))


def check_results_here(results: Path, folder: Path, trouble: str) -> Finding:
    trouble = trouble or folder_trouble(folder) or token_trouble(folder / TOKEN)
    if trouble:
        return Finding("FAIL", "results", f"{trouble}; set --results to a folder on a shared file system")
    return Finding("ok", "results", f"{results}: here files are renamed, flushed and locked as they must be")


def check_data_here(root: Path | None, data: Sequence[str], sweep: SweepSpec | None) -> Finding:
    missing = missing_data(data, root)
    if missing:
        told = "; ".join(f"{name}: {what}" for name, what in missing.items())
        return Finding("FAIL", "data", f"{told}; ddsweep data list shows the data and their places")
    if root is not None and not root.is_dir():
        return Finding("FAIL", "data", f"{root} is not a folder; set --data-root or DDSWEEP_DATA")
    there = [name for name in data if name != ALWAYS_THERE]
    if sweep is not None:
        needs = f"needs {', '.join(data)}: there" if data else "needs no files of data"
        return check_own_data(sweep, root, f"{sweep.name} {needs}")
    if root is None:
        return Finding("warn", "data", f"no data root (--data-root or DDSWEEP_DATA): {ALWAYS_THERE} only")
    return Finding("ok", "data", f"{root}: {', '.join(there) or 'none of the catalog'}")


def check_own_data(sweep: SweepSpec, root: Path | None, fine: str) -> Finding:
    """The findings in the user's own data that ``sweep`` needs; each image is checked."""
    found, refused = [], []
    for value in sweep.datasets():
        try:
            found.append(resolve_dataset(value, root))
        except UserError as error:
            refused.append(" ".join(str(error).split()))
    if refused:
        return Finding("FAIL", "data", "; ".join(refused))
    remarks = remark_lines(found)
    return Finding("warn" if remarks else "ok", "data", "; ".join([fine, *remarks]))


def data_of(sweep: SweepSpec | None, root: Path | None) -> tuple[str, ...]:
    """Names of the data sets that ``sweep`` needs, and folders of the user's own; without a sweep, all that
    are here."""
    if sweep is None:
        return tuple(item.name for item in list_datasets(root) if not item.status.startswith("missing"))
    files = [item for item in sweep.datasets() if isinstance(item, dict) or not is_code(item)]
    needed = [f"folder:{item['path']}" if isinstance(item, dict) else item for item in files]
    return tuple(dict.fromkeys(needed))


def _temporary(site: Site | None) -> str:
    """Where Ray will have its folder; on this machine, the place of a local sweep."""
    if site is not None:
        return site.temporary
    given = tempfile.gettempdir()
    return given if len(given) <= LONGEST_TEMPORARY else "/tmp"


@contextmanager
def _shared_folder(results: Path) -> Iterator[tuple[Path, str, str]]:
    """A folder in ``results`` with a nonce and a token in it, the nonce, and why it could not be made. It is
    removed at the end, with folders above it that were made for it."""
    nonce = secrets.token_hex(16)
    folder = results.resolve() / f".ddsweep-doctor-{nonce[:8]}"
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    trouble = ""
    try:
        folder.mkdir(mode=0o700, parents=True)
        (folder / NONCE).write_text(nonce, encoding="utf-8")
        descriptor = os.open(folder / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(nonce)
    except OSError as error:
        trouble = str(results_error(error, results))
    try:
        yield folder, nonce, trouble
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for place in made[1:]:
            with suppress(OSError):  # somebody else has put something into it
                place.rmdir()


# ------------------------------------------------------------------------------------ Slurm's word


def check_commands(site: Site) -> Finding:
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return Finding(
            "FAIL",
            "slurm",
            f"no such command: {', '.join(absent)}; this is not a login node, or a module is not loaded",
        )
    said = ask("sinfo", "--version")
    up = ask("scontrol", "ping")
    if "is UP" not in up.stdout:
        return Finding("FAIL", "slurm", f"{_last(up)}; ask those who run the cluster")
    return Finding("ok", "slurm", f"{said.stdout.strip()}, its controller answers")


def check_accounting(site: Site) -> Finding:
    said = ask("sacct", "-X", "-n", "-S", "now") if shutil.which("sacct") else None
    if said is None or said.returncode != 0:
        why = "no such command" if said is None else _last(said)
        return Finding(
            "warn",
            "accounting",
            f"sacct: {why}; how a job ended is known only for as long as Slurm's controller remembers it",
        )
    return Finding("ok", "accounting", "sacct answers")


def check_partition(site: Site) -> Finding:
    try:
        check_site(site)
        known = partitions()
    except UserError as error:
        return Finding("FAIL", "partition", f"{error}; set partition in the site file, or --partition")
    if site.partition is None:
        return Finding("ok", "partition", f"the default one; there are {', '.join(known)}")
    return Finding("ok", "partition", f"{site.partition} is up")


def check_request(site: Site) -> Finding:
    """Whether Slurm would accept a job as the site file describes it, and when it would start."""
    asked = f"{counted(site.nodes, 'node')} for {site.time} min"
    said = ask("srun", "--test-only", *srun_options(site, minutes=site.time, nodes=site.nodes), "true")
    if said.returncode != 0:
        return Finding(
            "FAIL",
            "request",
            f"Slurm refuses {asked}: {_last(said)}; look at account, time, nodes, cpus_per_node, "
            "gpus_per_node and memory_per_node",
        )
    told = _last(said).removeprefix("srun: ")
    return Finding("ok", "request", f"{asked}: {told or 'Slurm would take it'}")


def _last(said: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (said.stderr + "\n" + said.stdout).splitlines() if line.strip()]
    telling = [line.partition("error:")[2].strip() for line in lines if "error:" in line]
    return "; ".join(dict.fromkeys(telling)) or (lines[-1] if lines else f"exit code {said.returncode}")


# -------------------------------------------------------------------------------------- the short job


@dataclass(frozen=True)
class Answers:
    """The answers of the job: ``facts`` of the nodes, and when they ``arrived`` (by host). ``started`` by
    rank are the hosts where a task began, ``said`` by rank (-1: srun itself) the lines of stderr. ``waiting``
    is Slurm's reason if the job never started."""

    facts: tuple[Facts, ...]
    arrived: dict[str, float]
    started: dict[int, str]
    said: dict[int, tuple[str, ...]]
    waiting: str = ""


def ask_nodes(site: Site, request: Request, patience_s: float) -> Answers:
    """Run `ddsweep.launch.probe` on the nodes. No job is left afterwards, also after an error."""
    name = f"ddsweep-doctor-{secrets.token_hex(4)}"
    content = shlex.quote(json.dumps(asdict(request)))
    script = "\n".join(
        [
            "echo host $(hostname)",
            *site.setup,
            f"exec {site.python_command} -m ddsweep.launch.probe {content}",
        ]
    )
    options = srun_options(site, minutes=min(site.time, _JOB_MIN), nodes=site.nodes)
    watched = ["--label", "--unbuffered", "--kill-on-bad-exit=0", "--no-kill", f"--job-name={name}"]
    job = subprocess.Popen(
        ["srun", *options, *watched, "bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = _Lines(job.stdout), _Lines(job.stderr)
    try:
        waiting = _wait(job, name, patience_s)
    finally:
        if job.poll() is None:
            ask("scancel", f"--name={name}")
            job.terminate()
            job.wait()
    return _answers(out.all(), err.all(), waiting)


def _wait(job: subprocess.Popen[str], name: str, patience_s: float) -> str:
    """Wait for the end of the job. Returns Slurm's reason if it did not start in time."""
    begun, running = time.monotonic(), None
    while True:
        with suppress(subprocess.TimeoutExpired):
            job.wait(_LOOK_S)
            return ""
        state, _, reason = (
            ask("squeue", "-h", "-a", f"--name={name}", "-o", "%T|%r").stdout.strip().partition("|")
        )
        if state == "PENDING":
            if time.monotonic() - begun > patience_s:
                return reason or "no reason given"
        elif running is None:
            running = time.monotonic()
        elif time.monotonic() - running > _RUN_S:
            return ""


class _Lines:
    """The lines of a pipe and when they came, read by a thread of its own."""

    def __init__(self, pipe: IO[str] | None) -> None:
        self._lines: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self._lines.append((time.time(), line.strip()))

    def all(self) -> list[tuple[float, str]]:
        self._thread.join(10.0)  # srun is gone, but its children may still hold the pipe
        return list(self._lines)


def _answers(out: Sequence[tuple[float, str]], err: Sequence[tuple[float, str]], waiting: str) -> Answers:
    facts, arrived, started = [], {}, {}
    for at, line in out:
        rank, _, text = line.partition(": ")
        if text.startswith("host "):
            started[int(rank)] = text.removeprefix("host ")
            continue
        try:
            found = Facts.read(text)
        except ValueError:  # printed by a line of `setup`
            continue
        facts.append(found)
        arrived[found.host] = at
    said: dict[int, tuple[str, ...]] = {}
    for _, line in err:
        rank, _, text = line.partition(": ")
        key, text = (int(rank), text) if rank.isdigit() else (-1, line.removeprefix("srun: "))
        said[key] = (*said.get(key, ()), text)
    facts.sort(key=lambda found: found.host)
    return Answers(tuple(facts), arrived, started, said, waiting)


# ------------------------------------------------------------------------------------------ the nodes


def check_reported(answers: Answers, site: Site) -> Finding:
    """Whether the job started and all nodes answered."""
    if answers.waiting:
        return Finding(
            "FAIL",
            "nodes",
            f"a job of {counted(site.nodes, 'node')} and {min(site.time, _JOB_MIN)} min still waits "
            f"({answers.waiting}) and was cancelled; wait longer with --patience, or ask for less",
        )
    there = [found.host for found in answers.facts]
    if len(there) == site.nodes:
        return Finding("ok", "nodes", f"{', '.join(there)} answered")
    silent = [
        f"{host}: {(answers.said.get(rank) or ('python printed nothing',))[-1]}"
        for rank, host in sorted(answers.started.items())
        if host not in there
    ]
    of_slurm = [line for line in answers.said.get(-1, ()) if "error" in line]
    told = "; ".join(silent or of_slurm[:3]) or "Slurm said nothing"
    return Finding(
        "FAIL",
        "nodes",
        f"{len(there)} of {site.nodes} answered; {told}; is the environment on every node (setup, python)?",
    )


def check_same_versions(nodes: Sequence[Facts], here: dict[str, str]) -> Finding:
    def differing(found: Facts) -> str:
        told = [
            f"{name} {found.versions.get(name)} (here {version})"
            for name, version in here.items()
            if found.versions.get(name) != version
        ]
        return ", ".join(told)

    fine = f"the same on {_count(nodes)} as here"
    return _of_each("versions", nodes, differing, fine, "install the same environment on all nodes")


def check_results(nodes: Sequence[Facts], results: str) -> Finding:
    fine = f"{results}: files are renamed, flushed and locked as they must be on {_count(nodes)}"
    advice = "set --results to a folder that all nodes share"
    return _of_each("results", nodes, lambda found: found.shared_trouble, fine, advice)


def check_token(nodes: Sequence[Facts]) -> Finding:
    """The token, on the nodes that see the results folder."""
    fine = f"mode 600 holds on {_count(nodes)}"
    advice = "set --results to a file system that keeps modes and owners"
    return _of_each("token", nodes, lambda found: found.token_trouble, fine, advice)


def check_temporary(nodes: Sequence[Facts], temporary: str) -> Finding:
    finding = _of_each(
        "temporary",
        nodes,
        lambda found: found.temporary_trouble,
        f"{temporary} ({len(temporary)} of at most {LONGEST_TEMPORARY} characters), "
        f"{min(found.temporary_free for found in nodes) / 1e9:.0f} GB free on {_count(nodes)}",
        "set temporary to a folder on the node itself",
    )
    little = [found.host for found in nodes if found.temporary_free < _LITTLE_SPACE]
    if finding.state == "ok" and little:
        text = f"{', '.join(little)}: less than {_LITTLE_SPACE / 1e9:.0f} GB free in {temporary}; free some"
        return Finding("warn", "temporary", text)
    return finding


def check_ports(nodes: Sequence[Facts], site: Site) -> Finding:
    ports = range(site.first_port, site.first_port + site.ports)
    taken = max(len(found.taken_ports) for found in nodes)
    advice = "set first_port and ports to where nothing listens (ss -tlnp shows who does)"

    def full(found: Facts) -> str:
        blocks = [range(first, first + 4) for first in ports[::PORTS_OF_A_JOB]]
        free = any(not set(block) & set(found.taken_ports) for block in blocks)
        return "" if free else f"no four ports in a row are free from {ports[0]} to {ports[-1]}"

    fine = (
        f"{ports[0]} to {ports[-1]}: {f'at most {taken} taken' if taken else 'all free'} on {_count(nodes)}"
    )
    finding = _of_each("ports", nodes, full, fine, advice)
    if finding.state == "ok" and taken > len(ports) / 10:
        return Finding("warn", "ports", f"{fine}; {advice}")
    return finding


def check_gpus(nodes: Sequence[Facts], site: Site | None) -> Finding:
    wanted = site.gpus_per_node if site else 0
    on_cpu = site is not None and site.device == "cpu"

    def lacking(found: Facts) -> str:
        if found.torch_trouble:
            return found.torch_trouble
        if site is not None and site.scheduler == "slurm" and found.gpus < wanted:
            return f"Slurm gives {found.gpus} of {wanted} GPUs (CUDA_VISIBLE_DEVICES: {found.visible})"
        if not on_cpu and found.torch_gpus < wanted:
            return (
                f"torch can use {found.torch_gpus} of {wanted} GPUs (CUDA_VISIBLE_DEVICES: {found.visible})"
            )
        return ""

    seen = min(found.torch_gpus for found in nodes)
    if wanted == 0:
        fine = f"torch sees {seen}" if seen else "torch sees none: trials run on the CPU"
    else:
        fine = f"{wanted} on {_count(nodes)}{', unused: device is cpu' if on_cpu else ''}"
    advice = "look at gpu_syntax, the driver, and whether torch is built for this CUDA; or set device: cpu"
    return _of_each("gpus", nodes, lacking, fine, advice)


def check_shared_memory(nodes: Sequence[Facts], site: Site | None) -> Finding:
    wanted = int(site.object_store * 1e9) if site and site.object_store else _LITTLE_SHARED
    least = min(found.shared_memory for found in nodes)
    if least >= wanted:
        return Finding("ok", "shared memory", f"{least / 1e9:.1f} GB free in /dev/shm on {_count(nodes)}")
    little = ", ".join(found.host for found in nodes if found.shared_memory < wanted)
    return Finding(
        "FAIL" if least < _LEAST_SHARED else "warn",
        "shared memory",
        f"{little}: {least / 1e9:.1f} GB free in /dev/shm, where Ray keeps data sets; make room, or a "
        "container with more of it",
    )


def check_open_files(nodes: Sequence[Facts]) -> Finding:
    least = min(found.open_files for found in nodes)
    if least >= _FEW_FILES:
        told = f"at least {least}" if least < sys.maxsize else "any number"
        return Finding("ok", "open files", f"a process may have {told} of them on {_count(nodes)}")
    few = ", ".join(found.host for found in nodes if found.open_files < _FEW_FILES)
    return Finding(
        "FAIL" if least < LEAST_FILES else "warn",
        "open files",
        f"{few}: a process may have {least} of them; Ray needs {LEAST_FILES}, and some more for each worker; "
        "raise the hard limit (ulimit -Hn, LimitNOFILE of systemd, nofile of a container)",
    )


def check_data(nodes: Sequence[Facts], data: Sequence[str]) -> Finding:
    def missing(found: Facts) -> str:
        return "; ".join(f"{name}: {what}" for name, what in found.missing.items())

    fine = f"the data here are visible on {_count(nodes)}: {', '.join(data)}"
    return _of_each("data", nodes, missing, fine, "set --data-root to a folder that all nodes share")


def check_clocks(nodes: Sequence[Facts], arrived: dict[str, float]) -> Finding:
    skews = {found.host: found.clock - arrived[found.host] for found in nodes}
    host, worst = max(skews.items(), key=lambda item: abs(item[1]))
    told, too_much = _SKEW_S
    if abs(worst) <= told:
        return Finding(
            "ok", "clocks", f"{_count(nodes)} agree with this one within {max(1, abs(worst)):.0f} s"
        )
    state: State = "FAIL" if abs(worst) > too_much else "warn"
    advice = "set the clocks (ntp): the heartbeat of a sweep's lock is judged by them"
    return Finding(
        state, "clocks", f"{host} is {abs(worst):.0f} s {'ahead' if worst > 0 else 'late'}; {advice}"
    )


def _of_each(
    name: str, nodes: Sequence[Facts], trouble: Callable[[Facts], str], fine: str, advice: str
) -> Finding:
    """``FAIL`` with the problem of each machine; machines with the same problem stand together."""
    by_trouble: dict[str, list[str]] = {}
    for found in nodes:
        if text := trouble(found):
            by_trouble.setdefault(text, []).append(found.host)
    if not by_trouble:
        return Finding("ok", name, fine)
    told = "; ".join(f"{', '.join(hosts)}: {text}" for text, hosts in by_trouble.items())
    return Finding("FAIL", name, f"{told}; {advice}")


def _count(nodes: Sequence[Facts]) -> str:
    return nodes[0].host if len(nodes) == 1 else f"{len(nodes)} nodes"
