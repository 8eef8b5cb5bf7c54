"""`ddsweep report`: what is on the page, computed again; results that are torn, doubled, old or strange."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import pytest
import vl_convert
from safetensors.numpy import save_file

from ddsweep.catalog import DatasetSpec, TrialSpec
from ddsweep.cli import main
from ddsweep.errors import DataError
from ddsweep.report.page import gather as gathering
from ddsweep.report.page.charts import percent_axis, x_of
from ddsweep.report.page.gather import gather
from ddsweep.report.page.payload import picked
from ddsweep.report.page.section import Axis
from ddsweep.report.page.sections.cost import front_of
from ddsweep.report.page.sections.search import importance
from ddsweep.report.page.sections.sets import rates_section
from ddsweep.report.page.sections.steps import curves_section
from ddsweep.report.page.table import Column, Table
from ddsweep.report.page.write import page
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import SweepLock
from ddsweep.results.parts import read_part, write_part
from ddsweep.results.reader import load_results
from ddsweep.results.schemas import HISTORY
from ddsweep.results.statistics import mean_std_ci
from ddsweep.spec import PublishedSpec
from tests.conftest import imported_by_command
from tests.report.conftest import Folder, spec

OLDER = Path(__file__).parents[1] / "older" / "results_0_1_0"

ASKED = """\
name: small
base: {dataset: digits, network: convnet(width=8), images_per_class: 2, inner_steps: 2, inner_epochs: 2,
       outer_steps: 60, init: random}
