"""A sweep as a job array, without Ray: each element takes its share, in as many processes as its node holds.

Elements share the sweep's lock. Which trials an element distils is written down when the array is
submitted; which units it evaluates follows from their numbers. Both are read off the files again at each
start, so that an element that was requeued, or a second launch, does only what is missing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ddsweep.catalog import TrialSpec
from ddsweep.data.files import data_root, resolve_dataset
from ddsweep.errors import DivergedError, UserError
from ddsweep.evaluation import evaluate_unit, finish, forget_stop, missing_units, trial_is_done
from ddsweep.launch.crew import Crew
from ddsweep.launch.folder import Launch, LaunchFolder, read_json
from ddsweep.launch.processes import Signals
from ddsweep.launch.ray_cluster import DRAINED, NodeLimits, Place, node_limits
from ddsweep.pools.file import resolve_pool
from ddsweep.results.lock import SweepLock
from ddsweep.spec import Plan, SweepSpec, expand, is_smoke, load_sweep
from ddsweep.sweep.prepare import eval_gpus, load_all_splits, splits_key, trial_settings
from ddsweep.trial import distil_trial, is_distilled, pick_device, record_failure

__all__ = ["deal", "distil_share", "evaluate_share", "finish_all"]


def deal(trials: Sequence[TrialSpec], seconds: Mapping[str, float], elements: int) -> list[list[str]]:
    """Disjoint shares of about the same cost: the dearest trial first, each to who has least."""
    shares: list[list[str]] = [[] for _ in range(min(elements, len(trials)))]
    cost = [0.0] * len(shares)
    for trial in sorted(trials, key=lambda trial: -seconds[trial.trial_id]):
        least = cost.index(min(cost))
        shares[least].append(trial.trial_id)
        cost[least] += seconds[trial.trial_id]
    return shares


# ------------------------------------------------------------------------------------- the elements


@dataclass(frozen=True)
class _Work:
    """The sweep of a launch, as each process reads it from the folder."""

    folder: LaunchFolder
    launch: Launch
    sweep: SweepSpec
    plan: Plan
    data_root: Path | None


@cache
def _work(folder: str) -> _Work:
    place = LaunchFolder(Path(folder))
    launch = Launch.read(place)
    sweep = load_sweep(place.sweep_file)
    root = data_root(Path(launch.data_root) if launch.data_root else None)

    def dataset(value: Any) -> Any:
        return resolve_dataset(value, root, stand_in=is_smoke(sweep.name))

    plan = expand(sweep, dataset, lambda value: resolve_pool(value, launch.directory.pools, dataset))
    return _Work(place, launch, sweep, plan, root)


def distil_share(folder: LaunchFolder, launch: Launch, index: int, place: Place, signals: Signals) -> int:
    """Distil the trials of element ``index`` that are missing. 0 all distilled, 2 some failed, 75 drained."""
    work, directory = _work(str(folder.root)), launch.directory
    shares = (read_json(folder.shares) or {}).get("trials", [])
    mine = set(shares[index])
    trials = [trial for trial in work.plan.trials if trial.trial_id in mine]
    with SweepLock(directory.lock, launch=folder.name):
        todo = [trial for trial in trials if not is_distilled(trial, directory)]
        for trial in todo:
            directory.failure_part(trial.trial_id).unlink(missing_ok=True)
            forget_stop(trial, directory)  # there is no scheduler any more: it goes on
        if not todo:
            return 0
        needs = [work.sweep.resources.for_trial(trial) for trial in todo]
        crew = Crew(
            folder,
            f"trials-{index}",
            signals,
            _limits(launch),
            cpus=max(cpus for cpus, _ in needs),
            gpus=max(gpus for _, gpus in needs),
            attempts=work.sweep.resources.max_failures + 1,
        )

        def broken(trial_id: str, error: Exception, attempts: int) -> None:
            spec = next(trial for trial in todo if trial.trial_id == trial_id)
            record_failure(directory, spec, work.sweep.name, error, "worker", attempts)

        return crew.run(_distil, [(trial.trial_id,) for trial in todo], broken)


def evaluate_share(folder: LaunchFolder, launch: Launch, index: int, place: Place, signals: Signals) -> int:
    """Evaluate element ``index``'s part of all units of the distilled trials, and finish what is whole."""
    work, directory = _work(str(folder.root)), launch.directory
    evaluation = work.sweep.evaluate.spec()
    elements = int((read_json(folder.shares) or {}).get("evals", 1))
    with SweepLock(directory.lock, launch=folder.name):
        mine, number = [], 0
        for trial in work.plan.trials:
            units = evaluation.units(trial)
            if is_distilled(trial, directory) and not trial_is_done(trial, evaluation, directory):
                missing = missing_units(trial, evaluation, directory)
                mine += [
                    (trial.trial_id, n)
                    for n, unit in enumerate(units)
                    if unit in missing and (number + n) % elements == index
                ]
            number += len(units)
        largest = max(work.sweep.resources.for_trial(trial)[1] for trial in work.plan.trials)
        crew = Crew(
            folder,
            f"evals-{index}",
            signals,
            _limits(launch),
            cpus=1,
            gpus=eval_gpus(work.sweep, largest),
            attempts=work.sweep.resources.max_failures + 1,
        )

        def broken(trial_id: str, error: Exception, attempts: int) -> None:
            spec = next(trial for trial in work.plan.trials if trial.trial_id == trial_id)
            record_failure(directory, spec, work.sweep.name, error, "evaluation", attempts)

        code = crew.run(_evaluate, mine, broken) if mine else 0
        _finish(work)
        return code


