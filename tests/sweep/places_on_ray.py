"""Places on a real Ray with one CPU, whose trials take no time: ``python -m tests.sweep.places_on_ray WHAT``.

``requests``: two shapes with unlike requests, of which the first has a place too many. ``seeds``: two seeds
of two settings, each in a place of its own, one at a time. Prints the trials that were distilled.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from typing import Any

import ray
from ray import tune
from ray.tune.trainable.function_trainable import wrap_function

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.spec import AshaSpec
from ddsweep.sweep.halving import Halving
from ddsweep.sweep.mailbox import Mailbox
from ddsweep.sweep.places import Places, place_of
from ddsweep.sweep.queue import PlannedPlace, TrialQueue
from ddsweep.sweep.retry import RetryPolicy


def main(what: str) -> None:
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AIR_NEW_OUTPUT="0", TUNE_MAX_PENDING_TRIALS_PG="200")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(num_cpus=1, object_store_memory=100 * 2**20, **options)
    mailbox = ray.remote(Mailbox).options(num_cpus=0).remote()
    halving, most = None, None
    if what == "seeds":
        settings = [0.1, 0.2]
        trials = [
            TrialSpec(DATASETS["digits"], outer_lr=rate, outer_steps=60, seed=seed)
            for rate in settings
            for seed in (0, 1)
        ]
        halving, most = Halving(AshaSpec(grace=10, reduction=2), trials), 1
        places = [PlannedPlace(trial.trial_id, (trial.trial_id,), 1, trial.trial_id) for trial in trials]
    else:
        places = [
            *(PlannedPlace("x1", ("a",), 1, "X"), PlannedPlace("x2", ("b",), 1, "X")),
            PlannedPlace("y1", ("y",), 1, "Y"),
        ]
    requests = {place.name: {"CPU": 1, "memory": 10**6 * (1 + (place.shape == "Y"))} for place in places}
    queue = TrialQueue(places, RetryPolicy(3), halving=halving, most=most)

    def work(config: dict[str, Any]) -> None:
        name, number = config["place"]["name"], 0

        def ask(question: dict[str, Any]) -> Any:
            nonlocal number
            number += 1
            while True:
                tune.report({**question, "number": number})
                if (found := ray.get(mailbox.take.remote(name, number))) is not None:
                    return found[1]

        while True:
            given, last, rests, _ = ask({"state": "room", "running": 0})
            if rests:
                raise RuntimeError("rests")
            for trial in given or ():
                asked = {"state": "running", "trial": trial, "outer_step": 10, "val_score": 0.5}
                if halving is None or ask(asked):
                    tune.report({"state": "distilled", "trial": trial})
            if last or given == []:
                return
            time.sleep(0.2)

    class Distil(wrap_function(work)):  # type: ignore[misc]
        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
            return tune.PlacementGroupFactory([requests[config["place"]["name"]]])

    class Said(tune.Callback):
        def __getstate__(self) -> dict[str, Any]:
            return {}

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **more: Any) -> None:
            if result.get("state") == "distilled":
                print("distilled:", result["trial"], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        tune.Tuner(
            Distil,
            param_space={"place": tune.grid_search([{"name": place.name} for place in places])},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=most,
                reuse_actors=halving is None,
                scheduler=Places(queue, mailbox),
                trial_name_creator=place_of,
                trial_dirname_creator=place_of,
            ),
            run_config=tune.RunConfig(
                name="places",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=-1),
                callbacks=[Said()],
            ),
        ).fit()


if __name__ == "__main__":
    main(sys.argv[1])
