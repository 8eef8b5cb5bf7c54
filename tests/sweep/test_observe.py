"""The board counts as events come, and says in lines what a terminal that draws would show."""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from typing import Any

import pytest
from rich.console import Console

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.sweep import observe
from ddsweep.sweep.live_view import Columns
from ddsweep.sweep.observe import Board
from tests.conftest import PATIENCE_S

TRIALS = [TrialSpec(DATASETS["digits"], outer_steps=100, seed=seed) for seed in range(40)]
IDS = [trial.trial_id for trial in TRIALS]


class Dumb(io.StringIO):
    """A terminal without any abilities, such as that of an editor."""

    def isatty(self) -> bool:
        return True


CONSOLES = {
    "file": lambda: Console(file=io.StringIO(), width=80),
    "dumb terminal": lambda: Console(file=Dumb(), width=80, force_terminal=True, _environ={"TERM": "dumb"}),
    "colours in a file": lambda: Console(file=io.StringIO(), width=80, _environ={"FORCE_COLOR": "1"}),
}


@pytest.fixture(params=CONSOLES)
def console(request: pytest.FixtureRequest) -> Console:
    return CONSOLES[request.param]()


def a_board(console: Console) -> Board:
    return Board(console, {trial_id: f"name-{trial_id}" for trial_id in IDS}, TRIALS)


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_counts_and_what_is_shown_are_those_of_all_events() -> None:
    board = a_board(Console(file=io.StringIO()))
    draw = random.Random(0)
    state = dict.fromkeys(IDS, "pending")
    for _ in range(500):
        trial_id = draw.choice(IDS)
        if draw.random() < 0.5:
            board.progress(trial_id, draw.randrange(1, 100), 1, 0.5, None)
            state[trial_id] = "running"
        else:
            word: Any = draw.choice(["evaluating", "paused", "done", "stopped", "failed", "drained"])
            board.set_state(trial_id, word)
            state[trial_id] = word
    assert board.counts() == Counter(state.values())
    assert all(board.state_of(trial_id) == word for trial_id, word in state.items())
    order = ["running", "evaluating", "failed", "drained", "paused", "pending", "stopped", "done"]
    ranked = sorted(IDS, key=lambda trial_id: order.index(state[trial_id]))
    assert [row.trial_id for row in board._rows(25)] == ranked[:25]


def test_proposals_of_a_search_join_the_others() -> None:
    console = Console(file=io.StringIO(), width=80)
    board = Board(console, {IDS[0]: "first"}, TRIALS[:1])
    with board:
        board.expect({IDS[0]: 1.0}, [])
        board.expect_more({}, [], 2)
        board.set_state(IDS[0], "running")
        board.add(TRIALS[1:2], {IDS[1]: "second"}, Columns(("rate",), {IDS[1]: ("0.1",)}))
        board.expect_more({IDS[1]: 1.0}, [], 1)
        board.set_state(IDS[1], "running")
    first, second = printed(console)
    assert "0/1 done, 1 running, 0 evaluating, up to 2 more to be proposed" in first and "first" in first
    assert "0/2 done, 2 running, 0 evaluating, up to 1 more to be proposed" in second and "second" in second
    assert board.counts() == {"running": 2} and set(board.seen()) == set(IDS[:2])
    assert board._picture().columns.cells == {IDS[1]: ("0.1",)}


def test_where_nothing_can_be_drawn_lines_tell_of_it_as_it_goes(console: Console) -> None:
    board = a_board(console)
    with board:
        board.expect({trial_id: 1.0 for trial_id in IDS}, [])
        board.set_state(IDS[0], "running")
        assert printed(console) == [f"0/40 done, 1 running, 0 evaluating, 0:00 | name-{IDS[0]}: running"]
        board.set_state(IDS[0], "running")
        board.progress(IDS[0], 50, 50, 0.25, 0.5)
        board.set_state(IDS[0], "evaluating")
        board.say("a message " + "that is long " * 20)
        board.set_state(IDS[0], "done")
    lines = printed(console)
    assert len(lines) == 4, "a line stays one, however long it is"
    assert lines[1].endswith(f"name-{IDS[0]}: evaluating, step 50/100, loss 0.250, validation 50.0 %")
    assert lines[2].startswith("a message that is long")
    assert lines[3].startswith("1/40 done, 0 running, 0 evaluating, 0:0")
    assert "\x1b[?" not in "\n".join(lines)


def test_going_on_does_not_tell_each_finished_trial_again(console: Console) -> None:
    board = a_board(console)
    with board:
        for trial_id in IDS[:30]:
            board.found(trial_id, "done")
        board.found(IDS[30], "stopped")
        board.expect({trial_id: 1.0 for trial_id in IDS[31:]}, [])
        board.set_state(IDS[31], "running")
    assert printed(console) == [
        "30 done and 1 stopped of 40 trials, from earlier runs",
        f"30/40 done, 1 running, 0 evaluating, 1 stopped, 0:00 | name-{IDS[31]}: running",
    ]
    assert board.counts() == {"done": 30, "stopped": 1, "running": 1, "pending": 8}


def test_a_line_comes_also_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_LINE_EVERY_S", 0.01)
    console = Console(file=io.StringIO())
    with a_board(console) as board:
        board.expect({}, IDS)
        end = time.monotonic() + PATIENCE_S
        while len(printed(console)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
    assert printed(console)[1].startswith("0/40 done, 0 running, 0 evaluating, 0:0")


def test_the_line_says_what_is_left_once_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(observe.time, "monotonic", lambda: now[0])
    board = a_board(Console(file=io.StringIO()))
    board._beat = board  # type: ignore[assignment]  # no thread: the clock stands still

    def at(seconds: float) -> str:
        now[0] = 1000.0 + seconds
        return board._summary()

    board.expect({trial_id: 1.0 for trial_id in IDS[:4]}, [])
    assert "left" not in at(10.0)
    board.set_state(IDS[0], "running")
    assert "left" not in at(20.0)
    board.progress(IDS[0], 50, 50, 0.5, None)  # half of a trial in ten seconds, one at a time
    assert at(20.0).endswith("1 running, 0 evaluating, 0:20, about 1 min of distilling left")
    now[0] += 10.0
    board.progress(IDS[0], 100, 50, 0.5, None)
    board.set_state(IDS[0], "evaluating")
    board.set_state(IDS[1], "running")
    assert at(50.0).endswith("about 40 s of distilling left")
    now[0] += 100.0
    board.set_state(IDS[0], "done")
    assert at(150.0).endswith("1/40 done, 1 running, 0 evaluating, 2:30, about 6 min left")
    board.set_state(IDS[1], "drained")
    assert "left" not in at(151.0), "a drain comes to its end long before that"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "10 s"),
        (44, "40 s"),
        (58, "1 min"),
        (89, "1 min"),
        (5400, "90 min"),
        (7000, "2 h"),
        (200_000, "2 days"),
    ],
)
def test_a_forecast_is_rounded(seconds: float, words: str) -> None:
    assert observe._rounded(seconds) == words
