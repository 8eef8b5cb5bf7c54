"""Long runs in short periods: trials that go on, period after period, from one folder. No Ray, no pydantic.

``plan`` expands sweep files into JSON, where ddsweep is installed whole. ``run`` works on what is missing for
so many seconds, where torch is: networks of pools, trials, evaluations. See bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ddsweep.catalog import (
    POOL_FRACTION,
    DatasetSpec,
    EvaluationSpec,
    EvalUnit,
    PoolSpec,
    Protocol,
    TrialSpec,
)
from ddsweep.catalog.numbers import counted
from ddsweep.core.memory import keep_to_share
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import EXIT_DRAINED, CheckpointError, DivergedError, UserError
from ddsweep.evaluation import evaluate_unit, finish, missing_units
from ddsweep.pools.recipe import PoolRecipe
from ddsweep.pools.store import write_index
from ddsweep.pools.train import PoolGroup, missing_groups, train_group
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.results.lock import SweepLock
from ddsweep.trial import Progress, checkpoint_provenance, distil_trial, is_distilled, record_failure
from ddsweep.trial_plan import TrialSettings, pick_device

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE_S = 60.0
"""After the last second a worker has this long for its outer step and its checkpoint. Then it is killed."""


# ------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """One sweep of the campaign: its trials in order, and what is asked of them.

    ``pool`` is the name and the recipe of the pool that the trials need, if that is one to be trained here.
    """

    name: str
    yaml: str
    trials: tuple[TrialSpec, ...]
    settings: tuple[TrialSettings, ...]
    evaluation: EvaluationSpec
    pool: tuple[str, PoolRecipe] | None = None

    def to_json(self) -> str:
        pool = None if self.pool is None else [self.pool[0], asdict(self.pool[1])]
        content = {
            "name": self.name,
            "yaml": self.yaml,
            "trials": [trial.to_dict() for trial in self.trials],
            "settings": [asdict(item) for item in self.settings],
            "evaluation": asdict(self.evaluation),
            "pool": pool,
        }
        return json.dumps(content, indent=1)

    @classmethod
    def read(cls, path: Path) -> Job:
        """Raises `UserError` for a file that is no job."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            pool = found["pool"] and (found["pool"][0], _recipe(found["pool"][1]))
            evaluation = _tuples(found["evaluation"])
            evaluation["protocols"] = tuple(
                item if isinstance(item, str) else Protocol(**item) for item in evaluation["protocols"]
            )
            return cls(
                found["name"],
                found["yaml"],
                tuple(TrialSpec.from_dict(item) for item in found["trials"]),
                tuple(TrialSettings(**_tuples(item)) for item in found["settings"]),
                EvaluationSpec(**evaluation),
                pool,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no job of a campaign ({error}); `plan` writes it anew") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _recipe(values: dict[str, Any]) -> PoolRecipe:
    return PoolRecipe(**{**values, "dataset": DatasetSpec(**_tuples(values["dataset"]))})


def read_jobs(folder: Path) -> list[Job]:
    """The jobs of a campaign in the order of their planning. Raises `UserError` if there is none."""
    paths = sorted((folder / "jobs").glob("*.json"))
    if not paths:
        raise UserError(f"{folder}: no campaign: `plan` it first")
    return [Job.read(path) for path in paths]


POOL = "pool."
"""What a setting of the pool's file begins with; the others are those of the sweep file."""


def plan(folder: Path, file: Path, overrides: Sequence[str], data_root: Path | None) -> Job:
    """Write the job of one sweep file. Planning it again replaces it at its place."""
    from ddsweep.data.files import resolve_dataset
    from ddsweep.pools.file import PoolFile, load_pool, pool_yaml, resolve_pool
    from ddsweep.spec import expand, load_sweep, resolved_yaml
    from ddsweep.sweep.prepare import trial_settings

    def dataset(value: Any) -> DatasetSpec:
        return resolve_dataset(value, data_root)

    of_pool = [text.removeprefix(POOL) for text in overrides if text.startswith(POOL)]
    sweep = load_sweep(file, [text for text in overrides if not text.startswith(POOL)])
    if sweep.scheduler is not None:
        raise UserError(f"{file}: a campaign runs every trial to its end: add scheduler=null")
    files, pools = file.parent / "pools", folder / "pools"
    own: dict[str, PoolFile] = {}

    def pool_spec(value: Any) -> PoolSpec:
        if not isinstance(value, str) or not (files / f"{value}.yaml").is_file():
            return resolve_pool(value, pools, dataset, files)
        own[value] = load_pool(files / f"{value}.yaml", of_pool)
        return own[value].recipe(dataset).spec(value)

    trials = expand(sweep, dataset, pool_spec).trials
    names = {trial.pool.name for trial in trials if trial.pool is not None}
    if len(names) > 1:
        raise UserError(f"{file}: more than one pool; plan a sweep for each")
    pool = None
    for name in names & own.keys():
        pool = (name, own[name].recipe(dataset))
        place = PoolDirectory(pools / name)
        place.create()
        write_atomic(place.pool_file, pool_yaml(own[name]).encode(), place.temporary)
    settings = tuple(trial_settings(sweep, trial) for trial in trials)
    job = Job(sweep.name, resolved_yaml(sweep), trials, settings, sweep.evaluate.spec(), pool)
    jobs = folder / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    before = sorted(jobs.glob("*.json"))
    there = next((path for path in before if path.stem.partition("-")[2] == job.name), None)
    last = int(before[-1].stem.partition("-")[0]) if before else 0
    write_atomic(there or jobs / f"{last + 1:03d}-{job.name}.json", job.to_json().encode(), folder / ".tmp")
    return job


def plan_all(
    folder: Path, given: Sequence[str], data_root: Path | None, said: Callable[[str], None] = print
) -> None:
    """`plan` for each sweep file in ``given``, with the ``key=value`` settings in it for all of them."""
    overrides = [text for text in given if "=" in text]
    files = [Path(text) for text in given if "=" not in text]
    if not files:
        raise UserError("plan: give a sweep file at least")
    jobs = [plan(folder, file, overrides, data_root) for file in files]
    if of_pool := [text for text in overrides if text.startswith(POOL) and not any(j.pool for j in jobs)]:
        raise UserError(f"{of_pool[0]}: none of these sweeps has a pool that is trained here")
    for job in jobs:
        said(f"{job.name}: {counted(len(job.trials), 'trial')}")


# ------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """What one worker does at a time: a group of a pool's networks, a trial, or a unit of its evaluation."""

    job: int
    trial: int | None = None
    unit: EvalUnit | None = None
    group: PoolGroup | None = None


@dataclass(frozen=True)
class Place:
    """Where and how the workers of this period work. ``deadline`` is a time of ``time.time()``."""

    folder: Path
    jobs: tuple[Job, ...]
    data_root: Path | None
    device: str
    gpus: float
    threads: int
    deadline: float

    def directory(self, job: Job) -> SweepDirectory:
        return SweepDirectory(self.folder / job.name)

    def is_over(self) -> bool:
        return time.time() >= self.deadline or (self.folder / "STOP").exists()


def missing(place: Place) -> list[Task]:
    """What can be done now: first the evaluations of distilled sets, then job after job its pool, and once
    that is whole its trials."""
    evaluations: list[Task] = []
    others: list[Task] = []
    for number, job in enumerate(place.jobs):
        directory = place.directory(job)
        if job.pool is not None:
            name, recipe = job.pool
            pool = PoolDirectory(place.folder / "pools" / name)
            if groups := missing_groups(recipe, pool):
                others += [Task(number, group=group) for group in groups]
                continue
            if not pool.index.is_file():
                write_index(pool, recipe.spec(name))
        for index, trial in enumerate(job.trials):
            if directory.failure_part(trial.trial_id).exists():
                continue
            if not is_distilled(trial, directory):
                others.append(Task(number, trial=index))
                continue
            units = missing_units(trial, job.evaluation, directory)
            evaluations += [Task(number, trial=index, unit=unit) for unit in units]
            if not units:
                finish(trial, job.evaluation, directory, job.name)
    return evaluations + others


@lru_cache(maxsize=4)
def _splits(
    dataset: DatasetSpec, root: Path | None, fraction: float, seed: int, whitening: str = "none"
) -> Splits:
    return load_splits(dataset, root, validation_fraction=fraction, split_seed=seed, whitening=whitening)


def work(place: Place, task: Task) -> str:
    """Do ``task`` as far as the deadline allows; what came of it, in words."""
    job = place.jobs[task.job]
    if place.is_over():
        return "not begun"
    began, directory = time.monotonic(), place.directory(job)
    if task.group is not None:
        assert job.pool is not None
        name, recipe = job.pool
        pool = PoolDirectory(place.folder / "pools" / name)
        splits = _splits(recipe.dataset, place.data_root, POOL_FRACTION, 0)
        device = torch.device(place.device)
        more = {"should_stop": place.is_over}
        whole = train_group(name, recipe, task.group, splits, pool, device, place.threads, **more)
        return _said("trained", whole, began)
    assert task.trial is not None
    trial = job.trials[task.trial]
    splits = _splits(
        trial.dataset, place.data_root, trial.validation_fraction, trial.split_seed, trial.whitening
    )
    if task.unit is not None:
        evaluate_unit(trial, task.unit, job.evaluation, splits, directory, torch.device(place.device))
        return _said("evaluated", True, began)
    settings = replace(job.settings[task.trial], device=place.device, gpus=place.gpus, threads=place.threads)

    def on_progress(progress: Progress) -> None:
        if progress.val_score is not None:
            print(f"{job.name} {trial.trial_id}: {_progress(progress)}", flush=True)

    try:
        whole = distil_trial(
            trial, splits, directory, settings, should_stop=place.is_over, on_progress=on_progress
        )
    except (DivergedError, UserError) as error:
        record_failure(directory, trial, job.name, error, "distillation", 1)
        return f"failed: {error}"
    return _said("distilled", whole, began)


def _said(what: str, whole: bool, began: float) -> str:
    return f"{what if whole else 'to be gone on with'} after {time.monotonic() - began:.0f} s"


def _progress(progress: Progress) -> str:
    loss = "-" if progress.outer_loss is None else f"{progress.outer_loss:.4f}"
    return (
        f"step {progress.outer_step}, loss {loss}, validation {progress.val_score:.4f}, "
        f"{progress.seconds:.0f} s in all"
    )


# ------------------------------------------------------------------------------------------ periods


def run(place: Place, side_by_side: int) -> bool:
    """Work for one period with so many worker processes; True if nothing is left to do."""
    (place.folder / "STOP").unlink(missing_ok=True)
    for job in place.jobs:
        directory = place.directory(job)
        directory.create()
        write_atomic(directory.sweep_file, job.yaml.encode(), directory.temporary)
        if job.pool is not None:
            PoolDirectory(place.folder / "pools" / job.pool[0]).create()
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    share = (place.device, place.gpus)
    with ProcessPoolExecutor(side_by_side, context, keep_to_share, share) as workers:
        running: dict[Future[str], Task] = {}
        given: set[Task] = set()
        try:
            while not place.is_over():
                for task in missing(place) if len(running) < side_by_side else ():
                    if len(running) < side_by_side and task not in given:
                        given.add(task)
                        # Signals are for the driver, which tells by a file: its workers inherit the mask.
                        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                        running[workers.submit(work, place, task)] = task
                        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                if not running:
                    return True
                for future in wait(running, 0.5, FIRST_COMPLETED).done:
                    _tell(place, running.pop(future), future)
            wait(running, GRACE_S)
            for future, task in running.items():
                if future.done():
                    _tell(place, task, future)
        except BrokenProcessPool as error:
            raise UserError("a worker was killed; run again: what is finished stays") from error
        finally:
            for process in list(workers._processes.values()):
                process.kill()
    return not missing(place)


def _tell(place: Place, task: Task, future: Future[str]) -> None:
    job = place.jobs[task.job]
    if task.group is not None:
        what = f"networks {task.group.label}"
    else:
        assert task.trial is not None
        what = job.trials[task.trial].trial_id
        if task.unit is not None:
            what += f" {task.unit.protocol} group {task.unit.group}"
    print(f"{job.name} {what}: {future.result()}", flush=True)


def status(folder: Path) -> list[str]:
    """One line for each trial: how far it is."""
    lines = []
    for job in read_jobs(folder):
        directory = SweepDirectory(folder / job.name)
        for trial in job.trials:
            if directory.trials_part(trial.trial_id).exists():
                state = "done"
            elif directory.failure_part(trial.trial_id).exists():
                state = "failed"
            elif directory.distilled(trial.trial_id).exists():
                left = len(missing_units(trial, job.evaluation, directory))
                state = f"distilled, {left} of {len(job.evaluation.units(trial))} evaluations missing"
            else:
                state = _steps(trial, directory)
            lines.append(f"{job.name} {trial.trial_id}: {state}")
    return lines


def _steps(trial: TrialSpec, directory: SweepDirectory) -> str:
    try:
        step, columns = checkpoint_provenance(trial, directory)
    except CheckpointError:
        return "not begun"
    score = columns["val_score"]
    best = "" if score is None else f", validation {score:.4f}"
    return f"step {step} of {trial.outer_steps}{best}, {columns['wall_seconds']:.0f} s"


# --------------------------------------------------------------------------------------------- main


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("plan", "add sweep files to a campaign (needs all of ddsweep)"),
        ("run", "work on what is missing for one period"),
        ("status", "how far each trial is"),
    ):
        own = verbs.add_parser(verb, help=text)
        own.add_argument("folder", type=Path, metavar="DIR", help="the folder of the campaign")
        if verb != "status":
            root = os.environ.get("DDSWEEP_DATA")
            own.add_argument("--data-root", type=Path, default=Path(root) if root else None)
        if verb == "plan":
            more = "sweep files, then settings for all of them; pool.KEY=VALUE: of their pool's file"
            own.add_argument("given", nargs="+", metavar="FILE|KEY=VALUE", help=more)
        if verb == "run":
            own.add_argument("--seconds", type=float, required=True, help="how long this period is")
            own.add_argument("--device", choices=("cpu", "cuda"))
            own.add_argument("--side-by-side", type=int, help="worker processes (2 on a GPU, else 1)")
            own.add_argument("--threads", type=int, default=1, help="CPU threads of each worker")
            own.add_argument("--only", nargs="*", metavar="SWEEP", help="these sweeps of the campaign only")
    return parser.parse_args(given)


