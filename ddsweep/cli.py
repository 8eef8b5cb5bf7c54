"""The command line: thin verbs over the rooms below. ``--help``, plan, status and show stay instant,
so everything is imported where it is used."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import ddsweep
from ddsweep import completions
from ddsweep.bundled import find_file
from ddsweep.catalog.numbers import counted
from ddsweep.errors import EXIT_DRAINED, NOT_ON_WINDOWS, ResultsError, UserError
from ddsweep.paths import user_path
from ddsweep.processes import leave
from ddsweep.report_verb import Watch, report

if TYPE_CHECKING:
    from ddsweep.catalog import DatasetSpec
    from ddsweep.launch.start import Request
    from ddsweep.pools.file import PoolFile
    from ddsweep.results.layout import SweepDirectory
    from ddsweep.results.reader import Results
    from ddsweep.spec import Plan, SweepSpec
    from ddsweep.sweep.drain import Drain

__all__ = ["app", "main"]

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="ddsweep",
    help="Sweeps of dataset distillation: one YAML file in, Parquet tables with error bars out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Data sets: which there are, and fetching them.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.command()(report)


def _find(kind: str) -> Callable[[Path | None], Path | None]:
    """What makes a file of the path, or of the name of a file that comes with ddsweep, that was given."""
    return lambda given: None if given is None else find_file(given, kind)


SweepFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A sweep file, or the name of one that comes with ddsweep, such as quickstart.",
        callback=_find("sweep file"),
    ),
]
SiteFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A site file, or the name of one that comes with ddsweep, such as local.",
        callback=_find("site file"),
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings over the file: outer_steps=10 evaluate.networks=8.",
        autocompletion=completions.overrides,
    ),
]
ResultsRoot = Annotated[
    Path | None,
    typer.Option("--results", help="Folder of results (or DDSWEEP_RESULTS; default: results)."),
]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", help="Folder of data sets (or DDSWEEP_DATA).", metavar="DIR")
]
ResultsDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="Results of one sweep, such as results/quickstart.")
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ddsweep {ddsweep.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------ common parts


def _sweep_directory(sweep: SweepSpec, results: Path | None) -> SweepDirectory:
    from ddsweep.results.layout import SweepDirectory

    return SweepDirectory(_results_root(results) / sweep.name)


def _results_root(results: Path | None) -> Path:
    return results or user_path(os.environ.get("DDSWEEP_RESULTS") or "results")


def _existing(directory: Path) -> SweepDirectory:
    """The results in ``directory``. Raises `UserError` if that is no folder of results."""
    from ddsweep.results.layout import SweepDirectory

    found = SweepDirectory(directory)
    if not found.sweep_file.is_file():
        raise UserError(
            f"{directory}: no results of a sweep (there is no sweep.yaml in it); name a folder such as "
            "results/quickstart"
        )
    return found


def _read_results(directory: Path) -> Results:
    """The tables of the sweep in ``directory``; parts that are torn are left out, and named."""
    import warnings

    from ddsweep.results.reader import load_results

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = load_results(_existing(directory).root)
    for path in found.torn:
        typer.echo(f"{path}: torn, left out; run the sweep again to redo it", err=True)
    return found


def _expand(
    sweep: SweepSpec, directory: SweepDirectory, data_root: Path | None, files: Path | None = None
) -> Plan:
    """The trials of ``sweep``, whose networks of users' own are measured; ``files`` is where the files of
    pools are that were not begun yet."""
    from ddsweep.data.files import resolve_dataset
    from ddsweep.measuring import measure_networks
    from ddsweep.pools.file import resolve_pool
    from ddsweep.spec import expand, is_smoke

    def dataset(value: Any) -> DatasetSpec:
        smoke = is_smoke(sweep.name)
        return resolve_dataset(
            value, data_root, stand_in=smoke, say=_aside, may_run=True, code=directory.code
        )

    plan = expand(sweep, dataset, lambda value: resolve_pool(value, directory.pools, dataset, files))
    measure_networks(plan.trials, sweep.evaluate.spec(), directory.code, _aside)
    return plan


def _aside(text: str) -> None:
    """Tell something that is no result."""
    typer.echo(text, err=True)


def _root(data_root: Path | None) -> Path | None:
    from ddsweep.data.files import data_root as find

    return find(data_root)


def _seconds(plan: Plan, sweep: SweepSpec) -> dict[str, float]:
    from ddsweep.cost import estimate

    return {
        trial.trial_id: estimate(trial, sweep.resources.for_trial(trial)[0]).seconds_cpu
        for trial in plan.trials
    }


# --------------------------------------------------------------------------------------- the verbs


Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="With the tiny settings under `smoke` in the file: does it work at all?"),
]


Everything = Annotated[
    bool, typer.Option("--all", help="End with every trial; of many it is else the best of each kind.")
]


@app.command()
def init(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to; left out, the current folder.")
    ] = Path(),
) -> None:
    """Write the sweep, pool and site files that come with ddsweep into a folder, to be edited."""
    from ddsweep.bundled import FOLDERS, write_files

    found = write_files(directory)
    for folder in FOLDERS.values():
        count = sum(path.parent == Path(folder) for path in found.written)
        if count:
            typer.echo(f"{directory / folder}: {counted(count, 'file')} written")
    if found.kept:
        typer.echo(f"{len(found.kept)} of the files there already, kept as they are")
    for path in found.differ:
        typer.echo(f"  {directory / path} differs from the one that comes with ddsweep {ddsweep.__version__}")
    place = "" if directory == Path() else f"cd {shlex.quote(str(directory))} && "
    typer.echo(f"Next: {place}ddsweep run sweeps/quickstart.yaml")


@app.command()
def plan(
    file: SweepFile,
    settings: Overrides = None,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
    smoke: Smoke = False,
) -> None:
    """Show the trials of a sweep, what is done, and what the rest will cost."""
    from ddsweep.cost import choose_memory, estimate
    from ddsweep.report.console import report_console
    from ddsweep.report.data import data_lines
    from ddsweep.report.plan_table import plan_table, with_distilled
    from ddsweep.report.status import trial_states
    from ddsweep.results.elsewhere import finished_in, other_sweeps
    from ddsweep.spec import check_strata, load_sweep

    sweep = load_sweep(file, settings or (), smoke=smoke)
    directory, evaluation = _sweep_directory(sweep, results), sweep.evaluate.spec()
    found = _expand(sweep, directory, _root(data_root), file.parent / "pools")
    check_strata(sweep.name, sweep.scheduler, found.trials)
    states = trial_states(directory, found.trials, evaluation, stopped_stay=sweep.scheduler is not None)
    states = with_distilled(directory, states)
    memory = (sweep.resources.memory_mode, sweep.resources.segment)
    estimates = {}
    for trial in found.trials:
        mode, segment = choose_memory(trial, *memory)
        estimates[trial.trial_id] = estimate(trial, threads=1, memory_mode=mode, segment=segment)
    console = report_console()
    console.print(plan_table(found, states, estimates, threads=1, scheduler=sweep.scheduler))
    for line in data_lines((trial.dataset for trial in found.trials), _root(data_root)):
        console.print(f"data: {line}", highlight=False, markup=False, soft_wrap=True)
    others = other_sweeps(directory)
    missing = [trial_id for trial_id, state in states.items() if state == "missing"]
    names = Counter(there[0].directory.root.name for i in missing if (there := finished_in(i, others)))
    for name, count in names.items():
        said = f"{counted(count, 'trial')} finished in sweep {name}: taken over if the data are the same"
        console.print(said, highlight=False, soft_wrap=True)


@app.command()
def run(
    file: SweepFile,
    settings: Overrides = None,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
    smoke: Smoke = False,
    address: Annotated[
        str | None, typer.Option(help="Join the Ray cluster at this address instead of starting one.")
    ] = None,
    everything: Everything = False,
) -> None:
    """Run what is missing of a sweep. Ctrl-C drains; the same command goes on where it was."""
    from ddsweep.sweep.drain import Drain

    with Drain() as drain:
        from ddsweep.spec import check_strata, load_sweep

        with drain.interruptible():
            sweep = load_sweep(file, settings or (), smoke=smoke)
            root, directory = _root(data_root), _sweep_directory(sweep, results)
        if smoke:
            _pretrain_smoke(sweep, file.parent / "pools", _results_root(results), root, address, drain)
        with drain.interruptible():
            plan = _expand(sweep, directory, root, file.parent / "pools")
            check_strata(sweep.name, sweep.scheduler, plan.trials)
        _run(sweep, plan, directory, root, address, drain, only_evaluate=False, everything=everything)


@app.command("eval")
def evaluate(
    directory: ResultsDir,
    settings: Overrides = None,
    data_root: DataRoot = None,
    address: Annotated[
        str | None, typer.Option(help="Join the Ray cluster at this address instead of starting one.")
    ] = None,
    everything: Everything = False,
) -> None:
    """Evaluate the distilled sets of a sweep again (evaluate.networks=200), without distilling."""
    from ddsweep.sweep.drain import Drain

    with Drain() as drain:
        from ddsweep.spec import load_sweep

        with drain.interruptible():
            found = _existing(directory)
            for setting in settings or ():
                if not setting.startswith("evaluate.") and not setting.startswith("resources."):
                    raise UserError(
                        f"{setting!r}: eval changes evaluate.* (and resources.*) only; trials stay as they "
                        "are"
                    )
            sweep = load_sweep(found.sweep_file, settings or ())
            root = _root(data_root)
            plan = _expand(sweep, found, root)
        _run(sweep, plan, found, root, address, drain, only_evaluate=True, everything=everything)


def _run(
    sweep: SweepSpec,
    plan: Plan,
    directory: SweepDirectory,
    data_root: Path | None,
    address: str | None,
    drain: Drain,
    *,
    only_evaluate: bool,
    everything: bool,
) -> None:
    from ddsweep.data.files import require_files
    from ddsweep.measuring import codes_of
    from ddsweep.report.attack_table import attack_matrix
    from ddsweep.report.console import report_console
    from ddsweep.report.data import remark_lines
    from ddsweep.report.labels import trial_columns, trial_labels
    from ddsweep.report.last_tables import print_last_tables
    from ddsweep.results.code import write_code
    from ddsweep.results.current import write_sweep_file
    from ddsweep.results.files import remove_leftovers
    from ddsweep.results.lock import SweepLock
    from ddsweep.spec import is_smoke, resolved_yaml

    console, labels = report_console(), trial_labels(plan.trials)
    fresh = not directory.root.exists()
    if fresh and not is_smoke(sweep.name):  # so all of it is to be done, and needs its data
        for dataset in dict.fromkeys(trial.dataset for trial in plan.trials):
            require_files(dataset, data_root)
    with drain.interruptible():
        from ddsweep.sweep.drain import Drained, Interrupted
        from ddsweep.sweep.live_view import Columns
        from ddsweep.sweep.observe import Board  # here: Ray takes seconds to import, missing files should not
        from ddsweep.sweep.runner import run_sweep

    directory.create()
    with SweepLock(directory.lock) as lock, drain.leftover(lock.release):
        remove_leftovers(directory.temporary)
        write_code(directory, codes_of(plan.trials, sweep.evaluate.spec()))
        for line in remark_lines(trial.dataset for trial in plan.trials):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if plan.dropped:
            console.print(
                f"dropped as impossible: {counted(len(plan.dropped), 'combination')} (see ddsweep plan)"
            )
        if plan.unjudged:
            console.print(
                f"left out as impossible: {counted(len(plan.unjudged), 'evaluation')} (see ddsweep plan)"
            )
        try:
            columns = Columns(*trial_columns(plan.trials))
            with Board(console, labels, plan.trials, columns) as board:
                outcome = run_sweep(
                    sweep,
                    plan.trials,
                    directory,
                    board,
                    drain,
                    data_root=data_root,
                    address=address,
                    seconds=_seconds(plan, sweep),
                    labels=labels,
                    only_evaluate=only_evaluate,
                    on_ready=lambda: write_sweep_file(
                        directory, resolved_yaml(sweep).encode(), [trial.trial_id for trial in plan.trials]
                    ),
                )
        except (UserError, Drained):
            if fresh and not directory.sweep_file.exists():
                shutil.rmtree(directory.root)  # ended before it began: leave nothing behind
            raise
        except Interrupted:
            console.print("stopped at once; the same command goes on from the last checkpoints")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    print_last_tables(console, directory, plan.trials, sweep.evaluate.spec(), everything=everything)
    try:
        picture = attack_matrix(directory, plan.trials, lambda path: None)
    except ResultsError as error:  # the sweep itself is over
        console.print(str(error), highlight=False)
        picture = None
    _print_outcome(console, outcome, directory)
    if picture is not None:
        console.print(f"Attacks: {picture}", highlight=False)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _print_outcome(console: Any, outcome: Any, directory: SweepDirectory) -> None:
    words = [f"{counted(outcome.done, 'trial')} done"]
    if outcome.stopped:
        words.append(f"{outcome.stopped} stopped by the scheduler (with scheduler=null they go on)")
    if outcome.failed:
        words.append(f"{outcome.failed} failed (ddsweep status {directory.root})")
    if outcome.left:
        words.append(f"{outcome.left} left: the same command goes on")
    console.print("; ".join(words), highlight=False)
    console.print(f"Tables: {directory.root}/{{trials,evals,history}}/*.parquet", highlight=False)
    console.print(f"Images: {directory.root}/artifacts/<trial>/grid.png", highlight=False)


@app.command()
def pretrain(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A pool file, or the name of one that comes with ddsweep, such as usps_lenet.",
            callback=_find("pool file"),
        ),
    ],
    settings: Overrides = None,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
    smoke: Smoke = False,
    address: Annotated[
        str | None, typer.Option(help="Join the Ray cluster at this address instead of starting one.")
    ] = None,
) -> None:
    """Train a pool of networks for `init: pretrained`. Ctrl-C drains; the same command goes on."""
    from ddsweep.sweep.drain import Drain

    with Drain() as drain:
        from ddsweep.pools.file import load_pool

        with drain.interruptible():
            pool = load_pool(file, settings or (), smoke=smoke)
        _pretrain(pool, _results_root(results), _root(data_root), address, drain)


def _pretrain_smoke(
    sweep: SweepSpec,
    files: Path,
    results: Path,
    data_root: Path | None,
    address: str | None,
    drain: Drain,
) -> None:
    """Make the tiny pools that the smoke version of a sweep names, from their files beside it."""
    from ddsweep.catalog import SMOKE
    from ddsweep.pools.file import load_pool

    searched = sweep.search.space.get("pool", {}).get("choice", []) if sweep.search else []
    named = [settings.get("pool") for settings in (sweep.base, *sweep.points)]
    for name in dict.fromkeys(map(str, [*named, *sweep.grid.get("pool", []), *searched])):
        file = files / f"{name.removesuffix(SMOKE)}.yaml"
        if name.endswith(SMOKE) and file.is_file():
            _pretrain(load_pool(file, smoke=True), results, data_root, address, drain)


def _pretrain(
    pool: PoolFile, results: Path, data_root: Path | None, address: str | None, drain: Drain
) -> None:
    from ddsweep.data.files import require_files, resolve_dataset
    from ddsweep.pools.file import load_pool, pool_yaml
    from ddsweep.report.console import report_console
    from ddsweep.report.data import remark_lines
    from ddsweep.report.pool import pool_lines
    from ddsweep.results.files import remove_leftovers, write_atomic
    from ddsweep.results.layout import PoolDirectory
    from ddsweep.results.lock import SweepLock
    from ddsweep.spec import is_smoke

    stand_in = is_smoke(pool.name)

    def dataset(value: Any) -> DatasetSpec:
        return resolve_dataset(value, data_root, stand_in=stand_in, say=_aside, may_run=True)

    recipe = pool.recipe(dataset)
    directory, console = PoolDirectory(results / "pools" / pool.name), report_console()
    if directory.pool_file.is_file():
        from ddsweep.pools.train import missing_groups  # here: a wrong file or missing data need no torch

        before = load_pool(directory.pool_file).recipe(dataset)
        if (before.recipe, before.train) != (recipe.recipe, recipe.train) or before.heldout > recipe.heldout:
            raise UserError(
                f"{directory.root} holds a pool of other settings ({directory.pool_file}); give this one "
                "another name, or remove the folder (heldout alone may grow)"
            )
        if before == recipe and directory.index.is_file() and not missing_groups(recipe, directory):
            for line in pool_lines(directory):
                console.print(line, highlight=False)
            return
    if not stand_in:
        require_files(recipe.dataset, data_root)
    for line in remark_lines([recipe.dataset]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    with drain.interruptible():
        from ddsweep.sweep.drain import Interrupted
        from ddsweep.sweep.pretrain import train_pool

    def ready() -> None:
        write_atomic(directory.pool_file, pool_yaml(pool).encode(), directory.temporary)

    directory.create()
    with SweepLock(directory.lock) as lock, drain.leftover(lock.release):
        remove_leftovers(directory.temporary)
        try:
            whole = train_pool(
                pool,
                recipe,
                directory,
                lambda line: console.print(line, highlight=False),
                drain,
                data_root=data_root,
                address=address,
                stand_in=stand_in,
                on_ready=ready,
            )
        except Interrupted:
            console.print("stopped at once; the same command goes on with the networks that are missing")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    if not whole:
        console.print("drained; the same command goes on with the networks that are missing")
        raise typer.Exit(EXIT_DRAINED)
    for line in pool_lines(directory):
        console.print(line, highlight=False)


@app.command()
def launch(
    file: SweepFile,
    settings: Overrides = None,
    site: SiteFile = None,
    mode: Annotated[
        str, typer.Option(help="cluster: one allocation, one Ray cluster. array: a job array, without Ray.")
    ] = "cluster",
    nodes: Annotated[int | None, typer.Option(help="Nodes (of an array: at a time).")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each.")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit: 90m, 4h, or 04:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Stay until the sweep is over, with its exit code.")
    ] = False,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
) -> None:
    """Run what is missing of a sweep as jobs of a cluster. The same command goes on where it was.

    KEY=VALUE are settings of the sweep, and with site. before them of the site file.
    """
    from ddsweep.sweep.drain import Drain, Drained

    with Drain() as drain:
        with drain.interruptible():
            from ddsweep.launch import start
            from ddsweep.report.console import report_console

            console = report_console()

            def say(text: str) -> None:
                console.print(text, highlight=False, markup=False, soft_wrap=True)

            flags = {
                "nodes": nodes,
                "gpus_per_node": gpus_per_node,
                "time": time,
                "partition": partition,
                "account": account,
            }
            request, planned, missing = _launch_request(
                file, settings or [], site, mode, flags, results, data_root, say
            )
            if dry_run:
                start.dry_run(request, planned, missing, say)
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


def _launch_request(
    file: Path,
    settings: Sequence[str],
    site: Path | None,
    mode: str,
    flags: Mapping[str, object],
    results: Path | None,
    data_root: Path | None,
    say: Callable[[str], None],
) -> tuple[Request, int, int]:
    """What is to be launched, how many trials are planned, and how many of them are missing. ``say`` is told
    what is noteworthy about their data."""
    from ddsweep.data.files import require_files
    from ddsweep.launch import start
    from ddsweep.launch.folder import MODES
    from ddsweep.launch.site import load_site
    from ddsweep.measuring import codes_of
    from ddsweep.report.data import remark_lines
    from ddsweep.report.status import trial_states
    from ddsweep.spec import check_strata, load_sweep

    if site is None:
        raise UserError("--site: name a site file, such as slurm/mine.yaml, or `local` for this machine")
    if mode not in MODES:
        raise UserError(f"--mode: {mode!r} is not one of {', '.join(MODES)}")
    if sys.platform != "linux":
        raise UserError("launch: jobs run on Linux only; `ddsweep run` is the way here")
    over = [item.removeprefix("site.") for item in settings if item.startswith("site.")]
    over += [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    place = load_site(site, over)
    device = [] if place.device is None else [f"resources.device={place.device}"]
    sweep = load_sweep(file, [*(item for item in settings if not item.startswith("site.")), *device])
    root, directory = _root(data_root), _sweep_directory(sweep, results)
    plan = _expand(sweep, directory, root, file.parent / "pools")
    check_strata(sweep.name, sweep.scheduler, plan.trials)
    stay = sweep.scheduler is not None
    states = trial_states(directory, plan.trials, sweep.evaluate.spec(), stopped_stay=stay)
    missing = [trial for trial in plan.trials if states[trial.trial_id] == "missing"]
    for dataset in dict.fromkeys(trial.dataset for trial in missing):
        require_files(dataset, root)
    for line in remark_lines(trial.dataset for trial in missing):
        say(line)
    start.check_fits(sweep, plan.trials, place, mode)
    shares: list[list[str]] = []
    if mode == "array":
        from ddsweep.launch.array import deal
        from ddsweep.trial import is_distilled

        to_distil = [trial for trial in missing if not is_distilled(trial, directory)]
        shares = deal(to_distil, _seconds(plan, sweep), place.array_tasks)
    own = codes_of(plan.trials, sweep.evaluate.spec())
    request = start.Request(sweep, directory, place, site, mode, root, shares, tuple(states), own)
    return request, len(plan.trials), len(missing)


@app.command()
def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A sweep file, or its name: are its data there?",
            callback=_find("sweep file"),
        ),
    ] = None,
    site: SiteFile = None,
    patience: Annotated[
        float, typer.Option(help="Seconds that the short job on the nodes may wait in the queue.")
    ] = 60.0,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
) -> None:
    """Look for what goes wrong, one line each: on this machine, or with a Slurm site on its nodes too."""
    from rich.text import Text

    from ddsweep.launch.doctor import examine
    from ddsweep.launch.site import load_site
    from ddsweep.report.console import report_console
    from ddsweep.spec import load_sweep

    place = None if site is None else load_site(site)
    sweep = None if file is None else load_sweep(file)
    console, failed = report_console(), False
    colours = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    for finding in examine(place, _results_root(results), _root(data_root), sweep, patience):
        line = Text(f"{finding.state:<4} ", style=colours[finding.state])
        console.print(line + Text(f"{finding.name}: {finding.text}", style="default"), soft_wrap=True)
        failed = failed or finding.state == "FAIL"
    if failed:
        raise typer.Exit(1)


@app.command()
def cancel(
    directory: ResultsDir,
    grace: Annotated[float, typer.Option(help="Seconds in which what runs may drain.")] = 60.0,
) -> None:
    """End the jobs of a launched sweep: what runs drains first. Launching it again goes on."""
    from ddsweep.launch.watch import cancel as end
    from ddsweep.launch.watch import latest

    end(latest(_existing(directory)), grace, typer.echo)


@app.command()
def logs(
    directory: ResultsDir,
    job: Annotated[str | None, typer.Option(help="Of this job only: 123, or 123_4 of an array.")] = None,
    lines: Annotated[int, typer.Option(help="Lines of each, from the end.")] = 40,
) -> None:
    """The ends of the logs of a sweep's last launch, the newest log last."""
    from ddsweep.launch.slurm import log_tail
    from ddsweep.launch.watch import latest, log_files

    folder = latest(_existing(directory))
    files = log_files(folder, job)
    if not files:
        typer.echo(f"{folder.logs}: no logs yet{f' of job {job}' if job else ''}")
    for path in files:
        typer.echo(f"==> {path} <==")
        for line in log_tail(path, lines):
            typer.echo(line)


