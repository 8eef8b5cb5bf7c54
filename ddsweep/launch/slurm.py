"""Slurm's commands: asking about jobs and the site, requeueing and cancelling.

submitit's own view of a job is not used: it counts a lost node as the end although Slurm requeues the job,
polls more and more rarely, and needs accounting. ``squeue`` knows jobs that wait and run; ``sacct`` and
``scontrol`` remember ended ones.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddsweep.errors import UserError
from ddsweep.launch.folder import Job
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


def require_command(command: str) -> None:
    if shutil.which(command) is None:
        raise SubmissionError(
            f"{command}: no such command: this is not a login node of a Slurm cluster, or its module is not "
            "loaded; a site with `scheduler: local` needs no Slurm"
        )


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. Raises `SubmissionError` if it is missing or does not answer."""
    require_command(command[0])
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
    asked = site.partition.split(",")  # Slurm takes the first one in which the job can begin
    for name in asked:
        if name not in known:
            raise SubmissionError(f"partition: {name!r} is not one of {', '.join(known) or 'none'}")
    if all(known[name] != "up" for name in asked):
        state = ", ".join(dict.fromkeys(known[name] for name in asked))
        raise SubmissionError(f"partition: {site.partition!r} is {state}: jobs would wait for ever")


def check_nodes(site: Site) -> None:
    """Raises `SubmissionError` for a job of more nodes than the partition has: many a Slurm accepts it."""
    there: dict[str, int] = {}
    asked = site.partition.split(",") if site.partition else []
    for line in ask("sinfo", "-h", "-o", "%P|%D").stdout.split():
        name, _, nodes = line.partition("|")
        if name.rstrip("*") in asked or (not asked and name.endswith("*")):
            there[name] = there.get(name, 0) + int(nodes)
    if there and site.nodes > max(there.values()):
        name, most = max(there.items(), key=lambda found: found[1])
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
            told = ask("scontrol", "show", "hostnames", fields.get("NodeList", ""))
            there = [] if told.returncode else told.stdout.split()
            return host if there and host not in there else ""
    return ""


def is_running(number: str) -> bool:
    """Whether a job runs and is to run on: one that Slurm ends or requeues is on its way already."""
    return any(fields.get("JobState") == "RUNNING" for fields in _shown(number))


def requeue(number: str) -> None:
    """Raises `SubmissionError` with Slurm's objection."""
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
    begun, started, doubts = time.monotonic(), False, 0
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
        started = started or any(state.state not in ("PENDING", "CONFIGURING") for state in states)
        waited = time.monotonic() - begun
        if not started and longest_pending_min is not None and waited > 60 * longest_pending_min:
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
