"""What there is to do in a campaign (`campaign.py`), and how it is done: networks of pools, trials (those of
one shape together), evaluations. No Ray, no pydantic."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from campaign_jobs import Job

from ddsweep.catalog import POOL_FRACTION, DatasetSpec, EvalUnit, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.cohorts import Cohort, dealt_out
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DivergedError, TooLargeError, UserError
from ddsweep.evaluation import evaluate_unit, finish, missing_units
from ddsweep.pools.store import write_index
from ddsweep.pools.train import PoolGroup, missing_groups, train_group
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.sweep.retry import WorkerError
from ddsweep.trial import Progress, TrialJob, distil_together, is_distilled, record_failure

APART_FROM, FAILED_FROM = 2, 4
"""After so many deaths of its process a trial is distilled by itself, and after so many it has failed."""


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
    def label(self) -> str:
        if self.group is not None:
            return f"networks {self.group.label}"
        first = self.trials[0].trial_id
        if self.unit is not None:
            return f"{first} {self.unit.protocol} group {self.unit.group}"
        return first if len(self.trials) == 1 else f"{first} and {len(self.trials) - 1} more"

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
    memory_mode: str = "auto"
    segment: int | None = None

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
        compile = job.settings[job.trials.index(trial)].compile
        try:
            evaluate_unit(
                *(trial, task.unit, job.evaluation, _splits_of(place, trial), directory, device),
                compile=compile,
            )
        except TooLargeError as error:  # of this trial alone
            record_failure(directory, trial, job.name, error, "evaluation", 1)
            return f"failed: {error}"
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


def lost(place: Place, task: Task, error: BaseException) -> str:
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
