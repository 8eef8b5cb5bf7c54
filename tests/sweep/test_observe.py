"""The board counts as events come; it must say what counting anew would."""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from typing import Any

import pytest
from rich.console import Console

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.sweep import observe
from ddsweep.sweep.observe import Board

TRIALS = [TrialSpec(DATASETS["digits"], outer_steps=100, seed=seed) for seed in range(40)]
IDS = [trial.trial_id for trial in TRIALS]


@pytest.fixture
def board() -> Board:
    console = Console(file=io.StringIO(), width=200)
    return Board(console, {trial_id: f"name-{trial_id}" for trial_id in IDS}, TRIALS)


def _drawn(board: Board) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(board._render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_counts_and_what_is_drawn_are_those_of_all_events(board: Board) -> None:
    draw = random.Random(0)
    state = dict.fromkeys(IDS, "pending")
    for _ in range(500):
        trial_id = draw.choice(IDS)
        if draw.random() < 0.5:
            board.progress(trial_id, draw.randrange(1, 100), 1, 0.5, None)
            state[trial_id] = "running"
        else:
            word: Any = draw.choice(["evaluating", "done", "stopped", "failed", "drained"])
            board.set_state(trial_id, word)
            state[trial_id] = word
    assert board.counts() == Counter(state.values())
    assert all(board.state_of(trial_id) == word for trial_id, word in state.items())
    order = ["running", "evaluating", "failed", "drained", "pending", "stopped", "done"]
    ranked = sorted(IDS, key=lambda trial_id: order.index(state[trial_id]))
    lines = _drawn(board)
    assert re.findall(r"name-(\w+)", "\n".join(lines)) == ranked[:20]
    assert lines[21] == "and 20 more"


def test_the_time_left_goes_by_the_share_of_outer_steps(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = observe.time.monotonic()
    monkeypatch.setattr(observe.time, "monotonic", lambda: now)
    board._started = now - 60
    assert "left" not in _drawn(board)[-1]
    for trial_id in IDS[:10]:
        board.set_state(trial_id, "done")  # 1000 steps of 4000 in a minute
    assert _drawn(board)[-1].endswith("10/40 done, 0 running, 0 evaluating, 1:00, about 3:00 left")
    board.progress(IDS[10], 50, 1, 0.5, None)  # it went on from there: of an earlier run
    assert _drawn(board)[-1].endswith("1 running, 0 evaluating, 1:00, about 2:57 left")
    for trial_id in IDS[20:]:
        board.set_state(trial_id, "stopped")  # 2000 steps less to do
    assert _drawn(board)[-1].endswith("20 stopped, 1:00, about 0:57 left")
