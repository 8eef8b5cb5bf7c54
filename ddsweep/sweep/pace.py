"""The time that a sweep still takes, from what this run measured of its own trials and evaluations.

The estimates of `ddsweep.cost` only say how trials compare; their time is measured. The forecast deals trials
out to the places that run at a time, and evaluates their sets in the order in which they come.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

__all__ = ["Left", "Pace"]

_SIMULATED = 500
"""If more trials wait, consecutive ones are taken together."""

_SLEPT = 20.0
"""A trial that takes so many times as long as before was held up: the machine slept, for example. Validation
takes longer too, but is part of the pace."""


@dataclass(frozen=True)
class Left:
    """Seconds that are left: in all or, until the first evaluation of this run has ended, only until all is
    distilled. One of the two is None. ``at_most`` is true if trials may be stopped before their end."""

    seconds: float | None
    distilling: float | None
    at_most: bool = False


@dataclass
class _Running:
    """A trial at work. ``weight`` is its whole estimated cost, ``share`` the part that was left at its start,
    as far as known. ``first`` and ``last`` are (time, outer step) of reports, ``taken`` the steps since its
    start and ``between`` those between the last two."""

    weight: float
    share: float
    outer_steps: int
    started: float
    taken: int = 0
    between: int = 0
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None

    def remaining(self, now: float) -> float | None:
        """Seconds until it is distilled; None before its first report. If a report is late, because the
        machine slept or other programs fill it, the trial is that much slower than was seen so far."""
        if self.first is None or self.last is None:
            return None
        (t, step), (since, first_step) = self.last, self.first
        if step == first_step:
            since, first_step = self.started, step - max(1, self.taken)
        due, seen = self.outer_steps - step, step - first_step
        pace = (t - since) / seen
        late = (now - since) / (seen + self.between)
        if late > pace:
            return max(0.0, (due - self.between) * late)
        return max(0.0, due * pace - (now - t))

    def slept(self, step: int, now: float) -> bool:
        """Whether the steps from the last report to ``step`` took far longer than those before."""
        if self.first is None or self.last is None or self.last[1] == self.first[1]:
            return False
        pace = (self.last[0] - self.first[0]) / (self.last[1] - self.first[1])
        return now - self.last[0] > _SLEPT * pace * (step - self.last[1])

    @property
    def own_weight(self) -> float:
        """The part of its weight between its start and its end: it may have begun earlier."""
        if self.last is None:
            return self.weight * self.share
        return self.weight * min(1.0, (self.taken + self.outer_steps - self.last[1]) / self.outer_steps)

    def seconds(self) -> float | None:
        """From its start to its end, as far as this can be told yet."""
        if self.last is None:
            return None
        return self.last[0] - self.started + (self.remaining(self.last[0]) or 0.0)


class Pace:
    """Fed with what happens to trials, at times of a clock that goes in seconds. Not safe for threads."""

    def __init__(self) -> None:
        self._at_most = False
        self._waiting: dict[str, tuple[float, float]] = {}  # the whole weight, and the share that is left
        self._running: dict[str, _Running] = {}
        self._further: dict[str, None] = {}
        self._queued: set[str] = set()
        self._ended = [0.0, 0.0]  # seconds and weight of trials distilled in this run
        self._evaluated, self._busy = 0, 0.0
        self._busy_since: float | None = None
        self._last_evaluated: float | None = None
        # Seconds in which trials waited, and the sum of these seconds times the running trials.
        self._side_by_side = [0.0, 0.0]
        self._looked: float | None = None

    def expect(self, distil: Mapping[str, float], evaluate: Iterable[str], *, at_most: bool = False) -> None:
        """The work of this run: trials to distil, with their relative costs, and trials that are only to be
        evaluated. ``at_most``: some may be stopped before their end."""
        self._waiting = {trial_id: (weight, 1.0) for trial_id, weight in distil.items()}
        self._queued, self._at_most = set(evaluate), at_most

    def expect_more(self, distil: Mapping[str, float], evaluate: Iterable[str], further: int) -> None:
        """More of such work, and so many ``further`` trials that are not known yet. They count as the mean of
        those that are."""
        known = [weight for trial_id, (weight, _) in self._waiting.items() if trial_id not in self._further]
        known += [own.weight for own in self._running.values()]
        unknown = [self._waiting.pop(trial_id)[0] for trial_id in self._further]
        self._waiting |= {trial_id: (weight, 1.0) for trial_id, weight in distil.items()}
        self._queued |= set(evaluate)
        known = [*known, *distil.values()] or unknown
        mean = sum(known) / len(known) if known else 0.0
        self._further = dict.fromkeys(f"further {number}" for number in range(further))
        self._waiting |= dict.fromkeys(self._further, (mean, 1.0))

    # ------------------------------------------------------------------------------- what happens

    def started(self, trial_id: str, outer_steps: int, now: float) -> None:
        self._look(now)
        if (waited := self._waiting.pop(trial_id, None)) is not None:
            self._running[trial_id] = _Running(*waited, outer_steps, now)

    def stepped(self, trial_id: str, outer_step: int, steps_taken: int, now: float) -> None:
        """``steps_taken`` since the last report. A worker that died begins again at an earlier step. The
        pace is measured anew from there, and from the first report after a trial was held up."""
        self._look(now)
        if (own := self._running.get(trial_id)) is None:
            return
        if own.last is not None and (outer_step <= own.last[1] or own.slept(outer_step, now)):
            own.first = None
        own.last = (now, outer_step)
        own.first = own.first or own.last
        own.taken += steps_taken
        own.between = steps_taken

    def paused(self, trial_id: str, now: float) -> None:
        """It waits for others, and goes on from here later."""
        self._look(now)
        if own := self._running.pop(trial_id, None):
            share = own.share if own.last is None else 1 - own.last[1] / own.outer_steps
            self._ended[0] += now - own.started
            self._ended[1] += own.weight * own.taken / own.outer_steps
            self._waiting[trial_id] = own.weight, share

    def distilled(self, trial_id: str, now: float) -> None:
        """Now it is to be evaluated."""
        self._look(now)
        self._waiting.pop(trial_id, None)
        if own := self._running.pop(trial_id, None):
            self._ended[0] += now - own.started
            self._ended[1] += own.own_weight
        self._queued.add(trial_id)
        if self._busy_since is None:
            self._busy_since = now

    def evaluated(self, trial_id: str, now: float) -> None:
        if trial_id in self._queued:
            self._evaluated += 1
            self._last_evaluated = now
        self.dropped(trial_id, now)

    def dropped(self, trial_id: str, now: float) -> None:
        """It failed, was stopped or drained: this run does no more for it."""
        self._look(now)
        self._waiting.pop(trial_id, None)
        self._running.pop(trial_id, None)
        self._queued.discard(trial_id)
        if not self._queued and self._busy_since is not None:
            self._busy += now - self._busy_since
            self._busy_since = None

    def _look(self, now: float) -> None:
        """Count the trials that run while others wait: there is room for so many."""
        if self._looked is not None and self._waiting:
            self._side_by_side[0] += now - self._looked
            self._side_by_side[1] += (now - self._looked) * len(self._running)
        self._looked = now

    # ---------------------------------------------------------------------------------- what is left

    def left(self, now: float) -> Left | None:
        """The time that is left; None until something was measured, and when all is done."""
        self._look(now)
        ends = self._ends(now)
        if ends is None or not (ends or self._queued):
            return None
        last = max(ends, default=0.0)
        each = self._seconds_of_an_evaluation(now)
        if each is None:
            return Left(None, last, self._at_most) if ends else None
        since = max(self._last_evaluated or 0.0, self._busy_since or 0.0)
        begun = min(each, now - since) if self._busy_since is not None else 0.0
        free = max(0.0, len(self._queued) * each - begun)
        for end in ends:
            free = max(free, end) + each
        return Left(free, None, self._at_most)

    def _seconds_of_an_evaluation(self, now: float) -> float | None:
        if not self._evaluated:
            return None
        busy = self._busy
        if self._busy_since is not None:
            # Without the one in progress, which has not ended.
            busy += max(self._busy_since, self._last_evaluated or 0.0) - self._busy_since
        return busy / self._evaluated

    def _ends(self, now: float) -> list[float] | None:
        """Seconds until each trial is distilled, in order; None if one cannot be told."""
        if not self._waiting and not self._running:
            return []
        seconds, weight = self._ended
        for own in self._running.values():
            if (measured := own.seconds()) is not None:
                seconds, weight = seconds + measured, weight + own.own_weight
        each = seconds / weight if weight else None
        rest: list[float] = []
        for own in self._running.values():
            remaining = own.remaining(now)
            if remaining is None:
                if each is None:
                    return None
                remaining = max(0.0, each * own.own_weight - (now - own.started))
            rest.append(remaining)
        if self._waiting and each is None:
            return None
        return sorted(rest + self._ends_of_waiting(rest, each or 0.0))

    def _ends_of_waiting(self, running: list[float], each: float) -> list[float]:
        free = list(running)
        while len(free) < self._places():
            free.append(0.0)
        heapq.heapify(free)
        count = len(self._waiting)
        if count > _SIMULATED:
            together = (sum(free) + each * sum(map(prod, self._waiting.values()))) / len(free)
            return [together * (place + 1) / count for place in range(count)]
        ends = []
        for weight, share in self._waiting.values():
            ends.append(heapq.heappop(free) + each * weight * share)
            heapq.heappush(free, ends[-1])
        return ends

    def _places(self) -> int:
        waited, product = self._side_by_side
        return max(1, len(self._running), round(product / waited) if waited else 1)
