"""The picture of a running sweep, at sizes of real terminals, and that nothing of it stays behind."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from itertools import product

import pytest
from rich.cells import cell_len
from rich.console import Console, Group

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.report.labels import trial_columns, trial_labels
from ddsweep.sweep.live_view import Columns, LiveView, Picture, Row, draw
from ddsweep.sweep.observe import Board

SIZES = [(60, 20), (80, 24), (200, 50)]
# As from a search with a grid: seven settings vary.
TRIALS = [
    TrialSpec(
        DATASETS["digits"],
        init=init,
        images_per_class=per_step * steps,
        inner_steps=steps,
        inner_epochs=epochs,
        outer_steps=40_000,
        outer_lr=round(0.001 * (1.37 * sample + 1), 5),
        inner_lr=round(0.02 + 0.0031 * sample, 5),
        seed=seed,
    )
    for init, steps, per_step, epochs, sample, seed in product(
        ("fixed", "random"), (1, 2), (1, 4), (1, 3), range(8), (0, 1)
    )
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_board(console: Console) -> Board:
    """In the middle of a sweep: 30 of 256 trials done before, four running, two evaluating, one failed."""
    board = Board(console, trial_labels(TRIALS), TRIALS, Columns(*trial_columns(TRIALS)))
    ids = [trial.trial_id for trial in TRIALS]
    for trial_id in ids[:30]:
        board.found(trial_id, "done")
    for place, trial_id in enumerate(ids[30:36]):
        board.set_state(trial_id, "running")
        board.progress(trial_id, 6000 * (place + 1), 6000, 1.0 / (place + 1), 0.5 + 0.08 * place)
    for trial_id in ids[34:36]:
        board.set_state(trial_id, "evaluating")
    board.set_state(ids[40], "failed")
    return board


def lines_of(picture: Picture, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO())
    console.print(Group(*draw(picture, width, height)))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.fixture
def picture() -> Picture:
    return a_board(Console(file=Terminal(), force_terminal=True, _environ={}))._picture()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_picture_fills_the_window_and_has_what_matters(picture: Picture, width: int, height: int) -> None:
    lines = lines_of(picture, width, height)
    assert len(lines) == height, "as many trials as there is room for"
    assert all(cell_len(line) <= width for line in lines)
    assert lines[0].startswith("30/256 done, 4 running, 2 evaluating, 1 failed, 0:0")
    heading = next(line for line in lines if line.startswith("trial "))
    assert heading.split()[-4:] == ["state", "step", "loss", "val."]
    body = lines[lines.index(heading) + 1 : -1]
    assert [line.split()[0] for line in body] == [row.trial_id for row in picture.rows(len(body))]
    assert body[0].endswith("  running      6000/40000  1.000  50.0 %")
    assert body[5].endswith("  evaluating  36000/40000  0.167  90.0 %")
    assert [line.split()[-1] for line in body[6:8]] == ["failed", "pending"]
    hidden = 256 - len(body)
    assert lines[-1] == f"and {hidden} more: {hidden - 30} pending, 30 done"


def test_settings_give_way_first(picture: Picture) -> None:
    """Settings that are the same in all shown trials are left out before those that tell them apart."""
    headings = {
        width: next(line for line in lines_of(picture, width, height) if line.startswith("trial ")).split()
        for width, height in SIZES
    }
    numbers = ["state", "step", "loss", "val."]
    assert headings[200] == ["trial", "init", "ipc", "S", "E", "inner_lr", "outer_lr", "seed", *numbers]
    assert headings[80] == ["trial", "ipc", "E", "inner_lr", "…", *numbers]
    assert headings[60] == ["trial", "ipc", "…", *numbers]


def test_long_values_are_cut_not_wrapped() -> None:
    network = "convnet(depth=3,width=128,norm=instance)"
    columns = Columns(("network", "models_per_something"), {"a": (network, "4")})
    one = Picture("1/1 done", {"running": 1}, lambda count: [Row("a", "running")], columns)
    lines = lines_of(one, 80, 10)
    assert lines[1].split()[:3] == ["trial", "network", "models_…"]
    assert lines[2].split()[:3] == ["a", "convnet(depth=3…", "4"]


@pytest.mark.parametrize(("width", "height"), [*SIZES, (40, 8), (20, 4), (10, 2)])
def test_messages_take_a_part_of_it_the_last_first(picture: Picture, width: int, height: int) -> None:
    said = [f"message {number} " + "word " * 12 for number in range(40)]
    lines = lines_of(
        Picture(picture.summary, picture.counts, picture.rows, picture.columns, said), width, height
    )
    shown = " ".join(lines)
    assert lines[0].startswith("30/256 do")
    if height >= 20:
        assert len(lines) == height
        assert "message 39" in shown and "message 9 " not in shown
        assert sum(bool(re.match(r"[0-9a-f]{10} ", line)) for line in lines) > height // 2


def test_few_trials_leave_the_rest_free() -> None:
    rows = [Row("a", "running"), Row("b", "done")]
    few = Picture("1/2 done", {"running": 1, "done": 1}, lambda count: rows[:count], Columns())
    assert [line.split()[0] for line in lines_of(few, 80, 24)] == ["1/2", "trial", "a", "b"]


# ------------------------------------------------------------------------------------ on a terminal


@pytest.fixture
def terminal() -> Iterator[Console]:
    console = Console(file=Terminal(), force_terminal=True, width=80, height=24, _environ={"TERM": "xterm"})
    streams = sys.stdout, sys.stderr
    yield console
    assert (sys.stdout, sys.stderr) == streams


def last_frame(console: Console) -> list[str]:
    assert isinstance(console.file, Terminal)
    frame = console.file.getvalue().rpartition("\x1b[H")[2]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame).split("\n")


def test_each_picture_covers_the_whole_window_whatever_it_is_changed_to(terminal: Console) -> None:
    """So that nothing of an earlier picture can be left, nor of another program's output in between."""
    board = a_board(terminal)
    with board:
        board.expect({trial.trial_id: 1.0 for trial in TRIALS[30:]}, [])
        assert board._view is not None
        for size in [(80, 24), *SIZES, (200, 12), (60, 50), (80, 24)]:
            terminal.size = size  # type: ignore[assignment]
            board._view._live.refresh()
            frame = last_frame(terminal)
            assert [len(frame), {cell_len(line) for line in frame}] == [size[1], {size[0]}]
            assert sum("outer_lr" in line or line.startswith("trial ") for line in frame) == 1
    assert isinstance(terminal.file, Terminal)
    written = terminal.file.getvalue()
    assert written.count("\x1b[?1049h") == written.count("\x1b[?1049l") == 1


