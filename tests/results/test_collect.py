"""Compaction a stretch of trials at a time, and reading what was collected instead of the parts."""

from __future__ import annotations

import errno
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from ddsweep import load_results
from ddsweep.errors import ResultsError, UnreadableError
from ddsweep.results import collect, reader
from ddsweep.results.collect import compact
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.results.schemas import SORT_KEYS, TABLES

from .conftest import write_trial

IDS = [f"{number:010x}" for number in random.Random(0).sample(range(16**10), 12)]


@pytest.fixture
def filled(sweep: SweepDirectory) -> SweepDirectory:
    for place, trial_id in enumerate(IDS):
        write_trial(sweep, trial_id, accuracy=place / 100)
    return sweep


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_ROWS_TOGETHER", 14)
    monkeypatch.setattr(collect, "_PARTS_TOGETHER", 2)


@pytest.mark.usefixtures("short_stretches")
def test_stretches_are_in_the_order_of_the_whole(filled: SweepDirectory) -> None:
    assert compact(filled) == {"trials": 12, "evals": 72, "history": 24, "failures": 0}
    for name in TABLES:
        table = read_part(filled.table(name))
        assert table.schema.equals(TABLES[name], check_metadata=False)
        assert table.equals(table.sort_by([(key, "ascending") for key in SORT_KEYS[name]]))
    evals = read_part(filled.table("evals"))
    assert evals["trial_id"].to_pylist() == sorted(6 * IDS)


@pytest.mark.usefixtures("short_stretches")
def test_a_torn_part_leaves_nothing_behind(filled: SweepDirectory) -> None:
    torn = filled.history_part(IDS[3])
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(ResultsError, match=str(torn)):
        compact(filled)
    assert not filled.tables.exists() and not list(filled.temporary.iterdir())


def _frames(directory: SweepDirectory) -> dict[str, pd.DataFrame]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_results(directory.root)
    return {name: getattr(found, name) for name in TABLES}


def test_results_are_the_same_before_and_after_collecting(
    filled: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _frames(filled)
    compact(filled)
    parts: list[str] = []
    monkeypatch.setattr(reader, "sorted_rows", lambda _, name, __: parts.append(name) or iter([]))
    for name, frame in _frames(filled).items():
        pd.testing.assert_frame_equal(frame, before[name])
    assert parts == ["failures"], "a table of which there are parts was collected"


@pytest.mark.parametrize("change", ["a new part", "a part replaced", "a part gone", "the table altered"])
def test_a_table_that_is_not_of_these_parts_is_not_read(filled: SweepDirectory, change: str) -> None:
    compact(filled)
    table = filled.table("trials")
    if change == "a new part":
        write_trial(filled, "f" * 10)
    elif change == "a part replaced":
        write_trial(filled, IDS[0], accuracy=0.99)
    elif change == "a part gone":
        filled.trials_part(IDS[0]).unlink()
    else:
        table.write_bytes(table.read_bytes()[:-9])
    found = _frames(filled)["trials"].set_index("trial_id")["test_accuracy_mean"].to_dict()
    expected = {trial_id: place / 100 for place, trial_id in enumerate(IDS)}
    if change == "a new part":
        expected["f" * 10] = 0.5
    elif change == "a part replaced":
        expected[IDS[0]] = 0.99
    elif change == "a part gone":
        del expected[IDS[0]]
    assert found == expected


def test_a_table_that_rots_is_made_up_for_by_the_parts(
    filled: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact(filled)

    def unreadable(path: Path) -> None:
        raise ResultsError(f"torn part: {path}")

    monkeypatch.setattr(reader, "read_part", unreadable)
    assert sorted(_frames(filled)["trials"]["trial_id"]) == sorted(IDS)


@pytest.mark.parametrize("away", [tuple(TABLES), ("evals",)], ids=["all", "evals"])
def test_a_table_whose_parts_are_packed_away_stays(filled: SweepDirectory, away: tuple[str, ...]) -> None:
    counts, frames = compact(filled), _frames(filled)
    for name in away:
        shutil.rmtree(filled.parts(name))
    assert compact(filled) == counts
    for name, frame in _frames(filled).items():
        pd.testing.assert_frame_equal(frame, frames[name])


def test_a_folder_that_the_system_does_not_list_is_not_an_empty_one(
    filled: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact(filled)
    before = {name: filled.table(name).read_bytes() for name in TABLES}
    refused, listdir = filled.parts("evals"), os.listdir

    def failing(path: Path) -> list[str]:
        if path == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", failing)
    actions: list[Callable[[], object]] = [
        lambda: compact(filled),
        lambda: load_results(filled.root),
        filled.evals_by_trial,
        lambda: filled.evals_parts(IDS[0]),
    ]
    for action in actions:
        with pytest.raises(UnreadableError, match=f"{refused}: cannot be read: Input/output error"):
            action()
    assert {name: filled.table(name).read_bytes() for name in TABLES} == before
    refused = filled.parts("history")
    with pytest.raises(UnreadableError, match=str(refused)):
        filled.seen_trials()