def _run(options: argparse.Namespace) -> int:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pick_device(device, 1.0)
    side_by_side = options.side_by_side or (2 if device == "cuda" else 1)
    jobs = read_jobs(options.folder)
    names = [job.name for job in jobs]
    if unknown := sorted(set(options.only or ()) - set(names)):
        raise UserError(f"--only: {', '.join(unknown)}: the campaign has {', '.join(names)}")
    chosen = tuple(job for job in jobs if not options.only or job.name in options.only)
    place = Place(
        options.folder.resolve(),
        chosen,
        options.data_root,
        device,
        1 / side_by_side if device == "cuda" else 0.0,
        options.threads,
        time.time() + options.seconds,
    )

    def stop(number: int, frame: Any) -> None:
        (place.folder / "STOP").touch()

    for number in SIGNALS:
        signal.signal(number, stop)
    with SweepLock(place.folder / ".lock"):
        whole = run(place, side_by_side)
    for line in status(options.folder):
        print(line)
    return 0 if whole else EXIT_DRAINED


def main(given: Sequence[str] | None = None) -> int:
    options = _arguments(given)
    try:
        if options.verb == "plan":
            plan_all(options.folder, options.given, options.data_root)
        elif options.verb == "status":
            print("\n".join(status(options.folder)))
        else:
            return _run(options)
    except UserError as error:
        print(f"campaign: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
