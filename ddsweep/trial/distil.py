"""Distilling trials, one or several of one shape together: from their first outer steps, or their last
checkpoints, to the sets on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ddsweep.catalog import TrialSpec
from ddsweep.core.distill import StepReport
from ddsweep.core.memory import release_memory
from ddsweep.data.splits import Splits
from ddsweep.errors import DivergedError, UserError
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial.run_state import TrialJob
from ddsweep.trial.running import Progress, RunningTrial
from ddsweep.trial.step import steps_together
from ddsweep.trial_plan import TrialSettings

__all__ = ["Companions", "distil_together", "distil_trial"]


class Companions(Protocol):
    """Where the trials of one process come from, and who is told what becomes of them."""

    def more(self, running: int) -> Sequence[TrialJob]:
        """Trials to begin now, beside ``running`` others. With none running, no trials mean the end."""
        ...

    def should_stop(self) -> bool:
        """Whether all are to drain. It is asked before each outer step."""
        ...

    def progress(self, spec: TrialSpec, progress: Progress) -> bool:
        """A logged outer step. Returns whether the trial goes on; at a rung it may have to leave."""
        ...

    def ended(self, spec: TrialSpec, outcome: bool | DivergedError | UserError) -> None:
        """A trial is distilled (True), drained with a checkpoint (False), or cannot go on."""
        ...


def distil_together(companions: Companions) -> None:
    """Distil the trials of ``companions`` side by side, until there are none.

    One outer step is that of all; each trial has its own networks, images, schedule and end, and its numbers
    do not depend on the others. A trial that cannot go on leaves, and the rest go on. Any error but
    `DivergedError` and `UserError` is raised.
    """
    running: list[RunningTrial] = []
    try:
        while True:
            if not _begin(companions, running) and not running:
                return
            stopping = companions.should_stop()
            for trial in [trial for trial in running if stopping or not trial.steps_left]:
                _end(companions, running, trial)
            if running:
                _step(companions, running)
    finally:
        release_memory()  # the process may live on, idle or with the next trial, beside others on the GPU


def _begin(companions: Companions, running: list[RunningTrial]) -> bool:
    """Begin the trials that are given now. Returns whether there were any."""
    given = companions.more(len(running))
    for job in given:
        try:
            with _spent((), running):
                trial = RunningTrial.begin(job, companions.should_stop)
        except (DivergedError, UserError) as error:
            companions.ended(job.spec, error)
            continue
        if trial is None:
            companions.ended(job.spec, True)
        elif (told := trial.told_again()) is None or companions.progress(job.spec, told):
            running.append(trial)
    return bool(given)


def _end(companions: Companions, running: list[RunningTrial], trial: RunningTrial) -> None:
    """A set if no outer step is left, else a checkpoint."""
    whole = not trial.steps_left
    try:
        with _spent([trial], running):
            trial.finish() if whole else trial.save()
    except (DivergedError, UserError) as error:
        companions.ended(trial.spec, error)
    else:
        companions.ended(trial.spec, whole)
    running.remove(trial)


def _step(companions: Companions, running: list[RunningTrial]) -> None:
    """One outer step of all that run."""
    for trial in running:
        trial.run.cohort_size = max(trial.run.cohort_size, len(running))
    with _spent(running, running):
        outcomes = steps_together(running)
    for trial, outcome in zip(list(running), outcomes, strict=True):
        try:
            with _spent([trial], running):
                told = _after(trial, outcome)
        except (DivergedError, UserError) as error:
            running.remove(trial)
            companions.ended(trial.spec, error)
        else:
            if told is not None and not companions.progress(trial.spec, told):
                running.remove(trial)


def _after(trial: RunningTrial, outcome: StepReport | Exception) -> Progress | None:
    if isinstance(outcome, DivergedError) and trial.roll_back():
        return None
    if isinstance(outcome, Exception):
        raise outcome
    return trial.stepped(outcome)


@contextmanager
def _spent(by: Sequence[RunningTrial], running: Sequence[RunningTrial]) -> Iterator[None]:
    """The seconds in here are those of the trials ``by``, in equal shares, and of no other one that runs."""
    began, used = time.monotonic(), time.process_time()
    beside = list(running)
    yield
    cpu, wall = time.process_time() - used, time.monotonic() - began
    for trial in beside:
        others = 1 - 1 / len(by) if trial in by else 1.0
        trial.meter.of_others(others * cpu, others * wall)


# ------------------------------------------------------------------------------------ one trial


@dataclass
class _One:
    """The companions of a trial that has none."""

    job: TrialJob
    stop: Callable[[], bool]
    on_progress: Callable[[Progress], None]
    outcome: bool | DivergedError | UserError | None = None
    begun: bool = False

    def more(self, running: int) -> Sequence[TrialJob]:
        begun, self.begun = self.begun, True
        return [] if begun else [self.job]

    def should_stop(self) -> bool:
        return self.stop()

    def progress(self, spec: TrialSpec, progress: Progress) -> bool:
        self.on_progress(progress)
        return True

    def ended(self, spec: TrialSpec, outcome: bool | DivergedError | UserError) -> None:
        self.outcome = outcome


def distil_trial(
    spec: TrialSpec,
    splits: Splits,
    directory: SweepDirectory,
    settings: TrialSettings,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> bool:
    """Distil ``spec``, or go on with it, until its distilled set is on disk.

    Returns True when it is, False if ``should_stop`` asked to drain (then a checkpoint is). An outer step
    that runs out of memory is taken again with a leaner plan, which is kept. Raises `DivergedError` when the
    trial cannot go on, `TooLargeError` when there is no such plan left, and `UserError` for a missing device.
    """
    one = _One(TrialJob(spec, splits, directory, settings), should_stop, on_progress)
    distil_together(one)
    if isinstance(one.outcome, Exception):
        raise one.outcome
    assert one.outcome is not None
    return one.outcome
