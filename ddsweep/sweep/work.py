"""Which evaluation shard gets which unit, and what happens to units and shards when one dies. No Ray here,
and no clock: calls get the time in seconds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ddsweep.catalog import EvalUnit, TrialSpec
from ddsweep.sweep.retry import RetryPolicy

__all__ = ["IN_HAND", "STRANDED_S", "QueuedUnit", "Work"]

IN_HAND = 2
"""Units that one shard holds at a time: one in progress and one waiting. The others wait here, where a drain
sees them."""

STRANDED_S = 900.0
"""If no shard is up for so long after the last trial, waiting units are given up."""


@dataclass(eq=False)
class QueuedUnit:
    """One unit of a trial. ``failures`` counts failed attempts."""

    spec: TrialSpec
    unit: EvalUnit
    failures: int = 0
    not_before: float = -math.inf


@dataclass
class _Shard:
    """``deaths`` are in a row, without a finished unit between them. A shard is up, or rests until
    ``rests_until``, or is being started."""

    units: list[QueuedUnit] = field(default_factory=list)
    up: bool = False
    deaths: int = 0
    rests_until: float | None = -math.inf


class Work:
    """The units that wait, and those that ``shards`` of them have in hand.

    A unit is charged with the death of a shard only if the shard was computing it. Units that waited there,
    or that find no shard because all are being started again, are not charged.
    """

    def __init__(self, shards: int, policy: RetryPolicy) -> None:
        self.waiting: deque[QueuedUnit] = deque()
        self.retries = 0
        self._drained = False
        self._policy = policy
        self._shards = [_Shard() for _ in range(shards)]
        self._none_up_since: float | None = None

    # ------------------------------------------------------------------------------------- shards

    def all_up(self) -> bool:
        return all(shard.up for shard in self._shards)

    def idle(self) -> list[int]:
        return [number for number, shard in enumerate(self._shards) if shard.up and not shard.units]

    def to_start(self, now: float) -> list[int]:
        """The shards to start now; `started` or `died` reports the result."""
        if self._drained:
            return []
        due = [
            number
            for number, shard in enumerate(self._shards)
            if shard.rests_until is not None and shard.rests_until <= now
        ]
        for number in due:
            self._shards[number].rests_until = None
        return due

    def started(self, number: int) -> None:
        self._shards[number].up = True

    def died(self, number: int, now: float) -> list[QueuedUnit]:
        """A shard died, or could not be started; it rests before it is started again. Returns its unit if
        that has been tried often enough and is given up."""
        shard = self._shards[number]
        units, shard.units = shard.units, []
        given_up = [] if not units or self._charge(units[0], now) else units[:1]
        if not self._drained:
            self.waiting.extendleft(reversed(units[len(given_up) :]))
        shard.up = False
        shard.deaths += 1
        shard.rests_until = now + self._rest(shard.deaths)
        return [] if self._drained else given_up

    def _rest(self, deaths: int) -> float:
        return self._policy.wait(max(1, min(deaths, self._policy.retries))) or 0.0

    # -------------------------------------------------------------------------------------- units

    def add(self, units: Sequence[QueuedUnit]) -> None:
        if not self._drained:
            self.waiting.extend(units)

    def give(self, now: float) -> list[tuple[int, QueuedUnit]]:
        """The units to send to shards now: one for each before a second for any."""
        given = []
        for place in range(IN_HAND):
            for number, shard in enumerate(self._shards):
                if shard.up and len(shard.units) == place and (unit := self._next(now)) is not None:
                    shard.units.append(unit)
                    given.append((number, unit))
        return given

    def _next(self, now: float) -> QueuedUnit | None:
        for place, unit in enumerate(self.waiting):
            if unit.not_before <= now:
                del self.waiting[place]
                return unit
        return None

    def finished(self, number: int, unit: QueuedUnit) -> None:
        shard = self._shards[number]
        shard.units.remove(unit)
        shard.deaths = 0

    def broke(self, number: int, unit: QueuedUnit, now: float, *, final: bool) -> bool:
        """The unit raised an error, and its shard lives. Returns whether it is tried again: by this run or,
        in a drain, by the next one; never if ``final``."""
        self._shards[number].units.remove(unit)
        if final:
            unit.failures += 1
        again = not final and self._charge(unit, now)
        if again and not self._drained:
            self.waiting.appendleft(unit)
        return again

    def _charge(self, unit: QueuedUnit, now: float) -> bool:
        unit.failures += 1
        wait = self._policy.wait(unit.failures)
        if wait is None:
            return False
        unit.not_before = now + wait
        self.retries += 1
        return True

    def drain(self) -> None:
        """From now on no unit is given out and no shard started."""
        self._drained = True
        self.waiting.clear()

    def drop(self, trial_id: str) -> None:
        """Drop the waiting units of this trial."""
        self.waiting = deque(unit for unit in self.waiting if unit.spec.trial_id != trial_id)

    def stranded(self, now: float, *, distilling: bool = False) -> list[QueuedUnit]:
        """The waiting units, if no shard has been up for `STRANDED_S`: they are given up. Not while trials
        are ``distilling``: they may hold the room of a shard that died, which has it again at their end."""
        if distilling or any(shard.up for shard in self._shards) or not self.waiting:
            self._none_up_since = None
            return []
        self._none_up_since = now if self._none_up_since is None else self._none_up_since
        if now - self._none_up_since < STRANDED_S:
            return []
        given_up, self.waiting, self._none_up_since = list(self.waiting), deque(), None
        return given_up
