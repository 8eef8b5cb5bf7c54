"""From words of a command line to folders, tables and the trials of a sweep."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ddsweep.errors import UserError
from ddsweep.paths import user_path

if TYPE_CHECKING:
    from ddsweep.catalog import DatasetSpec, TrialSpec
    from ddsweep.cost import CostEstimate
    from ddsweep.report.sweep_file import Asked
    from ddsweep.results.layout import SweepDirectory
    from ddsweep.results.reader import Results
    from ddsweep.spec import Plan, Proposed, SweepSpec
    from ddsweep.spec.model import ResourcesSpec

__all__ = [
    "aside",
    "asked_of_folder",
    "data_folder",
    "estimated_seconds",
    "estimates_of",
    "existing",
    "expand_sweep",
    "expander",
    "read_results",
    "results_root",
    "sweep_directory",
]


def sweep_directory(sweep: SweepSpec, results: Path | None) -> SweepDirectory:
    """The folder of a sweep, there or not. Raises `ResultsError` if a file is in its way."""
    from ddsweep.results.files import file_in_the_way
    from ddsweep.results.layout import SweepDirectory

    root = results_root(results) / sweep.name
    for place in (root, *root.parents):
        if os.path.exists(place) and not place.is_dir():
            raise file_in_the_way(place)
    return SweepDirectory(root)


def results_root(results: Path | None) -> Path:
    return results or user_path(os.environ.get("DDSWEEP_RESULTS") or "results")


def existing(directory: Path) -> SweepDirectory:
    """The results in ``directory``. Raises `UserError` if that is not a folder of results."""
    from ddsweep.results.layout import SweepDirectory

    found = SweepDirectory(directory)
    if not found.sweep_file.is_file():
        raise UserError(
            f"{directory}: no results of a sweep (there is no sweep.yaml in it); name a folder such as "
            "results/quickstart"
        )
    return found


def asked_of_folder(directory: SweepDirectory, data_root: Path | None) -> Asked:
    """What the sweep file in ``directory`` asks for, with the data in ``data_root``."""
    from ddsweep.data.files import resolve_dataset
    from ddsweep.report.sweep_file import asked_of

    root = data_folder(data_root)
    return asked_of(directory, lambda value: resolve_dataset(value, root))


def read_results(directory: Path) -> Results:
    """The tables of the sweep in ``directory``; parts that are torn are left out, and named."""
    import warnings

    from ddsweep.results.reader import load_results

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = load_results(existing(directory).root)
    for path in found.torn:
        typer.echo(f"{path}: torn, left out; run the sweep again to redo it", err=True)
    return found


def expand_sweep(
    sweep: SweepSpec, directory: SweepDirectory, data_root: Path | None, files: Path | None = None
) -> Plan:
    """The trials of ``sweep``, whose networks of users' own are measured; ``files`` is where the files of
    pools are that were not begun yet. Of a guided search the samples that are written down are among them."""
    from ddsweep.results.proposals import read_proposals

    return expander(sweep, directory, data_root, files)(read_proposals(directory))


def expander(
    sweep: SweepSpec, directory: SweepDirectory, data_root: Path | None, files: Path | None = None
) -> Callable[[Proposed], Plan]:
    """What `expand_sweep` does with other proposals. Data sets and pools are looked at once."""
    from ddsweep.data.files import resolve_dataset
    from ddsweep.measuring import measure_networks
    from ddsweep.pools.file import resolve_pool
    from ddsweep.results.code import check_start_if_needed
    from ddsweep.spec import expand, is_smoke

    def dataset(value: Any) -> DatasetSpec:
        smoke = is_smoke(sweep.name)
        return resolve_dataset(value, data_root, stand_in=smoke, say=aside, may_run=True, code=directory.code)

    datasets = _once(dataset)
    pools = _once(lambda value: resolve_pool(value, directory.pools, datasets, files))

    def expanded(proposed: Proposed) -> Plan:
        plan = expand(sweep, datasets, pools, proposed, lambda trial: check_start_if_needed(trial, directory))
        measure_networks(plan.trials, sweep.evaluate.spec(), directory.code, aside)
        return plan

    return expanded


def _once(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``look``, called once for each value."""
    known: dict[str, Any] = {}

    def looked(value: Any) -> Any:
        if repr(value) not in known:
            known[repr(value)] = look(value)
        return known[repr(value)]

    return looked


def aside(text: str) -> None:
    """Print a message that is not a result."""
    typer.echo(text, err=True)


def data_folder(data_root: Path | None) -> Path | None:
    from ddsweep.data.files import data_root as find

    return find(data_root)


def estimates_of(
    trials: Iterable[TrialSpec],
    resources: ResourcesSpec,
    together: Mapping[str, int],
    threads: Callable[[TrialSpec], float],
) -> dict[str, CostEstimate]:
    """The cost of each trial in its memory mode, on so many ``threads`` (1 where it asks for none), if as
    many trials are distilled ``together``."""
    from ddsweep.cost import choose_memory, estimate, real_at_once_gpu

    found = {}
    for trial in trials:
        mode, segment = choose_memory(trial, resources.memory_mode, resources.segment)
        size = together.get(trial.trial_id, 1)
        found[trial.trial_id] = estimate(
            trial,
            threads(trial) or 1.0,
            memory_mode=mode,
            segment=segment,
            together=size,
            real_at_once=real_at_once_gpu(trial) if resources.for_trial(trial)[1] else 0,
        )
    return found


def estimated_seconds(plan: Plan, sweep: SweepSpec) -> dict[str, float]:
    from ddsweep.cohorts import cohort_sizes

    resources = sweep.resources
    needs = {trial.trial_id: resources.for_trial(trial) for trial in plan.trials}
    gpus = [gpus for _, gpus in needs.values()]
    sizes = cohort_sizes(
        plan.trials,
        resources.cohort,
        compile=resources.compile,
        gpus=gpus,
        memory_mode=resources.memory_mode,
        segment=resources.segment,
    )
    found = estimates_of(plan.trials, resources, sizes, lambda trial: needs[trial.trial_id][0])
    return {trial_id: cost.seconds_cpu for trial_id, cost in found.items()}
