"""A part that was whole once is not read again while it is the same file, and read again when it is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ddsweep.results import known as known_module
from ddsweep.results.collect import compact
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_whole

from .conftest import write_trial


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The parts that were read in full since."""
    seen: list[Path] = []

    def counted(path: Path) -> object:
        if path.name != "parts.parquet":
            seen.append(path)
        return read_whole(path)

    monkeypatch.setattr(known_module, "read_whole", counted)
    return seen


@pytest.fixture
def part(sweep: SweepDirectory) -> Path:
    write_trial(sweep, "ab")
    return sweep.evals_part("ab", "as_distilled", "xavier", 0)


def test_a_whole_part_is_read_once_also_by_the_next_process(
    sweep: SweepDirectory, part: Path, reads: list[Path]
) -> None:
    known = KnownParts.load(sweep)
    for _ in range(2):
        assert known.metadata(part) == {"schema_version": "1", "evaluation_id": "abc"}
        assert known.is_whole(part) and known.is_same(part)
    assert reads == [part]
    known.save(sweep)
    del reads[:]
    again = KnownParts.load(sweep)
    assert again.metadata(part) == again.footer(part) == {"schema_version": "1", "evaluation_id": "abc"}
    assert not reads


def _cut(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-9])


def _alter(part: Path) -> None:
    """In place, of the same size, and with the time of before put back."""
    before, content = part.stat(), bytearray(part.read_bytes())
    content[len(content) // 8] ^= 0xFF
    with part.open("r+b") as file:
        file.write(content)
    os.utime(part, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (part.stat().st_size, part.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("damage", [_cut, _alter, Path.unlink])
def test_damage_to_a_known_part_is_seen(
    sweep: SweepDirectory, part: Path, damage: Callable[[Path], None]
) -> None:
    known = KnownParts.load(sweep)
    assert known.is_whole(part)
    known.save(sweep)
    damage(part)
    for now in (known, KnownParts.load(sweep)):
        assert not now.is_same(part) and not now.is_whole(part)


def test_a_part_that_was_replaced_is_read_again(sweep: SweepDirectory, part: Path, reads: list[Path]) -> None:
    known = KnownParts.load(sweep)
    assert known.is_whole(part)
    write_trial(sweep, "ab", accuracy=0.25)
    assert known.is_whole(part)
    assert reads.count(part) == 2


def test_altered_bytes_of_it_are_not_believed(sweep: SweepDirectory, part: Path) -> None:
    known = KnownParts.load(sweep)
    known.whole(part)
    known.save(sweep)
    (file,) = sweep.cache.glob("parts.parquet")
    whole = file.read_bytes()
    for place in range(4, len(whole), max(1, len(whole) // 200)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        again = KnownParts.load(sweep)
        assert not again.is_same(part) or again.footer(part) == known.footer(part)


def test_what_was_known_may_be_lost(sweep: SweepDirectory, part: Path) -> None:
    known = KnownParts.load(sweep)
    assert known.is_whole(part)
    known.save(sweep)
    (sweep.cache / "parts.parquet").write_bytes(b"PAR1")
    assert not KnownParts.load(sweep).is_same(part)
    assert KnownParts.load(sweep).is_whole(part)


def test_nothing_learned_writes_nothing(sweep: SweepDirectory) -> None:
    known = KnownParts.load(sweep)
    assert known.metadata(sweep.trials_part("ab")) is None
    known.save(sweep)
    assert not list(sweep.cache.iterdir())


def test_collecting_knows_all_parts_but_reads_them_again(
    sweep: SweepDirectory, part: Path, reads: list[Path]
) -> None:
    compact(sweep)
    known = KnownParts.load(sweep)
    parts = sorted(path for table in ("trials", "evals", "history") for path in sweep.parts(table).iterdir())
    assert part in parts and all(map(known.is_same, parts))
    del reads[:]
    assert all(map(known.is_whole, parts)) and not reads
