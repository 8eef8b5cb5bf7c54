"""Stopping poor trials early: ASHA on ``val_score``, as a sweep file asks for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import whole
from ddsweep.spec.values import SCIENCE_SETTINGS, SECTION, Count, word, words_of

__all__ = ["AshaSpec"]

KINDS_OF_SCHEDULER = ("asha",)


class AshaSpec(BaseModel):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934).

    ``grace`` outer steps are left to every trial. There, and at each ``reduction`` times as many, a trial
    goes on if its ``val_score`` is among the best 1/``reduction`` of those seen there so far. Only trials
    that agree in all ``strata`` are compared: the scores of the others answer other questions.
    """

    model_config = SECTION

    kind: Annotated[Literal["asha"], BeforeValidator(lambda value: word(value, KINDS_OF_SCHEDULER))] = "asha"
    grace: Count = 100
    reduction: Annotated[int, BeforeValidator(whole), Field(ge=2)] = 3
    strata: Annotated[tuple[str, ...], words_of(SCIENCE_SETTINGS)] = (
        *("dataset", "objective", "attack_class", "target_class", "init", "pool", "images_per_class"),
    )

    def rungs(self, trial: TrialSpec) -> tuple[int, ...]:
        """Outer steps after which ``trial`` may be stopped: below its last, which every survivor reaches."""
        found = [self.grace]
        while found[-1] < trial.outer_steps:
            found.append(found[-1] * self.reduction)
        return tuple(found[:-1])

    def stratum(self, trial: TrialSpec) -> tuple[Any, ...]:
        """What ``trial`` has in common with those that it is compared with."""
        return tuple(getattr(trial, name) for name in self.strata)
