"""A trial in a worker of Ray Tune: what it is given, what it reports, and how it ends."""

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
from ddsweep.results.files import full_disk_told
from ddsweep.results.layout import SweepDirectory
from ddsweep.sweep.first_step import leaving_before_the_first_step
from ddsweep.sweep.placement import check_gpus_seen
from ddsweep.sweep.prepare import splits_key
from ddsweep.sweep.shards import SharedSplits, get_splits
from ddsweep.trial import Progress, distil_trial, record_failure
from ddsweep.trial_plan import TrialSettings

__all__ = ["TrialOfWorker", "WorkerInputs", "distil_in_worker", "put_trials", "trainable"]

LOOK_EVERY_S = 1.0
"""How often a trial looks for the stop file: not at each outer step, because 4,000 trials ask one file
system."""


@dataclass(frozen=True)
class TrialOfWorker:
    """One trial for a worker, and its name in the dashboard."""

    spec: TrialSpec
    settings: TrialSettings
    label: str


@dataclass(frozen=True)
class WorkerInputs:
    """What a worker process needs to run any trial of the sweep: ``trials`` are references to parts of
    them, for a worker fetches what it needs anew for each trial, and there may be 100,000. ``report_every``
    is in seconds: a logged outer step that comes sooner after the last one is not reported unless it has a
    score."""

    sweep: str
    trials: Mapping[str, Any]
    shared: Mapping[str, SharedSplits]
    directory: SweepDirectory
    report_every: float

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


def distil_in_worker(work: WorkerInputs, trial_id: str) -> None:
    """Runs in a Tune worker. Errors that a retry cannot mend are recorded and end the trial at once; any
    other is raised, and Tune tries again."""
    trial = work.trial(trial_id)
    spec = trial.spec

    looked = reported = -math.inf
    taken = 0
    stop = False

    def should_stop() -> bool:
        nonlocal looked, stop
        if not stop and time.monotonic() - looked >= LOOK_EVERY_S:
            stop, looked = work.directory.stop_file.exists(), time.monotonic()
        return stop

    if should_stop():
        tune.report({"state": "drained"})
        return

    def on_progress(progress: Progress) -> None:
        nonlocal reported, taken
        taken += progress.steps_taken
        if progress.val_score is None and time.monotonic() - reported < work.report_every:
            return
        reported = time.monotonic()
        tune.report(
            {
                "state": "running",
                "outer_step": progress.outer_step,
                "steps_taken": taken,
                "outer_loss": progress.outer_loss,
                "val_score": progress.val_score,
            }
        )
        taken = 0

    try:
        with (
            full_disk_told(work.directory.root),
            leaving_before_the_first_step(should_stop) as should_stop_at_step,
        ):
            check_gpus_seen(trial.settings.gpus, f"trial {trial_id}")
            distilled = distil_trial(
                spec,
                get_splits(work.shared[splits_key(spec)]),
                work.directory,
                trial.settings,
                should_stop=should_stop_at_step,
                on_progress=on_progress,
            )
    except (DivergedError, UserError) as error:
        full = isinstance(error, DiskFullError)
        if full and should_stop():  # it goes on from the checkpoint that it has
            tune.report({"state": "drained", "full_disk": str(error)})
            return
        record_failure(work.directory, spec, work.sweep, error, "distillation", 1)
        tune.report({"state": "failed", "full_disk": str(error) if full else None})
        return
    tune.report({"state": "distilled" if distilled else "drained"})


def trainable(
    work: WorkerInputs, requests: Mapping[str, dict[str, float]], name: str | None
) -> type[tune.Trainable]:
    """A Tune trainable whose actors have readable names in the dashboard: that of their trial, or ``name``
    where workers are reused (Ray asks an actor for its name only once). ``requests`` has the CPUs and GPUs of
    each trial."""
    reference = ray.put(work)

    def distil(config: dict[str, Any]) -> None:
        distil_in_worker(ray.get(reference), config["trial_id"])

    wrapped: type[tune.Trainable] = wrap_function(distil)

    class Distil(wrapped):
        def __repr__(self) -> str:
            return name or f"distil {ray.get(reference).trial(self.config['trial_id']).label}"

        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
            return tune.PlacementGroupFactory([requests[config["trial_id"]]])

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            # How long a stopped or paused trial may take to end; Tune's 2 s would fail the next one.
            os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")
            return bool(super().reset_config(new_config))

    Distil.__qualname__ = Distil.__name__  # the dashboard's name of the class, without that of this function
    return Distil
