"""The tables at the end of a run: its trials beside their baselines, of many trials the best of each kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console

from ddsweep.catalog import EvaluationSpec, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.errors import ResultsError
from ddsweep.report.attack_table import attack_table
from ddsweep.report.choice import choose
from ddsweep.report.console import MOST_LISTED
from ddsweep.report.settings import KIND, heading, key_of, settings_of, varying
from ddsweep.report.summary import ALWAYS_SHOWN, networks_note, summarise, trial_row
from ddsweep.report.summary_table import summary_table
from ddsweep.report.transfer_table import transfer_table
from ddsweep.results.coverage import networks_judged
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import OnTorn

__all__ = ["best_of_each_kind", "print_last_tables"]

FEW = 10
"""Up to so many trials, the last table shows all."""

_MOST_KINDS = 30
_MOST_READ = 10_000
"""The best are looked for among the first so many rows."""


def print_last_tables(
    console: Console,
    directory: SweepDirectory,
    trials: Sequence[TrialSpec],
    evaluation: EvaluationSpec,
    *,
    everything: bool = False,
) -> None:
    """Print the tables of the finished ``trials`` on ``console``. Of more than `FEW` it shows the best by
    ``val_score`` of each kind, unless ``everything`` is asked for."""
    torn: list[Any] = []
    ended = [trial for trial in trials if directory.trials_part(trial.trial_id).exists()]
    listed, note = ended[:MOST_LISTED], ""
    always: tuple[str, ...] = ALWAYS_SHOWN
    if len(ended) > len(listed):
        note = f"These are the first {len(listed)} of {len(ended)}; the Parquet tables have them all."
    if not everything and len(ended) > FEW:
        listed, note = _chosen(directory, trials, len(ended), torn.append)
        # Also the settings that the best have in common, because the others differ in them.
        always = (*ALWAYS_SHOWN, *varying([settings_of(trial) for trial in ended]))
    ids = [trial.trial_id for trial in listed]
    summaries = summarise(directory, ids, on_torn=torn.append, always=always)
    for path in dict.fromkeys(torn):
        console.print(f"{path}: torn, left out; run the sweep again to redo it", soft_wrap=True)
    if summaries:
        console.print(summary_table(summaries, console.width))
    if differing := networks_note(_heldout(directory, ended[:_MOST_READ])):
        console.print(differing, style="yellow", soft_wrap=True)
    if note:
        console.print(note, soft_wrap=True)
    # Torn parts have been named already.
    transferred = transfer_table(directory, listed, evaluation, lambda path: None, console.width)
    for table in (transferred, attack_table(directory, listed, lambda path: None)):
        if table is not None:
            console.print()
            console.print(table)


def _heldout(directory: SweepDirectory, trials: Sequence[TrialSpec]) -> Iterator[int | None]:
    """By trial, the number of held-out networks that it was judged on."""
    known = KnownParts.load(directory)
    for trial in trials:
        with suppress(ResultsError):  # a torn part, which has been named
            yield networks_judged(directory, trial.trial_id, known, fixed=trial.init == "fixed")


def _chosen(
    directory: SweepDirectory, trials: Sequence[TrialSpec], ended: int, on_torn: OnTorn
) -> tuple[list[TrialSpec], str]:
    """The trials that are listed, and sentences about the choice. Of the seeds of a setting it is the first:
    the best of them would be the lucky one."""
    best, names = best_of_each_kind(directory, trials[:_MOST_READ], on_torn)
    seeds = len({trial.seed for trial in trials}) > 1
    what = f"best by val_score{' (mean over seeds)' if seeds else ''}"
    if names:
        what += f" for each {', '.join(map(heading, names))}"
    if seeds:
        what += ", its first seed"
    if len(best) > _MOST_KINDS:
        what += f", the first {_MOST_KINDS} of {len(best)}"
    note = f"{counted(ended, 'trial')} came to an end; shown: {what}"
    if len(trials) > _MOST_READ:
        note += f", among the first {_MOST_READ}"
    more = f" Over all seeds: ddsweep best {directory.root}" if seeds else ""
    return best[:_MOST_KINDS], f"{note}. All of them: ddsweep eval {directory.root} --all{more}"


def best_of_each_kind(
    directory: SweepDirectory, trials: Sequence[TrialSpec], on_torn: OnTorn
) -> tuple[list[TrialSpec], list[str]]:
    """(of each kind, the first seed of the best setting, in their order; the settings that tell kinds
    apart). See `choose`."""
    settings = {trial.trial_id: settings_of(trial) for trial in trials}
    names = [name for name in KIND if len({repr(own[name]) for own in settings.values()}) > 1]
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for trial in trials:
        own = settings[trial.trial_id]
        row = trial_row(directory, trial.trial_id, on_torn)
        begun = row is not None or directory.failure_part(trial.trial_id).exists()
        state = {"status": "failed" if begun else "missing", "val_score": None, **(row or {})}
        told = {name: state[name] for name in ("status", "val_score")}
        kinds[key_of(own, names)].append({**own, **told, "trial_id": trial.trial_id})
    choices = [choose(rows, all_known=True) for rows in kinds.values()]
    first = {choice.trials[0]["trial_id"] for choice in choices if choice is not None}
    return [trial for trial in trials if trial.trial_id in first], names
