"""What a run does when it is told to end: by a signal, by the stop file, by the loss of Ray."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddsweep.processes import MARK, RAY_WAS_LOST
from ddsweep.sweep.drain import SIGNALS, Drain, Drained, Interrupted, out_of_reach
from tests.conftest import PATIENCE_S


class Begin:
    """What is called, from which thread."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self.called = threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self, cause: str) -> None:
        self.causes.append(cause)
        self.thread = threading.current_thread()
        self.called.set()


@pytest.fixture
def before() -> Iterator[list[Any]]:
    """The handlers of before, which are there again afterwards."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    yield handlers
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert "drain" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture(autouse=True)
def no_ray_was_lost() -> Iterator[None]:
    """`ddsweep.processes.leave` would end the process of all later tests at once."""
    yield
    RAY_WAS_LOST.clear()


@pytest.fixture
def stop(tmp_path: Path) -> Path:
    return tmp_path / "STOP"


def tell(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("number", SIGNALS)
def test_at_work_a_signal_drains_once_and_outside_of_its_handler(stop: Path, number: signal.Signals) -> None:
    begin = Begin()
    with Drain() as drain, drain.at_work(begin, stop):
        tell(number)
        assert begin.called.wait(PATIENCE_S)
        stop.touch()  # as a drain does
        time.sleep(0.5)
    assert begin.causes == [number.name]
    assert begin.thread is not threading.main_thread()


@pytest.mark.usefixtures("before")
def test_a_stop_file_drains_once_and_a_signal_after_it_is_the_first(stop: Path) -> None:
    begin = Begin()
    with Drain() as drain, drain.at_work(begin, stop):
        time.sleep(0.3)
        assert not begin.causes
        stop.touch()
        assert begin.called.wait(PATIENCE_S)
        tell(signal.SIGTERM)  # `ddsweep cancel` leaves the file, and its job then tells us
        time.sleep(0.5)
    assert begin.causes == ["STOP file"]


@pytest.mark.usefixtures("before")
@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_under_way_a_signal_ends_the_run_at_once(number: signal.Signals) -> None:
    with pytest.raises(Drained, match=number.name), Drain() as drain, drain.interruptible():
        tell(number)
        time.sleep(10)
        pytest.fail("it went on")


@pytest.mark.usefixtures("before")
def test_elsewhere_a_signal_waits_for_the_next_place(stop: Path) -> None:
    made = False
    with pytest.raises(Drained, match="SIGHUP"), Drain() as drain:
        tell(signal.SIGHUP)
        made = True  # a lock, say
        with drain.interruptible():
            pytest.fail("it went on")
    assert made
    begin = Begin()
    with Drain() as drain:
        tell(signal.SIGINT)
        with drain.at_work(begin, stop):
            assert begin.called.wait(PATIENCE_S)
    assert begin.causes == ["SIGINT"]


@pytest.mark.usefixtures("before")
def test_what_is_swallowed_is_raised_again_at_the_end_of_the_place_and_not_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    class Swallows:
        def __del__(self) -> None:
            tell(signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(Drained), Drain() as drain:
        with drain.interruptible():
            Swallows()
        pytest.fail("it went on")
    assert printed == []
    assert sys.unraisablehook == printed.append


@pytest.mark.usefixtures("before")
def test_a_second_signal_interrupts_once(stop: Path) -> None:
    cleaned = False
    with Drain() as drain, pytest.raises(Interrupted), drain.at_work(Begin(), stop):
        tell(signal.SIGTERM)
        time.sleep(1.2)
        try:
            tell(signal.SIGINT)
            time.sleep(10)
            pytest.fail("the second signal did nothing")
        finally:
            tell(signal.SIGINT)  # somebody is impatient
            time.sleep(0.01)
            cleaned = True
    assert cleaned


@pytest.mark.usefixtures("before")
def test_signals_of_one_moment_are_one(stop: Path) -> None:
    """`timeout` signals its child, and then the group with the child in it."""
    begin = Begin()
    with Drain() as drain, drain.at_work(begin, stop):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            tell(number)
            time.sleep(0.05)
        assert begin.called.wait(PATIENCE_S)
    assert begin.causes == ["SIGTERM"]


@pytest.mark.usefixtures("before")
def test_in_a_launch_signals_may_come_as_often_as_they_like(
    stop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, "1.0.0.")
    with Drain() as drain, drain.at_work(Begin(), stop):
        tell(signal.SIGTERM)
        time.sleep(1.2)
        tell(signal.SIGTERM)


@pytest.mark.usefixtures("before")
def test_the_loss_of_ray_ends_what_is_at_work(stop: Path) -> None:
    def lose() -> None:
        time.sleep(0.3)
        drain.lose_ray("raylet ended with -9")

    lost = r"SIGTERM, and Ray was lost \(raylet ended with -9\)"
    with pytest.raises(Drained, match=lost), Drain() as drain, drain.at_work(Begin(), stop):
        tell(signal.SIGTERM)
        threading.Thread(target=lose).start()
        time.sleep(10)
        pytest.fail("it went on")


@pytest.mark.usefixtures("before")
def test_a_hang_up_that_nohup_switched_off_stays_so(stop: Path) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Drain() as drain, drain.interruptible():
            tell(signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGHUP, old)


def test_in_another_thread_it_leaves_signals_alone(before: list[Any], stop: Path) -> None:
    seen: list[Any] = []

    def work() -> None:
        with Drain() as drain, drain.at_work(Begin(), stop):
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


def test_what_is_started_out_of_reach_stays_there() -> None:
    """The child installs handlers, as Ray's services do, and starts one of its own."""
    child = (
        "import signal, subprocess, sys\n"
        "for n in (1, 2, 15): signal.signal(n, lambda *_: sys.exit(1))\n"
        "subprocess.run(sys.argv[1:])\n"
    )
    grandchild = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(2); print(2)"]
    with (
        out_of_reach(),
        subprocess.Popen(
            [sys.executable, "-c", child, *grandchild], stdout=subprocess.PIPE, start_new_session=True
        ) as process,
    ):
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        for number in SIGNALS:
            os.killpg(process.pid, number)
        assert process.stdout.readline() == b"2\n"
    assert process.returncode == 0


