"""The result of a sweep: every trial on held-out networks, with the baselines beside it.

Numbers are those of the ``evals`` parts. A distilled set is read at T = inner_steps x inner_epochs. A
baseline is read at the one step where it was measured: the same T or, under a ``*_tuned`` protocol, its own
best number of steps.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddsweep.catalog.numbers import counted
from ddsweep.report.settings import settings_of_row, varying
from ddsweep.results.coverage import each_once, newest_last
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import OnTorn, list_parts, read_rows
from ddsweep.results.schemas import EVALS, TRIALS
from ddsweep.results.statistics import Difference, mean_std_ci, paired_difference

__all__ = [
    "ALWAYS_SHOWN",
    "NEIGHBOUR",
    "Accuracy",
    "TrialSummary",
    "eval_rows",
    "measured",
    "networks_note",
    "summarise",
    "trial_row",
]

NEIGHBOUR = "nearest_neighbour"
ALWAYS_SHOWN = ("init", "images_per_class", "inner_steps", "inner_epochs")

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy (fractions) over ``n`` networks: mean, standard deviation, half-width of the 95 %
    confidence interval of the mean. One network has no spread and no interval."""

    mean: float
    std: float | None
    ci95: float | None
    n: int
    n_diverged: int = 0


@dataclass(frozen=True)
class TrialSummary:
    """One finished trial: evaluated, or stopped by the scheduler after ``stopped_at`` outer steps and without
    any accuracy.

    ``test`` is under the trial's own protocol, ``before`` the same networks at step 0, ``on_random`` a
    ``fixed`` set on held-out networks. ``baselines[protocol][source]`` has the measured ones: protocols
    ``as_distilled``, ``on_random``, these with ``_tuned``, and ``nearest_neighbour``. ``tuned[protocol]`` is
    the set at its best rate and number of epochs, if it has no learned rates. ``differences[protocol]`` is
    distilled - random_real: at the same T, and under ``*_tuned`` both at their best. ``pool`` is the source
    of its networks, unless they are fresh.
    """

    trial_id: str
    settings: dict[str, Any]
    test: Accuracy | None
    before: Accuracy | None
    on_random: Accuracy | None
    baselines: dict[str, dict[str, Accuracy]]
    tuned: dict[str, Accuracy]
    differences: dict[str, Difference]
    wall_seconds: float | None
    stopped_at: int | None = None
    pool: str | None = None

    @property
    def n_diverged(self) -> int:
        """The number of networks that diverged under the trial's own protocol; they count in the mean."""
        return self.test.n_diverged if self.test else 0

    def distilled(self, protocol: str) -> Accuracy | None:
        """The distilled set under ``as_distilled`` or ``on_random``."""
        return {"as_distilled": self.test, "on_random": self.on_random}.get(protocol)


# ------------------------------------------------------------------------------------------ reading


def _warn(path: Path) -> None:
    warnings.warn(f"{path} is torn and left out; `ddsweep run` makes it again", stacklevel=3)


def trial_row(directory: SweepDirectory, trial_id: str, on_torn: OnTorn = _warn) -> dict[str, Any] | None:
    """The row of a trial in ``trials``; None without a row, or if it is torn (then ``on_torn`` is called)."""
    rows = read_rows([directory.trials_part(trial_id)], TRIALS, on_torn)
    return rows[0] if rows else None


def eval_rows(
    directory: SweepDirectory,
    row: Mapping[str, Any],
    on_torn: OnTorn = _warn,
    parts: Sequence[Path] | None = None,
) -> list[Mapping[str, Any]]:
    """The ``evals`` rows of the trial of ``row`` on networks of its own kind, each measurement once. All
    networks count, also those that are not asked for now, as in the row.

    ``parts`` are its evals parts; left out, the folder is listed. Of two measurements of the same thing the
    one in the newer part counts. Torn parts are left out.
    """
    if parts is None:
        parts = directory.evals_parts(row["trial_id"])
    own = ("network", "init_law", "pool")
    return each_once(
        item
        for item in read_rows(newest_last(parts), EVALS, on_torn)
        if item["protocol"].removesuffix("_tuned") == NEIGHBOUR or all(item[k] == row[k] for k in own)
    )


