from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from subprocess import Popen
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddsweep.errors import DiskFullError, ResultsError, UnreadableError
from ddsweep.results.collect import compact
from ddsweep.results.files import full_disk_told, patiently, remove_leftovers
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import (
    is_whole,
    part_metadata,
    read_part,
    read_whole,
    write_atomic,
    write_part,
)
from ddsweep.results.schemas import EVALS, HISTORY, POOL, TABLES, TRIALS
from tests.tables import read_table, torn_parts

from .conftest import write_trial


def content(sweep: SweepDirectory) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sweep.tables.iterdir()}


# ---------------------------------------------------------------------------------------- writing


def test_a_part_is_read_back_as_written(sweep: SweepDirectory) -> None:
    started = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    row: dict[str, Any] = {"trial_id": "ab", "seed": 2**40, "git_dirty": False, "started_at": started}
    path = sweep.trials_part("ab")
    write_part(path, [row], TRIALS, sweep.temporary, {"evaluation_id": "xyz"})
    table = read_part(path)
    assert table.schema.equals(TRIALS)
    assert table.to_pylist() == [{**dict.fromkeys(TRIALS.names), **row}]
    assert part_metadata(path) == {"schema_version": "1", "evaluation_id": "xyz"}
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "SNAPPY"


def test_no_rows_is_a_part_too(sweep: SweepDirectory) -> None:
    write_part(sweep.history_part("ab"), [], HISTORY, sweep.temporary)
    assert read_part(sweep.history_part("ab")).num_rows == 0


def test_an_unknown_column_is_an_error_and_writes_nothing(sweep: SweepDirectory) -> None:
    with pytest.raises(ValueError, match="acuracy"):
        write_part(sweep.history_part("ab"), [{"trial_id": "ab", "acuracy": 1.0}], HISTORY, sweep.temporary)
    assert not sweep.history_part("ab").exists()


