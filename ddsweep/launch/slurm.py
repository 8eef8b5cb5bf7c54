"""Submitting jobs through submitit, and asking Slurm about them.

submitit's own view of a job is not used: it counts a lost node as the end although Slurm requeues the job,
polls more and more rarely, and needs accounting. ``squeue`` knows jobs that wait and run; ``sacct`` and
``scontrol`` remember ended ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ddsweep.errors import UserError
from ddsweep.launch.folder import Job, LaunchFolder
from ddsweep.launch.sbatch_options import without_variables
from ddsweep.launch.site import Site

__all__ = [
    "JobState",
    "SilentError",
    "SubmissionError",
    "active",
    "cancel_jobs",
    "check_nodes",
    "check_site",
    "is_running",
    "job_states",
    "lost_head",
    "requeue",
    "script",
    "srun_options",
    "submit",
]

_SLURM_TIMEOUT_S = 60
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
    "GONE",
}
"""Final states."""

_DOUBTFUL = {"BOOT_FAIL", "GONE", "NODE_FAIL", "PREEMPTED"}
"""States that are final only if they stay: Slurm requeues such jobs a little later."""

_HOPELESS = {"BadConstraints", "InvalidAccount", "InvalidQOS", "PartitionConfig", "PartitionNodeLimit"}
_HOPELESS |= {"PartitionTimeLimit"}
"""Reasons for waiting that do not pass."""

_LOOKS = 3
_SILENCE_S = 600.0


class SubmissionError(UserError):
    """Slurm is missing, or refused a job."""


class SilentError(SubmissionError):
    """Slurm does not answer: its controller may be starting again."""


@dataclass(frozen=True)
class JobState:
    """One job, or one element of an array. ``state`` is Slurm's word, or ``GONE`` if Slurm has forgotten it;
    ``reason`` says why it waits, ``nodes`` where it runs."""

    id: str
    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def over(self) -> bool:
        return self.state in ENDED


# ---------------------------------------------------------------------------------------- submitting


def executor(site: Site, folder: LaunchFolder, name: str, **more: Any) -> Any:
    """submitit's executor for one job of this site; ``more`` are parameters of its own spelling."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR2"  # the signal of our jobs, for any shell
    import submitit

    submitit_executor: Any
    if site.scheduler == "local":
        submitit_executor = submitit.LocalExecutor(
            folder=folder.logs, max_num_timeout=site.requeues, python=site.python_command
        )
        submitit_executor.update_parameters(
            timeout_min=site.time,
            gpus_per_node=site.gpus_per_node,
            visible_gpus=_own_gpus(site.gpus_per_node),
            signal_delay_s=site.drain,
            setup=list(site.setup) or (),
        )
        return submitit_executor
    _require("sbatch")
    submitit_executor = submitit.SlurmExecutor(
        folder=folder.logs, max_num_timeout=site.requeues, python=site.python_command
    )
    submitit_executor.update_parameters(**_parameters(site, name), **more)
    return submitit_executor


def _own_gpus(count: int) -> tuple[int, ...]:
    """The first GPUs that this process may use; submitit would take the machine's first."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    numbers = tuple(int(name) for name in visible if name.strip().isdigit())
    return numbers[:count] if len(numbers) >= count else ()


def _parameters(site: Site, name: str) -> dict[str, Any]:
    extra: dict[str, Any] = dict(site.sbatch)
    # The job outlives the loss of a node, except of the first.
    extra |= {"no-kill": True, "requeue" if site.requeues else "no-requeue": True}
    extra = {key: value for key, value in extra.items() if value is not False}
    parameters: dict[str, Any] = {
        "job_name": name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "wckey": site.wckey,
        "time": site.time,
        "ntasks_per_node": 1,
        "cpus_per_task": site.cpus_per_node,
        "mem": None if site.memory_per_node is None else f"{round(site.memory_per_node * 1024)}M",
        "exclusive": site.exclusive or None,
        "setup": list(site.setup) or None,
        "signal_delay_s": site.drain,
        "additional_parameters": extra,
        # Since Slurm 22.05 srun does not inherit these options from sbatch.
        "srun_args": ["--no-kill", f"--cpus-per-task={site.cpus_per_node}"],
    }
    if site.gpus_per_node:
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        if site.gpu_syntax == "gres":
            parameters["gres"] = f"gpu:{kind}{site.gpus_per_node}"
        else:
            parameters["gpus_per_node"] = f"{kind}{site.gpus_per_node}"
    return {key: value for key, value in parameters.items() if value is not None} | {"wckey": site.wckey}


_OF_SBATCH = {"job_name", "time", "setup", "signal_delay_s", "additional_parameters", "srun_args", "wckey"}


def srun_options(site: Site, *, minutes: int, nodes: int) -> list[str]:
    """The site's own options for one ``srun`` outside of a job, of one task a node."""
    asked = {key: value for key, value in _parameters(site, "").items() if key not in _OF_SBATCH}
    asked |= {"time": minutes, "nodes": nodes, "wckey": site.wckey}
    asked |= {key: value for key, value in site.sbatch.items() if value is not False}
    return [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
        for key, value in asked.items()
        if value is not None
    ]


