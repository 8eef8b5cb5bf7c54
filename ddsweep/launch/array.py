"""A sweep as a job array, without Ray: each element takes its share, in as many processes as its node holds.

Elements share the sweep's lock. The trials of an element are written down when the array is submitted; the
units that it evaluates follow from their numbers. Each start reads the files again, so a requeued element, or
a second launch, does only what is missing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

from ddsweep.catalog import EvalUnit, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.cohorts import dealt_out
from ddsweep.core.memory import keep_to_share
from ddsweep.data.files import data_root, resolve_dataset
from ddsweep.errors import EXIT_DRAINED, DiskFullError, DivergedError, UserError
from ddsweep.evaluation import evaluate_unit, forget_stop, missing_units, settled, take_over
from ddsweep.launch.allocation import node_limits
from ddsweep.launch.crew import Crew
from ddsweep.launch.folder import Launch, LaunchFolder, read_json
from ddsweep.launch.processes import Signals, time_to_drain
from ddsweep.pools.file import resolve_pool
from ddsweep.results.elsewhere import other_sweeps
from ddsweep.results.files import full_disk_told, is_there
from ddsweep.results.known import KnownParts
from ddsweep.results.lock import LOST, SweepLock
from ddsweep.spec import Plan, SweepSpec, expand, is_smoke, load_sweep
from ddsweep.sweep.first_step import leaving_before_the_first_step
from ddsweep.sweep.prepare import eval_gpus, load_all_splits, splits_key, trial_settings
from ddsweep.sweep.retry import RetryPolicy
from ddsweep.trial import Progress, TrialJob, distil_together, is_distilled, record_failure, saved_steps
from ddsweep.trial_plan import check_gpu_seen, pick_device

__all__ = ["deal", "distil_share", "evaluate_share", "finish_all"]


def deal(trials: Sequence[TrialSpec], seconds: Mapping[str, float], elements: int) -> list[list[str]]:
    """Disjoint shares of about the same cost: the dearest trial first, each to the smallest share."""
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

    @cached_property
    def _by_id(self) -> dict[str, TrialSpec]:
        return {trial.trial_id: trial for trial in self.plan.trials}

    def trial(self, trial_id: str) -> TrialSpec:
        """Raises `UserError` for a trial that the sweep no longer has: its data changed after the launch."""
        if trial_id not in self._by_id:
            raise UserError(
                f"{self.folder.shares}: trial {trial_id} is not in this sweep: its data have changed since "
                "the launch; launch it again"
            )
        return self._by_id[trial_id]

    @property
    def eval_gpus(self) -> float:
        """The part of a GPU that each evaluation asks for."""
        resources = self.sweep.resources
        return eval_gpus(self.sweep, max(resources.for_trial(trial)[1] for trial in self.plan.trials))

    def run(
        self,
        call: Callable[..., str],
        items: Sequence[tuple[Any, ...]],
        *,
        name: str,
        signals: Signals,
        needs: tuple[float, float],
        phase: str,
        apart: Callable[[tuple[Any, ...]], list[tuple[Any, ...]]] = lambda item: [item],
        saved: Callable[[tuple[Any, ...]], int] = lambda item: 0,
    ) -> int:
        """A crew's work on ``items``, each with so many CPUs and GPUs. Lasting failures are recorded in
        ``phase``."""
        if not items:
            return 0
        crew = self.crew(name, signals, needs)

        def broken(trial_id: str, error: Exception, attempts: int) -> None:
            trial = self.trial(trial_id)
            record_failure(self.launch.directory, trial, self.sweep.name, error, phase, attempts)

        return crew.run(call, items, broken, apart, saved)

    def crew(self, name: str, signals: Signals, needs: tuple[float, float]) -> Crew:
        local = self.launch.site["scheduler"] == "local"
        limits = node_limits(os.environ, self.launch.site["cpus_per_node"] if local else None)
        policy = RetryPolicy(self.sweep.resources.max_failures)
        crew = Crew(self.folder, name, signals, limits, cpus=needs[0], gpus=needs[1], policy=policy)
        return replace(crew, drain_s=time_to_drain(self.launch.site["drain"]))


@cache
def _work(folder: str) -> _Work:
    place = LaunchFolder(Path(folder))
    launch = Launch.read(place)
    sweep = load_sweep(place.sweep_file)
    root = data_root(Path(launch.data_root) if launch.data_root else None)

    def dataset(value: Any) -> Any:
        code = launch.directory.code
        return resolve_dataset(value, root, stand_in=is_smoke(sweep.name), may_run=True, code=code)

    plan = expand(sweep, dataset, lambda value: resolve_pool(value, launch.directory.pools, dataset))
    return _Work(place, launch, sweep, plan, root)


def distil_share(folder: LaunchFolder, launch: Launch, index: int, signals: Signals) -> int:
    """Distil the missing trials of element ``index``. 0 all distilled, 2 some failed, 75 drained."""
    work, directory = _work(str(folder.root)), launch.directory
    shares = (read_json(folder.shares) or {}).get("trials", [])
    trials = [work.trial(trial_id) for trial_id in shares[index]]
    with _lock(folder, launch, signals):
        todo = [trial for trial in trials if not is_distilled(trial, directory)]
        for trial in todo:
            directory.failure_part(trial.trial_id).unlink(missing_ok=True)
            forget_stop(trial, directory)  # it goes on, because there is no scheduler any more
        all_needs = [work.sweep.resources.for_trial(trial) for trial in trials]
        needs = max(cpus for cpus, _ in all_needs), max(gpus for _, gpus in all_needs)
        name = f"trials-{index}"
        cohorts = dealt_out(todo, work.sweep.resources, work.crew(name, signals, needs).slots)
        return work.run(
            _distil,
            [tuple(trial.trial_id for trial in cohort.trials) for cohort in cohorts],
            name=name,
            signals=signals,
            needs=needs,
            phase="worker",
            apart=lambda item: [(trial_id,) for trial_id in item],
            saved=lambda item: saved_steps(directory, item[0]),
        )


def evaluate_share(folder: LaunchFolder, launch: Launch, index: int, signals: Signals) -> int:
    """Evaluate element ``index``'s part of all units of the distilled trials, and finish whole trials."""
    work, directory = _work(str(folder.root)), launch.directory
    evaluation = work.sweep.evaluate.spec()
    elements = int((read_json(folder.shares) or {}).get("evals", 1))
    with _lock(folder, launch, signals) as lock:
        mine: list[tuple[Any, ...]] = []
        number, evals = 0, directory.evals_by_trial()
        for trial in work.plan.trials:
            units = {
                (unit.protocol, unit.group, unit.size): n for n, unit in enumerate(evaluation.units(trial))
            }
            if is_distilled(trial, directory):
                for unit in missing_units(trial, evaluation, directory, evals.get(trial.trial_id, [])):
                    key = (unit.protocol, unit.group, unit.size)
                    # All elements count the same units, also networks that exist in groups of another size.
                    place = (
                        number + units[key] if key in units else crc32(repr((trial.trial_id, key)).encode())
                    )
                    if place % elements == index:
                        mine.append((trial.trial_id, *key, unit.indices))
            number += len(units)
        needs = (1, work.eval_gpus)
        code = work.run(
            _evaluate, mine, name=f"evals-{index}", signals=signals, needs=needs, phase="evaluation"
        )
        if not lock.lost:
            _finish(work)
        return code