def test_a_writer_that_raises_leaves_what_was_there(sweep: SweepDirectory) -> None:
    path = sweep.artifacts("ab") / "file"
    write_atomic(path, b"old", sweep.temporary)

    def fail(partial: Path) -> None:
        partial.write_bytes(b"half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_atomic(path, fail, sweep.temporary)
    with pytest.raises(RuntimeError):
        write_atomic(sweep.trials_part("ab"), fail, sweep.temporary)
    assert path.read_bytes() == b"old"
    assert not sweep.trials_part("ab").exists()
    assert list(sweep.temporary.iterdir()) == []


def test_a_full_disk_is_told_and_loses_nothing(
    sweep: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sweep.root / "file"
    write_atomic(path, b"old", sweep.temporary)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ResultsError, match=r"no space left.*nothing was lost.*run the same command again"
    ) as caught:
        write_atomic(path, b"new", sweep.temporary)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old" and list(sweep.temporary.iterdir()) == []


def test_a_full_disk_is_seen_below_the_errors_of_others(tmp_path: Path) -> None:
    """Ray and Tune raise errors of their own, below which the reason lies."""

    class RayTaskError(Exception):
        cause = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/results/a/file")

    with pytest.raises(DiskFullError, match=r"^/results/a/file: no space left"), full_disk_told(tmp_path):
        try:
            raise RayTaskError
        except RayTaskError as error:
            raise RuntimeError("Tune could not go on") from error
    with pytest.raises(DiskFullError, match=f"^{tmp_path}: no space left"), full_disk_told(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="Input/output"), full_disk_told(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_writer_that_is_to_stop_does_not_wait_for_space(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def write() -> None:
        tried.append(time.monotonic())
        raise DiskFullError("full")

    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(DiskFullError):
        patiently(write, lambda: True)
    assert len(tried) == 1


def test_a_writer_killed_in_the_middle_leaves_only_readable_parts(
    sweep: SweepDirectory, run_python: Callable[..., Popen[str]]
) -> None:
    code = """
import sys
from pathlib import Path
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import write_part
from ddsweep.results.schemas import HISTORY
sweep = SweepDirectory(Path(sys.argv[1]))
rows = [{"trial_id": "ab", "outer_step": i, "outer_loss": i / 7} for i in range(2000)]
n = 0
while True:
    write_part(sweep.history_part(f"{n % 3}"), rows, HISTORY, sweep.temporary)
    n += 1
    print("ready", flush=True) if n == 1 else None
"""
    for _ in range(3):
        with run_python(code, sweep.root) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(random.uniform(0.01, 0.05))
            process.kill()
    parts = list(sweep.parts("history").iterdir())
    assert parts and torn_parts(sweep.parts("history")) == []
    assert all(read_part(path).num_rows == 2000 for path in parts)


def test_leftovers_of_killed_writers_go_when_they_are_old(sweep: SweepDirectory) -> None:
    old, young = sweep.temporary / "a.host.1.ff.partial", sweep.temporary / "b.host.2.ff.partial"
    for path in (old, young, sweep.stop_file):
        path.touch()
    os.utime(old, (0, 0))
    assert remove_leftovers(sweep.temporary) == 1
    assert sorted(sweep.temporary.iterdir()) == sorted([young, sweep.stop_file])


# ---------------------------------------------------------------------------------------- reading


def test_files_of_before_read_with_nulls_and_newer_ones_without_their_columns(sweep: SweepDirectory) -> None:
    old = pa.table({"trial_id": ["old"], "outer_step": pa.array([5], pa.int64())})
    pq.write_table(old, sweep.history_part("old"))
    pq.write_table(pa.table({"trial_id": ["young"], "column_of_2030": [1]}), sweep.history_part("young"))
    table = read_table(sweep.parts("history"), HISTORY)
    assert table.schema.equals(HISTORY)
    assert table.select(["trial_id", "outer_step", "outer_loss"]).to_pylist() == [
        {"trial_id": "old", "outer_step": 5, "outer_loss": None},
        {"trial_id": "young", "outer_step": None, "outer_loss": None},
    ]


def test_a_column_of_another_type_is_named(sweep: SweepDirectory) -> None:
    pq.write_table(pa.table({"trial_id": ["x"], "outer_step": ["five"]}), sweep.history_part("x"))
    with pytest.raises(ResultsError, match=r"part-x\.parquet: column outer_step is string"):
        read_table(sweep.parts("history"), HISTORY)


def test_a_missing_folder_is_an_empty_table(tmp_path: Path) -> None:
    assert read_table(tmp_path / "nowhere", EVALS).equals(EVALS.empty_table())


def test_dot_files_and_other_files_are_no_parts(sweep: SweepDirectory) -> None:
    write_trial(sweep, "ab")
    for name in (".part-x.parquet", "_x.parquet", "README.txt", ".nfs0001"):
        (sweep.parts("trials") / name).write_bytes(b"junk")
    assert read_table(sweep.parts("trials"), TRIALS).num_rows == 1
    assert torn_parts(sweep.parts("trials")) == []


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_part_is_named(sweep: SweepDirectory, keep: int) -> None:
    write_trial(sweep, "ab")
    write_trial(sweep, "cd")
    torn = sweep.trials_part("cd")
    torn.write_bytes(torn.read_bytes()[:keep])
    assert torn_parts(sweep.parts("trials")) == [torn]
    for action in (
        lambda: read_part(torn),
        lambda: part_metadata(torn),
        lambda: read_table(sweep.parts("trials"), TRIALS),
        lambda: compact(sweep),
    ):
        with pytest.raises(ResultsError) as caught:
            action()
        message = str(caught.value)
        assert str(torn) in message and str(sweep.trials_part("ab")) not in message
        assert all(f"ddsweep {verb}" in message for verb in ("run", "collect", "status"))


def test_altered_values_are_seen(sweep: SweepDirectory) -> None:
    path = sweep.history_part("ab")
    rows = [{"trial_id": "ab", "outer_step": i, "outer_loss": i / 7} for i in range(500)]
    write_part(path, rows, HISTORY, sweep.temporary)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(2)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    assert torn_parts(sweep.parts("history")) == [path]


def test_every_altered_byte_is_seen(sweep: SweepDirectory) -> None:
    """Parquet has no check sum of the footer, which is most of a small part. Of the seal's own key nothing
    depends: without it a part is one of version 0.1."""
    path = sweep.trials_part("ab")
    write_part(path, [{"trial_id": "ab", "seed": 3}], TRIALS, sweep.temporary, {"holds": '{"a": 1}'})
    table, metadata = read_whole(path)
    whole = path.read_bytes()
    columns = {name for schema in (*TABLES.values(), POOL) for name in schema.names}
    assert "part_sha256" not in columns, "a column of that name would be taken for the seal"
    key = whole.rindex(b"\x18\x0bpart_sha256")
    for place in [*range(0, len(whole), 7), *range(key + 13, key + 25)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if place in range(key, key + 2):  # its kind and its length: seen, or no seal at all
            with suppress(ResultsError):
                assert read_whole(path)[0].equals(table)
            continue
        if place in range(key + 2, key + 13):
            assert read_whole(path)[0].equals(table)
            continue
        for action in (read_whole, part_metadata):
            with pytest.raises(ResultsError, match="torn part"):
                action(path)
    path.write_bytes(whole)
    assert read_whole(path)[1] == metadata == {"schema_version": "1", "holds": '{"a": 1}'}


def test_a_part_that_the_system_cannot_read_is_not_torn(
    sweep: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trial(sweep, "ab")

    def failing(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "read_bytes", failing)
    path = sweep.trials_part("ab")
    for action in (read_part, part_metadata, is_whole, KnownParts().metadata):
        with pytest.raises(UnreadableError, match=f"{path}: cannot be read: Stale file handle"):
            action(path)
    assert not KnownParts.load(sweep).is_same(path), "what is only kept to be quicker may be away"


def test_long_names_can_be_written(sweep: SweepDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name has 255 bytes at most, and pods have long ones."""
    monkeypatch.setattr("socket.gethostname", lambda: "trainer-" + 55 * "x")
    path = sweep.evals_part("ab", "protocol-" + 90 * "y", "pool-" + 90 * "z", 0)
    write_part(path, [], EVALS, sweep.temporary)
    assert read_part(path).num_rows == 0


# ------------------------------------------------------------------------------------- compaction


def test_compaction_is_idempotent_and_free_of_order(tmp_path: Path) -> None:
    found = []
    for order in (["aa", "bb", "cc"], ["cc", "aa", "bb"]):
        sweep = SweepDirectory(tmp_path / order[0])
        sweep.create()
        for trial_id in order:
            write_trial(sweep, trial_id)
        counts = compact(sweep)
        first = content(sweep)
        assert compact(sweep) == counts == {"trials": 3, "evals": 18, "history": 6, "failures": 0}
        assert content(sweep) == first and set(first) == {f"{name}.parquet" for name in TABLES}
        assert len(list(sweep.parts("evals").iterdir())) == 6  # the parts stay
        found.append(first)
    assert found[0] == found[1]


def test_a_compacted_table_has_the_rows_of_the_parts(sweep: SweepDirectory) -> None:
    for trial_id in ("bb", "aa"):
        write_trial(sweep, trial_id)
    compact(sweep)
    table = read_part(sweep.table("evals"))
    assert table.schema.equals(EVALS, check_metadata=False)
    assert part_metadata(sweep.table("evals")) == {"schema_version": "1"}
    assert table.to_pylist() == read_table(sweep.parts("evals"), EVALS).to_pylist()
    assert table["model_seed"].to_pylist() == [0, 1, 2, 16, 17, 18] * 2


def test_a_torn_part_leaves_the_tables_of_before(sweep: SweepDirectory) -> None:
    write_trial(sweep, "aa")
    compact(sweep)
    before = content(sweep)
    write_trial(sweep, "bb")
    torn = [sweep.trials_part("bb"), sweep.history_part("bb")]
    for path in torn:
        path.write_bytes(b"PAR1")
    with pytest.raises(ResultsError, match="2 torn parts") as caught:
        compact(sweep)
    assert all(str(path) in str(caught.value) for path in torn)
    assert content(sweep) == before
