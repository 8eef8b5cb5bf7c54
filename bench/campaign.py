"""Long runs in short periods: trials that go on, period after period, from one folder. No Ray, no pydantic.

``plan`` expands sweep files into JSON, where ddsweep is installed whole. ``run`` works on what is missing for
so many seconds, where torch is: networks of pools, trials (those of one shape together), evaluations. See
bench/README.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from campaign_jobs import Job, plan_all, read_jobs

from ddsweep.catalog import (
    POOL_FRACTION,
    DatasetSpec,
    EvalUnit,
    TrialSpec,
)
from ddsweep.catalog.numbers import counted
from ddsweep.cohorts import Cohort, dealt_out
from ddsweep.core.memory import keep_to_share
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import EXIT_DRAINED, CheckpointError, DivergedError, UserError
from ddsweep.evaluation import evaluate_unit, finish, missing_units
from ddsweep.pools.store import write_index
from ddsweep.pools.train import PoolGroup, missing_groups, train_group
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.results.lock import SweepLock
from ddsweep.sweep.retry import WorkerError
from ddsweep.trial import (
    Progress,
    TrialJob,
    checkpoint_provenance,
    distil_together,
    is_distilled,
    record_failure,
)
from ddsweep.trial_plan import pick_device

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE_S = 60.0
"""After the last second a worker has this long for its outer step and its checkpoints. Then it is killed."""

APART_FROM, FAILED_FROM = 2, 4
"""After so many deaths of its process a trial is distilled by itself, and after so many it has failed."""


# ------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """What one worker does at a time: a group of a pool's networks, trials together, or a unit of a trial's
    evaluation. ``cohort`` is how many trials it would be with those that are distilled or have failed."""

    job: int
    trials: tuple[TrialSpec, ...] = ()
    cohort: int = 1
    unit: EvalUnit | None = None
    group: PoolGroup | None = None

    @property
    def pieces(self) -> set[Any]:
        """What no other worker is to do meanwhile."""
        ids = [trial.trial_id for trial in self.trials] or [""]
        return {(self.job, trial_id, self.unit, self.group) for trial_id in ids}


@dataclass(frozen=True)
class _Resources:
    """What `dealt_out` asks of the resources of a sweep."""

    cohort: int | str
    compile: str
    gpus: float
    max_concurrent: int | None = None

    def for_trial(self, trial: TrialSpec) -> tuple[float, float]:
        return 1.0, self.gpus


@dataclass(frozen=True)
class Place:
    """Where and how the workers of this period work. ``deadline`` is a time of ``time.time()``."""

    folder: Path
    jobs: tuple[Job, ...]
    data_root: Path | None
    device: str
    side_by_side: int
    threads: int
    deadline: float

    @property
    def gpus(self) -> float:
        """The part of the GPU that each worker has."""
        return 1 / self.side_by_side if self.device == "cuda" else 0.0

    def directory(self, job: Job) -> SweepDirectory:
        return SweepDirectory(self.folder / job.name)

    def cohorts(self, job: Job) -> list[Cohort]:
        """All trials of ``job`` by those that are distilled together: the same in every period."""
        resources = _Resources(job.cohort, job.settings[0].compile, self.gpus)
        return dealt_out(job.trials, resources, self.side_by_side)

    @property
    def deaths(self) -> dict[str, int]:
        """How often the process of a trial has died under it, over all periods."""
        file = self.folder / "deaths.json"
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def keep_deaths(self, deaths: dict[str, int]) -> None:
        write_atomic(self.folder / "deaths.json", json.dumps(deaths).encode(), self.folder / ".tmp")

    def is_over(self) -> bool:
        return time.time() >= self.deadline or (self.folder / "STOP").exists()


def missing(place: Place) -> list[Task]:
    """What can be done now: first the evaluations of distilled sets, then job after job its pool, and once
    that is whole its trials; at last those whose process has died too often, each by itself."""
    evaluations: list[Task] = []
    others: list[Task] = []
    apart: list[Task] = []
    deaths = place.deaths
    for number, job in enumerate(place.jobs):
        directory = place.directory(job)
        if job.pool is not None:
            name, recipe = job.pool
            pool = PoolDirectory(place.folder / "pools" / name)
            if groups := missing_groups(recipe, pool):
                others += [Task(number, group=group) for group in groups]
                continue
            if not pool.index.is_file():
                write_index(pool, recipe.spec(name))
        for cohort in place.cohorts(job):
            size, together = len(cohort.trials), []
            for trial in cohort.trials:
                if directory.failure_part(trial.trial_id).exists():
                    continue
                if is_distilled(trial, directory):
                    units = missing_units(trial, job.evaluation, directory)
                    evaluations += [Task(number, (trial,), unit=unit) for unit in units]
                    if not units:
                        finish(trial, job.evaluation, directory, job.name)
                elif deaths.get(trial.trial_id, 0) < APART_FROM:
                    together.append(trial)
                else:
                    apart.append(Task(number, (trial,), size))
            if together:
                others.append(Task(number, tuple(together), size))
    return evaluations + others + apart


@lru_cache(maxsize=4)
def _splits(
    dataset: DatasetSpec, root: Path | None, fraction: float, seed: int, whitening: str = "none"
) -> Splits:
    return load_splits(dataset, root, validation_fraction=fraction, split_seed=seed, whitening=whitening)


def _splits_of(place: Place, trial: TrialSpec) -> Splits:
    split = trial.validation_fraction, trial.split_seed, trial.whitening
    return _splits(trial.dataset, place.data_root, *split)


def work(place: Place, task: Task) -> str:
    """Do ``task`` as far as the deadline allows; what came of it, in words."""
    job = place.jobs[task.job]
    if place.is_over():
        return "not begun"
    began, directory = time.monotonic(), place.directory(job)
    if task.group is not None:
        assert job.pool is not None
        name, recipe = job.pool
        pool = PoolDirectory(place.folder / "pools" / name)
        splits = _splits(recipe.dataset, place.data_root, POOL_FRACTION, 0)
        device = torch.device(place.device)
        more = {"should_stop": place.is_over}
        whole = train_group(name, recipe, task.group, splits, pool, device, place.threads, **more)
        said = "trained" if whole else GOES_ON
    elif task.unit is not None:
        (trial,) = task.trials
        device = torch.device(place.device)
        evaluate_unit(trial, task.unit, job.evaluation, _splits_of(place, trial), directory, device)
        said = "evaluated"
    else:
        together = _Together(place, job, [_trial_job(place, task, trial) for trial in task.trials])
        distil_together(together)
        said = ", ".join(
            word if number == len(task.trials) else f"{number} {word}"
            for word, number in Counter(together.said).items()
        )
    return f"{said} after {time.monotonic() - began:.0f} s"


GOES_ON = "to be gone on with"


def _trial_job(place: Place, task: Task, trial: TrialSpec) -> TrialJob:
    job = place.jobs[task.job]
    how = {"device": place.device, "gpus": place.gpus, "threads": place.threads, "cohort": task.cohort}
    settings = replace(job.settings[job.trials.index(trial)], **how)
    return TrialJob(trial, _splits_of(place, trial), place.directory(job), settings)


@dataclass
class _Together:
    """The trials of one task, all of which begin at once, and in words what came of each."""

    place: Place
    job: Job
    waiting: list[TrialJob]
    said: list[str] = field(default_factory=list)

    def more(self, running: int) -> list[TrialJob]:
        begun, self.waiting = self.waiting, []
        return begun

    def should_stop(self) -> bool:
        return self.place.is_over()

    def progress(self, spec: TrialSpec, progress: Progress) -> bool:
        if progress.val_score is not None:
            print(f"{self.job.name} {spec.trial_id}: {_progress(progress)}", flush=True)
        return True

    def ended(self, spec: TrialSpec, outcome: bool | DivergedError | UserError) -> None:
        said = "distilled" if outcome is True else GOES_ON
        if isinstance(outcome, Exception):
            said = "failed"
            directory = self.place.directory(self.job)
            record_failure(directory, spec, self.job.name, outcome, "distillation", 1)
            print(f"{self.job.name} {spec.trial_id}: {outcome}", flush=True)
        self.said.append(said)


def _progress(progress: Progress) -> str:
    loss = "-" if progress.outer_loss is None else f"{progress.outer_loss:.4f}"
    return (
        f"step {progress.outer_step}, loss {loss}, validation {progress.val_score:.4f}, "
        f"{progress.seconds:.0f} s in all"
    )


# ------------------------------------------------------------------------------------------ periods


def run(place: Place) -> bool:
    """Work for one period; True if nothing is left to do. What a worker dies of is not tried again in the
    same period. Raises the `UserError` of a worker, such as missing data, once the others have drained."""
    (place.folder / "STOP").unlink(missing_ok=True)
    for job in place.jobs:
        directory = place.directory(job)
        directory.create()
        write_atomic(directory.sweep_file, job.yaml.encode(), directory.temporary)
        if job.pool is not None:
            PoolDirectory(place.folder / "pools" / job.pool[0]).create()
    idle = [_new_worker(place) for _ in range(place.side_by_side)]
    running: dict[Future[str], tuple[ProcessPoolExecutor, Task]] = {}
    given: set[Any] = set()
    wrong: UserError | None = None

    def look(seconds: float, when: str) -> None:
        nonlocal wrong
        for future in wait(running, seconds, when).done:
            worker, task = running.pop(future)
            error = future.exception()
            said = future.result() if error is None else str(error)
            if isinstance(error, UserError):
                wrong = error
                (place.folder / "STOP").touch()
            elif error is not None:
                if not isinstance(error, BrokenProcessPool):
                    traceback.print_exception(error)
                said = _lost(place, task, error)
                _kill(worker)
                worker = _new_worker(place)
            idle.append(worker)
            print(f"{place.jobs[task.job].name} {_named(task)}: {said}", flush=True)

    try:
        while not place.is_over():
            for task in missing(place) if idle else ():
                if idle and given.isdisjoint(task.pieces):
                    given |= task.pieces
                    worker = idle.pop()
                    # Signals are for the driver, which tells by a file: its workers inherit the mask.
                    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                    try:
                        future = worker.submit(work, place, task)
                    except BrokenProcessPool:  # it was killed while idle
                        worker = _new_worker(place)
                        future = worker.submit(work, place, task)
                    running[future] = worker, task
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if not running:
                break
            look(0.5, FIRST_COMPLETED)
        look(GRACE_S, ALL_COMPLETED)
    finally:
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            _kill(worker)
    if wrong is not None:
        raise wrong
    return not missing(place)


def _new_worker(place: Place) -> ProcessPoolExecutor:
    """A process of its own, so that only one task is lost with it. CUDA does not outlive a fork."""
    start = os.getpid(), place.device, place.gpus
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, start)


def _begin(driver: int, device: str, gpus: float) -> None:
    """Runs in each worker: it ends with the driver, or two would write the checkpoints of a trial."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(1)
    keep_to_share(device, gpus)


