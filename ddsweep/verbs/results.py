"""The verbs over results: `status`, `show`, `best`, `compare`, `prune` and `collect`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ddsweep import completions
from ddsweep.errors import UnreadableError, UserError
from ddsweep.verbs.arguments import DataRoot, ResultsDir, ResultsRoot, Watch
from ddsweep.verbs.inputs import aside, asked_of_folder, existing, read_results, results_root

__all__ = ["best", "collect", "compare", "prune", "show", "status"]


def status(directory: ResultsDir, watch: Watch = None, data_root: DataRoot = None) -> None:
    """Show how far a sweep is, from its files alone: while it runs, after it, and from another machine."""
    from ddsweep.launch.watch import launch_lines
    from ddsweep.report.console import report_console
    from ddsweep.report.status import status as read_status
    from ddsweep.report.status_table import status_table

    found, console = existing(directory), report_console()
    while True:
        try:
            state = read_status(found, asked_of_folder(found, data_root))  # anew: a search adds trials
        except UnreadableError as error:
            if watch is None:
                raise
            console.print(str(error), soft_wrap=True)  # it may pass
            time.sleep(watch)
            continue
        if watch is not None:
            console.clear()  # of a terminal; elsewhere one state follows the other
        console.print(status_table(state))
        for line in launch_lines(found):
            console.print(line)
        if watch is None or state.driver is None:
            return
        time.sleep(watch)


def show(
    trial: Annotated[
        str,
        typer.Argument(
            metavar="TRIAL", help="A trial id, or its first characters.", autocompletion=completions.trials
        ),
    ],
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Results of its sweep; by default all sweeps are searched."),
    ] = None,
    results: ResultsRoot = None,
) -> None:
    """Show one trial: settings, curve, accuracy beside the baselines, and the path of its picture."""
    from ddsweep.report.console import report_console
    from ddsweep.report.show import find_trial
    from ddsweep.report.show import show as render

    root = results_root(results)
    places = [directory] if directory else sorted(path.parent for path in root.glob("*/sweep.yaml"))
    if not places:
        raise UserError(
            f"{root}: no results of any sweep; name the folder (ddsweep show TRIAL DIR) or --results"
        )
    found, trial_id = find_trial([existing(place) for place in places], trial)
    report_console().print(render(found, trial_id))


def best(
    directory: ResultsDir,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="SETTING,...",
            help="Answer once for each value of these (default: all that make another question, such as "
            "data set, network, init and images per class).",
        ),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Show the best setting of each kind, chosen on validation, with its test accuracy and its gains."""
    from ddsweep.report.best import best_lines

    names = None if by is None else [name.strip() for name in by.split(",") if name.strip()]
    results, trials = read_results(directory), None
    try:
        asked = asked_of_folder(existing(directory), data_root)
        trials, note = asked.trials, asked.note
    except UserError as error:  # the tables are as good without a readable sweep.yaml
        note = str(error)
    if note:
        aside(f"trials that failed, or are not there yet, are not known: {note}")
    for line in best_lines(results, names, trials or ()):
        typer.echo(line)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Results of one sweep.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Results of another.")],
) -> None:
    """Compare two sweeps: which settings differ, and how accuracy moved on the networks that both have."""
    from ddsweep.report.compare import compare_lines

    for line in compare_lines((str(first), str(second)), *map(read_results, (first, second))):
        typer.echo(line)


def prune(
    directory: ResultsDir,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only shown.")] = False,
    data_root: DataRoot = None,
) -> None:
    """Show the trials that the sweep file no longer has; with --yes remove all their files, and the copies of
    code and sets that it no longer names."""
    from ddsweep.catalog.numbers import counted
    from ddsweep.report.console import report_console
    from ddsweep.report.formats import size
    from ddsweep.report.leftover_table import leftover_table
    from ddsweep.results.current import current_ids
    from ddsweep.results.leftover import leftover_copies, leftovers, remove, size_of
    from ddsweep.results.lock import SweepLock

    found, console = existing(directory), report_console()
    with SweepLock(found.lock) if yes else nullcontext():
        asked = asked_of_folder(found, data_root)
        ids = current_ids(found) if asked.trials is None else [trial.trial_id for trial in asked.trials]
        if ids is None:
            raise UserError(f"{directory}: it cannot be told which trials the sweep has; {asked.note}")
        trials, copies = leftovers(found, ids), leftover_copies(found)
        if not trials and not copies:
            console.print("sweep.yaml has all trials that are here: nothing to remove")
            return
        if trials:
            console.print(leftover_table(trials))
        if copies:
            what = counted(len(copies), "copy of code or a set", "copies of code and sets")
            console.print(f"{what} that sweep.yaml no longer names, {size(size_of(copies))}")
        if yes:
            remove(found, trials, copies)
    said = "removed" if yes else f"nothing is removed yet; `ddsweep prune {directory} --yes` removes them"
    console.print(said, soft_wrap=True)


def collect(directory: ResultsDir) -> None:
    """Compact the parts of each table into one file under tables/. The parts stay."""
    from ddsweep.catalog.numbers import counted
    from ddsweep.results.collect import compact

    found = existing(directory)
    for name, rows in compact(found).items():
        typer.echo(f"{found.table(name)}: {counted(rows, 'row')}")
