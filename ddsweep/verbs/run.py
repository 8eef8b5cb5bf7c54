"""The verbs that work: `run` and `eval`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ddsweep.errors import EXIT_INTERRUPTED, UserError
from ddsweep.verbs.arguments import (
    Address,
    DataRoot,
    EvalOverrides,
    Everything,
    Overrides,
    ResultsDir,
    ResultsRoot,
    Smoke,
    SweepFile,
    Track,
)
from ddsweep.verbs.inputs import (
    data_folder,
    estimated_seconds,
    existing,
    expand_sweep,
    expander,
    results_root,
    sweep_directory,
)
from ddsweep.verbs.pretrain import pretrain_smoke
from ddsweep.verbs.track import told_of, tracking_folder

if TYPE_CHECKING:
    from ddsweep.catalog import TrialSpec
    from ddsweep.results.layout import SweepDirectory
    from ddsweep.spec import Plan, Proposed, SweepSpec
    from ddsweep.sweep.drain import Drain

__all__ = ["evaluate", "run"]


def run(
    file: SweepFile,
    settings: Overrides = None,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
    smoke: Smoke = False,
    address: Address = None,
    everything: Everything = False,
    track: Track = None,
) -> None:
    """Run what is missing of a sweep. Ctrl-C drains; the same command goes on where it was."""
    from ddsweep.sweep.drain import Drain

    with Drain() as drain:
        from ddsweep.results.proposals import read_proposals
        from ddsweep.spec import check_strata, load_sweep
        from ddsweep.sweep.tpe import require_optuna

        with drain.interruptible():
            sweep = load_sweep(file, settings or (), smoke=smoke)
            require_optuna(sweep)
            root, directory = data_folder(data_root), sweep_directory(sweep, results)
        if smoke:
            pretrain_smoke(sweep, file.parent / "pools", results_root(results), root, address, drain)
        with drain.interruptible():
            expand = expander(sweep, directory, root, file.parent / "pools")
            plan = expand(read_proposals(directory))
            check_strata(sweep.name, sweep.scheduler, plan.trials)
        _run(_Work(sweep, plan, expand, directory, root, address, everything, track or ()), drain)


def evaluate(
    directory: ResultsDir,
    settings: EvalOverrides = None,
    data_root: DataRoot = None,
    address: Address = None,
    everything: Everything = False,
    track: Track = None,
) -> None:
    """Evaluate the distilled sets of a sweep again (evaluate.networks=200), without distilling."""
    from ddsweep.sweep.drain import Drain

    with Drain() as drain:
        from ddsweep.spec import load_sweep

        with drain.interruptible():
            found = existing(directory)
            for setting in settings or ():
                if not setting.startswith("evaluate.") and not setting.startswith("resources."):
                    raise UserError(
                        f"{setting!r}: eval changes evaluate.* (and resources.*) only; trials stay as they "
                        "are"
                    )
            sweep = load_sweep(found.sweep_file, settings or ())
            root = data_folder(data_root)
            plan = expand_sweep(sweep, found, root)
        _run(_Work(sweep, plan, None, found, root, address, everything, track or ()), drain)


@dataclass(frozen=True)
class _Work:
    """What is to be run, and where. ``everything``: the last tables show every trial. ``track`` are trackers.
    ``expand`` makes plans from the proposals of a guided search; without it only what is
    distilled is evaluated."""

    sweep: SweepSpec
    plan: Plan
    expand: Callable[[Proposed], Plan] | None
    directory: SweepDirectory
    data_root: Path | None
    address: str | None
    everything: bool
    track: Sequence[str]


def _run(work: _Work, drain: Drain) -> None:
    """Run what is missing of the plan, and what a guided search proposes."""
    from ddsweep.catalog.numbers import counted
    from ddsweep.data.files import require_files
    from ddsweep.measuring import codes_of
    from ddsweep.report.attack_table import attack_matrix
    from ddsweep.report.console import report_console
    from ddsweep.report.data import remark_lines
    from ddsweep.report.labels import trial_columns, trial_labels
    from ddsweep.report.last_tables import print_last_tables
    from ddsweep.results.code import write_code, write_sets
    from ddsweep.results.current import write_sweep_file
    from ddsweep.results.files import remove_leftovers
    from ddsweep.results.lock import LOST, SweepLock
    from ddsweep.spec import is_smoke, resolved_yaml
    from ddsweep.trackers.beside import tracked

    sweep, plan, expand, directory = work.sweep, work.plan, work.expand, work.directory
    console = report_console()
    fresh = not directory.root.exists()
    if fresh and not is_smoke(sweep.name):  # so all of it is to do, and needs its data
        for dataset in dict.fromkeys(trial.dataset for trial in plan.trials):
            require_files(dataset, work.data_root)
    with drain.interruptible():
        from ddsweep.sweep.drain import Drained, Interrupted
        from ddsweep.sweep.guide import Guide
        from ddsweep.sweep.live_view import Columns
        from ddsweep.sweep.observe import Board  # here: missing files are told before Ray's slow import
        from ddsweep.sweep.runner import Outcome, SweepRequest, run_sweep

    def run_plan(now: Plan, guide: Guide | None = None) -> Outcome:
        def ready() -> None:
            ids = [trial.trial_id for trial in (guide.plan if guide else now).trials]
            write_sweep_file(directory, resolved_yaml(sweep).encode(), ids)

        def announce(trials: Sequence[TrialSpec]) -> dict[str, float]:
            assert guide is not None
            write_code(directory, codes_of(trials, sweep.evaluate.spec()))
            known = guide.plan.trials
            board.add(trials, trial_labels(known), Columns(*trial_columns(known)))
            if work.track:
                told.update(told_of(known))
            return estimated_seconds(replace(guide.plan, trials=tuple(trials)), sweep)

        write_code(directory, codes_of(now.trials, sweep.evaluate.spec()))
        write_sets(directory, sweep.start_sets())
        labels, columns = trial_labels(now.trials), Columns(*trial_columns(now.trials))
        told = told_of(now.trials) if work.track else {}
        with (
            Board(console, labels, now.trials, columns) as board,
            tracked(work.track, directory, told, tracking_folder(directory.root), board.say),
        ):
            request = SweepRequest(
                *(sweep, now.trials, directory, work.data_root),
                *(estimated_seconds(now, sweep), labels),
                address=work.address,
                only_evaluate=expand is None,
                guide=guide,
                announce=announce,
            )
            return run_sweep(request, board, drain, on_ready=ready)

    directory.create()
    with (
        SweepLock(directory.lock, on_lost=lambda: drain.tell(LOST)) as lock,
        drain.leftover(lock.release),
    ):
        remove_leftovers(directory.temporary)
        for line in remark_lines(trial.dataset for trial in plan.trials):
            console.print(line, soft_wrap=True)
        if plan.dropped:
            console.print(
                f"dropped as impossible: {counted(len(plan.dropped), 'combination')} (see ddsweep plan)"
            )
        if plan.unjudged:
            console.print(
                f"left out as impossible: {counted(len(plan.unjudged), 'evaluation')} (see ddsweep plan)"
            )
        try:
            if expand is not None and plan.searches:
                guide = Guide(sweep, directory, expand)
                outcome = run_plan(guide.plan, guide)
                plan = guide.plan
            else:
                outcome = run_plan(plan)
        except (UserError, Drained):
            if fresh and not directory.sweep_file.exists():
                shutil.rmtree(directory.root)  # ended before it began: leave nothing behind
            raise
        except Interrupted:
            console.print("stopped at once; the same command goes on from the last checkpoints")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    picture = None
    try:
        print_last_tables(console, directory, plan.trials, sweep.evaluate.spec(), everything=work.everything)
        picture = attack_matrix(directory, plan.trials, lambda path: None)
    except UserError as error:  # the sweep itself is over
        console.print(str(error))
    _print_outcome(console, outcome, directory, plan.trials)
    if picture is not None:
        console.print(f"Attacks: {picture}")
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


_REASONS = 3
"""So many failed trials are explained at the end."""


def _print_outcome(
    console: Any, outcome: Any, directory: SweepDirectory, trials: Sequence[TrialSpec]
) -> None:
    from ddsweep.catalog.numbers import counted
    from ddsweep.report.status import failure_message

    failed = [trial for trial in trials if directory.failure_part(trial.trial_id).exists()]
    for trial in failed[:_REASONS]:
        said = f"failed {trial.trial_id}: {failure_message(directory, trial.trial_id)}"
        console.print(said, soft_wrap=True)
    words = [f"{counted(outcome.done, 'trial')} done"]
    if outcome.stopped:
        words.append(f"{outcome.stopped} stopped by the scheduler (with scheduler=null they go on)")
    if outcome.failed:
        words.append(f"{outcome.failed} failed (ddsweep status {directory.root})")
    if outcome.undistilled:
        words.append(f"{outcome.undistilled} not distilled: `ddsweep run` goes on with them")
    if outcome.left:
        words.append(f"{outcome.left} left: the same command goes on")
    console.print("; ".join(words))
    console.print(f"Tables: {directory.root}/{{trials,evals,history}}/*.parquet")
    console.print(f"Images: {directory.root}/artifacts/<trial>/grid.png")
