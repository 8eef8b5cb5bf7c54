"""The verbs before a sweep: `init`, `plan` and `settings`."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

import ddsweep
from ddsweep import completions
from ddsweep.verbs.arguments import DataRoot, Overrides, ResultsRoot, Smoke, SweepFile
from ddsweep.verbs.inputs import data_folder, estimates_of, expand_sweep, sweep_directory

__all__ = ["init", "plan", "show_settings"]


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="The folder; by default the current one.")
    ] = Path(),
) -> None:
    """Write the sweep, pool and site files that come with ddsweep into a folder, to be edited."""
    from ddsweep.bundled import FOLDERS, write_files
    from ddsweep.catalog.numbers import counted

    found = write_files(directory)
    for folder in FOLDERS.values():
        count = sum(path.parent == Path(folder) for path in found.written)
        if count:
            typer.echo(f"{directory / folder}: {counted(count, 'file')} written")
    if found.kept:
        typer.echo(f"{counted(len(found.kept), 'file')} were there already and stay as they are")
    for path in found.differ:
        typer.echo(f"  {directory / path} differs from the one that comes with ddsweep {ddsweep.__version__}")
    place = "" if directory == Path() else f"cd {shlex.quote(str(directory))} && "
    typer.echo(f"Next: {place}ddsweep run sweeps/quickstart.yaml")


def plan(
    file: SweepFile,
    settings: Overrides = None,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
    smoke: Smoke = False,
) -> None:
    """Show the trials of a sweep, what is done, and what the rest will cost."""
    from ddsweep.catalog.numbers import counted
    from ddsweep.cohorts import cohort_sizes, why_in_turn
    from ddsweep.pools.file import is_trained
    from ddsweep.report.console import report_console
    from ddsweep.report.data import data_lines
    from ddsweep.report.plan_table import (
        TO_EVALUATE,
        evaluation_line,
        plan_table,
        protocol_lines,
        with_distilled,
    )
    from ddsweep.report.status import trial_states
    from ddsweep.results.elsewhere import finished_in, other_sweeps
    from ddsweep.spec import check_strata, load_sweep

    sweep = load_sweep(file, settings or (), smoke=smoke)
    directory, evaluation = sweep_directory(sweep, results), sweep.evaluate.spec()
    found = expand_sweep(sweep, directory, data_folder(data_root), file.parent / "pools")
    check_strata(sweep.name, sweep.scheduler, found.trials)
    states = trial_states(directory, found.trials, evaluation, stopped_stay=sweep.scheduler is not None)
    states = with_distilled(directory, states)
    resources = sweep.resources
    finished = ("done", "stopped", TO_EVALUATE)
    to_distil = [trial for trial in found.trials if states.get(trial.trial_id) not in finished]
    gpus = [resources.for_trial(trial)[1] for trial in to_distil]
    how: dict[str, Any] = {name: getattr(resources, name) for name in ("compile", "memory_mode", "segment")}
    cohorts = cohort_sizes(to_distil, resources.cohort, gpus=gpus, **how)
    to_come = bool(found.to_propose)
    in_turn = why_in_turn(to_distil, cohorts, resources.cohort, gpus=gpus, more=to_come, **how)
    estimates = estimates_of(found.trials, resources, cohorts, lambda trial: 1)
    console = report_console()
    table = plan_table(found, states, estimates, 1, sweep.scheduler, cohorts, in_turn)
    console.print(table)
    if judged := evaluation_line(found.trials, evaluation, states, sweep.scheduler):
        console.print(judged, soft_wrap=True)
    for line in protocol_lines(found.trials, evaluation, states):
        console.print(f"protocol {line}", soft_wrap=True)
    for line in data_lines((trial.dataset for trial in found.trials), data_folder(data_root)):
        console.print(f"data: {line}", soft_wrap=True)
    for pool in dict.fromkeys(trial.pool for trial in to_distil if trial.pool is not None):
        if not is_trained(pool, directory.pools):
            line = f"pool: {pool.name} is not trained yet: `ddsweep pretrain` with its file does that"
            console.print(line, soft_wrap=True)
    others = other_sweeps(directory)
    missing = [trial_id for trial_id, state in states.items() if state == "missing"]
    names = Counter(there[0].directory.root.name for i in missing if (there := finished_in(i, others)))
    for name, count in names.items():
        said = f"{counted(count, 'trial')} finished in sweep {name}: taken over if the data are the same"
        console.print(said, soft_wrap=True)


def show_settings(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            autocompletion=completions.names_of_settings,
            help="A setting such as outer_lr, a section such as evaluate, pool or site, a network, or a data "
            "set; by default an overview.",
        ),
    ] = None,
) -> None:
    """Show the settings, networks and data sets: their values and what they mean."""
    from ddsweep.launch.site import Site
    from ddsweep.report.console import report_console
    from ddsweep.report.settings_page import settings_page

    report_console().print(settings_page(name, {"site": Site}))
