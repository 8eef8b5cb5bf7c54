"""The first SIGINT or SIGTERM asks the work to come to a good end, the second one stops it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "drain_on_signal"]


class Interrupted(Exception):
    """A second signal came while the sweep was draining."""


@contextmanager
def drain_on_signal(drain: Callable[[str], None]) -> Iterator[None]:
    """SIGINT or SIGTERM drains; a second one raises `Interrupted` in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if seen:
            raise Interrupted
        seen.append(number)
        drain(signal.Signals(number).name)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
