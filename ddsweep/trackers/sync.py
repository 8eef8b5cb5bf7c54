"""Sends what is new in the files of a sweep to one tracker. What was sent already is not sent again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from ddsweep.catalog import SETTINGS
from ddsweep.errors import ResultsError, UnreadableError, UserError
from ddsweep.paths import make_folder
from ddsweep.results.files import results_error, write_atomic
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import list_parts, read_part
from ddsweep.trackers.contract import Final, Point, Run, Told
from ddsweep.trackers.kinds import make_tracker

__all__ = ["Sync"]

_MOST_OPEN = 64
"""So many runs stay open between calls: each has a file, a thread or a process."""
_NOTE_EVERY_S = 2.0
_FROM = "from"
"""In the note, beside the trials: the folder of the sweep, as it is reached from ``out``."""

_ID_COLUMNS = ("trial_id", "outer_step", "sweep")


@dataclass(frozen=True)
class _Sent:
    """What a tracker has of one trial: the last outer step, the rollbacks up to it, hashes of the final row
    and of the picture."""

    step: int = 0
    rollbacks: int = 0
    final: str = ""
    picture: str = ""


class Sync:
    """Brings one tracker up to date, as often as it is called.

    ``told`` are the trials of the sweep by id; a trial that is not among them is told by its row. The files
    go into ``<out>/<kind>``, the note of what was sent into ``<out>/<kind>-<sweep>.json``. A context manager:
    it holds a lock, and closes the runs. Raises `UserError` if another process sends to the same place, and
    if a sweep of the same name in another folder did.
    """

    def __init__(self, kind: str, directory: SweepDirectory, told: Mapping[str, Told], out: Path) -> None:
        self._directory, self._told, self._kind = directory, told, kind
        self._sweep = directory.root.resolve().name
        self._out, self._note = out, out / f"{kind}-{self._sweep}.json"
        # Relative, so that a folder may move with what was sent from it.
        self._place = os.path.relpath(directory.root.resolve(), out.resolve())
        self._runs: dict[str, Run] = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        self._lock = FileLock(out / f".{kind}-{self._sweep}.lock")

    def __enter__(self) -> Sync:
        make_folder(self._out, "--out")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self._out}: another process sends this sweep to {self._kind}") from None
        except OSError as error:
            raise results_error(error, Path(self._lock.lock_file)) from error
        try:
            self._sent = self._read_note()
            self._tracker = make_tracker(self._kind, self._out, self._sweep)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for run in self._runs.values():
                run.close()
        finally:
            self._lock.release()

    def __call__(self, *, last: bool = True) -> int:
        """Send what is new; returns the number of trials with anything new. Torn parts wait until they are
        whole again, and where the tracker is not live, trials that go on wait for the ``last`` call."""
        sent, noted_at = 0, time.monotonic()
        # Sent first, noted after that: after a kill in between, the same is sent again to the same place.
        try:
            for trial_id in self._changed(ended_only=not (last or self._tracker.live)):
                before = self._sent.get(trial_id, _Sent())
                after = self._send(trial_id, before)
                if after == before:
                    continue
                self._sent[trial_id] = after
                sent += 1
                if time.monotonic() - noted_at > _NOTE_EVERY_S:
                    self._write_note()
                    noted_at = time.monotonic()
        finally:
            if sent:
                self._write_note()
        return sent

    def _changed(self, ended_only: bool) -> list[str]:
        """The trials with a file that has changed since the last look."""
        found: dict[str, None] = {}
        places = [
            path for table in ("history", "trials") for path in list_parts(self._directory.parts(table))
        ]
        ids = {path: path.stem.removeprefix("part-") for path in places}
        ids |= {self._directory.grid(trial_id): trial_id for trial_id in set(ids.values())}
        for path, trial_id in ids.items():
            if ended_only and not self._directory.trials_part(trial_id).exists():
                continue
            try:
                stat = path.stat()
            except OSError:
                continue  # not there yet, or gone since
            state = (stat.st_mtime_ns, stat.st_size)
            if self._seen.get(path) != state:
                self._seen[path] = state
                found[trial_id] = None
        return sorted(found)

    def _send(self, trial_id: str, before: _Sent) -> _Sent:
        points, rollbacks = self._points(trial_id, before)
        row = self._row(trial_id)
        final = _final(row) if row else None
        grid = self._directory.grid(trial_id)
        picture = _hash(grid.read_bytes()) if grid.exists() else ""
        after = replace(
            before,
            step=points[-1].step if points else before.step,
            rollbacks=rollbacks,
            final=_hash(repr(final).encode()) if final else before.final,
            picture=picture or before.picture,
        )
        if after == before:
            return before
        told = self._told.get(trial_id) or _told_by(trial_id, row)
        run = self._runs.get(trial_id)
        went_back = bool(points) and points[0].step <= before.step
        if run is not None and went_back:
            run.close()  # these steps were taken again
            run = None
        if run is None:
            resent = min(before.step, points[0].step - 1) if points else before.step
            run = self._runs[trial_id] = self._tracker.open(told, resent)
        if points:
            run.points(points)
        # A run that is opened at an earlier step may lose what was sent of later ones.
        again = went_back or (bool(points) and bool(before.final))
        if picture and (again or after.picture != before.picture):
            run.picture(grid, after.step)
        if final is not None and (again or after.final != before.final):
            run.final(final)
        run.flush()
        if final is not None or not self._tracker.live:
            self._runs.pop(trial_id).close()
        elif len(self._runs) > _MOST_OPEN:
            self._runs.pop(next(iter(self._runs))).close()
        return after

    def _points(self, trial_id: str, before: _Sent) -> tuple[list[Point], int]:
        path = self._directory.history_part(trial_id)
        try:
            rows = read_part(path).to_pylist()
        except ResultsError:  # none, or torn: then it is made again
            return [], before.rollbacks
        except UnreadableError:  # for a moment, perhaps
            self._seen.pop(path, None)
            return [], before.rollbacks
        new = [
            row
            for row in rows
            if row["outer_step"] > before.step or (row.get("n_rollbacks") or 0) > before.rollbacks
        ]
        points = [Point(row["outer_step"], row.get("seconds") or 0.0, _numbers(row)) for row in new]
        return points, max([before.rollbacks, *(row.get("n_rollbacks") or 0 for row in new)])

    def _row(self, trial_id: str) -> dict[str, Any] | None:
        path = self._directory.trials_part(trial_id)
        try:
            rows = read_part(path).to_pylist()
        except ResultsError:
            return None
        except UnreadableError:
            self._seen.pop(path, None)
            return None
        return rows[0] if rows else None

    def _read_note(self) -> dict[str, _Sent]:
        try:
            found = json.loads(self._note.read_text())
            place = found.pop(_FROM, self._place)
            sent = {trial_id: _Sent(**values) for trial_id, values in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ResultsError(
                f"{self._note}: cannot be read ({error}); remove it and {self._out / self._kind} to send "
                "everything again"
            ) from None
        if place != self._place:
            raise UserError(
                f"--out: {self._out} has {self._kind} of another sweep that is called {self._sweep}, in "
                f"{os.path.normpath(self._out / place)}; give this one another folder (or remove "
                f"{self._note}, if it is the same one in another place)"
            )
        return sent

    def _write_note(self) -> None:
        content: dict[str, Any] = {trial_id: asdict(sent) for trial_id, sent in self._sent.items()}
        content[_FROM] = self._place
        write_atomic(self._note, json.dumps(content).encode(), self._out / ".tmp")


def _told_by(trial_id: str, row: Mapping[str, Any] | None) -> Told:
    settings = {name: value for name, value in (row or {}).items() if name in SETTINGS and value is not None}
    return Told(trial_id, trial_id, settings)


def _final(row: Mapping[str, Any]) -> Final:
    outcome = {name: value for name, value in row.items() if name not in SETTINGS}
    words = {name: str(value) for name, value in outcome.items() if isinstance(value, str) and value}
    step = row.get("outer_steps_done") or row.get("outer_steps") or 0
    return Final(step, row.get("wall_seconds") or 0.0, _numbers(outcome), words)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in row.items()
        if name not in _ID_COLUMNS and isinstance(value, bool | int | float) and math.isfinite(value)
    }


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
