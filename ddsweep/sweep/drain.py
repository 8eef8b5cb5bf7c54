"""The first SIGINT or SIGTERM, or a stop file, asks the work to come to a good end; a second one stops it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

__all__ = ["Interrupted", "drain_on_signal"]

_LOOK_EVERY_S = 0.2


class Interrupted(Exception):
    """A second signal came while the sweep was draining."""


@contextmanager
def drain_on_signal(drain: Callable[[str], None], stop_file: Path) -> Iterator[None]:
    """SIGINT, SIGTERM or ``stop_file`` drains; a second signal raises `Interrupted` in the main thread.

    The handler of the first signal sets a flag and nothing more: ``drain(cause)`` is called, once, by a
    thread that looks at it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []
    over = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if seen:
            raise Interrupted
        seen.append(number)

    def look() -> None:
        while not over.wait(_LOOK_EVERY_S):
            if seen or stop_file.exists():
                drain(signal.Signals(seen[0]).name if seen else f"{stop_file.name} file")
                return

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = threading.Thread(target=look, name="drain", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        for number, old in before.items():
            signal.signal(number, old)
