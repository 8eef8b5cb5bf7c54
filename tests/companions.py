"""Trials that are distilled together, in tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ddsweep.catalog import TrialSpec
from ddsweep.errors import DivergedError, UserError
from ddsweep.trial import Progress, TrialJob


@dataclass
class Cohort:
    """Companions that come in turns: the first call gets ``turns[0]``, and so on."""

    turns: list[list[TrialJob]]
    stop_after: int | None = None
    outcomes: dict[str, bool | DivergedError | UserError] = field(default_factory=dict)
    steps: dict[str, list[int]] = field(default_factory=dict)
    leave: Callable[[TrialSpec, Progress], bool] = lambda spec, progress: False
    asked: int = 0

    def more(self, running: int) -> Sequence[TrialJob]:
        return self.turns.pop(0) if self.turns else []

    def should_stop(self) -> bool:
        self.asked += 1
        return self.stop_after is not None and self.asked > self.stop_after

    def progress(self, spec: TrialSpec, progress: Progress) -> bool:
        self.steps.setdefault(spec.trial_id, []).append(progress.outer_step)
        return not self.leave(spec, progress)

    def ended(self, spec: TrialSpec, outcome: bool | DivergedError | UserError) -> None:
        self.outcomes[spec.trial_id] = outcome
