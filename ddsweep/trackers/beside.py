"""Sends to trackers beside a running sweep, from a thread. A tracker that fails never ends the sweep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ddsweep.results.layout import SweepDirectory
from ddsweep.trackers.contract import Told
from ddsweep.trackers.sync import Sync

__all__ = ["tracked"]

_EVERY_S = 20.0


@contextmanager
def tracked(
    kinds: Sequence[str],
    directory: SweepDirectory,
    told: Mapping[str, Told],
    out: Path,
    say: Callable[[str], None],
    every_s: float = _EVERY_S,
) -> Iterator[None]:
    """While inside, trackers get what is new every so often, and once more at the end. ``say`` gets one
    message for each tracker that fails; it gets nothing from then on."""
    ended = threading.Event()

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
                    f"`ddsweep track {directory.root} --to {kind}` sends the rest"
                )

    threads = [
        threading.Thread(target=follow, args=(kind,), name=f"tracker {kind}", daemon=True) for kind in kinds
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
