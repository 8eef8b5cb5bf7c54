"""A removed setting in older files: ignored at its default, refused by name with any other value."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddsweep import DistilledSet
from ddsweep.catalog.removed import REMOVED
from ddsweep.data.load import load_splits
from ddsweep.errors import SettingError
from ddsweep.results.artifacts import load_tensors, save_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import load_sweep
from ddsweep.trial import distil_trial
from ddsweep.trial_plan import TrialSettings

OLDER = Path(__file__).parent / "results_0_1_0"
SET = "small/artifacts/128f6bfc6f/distilled.safetensors"


def rewritten(source: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """An older file whose header is another one."""
    tensors, header = load_tensors(source)
    change(header)
    save_tensors(to, tensors, header, to.parent)
    return to


def test_a_set_with_a_removed_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an earlier version had had this one: no setting of trials has been removed yet."""
    monkeypatch.setitem(REMOVED, "trial", {"sharpen": 0.0})
    plain = DistilledSet.load(OLDER / SET)
    path = tmp_path / "distilled.safetensors"
    rewritten(OLDER / SET, path, lambda header: header["spec"].update(sharpen=0.0))
    assert DistilledSet.load(path).spec == plain.spec
    rewritten(OLDER / SET, path, lambda header: header["spec"].update(sharpen=0.5))
    with pytest.raises(
        SettingError, match=r"tensors: sharpen: 0\.5: sharpen was removed, and is always 0\.0"
    ):
        DistilledSet.load(path)


@pytest.mark.parametrize("dtype", ["tf32", "bf16"])
def test_a_set_of_a_removed_dtype(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "distilled.safetensors"
    rewritten(OLDER / SET, path, lambda header: header["spec"].update(dtype=dtype))
    with pytest.raises(SettingError, match=rf"tensors: dtype: '{dtype}' is not one of float32, float64"):
        DistilledSet.load(path)


@pytest.mark.parametrize(
    ("plan", "aside"),
    [
        ({}, 0),
        ({"channels_last": True}, 1),
        ({"precision": "tf32"}, 1),
        ({"precision": "bf16"}, 1),
        ({"memory_mode": "guess"}, 1),
    ],
)
def test_a_trial_goes_on_or_starts_again_and_says_so(
    plan: dict[str, Any], aside: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = SweepDirectory(tmp_path / "small")
    directory.create()
    trial = DistilledSet.load(OLDER / SET).spec
    checkpoint = directory.checkpoint(trial.trial_id)
    checkpoint.parent.mkdir(parents=True)
    older = OLDER / "small" / "artifacts" / trial.trial_id / checkpoint.name
    assert {"channels_last": False, "precision": "full"}.items() <= load_tensors(older)[1]["plan"].items()
    rewritten(older, checkpoint, lambda header: header["plan"].update(plan))
    assert load_tensors(checkpoint)[1]["counters"]["step"] == trial.outer_steps
    splits = load_splits(trial.dataset, None, validation_fraction=trial.validation_fraction, split_seed=0)
    taken: list[int] = []
    assert distil_trial(
        trial, splits, directory, TrialSettings(), on_progress=lambda seen: taken.append(seen.steps_taken)
    )
    assert (sum(taken) == 0) == (aside == 0), "all steps, or none"
    assert len(list(checkpoint.parent.glob("*.torn-*"))) == aside
    assert ("starts again" in caplog.text) == bool(aside)
    made = DistilledSet.load(directory.distilled(trial.trial_id))
    assert made.provenance["n_torn_checkpoints"] == aside


def test_the_sweep_file_of_older_results(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    shutil.copy(OLDER / "small" / "sweep.yaml", file)
    text = file.read_text()
    assert ", channels_last: false, " in text, "it has every default"
    plain = load_sweep(file)
    assert not hasattr(plain.resources, "channels_last")
    file.write_text(text.replace("channels_last: false, ", ""))
    assert load_sweep(file) == plain
    file.write_text(text.replace("channels_last: false", "channels_last: true"))
    with pytest.raises(
        SettingError, match=r"sweep.yaml: channels_last: True: channels_last was removed, and is always False"
    ):
        load_sweep(file)
    file.write_text(text.replace("\nbase: {", "\nbase: {dtype: bf16, "))
    with pytest.raises(SettingError, match=r"sweep.yaml: base\.dtype: 'bf16' is not one of float32, float64"):
        load_sweep(file)