@app.command()
def status(directory: ResultsDir, watch: Watch = None, data_root: DataRoot = None) -> None:
    """How far a sweep is, from its files alone: works while it runs, after it, and from another machine."""
    from ddsweep.data.files import resolve_dataset
    from ddsweep.launch.watch import launch_lines
    from ddsweep.report.console import report_console
    from ddsweep.report.status import status as read_status
    from ddsweep.report.status import status_table
    from ddsweep.report.sweep_file import asked_of

    found, root = _existing(directory), _root(data_root)
    asked = asked_of(found, lambda value: resolve_dataset(value, root))
    console = report_console()
    while True:
        state = read_status(found, asked.trials, asked.evaluation, asked.note, asked.scheduler)
        if watch is not None:
            console.clear()  # of a terminal; elsewhere one state follows the other
        console.print(status_table(state))
        for line in launch_lines(found):
            console.print(line, highlight=False, markup=False)
        if watch is None or state.driver is None:
            return
        time.sleep(watch)


@app.command("settings")
def show_settings(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            autocompletion=completions.names_of_settings,
            help="A setting such as outer_lr, a section such as evaluate, pool or site, a network, or a data "
            "set; left out, an overview.",
        ),
    ] = None,
) -> None:
    """What can be set, in which words, and what it means: settings, networks and data sets."""
    from ddsweep.launch.site import Site
    from ddsweep.report.console import report_console
    from ddsweep.report.settings_page import settings_page

    report_console().print(settings_page(name, {"site": Site}))