grid: {inner_lr: [0.02, 0.1]}
seeds: 2
"""


class Page(HTMLParser):
    """Tables by id, as rows of (text, value); the tags of which there are some; what scripts hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, float | None]]]] = {}
        self.heads: dict[str, list[str]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data = "", ""
        self._table = self._cell = ""
        self._value: float | None = None
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in ("br", "img", "input", "link", "meta"):
            self._inside.append(tag)
        if tag == "table":
            self._table = given["id"] or ""
            self.tables[self._table], self.heads[self._table] = [], []
        if tag == "tr" and "tbody" in self._inside:
            self.tables[self._table].append([])
        if tag in ("td", "th"):
            self._cell, value = "", given.get("data-v")
            self._value = float(value) if value else None

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag
        if tag in ("td", "th"):
            if "tbody" in self._inside:
                self.tables[self._table][-1].append((self._cell, self._value))
            else:
                self.heads[self._table].append(self._cell)

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.data = data if data.startswith("{") else self.data
        elif self._inside and self._inside[-1] != "style":
            self._cell += data
            self.text += data + " "

    def rows(self, table: str) -> list[dict[str, tuple[str, float | None]]]:
        return [dict(zip(self.heads[table], row, strict=True)) for row in self.tables[table]]


def made(*folders: Path) -> Page:
    return Page(page(gather(list(folders))))


def whole(folder: Folder) -> list[Any]:
    """Four trials with every kind of row, two seeds of one of two settings."""
    folder.asked(ASKED)
    trials = [spec(init="random", inner_lr=lr, seed=seed) for lr in (0.02, 0.1) for seed in (0, 1)]
    for number, trial in enumerate(trials):
        folder.evaluated(trial)
        folder.trial(trial, val_score=0.5 + 0.1 * number, peak_memory_bytes=10**9, wall_seconds=10.0 + number)
    return trials


def test_the_table_of_trials_is_computed_again(folder: Folder) -> None:
    trials = whole(folder)
    results = load_results(folder.directory.root, all_trials=True)
    rows = {row["trial"][0]: row for row in made(folder.directory.root).rows("all-trials")}
    assert set(rows) == {trial.trial_id for trial in trials}
    for trial in trials:
        own = results.evals[
            (results.evals.trial_id == trial.trial_id) & (results.evals.protocol == "as_distilled")
        ]
        last = own[(own.source == "distilled") & (own.inner_step == 4)]["accuracy"]
        row = rows[trial.trial_id]
        assert row["test"][1] == pytest.approx(last.mean())
        assert row["±"][1] == pytest.approx(last.std())
        assert row["95 % ±"][1] == pytest.approx(mean_std_ci(last)[2])
        assert row["networks"][0] == str(len(last)) == "4"
        assert row["test"][0] == f"{100 * last.mean():.1f}"
        for source, title in (("random_real", "random real"), ("kmeans", "k-means")):
            theirs = own[own.source == source]["accuracy"]
            assert row[title][1] == pytest.approx(theirs.mean())
        assert row["k-NN k-means"][1] == pytest.approx(0.9)


def test_the_answer_and_its_gains_are_computed_again(folder: Folder) -> None:
    whole(folder)
    found = made(folder.directory.root)
    (best,) = found.rows("best")
    results = load_results(folder.directory.root, all_trials=True)
    means = results.trials.groupby("inner_lr")["val_score"].mean()
    chosen = results.trials[results.trials.inner_lr == means.idxmax()]
    assert best["validation"][1] == pytest.approx(means.max())
    evals = results.evals[results.evals.protocol == "as_distilled"]
    own = evals[
        (evals.source == "distilled") & (evals.inner_step == 4) & evals.trial_id.isin(chosen.trial_id)
    ]
    by_seed = own.groupby("trial_id")["accuracy"].mean()
    mean, _, over_seeds = mean_std_ci(by_seed)
    _, _, over_networks = mean_std_ci(own.groupby("model_seed")["accuracy"].mean())
    assert over_seeds is not None and over_networks is not None
    assert best["test"][1] == pytest.approx(mean)
    assert best["95 % from"][1] == pytest.approx(mean - math.hypot(over_seeds, over_networks), abs=1e-9)
    assert best["seeds"][0] == "2" and best["networks"][0] == "4"
    assert best["± over seeds"][1] == pytest.approx(by_seed.std(), abs=1e-9)
    gains = {(row["over"][0], row["how it is applied"][0]): row for row in found.rows("gains")}
    paired = own.merge(evals[evals.source == "kmeans"], on=["trial_id", "model_seed"], suffixes=("", "_of"))
    expected = (paired.accuracy - paired.accuracy_of).groupby(paired.trial_id).mean().mean()
    assert gains["k-means", "at the same steps"]["gain"][1] == pytest.approx(expected)
    one = statistics.fmean(own.accuracy) - 0.9
    assert gains["k-NN k-means", "without a network"]["gain"][1] == pytest.approx(one)
    (name, how), least = min(gains.items(), key=lambda item: item[1]["gain"][1] or 0.0)
    assert f"{least['gain'][0]} over {name} {how}, the least over a baseline, 95 % interval" in found.text


def test_steps_networks_and_curves_are_the_tables(folder: Folder) -> None:
    trials = whole(folder)
    found = made(folder.directory.root)
    results = load_results(folder.directory.root, all_trials=True)
    own = results.evals[(results.evals.source == "distilled") & (results.evals.protocol == "as_distilled")]
    expected = own.groupby(["trial_id", "inner_step"])["accuracy"].agg(["mean", "std", "size"])
    rows = found.rows("inner-step-numbers")
    assert len(rows) == len(expected) == 12
    for row in rows:
        mean, std, size = expected.loc[(row["trial"][0], int(row["inner step"][0]))]
        assert row["test"][1] == pytest.approx(mean) and row["±"][1] == pytest.approx(std)
        assert int(row["networks"][0]) == size
    data = json.loads(found.data)
    number = next(n for n, trial in enumerate(data["trials"]) if trial["id"] == trials[0].trial_id)
    lines = data["charts"]["loss"]["datasets"]["lines"]["columns"]
    drawn = [v for trial, v in zip(lines["trial"], lines["v"], strict=True) if trial == number]
    history = results.history[results.history.trial_id == trials[0].trial_id]
    assert drawn == pytest.approx(list(history.outer_loss), rel=1e-4)


def test_a_published_number_stands_beside_the_answer(folder: Folder) -> None:
    whole(folder)
    folder.asked(
        ASKED + "published: [{accuracy: 0.3, std: 0.1, source: A paper, where: {init: random}},"
        " {accuracy: 0.9, source: Another, where: {init: fixed}}]\n"
    )
    found = made(folder.directory.root)
    (best,) = found.rows("best")
    assert best["published"][1] == 0.3 and best["where"][0] == "A paper"
    assert "A paper: 30.0 ± 10.0 %" in found.text and "Another" not in str(found.tables)


@pytest.mark.parametrize(
    ("wanted", "value", "same"),
    [
        ("convnet", "convnet(depth=3,width=128,norm=instance)", True),
        ("convnet(width=128)", "convnet(depth=3,width=128,norm=instance)", True),
        ("convnet( width = 128, depth=3)", "convnet(depth=3,width=128,norm=instance)", True),
        ("convnet(width=12)", "convnet(depth=3,width=128,norm=instance)", False),
        ("usps(size=28)", "usps", False),
        ("usps", "usps(size=28)", True),
    ],
)
def test_a_published_number_is_of_all_that_has_its_parameters(wanted: str, value: str, same: bool) -> None:
    name = "dataset" if "usps" in wanted else "network"
    number = PublishedSpec(accuracy=0.5, source="A paper", where={name: wanted})
    assert number.applies({name: value}) is same


def test_what_is_torn_doubled_or_not_done_is_left_out_and_said(folder: Folder) -> None:
    trials = whole(folder)
    folder.asked(ASKED.replace("0.1]", "0.1, 0.5, 0.6, 0.7]"))
    directory = folder.directory
    torn = directory.trials_part(trials[0].trial_id)
    torn.write_bytes(torn.read_bytes()[:-9])
    first = directory.evals_parts(trials[1].trial_id)[0]
    shutil.copy(first, first.with_name(first.name.replace(".parquet", "-copy.parquet")))
    part = directory.trials_part(trials[2].trial_id)
    shutil.copy(part, part.with_name("part-copy.parquet"))
    failed, begun = (spec(init="random", inner_lr=lr) for lr in (0.5, 0.6))
    folder.failure(failed, "a <b>bad</b> & ugly end")
    folder.history(begun, last=20)
    folder.stopped(spec(init="random", inner_lr=0.7))
    found = made(directory.root)
    assert f"trials/part-{trials[0].trial_id}.parquet is torn and left out" in found.text
    assert "1 row of trials are there twice" in found.text and "rows of evals are there twice" in found.text
    reasons = {row["trial"][0][:10]: row for row in found.rows("not-done")}
    assert reasons[failed.trial_id]["why"][0] == "DivergedError: a <b>bad</b> & ugly end"
    assert reasons[begun.trial_id]["state"][0] == "interrupted"
    rows = {row["trial"][0]: row for row in found.rows("all-trials")}
    assert rows[trials[1].trial_id]["networks"][0] == "4"
    assert rows[failed.trial_id]["test"] == ("–", None)
    assert rows[trials[0].trial_id]["state"][0] != "done"


@pytest.mark.parametrize("state", ["failed", "stopped", "nothing"])
def test_no_answer_yet(folder: Folder, state: str) -> None:
    folder.asked()
    for lr in (0.02, 0.1):
        trial = spec(init="random", inner_lr=lr)
        if state == "failed":
            folder.failure(trial)
        elif state == "stopped":
            folder.stopped(trial)
    found = made(folder.directory.root)
    assert "there is no answer so far" in found.text
    expected = {"failed": 2, "stopped": 2, "nothing": 0}[state]
    states = [row["state"][0] for row in found.rows("all-trials")]
    assert states.count(state) == expected and len(states) == 4


def strange(tmp_path: Path) -> tuple[SweepDirectory, TrialSpec]:
    """A sweep whose names, messages and words of columns are pieces of HTML."""
    name = "ünï </script><script>alert(1)</script>"
    directory = SweepDirectory(tmp_path / name.replace("/", "⁄"))
    directory.create()
    folder = Folder(directory)
    folder.asked("name: x\nbase: {dataset: digits}\n# </pre><script>alert(2)</script>\n")
    trial = spec(init="random")
    folder.evaluated(trial)
    folder.trial(
        trial, val_score=0.5, device_name="<img src=x onerror=alert(3)>", inner_augment="</script><b>"
    )
    path = directory.history_part(trial.trial_id)
    write_part(
        path, [{"trial_id": trial.trial_id, "outer_step": 1, "outer_loss": 1.0}], HISTORY, directory.temporary
    )
    return directory, trial


def test_names_break_out_of_nothing(tmp_path: Path) -> None:
    directory, trial = strange(tmp_path)
    text = page(gather([directory.root]))
    found = Page(text)
    assert "ünï" in found.text and "alert(1)" in found.text and "alert(3)" in found.text
    scripts = [given for tag, given in found.tags if tag == "script"]
    assert len(scripts) == 3 and not any(tag == "b" for tag, _ in found.tags)
    assert not any("onerror" in given for _, given in found.tags)
    assert json.loads(found.data)["trials"][0]["id"] == trial.trial_id


@pytest.mark.parametrize("name", ["small", "stopped"])
def test_results_of_the_first_version(name: str) -> None:
    found = made(OLDER / name)
    assert "The answer" in found.text and found.rows("all-trials")


def test_several_sweeps_on_one_page(tmp_path: Path) -> None:
    for name in ("a", "b"):
        directory = SweepDirectory(tmp_path / name)
        directory.create()
        whole(Folder(directory))
    found = made(tmp_path / "a", tmp_path / "b")
    rows = found.rows("all-trials")
    assert [row["sweep"][0] for row in rows] == ["a"] * 4 + ["b"] * 4
    assert len(found.rows("best")) == 2
    labels = [trial["label"] for trial in json.loads(found.data)["trials"]]
    assert len(set(labels)) == 8 and labels[0].startswith("a/")


def test_the_page_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    """Two sweeps of one name, and data that are not here."""
    for place in ("first", "second"):
        directory = SweepDirectory(tmp_path / place / "same")
        directory.create()
        whole(Folder(directory))

    def not_here(value: Any) -> DatasetSpec:
        raise DataError(f"{tmp_path}/data is not a folder")

    text = page(gather([tmp_path / "first" / "same", tmp_path / "second" / "same"], not_here))
    assert str(tmp_path) not in text and "first/same" in text and "second/same" in text
    assert "because the data are not here; `ddsweep status` says more" in text


def test_a_table_in_all_its_forms() -> None:
    columns = [Column("name", "name_of"), Column("mean", "mean, %", "percent"), Column("n", "n", "count")]
    table = Table("t", "50 % & more", columns, [["a|b_c", 0.12345, 3], ["<x>", None, None]])
    assert list(csv.reader(io.StringIO(table.csv()))) == [
        ["name", "mean", "n"],
        ["a|b_c", "0.12345", "3"],
        ["<x>", "", ""],
    ]
    assert "| a\\|b_c | 12.3 | 3 |" in table.markdown() and "| <x> | – | – |" in table.markdown()
    latex = table.latex()
    assert r"\caption{50 \% \& more}" in latex and r"\begin{tabular}{lrr}" in latex
    assert r"a|b\_c & 12.3 & 3 \\" in latex
    assert "&lt;x&gt;" in table.html()


def test_the_command_writes_a_page_figures_and_tables(folder: Folder, tmp_path: Path) -> None:
    whole(folder)
    out = tmp_path / "out"
    arguments = ("report", folder.directory.root, "--out", out, "--figures")
    assert imported_by_command(*arguments, slow=("torch", "ray")) == []
    assert (out / "index.html").stat().st_size < 3e6
    for name, start in (("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<svg")):
        assert (out / "figures" / f"accuracy.{name}").read_bytes().startswith(start)
    assert "middle half of its" in (out / "figures" / "captions.md").read_text()
    best = pd.read_csv(out / "tables" / "best.csv")
    assert len(best) == 1 and best["seeds"][0] == 2
    assert not [path.name for path in out.iterdir() if path.name not in ("index.html", "figures", "tables")]


def test_a_page_of_another_sweep_is_not_replaced_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for name in ("a & b", "a & b", "other"):
        directory = SweepDirectory(tmp_path / name)
        directory.create()
        whole(Folder(directory))
        with pytest.raises(SystemExit):
            main(["report", str(directory.root), "--out", str(tmp_path / "out")])
        said.append(capsys.readouterr().out.partition("MB")[2])
    assert said == ["\n", "\n", "; it replaces the page of a & b (--out)\n"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such results folder"),
        (["{root}", "{root}"], "the same folder of results is given twice"),
        (["{root}", "--watch", "0.1"], "--watch: 0.1 must be 1 to 86400 seconds"),
        (["{root}", "--watch", "inf"], "--watch: inf must be 1 to 86400 seconds"),
    ],
)
def test_bad_input(
    folder: Folder, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, tmp_path: Path
) -> None:
    whole(folder)
    given = [word.format(root=folder.directory.root) for word in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["report", *given, "--out", str(tmp_path / "out")])
    assert ended.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/below"])
