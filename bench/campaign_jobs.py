"""The jobs of a campaign (`campaign.py`): sweep files expanded into JSON. Reading them needs neither Ray nor
pydantic; planning needs ddsweep whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ddsweep.catalog import DatasetSpec, EvaluationSpec, PoolSpec, Protocol, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.errors import UserError
from ddsweep.pools.recipe import PoolRecipe
from ddsweep.results.code import check_start_if_needed, write_sets
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.trial_plan import TrialSettings


@dataclass(frozen=True)
class Job:
    """One sweep of the campaign: its trials in order, and what is asked of them.

    ``cohort`` is ``resources.cohort`` of the sweep file: how many trials are distilled together at most.
    ``pool`` is the name and the recipe of the pool that the trials need, if that is one to be trained here.
    """

    name: str
    yaml: str
    trials: tuple[TrialSpec, ...]
    settings: tuple[TrialSettings, ...]
    evaluation: EvaluationSpec
    cohort: int | str
    pool: tuple[str, PoolRecipe] | None = None

    def to_json(self) -> str:
        pool = None
        if self.pool is not None:  # as of a trial, without what was found in the files
            name, recipe = self.pool
            pool = [name, asdict(replace(recipe, dataset=replace(recipe.dataset, survey=None)))]
        content = {
            "name": self.name,
            "yaml": self.yaml,
            "trials": [trial.to_dict() for trial in self.trials],
            "settings": [asdict(item) for item in self.settings],
            "evaluation": asdict(self.evaluation),
            "cohort": self.cohort,
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
                found["cohort"],
                pool,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = f"it has no {error}" if isinstance(error, KeyError) else error
            raise UserError(
                f"{path}: no job that this version has planned ({said}); `plan` it again"
            ) from error


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

    directory = SweepDirectory(folder / sweep.name)
    trials = expand(
        sweep, dataset, pool_spec, suits=lambda trial: check_start_if_needed(trial, directory)
    ).trials
    write_sets(directory, sweep.start_sets())
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
    evaluation, cohort = sweep.evaluate.spec(), sweep.resources.cohort
    job = Job(sweep.name, resolved_yaml(sweep), trials, settings, evaluation, cohort, pool)
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
