"""Overhead per trial and efficiency of a sweep on several nodes: trials that only sleep, packed by Ray Tune.

    python -m ddsweep.launch.ray_cluster --site SITE --folder DIR -- python bench/nodes.py --address {address}

in every task of a Slurm step (or `--address local` on one machine). The trials go through Tune with the
options of `ddsweep run`: workers are reused, Tune's own files are off, and each reports. They only
sleep, so cores do not limit them and what is left is the cost of scheduling.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any


def sleep_bound(slots: int, trials: int, seconds: float, reports: int, address: str) -> dict[str, Any]:
    """Seconds from the call of Tune to its end, and the share of them that ideal packing needs."""
    import ray
    from ray import tune

    from ddsweep.sweep.session import ray_session

    def trial(config: dict[str, Any]) -> None:
        for report in range(reports):
            time.sleep(seconds / reports)
            tune.report({"outer_step": report})

    with (
        ray_session(
            job="bench nodes",
            address=None if address == "local" else address,
            cpus=slots if address == "local" else None,
            gpus=0,
            dashboard=False,
        ) as session,
        tempfile.TemporaryDirectory() as folder,
    ):
        there = int(sum(node.cpus for node in session.nodes))

        @ray.remote(num_cpus=1)
        def warm() -> None:
            import torch  # noqa: F401 - what takes seconds to import is not what is measured

            time.sleep(1)

        ray.get([warm.remote() for _ in range(there)])
        began = time.perf_counter()
        tune.Tuner(
            trial,
            param_space={"number": tune.grid_search(list(range(trials)))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        wall = time.perf_counter() - began
    ideal = -(-trials // there) * seconds
    return {
        "nodes": len(session.nodes),
        "slots": there,
        "trials": trials,
        "seconds_each": seconds,
        "wall_s": round(wall, 2),
        "ideal_s": round(ideal, 2),
        "efficiency": round(ideal / wall, 3),
        "overhead_per_trial_s": round((wall - ideal) * there / trials, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", default="local", help="of a Ray cluster, or local")
    parser.add_argument("--slots", type=int, default=2, help="CPUs of a local Ray")
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each trial sleeps")
    parser.add_argument("--reports", type=int, default=5, help="of each trial")
    asked = parser.parse_args()
    found = sleep_bound(asked.slots, asked.trials, asked.seconds, asked.reports, asked.address)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
