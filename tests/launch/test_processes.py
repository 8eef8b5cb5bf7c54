"""Processes that end with those who started them, and signals that only set flags."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from ddsweep.launch.processes import Signals, end, spawn
from ddsweep.processes import MARK, kill_marked, marked

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]

PARENT = """
import os, subprocess, sys, time
from ddsweep.launch.processes import spawn
from ddsweep.processes import MARK
child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(600)"
grandchild = "import time; time.sleep(600)"
spawn([sys.executable, "-c", child, grandchild], {**os.environ, MARK: sys.argv[1]})
time.sleep(600)
"""


def until(what: Callable[[], object], description: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"never: {description}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def ignores(pid: int, number: int) -> bool:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigIgn"], 16) >> (number - 1) & 1)


@pytest.fixture
def mark() -> Iterator[str]:
    value = f"test-{secrets.token_hex(4)}."
    yield value
    kill_marked(value)


def test_a_child_ends_when_its_parent_is_killed_and_a_grandchild_is_found(mark: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, mark]) as parent:
        until(lambda: len(marked(mark)) == 2, "a child and a grandchild")
        child, grandchild = sorted(marked(mark), key=lambda pid: parent_of(pid) != parent.pid)
        assert parent_of(grandchild) == child
        parent.kill()
        parent.wait()
    until(lambda: not alive(child), "the child ends by itself")
    time.sleep(0.3)
    assert marked(mark) == [grandchild], "nobody told it"
    assert kill_marked(mark) == []
    assert not alive(grandchild)


def test_the_warning_before_the_time_limit_kills_neither_children_nor_theirs(mark: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, mark]) as parent:
        until(lambda: len(marked(mark)) == 2, "a child and a grandchild")
        both = marked(mark)
        assert all(ignores(pid, signal.SIGUSR2) for pid in both)
        for pid in both:
            os.kill(pid, signal.SIGUSR2)
        time.sleep(0.3)
        assert sorted(marked(mark)) == sorted(both)
        parent.kill()


def test_a_child_gets_words_environment_and_output_as_they_are(tmp_path: Path) -> None:
    log = tmp_path / "a log"
    words = ["with space", "$HOME", "'\"", "-c"]
    show = "import os, sys; print(sys.argv[1:], os.environ['GIVEN'], file=sys.stderr); sys.exit(7)"
    with log.open("w") as output:
        child = spawn([sys.executable, "-c", show, *words], {**os.environ, "GIVEN": "a b"}, output)
        assert child.wait() == 7
    assert log.read_text() == f"{words} a b\n"


def test_kill_marked_takes_what_the_mark_begins_and_nothing_else(mark: str) -> None:
    own = spawn(SLEEP, {**os.environ, MARK: f"{mark}0"})
    other = spawn(SLEEP, {**os.environ, MARK: f"x{mark}"})
    try:
        until(lambda: marked(mark) == [own.pid], "it is there")
        assert kill_marked(mark) == []
        assert own.wait() == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_end_is_patient_and_then_not() -> None:
    polite = spawn(SLEEP, os.environ)
    assert end(polite, 30) in (-signal.SIGTERM, 1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    read, write = os.pipe()
    with os.fdopen(read) as answer, os.fdopen(write, "w") as output:
        stubborn = spawn([sys.executable, "-c", f"{deaf}; time.sleep(600)"], os.environ, output)
        assert answer.readline() == "1\n"
        assert end(stubborn, 0.3) == -signal.SIGKILL


@pytest.mark.usefixtures("handlers")
def test_signals_set_flags_and_requeue_calls_who_was_there_before() -> None:
    called: list[int] = []

    def submitit(number: int, frame: FrameType | None) -> None:
        called.append(number)

    signal.signal(signal.SIGUSR2, submitit)
    signals = Signals()
    assert not signals.any
    os.kill(os.getpid(), signal.SIGUSR2)
    assert signals.ending and not signals.stopping and signals.any
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.stopping
    assert called == []
    signals.requeue()
    assert called == [signal.SIGUSR2]


@pytest.mark.usefixtures("handlers")
def test_requeue_without_anybody_there_before_does_nothing() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    Signals().requeue()


@pytest.mark.usefixtures("handlers")
def test_a_stop_by_another_cause_stays(tmp_path: Path) -> None:
    signals, stop = Signals(), tmp_path / "STOP"
    signals.stop_when(stop.exists)
    assert not signals.any
    stop.touch()
    assert signals.any and signals.stopping and not signals.ending
    stop.unlink()
    assert signals.stopping
