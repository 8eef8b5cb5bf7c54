"""ASHA on Ray Tune: settings are compared within their stratum, and the seeds of one setting wait for each
other.

Ray's own scheduler compares every trial with every other, and decides on each by itself. The score of one
image per class says nothing about ten, so it would stop all small trials and keep all large ones; and for a
borderline setting it would keep the lucky seeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from ddsweep.sweep.halving import Halving

__all__ = ["Asha"]

_STAGED = 4
"""The least number of trials that wait in Ray for a free place; at most as many as run. Resumed trials queue
behind them if workers are not reused."""


class Asha(FIFOScheduler):
    """Stops and pauses trials at their rungs, as ``halving`` says.

    A trial that waits for the other seeds of its setting is paused: its worker, which wrote a checkpoint
    before it told its score, ends, and its place is free. Once the setting may go on it runs again, before
    trials that have not begun. At most ``most`` trials are with Ray at a time.
    """

    def __init__(self, halving: Halving, *, most: int | None = None) -> None:
        super().__init__()
        self._halving, self._most = halving, most
        self._known: set[str] = set()
        self._active: set[Trial] = set()  # with Ray: they run, or wait for a place
        self._paused: dict[str, Trial] = {}
        self._released: deque[Trial] = deque()
        self._in_order: deque[Trial] = deque()
        self._stopped: set[str] = set()
        self.queue = _Queue(self._has_place)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles schedulers for a restore, which never comes: resuming goes by the files

    def debug_string(self) -> str:
        return str(self._halving)

    def is_paused(self, trial_id: str) -> bool:
        return trial_id in self._paused

    def is_stopped(self, trial_id: str) -> bool:
        """Whether a trial was stopped for its score: it does not go on as long as there is a scheduler."""
        return trial_id in self._stopped

    def failed(self, trial_id: str) -> None:
        """A trial has failed, and is not tried again."""
        self._halving.failed(trial_id)

    # ------------------------------------------------------------------------------ what Tune calls

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        trial_id = _id(trial)
        # Not a trial that is tried again after its worker died: Tune has it as pending by now.
        if trial_id not in self._known and self._halving.verdict(trial_id) != "go":
            trial.set_status(Trial.PAUSED)
            self._paused[trial_id] = trial
            self._halving.decided.append(trial_id)
        else:
            self._active.add(trial)
            self._in_order.append(trial)
        self._known.add(trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        trial_id, state = _id(trial), result.get("state")
        if state == "failed":
            self.failed(trial_id)
        if state != "running" or not self._halving.is_rung(trial_id, result["outer_step"]):
            return str(TrialScheduler.CONTINUE)
        verdict = self._halving.scored(trial_id, result["outer_step"], result["val_score"])
        if verdict == "stop":
            self._stopped.add(trial_id)
            return str(TrialScheduler.STOP)
        if verdict == "go":
            return str(TrialScheduler.CONTINUE)
        # As Ray's own PBT does: Tune's PAUSE would ask the worker for a checkpoint, and ours is written.
        tune_controller.pause_trial(trial, should_checkpoint=False)
        self._active.discard(trial)
        self._paused[trial_id] = trial
        return str(TrialScheduler.NOOP)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        self._carry_out(tune_controller)
        if self._released and self._has_place(released=True):
            trial = self._released.popleft()
            self._active.add(trial)
            self._in_order.appendleft(trial)
            return trial
        while self._in_order and self._in_order[0].status != Trial.PENDING:
            self._in_order.popleft()
        return self._in_order[0] if self._in_order else None

    def _carry_out(self, tune_controller: Any) -> None:
        """Let go on, or stop, the paused trials on which was decided."""
        if self._paused and not self._released and tune_controller.search_alg.is_finished():
            self._forget_ended()
            if not self._active:  # those that they wait for are lost: an error, but no reason to wait
                for trial_id in self._paused:
                    self._halving.wait_no_longer(trial_id)
        decided, self._halving.decided = self._halving.decided, []
        for trial_id in decided:
            verdict = self._halving.verdict(trial_id)
            if trial_id not in self._paused or verdict == "wait":
                continue
            trial = self._paused.pop(trial_id)
            if verdict == "go":
                self._released.append(trial)
            else:
                self._stopped.add(trial_id)
                tune_controller.stop_trial(trial)

    # ------------------------------------------------------------------------------------- places

    def _forget_ended(self) -> None:
        self._active = {trial for trial in self._active if not trial.is_finished()}

    def _has_place(self, released: bool = False) -> bool:
        """Whether one more trial may be given to Ray: a ``released`` one, or else a new one."""
        if self._released and not released:
            return False
        self._forget_ended()
        if self._most is not None and len(self._active) >= self._most:
            return False
        running = sum(trial.status == Trial.RUNNING for trial in self._active)
        return released or len(self._active) - running < max(_STAGED, running)


class _Queue(BasicVariantGenerator):
    """Hands out new trials while there ``is_place`` for them. Tune's own limit would count paused trials, and
    wait for ever."""

    def __init__(self, is_place: Callable[[], bool]) -> None:
        super().__init__()
        self._is_place = is_place

    def next_trial(self) -> Trial | None:
        return super().next_trial() if self._is_place() else None

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Nothing: resuming goes by the files."""


def _id(trial: Trial) -> str:
    """Ours, not Tune's: the ids of Tune change from run to run."""
    return str(trial.config["trial_id"])
