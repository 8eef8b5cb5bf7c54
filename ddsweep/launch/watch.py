"""Looking at launches from a login node: from their folders and Slurm, without Ray."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddsweep.catalog.numbers import counted
from ddsweep.errors import EXIT_DRAINED, ResultsError, UserError
from ddsweep.launch.folder import Job, Launch, LaunchFolder, launches_of, read_json
from ddsweep.launch.slurm import (
    JobState,
    SubmissionError,
    active,
    cancel_jobs,
    job_states,
    lost_head,
    requeue,
    wait,
)
from ddsweep.processes import kill_marked
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import live_holder, process_start

__all__ = ["active_jobs", "cancel", "latest", "launch_lines", "log_files", "states_of", "wait_for"]

_LOOK_S = 1.0


def latest(directory: SweepDirectory) -> LaunchFolder:
    """The newest launch of a sweep. Raises `ResultsError` if it was never launched."""
    found = launches_of(directory)
    if not found:
        raise ResultsError(f"{directory.root}: was never launched (there is no jobs/*/launch.json in it)")
    return found[-1]


def states_of(folder: LaunchFolder, launch: Launch) -> list[JobState]:
    """The state of each job of the launch in ``folder``."""
    if launch.site["scheduler"] == "local":
        return [_local_state(folder, launch, job) for job in launch.jobs]
    return [state for states in job_states(launch.jobs).values() for state in states]


def _local_state(folder: LaunchFolder, launch: Launch, job: Job) -> JobState:
    if job.is_elsewhere:  # its processes cannot be seen, but the lock that one of them holds
        holder, node = live_holder(launch.directory.lock), job.host or ""
        # An array's holders name the launch; a cluster's driver runs a file in the launch's folder.
        running = holder is not None and (
            holder.get("launch") == folder.name or folder.name in str(holder.get("command"))
        )
    else:
        running, node = process_start(int(job.id)) == job.started, ""
    return JobState(job.id, "RUNNING" if running else "COMPLETED", nodes=node)


def active_jobs(folder: LaunchFolder, launch: Launch) -> list[JobState]:
    """Those of its jobs that still wait or run."""
    if launch.site["scheduler"] == "local":
        return [state for state in states_of(folder, launch) if not state.over]
    return active(launch.jobs)


def launch_lines(directory: SweepDirectory) -> Iterator[str]:
    """Lines on the newest launch; none without a launch."""
    folders = launches_of(directory)
    if not folders:
        return
    folder = folders[-1]
    try:
        launch = Launch.read(folder)
    except UserError as error:  # of another version; the tables can still be read
        yield f"launch {folder.name}: {error}"
        return
    yield f"launch {folder.name}: mode {launch.mode}, {launch.site_file}, {launch.created}"
    try:
        states = states_of(folder, launch)
    except UserError as error:  # Slurm is missing here; the files are not
        yield f"  its jobs cannot be asked for: {error}"
        states = []
    if states and (unseen := _unseen(folder, launch, states)):
        yield f"  {unseen}"
    for number, node in _without_head(launch, states):
        yield f"  job {number}: {node}, where its driver was, is lost; `scontrol requeue {number}` goes on"
    yield from _job_lines(launch, states)
    for path in sorted(folder.root.glob("outcomes/*.json")):
        content = read_json(path)
        if content and (content["message"] or content["restart"]):
            times = f"requeued {counted(content['restart'], 'time')}; " if content["restart"] else ""
            yield (
                f"  {path.stem}: {times}exit code {content['code']}{': ' if content['message'] else ''}"
                + str(content["message"])
            )


def _job_lines(launch: Launch, states: Sequence[JobState]) -> Iterator[str]:
    """A line for each job; for an array, the number of elements in each state."""
    for job in launch.jobs:
        own = [state for state in states if state.id.partition("_")[0] == job.id]
        if not job.elements:
            for state in own:
                where = f" on {state.nodes}" if state.nodes and not state.over else ""
                why = f" ({state.reason})" if state.reason and state.state == "PENDING" else ""
                yield f"  {job.kind} job {job.id}: {state.state.lower()}{where}{why}"
            continue
        # Slurm has one line for all waiting elements, such as 7_[4-9], or 7 for the whole array.
        apart = [state for state in own if state.id[-1] != "]" and "_" in state.id]
        waiting = [state for state in own if state not in apart]
        told = [f"{count} {state}" for state, count in Counter(s.state.lower() for s in apart).items()]
        if waiting:
            reason = f" ({waiting[0].reason})" if waiting[0].reason else ""
            told.append(f"{job.elements - len(apart)} {waiting[0].state.lower()}{reason}")
        if told:
            yield f"  {job.kind} job {job.id}: {', '.join(told)} of {job.elements}"


def _without_head(launch: Launch, states: Sequence[JobState]) -> Iterator[tuple[str, str]]:
    """Jobs of a cluster whose batch script was lost with its node, and that node."""
    if launch.mode == "cluster" and launch.site["scheduler"] == "slurm" and launch.site["nodes"] > 1:
        for state in states:
            if state.state == "RUNNING" and (node := lost_head(state.id)):
                yield state.id, node


def wait_for(folder: LaunchFolder, say: Callable[[str], None]) -> int:
    """Wait until all jobs of a launch are over; returns the exit code of the sweep. Raises `UserError` if
    they ended without an outcome, or only wait."""
    launch = Launch.read(folder)
    site = launch.site_spec
    if site.scheduler == "local":
        poll = min(site.poll, _LOOK_S)
    else:
        poll = site.poll

    def on_change(state: JobState) -> None:
        details = f" ({state.reason})" if state.state == "PENDING" and state.reason else ""
        say(f"job {state.id}: {state.state.lower()}{details}{f' on {state.nodes}' if state.nodes else ''}")

    def look() -> list[JobState]:
        states = states_of(folder, launch)
        for number, node in _without_head(launch, states):
            say(f"job {number}: {node}, where its driver was, is lost; requeued")
            requeue(number)
        return states

    try:
        states = wait(look, poll, on_change, site.longest_pending)
    except SubmissionError:
        raise
    except UserError:  # nothing ever started
        cancel_jobs(launch.jobs)
        _discard(folder, launch)
        raise
    outcome = _last_outcome(folder, launch)
    ended_early = outcome is None or (outcome["code"] == EXIT_DRAINED and not outcome["message"])
    if folder.stop_file.exists() and ended_early:
        say(f"cancelled; ddsweep launch goes on with what is missing of {launch.directory.root}")
        return EXIT_DRAINED
    if outcome is None and (unseen := _unseen(folder, launch, states)):
        _discard(folder, launch)
        raise UserError(unseen)
    if outcome is None or outcome["requeued"]:
        ended = ", ".join(f"job {state.id} {state.state.lower()}" for state in states)
        raise UserError(
            f"the launch ended without an outcome ({ended}); see ddsweep logs {launch.directory.root}; "
            "launch it again to go on"
        )
    if outcome["message"]:
        raise UserError(str(outcome["message"]))
    if outcome["code"]:  # the elements of the array tell why
        for path in sorted(folder.root.glob("outcomes/*.json")):
            content = read_json(path) or outcome
            if content["message"]:
                say(f"{path.stem}: {content['message']}")
    return int(outcome["code"])


def _last_outcome(folder: LaunchFolder, launch: Launch) -> dict[str, Any] | None:
    """How the last job of a launch ended; None if it did not."""
    return read_json(folder.outcome("cluster" if launch.mode == "cluster" else "finish"))


def _unseen(folder: LaunchFolder, launch: Launch, states: Sequence[JobState]) -> str:
    """A message on ended jobs if no node of theirs could write a log; else empty."""
    if any(folder.logs.glob("*_log.*")) or not all(state.over for state in states):
        return ""
    where = ", ".join(dict.fromkeys(state.nodes for state in states if state.nodes)) or "the nodes"
    ended = ", ".join(f"job {state.id} {state.state.lower()}" for state in states)
    return (
        f"{where} wrote no log ({ended}): is {launch.results} the same folder there as here? "
        f"ddsweep doctor --site {launch.site_file} --results {launch.results} looks"
    )


def _discard(folder: LaunchFolder, launch: Launch) -> None:
    """Remove a launch that never ran, and the sweep's folder if it holds nothing else."""
    if any(folder.logs.glob("*_log.*")):
        return
    shutil.rmtree(folder.root, ignore_errors=True)
    directory = launch.directory
    locks = [
        path for one in (directory.lock, directory.launch_lock) for path in one.parent.glob(f"{one.name}*")
    ]
    empty = {directory.sweep_file, *locks}
    there = [path for path in directory.root.rglob("*") if not path.is_dir()]
    if all(path in empty or path.is_relative_to(directory.cache) for path in there):
        shutil.rmtree(directory.root, ignore_errors=True)


