"""The processes of one run on this machine, known by a mark in their environment, whoever their parent is;
and how this one ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ddsweep.errors import EXIT_DRAINED

__all__ = ["LOST_RAY_EXIT", "MARK", "RAY_WAS_LOST", "kill_marked", "kill_with_children", "leave", "marked"]

MARK = "DDSWEEP_RUN"
"""The variable in the environment by which the processes of one run are known."""

RAY_WAS_LOST = threading.Event()
"""Set once a Ray that this process used is gone."""

LOST_RAY_EXIT = "DDSWEEP_LOST_RAY_EXIT"
"""The variable with the exit code for that, where somebody is to tell it from other drains."""


def leave(code: int) -> NoReturn:
    """`sys.exit`, or, if a Ray was lost, an end at once: at exit Ray and Tune would ask that Ray again, and
    wait a minute or crash."""
    if RAY_WAS_LOST.is_set():
        sys.stdout.flush()
        os._exit(int(os.environ.get(LOST_RAY_EXIT, code)) if code == EXIT_DRAINED else code)
    sys.exit(code)


def marked(value: str) -> list[int]:
    """The processes on this node in whose environment `MARK` begins with ``value``, and those below them, but
    this one. (Some of Ray's write their title over their environment.)"""
    entry = f"{MARK}={value}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or of another user
            variables = (place / "environ").read_bytes().split(b"\0")
            if any(word.startswith(entry) for word in variables):
                found.append(int(place.name))
    return [pid for pid in _with_children(found) if pid != os.getpid()]


def _with_children(pids: Iterable[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(place.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(place.parent.name))
    found = dict.fromkeys(pids)
    level = list(found)
    while level:
        level = [child for pid in level for child in children.get(pid, ()) if child not in found]
        found |= dict.fromkeys(level)
    return list(found)


def kill_marked(value: str, patience_s: float = 5.0) -> list[int]:
    """SIGKILL to the processes that `marked` finds, until none is left. Returns those that live after
    ``patience_s``. Ray leaves a process behind now and then, and processes whose parent was killed are not
    told to end."""
    deadline = time.monotonic() + patience_s
    while (left := marked(value)) and time.monotonic() < deadline:
        _kill(left)
        time.sleep(0.1)
    return left


def kill_with_children(pid: int) -> None:
    """SIGKILL to a process and all below it."""
    _kill(_with_children([pid]))


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