def _kill(worker: ProcessPoolExecutor) -> None:
    for process in list((worker._processes or {}).values()):
        process.kill()


def _lost(place: Place, task: Task, error: BaseException) -> str:
    """What becomes of a task whose process died, or raised an unforeseen ``error``; in words."""
    why = "its process was killed" if isinstance(error, BrokenProcessPool) else f"{error!r}"
    if task.group is not None or task.unit is not None:
        return f"{why}; it is tried again in the next period"
    job, deaths = place.jobs[task.job], place.deaths
    directory, said = place.directory(job), []
    for trial in task.trials:
        if is_distilled(trial, directory) or directory.failure_part(trial.trial_id).exists():
            continue
        times = deaths[trial.trial_id] = deaths.get(trial.trial_id, 0) + 1
        if times >= FAILED_FROM:
            del deaths[trial.trial_id]
            often = WorkerError(f"tried {counted(times, 'time')}: {why}")
            record_failure(directory, trial, job.name, often, "worker", times)
        said.append("failed" if times >= FAILED_FROM else "by itself" if times >= APART_FROM else "together")
    place.keep_deaths(deaths)
    return f"{why}; next: {', '.join(dict.fromkeys(said)) or 'nothing is left'}"


def _named(task: Task) -> str:
    if task.group is not None:
        return f"networks {task.group.label}"
    first = task.trials[0].trial_id
    if task.unit is not None:
        return f"{first} {task.unit.protocol} group {task.unit.group}"
    return first if len(task.trials) == 1 else f"{first} and {len(task.trials) - 1} more"