@app.command()
def show(
    trial: Annotated[
        str,
        typer.Argument(
            metavar="TRIAL", help="A trial id, or how it begins.", autocompletion=completions.trials
        ),
    ],
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Results of its sweep; left out, all sweeps are searched."),
    ] = None,
    results: ResultsRoot = None,
) -> None:
    """One trial: its settings, its curve, its accuracy beside the baselines, and where its picture is."""
    from ddsweep.report.console import report_console
    from ddsweep.report.show import find_trial
    from ddsweep.report.show import show as render

    root = _results_root(results)
    places = [directory] if directory else sorted(path.parent for path in root.glob("*/sweep.yaml"))
    if not places:
        raise UserError(
            f"{root}: no results of any sweep; name the folder (ddsweep show TRIAL DIR) or --results"
        )
    found, trial_id = find_trial([_existing(place) for place in places], trial)
    report_console().print(render(found, trial_id))


@app.command()
def best(
    directory: ResultsDir,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="SETTING,...",
            help="Answer once for each value of these (default: data set, network, init, images per class).",
        ),
    ] = None,
) -> None:
    """The best setting of each kind, chosen on validation, and what it is worth on test."""
    from ddsweep.report.best import best_lines

    names = None if by is None else [name.strip() for name in by.split(",") if name.strip()]
    for line in best_lines(_read_results(directory), names):
        typer.echo(line)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Results of one sweep.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Results of another.")],
) -> None:
    """Two sweeps: which settings differ, and how accuracy moved on the networks that both have."""
    from ddsweep.report.compare import compare_lines

    for line in compare_lines((str(first), str(second)), *map(_read_results, (first, second))):
        typer.echo(line)


