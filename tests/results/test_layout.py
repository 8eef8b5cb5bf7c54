from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ddsweep.errors import ResultsError
from ddsweep.results.layout import SweepDirectory


def test_names_of_files() -> None:
    sweep = SweepDirectory(Path("results/demo"))
    assert sweep.sweep_file == Path("results/demo/sweep.yaml")
    assert sweep.trials_part("ab").as_posix() == "results/demo/trials/part-ab.parquet"
    part = sweep.evals_part("ab", "as_distilled", "xavier", 7)
    assert part.as_posix() == "results/demo/evals/part-ab-as_distilled-xavier-g007.parquet"
    assert sweep.checkpoint("ab").as_posix() == "results/demo/artifacts/ab/checkpoint.safetensors"
    assert sweep.stop_file.as_posix() == "results/demo/.tmp/STOP"


def test_a_pool_of_any_name_stays_in_its_folder() -> None:
    sweep = SweepDirectory(Path("demo"))
    assert sweep.evals_part("ab", "p", "../my pool", 0).parent == Path("demo/evals")


def test_create_makes_folders_and_leaves_no_probe(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path / "results" / "demo")
    sweep.create()
    sweep.create()
    names = sorted(p.name for p in sweep.root.rglob("*"))
    assert names == sorted([".cache", ".tmp", "artifacts", "evals", "failures", "history", "trials"])


def test_evals_parts_are_those_of_one_trial(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path)
    sweep.create()
    for trial_id, group in (("ab", 1), ("ab", 0), ("abc", 0)):
        sweep.evals_part(trial_id, "p", "xavier", group).touch()
    assert [p.name for p in sweep.evals_parts("ab")] == [
        "part-ab-p-xavier-g000.parquet",
        "part-ab-p-xavier-g001.parquet",
    ]


def test_evals_by_trial_lists_what_is_listed_for_each(tmp_path: Path) -> None:
    sweep = SweepDirectory(tmp_path)
    assert sweep.evals_by_trial() == {}
    sweep.create()
    for trial_id, protocol in (("cd", "p"), ("ab", "order=shuffled,inner_lr=0.1"), ("ab", "on-its-own")):
        for group in (1, 0):
            sweep.evals_part(trial_id, protocol, "xavier", group).touch()
    (sweep.parts("evals") / ".part-ab-p-xavier-g000.parquet").touch()
    found = sweep.evals_by_trial()
    assert found == {trial_id: sweep.evals_parts(trial_id) for trial_id in ("ab", "cd")}
    assert len(found["ab"]) == 4


@pytest.mark.parametrize("where", ["results", "results/demo", "results/demo/evals"])
def test_a_file_in_the_way(tmp_path: Path, where: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    with pytest.raises(ResultsError, match="a file is in the way") as caught:
        SweepDirectory(tmp_path / "results" / "demo").create()
    assert str(tmp_path / "results") in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EIO, "cannot write"),
    ],
)
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    def refuse(self: Path, data: bytes) -> int:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ResultsError, match=message) as caught:
        SweepDirectory(tmp_path / "demo").create()
    assert str(tmp_path / "demo") in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ResultsError, match="no permission"):
        SweepDirectory(tmp_path / "demo").create()
