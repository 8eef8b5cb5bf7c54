"""What every trial needs before it runs: data and settings. No Ray here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.data.load import Splits, load_splits
from ddsweep.spec import ResourcesSpec, SweepSpec
from ddsweep.trial_plan import TrialSettings

__all__ = ["EVAL_GPUS", "eval_gpus", "load_all_splits", "repeats", "splits_key", "trial_settings"]

EVAL_GPUS = 0.1
"""The part of a GPU that an evaluation shard asks for if trials run on GPUs."""


def splits_key(spec: TrialSpec) -> str:
    """Trials with the same key share data and split."""
    return repr((spec.dataset, spec.validation_fraction, spec.split_seed, spec.whitening))


def load_all_splits(trials: Sequence[TrialSpec], root: Path | None, *, stand_in: bool) -> dict[str, Splits]:
    """Each data set and split that the trials need, by `splits_key`."""
    found: dict[str, Splits] = {}
    for trial in trials:
        key = splits_key(trial)
        if key not in found:
            found[key] = load_splits(
                trial.dataset,
                root,
                validation_fraction=trial.validation_fraction,
                split_seed=trial.split_seed,
                whitening=trial.whitening,
                stand_in=stand_in,
            )
    return found


def repeats(trials: Sequence[TrialSpec], splits: Mapping[str, Splits]) -> Iterator[str]:
    """Messages on data with fewer training images in a class than the largest of ``trials`` has distilled
    ones."""
    for key, found in splits.items():
        own = [trial for trial in trials if splits_key(trial) == key]
        asked = max((trial.images_per_class for trial in own), default=0)
        there = int(torch.bincount(found.train.labels, minlength=own[0].dataset.classes).min()) if own else 0
        if asked > there:
            yield (
                f"{found.name}: images_per_class {asked} is more than the {counted(there, 'training image')} "
                "of its smallest class: random real images, as a start or as a baseline, are repeated"
            )


def trial_settings(sweep: SweepSpec, trial: TrialSpec) -> TrialSettings:
    """How ``trial`` runs by itself, by the sweep's ``resources``. The caller decides how many trials are
    distilled together."""
    resources = sweep.resources
    cpus, gpus = resources.for_trial(trial)
    given = {name: getattr(resources, name) for name in _GIVEN}
    threads = resources.threads or max(1, int(cpus))
    rungs = sweep.scheduler.rungs(trial) if sweep.scheduler else ()
    return TrialSettings(**{**given, "threads": threads, "gpus": gpus, "rungs": rungs})


_GIVEN = [
    item.name
    for item in fields(TrialSettings)
    if item.name in ResourcesSpec.model_fields and item.name != "cohort"
]


def eval_gpus(sweep: SweepSpec, gpus: float) -> float:
    """The part of a GPU for each evaluation shard, if the largest trial asks for ``gpus``."""
    if sweep.evaluate.gpus is not None:
        return sweep.evaluate.gpus
    return EVAL_GPUS if gpus > 0 and sweep.resources.device != "cpu" else 0.0
