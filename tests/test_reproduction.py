"""The kept results in docs/reproduction describe themselves, are consistent, and name no host."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from ddsweep import DistilledSet
from ddsweep.spec import load_sweep

KEPT = Path(__file__).resolve().parents[1] / "docs" / "reproduction"
ROWS = sorted(path.parent.name for path in KEPT.glob("*/sweep.yaml"))


def test_there_are_rows() -> None:
    assert "mnist_random" in ROWS


@pytest.mark.parametrize("row", ROWS)
def test_sets_and_tables_agree(row: str) -> None:
    folder = KEPT / row
    trials, evals = (pd.read_parquet(folder / f"{name}.parquet") for name in ("trials", "evals"))
    assert load_sweep(folder / "sweep.yaml").name == row
    assert {path.stem for path in folder.glob("*.safetensors")} == set(trials["trial_id"])
    for _, trial in trials.iterrows():
        distilled = DistilledSet.load(folder / f"{trial['trial_id']}.safetensors")
        assert distilled.sha256 == trial["distilled_sha256"]
        assert distilled.spec.trial_id == trial["trial_id"]
        assert (folder / f"{trial['trial_id']}.png").stat().st_size > 1000
        own = evals[(evals["trial_id"] == trial["trial_id"]) & (evals["source"] == "distilled")]
        after = own[(own["protocol"] == "as_distilled") & (own["inner_step"] == distilled.spec.steps)]
        assert len(after) == after["model_seed"].nunique() == trial["test_models"]
        assert after["accuracy"].mean() == pytest.approx(trial["test_accuracy_mean"], abs=1e-12)
        assert not trial["dataset_stand_in"]


@pytest.mark.parametrize("row", ROWS)
def test_no_host_is_named(row: str) -> None:
    for path in (KEPT / row).glob("*.parquet"):
        table = pq.read_table(path)
        assert "host" not in table.schema.names or table["host"].null_count == len(table)
        assert b"host" not in {key for key in (table.schema.metadata or {}) if key != b"pandas"}
    for path in (KEPT / row).glob("*.safetensors"):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        assert '"host"' not in header["__metadata__"]["ddsweep"]
