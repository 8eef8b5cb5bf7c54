"""What a person sees of a running sweep: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ddsweep.catalog import TrialSpec

__all__ = ["Board", "Seen", "State"]

State = Literal["pending", "running", "paused", "evaluating", "done", "stopped", "failed", "drained"]
_ORDER: tuple[State, ...] = (
    *("running", "evaluating", "failed", "drained", "paused", "pending", "stopped", "done"),
)
_SHOWN = 20
_LINE_EVERY_S = 15.0


@dataclass(frozen=True)
class Seen:
    """The last that is known of one trial. ``steps_taken`` and ``retries`` (how often Tune tried it again
    after its worker died) are of this run alone."""

    spec: TrialSpec
    label: str
    place: int
    state: State = "pending"
    outer_step: int = 0
    started_step: int | None = None
    steps_taken: int = 0
    retries: int = 0
    outer_loss: float | None = None
    val_score: float | None = None


@dataclass
class _Steps:
    """Outer steps of all trials: that are to be done in all, were done before this run, and are done."""

    total: int = 0
    before: int = 0
    done: int = 0

    def add(self, seen: Seen, sign: int) -> None:
        """Count a trial in (1) or out (-1)."""
        self.total += sign * (seen.outer_step if seen.state == "stopped" else seen.spec.outer_steps)
        self.before += sign * (seen.started_step or 0)
        ended = seen.state in ("done", "evaluating", "failed")
        self.done += sign * (seen.spec.outer_steps if ended else seen.outer_step)


class Board:
    """The states of all trials, fed by the runner from several threads and drawn by ``rich``.

    As a context manager it draws while the sweep runs. Lines are printed when a trial changes its
    state and, if nothing does, every 15 seconds.
    """

    def __init__(self, console: Console, labels: dict[str, str], trials: Sequence[TrialSpec]) -> None:
        self._console = console
        self._trials = {
            spec.trial_id: Seen(spec, labels[spec.trial_id], place) for place, spec in enumerate(trials)
        }
        # Of 100,000 trials nothing may be counted anew at each event: sums are kept as they change.
        self._in: dict[State, dict[str, Seen]] = {state: {} for state in _ORDER}
        self._steps = _Steps()
        for seen in self._trials.values():
            self._enter(seen)
        self._lock = threading.Lock()
        self._started = self._last_line = time.monotonic()
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def state_of(self, trial_id: str) -> State:
        with self._lock:
            return self._trials[trial_id].state

    def counts(self) -> Counter[State]:
        with self._lock:
            return Counter({state: len(trials) for state, trials in self._in.items() if trials})

    def seen(self) -> dict[str, Seen]:
        """All trials by their id, as they are now."""
        with self._lock:
            return dict(self._trials)

    def set_state(self, trial_id: str, state: State) -> None:
        before, seen = self._change(trial_id, lambda seen: replace(seen, state=state))
        if before.state != state and not self._console.is_terminal:
            self._print_line(seen)

    def progress(
        self,
        trial_id: str,
        outer_step: int,
        steps_taken: int,
        outer_loss: float | None,
        val_score: float | None,
    ) -> None:
        """A logged outer step of a running trial, and how many it took since the last one."""
        _, seen = self._change(
            trial_id,
            lambda before: replace(
                before,
                state="running",
                outer_step=outer_step,
                started_step=outer_step if before.started_step is None else before.started_step,
                steps_taken=before.steps_taken + steps_taken,
                outer_loss=outer_loss,
                val_score=before.val_score if val_score is None else val_score,
            ),
        )
        overdue = time.monotonic() - self._last_line > _LINE_EVERY_S
        if overdue and not self._console.is_terminal:
            self._print_line(seen)

    def retried(self, trial_id: str) -> None:
        """Its worker died, and Tune starts the trial again."""
        self._change(trial_id, lambda before: replace(before, retries=before.retries + 1))

    def _change(self, trial_id: str, change: Callable[[Seen], Seen]) -> tuple[Seen, Seen]:
        with self._lock:
            before = self._trials[trial_id]
            after = self._trials[trial_id] = change(before)
            del self._in[before.state][trial_id]
            self._steps.add(before, -1)
            self._enter(after)
        return before, after

    def _enter(self, seen: Seen) -> None:
        self._in[seen.state][seen.spec.trial_id] = seen
        self._steps.add(seen, 1)

    def say(self, text: str) -> None:
        """A line for the reader, above the live table."""
        self._console.print(text, highlight=False)

    # ------------------------------------------------------------------------------------- drawing

    def _print_line(self, seen: Seen) -> None:
        self._last_line = time.monotonic()
        self._console.print(f"{self._summary()} | {seen.label}: {self._words(seen)}", highlight=False)

    def _words(self, seen: Seen) -> str:
        words: list[str] = [seen.state]
        if seen.outer_step:
            words.append(f"step {seen.outer_step}/{seen.spec.outer_steps}")
        if seen.outer_loss is not None:
            words.append(f"loss {seen.outer_loss:.3f}")
        if seen.val_score is not None:
            words.append(f"validation {100 * seen.val_score:.1f} %")
        return ", ".join(words)

    def _summary(self) -> str:
        counts = self.counts()
        done, total = counts["done"], len(self._trials)
        text = f"{done}/{total} done, {counts['running']} running, {counts['evaluating']} evaluating"
        if counts["stopped"]:
            text += f", {counts['stopped']} stopped"
        if counts["failed"]:
            text += f", {counts['failed']} failed"
        elapsed = time.monotonic() - self._started
        text += f", {_clock(elapsed)}"
        eta = self._eta(elapsed)
        return text if eta is None else f"{text}, about {_clock(eta)} left"

    def _eta(self, elapsed: float) -> float | None:
        """Seconds left, if trials go on as they went: by the share of outer steps that are done."""
        with self._lock:
            total, before, done = self._steps.total, self._steps.before, self._steps.done
        gained = done - before
        if gained <= 0 or done >= total:
            return None
        return elapsed * (total - done) / gained

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        table.add_column("trial", no_wrap=True)
        for heading in ("state", "outer step", "loss", "validation"):
            table.add_column(heading, justify="right", no_wrap=True)
        shown: list[Seen] = []
        with self._lock:
            for state in _ORDER:
                wanted = _SHOWN - len(shown)
                shown += heapq.nsmallest(wanted, self._in[state].values(), key=lambda seen: seen.place)
        for seen in shown:
            table.add_row(
                seen.label,
                seen.state,
                f"{seen.outer_step}/{seen.spec.outer_steps}" if seen.outer_step else "",
                "" if seen.outer_loss is None else f"{seen.outer_loss:.3f}",
                "" if seen.val_score is None else f"{100 * seen.val_score:.1f} %",
            )
        hidden = len(self._trials) - len(shown)
        more = [Text(f"and {hidden} more")] if hidden > 0 else []
        return Group(table, *more, Text(self._summary(), style="bold"))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
