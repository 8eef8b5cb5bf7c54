"""Attacks: their success, and the accuracy on the other classes; a table, and a matrix of class pairs."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ddsweep.catalog import TrialSpec
from ddsweep.report.console import bare_table
from ddsweep.report.formats import NONE, percent
from ddsweep.report.summary import eval_rows, trial_row
from ddsweep.report.summary_table import BASELINE_NAMES
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import OnTorn
from ddsweep.results.statistics import mean_std_ci

__all__ = ["attack_matrix", "attack_table"]

_CAPTION = (
    "In %, on test images: fooled is the fraction of the attacked class that is called the target; others, "
    "the accuracy on all other classes. ± is the standard deviation over held-out networks. Baselines: as "
    "many images with the labels of the attack, as many steps, at the rate that is best on validation for "
    "the accuracy on rewritten labels."
)


def attack_table(directory: SweepDirectory, trials: Sequence[TrialSpec], on_torn: OnTorn) -> Table | None:
    """A block for each evaluated attack among ``trials``: before, after, and its baselines. None without an
    attack."""
    table = bare_table()
    table.caption, table.caption_justify, table.caption_style = _CAPTION, "left", "dim"
    for title in ("trial", "attack", "images", "fooled", "others", "networks"):
        table.add_column(title, justify="left" if title in ("trial", "attack", "images") else "right")
    attacks = [trial for trial in trials if trial.objective == "attack"]
    parts = directory.evals_by_trial() if attacks else {}
    for trial in attacks:
        row = trial_row(directory, trial.trial_id, on_torn)
        if row is None or row["status"] != "done":
            continue
        found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for item in eval_rows(directory, row, on_torn, parts.get(trial.trial_id, [])):
            if item["protocol"] != "as_distilled" or item["attack_success"] is None:
                continue
            if item["source"] != "distilled":
                found[BASELINE_NAMES[item["source"]]].append(item)
            elif item["inner_step"] in (0, trial.steps):
                found["distilled" if item["inner_step"] else "before"].append(item)
        names = [name for name in ("before", "distilled", *BASELINE_NAMES.values()) if name in found]
        for number, name in enumerate(names):
            start = ["", ""] if number else [trial.trial_id, _pair(trial)]
            measures = [_spread(found[name], measure) for measure in ("attack_success", "accuracy_other")]
            table.add_row(*start, name, *measures, str(len(found[name])))
    return table if table.row_count else None


def _pair(trial: TrialSpec) -> str:
    names = _class_names(trial)
    assert trial.attack_class is not None and trial.target_class is not None
    return f"{names[trial.attack_class]} → {names[trial.target_class]}"


def _class_names(trial: TrialSpec) -> Sequence[str]:
    return trial.dataset.class_names or [str(i) for i in range(trial.dataset.classes)]


def _spread(rows: Sequence[Mapping[str, Any]], measure: str) -> str:
    mean, std, _ = mean_std_ci([row[measure] for row in rows])
    return percent(mean, std) if rows else NONE


def attack_matrix(directory: SweepDirectory, trials: Sequence[TrialSpec], on_torn: OnTorn) -> str | None:
    """Write ``attack.png``, mean success by attacked (rows) and target class (columns), and return its path;
    None for fewer than two pairs, and for attacks on different data or networks. Trials that share a pair
    (other seeds, other settings) are averaged."""
    cells: dict[tuple[int, int], list[float]] = defaultdict(list)
    attacks = [trial for trial in trials if trial.attack_class is not None and trial.target_class is not None]
    if len({(trial.dataset.name, trial.network, trial.pool) for trial in attacks}) != 1:
        return None  # one matrix cannot show several questions
    for trial in attacks:
        row = trial_row(directory, trial.trial_id, on_torn)
        if row is not None and row["test_attack_success_mean"] is not None:
            assert trial.attack_class is not None and trial.target_class is not None
            cells[trial.attack_class, trial.target_class].append(row["test_attack_success_mean"])
    if len(cells) < 2:
        return None
    from matplotlib.figure import Figure

    data = attacks[0].dataset
    names = _class_names(attacks[0])
    side = min(12.0, 2.0 + 0.45 * data.classes)
    figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    values = [[float("nan")] * data.classes for _ in names]
    for (attacked, target), found in cells.items():
        values[attacked][target] = mean = sum(found) / len(found)
        ink = "white" if mean > 0.6 else "black"
        axes.text(target, attacked, f"{100 * mean:.0f}", ha="center", va="center", fontsize=8, color=ink)
    picture = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", alpha=0.8)
    axes.set_xticks(range(data.classes), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(data.classes), names, parse_math=False)
    axes.set_xlabel("called (target class)")
    axes.set_ylabel("is (attacked class)")
    axes.set_title("Fooled, mean over held-out networks, %", fontsize=10)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8)
    bar.ax.set_yticks([0, 0.5, 1], ["0", "50", "100"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    path = directory.root / "attack.png"
    write_atomic(path, buffer.getvalue(), directory.temporary)
    return str(path)
