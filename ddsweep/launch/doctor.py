"""Looks for what goes wrong on clusters before it does: one finding on each line.

Without a Slurm site it checks this machine. With one it asks Slurm on the login node, and runs one short job
that looks at the nodes (`ddsweep.launch.probe`). It leaves nothing in the queue or on disk.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ddsweep.catalog import is_code
from ddsweep.catalog.numbers import counted
from ddsweep.data.files import list_datasets, resolve_dataset
from ddsweep.errors import UserError
from ddsweep.launch.doctor_job import ask_nodes
from ddsweep.launch.doctor_nodes import (
    Finding,
    check_clocks,
    check_data,
    check_gpus,
    check_open_files,
    check_ports,
    check_reported,
    check_results,
    check_same_versions,
    check_shared_memory,
    check_temporary,
    check_token,
)
from ddsweep.launch.probe import Request, look
from ddsweep.launch.site import LONGEST_TEMPORARY, Site
from ddsweep.launch.slurm import ask, check_site, partitions
from ddsweep.launch.submit import srun_options
from ddsweep.machine import NONCE, TOKEN, folder_trouble, missing_data, token_trouble, versions
from ddsweep.private import write_secret
from ddsweep.report.data import remark_lines
from ddsweep.results.files import results_error
from ddsweep.spec import SweepSpec

__all__ = ["examine"]

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
ALWAYS_THERE = "digits"


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
    are here. A mapping without a folder's name has none: `check_own_data` says what is wrong with it."""
    if sweep is None:
        return tuple(item.name for item in list_datasets(root) if not item.status.startswith("missing"))
    needed = []
    for item in sweep.datasets():
        if not isinstance(item, dict):
            needed += [] if is_code(item) else [item]
        elif isinstance(path := item.get("path"), str):
            needed.append(f"folder:{path}")
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
        write_secret(folder / TOKEN, nonce)
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
