"""Every distilled set under every protocol: how much of it holds on other networks, orders and rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ddsweep.catalog import EvaluationSpec, TrialSpec
from ddsweep.errors import ResultsError
from ddsweep.report.console import PLAIN_WIDTH, bare_table, width_of
from ddsweep.report.formats import NONE, percent
from ddsweep.report.settings import setting_cells, setting_headings, settings_of, varying
from ddsweep.report.summary import Accuracy, measured
from ddsweep.results.coverage import each_once, is_evaluated, newest_last
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import OnTorn, read_rows
from ddsweep.results.schemas import EVALS

__all__ = ["transfer", "transfer_table"]

Transfer = dict[str, dict[str, Accuracy]]

_CAPTION = (
    "Test accuracy in % of the distilled sets under each protocol, after its last epoch: mean ± standard "
    "deviation over held-out networks (how many). Networks that diverged (div) count in the mean. "
    f"{NONE}: the protocol does not apply."
)


def transfer(
    directory: SweepDirectory, trials: Sequence[TrialSpec], evaluation: EvaluationSpec, on_torn: OnTorn
) -> Transfer:
    """``[trial id][protocol]``: the distilled set at the end of the epochs of each protocol of
    ``evaluation``, on all networks that were judged, asked for now or not.

    Trials that are not evaluated like this are left out, and so are parts that cannot be read (``on_torn``
    is called with each).
    """
    found: Transfer = {}
    parts, known = directory.evals_by_trial(), KnownParts.load(directory)
    for trial in trials:
        if not _evaluated(directory, trial, evaluation, known, parts.get(trial.trial_id, [])):
            continue
        asked = {
            (unit.protocol, evaluation.last_step(trial, unit.changes)) for unit in evaluation.units(trial)
        }
        by_protocol: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in each_once(read_rows(newest_last(parts.get(trial.trial_id, [])), EVALS, on_torn)):
            if row["source"] == "distilled" and (row["protocol"], row["inner_step"]) in asked:
                by_protocol[row["protocol"]].append(row)
        found[trial.trial_id] = {
            protocol: accuracy for protocol, rows in by_protocol.items() if (accuracy := measured(rows))
        }
    return found


def _evaluated(
    directory: SweepDirectory,
    trial: TrialSpec,
    evaluation: EvaluationSpec,
    known: KnownParts,
    paths: Sequence[Path],
) -> bool:
    """Whether the rows that ``evaluation`` asks for are there. An earlier protocol may have had the same
    name."""
    try:
        return is_evaluated(directory, trial, evaluation, known, paths)
    except ResultsError:
        return False


def transfer_table(
    directory: SweepDirectory,
    trials: Sequence[TrialSpec],
    evaluation: EvaluationSpec,
    on_torn: OnTorn,
    width: int = PLAIN_WIDTH,
) -> Table | None:
    """Trials x protocols; where that is wider than ``width`` columns, a line for each pair instead.

    None unless ``evaluation`` has a `ddsweep.catalog.Protocol` and a trial is evaluated so: what
    ``as_distilled`` and ``on_random`` have found is in the summary.
    """
    if all(isinstance(protocol, str) for protocol in evaluation.protocols):
        return None
    found = transfer(directory, trials, evaluation, on_torn)
    shown = [trial for trial in trials if found.get(trial.trial_id)]
    if not shown:
        return None
    names = ["as_distilled"]
    names += [p if isinstance(p, str) else p.name for p in evaluation.protocols if p != "as_distilled"]
    names = [name for name in names if any(name in found[trial.trial_id] for trial in shown)]
    table = _matrix(shown, names, found)
    if width_of(table) > width:
        table = _list(shown, names, found)
    table.caption, table.caption_justify, table.caption_style = _CAPTION, "left", "dim"
    return table


def _empty(trials: Sequence[TrialSpec]) -> tuple[Table, list[list[str]]]:
    """A table with columns for the trials, and what stands in them."""
    settings = [settings_of(trial) for trial in trials]
    names = varying(settings, ("network", "init"))
    table = bare_table()
    table.add_column("trial", no_wrap=True)
    for title in setting_headings(settings, names):
        table.add_column(title, overflow="fold")
    cells = setting_cells(settings, names)
    return table, [[trial.trial_id, *own] for trial, own in zip(trials, cells, strict=True)]


def _matrix(trials: Sequence[TrialSpec], names: Sequence[str], found: Transfer) -> Table:
    table, cells = _empty(trials)
    for name in names:
        # Breaks between changes: columns are as wide as their numbers where that is enough.
        title = name.replace(",", ",\n").replace("network=", "network=\n")
        table.add_column(title, justify="right", no_wrap=True)
    for trial, own in zip(trials, cells, strict=True):
        table.add_row(*own, *(_cell(found[trial.trial_id].get(name)) for name in names))
    return table


def _list(trials: Sequence[TrialSpec], names: Sequence[str], found: Transfer) -> Table:
    table, cells = _empty(trials)
    table.add_column("protocol", overflow="fold")
    table.add_column("accuracy", justify="right", no_wrap=True)
    for trial, own in zip(trials, cells, strict=True):
        there = [name for name in names if name in found[trial.trial_id]]
        for place, name in enumerate(there):
            start = own if place == 0 else [""] * len(own)
            table.add_row(*start, name, _cell(found[trial.trial_id][name]))
    return table


def _cell(accuracy: Accuracy | None) -> Text:
    if accuracy is None:
        return Text(NONE)
    diverged = f", {accuracy.n_diverged} div" if accuracy.n_diverged else ""
    return Text(f"{percent(accuracy.mean, accuracy.std)} ({accuracy.n}{diverged})")
