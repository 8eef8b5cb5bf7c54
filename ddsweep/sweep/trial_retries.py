"""Trials whose worker died, tried again by Tune, but not at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ddsweep.sweep.retry import RetryPolicy

__all__ = ["TrialRetries"]


class TrialRetries(FIFOScheduler):
    """What ``inner`` decides, but that a trial which failed rests, as ``policy`` says, before it is given to
    ``inner`` again: its place is free meanwhile. Whether it is tried again is Tune's decision.

    While ``draining`` trials that wait, or rest, or are paused are taken out, however many they are: starting
    one takes seconds, only for it to see that it is to stop."""

    def __init__(
        self,
        inner: TrialScheduler,
        policy: RetryPolicy,
        *,
        draining: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._inner, self._policy, self._draining, self._clock = inner, policy, draining, clock
        self._rest_until: dict[Trial, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles schedulers for a restore, which never comes: resuming goes by the files

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        wait = self._policy.wait(trial.num_failures) if trial.num_failures else None
        if wait is None:
            self._inner.on_trial_add(tune_controller, trial)
        else:
            tune_controller._set_trial_status(trial, Trial.PAUSED)
            self._rest_until[trial] = self._clock() + wait

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        if self._draining():
            tune_controller.search_alg.set_finished()
            for trial in list(tune_controller.get_live_trials()):
                if trial.status in (Trial.PENDING, Trial.PAUSED):
                    tune_controller.stop_trial(trial)
            return None
        for trial, until in list(self._rest_until.items()):
            if trial.status != Trial.PAUSED:  # it was stopped meanwhile
                del self._rest_until[trial]
            elif until <= self._clock():
                del self._rest_until[trial]
                tune_controller._set_trial_status(trial, Trial.PENDING)
                self._inner.on_trial_add(tune_controller, trial)
        chosen = self._inner.choose_trial_to_run(tune_controller)
        return None if chosen in self._rest_until else chosen

    # --------------------------------------------------------------------------- as ``inner`` has it

    @property
    def metric(self) -> Any:
        return self._inner.metric

    @property
    def supports_buffered_results(self) -> bool:
        return bool(self._inner.supports_buffered_results)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return bool(self._inner.set_search_properties(metric, mode, **spec))

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return str(self._inner.on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self._inner.on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        return str(self._inner.debug_string())
