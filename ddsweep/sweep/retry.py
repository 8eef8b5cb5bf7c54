"""Retries of work whose process died, and their messages. No Ray here.

Most causes pass: another program takes the memory for a minute, or a node is lost and comes back. So attempts
are spread over minutes, with growing waits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["SPREAD_S", "RetryPolicy", "Teller", "WorkerError", "told_death"]

SPREAD_S = 180.0
"""The time from the first failure of a piece of work to its last attempt, without the attempts themselves."""

_GROWTH = 3.0
_LONGEST = 400


class WorkerError(Exception):
    """A process died, or raised an unforeseen error, in every attempt."""


@dataclass(frozen=True)
class RetryPolicy:
    """``retries`` attempts after the first one, over ``spread_s`` seconds: each wait is three times the one
    before."""

    retries: int
    spread_s: float = SPREAD_S

    def wait(self, failures: int) -> float | None:
        """Seconds from failure number ``failures`` (the first is 1) to the next attempt; None if that was the
        last."""
        if failures > self.retries:
            return None
        whole = sum(_GROWTH**k for k in range(self.retries))
        return self.spread_s * _GROWTH ** (failures - 1) / whole


@dataclass
class Teller:
    """Reports deaths of work that goes on, once in ``every_s`` seconds: a minute without memory causes
    many."""

    say: Callable[[str], None]
    every_s: float = 60.0
    _last: float = field(default=-1e9, init=False)

    def tell(self, text: str) -> None:
        now = time.monotonic()
        if now - self._last >= self.every_s:
            self._last = now
            self.say(text)


_OUT_OF_MEMORY = re.compile(
    r"Memory on the node \(IP: ([^,]+),.*?was ([\d.]+)GB used / ([\d.]+)GB limit", re.S
)
_LARGEST = re.compile(r"^(\d+)\t([\d.]+)\t(.+)$", re.M)
_LOST_NODE = re.compile(r"node has died|NODE_DIED|The node .* died")
_KILLED = re.compile(r"exit type: SYSTEM_ERROR|Socket closed|process was killed|worker died unexpectedly")
_MORE_ROOM = (
    "make room there, or have fewer run side by side (trials: resources.max_concurrent, in an array more "
    "resources.cpus for each; a pool: a smaller total_cpus or total_gpus)"
)


def told_death(text: str) -> str:
    """Who ended a worker, and what to do, in one line. ``text`` is Ray's message, or an error file; its last
    failure counts."""
    text = text.rpartition("Failure # ")[2]
    if found := _OUT_OF_MEMORY.search(text):
        node, used, limit = found.groups()
        largest = _LARGEST.search(text, found.end())
        most = f", {largest[2]} by process {largest[1]} ({largest[3].strip()[:80]})" if largest else ""
        return (
            f"Ray's memory monitor killed the process, for {used} of {limit} GB of node {node} were in "
            f"use{most}; {_MORE_ROOM}"
        )
    if _LOST_NODE.search(text):
        where = re.search(r"^\s*ip: (\S+)", text, re.M)
        return f"its node{f' {where[1]}' if where else ''} was lost; see whether it is up and can be reached"
    if _KILLED.search(text):
        return (
            "the process was killed from outside, or crashed: often by the kernel or a batch system, for "
            f"lack of memory (see dmesg); {_MORE_ROOM}"
        )
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:_LONGEST] if lines else "the process died for an unknown reason"
