"""The first signal, or the stop file, drains; the second signal stops."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ddsweep.sweep.drain import Interrupted, drain_on_signal
from tests.conftest import PATIENCE_S


class Drain:
    """What is called, from which thread."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self.called = threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self, cause: str) -> None:
        self.causes.append(cause)
        self.thread = threading.current_thread()
        self.called.set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_once_and_outside_of_its_handler(tmp_path: Path, number: signal.Signals) -> None:
    drain, before = Drain(), signal.getsignal(number)
    with drain_on_signal(drain, tmp_path / "STOP"):
        os.kill(os.getpid(), number)
        assert drain.called.wait(PATIENCE_S)
        (tmp_path / "STOP").touch()  # as a drain does
        time.sleep(0.5)
    assert drain.causes == [number.name]
    assert drain.thread is not threading.main_thread()
    assert signal.getsignal(number) is before


def test_a_stop_file_drains_once_and_a_signal_after_it_is_the_first(tmp_path: Path) -> None:
    drain = Drain()
    with drain_on_signal(drain, tmp_path / "STOP"):
        time.sleep(0.3)
        assert not drain.causes
        (tmp_path / "STOP").touch()
        assert drain.called.wait(PATIENCE_S)
        os.kill(os.getpid(), signal.SIGTERM)  # `ddsweep cancel` leaves the file, and its job then tells us
        time.sleep(0.5)
    assert drain.causes == ["STOP file"]


def test_a_second_signal_interrupts(tmp_path: Path) -> None:
    drain, before = Drain(), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted), drain_on_signal(drain, tmp_path / "STOP"):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        pytest.fail("the second signal did nothing")
    assert signal.getsignal(signal.SIGINT) is before
    assert "drain" not in {thread.name for thread in threading.enumerate()}


def test_in_another_thread_it_leaves_signals_alone(tmp_path: Path) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with drain_on_signal(Drain(), tmp_path / "STOP"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
