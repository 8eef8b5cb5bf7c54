"""What a tracker is: it opens a run for a trial, and a run takes rows, a final row and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Final", "Point", "Run", "Told", "Tracker"]


@dataclass(frozen=True)
class Told:
    """A trial as a tracker shows it: its id, a readable name, and its settings (numbers, words, flags)."""

    trial_id: str
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One logged outer step: finite numbers by column of ``history``; ``seconds`` of the trial so far."""

    step: int
    seconds: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Final:
    """The row of a trial that ended, without its settings: finite numbers, and words such as ``status``."""

    step: int
    seconds: float
    values: Mapping[str, float]
    words: Mapping[str, str]


class Run(Protocol):
    """The run of one trial. What was handed over is on disk once `flush` returns, of a tracker
    that is not live `close`."""

    def points(self, points: Sequence[Point]) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def final(self, final: Final) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Tracker(Protocol):
    """Opens runs. ``sent`` is the last outer step that an earlier session sent, 0 if none; what the run has
    of later steps was not confirmed, or was taken again, and is replaced as far as the tracker can.

    ``live`` is false if a run is on disk only once it is closed: then it is closed each time, and trials
    that go on wait for the end."""

    live: bool

    def open(self, told: Told, sent: int) -> Run: ...
