"""What the metrics of a sweep say, and that they can do it no harm."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import write_part
from ddsweep.results.schemas import TRIALS
from ddsweep.sweep import metrics
from ddsweep.sweep.metrics import METRICS, Exporter, Score, exported, measure
from ddsweep.sweep.observe import Board, State
from ddsweep.sweep.shards import Load
from tests.conftest import PATIENCE_S

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "dashboard.md"

IDLE = Load(waiting=0, in_flight=0, networks=0, retries=0)


def trial(images_per_class: int, seed: int, init: str = "random") -> TrialSpec:
    return TrialSpec(
        dataset=DATASETS["digits"],
        network="convnet",
        init=init,
        images_per_class=images_per_class,
        inner_steps=1,
        seed=seed,
    )


ONE, OTHER, LARGE, FIXED = trial(1, 0), trial(1, 1), trial(10, 0), trial(1, 0, "fixed")


@pytest.fixture
def board() -> Board:
    trials = [ONE, OTHER, LARGE, FIXED]
    console = Console(file=io.StringIO())
    return Board(console, {spec.trial_id: spec.trial_id for spec in trials}, trials)


def said(board: Board, load: Load = IDLE, scores: dict[str, Score] | None = None) -> dict[object, float]:
    return {**measure("s", board.seen(), load, scores or {})}


class Sinks:
    """Replaces Ray: remembers the gauges since the last look, and the sums of counters."""

    def __init__(self) -> None:
        self.gauges: dict[tuple[str, ...], float] = {}
        self.counters: dict[tuple[str, ...], float] = {}
        self.begun: list[str] = []

    def all(self) -> dict[str, metrics.Sink]:
        return {metric.name: self.sink(metric) for metric in METRICS}

    def sink(self, metric: metrics.Metric) -> metrics.Sink:
        def take(value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == metric.tags
            key = (metric.name, *tags.values())
            if metric.type == "gauge":
                self.gauges[key] = value
                return
            assert value > 0, "Ray refuses it"
            if key not in self.counters:
                self.begun.append(metric.name)
            self.counters[key] = self.counters.get(key, 0.0) + value

        return take


def test_trials_are_counted_in_every_state_also_where_there_is_none(board: Board) -> None:
    board.set_state(ONE.trial_id, "running")
    board.set_state(OTHER.trial_id, "failed")
    found = said(board)
    states = {state: found["ddsweep_trials", ("s", state)] for state in get_args(State)}
    assert states == {**dict.fromkeys(get_args(State), 0), "running": 1, "failed": 1, "pending": 2}


def test_loss_and_score_are_means_over_running_trials_of_one_kind(board: Board) -> None:
    board.progress(ONE.trial_id, 10, 10, 2.0, 0.5)
    board.progress(OTHER.trial_id, 10, 10, 4.0, None)
    board.progress(LARGE.trial_id, 10, 10, 1.0, 0.9)
    board.progress(FIXED.trial_id, 10, 10, None, None)
    found = said(board)
    assert found["ddsweep_outer_loss", ("s", "1", "random")] == 3.0
    assert found["ddsweep_outer_loss", ("s", "10", "random")] == 1.0
    assert ("ddsweep_outer_loss", ("s", "1", "fixed")) not in found
    assert found["ddsweep_val_score_mean", ("s", "1", "random")] == 0.5
    board.progress(OTHER.trial_id, 20, 10, 4.0, 0.7)
    assert said(board)["ddsweep_val_score_mean", ("s", "1", "random")] == pytest.approx(0.6)
    assert said(board)["ddsweep_val_score_best", ("s", "1", "random")] == 0.7
    board.progress(OTHER.trial_id, 30, 10, 4.0, 0.4)
    assert said(board)["ddsweep_val_score_best", ("s", "1", "random")] == 0.7, "it was reached"
    assert said(board)["ddsweep_val_score_mean", ("s", "1", "random")] == pytest.approx(0.45)


def test_what_no_trial_stands_for_any_more_is_not_said(board: Board) -> None:
    board.progress(ONE.trial_id, 10, 10, 2.0, 0.5)
    board.set_state(ONE.trial_id, "evaluating")
    found = said(board)
    for name in ("ddsweep_outer_loss", "ddsweep_val_score_mean", "ddsweep_test_accuracy_mean"):
        assert (name, ("s", "1", "random")) not in found
    assert found["ddsweep_val_score_best", ("s", "1", "random")] == 0.5, "that it was reached stays true"


def test_rows_of_ended_trials_count(board: Board) -> None:
    scores = {ONE.trial_id: Score(0.6, 0.5), OTHER.trial_id: Score(0.8, None)}  # the second one was stopped
    board.progress(ONE.trial_id, 10, 10, 2.0, 0.7)
    found = said(board, scores=scores)
    assert found["ddsweep_test_accuracy_mean", ("s", "1", "random")] == 0.5
    assert found["ddsweep_val_score_best", ("s", "1", "random")] == 0.8
    assert ("ddsweep_test_accuracy_mean", ("s", "10", "random")) not in found


def test_steps_retries_and_the_pool(board: Board) -> None:
    board.progress(ONE.trial_id, 10, 10, 2.0, None)
    board.retried(ONE.trial_id)
    board.progress(ONE.trial_id, 10, 4, 2.0, None)  # from its checkpoint at 6
    board.progress(LARGE.trial_id, 510, 10, 2.0, None)  # what an earlier run did is not of this one
    found = said(board, Load(waiting=5, in_flight=2, networks=48, retries=3))
    assert found["ddsweep_outer_steps", ("s",)] == 24
    assert found["ddsweep_trial_retries", ("s",)] == 1
    assert found["ddsweep_eval_units", ("s", "waiting")] == 5
    assert found["ddsweep_eval_units", ("s", "in_flight")] == 2
    assert found["ddsweep_networks_evaluated", ("s",)] == 48
    assert found["ddsweep_eval_retries", ("s",)] == 3


def test_only_metrics_that_are_declared_with_their_tags_and_no_trial_among_them(board: Board) -> None:
    for spec in (ONE, OTHER, LARGE, FIXED):
        board.progress(spec.trial_id, 10, 10, 2.0, 0.5)
    scores = {ONE.trial_id: Score(0.6, 0.5)}
    found = measure("s", board.seen(), IDLE, scores)
    tags = {metric.name: metric.tags for metric in METRICS}
    assert {name for name, _ in found} == set(tags)
    for name, values in found:
        assert len(values) == len(tags[name])
        assert not {spec.trial_id for spec in (ONE, OTHER, LARGE, FIXED)} & set(values)
    assert {tag for metric in METRICS for tag in metric.tags} == {
        "sweep",
        "state",
        "images_per_class",
        "init",
    }


def test_the_table_of_metrics_is_documented_as_it_is() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `ddsweep_")]
    tags = {metric.name: " ".join(f"`{tag}`" for tag in metric.tags) for metric in METRICS}
    assert rows == [f"| `{m.name}` | {m.type} | {tags[m.name]} | {m.meaning} |" for m in METRICS]


def test_gauges_are_set_every_time_and_counters_grow_by_what_is_new(board: Board, tmp_path: Path) -> None:
    sinks, loads = Sinks(), [IDLE, Load(0, 1, 16, 0), Load(0, 1, 16, 0), Load(0, 0, 48, 1)]
    exporter = Exporter("s", board, lambda: loads.pop(0), SweepDirectory(tmp_path), sinks.all())
    exporter.refresh()
    assert sorted(sinks.begun) == sorted(metric.name for metric in METRICS if metric.type == "counter")
    board.progress(ONE.trial_id, 10, 10, 2.0, 0.5)
    exporter.refresh()
    exporter.refresh()
    assert sinks.counters["ddsweep_networks_evaluated", "s"] == 16
    board.progress(ONE.trial_id, 20, 10, 1.0, 0.5)
    sinks.gauges.clear()
    exporter.refresh()
    assert sinks.counters["ddsweep_outer_steps", "s"] == 20
    assert sinks.counters["ddsweep_networks_evaluated", "s"] == 48
    assert sinks.counters["ddsweep_eval_retries", "s"] == 1
    assert sinks.gauges["ddsweep_outer_loss", "s", "1", "random"] == 1.0
    assert sinks.gauges["ddsweep_trials", "s", "pending"] == 3
    assert ("ddsweep_test_accuracy_mean", "s", "1", "random") not in sinks.gauges


def test_a_row_is_read_when_its_trial_is_done_a_few_at_a_time(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "READ_AT_ONCE", 1)
    directory, sinks = SweepDirectory(tmp_path), Sinks()
    directory.create()
    exporter = Exporter("s", board, lambda: IDLE, directory, sinks.all())
    for spec, accuracy in ((ONE, 0.4), (OTHER, 0.8)):
        row = dict.fromkeys(TRIALS.names) | {"trial_id": spec.trial_id, "test_accuracy_mean": accuracy}
        write_part(directory.trials_part(spec.trial_id), [row], TRIALS, directory.temporary)
    exporter.refresh()
    key = ("ddsweep_test_accuracy_mean", "s", "1", "random")
    assert key not in sinks.gauges
    board.set_state(ONE.trial_id, "done")
    board.set_state(OTHER.trial_id, "done")
    board.set_state(LARGE.trial_id, "done")  # whose row is gone
    exporter.refresh()
    assert sinks.gauges[key] == pytest.approx(0.4)
    exporter.refresh()
    exporter.refresh()
    assert sinks.gauges[key] == pytest.approx(0.6)


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failure_is_logged_once_and_the_next_refresh_is_tried(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "REFRESH_S", 0.01)
    sinks, calls = Sinks(), []

    def load() -> Load:
        calls.append(1)
        if len(calls) < 4:
            raise RuntimeError("no pool")
        return IDLE

    with (
        caplog.at_level(logging.WARNING),
        exported("s", board, load, SweepDirectory(tmp_path), sinks.all),
    ):
        until(lambda: sinks.gauges)
    assert [record.message for record in caplog.records] == ["metrics of s: RuntimeError('no pool')"]
    assert "metrics" not in {thread.name for thread in threading.enumerate()}


def test_a_refresh_that_hangs_does_not_hold_back_the_end(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "REFRESH_S", 0.05)
    begun, end, over = (threading.Event() for _ in range(3))

    def load() -> Load:
        begun.set()
        end.wait()
        over.set()
        return IDLE

    with exported("s", board, load, SweepDirectory(tmp_path), Sinks().all):
        assert begun.wait(PATIENCE_S)
    assert not over.is_set()
    end.set()
