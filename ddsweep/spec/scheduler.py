"""Stopping poor trials early: ASHA on ``val_score``, as a sweep file asks for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from ddsweep.catalog import SETTINGS, TrialSpec
from ddsweep.catalog.numbers import whole
from ddsweep.errors import SettingError
from ddsweep.spec.values import SECTION, Count, word, words_of

__all__ = ["AshaSpec", "check_strata", "setting_of", "settings_by_stratum"]

KINDS_OF_SCHEDULER = ("asha",)

_OF_A_SETTING = tuple(item.name for item in fields(TrialSpec) if item.name != "seed")
_STRATA = tuple(name for name in SETTINGS if name != "seed")


class AshaSpec(BaseModel):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934).

    Every trial takes ``grace`` outer steps. There, and at each ``reduction`` times as many, a setting goes on
    if its ``val_score``, the mean over its seeds, reaches the quantile 1 - 1/``reduction`` of those before.
    Only settings that agree in all ``strata`` are compared: other settings answer other questions. In a sweep
    that names no strata the axes of its grid are strata too (`with_grid`).
    """

    model_config = SECTION

    kind: Annotated[Literal["asha"], BeforeValidator(lambda value: word(value, KINDS_OF_SCHEDULER))] = "asha"
    """the only one there is"""
    grace: Count = 100
    """outer steps before the first comparison"""
    reduction: Annotated[int, BeforeValidator(whole), Field(ge=2)] = 3
    """comparisons follow at each `reduction` times as many outer steps; there a setting goes on if its score
    reaches the quantile 1 - 1/`reduction` of those seen there before, as in Ray's ASHA"""
    strata: Annotated[tuple[str, ...], words_of(_STRATA)] = (
        *("dataset", "objective", "attack_class", "target_class", "init", "pool", "images_per_class"),
    )
    """only settings that agree in these are compared: the scores of others answer other questions; a file
    that names none has the axes of its `grid` as well"""

    def rungs(self, trial: TrialSpec) -> tuple[int, ...]:
        """The outer steps after which ``trial`` may be stopped. They are below its last step."""
        found = [self.grace]
        while found[-1] < trial.outer_steps:
            found.append(found[-1] * self.reduction)
        return tuple(found[:-1])

    def stratum(self, trial: TrialSpec) -> tuple[Any, ...]:
        """The values that ``trial`` shares with the trials that it is compared with."""
        return tuple(getattr(trial, name) for name in self.strata)

    def with_grid(self, axes: Iterable[str]) -> AshaSpec:
        """With the ``axes`` of the grid as strata, unless the file names strata. The sweep compares the
        values of its grid, so each of them should have results."""
        if "strata" in self.model_fields_set:
            return self
        more = [axis for axis in axes if axis != "seed" and axis not in self.strata]
        return self.model_copy(update={"strata": (*self.strata, *more)})


def setting_of(trial: TrialSpec) -> tuple[Any, ...]:
    """The values that the seeds of one setting share: all but the seed."""
    return tuple(getattr(trial, name) for name in _OF_A_SETTING)


def settings_by_stratum(scheduler: AshaSpec, trials: Sequence[TrialSpec]) -> list[Counter[tuple[Any, ...]]]:
    """For each stratum its settings, with the number of seeds of each."""
    found: dict[tuple[Any, ...], Counter[tuple[Any, ...]]] = {}
    for trial in trials:
        found.setdefault(scheduler.stratum(trial), Counter())[setting_of(trial)] += 1
    return list(found.values())


def check_strata(name: str, scheduler: AshaSpec | None, trials: Sequence[TrialSpec]) -> None:
    """Raises `SettingError` for strata that leave one setting in each, so that none could be stopped."""
    if scheduler is None:
        return
    strata = settings_by_stratum(scheduler, trials)
    if max(map(len, strata)) > 1:
        return
    which = f"the {len(strata)} strata have one setting each" if len(strata) > 1 else "there is one setting"
    raise SettingError(
        f"sweep {name}: scheduler.strata: {which}, so there is nothing to compare. The axes of the grid are "
        "strata unless the file names strata: give the settings that are to be thinned out under `search` or "
        "`points`, or name fewer strata (scheduler.strata=[images_per_class], say), or run all trials to "
        "their end (scheduler=null)"
    )
