from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pytest

from ddsweep import load_results
from ddsweep.errors import ResultsError
from ddsweep.results.collect import compact
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import write_part
from ddsweep.results.schemas import FAILURES

from .conftest import write_trial

ROWS = {"trials": 2, "evals": 12, "history": 4}


@pytest.fixture
def filled(sweep: SweepDirectory) -> SweepDirectory:
    for trial_id, accuracy in (("aa", 0.25), ("bb", 0.75)):
        write_trial(sweep, trial_id, accuracy)
    # What a killed writer leaves behind.
    for name in ("part-zz.parquet", ".part-zz.parquet", "part-zz.parquet.host.1.ff.partial"):
        (sweep.temporary / name).write_bytes(b"half a file")
    return sweep


@pytest.mark.parametrize("table", ROWS)
def test_pandas_polars_and_duckdb_read_the_folders_as_they_are(filled: SweepDirectory, table: str) -> None:
    folder = filled.parts(table)
    by_pandas = pd.read_parquet(folder)
    by_polars = pl.read_parquet(folder)
    by_duckdb = duckdb.execute(f"SELECT * FROM read_parquet('{folder}/*.parquet')").fetchall()
    assert len(by_pandas) == by_polars.height == len(by_duckdb) == ROWS[table]
    assert list(by_pandas.columns) == by_polars.columns
    assert set(by_pandas["trial_id"]) == set(by_polars["trial_id"]) == {row[0] for row in by_duckdb}


def test_the_documented_queries_agree(filled: SweepDirectory) -> None:
    query = f"SELECT avg(accuracy) FROM read_parquet('{filled.root}/evals/*.parquet', union_by_name=true)"
    (found,) = duckdb.execute(query).fetchall()
    assert found is not None and found[0] == pytest.approx(0.5)
    assert load_results(filled.root).evals["accuracy"].mean() == pytest.approx(0.5)
    evals = pl.scan_parquet(f"{filled.root}/evals/*.parquet")
    assert evals.select(pl.col("accuracy").mean()).collect().item() == pytest.approx(0.5)


def test_frames_are_typed(filled: SweepDirectory) -> None:
    failure = {"trial_id": "cc", "attempts": 2, "message": "no"}
    write_part(filled.failure_part("cc"), [failure], FAILURES, filled.temporary)
    results = load_results(str(filled.root))
    trials = results.trials.set_index("trial_id")
    assert trials.loc["bb", "test_accuracy_mean"] == 0.75
    assert trials["inner_steps"].dtype == pd.Int32Dtype() and trials["seed"].dtype == pd.Int64Dtype()
    assert trials["test_models"].isna().all() and trials["test_models"].dtype == pd.Int32Dtype()
    assert trials["test_accuracy_std"].dtype == "float64"
    assert str(trials["started_at"].dtype) == "datetime64[us, UTC]"
    assert len(results.evals[~results.evals["diverged"]]) == 12
    assert results.failures["attempts"].tolist() == [2]
    assert results.torn == ()


def test_results_say_what_they_hold_and_a_notebook_shows_the_trials(filled: SweepDirectory) -> None:
    results = load_results(filled.root)
    assert repr(results) == "Results(2 trials, 12 evals, 4 history, 0 failures)"
    shown = results._repr_html_()
    assert repr(results) in shown and "<td>75.0" in shown and "<th>test_accuracy, %</th>" in shown
    assert "<th>network</th>" not in shown, "a setting that all trials share is no column"
    more = {"network": ["<b>", "x"], "gain_mean": [0.1, None], "gain_ci95": [0.02, None]}
    named = replace(results, trials=results.trials.assign(**more))._repr_html_()
    assert "<td>&lt;b&gt;</td>" in named and "<td>10.0 ± 2.0</td>" in named
    lacking = results.trials.assign(method=["bptt", "distribution_matching"], window=[3, None])
    lacking = replace(results, trials=lacking)._repr_html_()
    assert "<th>method</th>" in lacking and "<th>window</th>" not in lacking, "matching has no windows"
    none = replace(results, trials=results.trials[:0])
    assert "<th>trial_id</th>" in none._repr_html_()
    many = replace(results, trials=pd.concat([results.trials] * 500))
    assert len(many._repr_html_()) < 20_000


def test_torn_parts_are_left_out_with_a_warning(filled: SweepDirectory) -> None:
    torn = filled.trials_part("aa")
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="part-aa.parquet is torn"):
        results = load_results(filled.root)
    assert results.torn == (torn,)
    assert results.trials["trial_id"].tolist() == ["bb"] and len(results.evals) == 12


def test_tables_are_read_where_the_parts_are_gone(filled: SweepDirectory) -> None:
    before = load_results(filled.root)
    compact(filled)
    for table in ("trials", "evals", "history", "failures"):
        shutil.rmtree(filled.parts(table))
    after = load_results(filled.root)
    pd.testing.assert_frame_equal(before.trials, after.trials)
    pd.testing.assert_frame_equal(before.evals, after.evals)


def test_a_sweep_that_has_not_begun_is_empty(sweep: SweepDirectory) -> None:
    sweep.sweep_file.write_text("name: demo\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = load_results(sweep.root)
    assert len(results.trials) == 0 and "val_score" in results.trials.columns


def test_a_folder_that_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no such results folder"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match="holds no tables"):
        load_results(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "sweep.yaml").touch()
    with pytest.raises(ResultsError, match="give one of the sweeps in it: demo"):
        load_results(tmp_path)
