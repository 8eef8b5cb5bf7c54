"""How far a sweep is, from its files alone: without a driver, also on a login node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ddsweep.catalog import EvaluationSpec, TrialSpec
from ddsweep.errors import ResultsError
from ddsweep.report.settings import settings_of
from ddsweep.report.sweep_file import Asked, require_sweep
from ddsweep.results.coverage import is_evaluated, networks_judged
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import PART_FOLDERS, SweepDirectory
from ddsweep.results.lock import live_holder
from ddsweep.results.parts import list_parts, read_rows
from ddsweep.results.schemas import FAILURES, HISTORY
from ddsweep.spec import AshaSpec, setting_of

__all__ = [
    "AGAIN",
    "STATES",
    "STYLES",
    "StateReader",
    "SweepStatus",
    "TrialStatus",
    "failure_message",
    "read_history",
    "status",
    "trial_states",
]

STATES = (
    *("done", "stopped", "evaluating", "distilled", "running", "paused", "interrupted", "failed", "pending"),
)
"""Furthest first. ``evaluating`` and ``running`` need a driver at work. Without one the same files mean
``distilled`` (the evaluation is still to do) and ``interrupted``; the next run goes on there. ``stopped``:
the scheduler ended the trial, and a run without one goes on with it. ``paused``: the trial waits for the
other seeds of its setting."""

STYLES = {
    "done": "green",
    "stopped": "magenta",
    "evaluating": "cyan",
    "distilled": "yellow",
    "running": "cyan",
    "paused": "blue",
    "interrupted": "yellow",
    "failed": "red",
    "pending": "dim",
}
AGAIN = ("distilled", "interrupted", "failed", "pending")
"""States that the next run goes on with."""


@dataclass(frozen=True)
class TrialStatus:
    """One trial. ``outer_step`` is the last logged one. Loss and score are the last in its history; the score
    is measured more rarely. ``settings`` is empty if only files say that the trial exists. ``heldout`` is the
    number of held-out networks behind its test accuracy."""

    trial_id: str
    state: str
    settings: dict[str, Any]
    outer_step: int
    outer_steps: int | None
    outer_loss: float | None
    val_score: float | None
    seconds: float | None
    message: str | None = None
    heldout: int | None = None


@dataclass(frozen=True)
class SweepStatus:
    """All trials of a sweep. ``driver`` is what the lock says about a driver at work; ``eta_seconds`` is
    rough, and None without a driver. ``torn`` are unreadable parts; ``left`` are trials with files that the
    sweep no longer has. Guided searches propose up to ``to_propose`` trials more."""

    name: str
    root: Path
    trials: tuple[TrialStatus, ...]
    driver: dict[str, Any] | None
    eta_seconds: float | None
    torn: tuple[Path, ...]
    note: str | None = None
    left: tuple[str, ...] = ()
    to_propose: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """The number of trials in each of `STATES`."""
        found = Counter(trial.state for trial in self.trials)
        return {state: found[state] for state in STATES}


def trial_states(
    directory: SweepDirectory,
    trials: Sequence[TrialSpec],
    evaluation: EvaluationSpec,
    *,
    stopped_stay: bool = True,
) -> dict[str, str]:
    """``done``, ``stopped`` or ``missing`` for each trial, by id; the folder need not be there.

    Without a scheduler stopped trials are ``missing``, because a run goes on with them.
    """
    known = KnownParts.load(directory)
    reader = StateReader(directory, evaluation, known=known, believe_rows=False)
    evals = directory.evals_by_trial()
    states = {
        trial.trial_id: reader.ended(trial.trial_id, trial, evals.get(trial.trial_id, [])) for trial in trials
    }
    with suppress(ResultsError):  # a folder of somebody else: the next call takes as long again
        known.save(directory)
    ends = ("done", "stopped") if stopped_stay else ("done",)
    return {trial_id: state if state and state in ends else "missing" for trial_id, state in states.items()}


def status(directory: SweepDirectory, asked: Asked) -> SweepStatus:
    """The state of the trials of ``asked``, in that order; without them, of all trials with files.

    Torn parts that were read are listed in ``torn``. Raises `ResultsError` for a folder that does not exist
    or holds no sweep, and `UnreadableError`.
    """
    require_sweep(directory)
    trials, driver, known = asked.trials, live_holder(directory.lock), KnownParts.load(directory)
    torn = [
        path
        for table in PART_FOLDERS
        for path in list_parts(directory.parts(table))
        if not known.is_same(path) and _truncated(path)
    ]
    seen = directory.seen_trials()
    by_id = dict.fromkeys(seen) if trials is None else {trial.trial_id: trial for trial in trials}
    evals, reader = directory.evals_by_trial(), StateReader(directory, asked.evaluation, driver, torn, known)
    found = tuple(
        reader.status(trial_id, trial, evals.get(trial_id, [])) for trial_id, trial in by_id.items()
    )
    if asked.scheduler and trials and driver:
        found = _with_paused(found, trials, asked.scheduler)
    return SweepStatus(
        name=directory.root.name,
        root=directory.root,
        trials=found,
        driver=driver,
        eta_seconds=_eta(found, asked.to_propose) if driver else None,
        torn=tuple(dict.fromkeys(torn)),  # the same part may have been met twice
        note=asked.note,
        left=() if trials is None else tuple(sorted(set(seen) - set(by_id))),
        to_propose=asked.to_propose,
    )


def _with_paused(
    found: Sequence[TrialStatus], trials: Sequence[TrialSpec], scheduler: AshaSpec
) -> tuple[TrialStatus, ...]:
    """``found``, with ``paused`` for trials that wait at a rung for slower seeds."""
    behind: dict[tuple[Any, ...], int] = {}
    for one, trial in zip(found, trials, strict=True):
        if one.state in ("running", "interrupted", "pending"):
            key = setting_of(trial)
            behind[key] = min(one.outer_step, behind.get(key, one.outer_step))
    return tuple(
        replace(one, state="paused")
        if one.state in ("running", "interrupted")
        and one.outer_step in scheduler.rungs(trial)
        and behind[setting_of(trial)] < one.outer_step
        else one
        for one, trial in zip(found, trials, strict=True)
    )


def read_history(directory: SweepDirectory, trial_id: str, torn: list[Path]) -> list[dict[str, Any]]:
    """The logged outer steps of a trial; none if its part is torn. A torn part is added to ``torn``."""
    return read_rows([directory.history_part(trial_id)], HISTORY, torn.append)


@dataclass(frozen=True)
class StateReader:
    """Reads the states of trials from the files of a sweep. Unreadable parts are added to ``torn``; less is
    read of ``known`` parts. Without an ``evaluation`` any ``trials`` part counts as current. Rows are
    believed in what they say of evals parts, unless ``believe_rows`` is false."""

    directory: SweepDirectory
    evaluation: EvaluationSpec | None
    driver: Mapping[str, Any] | None = None
    torn: list[Path] = field(default_factory=list)
    known: KnownParts = field(default_factory=KnownParts)
    believe_rows: bool = True

    def status(
        self, trial_id: str, trial: TrialSpec | None, evals: Sequence[Path] | None = None
    ) -> TrialStatus:
        """The state of one trial. ``evals`` are its evals parts; left out, the folder is listed. Without
        ``trial`` any ``trials`` part counts as current."""
        history = read_history(self.directory, trial_id, self.torn)
        state = self._state(trial_id, trial, self.directory.evals_parts(trial_id) if evals is None else evals)
        last = history[-1] if history else {}
        scores = [row["val_score"] for row in history if row["val_score"] is not None]
        return TrialStatus(
            trial_id=trial_id,
            state=state,
            settings=settings_of(trial) if trial else {},
            outer_step=last.get("outer_step") or 0,
            outer_steps=trial.outer_steps if trial else None,
            outer_loss=last.get("outer_loss"),
            val_score=scores[-1] if scores else None,
            seconds=last.get("seconds"),
            message=failure_message(self.directory, trial_id, self.torn) if state == "failed" else None,
            heldout=self._heldout(trial_id, trial) if state == "done" else None,
        )

    def ended(self, trial_id: str, trial: TrialSpec | None, evals: Sequence[Path]) -> str | None:
        """``stopped`` if the ``trials`` part says so, ``done`` if all that is asked is there; None for an
        unfinished trial."""
        path = self.directory.trials_part(trial_id)
        if not path.exists():
            return None
        try:
            if self.known.footer(path).get("status") == "stopped":
                return "stopped"
            if trial is None or self.evaluation is None:
                return "done"
            asked = (trial, self.evaluation, self.known, evals)
            whole = is_evaluated(self.directory, *asked, believe_row=self.believe_rows)
            return "done" if whole else None
        except ResultsError:
            self.torn.append(path)
            return None

    def _state(self, trial_id: str, trial: TrialSpec | None, evals: Sequence[Path]) -> str:
        if ended := self.ended(trial_id, trial, evals):
            return ended
        directory, driver = self.directory, self.driver
        # A file from before the driver started is from an earlier driver, and says nothing about this one.
        since = _since(driver)
        worked = max(map(_modified, (directory.checkpoint(trial_id), directory.history_part(trial_id))))
        failed = _modified(directory.failure_part(trial_id))
        distilled = _modified(directory.distilled(trial_id))
        if failed and not (driver and max(worked, distilled) > failed):
            return "failed"
        if distilled:
            return "evaluating" if driver else "distilled"
        if worked:
            return "running" if driver and worked >= since else "interrupted"
        return "pending"

    def _heldout(self, trial_id: str, trial: TrialSpec | None) -> int | None:
        try:
            fixed = trial is not None and trial.init == "fixed"
            return networks_judged(self.directory, trial_id, self.known, fixed=fixed)
        except ResultsError:
            self.torn.append(self.directory.trials_part(trial_id))
            return None


def failure_message(directory: SweepDirectory, trial_id: str, torn: list[Path] | None = None) -> str:
    """Why a trial has failed; a part that cannot be read is added to ``torn``."""
    rows = read_rows([directory.failure_part(trial_id)], FAILURES, ([] if torn is None else torn).append)
    if not rows:
        return "failed; the part that says why is torn"
    row = rows[-1]
    return ": ".join(str(row[name]) for name in ("error_class", "message") if row[name]) or "no message"


def _truncated(path: Path) -> bool:
    """Whether a part has lost its end. Cheap enough for thousands of parts: a whole one ends in its magic
    word."""
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < 12:
                return True
            file.seek(-4, 2)
            return file.read() != b"PAR1"
    except OSError:
        return False


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _since(driver: Mapping[str, Any] | None) -> float:
    try:
        return datetime.fromisoformat((driver or {})["since"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0


def _eta(trials: Sequence[TrialStatus], more: int) -> float | None:
    """Seconds until the last trial is distilled: the rest at the pace so far, shared by the trials that run
    now. A trial without a pace, and each of ``more`` that are not there yet, takes the mean time. None if no
    trial has a pace, or nothing is left to distil."""
    whole = {t.trial_id: _whole_time(t) for t in trials}
    known = [seconds for seconds in whole.values() if seconds is not None]
    left = [trial for trial in trials if trial.state in ("running", "paused", "interrupted", "pending")]
    if not known or not (left or more):
        return None
    mean = sum(known) / len(known)
    remaining = mean * more
    for trial in left:
        seconds = whole[trial.trial_id]
        remaining += mean if seconds is None else max(0.0, seconds - (trial.seconds or 0.0))
    return remaining / max(1, sum(trial.state == "running" for trial in trials))


def _whole_time(trial: TrialStatus) -> float | None:
    if not trial.seconds or not trial.outer_step:
        return None
    return trial.seconds * (trial.outer_steps or trial.outer_step) / trial.outer_step
