"""The verbs of a cluster: `launch`, `cancel`, `logs` and `doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddsweep.errors import EXIT_DRAINED, UserError
from ddsweep.verbs.arguments import (
    DataRoot,
    Overrides,
    ResultsDir,
    ResultsRoot,
    SiteFile,
    SweepFile,
    find,
    seconds,
)
from ddsweep.verbs.inputs import (
    data_folder,
    estimated_seconds,
    existing,
    expand_sweep,
    results_root,
    sweep_directory,
)

if TYPE_CHECKING:
    from ddsweep.launch.start import Request

__all__ = ["cancel", "doctor", "launch", "logs"]


def launch(
    file: SweepFile,
    settings: Overrides = None,
    site: SiteFile = None,
    mode: Annotated[
        str, typer.Option(help="cluster: one allocation, one Ray cluster. array: a job array, without Ray.")
    ] = "cluster",
    nodes: Annotated[int | None, typer.Option(help="Number of nodes (of an array: nodes at a time).")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs on each node.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit: 90m, 4h, or 04:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the sweep is over, and end with its exit code.")
    ] = False,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
) -> None:
    """Run what is missing of a sweep as jobs of a cluster. The same command goes on where it was.

    KEY=VALUE are settings of the sweep, and with site. before them of the site file.
    """
    from ddsweep.sweep.drain import Drain, Drained

    over = {"nodes": nodes, "gpus_per_node": gpus_per_node, "time": time}
    over |= {"partition": partition, "account": account}
    asked = _Asked(file, settings or [], site, over, mode, results, data_root, dry_run)
    with Drain() as drain:
        with drain.interruptible():
            from ddsweep.catalog.numbers import counted
            from ddsweep.launch import start
            from ddsweep.report.console import report_console

            console = report_console()

            def say(text: str) -> None:
                console.print(text, soft_wrap=True)

            request, planned, missing, idle = _launch_request(asked, say)
            if dry_run:
                start.dry_run(request, planned, missing, say)
                if idle:
                    say(idle)
                return
        if not missing:
            from ddsweep.results.current import write_sweep_file
            from ddsweep.results.lock import SweepLock
            from ddsweep.spec import resolved_yaml

            with SweepLock(request.directory.lock):
                write_sweep_file(
                    request.directory, resolved_yaml(request.sweep).encode(), list(request.trials)
                )
            say(f"done: all of {counted(planned, 'trial')}: {request.directory.root}")
            return
        folder = start.launch(request)

        from ddsweep.launch.folder import Launch
        from ddsweep.launch.watch import wait_for

        numbers = ", ".join(f"{job.kind} {job.id}" for job in Launch.read(folder).jobs)
        say(f"launched {folder.name}: {numbers}; {missing} of {counted(planned, 'trial')} to do")
        say(f"ddsweep status|logs|cancel {request.directory.root}")
        if idle:
            say(idle)
        if not wait:
            return
        try:
            with drain.interruptible():
                code = wait_for(folder, say)
        except Drained:
            say(f"{drain.cause}: the jobs go on without this command, until they are done or cancelled")
            code = EXIT_DRAINED
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `launch`. ``over`` are options that override keys of the site file; None: no such."""

    file: Path
    settings: Sequence[str]
    site: Path | None
    over: Mapping[str, object]
    mode: str
    results: Path | None
    data_root: Path | None
    dry_run: bool


