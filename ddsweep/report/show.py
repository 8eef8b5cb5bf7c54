"""One trial, with all that its files tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ddsweep.catalog.numbers import counted
from ddsweep.errors import ResultsError, UserError
from ddsweep.report.console import bare_table
from ddsweep.report.curve import sparkline
from ddsweep.report.formats import NONE, duration, percent, plain, size
from ddsweep.report.settings import changed, lacks, settings_of_row
from ddsweep.report.status import STYLES, StateReader, TrialStatus, read_history
from ddsweep.report.summary import NEIGHBOUR, Accuracy, eval_rows, measured, trial_row
from ddsweep.report.summary_table import BASELINE_NAMES, gain_text
from ddsweep.report.sweep_file import Resolve, asked_of, from_catalog
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import live_holder
from ddsweep.results.statistics import mean_std_ci, paired_difference

__all__ = ["find_trial", "show"]

_LISTED = 10
_ON = {"as_distilled": "as distilled", "on_random": "on random networks"}

Rows = Sequence[Mapping[str, Any]]


def find_trial(
    directories: Sequence[SweepDirectory], prefix: str, resolve: Resolve = from_catalog
) -> tuple[SweepDirectory, str]:
    """The one trial whose id begins with ``prefix``, and its sweep.

    A sweep with files of the trial goes before one that only asks for it. Raises `ResultsError`, listing
    candidates, if no id or several begin like that, and if the trial is in several sweeps; and the
    `UserError` of a sweep file that cannot be read, if no other sweep has such a trial.
    """
    homes: dict[str, list[SweepDirectory]] = defaultdict(list)
    asked: dict[str, list[SweepDirectory]] = defaultdict(list)
    wrong: UserError | None = None
    for directory in directories:
        for trial_id in directory.seen_trials():
            homes[trial_id].append(directory)
        try:
            trials = asked_of(directory, resolve).trials or ()
        except UserError as error:
            wrong = wrong or error
            continue
        for trial in trials:
            asked[trial.trial_id].append(directory)
    places = {**asked, **homes}
    if wrong is not None and not any(trial_id.startswith(prefix) for trial_id in places):
        raise wrong
    trial_id = _only(prefix, list(places))
    found = places[trial_id]
    if len(found) > 1:
        listed = ", ".join(str(directory.root) for directory in found)
        raise ResultsError(
            f"trial {trial_id} is in {len(found)} sweeps: {listed}; name one of them "
            f"(ddsweep show {trial_id} {found[0].root})"
        )
    return found[0], trial_id


def _only(prefix: str, trial_ids: Sequence[str]) -> str:
    found = [trial_id for trial_id in trial_ids if prefix and trial_id.startswith(prefix)]
    if prefix in found:
        return prefix
    if len(found) == 1:
        return found[0]
    candidates = found or list(trial_ids)
    listed = ", ".join(candidates[:_LISTED])
    more = f" and {len(candidates) - _LISTED} more" if len(candidates) > _LISTED else ""
    if found:
        raise ResultsError(
            f"{prefix!r} is the beginning of {len(found)} trials: {listed}{more}; give more of it"
        )
    order = "; the trial comes before the folder: ddsweep show TRIAL SWEEP" if "/" in prefix else ""
    raise ResultsError(f"no trial begins with {prefix!r}; trials are {listed or 'none yet'}{more}{order}")


def show(directory: SweepDirectory, prefix: str, resolve: Resolve = from_catalog) -> RenderableType:
    """The trial whose id begins with ``prefix``: settings, state, curve, accuracy at each inner step and
    against each baseline, cost, where it was made, and its files.

    ``resolve`` is needed to find trials without files. Raises `ResultsError` for a prefix of no trial or of
    several, and for a folder without a sweep.
    """
    asked = asked_of(directory, resolve)
    trials = {trial.trial_id: trial for trial in asked.trials or ()}
    trial_id = _only(prefix, list(dict.fromkeys([*trials, *directory.seen_trials()])))
    torn: list[Path] = []
    row = trial_row(directory, trial_id, torn.append)
    reader = StateReader(directory, asked.evaluation, live_holder(directory.lock), torn)
    now = reader.status(trial_id, trials.get(trial_id))
    settings = now.settings or (settings_of_row(row) if row else {})
    parts: list[RenderableType] = [_head(now, row)]
    if now.message:
        parts.append(Text(now.message, "red"))
    if trials and trial_id not in trials:
        parts.append(Text("no longer in the sweep file", "yellow"))
    parts += _section("settings", _settings(settings, asked.note))
    if history := read_history(directory, trial_id, torn):
        parts += _section("curve", _curve(history, row))
    if row:
        evals = eval_rows(directory, row, torn.append)
        parts += _section(
            "test accuracy in % (mean ± standard deviation over networks)", _accuracy(row, evals)
        )
        parts += _section(
            "baselines (gain: distilled - baseline on the same networks, ± its 95 % interval)",
            _baselines(row, evals),
        )
        parts += _section("cost", _pairs(_cost(row)))
        parts += _section("made", _pairs(_provenance(row)))
    parts += _section("files", _pairs(_files(directory, trial_id)))
    parts += [
        Text(f"torn part, to be made again by `ddsweep run`: {path}", "red") for path in dict.fromkeys(torn)
    ]
    return Group(*parts)


def _section(title: str, content: RenderableType | None) -> list[RenderableType]:
    return [] if content is None else [Text(), Text(title, "bold"), Padding(content, (0, 0, 0, 2))]


def _pairs(items: Sequence[tuple[str, str]]) -> Table | None:
    if not items:
        return None
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in items:
        table.add_row(Text(name, "dim"), Text(value, overflow="fold"))
    return table


# ------------------------------------------------------------------------------------------ pieces


def _head(now: TrialStatus, row: Mapping[str, Any] | None) -> Text:
    steps = f"{now.outer_step}/{now.outer_steps}" if now.outer_steps else str(now.outer_step)
    text = Text.assemble("trial ", (now.trial_id, "bold"), ": ", (now.state, STYLES[now.state]))
    text.append(f", outer step {steps}")
    if row and row["test_accuracy_mean"] is not None:
        spread = percent(row["test_accuracy_mean"], row["test_accuracy_std"])
        count = row["test_models"]
        text.append(f", test accuracy {spread} % on {count} network{'' if count == 1 else 's'}")
    return text


def _settings(settings: Mapping[str, Any], note: str | None) -> RenderableType:
    if not settings:
        return Text(
            f"unknown: {note}" if note else "unknown: not in the sweep file, and not evaluated", "yellow"
        )
    first = changed(settings)
    rest = ", ".join(
        f"{name} {plain(value)}"
        for name, value in settings.items()
        if name not in first and not lacks(settings, name)
    )
    pairs = _pairs([(name, plain(settings[name])) for name in first])
    return Group(*([pairs] if pairs else []), Text(f"as by default: {rest}", "dim"))


def _curve(history: Rows, row: Mapping[str, Any] | None) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, title in (("outer_loss", "outer loss"), ("val_score", "val. score")):
        # The score is measured at a few steps only; a null loss was not finite.
        values = [row[name] for row in history if name == "outer_loss" or row[name] is not None]
        finite = [value for value in values if value is not None]
        if finite:
            ends = f"{finite[0]:.4g} → {finite[-1]:.4g}" if len(finite) > 1 else f"{finite[0]:.4g}"
            table.add_row(Text(title, "dim"), sparkline(values), ends)
    first, last = history[0]["outer_step"], history[-1]["outer_step"]
    # A row of the history is of one step only, and not all steps are logged; the trial has the total.
    total = row["n_skipped"] if row else None
    skipped = sum(item["n_skipped"] or 0 for item in history) if total is None else total
    where = " at logged steps" if total is None else ""
    note = f"outer steps {first} to {last}, {duration(history[-1]['seconds'])}"
    table.add_row(
        "", Text(note + (f", {counted(skipped, 'network')} skipped{where}" if skipped else ""), "dim")
    )
    return table


def _accuracy(row: Mapping[str, Any], evals: Rows) -> Table | None:
    rows = [item for item in evals if item["source"] == "distilled"]
    protocols = [p for p in _ON if any(item["protocol"] == p for item in rows)]
    if not protocols:
        return None
    table = bare_table(header_style="dim")
    table.add_column("inner step")
    for protocol in protocols:
        table.add_column(_ON[protocol], justify="right")
    attack = row["objective"] == "attack"
    for title in ("fooled", "other classes") if attack else ():
        table.add_column(title, justify="right")
    for step in sorted({item["inner_step"] for item in rows if item["protocol"] in _ON}):
        found = [measured(_at(rows, protocol, step)) for protocol in protocols]
        own = _at(rows, "as_distilled", step)
        more = [_of_attack(own, name) for name in ("attack_success", "accuracy_other")] if attack else []
        table.add_row(_step_name(step, row), *map(_with_count, found), *more)
    tuned = {p: [item for item in rows if item["protocol"] == f"{p}_tuned"] for p in protocols}
    for step in sorted({item["inner_step"] for found in tuned.values() for item in found}):
        at = [[item for item in tuned[p] if item["inner_step"] == step] for p in protocols]
        more = [_of_attack(at[0], name) for name in ("attack_success", "accuracy_other")] if attack else []
        table.add_row(f"{step}, tuned", *(_with_count(measured(found)) for found in at), *more)
    return table


def _of_attack(rows: Rows, measure: str) -> str:
    mean, std, _ = mean_std_ci([item[measure] for item in rows]) if rows else (None, None, None)
    return NONE if mean is None else percent(mean, std)


def _at(rows: Rows, protocol: str, step: int) -> list[Mapping[str, Any]]:
    return [item for item in rows if item["protocol"] == protocol and item["inner_step"] == step]


def _step_name(step: int, row: Mapping[str, Any]) -> str:
    per_epoch, last = row["inner_steps"], row["inner_steps"] * row["inner_epochs"]
    if step == 0:
        return "0, untrained" if row["pool"] is None else "0, before"
    if step == last:
        return f"{step} = T"
    if step > last:
        return f"{step}, beyond T"
    return f"{step}, epoch {step // per_epoch}" if step % per_epoch == 0 else str(step)


def _with_count(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return NONE
    diverged = f", {accuracy.n_diverged} diverged" if accuracy.n_diverged else ""
    return f"{percent(accuracy.mean, accuracy.std)} (n = {accuracy.n}{diverged})"


def _baselines(row: Mapping[str, Any], evals: Rows) -> Table | None:
    """A line for each baseline and protocol, with distilled - baseline on the same networks."""
    last = row["inner_steps"] * row["inner_epochs"]
    ours = [item for item in evals if item["source"] == "distilled"]
    table = bare_table(header_style="dim")
    for title in ("baseline", "networks", "steps", "rate"):
        table.add_column(title)
    table.add_column("accuracy", justify="right")
    table.add_column("gain", justify="right")
    for protocol, where in _ON.items():
        for source, name in BASELINE_NAMES.items():
            for kind, extra in ((protocol, ""), (f"{protocol}_tuned", " tuned"), (NEIGHBOUR, "")):
                rows = [item for item in evals if item["source"] == source and item["protocol"] == kind]
                # A set without learned rates is tuned as well; one with learned rates is as it is.
                own = [item for item in ours if item["protocol"] == kind] if extra else []
                if not rows or (kind == NEIGHBOUR and protocol != "as_distilled"):
                    continue
                if kind == NEIGHBOUR:
                    table.add_row(name, "none", "", "", _with_count(measured(rows)), "")
                    continue
                table.add_row(
                    name + extra,
                    where,
                    str(rows[0]["inner_step"]),
                    plain(rows[0]["inner_lr"]),
                    _with_count(measured(rows)),
                    gain_text(paired_difference(own or _at(ours, protocol, last), rows)),
                )
    return table if table.row_count else None


def _cost(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    items = [
        ("wall", duration(row["wall_seconds"])),
        ("CPU", duration(row["cpu_seconds"])),
        ("GPU", duration(row["gpu_seconds"]) if row["gpu_seconds"] else NONE),
        ("peak memory", size(row["peak_memory_bytes"])),
        ("distilled set", size(row["distilled_bytes"])),
    ]
    return [(name, value) for name, value in items if value != NONE]


def _provenance(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    where = [f"{row['host']}", f"{row['device']} ({row['device_name']})", _threads(row["threads"])]
    names = (("ddsweep", "ddsweep_version"), ("Python", "python_version"), ("torch", "torch_version"))
    versions = [f"{name} {row[column]}" for name, column in (*names, ("ray", "ray_version")) if row[column]]
    commit = (
        None if row["git_commit"] is None else row["git_commit"] + (" (changed)" if row["git_dirty"] else "")
    )
    times = [_time(row["started_at"]), _time(row["ended_at"])]
    counts = {"resumed": "n_resumed", "torn checkpoints": "n_torn_checkpoints", "out of memory": "n_replans"}
    again = [(name, row[column]) for name, column in counts.items()]
    items = [
        ("on", ", ".join(where) if row["host"] else None),
        ("when", " to ".join(times) if row["started_at"] else None),
        ("with", ", ".join(versions) or None),
        ("commit", commit),
        ("data", row["dataset_fingerprint"] and _data(row)),
        ("distilled sha256", row["distilled_sha256"]),
        *((name, str(count)) for name, count in again if count),
    ]
    return [(name, value) for name, value in items if value]


def _threads(count: int | None) -> str:
    return f"{plain(count)} thread{'' if count == 1 else 's'}"


def _data(row: Mapping[str, Any]) -> str:
    parts = [row["dataset"]]
    if row.get("dataset_shape"):
        parts.append(f"images {row['dataset_shape']}")
    if row.get("n_test_in_train"):
        parts.append(f"{row['n_test_in_train']:,} of its test images in train too")
    parts.append(f"fingerprint {row['dataset_fingerprint']}")
    return ", ".join(parts + ["a stand-in for the real data"] * bool(row["dataset_stand_in"]))


def _time(moment: datetime | None) -> str:
    return NONE if moment is None else f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _files(directory: SweepDirectory, trial_id: str) -> list[tuple[str, str]]:
    paths = {
        "picture": directory.grid(trial_id),
        "distilled set": directory.distilled(trial_id),
        "checkpoint": directory.checkpoint(trial_id),
    }
    there = [(name, str(path)) for name, path in paths.items() if path.exists()]
    return there or [("none yet", str(directory.artifacts(trial_id)))]