@app.command()
def prune(
    directory: ResultsDir,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; left out, they are only shown.")] = False,
    data_root: DataRoot = None,
) -> None:
    """Show the trials that the sweep file no longer has, and with --yes remove all that they left."""
    from ddsweep.data.files import resolve_dataset
    from ddsweep.report.console import report_console
    from ddsweep.report.leftover_table import leftover_table
    from ddsweep.report.sweep_file import asked_of
    from ddsweep.results.current import current_ids
    from ddsweep.results.leftover import leftovers, remove
    from ddsweep.results.lock import SweepLock

    found, root, console = _existing(directory), _root(data_root), report_console()
    with SweepLock(found.lock) if yes else nullcontext():
        asked = asked_of(found, lambda value: resolve_dataset(value, root))
        ids = current_ids(found) if asked.trials is None else [trial.trial_id for trial in asked.trials]
        if ids is None:
            raise UserError(f"{directory}: it cannot be told which trials the sweep has; {asked.note}")
        trials = leftovers(found, ids)
        if not trials:
            console.print("sweep.yaml has all trials that are here: nothing to remove")
            return
        console.print(leftover_table(trials))
        if yes:
            remove(found, trials)
    said = "removed" if yes else f"nothing is removed yet; `ddsweep prune {directory} --yes` removes them"
    console.print(said, highlight=False, soft_wrap=True)


