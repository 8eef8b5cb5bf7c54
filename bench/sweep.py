"""Trials per hour of a sweep: cohorts against one process per trial, in turn.

    python bench/sweep.py [CASE ...] [--steps N] [--repeats N] [--quick]

Each case is the trials of a real sweep, with fewer outer steps. They are dealt out to as many processes as
there are cores (or, on a GPU, to one), each with one thread. Every process takes its trials one after another
(the baseline: one process per trial at its best packing, without the seconds that starting a process takes),
or together in cohorts. Both ways end with the same bits, which is checked on the CPU. With `--evaluate` the
sets are evaluated too, and the totals compared. No Ray.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddsweep.catalog import DATASETS, EvaluationSpec, TrialSpec
from ddsweep.cohorts import cohort_sizes, split_evenly
from ddsweep.data.files import data_root
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DivergedError, UserError
from ddsweep.evaluation import evaluate_unit
from ddsweep.provenance import device_name
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial import Progress, TrialJob, distil_together, read_distilled
from ddsweep.trial_plan import TrialSettings

DIGITS = {"dataset": "digits", "network": "convnet(width=16)", "image_init": "real", "inner_lr": 1.0}
DIGITS |= {"outer_lr": 0.05, "real_batch": 256, "inner_epochs": 3, "validate_every": 40}
LENET = {"dataset": "mnist", "network": "lenet", "real_batch": 256}
FIXED = {"init": "fixed", "inner_epochs": 3, "inner_lr": 0.1, "clip_norm": 0.2, "validate_every": 300}
RANDOM = {"images_per_class": 10, "inner_steps": 10, "inner_epochs": 3, "models_per_step": 8, "trim": 0.25}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    # settings, trials, outer steps
    "digits_fixed": (DIGITS | {"init": "fixed"}, 32, 40),
    "digits_fixed_4": (DIGITS | {"init": "fixed", "images_per_class": 4, "inner_steps": 4}, 32, 20),
    "digits_random": (DIGITS | {"models_per_step": 2}, 32, 20),
    "mnist_fixed": (LENET | FIXED, 16, 30),
    "mnist_random": (LENET | RANDOM | {"clip_norm": 0.1, "ema": 0.98, "validate_every": 100}, 8, 2),
}
"""Shapes of `quickstart`, of `mnist_fixed_short` with 16 rates, and of `mnist_random_short` with 8 seeds."""


@dataclass
class Given:
    """The trials of one process, all at once."""

    jobs: list[TrialJob]
    size: int
    failed: int = 0

    def more(self, running: int) -> Sequence[TrialJob]:
        given, self.jobs = self.jobs[: self.size - running], self.jobs[self.size - running :]
        return given

    def should_stop(self) -> bool:
        return False

    def progress(self, spec: TrialSpec, progress: Progress) -> bool:
        return True

    def ended(self, spec: TrialSpec, outcome: bool | DivergedError | UserError) -> None:
        self.failed += outcome is not True


def specs_of(case: str, steps: int | None, count: int | None) -> list[TrialSpec]:
    settings, trials, outer_steps = CASES[case]
    settings = dict(settings)
    data, rate = DATASETS[settings.pop("dataset")], settings.pop("outer_lr", 0.02)
    settings |= {"outer_schedule": "cosine", "outer_steps": steps or outer_steps}
    return [TrialSpec(data, outer_lr=rate * (1 + n / 16), seed=n, **settings) for n in range(count or trials)]


def splits_of(spec: TrialSpec) -> Splits:
    return load_splits(
        spec.dataset, data_root(None), validation_fraction=spec.validation_fraction, split_seed=0
    )


def work(values: Any, folder: str, size: int, device: str, evaluate: int, barrier: Any, out: Any) -> None:
    """One process: once all are warm, its trials."""
    specs = [TrialSpec.from_dict(value) for value in values]
    gpus = float(device == "cuda")
    settings = TrialSettings(device=device, gpus=gpus, log_every=50, checkpoint_every=50, cohort=size)
    splits, root = splits_of(specs[0]), Path(folder)
    warm = [replace(spec, seed=1000 + n, outer_steps=1) for n, spec in enumerate(specs[:size])]
    distil_together(
        Given([TrialJob(spec, splits, SweepDirectory(root / "warm"), settings) for spec in warm], size)
    )
    barrier.wait()
    given = Given([TrialJob(spec, splits, SweepDirectory(root), settings) for spec in specs], size)
    began = time.perf_counter()
    distil_together(given)
    distilled = time.perf_counter() - began
    if evaluate:
        evaluation = EvaluationSpec(networks=evaluate, group_size=16, baselines=())
        for spec in specs:
            for unit in evaluation.units(spec):
                evaluate_unit(spec, unit, evaluation, splits, SweepDirectory(root), torch.device(device))
    out.put((distilled, time.perf_counter() - began, given.failed))


def once(specs: list[TrialSpec], size: int, processes: int, device: str, evaluate: int) -> dict[str, Any]:
    """Distil all ``specs``, with ``processes`` side by side: seconds until the last one is done."""
    context = multiprocessing.get_context("spawn")
    shares = split_evenly(len(specs), -(-len(specs) // processes))
    with tempfile.TemporaryDirectory() as folder:
        barrier, out, first, running = context.Barrier(len(shares)), context.Queue(), 0, []
        for count in shares:
            values = [spec.to_dict() for spec in specs[first : first + count]]
            first += count
            given = (values, folder, min(size, count), device, evaluate, barrier, out)
            running.append(context.Process(target=work, args=given))
            running[-1].start()
        found = [out.get() for _ in running]
        for process in running:
            process.join()
        directory = SweepDirectory(Path(folder))
        hashes = [read_distilled(spec, directory).sha256 for spec in specs]
    assert not sum(failed for _, _, failed in found), "a trial failed"
    return {
        "distilling": max(seconds for seconds, _, _ in found),
        "total": max(total for _, total, _ in found),
        "hashes": hashes,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, help="outer steps of each trial; by default those of the case")
    parser.add_argument("--trials", type=int, help="number of trials; by default that of the case")
    parser.add_argument(
        "--cohort", type=int, help="most trials together; by default as resources.cohort: auto"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--evaluate", type=int, default=0, metavar="N", help="held-out networks for each set")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, help="by default the cores, or 1 on a GPU")
    parser.add_argument("--quick", action="store_true", help="few steps of few trials, once")
    options = parser.parse_args(argv)
    if unknown := [case for case in options.cases if case not in CASES]:
        parser.error(f"{', '.join(unknown)}: cases are {', '.join(CASES)}")
    on_gpu = options.device == "cuda"
    processes = options.processes or (1 if on_gpu else len(os.sched_getaffinity(0)))
    if options.quick:
        options.steps, options.trials, options.repeats = 2, 4, 1
    print(f"{device_name(options.device)}, torch {torch.__version__}, {processes} processes of one thread")
    equal = True
    try:
        for case in options.cases:  # before any process waits for others
            splits_of(specs_of(case, 1, 1)[0])
    except UserError as error:
        parser.error(str(error))
    for case in options.cases:
        specs = specs_of(case, options.steps, options.trials)
        rule = cohort_sizes(specs, options.cohort or "auto", gpus=[1.0] if on_gpu else [0.0])
        size = min(rule[specs[0].trial_id], -(-len(specs) // processes))
        rows: dict[str, list[float]] = {"distilling": [], "total": []}
        hours: dict[str, list[float]] = {"alone": [], "cohorts": []}
        for repeat in range(options.repeats):
            ways = [("alone", 1), ("cohorts", size)]
            found = {
                way: once(specs, own, processes, options.device, options.evaluate)
                for way, own in (ways if repeat % 2 == 0 else ways[::-1])
            }
            equal &= on_gpu or found["alone"]["hashes"] == found["cohorts"]["hashes"]
            for name, values in rows.items():
                values.append(found["alone"][name] / found["cohorts"][name])
            for way, values in hours.items():
                values.append(len(specs) * 3600 / found[way]["distilling"])
        said = {"case": case, "trials": len(specs), "steps": specs[0].outer_steps, "cohort": size}
        said |= {
            name: f"{statistics.median(own):.2f}x ({min(own):.2f} .. {max(own):.2f})"
            for name, own in rows.items()
        }
        said |= {f"{way} per hour": round(statistics.median(own)) for way, own in hours.items()}
        if not options.evaluate:
            del said["total"]
        print(json.dumps(said), flush=True)
    print("equal bits" if equal else "the bits differ")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