def status(folder: Path) -> list[str]:
    """One line for each trial: how far it is."""
    lines = []
    for job in read_jobs(folder):
        directory = SweepDirectory(folder / job.name)
        for trial in job.trials:
            if directory.trials_part(trial.trial_id).exists():
                state = "done"
            elif directory.failure_part(trial.trial_id).exists():
                state = "failed"
            elif directory.distilled(trial.trial_id).exists():
                left = len(missing_units(trial, job.evaluation, directory))
                state = f"distilled, {left} of {len(job.evaluation.units(trial))} evaluations missing"
            else:
                state = _steps(trial, directory)
            lines.append(f"{job.name} {trial.trial_id}: {state}")
    return lines


def _steps(trial: TrialSpec, directory: SweepDirectory) -> str:
    try:
        step, columns = checkpoint_provenance(trial, directory)
    except CheckpointError:
        return "not begun"
    score = columns["val_score"]
    best = "" if score is None else f", validation {score:.4f}"
    return f"step {step} of {trial.outer_steps}{best}, {columns['wall_seconds']:.0f} s"


# --------------------------------------------------------------------------------------------- main


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("plan", "add sweep files to a campaign (needs all of ddsweep)"),
        ("run", "work on what is missing for one period"),
        ("status", "how far each trial is"),
    ):
        own = verbs.add_parser(verb, help=text)
        own.add_argument("folder", type=Path, metavar="DIR", help="the folder of the campaign")
        if verb != "status":
            root = os.environ.get("DDSWEEP_DATA")
            own.add_argument("--data-root", type=Path, default=Path(root) if root else None)
        if verb == "plan":
            more = "sweep files, then settings for all of them; pool.KEY=VALUE: of their pool's file"
            own.add_argument("given", nargs="+", metavar="FILE|KEY=VALUE", help=more)
        if verb == "run":
            own.add_argument("--seconds", type=float, required=True, help="how long this period is")
            own.add_argument("--device", choices=("cpu", "cuda"))
            own.add_argument("--side-by-side", type=int, help="worker processes (2 on a GPU, else 1)")
            own.add_argument("--threads", type=int, default=1, help="CPU threads of each worker")
            own.add_argument("--only", nargs="*", metavar="SWEEP", help="these sweeps of the campaign only")
    return parser.parse_args(given)


def _run(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pick_device(device, 1.0)
    side_by_side = options.side_by_side or (2 if device == "cuda" else 1)
    jobs = read_jobs(options.folder)
    names = [job.name for job in jobs]
    if unknown := sorted(set(options.only or ()) - set(names)):
        raise UserError(f"--only: {', '.join(unknown)}: the campaign has {', '.join(names)}")
    chosen = tuple(job for job in jobs if not options.only or job.name in options.only)
    place = Place(
        options.folder.resolve(),
        chosen,
        options.data_root,
        device,
        side_by_side,
        options.threads,
        time.time() + options.seconds,
    )

    def stop(number: int, frame: Any) -> None:
        (place.folder / "STOP").touch()

    for number in SIGNALS:
        signal.signal(number, stop)
    with SweepLock(place.folder / ".lock"):
        whole = run(place)
    for line in status(options.folder):
        print(line)
    return 0 if whole else EXIT_DRAINED


def main(given: Sequence[str] | None = None) -> int:
    options = _arguments(given)
    try:
        if options.verb == "plan":
            plan_all(options.folder, options.given, options.data_root)
        elif options.verb == "status":
            print("\n".join(status(options.folder)))
        else:
            return _run(options)
    except UserError as error:
        print(f"campaign: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
