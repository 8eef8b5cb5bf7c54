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


@pytest.fixture(autouse=True)
def removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an earlier version had had these."""
    monkeypatch.setitem(REMOVED, "trial", {"sharpen": 0.0})
    monkeypatch.setitem(REMOVED, "plan", {"fused": False})
    monkeypatch.setitem(REMOVED, "resources", {"fused": "off"})


def rewritten(source: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """An older file whose header is another one."""
    tensors, header = load_tensors(source)
    change(header)
    save_tensors(to, tensors, header, to.parent)
    return to


def test_a_set_with_a_removed_setting(tmp_path: Path) -> None:
    plain = DistilledSet.load(OLDER / SET)
    path = tmp_path / "distilled.safetensors"
    rewritten(OLDER / SET, path, lambda header: header["spec"].update(sharpen=0.0))
    assert DistilledSet.load(path).spec == plain.spec
    rewritten(OLDER / SET, path, lambda header: header["spec"].update(sharpen=0.5))
    with pytest.raises(
        SettingError, match=r"tensors: sharpen: 0\.5: sharpen was removed, and is always 0\.0"
    ):
        DistilledSet.load(path)


@pytest.mark.parametrize(
    ("plan", "aside"),
    [({"fused": False}, 0), ({"fused": True}, 1), ({"memory_mode": "guess"}, 1)],
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
    assert "\nresources: {cpus: " in text, "it has every default"
    file.write_text(text.replace("\nresources: {", "\nresources: {fused: 'off', "))
    assert load_sweep(file) == load_sweep(OLDER / "small" / "sweep.yaml")
    file.write_text(text.replace("\nresources: {", "\nresources: {fused: 'on', "))
    with pytest.raises(SettingError, match=r"sweep.yaml: fused: 'on': fused was removed"):
        load_sweep(file)
