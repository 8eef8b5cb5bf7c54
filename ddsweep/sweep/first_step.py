"""Stopping a trial before its first step. There is nothing to save, and the trial may not check for minutes,
because its first step may be compiled."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["leaving_before_the_first_step"]

_LOOK_S = 1.0


@contextmanager
def leaving_before_the_first_step(told: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """In a process that has nothing else to do: ``told``, to be asked before each step. Until it is asked for
    a second time, it is also asked once a second by a thread, which ends the process."""
    asked, under_way = 0, threading.Event()

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        stop = told()
        if stop or asked > 1:
            under_way.set()
        return stop

    def watch() -> None:
        while not under_way.wait(_LOOK_S):
            if told():
                os._exit(0)

    thread = threading.Thread(target=watch, name="first step", daemon=True)
    thread.start()
    try:
        yield should_stop
    finally:
        under_way.set()
        thread.join()