def cancel(folder: LaunchFolder, patience_s: float, say: Callable[[str], None]) -> None:
    """End a launch: waiting jobs end at once; running jobs drain for up to ``patience_s`` and then end."""
    launch = Launch.read(folder)
    if not active_jobs(folder, launch):
        elsewhere = [job.host for job in launch.jobs if job.is_elsewhere]
        if elsewhere and not _last_outcome(folder, launch):  # no lock is held between two of its jobs
            with suppress(OSError):  # no space, say
                folder.stop_file.touch()
            rest = f"one that is left on {elsewhere[0]} ends"
            say(f"launch {folder.name}: no job of it is seen from here; {rest}")
        else:
            say(f"launch {folder.name}: no job of it waits or runs")
        return
    for file in (folder.stop_file, launch.directory.stop_file):
        with suppress(OSError):  # without room for a file, a signal must do
            file.touch()
    local = launch.site["scheduler"] == "local"
    if local:
        _signal(launch, signal.SIGTERM)
    else:
        cancel_jobs(launch.jobs, state="PENDING")
    deadline = time.monotonic() + patience_s
    while left := active_jobs(folder, launch):
        if time.monotonic() > deadline:
            late = f"{', '.join(state.id for state in left)}: did not end within {patience_s:.0f} s"
            if any(job.is_elsewhere for job in launch.jobs):
                raise UserError(f"{late}, and can only be killed on {left[0].nodes}: cancel it there")
            say(f"{late}, ended now")
            if local:
                _signal(launch, signal.SIGKILL)
                for run in folder.root.glob("runs/*"):  # Ray's workers lead sessions of their own
                    kill_marked(f"{run.name}.")
            else:
                cancel_jobs(launch.jobs)
            break
        if not local and any(state.state == "PENDING" for state in left):  # requeued a moment ago
            cancel_jobs(launch.jobs, state="PENDING")
        time.sleep(_LOOK_S)
    launch.directory.stop_file.unlink(missing_ok=True)
    say(f"launch {folder.name}: cancelled; what is done stays, and launching it again goes on")


def _signal(launch: Launch, number: int) -> None:
    for job in launch.jobs:
        if job.is_elsewhere or process_start(int(job.id)) != job.started:
            continue
        if number == signal.SIGKILL:
            os.killpg(int(job.id), number)  # it leads a session of its own
        else:
            os.kill(int(job.id), number)


def log_files(folder: LaunchFolder, job: str | None = None) -> list[Path]:
    """The logs of a launch, the newest last; of one job (``123``, or ``123_4`` of an array)."""
    own = [*folder.logs.glob("local.log")] if job is None else []
    found = [
        path
        for path in [*own, *folder.logs.glob("*_log.*")]
        if path.stat().st_size and (job is None or path.name.startswith(f"{job}_"))
    ]
    return sorted(found, key=lambda path: path.stat().st_mtime)
