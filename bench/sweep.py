"""Trials per hour of a sweep: cohorts against one process per trial, in turn.

    python bench/sweep.py [CASE ...] [--steps N] [--repeats N] [--draws] [--quick]

Each case is the trials of a real sweep, with fewer outer steps. They are dealt out to as many processes as
there are cores (or, on a GPU, to one), each with one thread. Every process takes its trials one after another
(the baseline: one process per trial at its best packing, without the seconds that starting a process takes),
or together in cohorts. Both ways end with the same bits, which is checked on the CPU. With `--evaluate` the
sets are evaluated too, and the totals compared. No Ray. With `--draws` both sides are cohorts: networks and
real images drawn at the step that uses them, against one step ahead in threads (a plan's `ahead`).

`digits_search` is `sweeps/digits_rates.yaml`: 32 trials of two shapes, which ASHA stops early. Its processes
ask one queue, that of a sweep on Ray. Which trials are stopped depends on the order in which they run, so the
gain for each outer step stands beside, and bits are compared of the trials that both ways distil. Nothing is
evaluated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import torch

from ddsweep.catalog import DATASETS, EvaluationSpec, TrialSpec
from ddsweep.cohorts import cohort_sizes, dealt_out, split_evenly
from ddsweep.data.files import data_root, resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DivergedError, UserError
from ddsweep.evaluation import evaluate_unit
from ddsweep.provenance import device_name
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import SweepSpec, expand, load_sweep
from ddsweep.sweep.halving import Halving
from ddsweep.sweep.queue import PlannedPlace, TrialQueue
from ddsweep.sweep.retry import RetryPolicy
from ddsweep.trial import Progress, TrialJob, distil_together, is_distilled, read_distilled, running
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
    "digits_windows": (DIGITS | {"init": "fixed", "inner_epochs": 30, "window": 10}, 32, 10),
    "digits_augmented": (
        DIGITS | {"init": "fixed", "inner_epochs": 10, "inner_augment": "shift+rotate"},
        32,
        10,
    ),
    "mnist_fixed": (LENET | FIXED, 16, 30),
    "mnist_random": (LENET | RANDOM | {"clip_norm": 0.1, "ema": 0.98, "validate_every": 100}, 8, 2),
}
"""Shapes of `quickstart`, of `mnist_fixed_short` with 16 rates, and of `mnist_random_short` with 8 seeds."""

SEARCH = "digits_search"
SEARCH_FILE = Path(__file__).resolve().parents[1] / "sweeps" / "digits_rates.yaml"
ASK_EVERY_S = 0.2


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


def work(
    values: Any,
    folder: str,
    size: int,
    device: str,
    evaluate: int,
    ahead: bool | None,
    barrier: Any,
    out: Any,
) -> None:
    """One process: once all are warm, its trials."""
    if ahead is not None:
        first_plan = running.first_plan
        running.first_plan = lambda *given: replace(first_plan(*given), ahead=ahead)  # type: ignore[assignment]
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


def once(
    specs: list[TrialSpec],
    size: int,
    processes: int,
    device: str,
    evaluate: int,
    ahead: bool | None = None,
) -> dict[str, Any]:
    """Distil all ``specs``, with ``processes`` side by side: seconds until the last one is done."""
    context = multiprocessing.get_context("spawn")
    shares = split_evenly(len(specs), -(-len(specs) // processes))
    with tempfile.TemporaryDirectory() as folder:
        barrier, out, first, started = context.Barrier(len(shares)), context.Queue(), 0, []
        for count in shares:
            values = [spec.to_dict() for spec in specs[first : first + count]]
            first += count
            given = (values, folder, min(size, count), device, evaluate, ahead, barrier, out)
            started.append(context.Process(target=work, args=given))
            started[-1].start()
        found = [out.get() for _ in started]
        for process in started:
            process.join()
        directory = SweepDirectory(Path(folder))
        hashes = [read_distilled(spec, directory).sha256 for spec in specs]
    assert not sum(failed for _, _, failed in found), "a trial failed"
    return {
        "distilling": max(seconds for seconds, _, _ in found),
        "total": max(total for _, total, _ in found),
        "hashes": hashes,
    }


# ------------------------------------------------------------------------------ a search with ASHA


def searched(
    steps: int | None, count: int | None, cohort: int | str = "auto", device: str = "cpu"
) -> tuple[SweepSpec, tuple[TrialSpec, ...]]:
    """The sweep of the search and its trials; with other outer steps the comparisons move along."""
    given = [
        f"resources.cohort={cohort}",
        f"resources.device={device}",
        f"resources.gpus={int(device == 'cuda')}",
    ]
    given += [] if steps is None else [f"outer_steps={steps}", f"scheduler.grace={max(1, steps // 4)}"]
    given += [] if count is None else [f"search.samples={max(2, count // 2)}"]
    sweep = load_sweep(SEARCH_FILE, given)
    return sweep, expand(sweep, lambda value: resolve_dataset(value, None)).trials


class Shared:
    """The queue of the trials in a process of its own, for the processes that distil them."""

    def __init__(self, processes: int, *asked: Any) -> None:
        sweep, trials = searched(*asked)
        assert sweep.scheduler is not None
        self._steps = {trial.trial_id: trial.outer_steps for trial in trials}
        self._taken: dict[str, int] = {}
        places = [
            PlannedPlace(ids[0], ids, one.size, one.shape)
            for one in dealt_out(trials, sweep.resources, processes)
            for ids in [tuple(trial.trial_id for trial in one.trials)]
        ]
        self._waiting = {place.name: place.size for place in places}
        self._queue = TrialQueue(places, RetryPolicy(0), halving=Halving(sweep.scheduler, trials))
        self._lock = threading.Lock()

    def place(self) -> tuple[str, int] | None:
        """The next place to run, with its size, as Tune starts them; no name: ask again. None at the end."""
        with self._lock:
            for name in list(self._waiting):
                if self._queue.has_work(name):
                    return name, self._waiting.pop(name)
                if self._queue.is_over(name):
                    del self._waiting[name]
            return ("", 0) if self._waiting else None

    def take(self, name: str, running: int) -> list[str]:
        with self._lock:
            return self._queue.take(name, running) or []

    def scored(self, name: str, trial: str, rung: int, score: float) -> bool:
        with self._lock:
            self._taken[trial] = rung
            return self._queue.scored(name, trial, rung, score)

    def ended(self, name: str, trial: str, failed: bool) -> None:
        with self._lock:
            self._taken[trial] = self._steps[trial]
            self._queue.ended(name, trial, failed=failed)

    def taken(self) -> int:
        """Outer steps, of all trials together."""
        return sum(self._taken.values())


class Manager(BaseManager):
    """Starts the process of a `Shared`."""


Manager.register("Shared", Shared)


@dataclass
class Place:
    """The companions of one place of the queue."""

    queue: Any
    name: str
    size: int
    jobs: dict[str, TrialJob]
    asked: float = -1e9
    failed: int = 0

    def more(self, running: int) -> Sequence[TrialJob]:
        if running == self.size or (running and time.monotonic() - self.asked < ASK_EVERY_S):
            return []
        self.asked = time.monotonic()
        return [self.jobs[trial] for trial in self.queue.take(self.name, running)]

    def should_stop(self) -> bool:
        return False

    def progress(self, spec: TrialSpec, progress: Progress) -> bool:
        if not progress.rung:
            return True
        goes_on: bool = self.queue.scored(self.name, spec.trial_id, progress.outer_step, progress.val_score)
        self.asked = self.asked if goes_on else -1e9
        return goes_on

    def ended(self, spec: TrialSpec, outcome: bool | DivergedError | UserError) -> None:
        self.asked = -1e9
        self.failed += outcome is not True
        self.queue.ended(self.name, spec.trial_id, outcome is not True)


def search(values: Any, rungs: Any, folder: str, queue: Any, given: Any, barrier: Any, out: Any) -> None:
    """One process: once all are warm, the trials that the queue gives it. ``given`` are settings of all."""
    specs = [TrialSpec.from_dict(value) for value in values]
    splits, root = splits_of(specs[0]), Path(folder)
    settings = TrialSettings(log_every=50, checkpoint_every=50, **given)
    for count in {spec.images_per_class: spec for spec in specs}.values():
        warm = replace(count, seed=1000 + os.getpid(), outer_steps=1)
        distil_together(Given([TrialJob(warm, splits, SweepDirectory(root / "warm"), settings)], 1))
    jobs = {
        spec.trial_id: TrialJob(spec, splits, SweepDirectory(root), replace(settings, rungs=own))
        for spec, own in zip(specs, rungs, strict=True)
    }
    barrier.wait()
    began, failed = time.perf_counter(), 0
    while (found := queue.place()) is not None:
        name, size = found
        if not name:
            time.sleep(ASK_EVERY_S)
            continue
        place = Place(queue, name, size, jobs)
        distil_together(place)
        failed += place.failed
    out.put((time.perf_counter() - began, failed))


def search_once(
    steps: int | None, count: int | None, cohort: int | str, processes: int, device: str
) -> dict[str, Any]:
    """All trials of the search: seconds until the last one is done, and the hashes of those distilled."""
    context = multiprocessing.get_context("spawn")
    asked = (steps, count, cohort, device)
    sweep, trials = searched(*asked)
    assert sweep.scheduler is not None
    size = max(one.size for one in dealt_out(trials, sweep.resources, processes))
    settings = {"device": device, "gpus": float(device == "cuda"), "cohort": size}
    values, rungs = [t.to_dict() for t in trials], [sweep.scheduler.rungs(t) for t in trials]
    with tempfile.TemporaryDirectory() as folder, Manager(ctx=context) as manager:
        queue = manager.Shared(processes, *asked)  # type: ignore[attr-defined]
        barrier, out, running = context.Barrier(processes), context.Queue(), []
        for _ in range(processes):
            given = (values, rungs, folder, queue, settings, barrier, out)
            running.append(context.Process(target=search, args=given))
            running[-1].start()
        found = [out.get() for _ in running]
        for process in running:
            process.join()
        directory, taken = SweepDirectory(Path(folder)), queue.taken()
        hashes = {
            trial.trial_id: read_distilled(trial, directory).sha256
            for trial in trials
            if is_distilled(trial, directory)
        }
    assert not sum(failed for _, failed in found), "a trial failed"
    return {"distilling": max(seconds for seconds, _ in found), "steps": taken, "hashes": hashes}


def compare_search(options: argparse.Namespace, processes: int) -> bool:
    """Print the row of the search. Returns whether the trials that both ways distilled have equal bits."""
    hours: dict[str, list[float]] = {"alone": [], "cohorts": []}
    steps: dict[str, list[int]] = {"alone": [], "cohorts": []}
    time_, step, equal, count = [], [], True, len(searched(options.steps, options.trials)[1])
    for repeat in range(options.repeats):
        ways: list[tuple[str, int | str]] = [("alone", 1), ("cohorts", options.cohort or "auto")]
        found = {
            way: search_once(options.steps, options.trials, own, processes, options.device)
            for way, own in (ways if repeat % 2 == 0 else ways[::-1])
        }
        alone, cohorts = found["alone"], found["cohorts"]
        both = alone["hashes"].keys() & cohorts["hashes"].keys()
        same = all(alone["hashes"][trial] == cohorts["hashes"][trial] for trial in both)
        equal &= options.device == "cuda" or same
        time_.append(alone["distilling"] / cohorts["distilling"])
        step.append(time_[-1] * cohorts["steps"] / alone["steps"])
        for way, one in found.items():
            hours[way].append(count * 3600 / one["distilling"])
            steps[way].append(one["steps"])
    said = {"case": SEARCH, "trials": count, "distilling": ratios(time_), "an outer step": ratios(step)}
    said |= {f"{way} per hour": round(statistics.median(own)) for way, own in hours.items()}
    said |= {f"{way} outer steps": round(statistics.median(own)) for way, own in steps.items()}
    print(json.dumps(said), flush=True)
    return equal


def ratios(found: list[float]) -> str:
    return f"{statistics.median(found):.2f}x ({min(found):.2f} .. {max(found):.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [*CASES, SEARCH]
    parser.add_argument("cases", nargs="*", default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--steps", type=int, help="outer steps of each trial; by default those of the case")
    parser.add_argument("--trials", type=int, help="number of trials; by default that of the case")
    parser.add_argument(
        "--cohort", type=int, help="most trials together; by default as resources.cohort: auto"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--evaluate", type=int, default=0, metavar="N", help="held-out networks for each set")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, help="by default the cores, or 1 on a GPU")
    parser.add_argument("--draws", action="store_true", help="cohorts that draw ahead, against others")
    parser.add_argument("--quick", action="store_true", help="few steps of few trials, once")
    options = parser.parse_args(argv)
    if unknown := [case for case in options.cases if case not in names]:
        parser.error(f"{', '.join(unknown)}: cases are {', '.join(names)}")
    on_gpu = options.device == "cuda"
    processes = options.processes or (1 if on_gpu else len(os.sched_getaffinity(0)))
    if options.quick:
        options.steps, options.trials, options.repeats = 2, 4, 1
    print(f"{device_name(options.device)}, torch {torch.__version__}, {processes} processes of one thread")
    equal = True
    try:
        for case in options.cases:  # before any process waits for others
            if case != SEARCH:
                splits_of(specs_of(case, 1, 1)[0])
    except UserError as error:
        parser.error(str(error))
    for case in options.cases:
        if case == SEARCH:
            equal &= compare_search(options, processes)
            continue
        specs = specs_of(case, options.steps, options.trials)
        rule = cohort_sizes(specs, options.cohort or "auto", gpus=[1.0 if on_gpu else 0.0] * len(specs))
        size = min(rule[specs[0].trial_id], -(-len(specs) // processes))
        rows: dict[str, list[float]] = {"distilling": [], "total": []}
        ways = [("alone", 1, None), ("cohorts", size, None)]
        if options.draws:
            ways = [("drawn at the step", size, False), ("drawn ahead", size, True)]
        one, other = (way for way, _, _ in ways)
        hours: dict[str, list[float]] = {one: [], other: []}
        for repeat in range(options.repeats):
            found = {
                way: once(specs, own, processes, options.device, options.evaluate, ahead)
                for way, own, ahead in (ways if repeat % 2 == 0 else ways[::-1])
            }
            equal &= on_gpu or found[one]["hashes"] == found[other]["hashes"]
            for name, values in rows.items():
                values.append(found[one][name] / found[other][name])
            for way, values in hours.items():
                values.append(len(specs) * 3600 / found[way]["distilling"])
        said = {"case": case, "trials": len(specs), "steps": specs[0].outer_steps, "cohort": size}
        said |= {name: ratios(own) for name, own in rows.items()}
        said |= {f"{way} per hour": round(statistics.median(own)) for way, own in hours.items()}
        if not options.evaluate:
            del said["total"]
        print(json.dumps(said), flush=True)
    print("equal bits" if equal else "the bits differ")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
