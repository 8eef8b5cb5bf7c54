"""Rows of trials that the sweep file no longer has: kept, marked, and left out by default."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pandas as pd
import pytest

from ddsweep import load_results
from ddsweep.errors import ResultsError
from ddsweep.results.collect import compact
from ddsweep.results.current import current_ids, mark_current, write_sweep_file
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.leftover import leftovers, remove
from ddsweep.results.parts import read_whole, write_part, write_part_table
from ddsweep.results.schemas import FAILURES, HISTORY

from .conftest import write_trial


@pytest.fixture
def filled(sweep: SweepDirectory) -> SweepDirectory:
    """Trials aa and bb are done, cc has begun, dd has failed."""
    for trial_id in ("aa", "bb"):
        write_trial(sweep, trial_id)
        folder = sweep.artifacts(trial_id)
        folder.mkdir(parents=True)
        sweep.distilled(trial_id).write_bytes(b"a set")
    write_part(sweep.history_part("cc"), [{"trial_id": "cc", "outer_step": 1}], HISTORY, sweep.temporary)
    write_part(sweep.failure_part("dd"), [{"trial_id": "dd"}], FAILURES, sweep.temporary)
    sweep.sweep_file.write_text("name: a sweep\n")
    return sweep


def ids(directory: SweepDirectory, *, all_trials: bool = False) -> dict[str, list[str]]:
    found = load_results(directory.root, all_trials=all_trials)
    tables = {name: getattr(found, name) for name in ("trials", "evals", "history", "failures")}
    return {name: sorted(frame["trial_id"].unique()) for name, frame in tables.items()}


def flags(directory: SweepDirectory) -> dict[str, bool]:
    """As a reader of the files alone sees them."""
    query = f"SELECT trial_id, in_sweep FROM read_parquet('{directory.parts('trials')}/*.parquet')"
    found = dict(duckdb.execute(query).fetchall())
    frame = pd.read_parquet(directory.parts("trials")).set_index("trial_id")["in_sweep"]
    assert frame.to_dict() == found
    return found


EVERYTHING = {
    "trials": ["aa", "bb"],
    "evals": ["aa", "bb"],
    "history": ["aa", "bb", "cc"],
    "failures": ["dd"],
}


def test_a_reader_gets_the_trials_of_the_sweep_file_and_all_on_request(filled: SweepDirectory) -> None:
    assert ids(filled) == EVERYTHING, "as long as nothing says which there are"
    write_sweep_file(filled, b"name: a sweep\nseeds: 1\n", ["aa", "cc"])
    assert ids(filled) == {"trials": ["aa"], "evals": ["aa"], "history": ["aa", "cc"], "failures": []}
    assert ids(filled, all_trials=True) == EVERYTHING
    assert flags(filled) == {"aa": True, "bb": False}
    assert load_results(filled.root, all_trials=True).trials["in_sweep"].tolist() == [True, False]
    compact(filled)
    assert ids(filled)["trials"] == ["aa"] and ids(filled, all_trials=True) == EVERYTHING
    # The ids are of another sweep file than this: of trials without a row nothing is known.
    filled.sweep_file.write_text("name: a sweep\nseeds: 2\n")
    assert current_ids(filled) is None
    assert ids(filled) == {"trials": ["aa"], "evals": ["aa"], "history": ["aa", "cc"], "failures": ["dd"]}


def test_only_rows_whose_flag_changes_are_written(filled: SweepDirectory) -> None:
    parts = {trial_id: filled.trials_part(trial_id) for trial_id in ("aa", "bb")}
    before = {trial_id: part.stat().st_mtime_ns for trial_id, part in parts.items()}
    mark_current(filled, ["aa", "bb", "new"])
    assert {trial_id: part.stat().st_mtime_ns for trial_id, part in parts.items()} == before
    row, metadata = read_whole(parts["bb"])
    for current, flag in (["aa"], "false"), (["aa", "bb"], "true"):
        mark_current(filled, current)
        assert parts["aa"].stat().st_mtime_ns == before["aa"]
        table, own = read_whole(parts["bb"])
        assert own == {**metadata, "in_sweep": flag}
        assert table.drop_columns(["in_sweep"]).equals(row.drop_columns(["in_sweep"]))
    assert flags(filled) == {"aa": True, "bb": True}


def test_parts_without_the_column_and_torn_ones(filled: SweepDirectory) -> None:
    part = filled.trials_part("bb")
    table, metadata = read_whole(part)
    write_part_table(part, table.drop_columns(["in_sweep"]), filled.temporary, {**metadata, "own": "x"})
    torn = filled.trials_part("aa")
    torn.write_bytes(torn.read_bytes()[:50])
    mark_current(filled, [])
    assert read_whole(part)[0]["in_sweep"].to_pylist() == [False]
    assert read_whole(part)[1]["own"] == "x"
    with pytest.warns(UserWarning, match="torn"):
        assert load_results(filled.root).trials.empty


def test_removing_what_is_left_keeps_the_rest(filled: SweepDirectory) -> None:
    compact(filled)
    mark_current(filled, ["aa"])
    found = leftovers(filled, ["aa"])
    assert [trial.trial_id for trial in found] == ["bb", "cc", "dd"]
    assert [len(trial.parts) for trial in found] == [4, 1, 1]
    assert found[0].size > found[1].size > 0 and found[0].row is not None and found[1].row is None
    kept = {path: path.read_bytes() for path in files(filled) if "aa" in str(path)}
    remove(filled, found, [])
    assert {path: path.read_bytes() for path in files(filled) if "aa" in str(path)} == kept
    assert not [path for path in files(filled) if {"bb", "cc", "dd"} & set(path.stem.split("-"))]
    assert not filled.artifacts("bb").exists()
    assert ids(filled, all_trials=True) == {
        "trials": ["aa"],
        "evals": ["aa"],
        "history": ["aa"],
        "failures": [],
    }
    assert pd.read_parquet(filled.table("trials"))["trial_id"].tolist() == ["aa"], "collected anew"
    assert leftovers(filled, ["aa"]) == []


def files(directory: SweepDirectory) -> list[Path]:
    return [path for path in directory.root.rglob("*") if path.is_file() and ".cache" not in path.parts]


def test_what_cannot_be_removed_is_named(filled: SweepDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    found = leftovers(filled, ["aa"])
    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(ResultsError, match=r"part-bb\.parquet: cannot be removed: Permission denied"):
        remove(filled, found, [])