ON_A_TERMINAL = """
import sys, time
from ddsweep.sweep.drain import Drain
with Drain() as drain, drain.at_work(lambda cause: open(sys.argv[1], "w").write(cause), sys.argv[1] + "x"):
    print("ready", flush=True)
    for _ in range(40):
        time.sleep(0.1)
        print("a line that nobody reads", flush=True)
"""


def test_a_terminal_that_is_closed_may_still_be_written_to(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path / "cause")])
    assert b"ready" in os.read(terminal, 5)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "cause").read_text() == "SIGHUP"


WAITS_FOR_EVER = """
import signal, sys, threading, time
from ddsweep.sweep import drain as module
module._COME_BACK_S = 0.2
with module.Drain() as drain, drain.leftover(lambda: print("lock")), drain.leftover(lambda: print("folder")):
    with drain.leftover(lambda: print("never")):
        pass
    with drain.at_work(lambda cause: None, module.Path("STOP")):
        signal.pthread_sigmask(signal.SIG_BLOCK, module.SIGNALS)  # so that no handler is called here
        threading.Thread(target=drain.lose_ray, args=("gcs_server ended with -9",)).start()
        time.sleep(60)
"""


def test_what_waits_inside_a_ray_that_is_lost_is_ended_and_leaves_nothing() -> None:
    command = [sys.executable, "-u", "-c", WAITS_FOR_EVER]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert ended.returncode == 75, ended.stderr
    assert ended.stdout.split() == ["folder", "lock"]
    assert ended.stderr == (
        "ddsweep: Ray was lost (gcs_server ended with -9): stopped; the same command goes on\n"
    )
