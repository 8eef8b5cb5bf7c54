"""The code that jobs of a launch run. submitit pickles these objects: they hold a path and a number.

Files in the launch's folder tell the outcome, never submitit's own pickles: pickles of an earlier start of a
requeued job stay, and a lost node leaves none.
"""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddsweep.catalog.numbers import counted
from ddsweep.errors import EXIT_DRAINED, ResultsError, UserError
from ddsweep.interpreter import python_module
from ddsweep.launch.allocation import Place, node_limits
from ddsweep.launch.folder import Launch, LaunchFolder, write_json
from ddsweep.launch.processes import Signals
from ddsweep.launch.ray_cluster import run_on_cluster
from ddsweep.launch.ray_head import LOST_HEAD
from ddsweep.launch.site import Site
from ddsweep.launch.slurm import is_running
from ddsweep.machine import versions
from ddsweep.results.files import is_there
from ddsweep.results.lock import process_start

if TYPE_CHECKING:
    import submitit

__all__ = ["ClusterJob", "EvalsJob", "FinishJob", "Stage", "TrialsJob", "stages"]


@dataclass(frozen=True)
class _Job(ABC):
    """``folder`` is that of the launch, ``index`` the element of an array."""

    folder: str
    index: int = 0

    kind = ""

    def __call__(self) -> None:
        signals = Signals()
        folder = LaunchFolder(Path(self.folder))
        place = _place(folder)
        try:
            launch = Launch.read(folder)
            if place.is_head:
                signals.stop_when(_told_to_stop(folder, launch))
            _note_versions(launch)
            code = self.work(folder, launch, place, signals)
            told = ""
        except UserError as error:
            print(f"ddsweep: {error}", file=sys.stderr, flush=True)
            code, told = 1, str(error)
        if not place.is_head:
            return
        again = code == LOST_HEAD or (code == EXIT_DRAINED and (signals.ending or signals.terminated))
        again = again and not is_there(folder.stop_file)
        if again and signals.terminated:  # cancelled, or preempted: then it is not for us to requeue it
            again = launch.site["scheduler"] == "slurm" and is_running(place.job)
        if again and place.restart >= launch.site["requeues"]:
            times = counted(place.restart, "time")
            told = f"not requeued again, after {times} (requeues); launch it again to go on"
            again, code = False, EXIT_DRAINED
        outcome = {"code": code, "restart": place.restart, "requeued": again, "message": told}
        self._record(folder, outcome)
        if again:
            with suppress(OSError):
                print(
                    f"requeued: {place.restart + 1} of at most {counted(launch.site['requeues'], 'time')}",
                    flush=True,
                )
            try:
                signals.requeue()
            except Exception as error:  # Slurm does not answer, or refuses
                told = f"could not be requeued ({error}); launch it again to go on"
                print(f"ddsweep: {told}", file=sys.stderr, flush=True)
                self._record(folder, {**outcome, "requeued": False, "message": told})
        if code:
            sys.exit(code)  # then Slurm's own record says FAILED, with this code

    def _record(self, folder: LaunchFolder, outcome: Mapping[str, Any]) -> None:
        """Write how the job ended. A full disk, of the logs too, must not keep it from its requeue."""
        try:
            write_json(folder.outcome(self.kind, self.index), outcome)
        except ResultsError as error:
            with suppress(OSError):
                print(f"ddsweep: {error}", file=sys.stderr, flush=True)

    @abstractmethod
    def work(self, folder: LaunchFolder, launch: Launch, place: Place, signals: Signals) -> int:
        """Returns the exit code."""

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """For submitit: the call of a requeued job. All finished work is on disk."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class ClusterJob(_Job):
    """One allocation: a Ray cluster over its nodes, and ``ddsweep run`` on it."""

    kind = "cluster"

    def work(self, folder: LaunchFolder, launch: Launch, place: Place, signals: Signals) -> int:
        site = launch.site_spec
        own = site.cpus_per_node if site.scheduler == "local" else None

        def command(address: str) -> list[str]:
            words = ["run", str(folder.sweep_file), "--address", address, "--results", launch.results]
            if launch.data_root:
                words += ["--data-root", launch.data_root]
            return python_module("ddsweep", *words)

        run = folder.run(place.job, place.restart)
        return run_on_cluster(site, place, run, command, signals, node_limits(os.environ, own), say=_say)


class TrialsJob(_Job):
    """An array element that distils its share of the trials, without Ray."""

    kind = "trials"

    def work(self, folder: LaunchFolder, launch: Launch, place: Place, signals: Signals) -> int:
        from ddsweep.launch.array import distil_share

        return distil_share(folder, launch, self.index, signals)


class EvalsJob(_Job):
    """An array element that evaluates its share of the distilled trials."""

    kind = "evals"

    def work(self, folder: LaunchFolder, launch: Launch, place: Place, signals: Signals) -> int:
        from ddsweep.launch.array import evaluate_share

        return evaluate_share(folder, launch, self.index, signals)


class FinishJob(_Job):
    """The last job of an array launch: sums up the results of the others."""

    kind = "finish"

    def work(self, folder: LaunchFolder, launch: Launch, place: Place, signals: Signals) -> int:
        from ddsweep.launch.array import finish_all

        return finish_all(folder, launch)


@dataclass(frozen=True)
class Stage:
    """One job of a launch on ``nodes`` nodes, or an array of jobs: one for each of ``calls``."""

    calls: Sequence[_Job]
    nodes: int = 1

    @property
    def kind(self) -> str:
        return self.calls[0].kind


def stages(folder: LaunchFolder, mode: str, site: Site, elements: int) -> list[Stage]:
    """The jobs of a launch in their order; each but the first waits for the one before. ``elements`` is the
    number of elements that distil in mode ``array``; 0: all is distilled."""
    root = str(folder.root)
    if mode == "cluster":
        return [Stage([ClusterJob(root)], site.nodes)]
    trials = [Stage([TrialsJob(root, i) for i in range(elements)])] if elements else []
    evals = Stage([EvalsJob(root, i) for i in range(site.array_tasks)])
    return [*trials, evals, Stage([FinishJob(root)])]


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _place(folder: LaunchFolder) -> Place:
    import submitit

    job: Any = submitit.JobEnvironment()
    restart = os.environ.get("SLURM_RESTART_COUNT") or 0
    if job.cluster == "local":  # one task; its restarts are counted by the folders
        runs = folder.root / "runs"
        restart = 0
        while (begun := runs / f"{job.job_id}.{restart}" / "begun").exists():
            restart += 1
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
    return Place(job.job_id, job.global_rank, tuple(job.hostnames), int(restart))


def _told_to_stop(folder: LaunchFolder, launch: Launch) -> Callable[[], bool]:
    """``ddsweep cancel`` leaves a file. A local job also ends when the processes that started it have ended:
    nobody could stop it later."""
    parent = os.getppid()

    def told() -> bool:
        if is_there(folder.stop_file):
            return True
        if launch.site["scheduler"] != "local":
            return False
        return os.getppid() != parent or any(process_start(int(job.id)) != job.started for job in launch.jobs)

    return told


def _note_versions(launch: Launch) -> None:
    if launch.versions != versions():
        _say(f"note: submitted with {launch.versions}, and now runs with {versions()}")