def test_what_is_said_meanwhile_is_in_the_picture_and_is_left_afterwards(terminal: Console) -> None:
    board = a_board(terminal)
    with board:
        board.expect({}, [])
        board.say("a message of the sweep")
        print("a line of some library")
        print("begun, ", end="", file=sys.stderr)
        print("ended", file=sys.stderr)
        print("never ended", end="")
        board._view._live.refresh()  # type: ignore[union-attr]
        assert sum("a message of the sweep" in line for line in last_frame(terminal)) == 1
    assert isinstance(terminal.file, Terminal)
    first_screen = terminal.file.getvalue().rpartition("\x1b[?1049l")[2]
    said = ["a message of the sweep", "a line of some library", "begun, ended", "never ended"]
    places = [first_screen.index(text) for text in said]
    assert places == sorted(places)


def test_the_first_screen_comes_back_where_the_sweep_breaks(terminal: Console) -> None:
    with pytest.raises(KeyboardInterrupt), a_board(terminal) as board:
        board.expect({}, [])
        raise KeyboardInterrupt
    assert isinstance(terminal.file, Terminal)
    assert "\x1b[?1049l" in terminal.file.getvalue() and "\x1b[?25h" in terminal.file.getvalue()


def test_where_nothing_is_to_be_done_the_screen_is_left_alone(terminal: Console) -> None:
    with a_board(terminal):
        pass
    assert isinstance(terminal.file, Terminal)
    assert terminal.file.getvalue() == ""


def test_a_view_can_be_stopped_twice(terminal: Console) -> None:
    view = LiveView(terminal, lambda: Picture("", {}, lambda count: [], Columns()), lambda text: None)
    with view:
        view.start()
    view.stop()
