"""Short names of trials while they run: the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence

from ddsweep.catalog import TrialSpec
from ddsweep.report.formats import plain
from ddsweep.report.settings import settings_of, telling, varying

__all__ = ["trial_columns", "trial_labels"]

_SHORT = {"images_per_class": "ipc", "inner_steps": "S", "inner_epochs": "E", "models_per_step": "models"}


def trial_labels(trials: Sequence[TrialSpec]) -> dict[str, str]:
    """A readable name of each trial, by id: its id, and ``name=value`` of the settings that tell it from the
    others."""
    settings = [settings_of(trial) for trial in trials]
    told = telling(settings, varying(settings, always=("init", "images_per_class")))
    return {
        trial.trial_id: " ".join(
            [trial.trial_id, *(f"{_SHORT.get(name, name)}={plain(own[name])}" for name in names)]
        )
        for trial, own, names in zip(trials, settings, told, strict=True)
    }


def trial_columns(trials: Sequence[TrialSpec]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """(short names of the settings that vary, values of each trial by id) for a table with a row a trial."""
    settings = [settings_of(trial) for trial in trials]
    names = varying(settings)
    cells = {
        trial.trial_id: tuple(plain(own[name]) for name in names)
        for trial, own in zip(trials, settings, strict=True)
    }
    return tuple(_SHORT.get(name, name) for name in names), cells
