"""Every number of a page, computed again with pandas and scipy from the tables. None is left that is not."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ddsweep.catalog import TrialSpec
from ddsweep.report.page.gather import gather
from ddsweep.report.page.write import page
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import write_part
from ddsweep.results.reader import Results, load_results
from ddsweep.results.schemas import HISTORY
from tests.report.conftest import Folder, spec
from tests.report.test_report import Page, attacks

RATES = (0.02, 0.1, 0.3)
ASKED = """\
name: small
base: {dataset: digits, network: convnet(width=8), images_per_class: 2, inner_steps: 2, inner_epochs: 2,
       outer_steps: 60}
grid: {init: [random, fixed], inner_lr: [0.02, 0.1, 0.3]}
seeds: 2
"""
T = 4
OWN = "as_distilled"
TITLES = {
    "random_real": "random real",
    "kmeans": "k-means",
    "knn_random": "k-NN random",
    "knn_kmeans": "k-NN k-means",
}
HOW = {OWN: "at the same steps", f"{OWN}_tuned": "with steps tuned", "nearest_neighbour": "without a network"}
Numbers = dict[str, float | None]


def written(root: Path) -> tuple[Folder, list[TrialSpec]]:
    """Twelve trials with numbers of their own: ten done, one failed, one stopped."""
    rng = np.random.default_rng(7)
    directory = SweepDirectory(root / "small")
    directory.create()
    folder = Folder(directory)
    folder.asked(ASKED)
    trials = [
        spec(init=init, inner_lr=lr, seed=seed)
        for init in ("random", "fixed")
        for lr in RATES
        for seed in (0, 1)
    ]
    for place, trial in enumerate(trials):
        steps = range(10, 61, 10)
        if place == 5:
            folder.failure(trial)
            steps = range(10, 21, 10)
        rows = [
            {
                **{"trial_id": trial.trial_id, "outer_step": step, "outer_loss": float(rng.uniform(1, 3))},
                **{"val_score": float(rng.uniform()) if step % 20 == 0 else None, "seconds": step / 7},
            }
            for step in steps
        ]
        write_part(directory.history_part(trial.trial_id), rows, HISTORY, directory.temporary)
        if place in (5, 11):
            if place == 11:
                folder.stopped(trial, step=40)
            continue
        folder.trial(
            trial,
            val_score=float(rng.uniform()),
            outer_steps_done=60,
            wall_seconds=float(rng.uniform(10, 20)),
            cpu_seconds=float(rng.uniform(10, 20)),
            peak_memory_bytes=int(rng.integers(10**8, 10**9)),
            distilled_bytes=int(rng.integers(1000, 9000)),
        )
        protocols = {OWN: [trial.seed]} if trial.init == "fixed" else {OWN: [0, 1, 2, 3]}
        if trial.init == "fixed":
            protocols["on_random"] = [0, 1, 2, 3]
        for protocol, networks in protocols.items():
            keys = [("distilled", protocol, step) for step in (0, 2, T)]
            keys += [(source, protocol, T) for source in ("random_real", "kmeans")]
            keys += [(source, f"{protocol}_tuned", 60) for source in ("random_real", "kmeans")]
            measured: dict[tuple[str, str, int], list[tuple[int | None, float]]] = {
                key: [(network, float(rng.uniform())) for network in networks] for key in keys
            }
            if protocol == OWN:
                measured["knn_random", "nearest_neighbour", 0] = [(n, float(rng.uniform())) for n in networks]
                measured["knn_kmeans", "nearest_neighbour", 0] = [(None, float(rng.uniform()))]
            for group, (key, values) in enumerate(measured.items()):
                folder.evals(trial, protocol, group, {key: values}, diverged=bool(rng.uniform() < 0.3))
    return folder, trials


# --------------------------------------------------------------------------------- computed again


class Again:
    """The numbers of the tables and charts of a page, from the tables of results alone."""

    def __init__(self, results: Results, trials: list[TrialSpec], measure: str = "accuracy") -> None:
        self.trials, self.specs, self.measure = results.trials, {t.trial_id: t for t in trials}, measure
        self.history = results.history
        evals = results.evals.rename(
            columns={measure: "value"} if measure != "accuracy" else {"accuracy": "value"}
        )
        self.evals = evals.assign(model_seed=evals.model_seed.astype("Float64"))
        self.done = self.trials[self.trials.status == "done"]

    def distilled(self, protocol: str = OWN, step: int | None = T) -> pd.DataFrame:
        ours = self.evals[(self.evals.source == "distilled") & (self.evals.protocol == protocol)]
        return ours if step is None else ours[ours.inner_step == step]

    def settings(self) -> pd.DataFrame:
        """One row for each trial: its settings, its state and its score."""
        states = self.trials.set_index("trial_id").status.reindex(self.specs).fillna("failed")
        frame = pd.DataFrame(
            {
                "trial_id": list(self.specs),
                "init": [one.init for one in self.specs.values()],
                "inner_lr": [one.inner_lr for one in self.specs.values()],
                "status": states.to_numpy(),
            }
        )
        frame["score"] = frame.trial_id.map(self.trials.set_index("trial_id").val_score)
        return frame

    def best(self) -> dict[Any, Numbers]:
        found: dict[Any, Numbers] = {}
        for init, chosen, among in self.chosen():
            own = self.distilled()
            own = own[own.trial_id.isin(chosen.trial_id)]
            found[init] = {
                "validation": chosen.score.mean(),
                "best of": among,
                "inner lr": chosen.inner_lr.iloc[0],
                "diverged": own.diverged.sum(),
                **levels(own, own.value, "test"),
            }
        return found

    def chosen(self) -> list[tuple[str, pd.DataFrame, int]]:
        found = []
        for init, kind in self.settings().groupby("init"):
            whole = kind.groupby("inner_lr").filter(lambda own: (own.status == "done").all())
            means = whole.groupby("inner_lr").score.mean()
            found.append((str(init), whole[whole.inner_lr == means.idxmax()], len(means)))
        return found

    def gains(self) -> dict[Any, Numbers]:
        found: dict[Any, Numbers] = {}
        for init, chosen, _ in self.chosen():
            own = self.distilled()[["trial_id", "model_seed", "value"]]
            own = own[own.trial_id.isin(chosen.trial_id)]
            for (source, protocol), rows in self.evals.groupby(["source", "protocol"]):
                if source == "distilled" or protocol not in HOW:
                    continue
                if protocol == "nearest_neighbour" and (init == "fixed" or rows.model_seed.isna().all()):
                    theirs = rows.groupby("trial_id", as_index=False)[["value"]].mean()  # of all draws
                else:
                    theirs = rows[["trial_id", "model_seed", "value"]]
                keys = [name for name in theirs.columns if name != "value"]
                both = own.merge(theirs, on=keys, suffixes=("", "_of"))
                if both.trial_id.nunique() == len(chosen):
                    key = (init, TITLES[source], HOW[protocol])
                    found[key] = levels(both, both.value - both.value_of, "gain")
        return found

    def all_trials(self) -> dict[Any, Numbers]:
        found: dict[Any, Numbers] = {}
        rows = self.trials.set_index("trial_id")
        for trial_id, own in self.specs.items():
            numbers: Numbers = {"inner lr": own.inner_lr, "seed": own.seed}
            if trial_id in rows.index:
                row = rows.loc[trial_id]
                numbers |= {"outer steps done": row.outer_steps_done, "validation": row.val_score}
                numbers |= {"time": row.wall_seconds, "memory": row.peak_memory_bytes}
            mine = self.distilled()
            mine = mine[mine.trial_id == trial_id]
            if len(mine):
                numbers |= {**spread(mine.value), "diverged": mine.diverged.sum()}
            others = self.evals[(self.evals.trial_id == trial_id) & self.evals.protocol.isin(list(HOW))]
            for (source, protocol), values in others.groupby(["source", "protocol"]).value:
                if source != "distilled":
                    numbers[TITLES[source] + (", tuned" if protocol.endswith("tuned") else "")] = (
                        values.mean()
                    )
            found[trial_id] = numbers
        return found

    def inner_steps(self) -> dict[Any, Numbers]:
        grouped = self.distilled(step=None).groupby(["trial_id", "inner_step"])
        return {
            (trial, str(step)): {"inner step": step, **spread(own.value)} for (trial, step), own in grouped
        }

    def worst(self) -> dict[Any, Numbers]:
        found: dict[Any, Numbers] = {}
        for trial_id, own in self.several().groupby("trial_id"):
            values = own.set_index("model_seed").value
            found[trial_id] = {
                "worst network": values.idxmin(),
                "its test": values.min(),
                "5 % are below": values.quantile(0.05),
                "median": values.median(),
                "low": (values < values.median() / 2).sum(),
                "diverged": own.diverged.sum(),
            }
        return found

    def several(self) -> pd.DataFrame:
        return self.distilled().groupby("trial_id").filter(lambda own: len(own) > 1)

    def hard(self) -> dict[Any, Numbers]:
        own = self.several()
        own = own.assign(below=own.value - own.groupby("trial_id").value.transform("mean"))
        own = own.assign(lower=own.below < 0)
        table = own.groupby("model_seed").agg(
            test=("value", "mean"), below=("below", "mean"), n=("value", "size"), lower=("lower", "mean")
        )
        return {
            str(int(number)): {
                "number": number,
                "test": row.test,
                "minus the mean of the trial": row.below,
                "trials": row.n,
            }
            for number, row in table[(table.below < 0) & (table.lower > 0.5)].iterrows()
        }

    def transfer(self) -> dict[Any, Numbers]:
        ours = self.evals[(self.evals.source == "distilled") & (self.evals.inner_step == T)]
        return {
            key: {**spread(own.value), "diverged": own.diverged.sum()}
            for key, own in ours.groupby(["trial_id", "protocol"])
        }

    def front(self) -> dict[Any, Numbers]:
        worth = self.distilled().groupby("trial_id").value.mean()
        rows = self.trials.set_index("trial_id").loc[worth.index]
        cost, init = rows.wall_seconds, rows.init
        unbeaten = [
            one
            for one in worth.index
            if not ((cost <= cost[one]) & (worth >= worth[one]) & (init == init[one])).drop(one).any()
        ]
        columns = {"time": "wall_seconds", "CPU time": "cpu_seconds", "memory": "peak_memory_bytes"}
        columns["size of the set"] = "distilled_bytes"
        return {
            one: {"test, %": worth[one], **{title: rows[name][one] for title, name in columns.items()}}
            for one in unbeaten
        }

    def importances(self) -> dict[Any, Numbers]:
        frame = self.settings().dropna(subset="score")
        frame = frame.groupby(["init", "inner_lr"], as_index=False).score.mean()
        found: dict[Any, Numbers] = {}
        for title, name in (("init", "init"), ("inner lr", "inner_lr")):
            groups = [own.to_numpy() for _, own in frame.groupby(name).score]
            h, p = stats.kruskal(*groups)
            explained = max(0.0, (h - len(groups) + 1) / (len(frame) - len(groups)))
            numbers: Numbers = {"explains": three(explained), "p": three(p), "values": len(groups)}
            if name == "inner_lr":
                numbers["rank correlation"] = three(frame.inner_lr.corr(frame.score, method="spearman"))
            found[title] = numbers
        return found

    TABLES: Mapping[str, tuple[Callable[[Again], dict[Any, Numbers]], tuple[str, ...]]] = {
        "best": (best, ("kind",)),
        "gains": (gains, ("kind", "over", "how it is applied")),
        "all-trials": (all_trials, ("trial",)),
        "inner-step-numbers": (inner_steps, ("trial", "inner step")),
        "worst-trials": (worst, ("trial",)),
        "hard-networks": (hard, ("number",)),
        "transfer": (transfer, ("trial", "protocol")),
        "front": (front, ("trial",)),
        "importances": (importances, ("setting",)),
    }

    # ---------------------------------------------------------------------------------- charts

    def charts(self, ids: list[str]) -> dict[str, list[dict[str, Any]]]:
        """By chart and data set, its rows; ``ids`` are the trials in the order of their numbers."""
        number = {trial_id: place for place, trial_id in enumerate(ids)}
        own = self.distilled()
        percents = {trial_id: 100 * rows.value for trial_id, rows in own.groupby("trial_id")}
        quantiles = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
        bars = [
            {
                "trial": number[trial_id],
                **{name: values.quantile(q) for name, q in quantiles.items()},
                "mean": values.mean(),
                "n": len(values),
            }
            for trial_id, values in percents.items()
        ]
        means = []
        for (trial_id, step), rows in self.distilled(step=None).groupby(["trial_id", "inner_step"]):
            mean, std = 100 * rows.value.mean(), 100 * (rows.value.std() if len(rows) > 1 else 0.0)
            band = {"low": mean - std, "high": mean + std, "mean": mean}
            means.append({"trial": number[trial_id], "step": step, "n": len(rows), **band})
        found = {"accuracy bars": bars, "inner-steps means": means}
        for chart, column, scale in (("loss", "outer_loss", 1), ("validation", "val_score", 100)):
            rows = self.history[self.history[column].notna()]
            found[f"{chart} lines"] = [
                {"trial": number[row.trial_id], "step": row.outer_step, "v": scale * row[column]}
                for _, row in rows.iterrows()
            ]
            many = rows.groupby("outer_step").filter(lambda own: len(own) > 1).groupby("outer_step")[column]
            found[f"{chart} all"] = [
                {
                    "step": step,
                    **{
                        name: scale * v.quantile(q) for name, q in (("low", 0.1), ("mid", 0.5), ("high", 0.9))
                    },
                }
                for step, v in many
            ]
        found["transfer-matrix cells"] = [
            {
                "trial": number[trial],
                "x": protocol,
                "v": 100 * numbers["test"],
                "text": f"{100 * numbers['test']:.1f}",
            }
            for (trial, protocol), numbers in self.transfer().items()
            if numbers["test"] is not None
        ]
        cost = self.trials.set_index("trial_id").wall_seconds
        found["cost-front points"] = [
            {"trial": number[one], "x": cost[one], "y": values.mean()} for one, values in percents.items()
        ]
        inits = self.trials.set_index("trial_id").init
        found["cost-front front"] = [
            {"x": numbers["time"], "y": 100 * (numbers["test, %"] or 0.0), "of": inits[one]}
            for one, numbers in self.front().items()
        ]
        found["importance bars"] = [
            {"name": title, "v": numbers["explains"]} for title, numbers in self.importances().items()
        ]
        found["parallel lines"] = self._parallel(number)
        return found

    def _parallel(self, number: Mapping[str, int]) -> list[dict[str, Any]]:
        frame = self.settings().dropna(subset="score")
        places = {lr: place / 2 for place, lr in enumerate(RATES)}
        ranks = frame.score.rank(pct=True)
        found = []
        for (_, row), rank in zip(frame.iterrows(), ranks, strict=True):
            one = {"trial": number[row.trial_id], "score": 100 * row.score}
            found.append({**one, "axis": "init", "v": float(row["init"] == "random"), "value": row["init"]})
            found.append({**one, "axis": "inner lr", "v": places[row.inner_lr], "value": f"{row.inner_lr:g}"})
            found.append({**one, "axis": "validation", "v": rank, "value": f"{100 * row.score:.1f} %"})
        return found


def levels(rows: pd.DataFrame, values: pd.Series, mean: str) -> Numbers:
    """Over seeds of means over networks; the interval has the spread of both."""
    table = rows.assign(value=values).pivot(index="trial_id", columns="model_seed", values="value")
    by = values.groupby(rows.trial_id)
    means, stds, count = by.mean(), by.std().dropna(), by.size().min()
    many = len(means) > 1
    halves = [
        stats.t.ppf(0.975, len(over) - 1) * over.std() / np.sqrt(len(over))
        for over in (means, table.dropna(axis="columns").mean())
        if len(over) > 1
    ]
    half = np.sqrt(np.square(halves).sum()) if halves else None
    return {
        mean: means.mean(),
        "± over networks": np.sqrt((stds**2).mean()) if len(stds) else None,
        "± over seeds": means.std() if many else None,
        "95 % from": None if half is None else means.mean() - half,
        "to": None if half is None else means.mean() + half,
        "networks": count,
        "seeds": len(means),
    }


def spread(values: pd.Series) -> Numbers:
    n, std = len(values), values.std()
    half = stats.t.ppf(0.975, n - 1) * std / np.sqrt(n) if n > 1 else None
    return {"test": values.mean(), "±": std if n > 1 else None, "95 % ±": half, "networks": n}


def three(number: float) -> float:
    return float(f"{number:.3g}")


# ------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Again]:
    folder, trials = written(tmp_path_factory.mktemp("results"))
    root = folder.directory.root
    return Page(page(gather([root]))), Again(load_results(root, all_trials=True), trials)


def test_every_number_in_a_table(compared: tuple[Page, Again]) -> None:
    found, again = compared
    assert set(again.TABLES) <= set(found.tables)
    count = 0
    for name, rows in ((name, found.rows(name)) for name in found.tables):
        if name not in again.TABLES:
            assert not any(value is not None for row in rows for _, value in row.values()), (
                f"{name}: not computed"
            )
            continue
        compute, key = again.TABLES[name]
        expected = compute(again)
        seen = set()
        for row in rows:
            words = [row[column][0][:10] if column == "trial" else row[column][0] for column in key]
            own = expected[words[0] if len(words) == 1 else tuple(words)]
            seen.add(tuple(words))
            for column, (text, value) in row.items():
                wanted = own.get(column)
                if value is None and (wanted is None or pd.isna(wanted)):
                    continue
                assert wanted is not None, f"{name}, {column}: {text} is not computed again"
                assert value == pytest.approx(float(wanted), rel=1e-9, abs=1e-12), (name, words, column)
                count += 1
        assert len(seen) == len(expected) == len(rows), f"{name}: rows are missing"
    assert count > 300


def test_every_number_in_a_chart(compared: tuple[Page, Again]) -> None:
    found, again = compared
    data = json.loads(found.data)
    expected = again.charts([trial["id"] for trial in data["trials"]])
    drawn = {
        f"{chart} {name}": pd.DataFrame(dataset["columns"]).to_dict("records")
        for chart, described in data["charts"].items()
        for name, dataset in described["datasets"].items()
    }
    assert drawn.keys() == expected.keys()
    for name, rows in drawn.items():
        assert len(rows) == len(expected[name]), name
        for mine, theirs in zip(_ordered(rows), _ordered(expected[name]), strict=True):
            assert mine.keys() == theirs.keys(), name
            for column, value in mine.items():
                wanted = theirs[column]
                if not isinstance(wanted, str):
                    # Fractions have four decimals, percent two at least.
                    exact = 6e-5 if name in ("parallel lines", "importance bars", "loss lines") else 6e-3
                    wanted = pytest.approx(float(wanted), rel=6e-5, abs=exact)
                assert value == wanted, (name, column, mine, theirs)


def _ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By what is exact: numbers of trials, steps, words; else by the first number."""
    names = [name for name in ("trial", "step", "axis", "x", "name") if name in rows[0]]
    return sorted(rows, key=lambda row: [row[name] for name in names])