@app.command()
def collect(directory: ResultsDir) -> None:
    """Compact the parts of each table into one file under tables/. The parts stay."""
    from ddsweep.results.collect import compact

    found = _existing(directory)
    for name, rows in compact(found).items():
        typer.echo(f"{found.table(name)}: {counted(rows, 'row')}")


@data_app.command("list")
def data_list(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="A sweep file: look at the data sets that it names.",
            callback=_find("sweep file"),
        ),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """The data sets of the catalog, and your own in the data root: what they are, and which are here."""
    from ddsweep.data.files import list_datasets
    from ddsweep.data.own import list_own, list_values
    from ddsweep.report.console import report_console
    from ddsweep.report.data import dataset_table
    from ddsweep.spec import load_sweep

    root = _root(data_root)
    if file is None:
        rows = [*list_datasets(root), *list_own(root, _aside)]
    else:
        rows = list_values(load_sweep(file).datasets(), root, _aside)
    console = report_console()
    console.print(dataset_table(rows))
    for row in rows:
        for remark in row.remarks:
            console.print(f"{row.name}: {remark}", highlight=False, markup=False, soft_wrap=True)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A data set of the catalog, or alexnet-imagenet.",
            autocompletion=completions.data_sets,
        ),
    ],
    data_root: DataRoot = None,
) -> None:
    """Download a data set, or the weights of AlexNet, into the data root: the only command that downloads."""
    from ddsweep.data.fetch import fetch

    typer.echo(f"{name}: {fetch(name, _root(data_root))}")


