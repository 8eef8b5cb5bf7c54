"""The view of a running sweep: a picture in a terminal, plain lines elsewhere."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from rich.console import Console

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.sweep.live_view import Columns, LiveView, Picture, Row
from ddsweep.sweep.pace import Left, Pace

__all__ = ["Board", "Seen", "State"]

State = Literal["pending", "running", "paused", "evaluating", "done", "stopped", "failed", "drained"]
_ORDER: tuple[State, ...] = (
    *("running", "evaluating", "failed", "drained", "paused", "pending", "stopped", "done"),
)
_LINE_EVERY_S = 15.0
_MESSAGES = 200
"""Messages that are kept and printed after the picture."""


@dataclass(frozen=True)
class Seen:
    """The latest state of one trial. ``steps_taken`` and ``retries`` (how often Tune tried it again after its
    worker died) count this run alone."""

    spec: TrialSpec
    label: str
    place: int
    state: State = "pending"
    outer_step: int = 0
    steps_taken: int = 0
    retries: int = 0
    outer_loss: float | None = None
    val_score: float | None = None
    best_score: float | None = None


class Board:
    """The states of all trials, fed by the runner from several threads.

    As a context manager it shows them from `expect` on: a picture if ``console`` is a terminal that can draw,
    else a line when a trial changes its state and, if none does, every 15 seconds. ``labels`` name trials in
    lines, ``columns`` in the picture.
    """

    def __init__(
        self,
        console: Console,
        labels: Mapping[str, str],
        trials: Sequence[TrialSpec],
        columns: Columns | None = None,
    ) -> None:
        self._console = console
        self._trials = {
            spec.trial_id: Seen(spec, labels[spec.trial_id], place) for place, spec in enumerate(trials)
        }
        # 100,000 trials cannot be counted anew at each event, so they are kept by state.
        self._in: dict[State, dict[str, Seen]] = {state: {} for state in _ORDER}
        for trial_id, seen in self._trials.items():
            self._in[seen.state][trial_id] = seen
        self._columns = columns or Columns()
        self._pace, self._further = Pace(), 0
        self._lock = threading.Lock()
        self._started = self._last_line = time.monotonic()
        self._messages: deque[str] = deque(maxlen=_MESSAGES)
        # Not if an environment variable asks for colours in a file.
        draws = console.is_interactive and console.file.isatty()
        self._view = LiveView(console, self._picture, self.say) if draws else None
        self._drawing, self._ended = False, threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._beat is not None:
            self._beat.join()
        if self._view is not None and self._drawing:
            self._view.stop()
            self._drawing = False
            for text in self._messages:  # they stay readable on the first screen
                self._print(text)

    # ------------------------------------------------------------------------------ what happens

    def found(self, trial_id: str, state: State) -> None:
        """How an earlier run left a trial; this prints nothing."""
        self._change(trial_id, lambda seen: replace(seen, state=state))

    def expect(self, distil: Mapping[str, float], evaluate: Iterable[str], *, at_most: bool = False) -> None:
        """The work of this run: see `ddsweep.sweep.pace.Pace.expect`."""
        with self._lock:
            self._pace.expect(distil, evaluate, at_most=at_most)
        counts = self.counts()
        self._started = self._last_line = time.monotonic()
        there = [f"{counts[state]} {state}" for state in ("done", "stopped") if counts[state]]
        if there:
            self.say(f"{' and '.join(there)} of {counted(counts.total(), 'trial')}, from earlier runs")
        if self._view is not None:
            self._drawing = True
            self._view.start()
        elif self._beat is None:
            self._beat = threading.Thread(target=self._keep_printing, name="board", daemon=True)
            self._beat.start()

    def add(
        self, trials: Sequence[TrialSpec], labels: Mapping[str, str], columns: Columns | None = None
    ) -> None:
        """Further trials, with ``labels`` and ``columns`` as at the start."""
        with self._lock:
            self._columns = columns or self._columns
            for spec in trials:
                seen = Seen(spec, labels[spec.trial_id], len(self._trials))
                self._trials[spec.trial_id] = self._in["pending"][spec.trial_id] = seen

    def expect_more(self, distil: Mapping[str, float], evaluate: Iterable[str], further: int) -> None:
        """More work of this run: see `ddsweep.sweep.pace.Pace.expect_more`."""
        with self._lock:
            self._further = further
            self._pace.expect_more(distil, evaluate, further)

    def set_state(self, trial_id: str, state: State) -> None:
        before, seen = self._change(trial_id, lambda seen: replace(seen, state=state))
        if before.state == state:
            return
        now = time.monotonic()
        with self._lock:
            if state == "running":
                self._pace.started(trial_id, seen.spec.outer_steps, now)
            elif state == "evaluating":
                self._pace.distilled(trial_id, now)
            elif state == "done":
                self._pace.evaluated(trial_id, now)
            elif state == "paused":
                self._pace.paused(trial_id, now)
            elif state != "pending":
                self._pace.dropped(trial_id, now)
        self._print_line(seen)

    def progress(
        self,
        trial_id: str,
        outer_step: int,
        steps_taken: int,
        outer_loss: float | None,
        val_score: float | None,
    ) -> None:
        """A logged outer step of a running trial, and the number of steps since the last one."""
        _, seen = self._change(
            trial_id,
            lambda before: replace(
                before,
                state="running",
                outer_step=outer_step,
                steps_taken=before.steps_taken + steps_taken,
                outer_loss=outer_loss,
                val_score=before.val_score if val_score is None else val_score,
                best_score=max(
                    (score for score in (before.best_score, val_score) if score is not None), default=None
                ),
            ),
        )
        now = time.monotonic()
        with self._lock:
            self._pace.stepped(trial_id, outer_step, steps_taken, now)
        if now - self._last_line > _LINE_EVERY_S:
            self._print_line(seen)

    def retried(self, trial_id: str) -> None:
        """The worker of a trial died, and Tune starts the trial again."""
        self._change(trial_id, lambda before: replace(before, retries=before.retries + 1))

    def _change(self, trial_id: str, change: Callable[[Seen], Seen]) -> tuple[Seen, Seen]:
        with self._lock:
            before = self._trials[trial_id]
            after = self._trials[trial_id] = change(before)
            del self._in[before.state][trial_id]
            self._in[after.state][trial_id] = after
        return before, after

    # ---------------------------------------------------------------------------- what is known

    def state_of(self, trial_id: str) -> State:
        with self._lock:
            return self._trials[trial_id].state

    def counts(self) -> Counter[State]:
        with self._lock:
            return Counter({state: len(trials) for state, trials in self._in.items() if trials})

    def seen(self) -> dict[str, Seen]:
        """All trials by id, as they are now."""
        with self._lock:
            return dict(self._trials)

    # -------------------------------------------------------------------------------- what is shown

    def say(self, text: str) -> None:
        """A message for the reader."""
        if self._drawing:
            self._messages.append(text)
        else:
            self._last_line = time.monotonic()
            self._print(text)

    def _print(self, text: str) -> None:
        # A message stays on one line, so that it can be searched for in a log.
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _print_line(self, seen: Seen) -> None:
        if self._view is None:
            self._last_line = time.monotonic()
            self._print(f"{self._summary()} | {seen.label}: {_words(seen)}")

    def _keep_printing(self) -> None:
        """Prints a line also while nothing happens: an evaluation may take minutes."""
        while not self._ended.wait(1.0):
            if time.monotonic() - self._last_line > _LINE_EVERY_S:
                self._last_line = time.monotonic()
                self._print(self._summary())

    def _summary(self) -> str:
        counts = self.counts()
        text = f"{counts['done']}/{len(self._trials)} done"
        text += f", {counts['running']} running, {counts['evaluating']} evaluating"
        for state in ("paused", "stopped", "failed", "drained"):
            if counts[state]:
                text += f", {counts[state]} {state}"
        if self._further:
            text += f", up to {self._further} more to be proposed"
        now = time.monotonic()
        text += f", {_clock(now - self._started)}"
        with self._lock:
            left = self._pace.left(now)
        return text if left is None or counts["drained"] else f"{text}, {_left(left)}"

    def _picture(self) -> Picture:
        counts = {str(state): count for state, count in self.counts().items()}
        return Picture(self._summary(), counts, self._rows, self._columns, list(self._messages))

    def _rows(self, count: int) -> list[Row]:
        shown: list[Seen] = []
        with self._lock:
            for state in _ORDER:
                wanted = count - len(shown)
                shown += heapq.nsmallest(wanted, self._in[state].values(), key=lambda seen: seen.place)
        return [
            Row(
                seen.spec.trial_id,
                seen.state,
                f"{seen.outer_step}/{seen.spec.outer_steps}" if seen.outer_step else "",
                "" if seen.outer_loss is None else f"{seen.outer_loss:.3f}",
                "" if seen.val_score is None else f"{100 * seen.val_score:.1f} %",
            )
            for seen in shown
        ]


def _words(seen: Seen) -> str:
    words: list[str] = [seen.state]
    if seen.outer_step:
        words.append(f"step {seen.outer_step}/{seen.spec.outer_steps}")
    if seen.outer_loss is not None:
        words.append(f"loss {seen.outer_loss:.3f}")
    if seen.val_score is not None:
        words.append(f"validation {100 * seen.val_score:.1f} %")
    return ", ".join(words)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _left(left: Left) -> str:
    """``about 8 min left``; ``... of distilling left`` while the time of evaluation is unknown."""
    seconds = left.distilling if left.seconds is None else left.seconds
    what = "of distilling left" if left.seconds is None else "left"
    return f"{'at most ' if left.at_most else ''}about {_rounded(seconds or 0.0)} {what}"


def _rounded(seconds: float) -> str:
    """Rounded as far as such a forecast deserves."""
    if seconds < 55:
        return f"{max(10, round(seconds, -1)):.0f} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 100:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 48 else f"{round(hours / 24)} days"