def test_a_folder_that_cannot_be_written(
    folder: Folder, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(folder)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder.directory.root), "--out", str(tmp_path / where)])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and f"--out: {tmp_path / where}: no folder can be there" in said


def test_a_protocol_in_minibatches_and_a_trial_without_a_row(folder: Folder) -> None:
    """An epoch of minibatches has as many steps as these take: 3 of 20 images in batches of 8, not S."""
    whole(folder)
    trial, later = spec(), spec(seed=7)
    steps = {0: 0.1, 15: 0.5, 40: 0.6}  # 40: beyond
    rows = {("distilled", "papers", step): [(0, value), (1, value)] for step, value in steps.items()}
    folder.evals(trial, "papers", 0, rows, inner_batch=8, inner_epochs=5)
    folder.evals(later, "as_distilled", 0, {("distilled", "as_distilled", 4): [(0, 0.5)]})
    found = made(folder.directory.root)
    (row,) = [row for row in found.rows("transfer") if row["protocol"][0] == "papers"]
    assert row["test"][1] == pytest.approx(0.5)


def test_hard_networks_of_two_laws_are_apart(folder: Folder) -> None:
    folder.asked("name: small\nbase: {dataset: digits}\n")
    for size in (0.5, 1.0):
        for lr in (0.02, 0.1):
            trial = spec(init_law="normal", init_param=size, inner_lr=lr)
            folder.trial(trial)
            low = {0.5: [0.2, 0.6], 1.0: [0.6, 0.4]}[size]
            rows = {("distilled", "as_distilled", 4): list(enumerate(low))}
            folder.evals(trial, "as_distilled", 0, rows)
    rows = made(folder.directory.root).rows("hard-networks")
    assert sorted((row["networks of"][0][-3:], int(row["number"][0])) for row in rows) == [
        ("0.5", 0),
        ("1.0", 1),
    ]