# ------------------------------------------------------------------------------------- entry point


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 all done (or stopped by the scheduler), 1 bad input (a message, never
    a traceback), 2 some trials failed, 75 drained before the end, 130 interrupted twice."""
    leave(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    from typer.exceptions import Abort, TyperException

    if sys.platform == "win32":
        typer.echo(f"ddsweep: {NOT_ON_WINDOWS}", err=True)
        return 1
    from ddsweep.sweep.drain import Drained, Interrupted

    try:
        given = [_at_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]
        code = app(given, prog_name="ddsweep", standalone_mode=False)
    except UserError as error:
        typer.echo(f"ddsweep: {error}", err=True)
        return 1
    except TyperException as error:
        _print_usage_error(error)
        return 1
    except Drained as drained:
        typer.echo(f"ddsweep: {drained}", err=True)
        return EXIT_DRAINED
    except (Abort, KeyboardInterrupt, Interrupted):
        return EXIT_INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            if not error.code:  # completions were printed
                return 0
            raise
        # ddsweep ... | head: rich turns the first into the second
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere
        return 0
    except Exception as error:
        from ddsweep.results.files import full_disk

        told = full_disk(error, Path.cwd())
        if told is None:
            raise
        typer.echo(f"ddsweep: {told}", err=True)
        return 1
    return code if isinstance(code, int) else 0


def _at_home(word: str) -> str:
    """``~/x`` and ``--option=~/x`` with the home folder that is meant, as a shell has it where it looks."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{user_path(value)}" if value.startswith("~") else word


def _print_usage_error(error: Any) -> None:
    text = error.format_message()
    if not text:  # no command at all: the help was printed
        return
    context = getattr(error, "ctx", None)
    where = f"{context.command_path}: " if context is not None else "ddsweep: "
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    typer.echo(f"{where}{text}{hint}", err=True)