def test_every_network_is_that_of_the_tables(compared: tuple[Page, Again]) -> None:
    found, again = compared
    data = json.loads(found.data)
    networks = data["networks"]
    values = np.frombuffer(base64.b64decode(networks["values"]), "<u2") / 10_000
    count = 0
    for place, number in enumerate(networks["trial"]):
        seeds = networks["seedsets"][networks["seeds"][place]]
        own = again.distilled(step=networks["step"][place])
        own = own[own.trial_id == data["trials"][number]["id"]].set_index("model_seed").value
        start = networks["start"][place]
        assert values[start : start + len(seeds)] == pytest.approx(own[seeds].to_numpy(float), abs=6e-5)
        count += len(seeds)
    assert count == len(values) == len(again.distilled(step=None))


def test_the_cards_and_the_hours_say_the_same(compared: tuple[Page, Again]) -> None:
    found, again = compared
    for numbers in again.best().values():
        spread = numbers["± over networks"]
        text = f"{100 * (numbers['test'] or 0):.1f}" + (f" ± {100 * spread:.1f}" if spread else "") + " %"
        assert text in found.text
        assert f"the best of {numbers['best of']} settings" in found.text
    gain = again.gains()["random", "random real", "at the same steps"]["gain"]
    assert f"{100 * (gain or 0):+.1f} over random real" in found.text
    own = again.distilled()
    assert f"{own.diverged.sum()} of {len(own)} networks diverged" in found.text
    said = {row["what"][0]: row["value"][0] for row in found.rows("again-0")}
    assert said["wall time of all trials"] == f"{again.trials.wall_seconds.sum() / 3600:.2f} h"
    assert said["CPU time of all trials"] == f"{again.trials.cpu_seconds.sum() / 3600:.2f} h"


def test_an_attack_is_computed_again(folder: Folder) -> None:
    """Of attacks the success takes the place of accuracy everywhere."""
    trials = attacks(folder)
    root = folder.directory.root
    found = Page(page(gather([root])))
    evals = load_results(root).evals
    ours = evals[evals.source == "distilled"]
    for row in found.rows("attack"):
        own = ours[ours.trial_id == row["trial"][0]]
        for when, step in (("before", 0), ("after", T)):
            for title, column in (("fooled", "attack_success"), ("others", "accuracy_other")):
                values = own[own.inner_step == step][column]
                assert row[f"{title} {when}"][1] == pytest.approx(values.mean())
                assert row[f"± {title} {when}"][1] == pytest.approx(values.std())
    again = Again(load_results(root), trials, "attack_success")
    steps = again.inner_steps()
    rows = found.rows("inner-step-numbers")
    assert len(rows) == len(steps) == 4
    for row in rows:
        own_numbers = steps[row["trial"][0], row["inner step"][0]]
        for column in ("test", "±", "95 % ±", "networks"):
            assert row[column][1] == pytest.approx(own_numbers[column]), column
