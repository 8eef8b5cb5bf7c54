"""ASHA for a sweep whose trials do not all answer the same question: one bracket for each stratum.

Ray's scheduler compares every trial with every other. The score of one image per class says nothing
about ten, so it would stop all small trials and keep all large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from ddsweep.catalog import TrialSpec
from ddsweep.spec import AshaSpec

__all__ = ["StratifiedAsha"]


@dataclass(frozen=True)
class _Entry:
    """What a bracket needs to know of a trial. Ours, not Tune's: the ids of Tune change from run to run."""

    trial_id: str


class StratifiedAsha(FIFOScheduler):
    """Stops trials at the rungs of ``asha``, comparing each with ``trials`` of its own stratum.

    A result counts where it has ``state: running``, ``val_score`` and an ``outer_step`` that is a rung of
    its trial; a trial that reaches its last outer step is never stopped.
    """

    def __init__(self, asha: AshaSpec, trials: Sequence[TrialSpec]) -> None:
        super().__init__()
        self._rungs = {trial.trial_id: asha.rungs(trial) for trial in trials}
        longest: dict[tuple[Any, ...], int] = {}
        for trial in trials:
            if self._rungs[trial.trial_id]:
                key = asha.stratum(trial)
                longest[key] = max(trial.outer_steps, longest.get(key, 0))
        brackets = {
            key: ASHAScheduler(
                time_attr="outer_step",
                metric="val_score",
                mode="max",
                grace_period=asha.grace,
                reduction_factor=asha.reduction,
                max_t=outer_steps,
                stop_last_trials=False,  # after the last step the distilled set is yet to be written
            )
            for key, outer_steps in longest.items()
        }
        self._bracket = {
            trial.trial_id: brackets[asha.stratum(trial)] for trial in trials if self._rungs[trial.trial_id]
        }
        self._entered: set[str] = set()

    def replay(self, trial_id: str, scores: Mapping[int, float]) -> None:
        """Take in what an earlier run measured, ``scores`` by outer step: a bracket that knew nothing of it
        would let the first trials of this run pass unseen."""
        for step in self._rungs.get(trial_id, ()):
            if step in scores:
                self._decide(trial_id, {"outer_step": step, "val_score": scores[step]})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        trial_id = trial.config["trial_id"]
        at_rung = result.get("state") == "running" and result["outer_step"] in self._rungs[trial_id]
        return self._decide(trial_id, result) if at_rung else str(TrialScheduler.CONTINUE)

    def debug_string(self) -> str:
        return f"ASHA in {len(set(map(id, self._bracket.values())))} strata"

    def _decide(self, trial_id: str, result: dict[str, Any]) -> str:
        bracket, entry = self._bracket[trial_id], _Entry(trial_id)
        if trial_id not in self._entered:
            self._entered.add(trial_id)
            bracket.on_trial_add(None, entry)
        return str(bracket.on_trial_result(None, entry, result))
