"""Sends to trackers beside a running sweep, from a thread. A tracker that fails never ends the sweep."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ddsweep.results.layout import SweepDirectory
from ddsweep.trackers.contract import Told
from ddsweep.trackers.sync import Sync

__all__ = ["tracked"]

_EVERY_S = 20.0

_AT_END_S = 60.0
_STOPPED_S = 5.0
"""So long trackers may send at the end, and once a run is told to stop at once."""


@contextmanager
def tracked(
    kinds: Sequence[str],
    directory: SweepDirectory,
    told: Mapping[str, Told],
    out: Path,
    say: Callable[[str], None],
    every_s: float = _EVERY_S,
    at_end_s: float = _AT_END_S,
) -> Iterator[None]:
    """While inside, trackers get what is new every so often, and once more at the end, for ``at_end_s`` at
    most. ``say`` gets one message for each tracker that fails, or is late; it gets nothing from then on."""
    ended = threading.Event()
    rest = "`ddsweep track {} --to {}` sends the rest"

    def follow(kind: str) -> None:
        try:
            with Sync(kind, directory, told, out) as sync:
                while not ended.wait(every_s):
                    sync(last=False)
                sync()
        except Exception as error:
            with suppress(Exception):
                say(
                    f"tracker {kind}: {str(error) or type(error).__name__}; the sweep goes on without it; "
                    + rest.format(directory.root, kind)
                )

    threads = {
        kind: threading.Thread(target=follow, args=(kind,), name=f"tracker {kind}", daemon=True)
        for kind in kinds
    }
    for thread in threads.values():
        thread.start()
    patience_s = min(_STOPPED_S, at_end_s)
    try:
        yield
        patience_s = at_end_s
    finally:
        ended.set()
        deadline = time.monotonic() + patience_s
        for kind, thread in threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                say(f"tracker {kind}: not waited for any longer; {rest.format(directory.root, kind)}")
