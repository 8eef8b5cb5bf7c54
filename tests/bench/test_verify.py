"""`make verify-results`: a kept set that is what its table says passes, and others fail."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from bench.keep import keep
from bench.verify import ANEW_TOLERANCE, KEPT, compared, main, scored
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.splits import Splits
from ddsweep.errors import UserError
from ddsweep.one_trial import run_trial
from ddsweep.provenance import environment
from ddsweep.results.artifacts import load_tensors, save_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part, write_part
from ddsweep.results.schemas import TRIALS

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DDSWEEP_DATA") or ROOT.parent / "shared" / "data")
HOST = "a-host-that-nobody-has"
WITH_POOL = {path.parent.name for path in KEPT.glob("*/pool.yaml")}
SETTINGS = {
    **{"dataset": "digits", "network": "convnet(width=4)", "images_per_class": 1, "inner_epochs": 3},
    **{"outer_steps": 10, "models_per_step": 2, "selection_networks": 2, "inner_lr": 0.5},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kept row, made from nothing."""
    folder = tmp_path_factory.mktemp("kept")
    with patch.dict(environment(), host=HOST):
        found = run_trial(SETTINGS, folder / "results", evaluate={"networks": 24, "baselines": "none"})
    keep(SweepDirectory(found.directory), folder / "kept" / "row")
    return folder / "kept"


def test_what_is_kept_names_no_host(made: Path) -> None:
    (part,) = (made.parent / "results" / "trials").glob("*.parquet")
    assert pq.read_table(part)["host"].to_pylist() == [HOST], "the results do"
    kept = list((made / "row").iterdir())
    assert {path.suffix for path in kept} == {".parquet", ".safetensors", ".png", ".yaml"}
    for path in kept:
        assert HOST.encode() not in path.read_bytes(), path.name
        if path.suffix == ".parquet":  # compressed
            table = pq.read_table(path)
            assert HOST not in f"{table.to_pylist()} {table.schema.metadata}", path.name


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=pytest.mark.slow if row.startswith("cifar10") else ())
        for row in sorted({path.parent.name for path in KEPT.glob("*/sweep.yaml")} - WITH_POOL)
    ],
)
def test_a_kept_set_holds_on_real_images(row: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Four networks, with half a minute for each on CIFAR-10; of a pool they would have to be trained."""
    if not (DATA / ("cifar10" if row.startswith("cifar10") else "MNIST")).is_dir():
        pytest.skip("needs the data of the row under DDSWEEP_DATA: `ddsweep data fetch`")
    assert main([row, "--networks", "4", "--data-root", str(DATA)]) == 0
    assert f"{row} " in (said := capsys.readouterr().out) and ": pass: " in said


def test_what_the_table_says_passes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--networks", "24", "--kept", str(made)]) == 0
    said = capsys.readouterr().out
    assert ": pass: " in said and "on 24 networks, kept" in said


def test_a_known_network_is_trained_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = {**SETTINGS, "init": "fixed", "models_per_step": 1, "seed": 3}
    found = run_trial(known, tmp_path / "results", evaluate={"networks": 2, "baselines": "none"})
    keep(SweepDirectory(found.directory), tmp_path / "kept" / "row")
    assert main(["--kept", str(tmp_path / "kept")]) == 0
    said = capsys.readouterr().out
    assert "on 1 network, kept" in said and "difference +0.00, allowed 0.50 points" in said


def test_a_run_of_ones_own_is_compared(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["row", "--results", str(made.parent / "results"), "--kept", str(made)]) == 0
    assert "difference +0.00" in capsys.readouterr().out


def test_a_run_with_other_settings_is_no_run_of_the_row(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**SETTINGS, "outer_steps": 2}
    found = run_trial(other, tmp_path / "results", evaluate={"networks": 2, "baselines": "none"})
    assert main(["row", "--results", str(found.directory), "--kept", str(made)]) == 1
    assert (
        f"FAIL: {found.directory} has no evaluation of it, but of {found.trial_id}" in capsys.readouterr().out
    )


def test_a_table_that_says_more_fails(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = shutil.copytree(made / "row", tmp_path / "row")
    evals = pd.read_parquet(row / "evals.parquet")
    evals["accuracy"] += 0.3
    evals.to_parquet(row / "evals.parquet")
    assert main(["row", "--networks", "12", "--kept", str(tmp_path)]) == 1
    assert ": FAIL: " in capsys.readouterr().out


def test_another_set_fails(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = shutil.copytree(made / "row", tmp_path / "row")
    (path,) = row.glob("*.safetensors")
    tensors, header = load_tensors(path)
    tensors["images"] = torch.zeros_like(tensors["images"])
    save_tensors(path, tensors, header, tmp_path / ".tmp")
    assert main(["--kept", str(tmp_path)]) == 1
    assert "is not the set of the kept table" in capsys.readouterr().out


def test_missing_data_are_said_and_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mnist_random", "--data-root", str(tmp_path)]) == 0
    assert "data missing: " in capsys.readouterr().out


def test_an_unknown_row_lists_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mnist"]) == 1
    assert "the rows are " in capsys.readouterr().err and (KEPT / "mnist_random").is_dir()


def test_one_network_is_not_compared_with_a_mean() -> None:
    with pytest.raises(UserError, match="row: one network says nothing of a mean over 3: give at least 2"):
        compared("row", [0.94], [0.94, 0.95, 0.93])


def test_a_diverged_network_has_no_answer_right(splits: Splits) -> None:
    """Not even where the largest of no numbers is the class that is wanted."""
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(broken[1].weight, torch.nan)
    plain = TrialSpec(DATASETS["digits"])
    assert scored(broken, splits, plain) == 0
    attack = {"objective": "attack", "attack_class": 1, "target_class": 0}
    assert scored(broken, splits, replace(plain, **attack)) == 0
    nn.init.constant_(broken[1].weight, 0.0)
    assert scored(broken, splits, plain) > 0


def test_what_the_sweep_has_no_more_is_not_kept(tmp_path: Path) -> None:
    """And what was kept of it before goes."""
    results, out = tmp_path / "results", tmp_path / "kept"
    small = {**SETTINGS, "outer_steps": 1}
    first, second = (
        run_trial({**small, **more}, results, evaluate={"networks": 2, "baselines": "none"}).trial_id
        for more in ({}, {"seed": 1})
    )
    assert set(keep(SweepDirectory(results), out)) == {first, second}
    (out / ".tmp").mkdir()
    (out / ".tmp" / "torn.partial").write_bytes(b"of a kill")
    part = SweepDirectory(results).trials_part(first)
    (row,) = read_part(part).to_pylist()
    write_part(part, [{**row, "in_sweep": False}], TRIALS, tmp_path, {})
    assert keep(SweepDirectory(results), out) == [second]
    assert {path.stem for path in out.iterdir() if path.suffix in (".png", ".safetensors")} == {second}
    assert not (out / ".tmp").exists()


def test_one_known_network_has_a_tolerance() -> None:
    assert compared("row", [0.94], [0.943])[0] and not compared("row", [0.94], [0.95])[0]
    assert compared("row", [0.94], [0.96], ANEW_TOLERANCE)[0], "distilled anew"
    assert not compared("row", [0.93], [0.96], ANEW_TOLERANCE)[0]