def _lock(folder: LaunchFolder, launch: Launch, signals: Signals) -> SweepLock:
    """The sweep's lock, shared by the elements of this launch. Who loses it drains."""

    def lost() -> None:
        print(LOST, flush=True)
        signals.stop()

    return SweepLock(launch.directory.lock, launch=folder.name, on_lost=lost)


def finish_all(folder: LaunchFolder, launch: Launch) -> int:
    """Finish every fully evaluated trial, and print the state of the sweep."""
    work, directory = _work(str(folder.root)), launch.directory
    with SweepLock(directory.lock, launch=folder.name):
        done = _finish(work)
    failed = sum(
        directory.failure_part(trial.trial_id).exists()
        for trial in work.plan.trials
        if trial.trial_id not in done
    )
    left = len(work.plan.trials) - len(done) - failed
    print(f"{counted(len(done), 'trial')} done, {failed} failed, {left} left: {directory.root}", flush=True)
    if left:
        return EXIT_DRAINED
    return 2 if failed else 0


def _finish(work: _Work) -> set[str]:
    evaluation, directory = work.sweep.evaluate.spec(), work.launch.directory
    known, evals = KnownParts.load(directory), directory.evals_by_trial()
    done = {
        trial.trial_id
        for trial in work.plan.trials
        if settled(trial, evaluation, directory, work.sweep.name, known, evals.get(trial.trial_id, []))
    }
    known.save(directory)
    return done


