"""A place in a worker of Ray Tune: the trials it is given, what it reports, and how they end."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.trainable.function_trainable import wrap_function

from ddsweep.catalog import TrialSpec
from ddsweep.errors import DiskFullError, DivergedError, UserError
from ddsweep.results.files import full_disk_told, is_there
from ddsweep.results.layout import SweepDirectory
from ddsweep.sweep.first_step import leaving_before_the_first_step
from ddsweep.sweep.mailbox import ask
from ddsweep.sweep.placement import check_gpus_seen
from ddsweep.sweep.prepare import splits_key
from ddsweep.sweep.shards import SharedSplits, get_splits
from ddsweep.trial import Progress, TrialJob, distil_together, record_failure
from ddsweep.trial_plan import TrialSettings, check_gpu_seen

__all__ = ["TrialOfWorker", "WorkerInputs", "distil_in_worker", "put_trials", "trainable"]

ASK_EVERY_S = 5.0
"""How often a place with room for more trials asks for them."""

LOOK_EVERY_S = 1.0
"""How often a trial looks for the stop file: not at each outer step, because 4,000 trials ask one file
system."""


@dataclass(frozen=True)
class TrialOfWorker:
    """One trial for a worker. ``shared`` are the data of one that came later than the worker's inputs."""

    spec: TrialSpec
    settings: TrialSettings
    shared: SharedSplits | None = None


@dataclass(frozen=True)
class WorkerInputs:
    """What a worker process needs to run any trial of the sweep: ``trials`` are references to parts of them,
    because a worker fetches them again for each trial, and there may be 100,000. ``mailbox`` has the answers
    to its questions. ``report_every`` is in seconds: a logged outer step of a trial that comes sooner after
    its last one is not reported unless it has a score."""

    sweep: str
    trials: Mapping[str, Any]
    shared: Mapping[str, SharedSplits]
    directory: SweepDirectory
    mailbox: Any
    report_every: float
    device: str = "auto"

    def trial(self, trial_id: str) -> TrialOfWorker:
        part: dict[str, TrialOfWorker] = ray.get(self.trials[_part_of(trial_id)])
        return part[trial_id]


def _part_of(trial_id: str) -> str:
    """The ids are hashes: 256 parts of about the same size."""
    return trial_id[:2]


def put_trials(trials: Sequence[TrialOfWorker]) -> dict[str, Any]:
    """``trials`` in Ray's object store, by the part."""
    parts: dict[str, dict[str, TrialOfWorker]] = {}
    for trial in trials:
        parts.setdefault(_part_of(trial.spec.trial_id), {})[trial.spec.trial_id] = trial
    return {key: ray.put(part) for key, part in parts.items()}


class _RestError(Exception):
    """This place leaves its room to others; Tune starts it again."""