def finish_all(folder: LaunchFolder, launch: Launch) -> int:
    """Finish every trial that is evaluated in full, and say how the sweep stands."""
    work, directory = _work(str(folder.root)), launch.directory
    with SweepLock(directory.lock, launch=folder.name):
        done = _finish(work)
    failed = sum(
        directory.failure_part(trial.trial_id).exists()
        for trial in work.plan.trials
        if trial.trial_id not in done
    )
    left = len(work.plan.trials) - len(done) - failed
    print(f"{len(done)} trials done, {failed} failed, {left} left: {directory.root}", flush=True)
    if left:
        return DRAINED
    return 2 if failed else 0


def _finish(work: _Work) -> set[str]:
    evaluation, directory = work.sweep.evaluate.spec(), work.launch.directory
    done = set()
    for trial in work.plan.trials:
        if trial_is_done(trial, evaluation, directory) or (
            is_distilled(trial, directory) and finish(trial, evaluation, directory, work.sweep.name)
        ):
            done.add(trial.trial_id)
    return done


def _limits(launch: Launch) -> NodeLimits:
    local = launch.site["scheduler"] == "local"
    return node_limits(os.environ, launch.site["cpus_per_node"] if local else None)


# ------------------------------------------------------------------- in the processes of one element


@cache
def _splits(folder: str, key: str) -> Any:
    work = _work(folder)
    of_key = [trial for trial in work.plan.trials if splits_key(trial) == key][:1]
    return load_all_splits(of_key, work.data_root, stand_in=is_smoke(work.sweep.name))[key]


def _distil(folder: str, stop_file: str, trial_id: str) -> str:
    work = _work(folder)
    directory = work.launch.directory
    spec = next(trial for trial in work.plan.trials if trial.trial_id == trial_id)

    def should_stop() -> bool:
        return Path(stop_file).exists()

    try:
        settings = trial_settings(work.sweep, spec)
        splits = _splits(folder, splits_key(spec))
        if should_stop():
            return "drained"
        begun = time.monotonic()
        whole = distil_trial(spec, splits, directory, settings, should_stop=should_stop)
    except (DivergedError, UserError) as error:
        record_failure(directory, spec, work.sweep.name, error, "distillation", 1)
        print(f"{trial_id}: {error}", file=sys.stderr, flush=True)
        return "failed"
    return f"distilled in {time.monotonic() - begun:.1f} s" if whole else "drained"


def _evaluate(folder: str, stop_file: str, trial_id: str, number: int) -> str:
    if Path(stop_file).exists():
        return "drained"
    work = _work(folder)
    spec = next(trial for trial in work.plan.trials if trial.trial_id == trial_id)
    evaluation = work.sweep.evaluate.spec()
    largest = max(work.sweep.resources.for_trial(trial)[1] for trial in work.plan.trials)
    device = pick_device(work.sweep.resources.device, eval_gpus(work.sweep, largest))
    unit, splits = evaluation.units(spec)[number], _splits(folder, splits_key(spec))
    evaluate_unit(spec, unit, evaluation, splits, work.launch.directory, device)
    return "evaluated"