# ------------------------------------------------------------------- in the processes of one element


@cache
def _splits(folder: str, key: str) -> Any:
    work = _work(folder)
    of_key = [trial for trial in work.plan.trials if splits_key(trial) == key][:1]
    return load_all_splits(of_key, work.data_root, stand_in=is_smoke(work.sweep.name))[key]


@dataclass
class _Together:
    """The trials of one call, which are distilled together, and the outcome of each."""

    work: _Work
    stop_file: Path
    waiting: list[TrialSpec]
    size: int
    said: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.should_stop = lambda: is_there(self.stop_file)

    def more(self, running: int) -> list[TrialJob]:
        jobs: list[TrialJob] = []
        while self.waiting and not is_there(self.stop_file):
            job = self._job(self.waiting.pop(0))
            if job is not None:
                jobs.append(job)
        return jobs

    def _job(self, spec: TrialSpec) -> TrialJob | None:
        work, directory = self.work, self.work.launch.directory
        try:
            settings = replace(trial_settings(work.sweep, spec), cohort=self.size)
            splits = _splits(str(work.folder.root), splits_key(spec))
            if not is_distilled(spec, directory):
                taken = take_over(spec, splits.fingerprint, directory, other_sweeps(directory))
                if taken:
                    name = taken.source.root.name
                    self.said[spec.trial_id] = f"taken over from sweep {name}, which has finished the same"
                    return None
        except UserError as error:
            self.ended(spec, error)
            return None
        return TrialJob(spec, splits, directory, settings)

    def progress(self, spec: TrialSpec, progress: Progress) -> bool:
        return True

    def ended(self, spec: TrialSpec, outcome: bool | DivergedError | UserError) -> None:
        said = f"distilled in {time.monotonic() - self.began:.1f} s" if outcome is True else "drained"
        if isinstance(outcome, Exception):
            print(f"{spec.trial_id}: {outcome}", file=sys.stderr, flush=True)
            if not (isinstance(outcome, DiskFullError) and is_there(self.stop_file)):
                record_failure(
                    self.work.launch.directory, spec, self.work.sweep.name, outcome, "distillation", 1
                )
                said = "failed"
        self.said[spec.trial_id] = said


def _distil(folder: str, stop_file: str, *trial_ids: str) -> str:
    """Distil trials of one shape together. Returns their outcomes in one line, which begins with ``failed``
    if one of them failed."""
    work = _work(folder)
    trials = [work.trial(trial_id) for trial_id in trial_ids]
    resources = work.sweep.resources
    check_gpu_seen(resources.device, resources.for_trial(trials[0])[1], f"trial {trial_ids[0]}")
    together = _Together(work, Path(stop_file), trials, len(trials))
    with (
        full_disk_told(work.launch.directory.root),
        leaving_before_the_first_step(lambda: is_there(together.stop_file)) as should_stop_at_step,
    ):
        together.should_stop = should_stop_at_step
        distil_together(together)
    said = [together.said.get(trial_id, "drained") for trial_id in trial_ids]
    failed = said.count("failed")
    return f"failed: {failed} of {len(said)}" if failed and said[1:] else ", ".join(dict.fromkeys(said))


@cache
def _share(device: str, gpus: float) -> None:
    """Called once in a process, which only evaluates: a second call would drop its recordings."""
    keep_to_share(device, gpus)


def _evaluate(
    folder: str,
    stop_file: str,
    trial_id: str,
    protocol: str,
    group: int,
    size: int,
    indices: tuple[int, ...],
) -> str:
    if is_there(Path(stop_file)):
        return "drained"
    work = _work(folder)
    spec, evaluation = work.trial(trial_id), work.sweep.evaluate.spec()
    check_gpu_seen(work.sweep.resources.device, work.eval_gpus, f"evaluation of {trial_id}")
    device = pick_device(work.sweep.resources.device, work.eval_gpus)
    _share(device.type, work.eval_gpus)
    changes = {unit.protocol: unit.changes for unit in evaluation.units(spec)}.get(protocol)
    unit, splits = EvalUnit(protocol, group, size, indices, changes), _splits(folder, splits_key(spec))
    compile = work.sweep.resources.compile
    with full_disk_told(work.launch.directory.root):
        evaluate_unit(spec, unit, evaluation, splits, work.launch.directory, device, compile=compile)
    return "evaluated"
