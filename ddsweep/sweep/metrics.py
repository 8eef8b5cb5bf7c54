"""Metrics of a running sweep for Prometheus, through Ray, all set from one place: the driver.

Ray reports a gauge for some twenty seconds after it was set and then forgets it. So a thread sets all gauges
anew every few seconds. A gauge without a value (the loss of a kind of trial when none of it runs) is not set
and ends by itself. No tag names a trial: there are too many.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter as Count
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

from ray.util.metrics import Counter, Gauge

from ddsweep.errors import ResultsError, UnreadableError
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.sweep.observe import Board, Seen, State
from ddsweep.sweep.shards import Load

__all__ = ["METRICS", "Exporter", "Metric", "Score", "exported", "measure"]

REFRESH_S = 5.0
"""Less than the 10 s between reports of a Ray process, so each report has all gauges."""

READ_AT_ONCE = 20
"""Rows of finished trials that are read in one refresh: about a tenth of a second of one core."""

_KIND = ("sweep", "images_per_class", "init")


@dataclass(frozen=True)
class Metric:
    """Prometheus has it as ``ray_<name>``, and a counter as ``ray_<name>_total``."""

    name: str
    type: Literal["gauge", "counter"]
    tags: tuple[str, ...]
    meaning: str


METRICS = (
    Metric("ddsweep_trials", "gauge", ("sweep", "state"), "Trials of the plan in each state"),
    Metric("ddsweep_outer_steps", "counter", ("sweep",), "Outer steps taken in this run, over all trials"),
    Metric("ddsweep_outer_loss", "gauge", _KIND, "Last outer loss, mean over running trials"),
    Metric("ddsweep_val_score_mean", "gauge", _KIND, "Last validation score, mean over running trials"),
    Metric("ddsweep_val_score_best", "gauge", _KIND, "Best validation score of any trial so far"),
    Metric("ddsweep_test_accuracy_mean", "gauge", _KIND, "Test accuracy, mean over trials that are done"),
    Metric("ddsweep_networks_evaluated", "counter", ("sweep",), "Held-out networks evaluated in this run"),
    Metric("ddsweep_eval_units", "gauge", ("sweep", "state"), "Units of evaluation waiting and in flight"),
    Metric("ddsweep_eval_retries", "counter", ("sweep",), "Units tried again after their actor died"),
    Metric("ddsweep_trial_retries", "counter", ("sweep",), "Trials started again after their worker died"),
)

_BY_NAME = {metric.name: metric for metric in METRICS}

Series = tuple[str, tuple[str, ...]]
"""A metric by its name, and the values of its tags in the order of `Metric.tags`."""

Sink = Callable[[float, dict[str, str]], None]
"""Takes the value of a gauge, or the increase of a counter, with its tags."""


@dataclass(frozen=True)
class Score:
    """The scores in the row of a finished or stopped trial; null if not measured."""

    val_score: float | None
    test_accuracy: float | None


def measure(
    sweep: str, seen: Mapping[str, Seen], load: Load, scores: Mapping[str, Score]
) -> dict[Series, float]:
    """All metrics now, counters as sums: from what was ``seen`` of each trial, and from the ``scores`` of
    finished ones, both by id."""
    states = Count(one.state for one in seen.values())
    found: dict[Series, float] = {
        ("ddsweep_trials", (sweep, state)): states[state] for state in get_args(State)
    }
    found |= {
        ("ddsweep_eval_units", (sweep, "waiting")): load.waiting,
        ("ddsweep_eval_units", (sweep, "in_flight")): load.in_flight,
        ("ddsweep_networks_evaluated", (sweep,)): load.networks,
        ("ddsweep_eval_retries", (sweep,)): load.retries,
        ("ddsweep_trial_retries", (sweep,)): sum(one.retries for one in seen.values()),
        ("ddsweep_outer_steps", (sweep,)): sum(one.steps_taken for one in seen.values()),
    }
    kinds: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for trial_id, one in seen.items():
        kinds[sweep, str(one.spec.images_per_class), one.spec.init].append(trial_id)
    for kind, ids in kinds.items():
        running = [seen[trial_id] for trial_id in ids if seen[trial_id].state == "running"]
        ended = [scores[trial_id] for trial_id in ids if trial_id in scores]
        validated = [*(seen[trial_id].best_score for trial_id in ids), *(score.val_score for score in ended)]
        of_kind = {
            "ddsweep_outer_loss": _mean(one.outer_loss for one in running),
            "ddsweep_val_score_mean": _mean(one.val_score for one in running),
            "ddsweep_val_score_best": max(_known(validated), default=None),
            "ddsweep_test_accuracy_mean": _mean(score.test_accuracy for score in ended),
        }
        found |= {(name, kind): value for name, value in of_kind.items() if value is not None}
    return found


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return fmean(known) if known else None


class Exporter:
    """Hands what `measure` finds to ``sinks``, by name: gauges every time, counters by what they grew.

    Rows of trials that are done or stopped are read as they come to be, those of earlier runs too.
    """

    def __init__(
        self,
        sweep: str,
        board: Board,
        load: Callable[[], Load],
        directory: SweepDirectory,
        sinks: Mapping[str, Sink],
    ) -> None:
        self._sweep, self._board, self._load, self._directory = sweep, board, load, directory
        self._sinks = sinks
        self._scores: dict[str, Score] = {}
        self._counted: dict[Series, float] = {}

    def refresh(self) -> None:
        seen = self._board.seen()
        self._read_scores(seen)
        for series, value in measure(self._sweep, seen, self._load(), self._scores).items():
            name, values = series
            metric, sink = _BY_NAME[name], self._sinks[name]
            tags = dict(zip(metric.tags, values, strict=True))
            if metric.type == "gauge":
                sink(value, tags)
                continue
            if series not in self._counted:
                # Ray refuses 0, and a counter that appears with its first event has no rate for it.
                sink(sys.float_info.min, tags)
            growth = value - self._counted.get(series, 0.0)
            if growth > 0:
                sink(growth, tags)
            self._counted[series] = value

    def _read_scores(self, seen: Mapping[str, Seen]) -> None:
        ended = [trial_id for trial_id, one in seen.items() if one.state in ("done", "stopped")]
        for trial_id in [trial_id for trial_id in ended if trial_id not in self._scores][:READ_AT_ONCE]:
            try:
                row = read_part(self._directory.trials_part(trial_id)).to_pylist()[0]
            except (ResultsError, UnreadableError):  # vanished or torn meanwhile
                row = {}
            self._scores[trial_id] = Score(row.get("val_score"), row.get("test_accuracy_mean"))


def _ray_sinks() -> dict[str, Sink]:
    return {
        metric.name: (
            Gauge(metric.name, metric.meaning, metric.tags).set
            if metric.type == "gauge"
            else Counter(metric.name, metric.meaning, metric.tags).inc
        )
        for metric in METRICS
    }


@contextmanager
def exported(
    sweep: str,
    board: Board,
    load: Callable[[], Load],
    directory: SweepDirectory,
    make_sinks: Callable[[], Mapping[str, Sink]] = _ray_sinks,
) -> Iterator[None]:
    """Keep the metrics of a sweep up to date while the context lasts, from a thread of their own.

    An error there is logged once, and neither ends nor delays the sweep.
    """
    end = threading.Event()

    def keep() -> None:
        exporter, told = None, False
        while True:
            try:
                exporter = exporter or Exporter(sweep, board, load, directory, make_sinks())
                exporter.refresh()
            except Exception as error:
                if not told:
                    logging.getLogger(__name__).warning("metrics of %s: %r", sweep, error)
                told = True
            if end.wait(REFRESH_S):
                return

    thread = threading.Thread(target=keep, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(REFRESH_S)