def _launch_request(asked: _Asked, say: Callable[[str], None]) -> tuple[Request, int, int, str | None]:
    """What is to be launched, how many trials are planned, how many of them are missing, and what to say once
    nothing is refused. ``say`` is told what is noteworthy about their data."""
    from ddsweep.data.files import require_files
    from ddsweep.launch import start
    from ddsweep.launch.folder import MODES
    from ddsweep.launch.site import load_site
    from ddsweep.measuring import codes_of
    from ddsweep.pools.file import check_pool
    from ddsweep.report.data import remark_lines
    from ddsweep.report.status import trial_states
    from ddsweep.spec import check_strata, load_sweep
    from ddsweep.sweep.tpe import require_optuna

    settings, site, mode = asked.settings, asked.site, asked.mode
    if site is None:
        raise UserError("--site: name a site file, such as slurm/mine.yaml, or `local` for this machine")
    if mode not in MODES:
        raise UserError(f"--mode: {mode!r} is not one of {', '.join(MODES)}")
    if sys.platform != "linux":
        raise UserError("launch: jobs run on Linux only; `ddsweep run` is the way here")
    over = [item.removeprefix("site.") for item in settings if item.startswith("site.")]
    over += [f"{key}={json.dumps(value)}" for key, value in asked.over.items() if value is not None]
    place = load_site(site, over)
    device = [] if place.device is None else [f"resources.device={place.device}"]
    sweep = load_sweep(asked.file, [*(item for item in settings if not item.startswith("site.")), *device])
    require_optuna(sweep)
    root, directory = data_folder(asked.data_root), sweep_directory(sweep, asked.results)
    plan = expand_sweep(sweep, directory, root, asked.file.parent / "pools")
    check_strata(sweep.name, sweep.scheduler, plan.trials)
    stay = sweep.scheduler is not None
    states = trial_states(directory, plan.trials, sweep.evaluate.spec(), stopped_stay=stay)
    missing = [trial for trial in plan.trials if states[trial.trial_id] == "missing"]
    for dataset in dict.fromkeys(trial.dataset for trial in missing):
        require_files(dataset, root)
    for line in remark_lines(trial.dataset for trial in missing):
        say(line)
    for pool in dict.fromkeys(trial.pool for trial in missing if trial.pool is not None):
        check_pool(pool, directory.pools, root)
        if not pool.classes and not asked.dry_run:
            from ddsweep.pools.imagenet import ready_pool

            ready_pool(pool, directory.pools, root)  # jobs find it there
    start.check_fits(sweep, plan.trials, place, mode)
    idle = sweep.resources.idle_gpus(missing, place.gpus_per_node)
    shares: list[list[str]] = []
    if mode == "array":
        from ddsweep.launch.array import deal
        from ddsweep.trial import is_distilled

        to_distil = [trial for trial in missing if not is_distilled(trial, directory)]
        shares = deal(to_distil, estimated_seconds(plan, sweep), place.array_tasks)
    own = codes_of(plan.trials, sweep.evaluate.spec())
    request = start.Request(sweep, directory, place, site, mode, root, shares, tuple(states), own)
    more = plan.to_propose
    return request, len(plan.trials) + more, len(missing) + more, idle and f"gpus_per_node: {idle}"


def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A sweep file, or its name: its data sets are checked too.",
            callback=find("sweep file"),
        ),
    ] = None,
    site: SiteFile = None,
    patience: Annotated[
        float,
        typer.Option(
            help="Seconds that the short job on the nodes may wait in the queue.",
            callback=seconds("--patience"),
            metavar="SECONDS",
        ),
    ] = 60.0,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
) -> None:
    """Look for problems, one line each: on this machine and, with a Slurm site, on its nodes."""
    from rich.text import Text

    from ddsweep.launch.doctor import examine
    from ddsweep.launch.site import load_site
    from ddsweep.report.console import report_console
    from ddsweep.spec import load_sweep

    place = None if site is None else load_site(site)
    sweep = None if file is None else load_sweep(file)
    console, failed = report_console(), False
    colours = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    for finding in examine(place, results_root(results), data_folder(data_root), sweep, patience):
        line = Text(f"{finding.state:<4} ", style=colours[finding.state])
        console.print(line + Text(f"{finding.name}: {finding.text}", style="default"), soft_wrap=True)
        failed = failed or finding.state == "FAIL"
    if failed:
        raise typer.Exit(1)


def cancel(
    directory: ResultsDir,
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds that running trials may take to drain.",
            callback=seconds("--grace"),
            metavar="SECONDS",
        ),
    ] = 60.0,
) -> None:
    """End the jobs of a launched sweep: running trials drain first. Launching it again goes on."""
    from ddsweep.launch.watch import cancel as end
    from ddsweep.launch.watch import latest

    end(latest(existing(directory)), grace, typer.echo)


def logs(
    directory: ResultsDir,
    job: Annotated[str | None, typer.Option(help="Only of this job: 123, or 123_4 of an array.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="Number of lines from the end of each log.")] = 40,
) -> None:
    """Show the last lines of the logs of a sweep's last launch, the newest log last."""
    from ddsweep.launch.slurm import log_tail
    from ddsweep.launch.watch import latest, log_files

    folder = latest(existing(directory))
    files = log_files(folder, job)
    if not files:
        typer.echo(f"{folder.logs}: no logs yet{f' of job {job}' if job else ''}")
    for path in files:
        typer.echo(f"==> {path} <==")
        for line in log_tail(path, lines):
            typer.echo(line)
