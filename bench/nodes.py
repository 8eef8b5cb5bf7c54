"""What scheduling costs: trials that only sleep, or compute, packed by Ray Tune on the CPUs of a cluster.

    python bench/nodes.py --slots 2 --trials 8 --steps 10
    python -m ddsweep.launch.ray_cluster --site SITE --folder DIR -- python bench/nodes.py --address {address}

the second in every task of a Slurm step. The trials go through Tune as those of `ddsweep run` do: workers
are used again, and each reports. Those that sleep are not limited by cores, so what they take beyond the
sleep is scheduling; those that compute are compared with as many bare processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from baseline import positive

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.packing import warm_step
from ddsweep.trial_plan import TrialSettings

Part = Callable[[], object]
"""What a trial does between two reports."""


@cache
def _trial() -> Callable[[], None]:
    spec = TrialSpec(DATASETS["digits"], images_per_class=2, inner_steps=2, models_per_step=2, real_batch=256)
    return warm_step(spec, TrialSettings(device="cpu"))


def _compute(steps: int) -> None:
    for _ in range(steps):
        _trial()()


def _bare(trials: int, slots: int, steps: int) -> float:
    """Seconds for the same work in one process a slot, without any scheduling."""
    with multiprocessing.get_context("spawn").Pool(slots) as pool:
        pool.map(_compute, [1] * slots * 2, chunksize=1)  # warm
        began = time.perf_counter()
        pool.map(_compute, [steps] * trials, chunksize=1)
        return time.perf_counter() - began


def measure(part: Part, reports: int, slots: int, trials: int, address: str) -> dict[str, Any]:
    """Seconds from the call of Tune to its end, on how many nodes and CPUs."""
    import ray
    from ray import tune

    from ddsweep.sweep.drain import Drain
    from ddsweep.sweep.session import ray_session

    def trial(config: dict[str, Any]) -> None:
        for report in range(reports):
            part()
            tune.report({"outer_step": report})

    own = address == "local"
    session = ray_session(
        Drain(),
        job="bench nodes",
        address=None if own else address,
        cpus=slots if own else None,
        gpus=0,
        dashboard=False,
    )
    with session as cluster, tempfile.TemporaryDirectory() as folder:
        there = int(sum(node.cpus for node in cluster.nodes))

        @ray.remote(num_cpus=1)
        def warm() -> None:
            time.sleep(1)  # so that each slot gets one

        ray.get([warm.remote() for _ in range(there)])
        began = time.perf_counter()
        tune.Tuner(
            trial,
            param_space={"number": tune.grid_search(list(range(trials)))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        return {"nodes": len(cluster.nodes), "slots": there, "wall_s": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", default="local", help="of a Ray cluster, or local")
    parser.add_argument("--slots", type=positive, default=2, help="CPUs of a local Ray")
    parser.add_argument("--trials", type=positive, default=48)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each trial sleeps")
    parser.add_argument(
        "--steps", type=positive, help="outer steps that each takes instead; needs --address local"
    )
    parser.add_argument("--reports", type=positive, default=5, help="of each trial")
    asked = parser.parse_args()
    if asked.steps and asked.address != "local":
        parser.error("--steps: compared with processes on this machine, so with --address local only")
    if asked.steps:
        steps = -(-asked.steps // asked.reports)
        ideal = _bare(asked.trials, asked.slots, steps * asked.reports)
        part: Part = partial(_compute, steps)
    else:
        part = partial(time.sleep, asked.seconds / asked.reports)
    found = measure(part, asked.reports, asked.slots, asked.trials, asked.address)
    slots, wall = found["slots"], found.pop("wall_s")
    if not asked.steps:
        ideal = -(-asked.trials // slots) * asked.seconds
    found |= {
        "trials": asked.trials,
        "wall_s": round(wall, 2),
        "ideal_s": round(ideal, 2),
        "efficiency": round(ideal / wall, 3),
        "overhead_per_trial_s": round((wall - ideal) * slots / asked.trials, 3),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