def test_a_network_that_is_hard_for_a_few_sets_is_not_listed(folder: Folder) -> None:
    """Network 0 is far below the mean for one of three trials; network 1 a little below for all."""
    folder.asked("name: small\nbase: {dataset: digits}\n")
    for lr, first in ((0.02, 0.1), (0.1, 0.8), (0.3, 0.8)):
        trial = spec(init="random", inner_lr=lr)
        folder.trial(trial)
        rows = {("distilled", "as_distilled", 4): list(enumerate([first, 0.5, 0.7, 0.7]))}
        folder.evals(trial, "as_distilled", 0, rows)
    rows = made(folder.directory.root).rows("hard-networks")
    assert [row["number"][0] for row in rows] == ["1"]


def test_without_the_extra_it_says_so(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setattr("ddsweep.report.page.scripts.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder.directory.root)])
    assert ended.value.code == 1
    assert "pip install 'ddsweep[report]'" in capsys.readouterr().err


def test_worst_networks_transfer_and_front_are_computed_again(folder: Folder) -> None:
    whole(folder)
    fixed = spec(init="fixed")
    folder.asked(ASKED.replace(", init: random", "").replace("grid: {", "grid: {init: [random, fixed], "))
    folder.evaluated(fixed)
    found = made(folder.directory.root)
    results = load_results(folder.directory.root, all_trials=True)
    distilled = results.evals[(results.evals.source == "distilled") & (results.evals.inner_step == 4)]
    own = distilled[distilled.protocol == "as_distilled"]
    for row in found.rows("worst-trials"):
        mine = own[own.trial_id == row["trial"][0]].set_index("model_seed")["accuracy"]
        assert int(row["worst network"][0]) == mine.idxmin()
        assert row["its test"][1] == mine.min() and row["median"][1] == pytest.approx(mine.median())
        assert row["5 % are below"][1] == pytest.approx(mine.quantile(0.05))
    several = own.groupby("trial_id").filter(lambda rows: len(rows) > 1)
    below = several.accuracy - several.groupby("trial_id")["accuracy"].transform("mean")
    means = below.groupby(several.model_seed).mean()
    for row in found.rows("hard-networks"):
        number = int(row["number"][0])
        assert row["minus the mean of the trial"][1] == pytest.approx(means[number])
        assert row["test"][1] == pytest.approx(several[several.model_seed == number].accuracy.mean())
    expected = distilled.groupby(["trial_id", "protocol"])["accuracy"].agg(["mean", "std", "size"])
    transfer = found.rows("transfer")
    assert len(transfer) == len(expected) == 6
    for row in transfer:
        mean, _, size = expected.loc[row["trial"][0], row["protocol"][0]]
        assert row["test"][1] == pytest.approx(mean) and int(row["networks"][0]) == size
    worth = own.groupby("trial_id")["accuracy"].mean()
    cost, init = (results.trials.set_index("trial_id")[name] for name in ("wall_seconds", "init"))
    front = [row["trial"][0][:10] for row in found.rows("front")]
    unbeaten = [
        one
        for one in worth.index
        if not any(
            cost[o] <= cost[one] and worth[o] >= worth[one] and init[o] == init[one]
            for o in worth.index
            if o != one
        )
    ]
    assert set(unbeaten) <= set(front) and fixed.trial_id in front
    assert {row["among"][0] for row in found.rows("front")} == {"random", "fixed"}


def test_ticks_say_what_is_drawn() -> None:
    """No half step is called a whole one, and no single value is rounded."""
    rows = [{"step": step, "v": 2.317} for step in (0, 1)]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_point()
        .encode(x=x_of(Axis("step", "quantitative"), "step"), y=percent_axis("v", "loss"))
    )
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", vl_convert.vegalite_to_svg(chart.to_dict()))
    assert sorted(labels) == ["0", "1", "2.317", "loss", "step"]


def test_trials_stand_in_the_order_of_the_sweep(folder: Folder) -> None:
    trials = whole(folder)
    assert [row["trial"][0] for row in made(folder.directory.root).rows("all-trials")] == [
        trial.trial_id for trial in trials
    ]


def test_of_every_answer_one_seed_is_picked_before_second_ones(folder: Folder) -> None:
    folder.asked(ASKED.replace("{inner_lr: [0.02, 0.1]}", "{images_per_class: [2, 4, 6, 8]}"))
    trials = [spec(init="random", images_per_class=ipc, seed=seed) for ipc in (2, 4, 6, 8) for seed in (0, 1)]
    for trial in trials:
        folder.evaluated(trial)
        folder.trial(trial, val_score=0.5)
    assert picked(gather([folder.directory.root])) == [0, 2, 4, 6, 1, 3]


def test_losses_of_two_methods_are_not_mixed(folder: Folder) -> None:
    folder.asked("name: small\nbase: {dataset: digits}\n")
    for method in ("bptt", "distribution_matching"):
        for seed in (0, 1):
            trial = spec(init="random", method=method, seed=seed)
            folder.trial(trial)
            path = folder.history(trial)
            times = 100 if method == "bptt" else 1
            rows = [{**row, "outer_loss": times * row["outer_loss"]} for row in read_part(path).to_pylist()]
            write_part(path, rows, HISTORY, folder.directory.temporary)
    section = curves_section(gather([folder.directory.root]))
    charts = {chart.name: chart for chart in section.charts}
    band = charts["loss"].datasets["all"].rows()
    assert {row["method"]: row["mid"] for row in band if row["step"] == 10} == {
        "bptt": 100,
        "distribution_matching": 1,
    }
    assert "the loss of each method" in charts["loss"].caption
    assert "method" not in charts["validation"].caption
    drawn = charts["loss"].build(charts["loss"].x, charts["loss"].colour).to_dict(validate=False)
    assert drawn["layer"][0]["encoding"]["detail"]["field"] == "method"


def test_rates_that_are_not_learned_are_left_out(folder: Folder) -> None:
    folder.asked("name: small\nbase: {dataset: digits}\n")
    changes = ({}, {"inner_lr_mode": "fixed"}, {"method": "distribution_matching"})
    trials = [spec(init="random", **own) for own in changes]
    for trial in trials:
        folder.trial(trial)
        path = folder.directory.distilled(trial.trial_id)
        path.parent.mkdir(parents=True)
        save_file({"rates": np.full(4, 0.02)}, path)
    gathered = gather([folder.directory.root])
    (chart,) = rates_section(gathered).charts
    drawn = {gathered.trials[row["trial"]].trial_id for row in chart.datasets["rates"].rows()}
    assert drawn == {trials[0].trial_id}


def test_the_front_of_cost_and_worth() -> None:
    points = {0: (1.0, 0.5), 1: (2.0, 0.5), 2: (2.0, 0.6), 3: (3.0, 0.55), 4: (4.0, 0.9), 5: (1.0, 0.4)}
    assert front_of(points) == [0, 2, 4]


def test_importance_is_that_of_ranks() -> None:
    rng = np.random.default_rng(0)
    rate, noise = pd.Series(rng.uniform(size=200)), pd.Series(rng.uniform(size=200))
    kind = pd.Series(rng.choice(["a", "b"], size=200))
    score = rate + 0.2 * (kind == "a") + 0.01 * noise
    found = {
        name: importance(values, score) for name, values in (("rate", rate), ("kind", kind), ("n", noise))
    }
    assert found["rate"] is not None and found["kind"] is not None and found["n"] is not None
    assert found["rate"][0] > 0.8 > found["kind"][0] > 0.02 and found["n"][0] < 0.02
    assert found["rate"][2] == pytest.approx(rate.corr(score, method="spearman"))
    assert found["kind"][2] is None
    # H by its definition, from ranks.
    ranks, n = score.rank(), len(score)
    h = 12 / (n * (n + 1)) * sum(ranks[kind == k].sum() ** 2 / (kind == k).sum() for k in "ab") - 3 * (n + 1)
    assert found["kind"][0] == pytest.approx((h - 1) / (n - 2))
    assert importance(pd.Series(["a"] * 9), score[:9]) is None


def test_the_table_of_importance_is_over_settings(folder: Folder) -> None:
    folder.asked(ASKED.replace("[0.02, 0.1]", "[0.01, 0.02, 0.05, 0.1, 0.2, 0.5]"))
    for place, lr in enumerate((0.01, 0.02, 0.05, 0.1, 0.2, 0.5)):
        for seed in (0, 1):
            trial = spec(init="random", inner_lr=lr, seed=seed)
            folder.trial(trial, val_score=0.1 * place + (0.3 if seed else 0.0))
    (row,) = made(folder.directory.root).rows("importances")
    assert row["setting"][0] == "inner lr" and row["values"][0] == "6"
    assert row["rank correlation"][1] == 1.0


def test_none_is_a_value_of_its_own(folder: Folder) -> None:
    folder.asked(ASKED)
    for place, norm in enumerate((None, 1.0, 10.0)):
        for rate in (0.02, 0.1):
            folder.trial(spec(init="random", clip_norm=norm, inner_lr=rate), val_score=0.1 * place + rate / 9)
    rows = {row["setting"][0]: row for row in made(folder.directory.root).rows("importances")}
    assert rows["clip norm"]["values"][0] == "3" and rows["clip norm"]["explains"][1] > 0.5
    assert rows["clip norm"]["rank correlation"][1] is None
    assert rows["inner lr"]["rank correlation"][1] is not None
    scores = pd.Series([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    same = importance(pd.Series([0.0, 0.0, 1.0, 1.0, 2.0, 2.0]), scores)
    found = importance(pd.Series([None, None, 1.0, 1.0, 2.0, 2.0]), scores)
    assert found is not None and same is not None and found[:2] == same[:2] and found[2] is None


def test_a_setting_matters_among_the_trials_whose_method_has_it(folder: Folder) -> None:
    folder.asked(ASKED)
    for place, outer in enumerate((0.01, 0.03)):
        for inner in (0.02, 0.1):
            folder.trial(spec(init="random", inner_lr=inner, outer_lr=outer), val_score=inner + place / 100)
        matched = spec(init="random", method="distribution_matching", outer_lr=outer)
        folder.trial(matched, val_score=0.15 + place / 100)
    rows = {row["setting"][0]: row for row in made(folder.directory.root).rows("importances")}
    assert rows["method"]["values"][0] == rows["inner lr"]["values"][0] == "2"
    assert rows["inner lr"]["rank correlation"][1] is not None


def test_status_is_watched_until_no_driver_is_at_work(folder: Folder) -> None:
    whole(folder)
    command = [sys.executable, "-m", "ddsweep", "status", str(folder.directory.root), "--watch", "1"]
    with SweepLock(folder.directory.lock):
        running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        heads = 0
        while heads < 2:
            line = running.stdout.readline()
            assert line, "it ended while the driver was at work"
            heads += line.startswith("small: 4 trials")
    rest, _ = running.communicate(timeout=120)
    assert running.returncode == 0 and "no driver at work" in rest


def test_watching_ends_with_the_sweep(folder: Folder, tmp_path: Path) -> None:
    whole(folder)
    out = tmp_path / "out" / "index.html"
    command = [sys.executable, "-m", "ddsweep", "report", str(folder.directory.root), "--watch", "1"]
    with SweepLock(folder.directory.lock):
        running = subprocess.Popen([*command, "--out", str(out.parent)], stdout=subprocess.PIPE, text=True)
        end = time.monotonic() + 120
        while not out.exists():
            assert time.monotonic() < end and running.poll() is None
            time.sleep(0.2)
        assert '"renew":1.0' in out.read_text() and "The sweep is running" in out.read_text()
    assert running.wait(120) == 0
    assert '"renew":null' in out.read_text()


def test_a_sweep_that_ends_while_it_is_read_is_read_once_more(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last trial is done, and the driver gone, after the tables were read: the page must not be the last
    one, and no trial has left the sweep file."""
    trials = whole(folder)
    late = folder.directory.trials_part(trials[3].trial_id)
    content = late.read_bytes()
    late.unlink()
    with SweepLock(folder.directory.lock) as lock:

        def read(*arguments: Any, **options: Any) -> Any:
            results = load_results(*arguments, **options)
            late.write_bytes(content)
            lock.release()
            return results

        monkeypatch.setattr(gathering, "load_results", read)
        found = gather([folder.directory.root])
    assert found.running and found.sweeps[0].notes == []
    monkeypatch.undo()
    found = gather([folder.directory.root])
    assert not found.running and [trial.state for trial in found.trials] == 4 * ["done"]


def test_somebodys_own_page_is_not_replaced(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(folder)
    (tmp_path / "index.html").write_text("<title>my site</title>")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder.directory.root), "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and f"--out: {tmp_path / 'index.html'} is not a report of ddsweep" in said
    assert (tmp_path / "index.html").read_text() == "<title>my site</title>"


def test_figures_that_cannot_be_written_name_their_folder(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(folder)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "figures").touch()
    with pytest.raises(SystemExit) as ended:
        main(["report", str(folder.directory.root), "--out", str(tmp_path / "out"), "--figures"])
    said = capsys.readouterr().err
    assert (
        ended.value.code == 1 and f"{tmp_path / 'out'}: cannot be written" in said and "--results" not in said
    )


def test_trials_that_were_distilled_together_cost_their_share(folder: Folder) -> None:
    folder.asked(ASKED)
    for place, trial in enumerate(whole(folder)):
        spent = {"wall_seconds": 40.0, "cpu_seconds": 10.0 + place, "cohort_size": 4}
        folder.trial(trial, val_score=0.5, **spent)
    found = made(folder.directory.root)
    points = json.loads(found.data)["charts"]["cost-front"]["datasets"]["points"]["columns"]
    assert sorted(points["x"]) == [10.0, 11.0, 12.0, 13.0]
    assert "so the time is the share of each" in found.text and "CPU seconds of distilling" in found.data
    assert [row["what"][0] for row in found.rows("again-0") if "time of all" in row["what"][0]] == [
        "CPU time of all trials"
    ]


def test_labels_of_two_sweeps_differ_with_many_varying_settings(tmp_path: Path) -> None:
    """A trial may be in both sweeps."""
    names = ("outer_lr", "inner_lr", "outer_steps", "models_per_step", "real_batch", "trim", "image_scale")
    for name in ("a", "b"):
        directory = SweepDirectory(tmp_path / name)
        directory.create()
        own = Folder(directory)
        for place, setting in enumerate((*names, "init_param", "outer_cutoff", "ema"), 1):
            value = {"ema": 0.5, "trim": 0.25}.get(setting, 2 + place)
            own.evaluated(spec(init="random", **{setting: value}))
    labels = [trial.label for trial in gather([tmp_path / "a", tmp_path / "b"]).trials]
    assert len(set(labels)) == len(labels) == 20


def attacks(folder: Folder) -> list[Any]:
    """Two attacks, of two pairs of classes."""
    found = []
    for attacked, target in ((0, 1), (2, 3)):
        pair = {"attack_class": attacked, "target_class": target}
        trial = spec(init="random", objective="attack", **pair)
        folder.trial(trial, val_score=0.5, **pair)
        for step, success in ((0, 0.02), (4, 0.6 + 0.1 * attacked)):
            for network in range(3):
                columns = {"attack_success": success + 0.01 * network, "accuracy_other": 0.8 - 0.02 * network}
                folder.evals(
                    trial,
                    "as_distilled",
                    10 * step + network,
                    {
                        ("distilled", "as_distilled", step): [(network, 0.7)],
                        **({("random_real", "as_distilled", 4): [(network, 0.6)]} if step else {}),
                    },
                    **columns,
                )
        found.append(trial)
    folder.asked(
        "name: small\nbase: {dataset: digits, network: convnet(width=8), images_per_class: 2, "
        "inner_steps: 2,\n"
        "       inner_epochs: 2, outer_steps: 60, init: random, objective: attack}\n"
        "points: [{attack_class: 0, target_class: 1}, {attack_class: 2, target_class: 3}]\n"
    )
    return found


def test_attacks_are_computed_again(folder: Folder) -> None:
    trials = attacks(folder)
    found = made(folder.directory.root)
    rows = {row["trial"][0]: row for row in found.rows("attack")}
    assert set(rows) == {trial.trial_id for trial in trials}
    for trial, success in zip(trials, (0.6, 0.8), strict=True):
        row = rows[trial.trial_id]
        assert row["attack"][0] == f"{trial.attack_class} → {trial.target_class}"
        assert row["fooled before"][1] == pytest.approx(0.03)
        assert row["fooled after"][1] == pytest.approx(success + 0.01)
        assert row["± fooled after"][1] == pytest.approx(0.01)
        assert row["others after"][1] == pytest.approx(0.78) and row["networks"][0] == "3"
    cells = json.loads(found.data)["charts"]["attack-matrix"]["datasets"]["cells"]["columns"]
    matrix = zip(cells["y"], cells["x"], cells["v"], strict=True)
    assert set(matrix) == {(0, 1, 61.0), (2, 3, 81.0)}
    tests = [row["test"][1] for row in found.rows("best")]
    assert tests == pytest.approx([0.61, 0.81]) or tests == pytest.approx([0.81, 0.61])
    assert "is called the target" in found.text
    assert "78.0 ± 2.0 % on the other classes, 95 % interval" in found.text


def test_a_report_of_attacks_says_that_its_numbers_are_the_fraction_fooled(folder: Folder) -> None:
    trials = attacks(folder)
    for trial in trials:
        folder.history(trial)
    found = made(folder.directory.root)
    for title in ("over the settings", "at each inner step", "in % at each inner step", "in %: mean over"):
        assert f"Fooled {title}" in found.text
    assert "What is drawn: fooled on validation images, %" in found.text
    assert "est accuracy" not in found.text and "Accuracy over" not in found.text


def test_attacks_on_different_networks_are_different_matrices(folder: Folder) -> None:
    for attacked, target in ((0, 1), (2, 3)):
        for width, success in ((8, 0.3), (16, 0.9)):
            pair = {"attack_class": attacked, "target_class": target}
            trial = replace(
                spec(init="random", objective="attack", **pair), network=f"convnet(width={width})"
            )
            folder.trial(trial, val_score=0.5, **pair)
            of_set = {("distilled", "as_distilled", 4): [(network, 0.7) for network in range(3)]}
            folder.evals(trial, "as_distilled", 4, of_set, attack_success=success, accuracy_other=0.8)
    found = made(folder.directory.root)
    charts = {name: chart for name, chart in json.loads(found.data)["charts"].items() if "matrix" in name}
    means = {
        chart["title"]: set(chart["datasets"]["cells"]["columns"]["v"])
        for name, chart in charts.items()
        if name.startswith("attack")
    }
    assert {title.rpartition("width=")[2][:2].rstrip(","): values for title, values in means.items()} == {
        "8": {30.0},
        "16": {90.0},
    }
