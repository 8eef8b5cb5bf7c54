"""The places of a sweep as trials of Ray Tune, which starts them where there is room, and watches them.

A Tune trial is a place: a process that distils trials of ours from the queue. It tells Tune what happens to
them, and Tune asks here; what a place is to know comes back through a mailbox, for Tune itself sends nothing
to a running trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ddsweep.sweep.queue import Lost, TrialQueue

__all__ = ["Places", "place_of"]


class Places(FIFOScheduler):
    """Starts places in their order as long as the ``queue`` has trials for them, and answers what they ask.

    A place that died rests before it starts again, as the queue says; its room is free meanwhile. So does one
    whose trials all wait at a rung: its process leaves by an error, the only way that lets Tune start it
    again. A place that the nodes do not hold rests until others have joined. While ``draining``, places that
    wait or rest are taken out: starting one takes seconds, only for it to see that it is to stop.
    ``on_given`` is told of trials that begin, and returns references to those that a place does not have;
    ``on_lost`` is told of each death."""

    def __init__(
        self,
        queue: TrialQueue,
        mailbox: Any,
        *,
        draining: Callable[[], bool] = lambda: False,
        on_given: Callable[[list[str]], Mapping[str, Any]] = lambda trials: {},
        on_lost: Callable[[Trial, Lost], None] = lambda place, lost: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._queue, self._mailbox, self._draining = queue, mailbox, draining
        self._on_given, self._on_lost, self._clock = on_given, on_lost, clock
        self._known: set[Trial] = set()
        self._waiting: list[Trial] = []
        self._rest_until: dict[Trial, float] = {}
        self._answered: dict[str, tuple[int, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles schedulers for a restore, which never comes: resuming goes by the files

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial not in self._known:
            self._known.add(trial)
            if self._queue.fits(place_of(trial)):
                self._waiting.append(trial)
            else:
                trial.set_status(Trial.PAUSED)  # Tune has not put it into one of its sets yet
                self._rest_until[trial] = 0.0
            return
        place = place_of(trial)
        self._answered.pop(place, None)
        tune_controller._set_trial_status(trial, Trial.PAUSED)
        tune_controller._resetting_trials.discard(trial)  # it died in it: Tune would start it no more
        if self._queue.rested(place):
            self._rest_until[trial] = 0.0
            # Else it would count among `max_concurrent`, and those that it waits for would not be made.
            tune_controller.search_alg.on_trial_complete(trial.trial_id)
            return
        lost = self._queue.left_behind(place) if self._draining() else self._queue.lost(place)
        self._rest_until[trial] = self._clock() + lost.wait
        self._on_lost(trial, lost)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        place, state = place_of(trial), result.get("state")
        if "number" in result and self._answered.get(place, (0, None))[0] == result["number"]:
            self._send(place)  # the mailbox was lost
        elif state == "room":
            given = [] if self._draining() else self._queue.take(place, result["running"])
            new = self._on_given(given or [])
            rests, last = self._queue.rests(place), self._queue.is_last(place)
            self._answer(place, result, (given, last, rests, new))
        elif state == "running" and self._queue.is_rung(result["trial"], result["outer_step"]):
            asked = result["trial"], result["outer_step"], result["val_score"]
            self._answer(place, result, self._queue.scored(place, *asked))
        elif state in ("distilled", "failed", "drained"):
            self._queue.ended(place, result["trial"], failed=state == "failed")
        return str(TrialScheduler.CONTINUE)

    def _answer(self, place: str, result: dict[str, Any], answer: Any) -> None:
        self._answered[place] = result["number"], answer
        self._send(place)

    def _send(self, place: str) -> None:
        ray.get(self._mailbox.put.remote(place, *self._answered[place]))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        if self._draining():
            tune_controller.search_alg.set_finished()
            for trial in list(tune_controller.get_live_trials()):
                if trial.status in (Trial.PENDING, Trial.PAUSED):
                    _take_out(tune_controller, trial)
            return None
        for trial, until in list(self._rest_until.items()):
            if trial.status != Trial.PAUSED:  # it was stopped meanwhile
                del self._rest_until[trial]
            elif self._queue.is_over(place_of(trial)):
                _take_out(tune_controller, trial)
            elif until <= self._clock() and self._queue.has_work(place_of(trial)):
                del self._rest_until[trial]
                tune_controller._set_trial_status(trial, Trial.PENDING)
                self._waiting.append(trial)
        self._waiting = [trial for trial in self._waiting if trial.status == Trial.PENDING]
        for trial in self._waiting:
            if self._queue.has_work(place_of(trial)):
                return trial
            if self._queue.is_over(place_of(trial)):
                _take_out(tune_controller, trial)
        return None


def _take_out(tune_controller: Any, trial: Trial) -> None:
    """Stop a place that does not run. At the end Tune asks each for its folder, also one that never ran, and
    prints a line on each that never had a result. What Tune has begun to start keeps a process of its request
    in store: it would hold the room of other requests for good."""
    trial.init_local_path()
    trial.run_metadata.last_result = trial.run_metadata.last_result or {"state": "taken out"}
    tune_controller.stop_trial(trial)
    if trial in tune_controller._staged_trials:
        tune_controller._unstage_trial_with_resources(trial)
    tune_controller._resetting_trials.discard(trial)


def place_of(trial: Trial) -> str:
    """The name of a place, which Tune does not change from run to run as it does its own ids."""
    return str(trial.config["place"]["name"])
