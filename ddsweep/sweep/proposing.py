"""What guided searches propose while a sweep runs: when a place has room, from the scores that are there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from ddsweep.catalog import TrialSpec
from ddsweep.cohorts import room_beside
from ddsweep.errors import UserError
from ddsweep.spec import ResourcesSpec
from ddsweep.sweep.guide import Guide
from ddsweep.sweep.queue import PlannedPlace

__all__ = ["Proposing"]


@dataclass
class Proposing:
    """The source of a sweep's queue: further trials, by a ``guide``.

    ``make_ready`` makes proposed trials known, and returns those that are to be distilled. ``on_more`` hears
    of all that were proposed, and how many may be together with each that is to be distilled. With
    ``resources.cohort: auto`` these are ``together`` at most. Nothing is proposed once ``draining``, or after
    an ``error``. ``networks`` as in `cohort_sizes`.
    """

    guide: Guide
    make_ready: Callable[[Sequence[TrialSpec]], Sequence[TrialSpec]]
    on_more: Callable[[Sequence[TrialSpec], Mapping[str, int]], None]
    draining: Callable[[], bool]
    resources: ResourcesSpec
    together: int
    networks: int | None = None
    error: UserError | None = None
    _rooms: dict[str, tuple[Hashable, int]] = field(default_factory=dict)

    def places(self, trials: Sequence[TrialSpec], count: int, spare: int = 0) -> list[PlannedPlace]:
        """So many places, to which ``trials`` are dealt out in turn, and ``spare`` ones without any of their
        own. Each takes trials of any shape, one shape at a time."""
        self._know(trials)
        size = self.together if self.resources.cohort == "auto" else int(self.resources.cohort)
        ids = [trial.trial_id for trial in trials]
        own = [*(tuple(ids[n::count]) for n in range(count)), *[()] * spare]
        return [PlannedPlace(f"place-{n}", given, size, "any") for n, given in enumerate(own)]

    @property
    def left(self) -> int:
        return 0 if self.error or self.draining() else self.guide.to_propose

    def more(self) -> list[str]:
        while self.left:
            try:
                proposed = self.guide.propose()
                trials = self.make_ready(proposed)
            except UserError as error:  # a full disk, say: what runs goes on
                self.error = error
                break
            self._know(trials)
            ids = [trial.trial_id for trial in trials]
            self.on_more(proposed, {trial_id: self._rooms[trial_id][1] for trial_id in ids})
            if ids:
                return ids
        return []

    def companions(self, trial: str) -> tuple[Hashable, int]:
        return self._rooms[trial]

    def room(self, trial: TrialSpec) -> tuple[Hashable, int]:
        """The same for any trial."""
        return room_beside(trial, self.resources, self.together, self.networks)

    def _know(self, trials: Sequence[TrialSpec]) -> None:
        self._rooms |= {trial.trial_id: self.room(trial) for trial in trials}
