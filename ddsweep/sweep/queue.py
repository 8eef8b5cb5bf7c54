"""Which trials a place gets, and what becomes of those whose process died. No Ray here, and no clock.

A place is a process that distils a cohort: trials of one shape, together. It takes trials from here until
none is left for it. Each place has trials of its own first, and then takes over those of others of its shape.
What a guided search proposes comes when a place has room and no trial waits.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ddsweep.sweep.halving import Halving
from ddsweep.sweep.retry import RetryPolicy

__all__ = ["Lost", "PlannedPlace", "Source", "TrialQueue"]

APART_FROM = 2
"""After so many deaths of their process, its trials run apart: one of them may be what kills it."""


@dataclass(frozen=True)
class PlannedPlace:
    """A place with the ids of the trials that it begins with, and the most that it runs together. Places of
    one ``shape`` take over trials from each other. All places of a guided search have one shape."""

    name: str
    trials: tuple[str, ...]
    size: int
    shape: Hashable


@dataclass(frozen=True)
class Lost:
    """What a death of a place comes to: seconds to wait before it starts again, the trials that are tried
    again, and those that were tried often enough, with the number of attempts."""

    wait: float
    again: tuple[str, ...]
    failed: tuple[tuple[str, int], ...]


class Source(Protocol):
    """Where further trials come from."""

    @property
    def left(self) -> int:
        """The most trials that are still to come."""
        ...

    def more(self) -> Sequence[str]:
        """The ids of the next trials to distil, all seeds of one sample; none if there are none."""
        ...

    def companions(self, trial: str) -> tuple[Hashable, int]:
        """What a trial has in common with those that may be beside it, and the most that are together."""
        ...


class TrialQueue:
    """The trials of a sweep that are to be distilled, dealt out to ``places``, at most ``most`` at a time.

    ``room`` says how many of the places the nodes hold that are there now; none: all. The others wait for
    nodes to join.

    ``halving`` decides at rungs: a trial that waits for others of its setting leaves its place to another
    one; once its setting may go on, it is the next one. With a ``source`` the places go on until it has none
    left, and each trial says by itself who may be beside it.

    ``saved`` are the outer steps that a trial would go on from. A process that dies costs an attempt; those
    of before do not count if the trial has saved steps since.
    """

    def __init__(
        self,
        places: Sequence[PlannedPlace],
        policy: RetryPolicy,
        *,
        halving: Halving | None = None,
        most: int | None = None,
        source: Source | None = None,
        room: Callable[[], int] | None = None,
        saved: Callable[[str], int] = lambda trial: 0,
    ) -> None:
        self._saved, self._saved_at_death = saved, Counter[str]()
        self._places = {place.name: place for place in places}
        self._number = {place.name: number for number, place in enumerate(places)}
        self._room = room or (lambda: len(places))
        self._of_shape: defaultdict[Hashable, list[str]] = defaultdict(list)
        for place in places:
            self._of_shape[place.shape].append(place.name)
        self._policy, self._halving, self._most, self._source = policy, halving, most, source
        self._planned = {place.name: deque(place.trials) for place in places}
        self._shape = {trial: place.shape for place in places for trial in place.trials}
        self._first: defaultdict[Hashable, deque[str]] = defaultdict(deque)  # released, or tried again
        self._apart: defaultdict[Hashable, deque[str]] = defaultdict(deque)
        self._held: defaultdict[str, list[str]] = defaultdict(list)
        self._paused: dict[str, None] = {}  # in the order in which they came
        self._deaths: Counter[str] = Counter()
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._stopped: list[str] = []
        self._dead: set[str] = set()
        self._up: set[str] = set()  # those with a process that will ask again
        self._over: set[str] = set()  # those that ended, or will not ask again
        self._resting: set[str] = set()

    # --------------------------------------------------------------------------- what a place asks for

    def take(self, name: str, running: int) -> list[str] | None:
        """Trials for a place beside ``running`` others. Without any, a place with none running is at its end,
        or it `rests`; None: it is to ask again, for there are as many trials at work as may be, or all that
        it could take wait at a rung for others, and nobody else needs its room."""
        held = self._held[name]
        self._up.add(name)
        self._over.discard(name)
        self._attempts.pop(("place", name), None)
        if any(self._deaths[trial] >= APART_FROM for trial in held):
            return []
        given: list[str] = []
        while running + len(given) < self._size(name) and self._has_room():
            trial = self._next(name)
            if trial is None and not held:
                trial = self._next_apart(name)
            if trial is None:
                if not self._ask_source(name):
                    break
                continue
            held.append(trial)
            given.append(trial)
            if self._deaths[trial] >= APART_FROM:
                break
        if given or held:
            return given
        if not self._is_waiting(name) and self._wait_no_longer(self._places[name].shape):
            return self.take(name, running)
        comes = self._is_waiting(name) or self._to_come
        if comes and not self._has_room():
            return None
        if any(self._paused_of(self._places[name].shape)):
            if not self._others_need_room():
                return None
            self._resting.add(name)
            self._up.discard(name)
            return []
        self._leaves(name)
        return []

    def _leaves(self, name: str) -> None:
        """A place takes no further trial."""
        self._up.discard(name)
        self._over.add(name)

    def _others_need_room(self) -> bool:
        """Whether a place without a process would get a trial."""
        without = (next((n for n in names if n not in self._up), None) for names in self._of_shape.values())
        return any(self.has_work(name) for name in without if name is not None)

    def rests(self, name: str) -> bool:
        """Whether a place that got nothing lets others have its room, and comes back once it `has_work`."""
        return name in self._resting

    def rested(self, name: str) -> bool:
        """Whether a place that has left had been told to rest; asked once."""
        there = name in self._resting
        self._resting.discard(name)
        return there

    def is_last(self, name: str) -> bool:
        """Whether a place need not ask again once its trials have ended; then it does not."""
        last = self._halving is None and not self._is_waiting(name) and not self._to_come
        if last:
            self._leaves(name)
        return last

    def scored(self, name: str, trial: str, rung: int, score: float) -> bool:
        """Whether a trial that has come to a ``rung`` goes on. If not, it has left its place."""
        assert self._halving is not None
        verdict = self._halving.scored(trial, rung, score)
        if verdict != "go":
            self._forget(name, trial)
            self._set_aside(trial, verdict)
        self._carry_out()
        return verdict == "go"

    def ended(self, name: str, trial: str, *, failed: bool = False) -> None:
        """A trial has left its place for good, or for the next run."""
        self._forget(name, trial)
        if failed:
            self._failed(trial)

    def is_rung(self, trial: str, outer_step: int) -> bool:
        return self._halving is not None and self._halving.is_rung(trial, outer_step)

    # ----------------------------------------------------------------------------- what happens to it

    def lost(self, name: str) -> Lost:
        """The process of a place has died, with all trials in it. A trial that was alone in it has lost an
        attempt; others lose none, but after the second time they run apart."""
        held, self._held[name] = self._held[name], []
        self._up.discard(name)
        self._over.discard(name)
        if not held:
            return self._lost_before_any(name)
        alone, shape = len(held) == 1, self._places[name].shape
        again: list[str] = []
        failed: list[tuple[str, int]] = []
        waits = [self._policy.wait(1) or 0.0]
        for trial in held:
            self._deaths[trial] += 1
            if alone:
                steps = self._saved(trial)
                if steps > self._saved_at_death[trial]:
                    self._saved_at_death[trial], self._attempts["trial", trial] = steps, 0
                self._attempts["trial", trial] += 1
            wait = self._policy.wait(max(1, self._attempts["trial", trial]))
            if alone and wait is None:
                failed.append((trial, self._attempts["trial", trial]))
                continue
            waits.append(wait or 0.0)
            again.append(trial)
        for trial in reversed(again):
            kept = self._apart if self._deaths[trial] >= APART_FROM else self._first
            kept[shape].appendleft(trial)
        for trial, _ in failed:
            self._failed(trial)
        return Lost(max(waits), tuple(again), tuple(failed))

    def left_behind(self, name: str) -> Lost:
        """The process of a place has ended while the sweep drains: the next run goes on with its trials."""
        held = tuple(self._held.pop(name, ()))
        self._up.discard(name)
        return Lost(0.0, held, ())

    def _lost_before_any(self, name: str) -> Lost:
        """The process died before it had a trial. A place that never comes up leaves its trials to others of
        its shape that are at work; without any it fails with all that it has."""
        self._attempts["place", name] += 1
        wait = self._policy.wait(self._attempts["place", name])
        failed: list[str] = []
        if wait is None and any(other in self._up for other in self._of_shape[self._places[name].shape]):
            self._dead.add(name)
        elif wait is None:
            failed = self.given_up(name)
        return Lost(wait or 0.0, (), tuple((trial, self._attempts["place", name]) for trial in failed))

    def given_up(self, name: str) -> list[str]:
        """A place cannot be started at all: the trials that nobody runs now. With the last place of a shape
        these are all of that shape."""
        self._dead.add(name)
        self._up.discard(name)
        shape = self._places[name].shape
        left = [*self._held.pop(name, []), *self._planned[name]]
        self._planned[name].clear()
        if (self._dead | self._over).issuperset(self._of_shape[shape]):
            for kept in (self._first[shape], self._apart[shape], *self._planned_of(name)):
                left += kept
                kept.clear()
            for trial in list(self._paused_of(shape)):
                del self._paused[trial]
                left.append(trial)
        for trial in left:
            self._failed(trial)
        return left

    def has_work(self, name: str) -> bool:
        """Whether a place that has no process yet would get a trial."""
        shape = self._places[name].shape
        if not self._has_room() or name in self._dead or not self.fits(name):
            return False
        if self._is_waiting(name) or self._to_come:
            return True
        return not any(self._held_of(shape)) and not all(map(self._waits_for_some, self._paused_of(shape)))

    def fits(self, name: str) -> bool:
        """Whether the nodes that are there hold this place too, beside those before it that can start."""
        number = self._number[name]
        return number - sum(self._number[dead] < number for dead in self._dead) < self._room()

    def is_over(self, name: str) -> bool:
        """Whether a place without a process will never get a trial: all of its shape are with others, or at
        their end."""
        shape = self._places[name].shape
        others = any(self._paused_of(shape)) or any(self._held_of(shape))
        return name in self._dead or not (others or self._is_waiting(name) or self._to_come)

    def is_paused(self, trial: str) -> bool:
        return trial in self._paused

    def newly_stopped(self) -> list[str]:
        """The trials that were stopped since the last call."""
        stopped, self._stopped = self._stopped, []
        return stopped

    # --------------------------------------------------------------------------------------- inside

    def _has_room(self) -> bool:
        return self._most is None or sum(map(len, self._held.values())) < self._most

    @property
    def _to_come(self) -> int:
        return 0 if self._source is None else self._source.left

    def _ask_source(self, name: str) -> bool:
        """Let further trials wait for this place or another one. Not while one waits, though it may not be
        beside those that this place holds: proposals are made as late as can be. Nor if this place has its
        share: of the last ones each place gets some."""
        if self._source is None or self._is_waiting(name):
            return False
        at_work = sum(map(len, self._held.values()))
        if len(self._held[name]) * min(len(self._places), self._room()) >= self._source.left + at_work:
            return False
        shape, more = self._places[name].shape, self._source.more()
        self._shape |= dict.fromkeys(more, shape)
        self._first[shape].extend(more)
        return bool(more)

    def _is_waiting(self, name: str) -> bool:
        shape = self._places[name].shape
        return any((self._first[shape], self._apart[shape], *self._planned_of(name)))

    def _planned_of(self, name: str) -> Iterator[deque[str]]:
        """The planned trials that a place may take: its own, then those of other places of its shape, in the
        order of the sweep."""
        yield self._planned[name]
        for other in self._of_shape[self._places[name].shape]:
            if other != name:
                yield self._planned[other]

    def _next(self, name: str) -> str | None:
        for kept in (self._first[self._places[name].shape], *self._planned_of(name)):
            while (trial := next((one for one in kept if self._goes_beside(name, one)), None)) is not None:
                kept.remove(trial)
                verdict = "go" if self._halving is None else self._halving.verdict(trial)
                if verdict == "go":
                    return trial
                self._set_aside(trial, verdict)
        return None

    def _size(self, name: str) -> int:
        """The most trials in a place, as long as those that it holds are there."""
        held, size = self._held[name], self._places[name].size
        return size if self._source is None or not held else min(size, self._source.companions(held[0])[1])

    def _goes_beside(self, name: str, trial: str) -> bool:
        """Whether a trial may be beside those that a place holds."""
        held = self._held[name]
        if self._source is None or not held:
            return True
        return self._source.companions(trial)[0] == self._source.companions(held[0])[0]

    def _next_apart(self, name: str) -> str | None:
        kept = self._apart[self._places[name].shape]
        return kept.popleft() if kept else None

    def _held_of(self, shape: Hashable) -> Iterator[list[str]]:
        return (self._held[name] for name in self._of_shape[shape])

    def _paused_of(self, shape: Hashable) -> Iterator[str]:
        return (trial for trial in self._paused if self._shape[trial] == shape)

    def _forget(self, name: str, trial: str) -> None:
        if trial in self._held[name]:  # not if a report comes twice, since the place has died in between
            self._held[name].remove(trial)

    def _set_aside(self, trial: str, verdict: Literal["go", "wait", "stop"]) -> None:
        if verdict == "stop":
            self._stopped.append(trial)
        else:
            self._paused[trial] = None

    def _failed(self, trial: str) -> None:
        if self._halving is not None:
            self._halving.failed(trial)
            self._carry_out()

    def _carry_out(self) -> None:
        """Release, or stop, the paused trials on which was decided."""
        if self._halving is None:
            return
        decided, self._halving.decided = self._halving.decided, []
        for trial in decided:
            verdict = self._halving.verdict(trial)
            if trial in self._paused and verdict != "wait":
                del self._paused[trial]
                if verdict == "go":
                    kept = self._apart if self._deaths[trial] >= APART_FROM else self._first
                    kept[self._shape[trial]].append(trial)
                else:
                    self._stopped.append(trial)

    def _waits_for_some(self, trial: str) -> bool:
        """Whether a seed for which a paused trial waits is at work or still to come, in whatever place."""
        assert self._halving is not None
        kept = (self._held, self._planned, self._first, self._apart)
        return any(seed in some for seed in self._halving.awaited(trial) for k in kept for some in k.values())

    def _wait_no_longer(self, shape: Hashable) -> bool:
        """If no trial of a shape runs or is to begin, seeds that its paused trials wait for, and that are
        nowhere else, are lost: an error, but no reason to wait. Returns whether a trial was released."""
        if self._halving is None or any(self._held_of(shape)):
            return False
        for trial in list(self._paused_of(shape)):
            if not self._waits_for_some(trial):
                self._halving.wait_no_longer(trial)
        self._carry_out()
        return bool(self._first[shape] or self._apart[shape])