# -------------------------------------------------------------------------------------- summing up


def measured(rows: Rows) -> Accuracy | None:
    """Mean and spread of the accuracies of ``rows``, one for each network; None without rows."""
    if not rows:
        return None
    mean, std, ci95 = mean_std_ci(row["accuracy"] for row in rows)
    return Accuracy(mean, std, ci95, len(rows), sum(bool(row["diverged"]) for row in rows))


def networks_note(counts: Iterable[int | None]) -> str | None:
    """A warning if the test accuracies of trials are over different numbers of held-out networks (None: over
    none); else None."""
    found = Counter(count for count in counts if count)
    if len(found) < 2:
        return None
    most = max(found)
    each = ", ".join(f"{count} ({counted(found[count], 'trial')})" for count in sorted(found))
    return (
        f"Test accuracies are over different numbers of held-out networks: {each}; "
        f"with evaluate.networks={most} `ddsweep eval` brings all to {most}."
    )


def summarise(
    directory: SweepDirectory,
    trial_ids: Sequence[str] | None = None,
    *,
    on_torn: OnTorn = _warn,
    always: Sequence[str] = ALWAYS_SHOWN,
) -> list[TrialSummary]:
    """The evaluated and the stopped trials among ``trial_ids``, in that order; without it, of the whole
    folder, by id.

    A trial without a ``trials`` part is left out. ``on_torn`` is called with every unreadable part, which is
    left out; it warns by default. ``settings`` has the settings that differ between the trials, and those of
    ``always``: by default init, images_per_class, inner_steps and inner_epochs.
    """
    if trial_ids is None:
        paths = list_parts(directory.parts("trials"))
    else:
        paths = [path for path in map(directory.trials_part, trial_ids) if path.exists()]
    found = read_rows(paths, TRIALS, on_torn)
    settings = {row["trial_id"]: settings_of_row(row) for row in found}
    names = varying(list(settings.values()), always)
    parts = directory.evals_by_trial()
    return [
        _summary(
            row,
            {name: settings[row["trial_id"]].get(name) for name in names},
            eval_rows(directory, row, on_torn, parts.get(row["trial_id"], [])),
        )
        for row in found
    ]


def _summary(row: Mapping[str, Any], settings: dict[str, Any], evals: Rows) -> TrialSummary:
    if row["status"] == "stopped":
        wall, step = row["wall_seconds"], row["outer_steps_done"]
        own = (row["trial_id"], settings, None, None, None)
        return TrialSummary(*own, {}, {}, {}, wall, stopped_at=step, pool=row["pool"])
    last = row["inner_steps"] * row["inner_epochs"]
    distilled: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    others: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for item in evals:
        if item["source"] == "distilled":
            distilled[item["protocol"], item["inner_step"]].append(item)
        else:
            others[item["protocol"]][item["source"]].append(item)
    recorded = Accuracy(
        row["test_accuracy_mean"],
        row["test_accuracy_std"],
        row["test_accuracy_ci95"],
        row["test_models"],
        row["n_diverged"],
    )
    tuned = {
        protocol.removesuffix("_tuned"): items
        for (protocol, _), items in distilled.items()
        if protocol.endswith("_tuned")
    }
    ours = {protocol: distilled[protocol, last] for protocol in ("as_distilled", "on_random")}
    ours |= {f"{protocol}_tuned": items for protocol, items in tuned.items()}
    differences = {
        protocol: paired_difference(items, others[protocol]["random_real"])
        for protocol, items in ours.items()
        if "random_real" in others[protocol]
    }
    return TrialSummary(
        trial_id=row["trial_id"],
        settings=settings,
        # The row has the same numbers, and replaces them if the parts are torn.
        test=measured(distilled["as_distilled", last]) or recorded,
        before=measured(distilled["as_distilled", 0]),
        on_random=measured(distilled["on_random", last]),
        baselines={
            protocol: {source: accuracy for source, items in sources.items() if (accuracy := measured(items))}
            for protocol, sources in others.items()
            if sources
        },
        tuned={protocol: found for protocol, items in tuned.items() if (found := measured(items))},
        differences={protocol: found for protocol, found in differences.items() if found},
        wall_seconds=row["wall_seconds"],
        pool=row["pool"],
    )