class _Place:
    """The companions of one place: trials come from the queue of the driver, and news go there."""

    def __init__(self, work: WorkerInputs, name: str, size: int) -> None:
        self._work, self._name, self._size = work, name, size
        self._asked, self._number, self._looked = -math.inf, 0, -math.inf
        self._stop, self._has_left, self._last = False, False, False
        self._reported: dict[str, float] = {}
        self._taken: dict[str, int] = {}
        self._new: dict[str, Any] = {}
        self.should_stop = self.looks_for_the_stop_file

    def looks_for_the_stop_file(self) -> bool:
        if not self._stop and time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._stop, self._looked = is_there(self._work.directory.stop_file), time.monotonic()
        return self._stop

    def _ask(self, question: dict[str, Any]) -> Any:
        self._number += 1
        return ask(self._work.mailbox, tune.report, {**question, "place": self._name, "number": self._number})

    def more(self, running: int) -> list[TrialJob]:
        """Asked for when a trial has left, or now and then: others may have been released meanwhile."""
        if running and not self._has_left and time.monotonic() - self._asked < ASK_EVERY_S:
            return []
        while running < self._size and not self._last and not self.looks_for_the_stop_file():
            given, self._last, rests, new = self._ask({"state": "room", "running": running})
            self._new |= new
            self._asked = time.monotonic()
            if rests:
                raise _RestError
            if given is None:  # this place waits for its turn, or for others at a rung
                time.sleep(LOOK_EVERY_S)
                continue
            self._has_left = False
            jobs = [job for trial_id in given if (job := self._job(trial_id)) is not None]
            if jobs or not given:
                return jobs
        return []

    def _job(self, trial_id: str) -> TrialJob | None:
        new = self._new.pop(trial_id, None)
        trial: TrialOfWorker = self._work.trial(trial_id) if new is None else ray.get(new)
        try:
            check_gpus_seen(trial.settings.gpus, f"trial {trial_id}")
            splits = get_splits(trial.shared or self._work.shared[splits_key(trial.spec)])
        except UserError as error:
            self.ended(trial.spec, error)
            return None
        return TrialJob(trial.spec, splits, self._work.directory, trial.settings)

    def progress(self, spec: TrialSpec, progress: Progress) -> bool:
        trial_id = spec.trial_id
        taken = self._taken.get(trial_id, 0) + progress.steps_taken
        late = time.monotonic() - self._reported.get(trial_id, -math.inf) >= self._work.report_every
        if progress.val_score is None and not late:
            self._taken[trial_id] = taken
            return True
        self._reported[trial_id], self._taken[trial_id] = time.monotonic(), 0
        news = {
            "state": "running",
            "trial": trial_id,
            "outer_step": progress.outer_step,
            "steps_taken": taken,
            "outer_loss": progress.outer_loss,
            "val_score": progress.val_score,
        }
        if not progress.rung:
            tune.report(news)
            return True
        goes_on: bool = self._ask(news)
        self._has_left |= not goes_on
        return goes_on

    def ended(self, spec: TrialSpec, outcome: bool | DivergedError | UserError) -> None:
        """Errors that a retry cannot mend are recorded, and end the trial at once."""
        self._has_left = True
        state = "distilled" if outcome is True else "drained"
        news: dict[str, Any] = {"trial": spec.trial_id, "state": state}
        if isinstance(outcome, Exception):
            full = str(outcome) if isinstance(outcome, DiskFullError) else None
            news["full_disk"] = full
            if not (full and self.looks_for_the_stop_file()):  # else it goes on from its checkpoint
                record_failure(self._work.directory, spec, self._work.sweep, outcome, "distillation", 1)
                news["state"] = "failed"
        tune.report(news)


def distil_in_worker(work: WorkerInputs, place: str, size: int) -> None:
    """Runs in a Tune worker. An error that is not of a trial is raised, and Tune starts the place again."""
    here = _Place(work, place, size)
    with (
        full_disk_told(work.directory.root),
        leaving_before_the_first_step(here.looks_for_the_stop_file) as should_stop,
    ):
        here.should_stop = should_stop
        distil_together(here)


def trainable(work: WorkerInputs, requests: Mapping[str, dict[str, float]]) -> type[tune.Trainable]:
    """A Tune trainable for places: its configuration has the ``name`` of a place, the ``size`` of its cohort
    and its ``title`` in the dashboard. ``requests`` has the CPUs and GPUs of each place."""
    reference = ray.put(work)

    def distil(config: dict[str, Any]) -> None:
        name, size = config["place"]["name"], config["place"]["size"]
        try:
            inputs: WorkerInputs = ray.get(reference)
            check_gpu_seen(inputs.device, requests[name].get("GPU", 0), f"place {name}")
            distil_in_worker(inputs, name, size)
        except StopIteration as error:  # which Tune would take for the end of this function
            raise RuntimeError("StopIteration") from error

    wrapped: type[tune.Trainable] = wrap_function(distil)

    class Distil(wrapped):
        def __repr__(self) -> str:
            return str(self.config["place"]["title"])

        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
            return tune.PlacementGroupFactory([requests[config["place"]["name"]]])

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            # How long a stopped place may take to end; Tune's 2 s would fail the next one.
            os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")
            return bool(super().reset_config(new_config))

    Distil.__qualname__ = Distil.__name__  # the dashboard's name of the class, without that of this function
    return Distil