def submit(
    site: Site,
    folder: LaunchFolder,
    kind: str,
    name: str,
    calls: Sequence[Any],
    *,
    nodes: int = 1,
    parallel: int | None = None,
    after: str | None = None,
) -> Job:
    """Submit ``calls`` as one job of ``nodes`` nodes, or as an array with ``parallel`` elements at a time,
    ``after`` another job. Raises `SubmissionError` with what Slurm said."""
    import submitit

    more = _more(nodes, parallel, after)
    ready = executor(site, folder, name, **more)
    try:
        # submitit prints what Slurm said, and then raises with it.
        with redirect_stderr(StringIO()), without_variables(_named(ready.parameters)):
            found = ready.submit_array(calls) if parallel is not None else [ready.submit(calls[0])]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SubmissionError(_refusal(str(error), site)) from None
    except subprocess.CalledProcessError as error:
        raise SubmissionError(_refusal(f"{error}\n{error.stderr or ''}", site)) from None
    number = str(found[0].job_id).partition("_")[0]
    return Job(number, kind, elements=len(calls) if len(calls) > 1 else 0)


def _named(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The options of sbatch among submitit's ``parameters``, by their long names."""
    given = {**parameters, **parameters.get("additional_parameters", {})}
    return {key.replace("_", "-"): value for key, value in given.items()}


def _more(nodes: int, parallel: int | None, after: str | None) -> dict[str, Any]:
    more: dict[str, Any] = {"nodes": nodes}
    if parallel is not None:
        more["array_parallelism"] = parallel
    if after is not None:
        more["dependency"] = f"afterany:{after}"
    return more


def script(
    site: Site,
    folder: LaunchFolder,
    name: str,
    *,
    nodes: int = 1,
    elements: int = 0,
    parallel: int | None = None,
    after: str | None = None,
) -> str:
    """The text of the sbatch file that `submit` would hand to Slurm: submitit gives it to a stub."""
    before = set(folder.logs.glob("*"))
    with TemporaryDirectory() as place, _first_on_path(place):
        sbatch = Path(place) / "sbatch"
        sbatch.write_text('#!/bin/sh\ncat "$1" > "$0.sh" && echo "Submitted batch job 0"\n')
        sbatch.chmod(0o700)
        ready = executor(site, folder, name, **_more(nodes, parallel, after))
        try:
            if elements:
                ready.map_array(int, range(elements))
            else:
                ready.submit(int)
            return sbatch.with_name("sbatch.sh").read_text()
        finally:
            for made in set(folder.logs.glob("*")) - before:
                made.unlink()


@contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _refusal(text: str, site: Site) -> str:
    lines = [line.partition("error:")[2].strip() for line in text.splitlines() if "error:" in line]
    said = "; ".join(dict.fromkeys(line for line in lines if line)) or " ".join(text.split())[:300]
    hint = ""
    if "ccount" in said:  # first: Slurm says "account or account/partition combination"
        hint = f"; set account in the site file (now {site.account}); sacctmgr lists yours"
    elif "artition" in said:
        hint = f"; the partitions are {', '.join(partitions()) or 'none'} (partition: {site.partition})"
    elif "node configuration" in said or "resources" in said:
        hint = "; ask for fewer nodes, cpus_per_node, gpus_per_node or memory_per_node"
    return f"Slurm refused the job: {said}{hint}"


# ------------------------------------------------------------------------------------- asking Slurm


def _require(command: str) -> None:
    if shutil.which(command) is None:
        raise SubmissionError(
            f"{command}: no such command: this is not a login node of a Slurm cluster, or its module is not "
            "loaded; a site with `scheduler: local` needs no Slurm"
        )


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Raises `SubmissionError` if it is missing or does not answer."""
    _require(command[0])
    try:
        return subprocess.run(
            list(command), capture_output=True, text=True, timeout=_SLURM_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SilentError(f"{command[0]} did not answer within {_SLURM_TIMEOUT_S} s") from None


def _silent(said: subprocess.CompletedProcess[str]) -> SilentError:
    text = " ".join(said.stderr.split()) or f"exit code {said.returncode}"
    return SilentError(f"Slurm does not answer: {said.args[0]}: {text}")


def partitions() -> dict[str, str]:
    """The partitions and whether they are ``up``."""
    said = ask("sinfo", "-h", "-o", "%R|%a")
    if said.returncode:
        raise _silent(said)
    return dict(line.split("|", 1) for line in said.stdout.split())


def check_site(site: Site) -> None:
    """Raises `SubmissionError` for a partition that is down: Slurm would take the job and never start it."""
    known = partitions()
    if site.partition is None:
        return
    if site.partition not in known:
        raise SubmissionError(f"partition: {site.partition!r} is not one of {', '.join(known) or 'none'}")
    if known[site.partition] != "up":
        raise SubmissionError(
            f"partition: {site.partition!r} is {known[site.partition]}: jobs would wait for ever"
        )


def check_nodes(site: Site) -> None:
    """Raises `SubmissionError` for a job of more nodes than the partition has: many a Slurm accepts it."""
    there: dict[str, int] = {}
    for line in ask("sinfo", "-h", "-o", "%P|%D").stdout.split():
        name, _, nodes = line.partition("|")
        if name.rstrip("*") == site.partition or (site.partition is None and name.endswith("*")):
            there[name] = there.get(name, 0) + int(nodes)
    if there and site.nodes > max(there.values()):
        name, most = next(iter(there.items()))
        raise SubmissionError(f"nodes: {site.nodes}; partition {name.rstrip('*')!r} has {most}")


def array_limit() -> int | None:
    """The most elements that an array may have here."""
    for line in ask("scontrol", "show", "config").stdout.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "MaxArraySize" and value.strip().isdigit():
            return int(value) - 1
    return None


def job_states(jobs: Iterable[Job]) -> dict[str, list[JobState]]:
    """The state of each job by its number; for an array, of each element that Slurm still lists."""
    wanted = [job.id for job in jobs]
    if not wanted:
        return {}
    listed = _listed(wanted)
    found: dict[str, list[JobState]] = {}
    for number in wanted:
        found[number] = listed.get(number) or _remembered(number)
    return found


def active(jobs: Iterable[Job]) -> list[JobState]:
    """Those of them that wait or run."""
    wanted = [job.id for job in jobs]
    listed = _listed(wanted).values() if wanted else ()
    return [state for states in listed for state in states if not state.over]


def _listed(numbers: Sequence[str]) -> dict[str, list[JobState]]:
    """By squeue. It complains about forgotten jobs, and answers with an error if it was asked for one alone.
    Raises `SilentError` for other errors: without an answer a job does not count as gone."""
    found: dict[str, list[JobState]] = {}
    said = ask("squeue", "-h", "-a", "-t", "all", "-j", ",".join(numbers), "-o", "%i|%T|%r|%N")
    if said.returncode and "Invalid job id" not in said.stderr:
        raise _silent(said)
    for line in said.stdout.splitlines():
        number, state, reason, nodes = [*line.strip().split("|"), "", "", ""][:4]
        entry = JobState(number, state, "" if reason == "None" else reason, nodes)
        found.setdefault(number.partition("_")[0], []).append(entry)
    return found


def _remembered(number: str) -> list[JobState]:
    """By sacct if there is accounting, else by scontrol."""
    lines: list[str] = []
    if shutil.which("sacct") is not None:
        said = ask("sacct", "-X", "-n", "-P", "-D", "-j", number, "-o", "JobID,State,NodeList")
        lines = said.stdout.splitlines() if said.returncode == 0 else []
    found: dict[str, JobState] = {}
    for line in lines:
        if line.startswith(number):
            name, state, nodes = [*line.split("|"), "", ""][:3]
            state = state.partition(" ")[0]  # CANCELLED by 1000
            # Its last line counts. A job that is running for sacct and unknown to squeue never runs again.
            found[name] = JobState(name, state if state in ENDED else "GONE", "", nodes)
    if found:
        return list(found.values())
    for fields in _shown(number):
        if "JobState" in fields:
            name = fields["JobId"]
            if "ArrayTaskId" in fields:
                name = f"{fields.get('ArrayJobId', name)}_{fields['ArrayTaskId']}"
            reason, nodes = (
                "" if text in ("None", "(null)") else text
                for text in (fields.get("Reason", ""), fields.get("NodeList", ""))
            )
            found[name] = JobState(name, fields["JobState"], reason, nodes)
    return list(found.values()) or [JobState(number, "GONE")]


def _shown(number: str) -> list[dict[str, str]]:
    """By scontrol: the fields of a job, or of each element of an array."""
    told = ask("scontrol", "show", "job", "-o", number).stdout
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in told.splitlines()]


def lost_head(number: str) -> str:
    """The lost node of a running job's batch script, if the job goes on without it (``--no-kill``): then it
    does no work any more, and Slurm does not requeue it. Empty if all is well."""
    for fields in _shown(number):
        host = fields.get("BatchHost", "")
        if fields.get("JobState") == "RUNNING" and host:
            there = ask("scontrol", "show", "hostnames", fields.get("NodeList", "")).stdout.split()
            return "" if host in there else host
    return ""


def is_running(number: str) -> bool:
    """Whether a job runs and is to run on: one that Slurm ends or requeues is on its way already."""
    return any(fields.get("JobState") == "RUNNING" for fields in _shown(number))


def requeue(number: str) -> None:
    """Raises `SubmissionError` with what Slurm says against it."""
    said = ask("scontrol", "requeue", number)
    if said.returncode:
        raise SubmissionError(f"job {number} could not be requeued: {' '.join(said.stderr.split())}")


def cancel_jobs(jobs: Iterable[Job], *, state: str | None = None) -> None:
    """``scancel``, of those in ``state`` only."""
    for job in jobs:
        ask("scancel", *([f"--state={state}"] if state else []), job.id)


def wait(
    look: Callable[[], list[JobState]],
    poll_s: float,
    on_change: Callable[[JobState], None],
    longest_pending_min: int | None,
) -> list[JobState]:
    """Poll at an even pace until all jobs are over. Raises `UserError` if a job waits in vain, or if none
    starts for ``longest_pending_min``; `SilentError` if Slurm has not answered for ten minutes."""
    seen: dict[str, JobState] = {}
    begun, doubts = time.monotonic(), 0
    answered = begun
    while True:
        try:
            states = look()
        except SilentError:
            if time.monotonic() - answered > _SILENCE_S:
                raise
            time.sleep(poll_s)
            continue
        answered = time.monotonic()
        for state in states:
            if seen.get(state.id) != state:
                seen[state.id] = state
                on_change(state)
        doubts = doubts + 1 if any(state.state in _DOUBTFUL for state in states) else 0
        if all(state.over for state in states) and (doubts == 0 or doubts >= _LOOKS):
            return states
        for state in states:
            if state.state == "PENDING" and state.reason in _HOPELESS:
                raise UserError(f"job {state.id} would wait for ever: {state.reason}")
        if any(state.state not in ("PENDING", "CONFIGURING") for state in states):
            begun = time.monotonic()
        elif longest_pending_min is not None and time.monotonic() - begun > 60 * longest_pending_min:
            reasons = ", ".join(
                dict.fromkeys(f"{state.id}: {state.reason}" for state in states if not state.over)
            )
            raise UserError(f"waited for {longest_pending_min} min and nothing started ({reasons})")
        time.sleep(poll_s)


def log_tail(path: Path, lines: int) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    except OSError:
        return []
