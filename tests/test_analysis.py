"""The ten questions of docs/analysis.md: its code runs word for word, and pandas, polars and DuckDB agree."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import nbclient
import nbformat
import pandas as pd
import polars as pl
import pytest

from ddsweep.results.current import mark_current
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.statistics import mean_std_ci
from tests.documents import ROOT, blocks
from tests.report.conftest import Folder, spec

BLOCKS = [block.text for block in blocks("python") if block.page == ROOT / "docs/analysis.md"]
QUESTIONS = [line for line in (ROOT / "docs/analysis.md").read_text().splitlines() if line.startswith("## ")]


def written(root: Path) -> SweepDirectory:
    """A small sweep: two rates, each with two seeds and both kinds of initial networks; a trial that the
    sweep no longer has, better than all, and one that is not done."""
    directory = SweepDirectory(root)
    directory.create()
    folder = Folder(directory)
    folder.asked()
    left, begun = spec(inner_lr=0.5, init="random"), spec(inner_lr=0.1, init="random", seed=9)
    folder.evaluated(left)
    folder.trial(left, val_score=0.99, gain_mean=0.5, wall_seconds=0.1, test_accuracy_mean=0.99)
    folder.history(begun)
    ids = [begun.trial_id]
    for number, lr in enumerate((0.02, 0.1)):
        for seed in (0, 1):
            for init in ("random", "fixed"):
                trial = spec(init=init, inner_lr=lr, seed=seed)
                folder.evaluated(trial)
                ids.append(trial.trial_id)
                found = {"val_score": 0.4 + 0.2 * number + 0.1 * seed, "gain_mean": 0.1 + 0.01 * seed}
                found["n_skipped"] = seed
                cost = {"wall_seconds": 10.0 * number + 2 * seed + (1.0 if init == "random" else 1.5)}
                folder.trial(trial, **found, **cost, test_accuracy_mean=0.5 + 0.1 * number + 0.03 * seed)
    mark_current(directory, ids)
    return directory


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[pd.DataFrame]]]:
    """By question, the answers of the three."""
    directory = written(tmp_path_factory.mktemp("results") / "small")
    found = [_frame(answer) for answer in _answers(directory, BLOCKS)]
    assert len(found) == 30 and len(QUESTIONS) == 10
    yield [found[place : place + 3] for place in range(0, 30, 3)]
    for name in ("trials", "evals", "history"):
        duckdb.sql(f"DROP VIEW {name}")


def _answers(directory: SweepDirectory, blocks: list[str]) -> Iterator[Any]:
    """What the code of ``blocks`` finds there; the first one sets up."""
    names: dict[str, Any] = {}
    first, *rest = blocks
    assert 'root = "results/quickstart"' in first
    exec(first.replace("results/quickstart", str(directory.root)), names)
    for block in rest:
        exec(block, names)
        yield names.pop("answer")


def _frame(answer: Any) -> pd.DataFrame:
    if isinstance(answer, pl.DataFrame):
        answer = pd.DataFrame(answer.to_dict(as_series=False))
    if isinstance(answer, duckdb.DuckDBPyRelation):
        answer = answer.df()
    columns = sorted(answer.columns)
    frame = pd.DataFrame({name: list(answer[name]) for name in columns})
    for name in columns:
        if not isinstance(frame[name].iloc[0], str):
            frame[name] = frame[name].astype(float)
    # Sums in another order differ in the last digits, which must not decide the order of rows.
    return frame.sort_values(
        columns, key=lambda column: column.round(9) if column.dtype == float else column
    ).reset_index(drop=True)


@pytest.mark.parametrize("number", range(10), ids=QUESTIONS)
def test_pandas_polars_and_duckdb_agree(answered: list[list[pd.DataFrame]], number: int) -> None:
    first, *others = answered[number]
    assert len(first) > 0
    for other in others:
        pd.testing.assert_frame_equal(first, other, check_dtype=False)


def test_the_best_setting_is_that_of_best(answered: list[list[pd.DataFrame]]) -> None:
    best = answered[0][0]
    assert list(best["inner_lr"]) == [0.1, 0.1] and list(best["seeds"]) == [2, 2]
    mean, std, _ = mean_std_ci([0.6, 0.63])
    assert list(best["test"]) == pytest.approx([mean] * 2) and list(best["std"]) == pytest.approx([std] * 2)


def test_of_equal_scores_all_three_take_the_first_trial_id(tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path / "equal")
    directory.create()
    folder, first = Folder(directory), {}
    for lr, scores in ((0.02, (0.1, 0.2, 0.3)), (0.1, (0.3, 0.2, 0.1)), (0.5, (0.2, 0.2, 0.2))):
        for seed, score in enumerate(scores):
            trial = spec(init="random", inner_lr=lr, seed=seed)
            folder.evaluated(trial)
            folder.trial(trial, val_score=score)
            first[trial.trial_id] = lr
    for answer in _answers(directory, BLOCKS[:4]):
        assert list(_frame(answer)["inner_lr"]) == [first[min(first)]]


def test_the_other_answers_are_right(answered: list[list[pd.DataFrame]]) -> None:
    # Of conftest: distilled 0.6, k-means 0.45, network i off by a hundredth of (i + place of the source)^2.
    gains = answered[2][0]
    random = gains[gains["networks"] == 4]
    assert len(random) == 4
    one = [0.15 + 0.01 * ((i + 2) ** 2 - (i + 5) ** 2) for i in range(4)]
    assert random["gain"].tolist() == pytest.approx([sum(one) / 4] * 4)
    assert set(answered[9][0]["enough"]) == {60.0}
    assert sorted(answered[8][0]["n_skipped"]) == [0] * 4 + [1] * 4
    assert answered[4][0]["wall_seconds"].tolist()[0] == 1.0


NOTEBOOK = ROOT / "docs/analysis.ipynb"


def test_the_notebook_is_the_page_and_holds_no_outputs() -> None:
    """Nor, therefore, any path of the machine on which it was run last."""
    made = runpy.run_path(str(ROOT / "docs/notebook.py"))["notebook"]
    text = NOTEBOOK.read_text()
    assert text == made((ROOT / "docs/analysis.md").read_text()), "`make docs` writes it again"
    cells = json.loads(text)["cells"]
    assert [cell for cell in cells if cell["cell_type"] == "code" and cell["outputs"]] == []


def test_the_notebook_answers_every_question(tmp_path: Path, answered: list[list[pd.DataFrame]]) -> None:
    """From top to bottom with a real kernel, in the folder where it stands."""
    written(tmp_path / "results" / "quickstart")
    (tmp_path / "docs").mkdir()
    notebook = nbformat.reads(NOTEBOOK.read_text(), as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "docs")}}
    ).execute()
    shown = [
        "".join(output["data"]["text/plain"] for output in cell["outputs"] if "data" in output)
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and cell["source"].endswith("answer")
    ]
    assert len(shown) == 30
    for number, texts in enumerate(shown[place : place + 3] for place in range(0, 30, 3)):
        (column,) = [name for name in answered[number][0] if name in NUMBERS]
        for text in texts:
            assert column in text, "each of the three shows its table"
    for mean in answered[0][0]["test"]:
        assert all(re.search(rf"{mean:.3f}", text) for text in shown[:3])


NUMBERS = (
    "score",
    "best",
    "gain",
    "cost",
    "wall_seconds",
    "protocol",
    "inner_step",
    "model_seed",
    "diverged",
    "enough",
)
"""A column of each question's answer that no other one has."""
