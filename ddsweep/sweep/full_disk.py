"""A disk that is full in the middle of a sweep: reported once, and not tried again by a thousand trials."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ddsweep.errors import DiskFullError

__all__ = ["FullDisk"]

_IN_VAIN = 16
"""After so many trials in a row that find the disk full, at least, the others are left for another run."""


class FullDisk:
    """Hears of every trial that ends. It reports the first one that finds the disk full by ``say``, and calls
    ``give_up`` after many in a row, two for each of ``places``, and after each further one. Both may be
    called from any thread."""

    def __init__(self, say: Callable[[str], None], give_up: Callable[[], None], places: float) -> None:
        self._say, self._give_up = say, give_up
        self._most = max(_IN_VAIN, 2 * places)
        self._lock = threading.Lock()
        self._told, self._in_vain = "", 0

    def ended(self) -> None:
        """A trial ended with enough space."""
        with self._lock:
            self._in_vain = 0

    def met(self, error: BaseException | str) -> None:
        """A trial failed: an error that has nothing to do with disks is passed over."""
        if not isinstance(error, DiskFullError | str):
            return
        with self._lock:
            first, self._told = not self._told, self._told or str(error)
            self._in_vain += 1
            enough = self._in_vain >= self._most
        if first:
            self._say(f"{error} (trials that find space go on)")
        if enough:
            self._give_up()
