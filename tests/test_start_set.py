"""Trials that begin in a distilled set: what they begin with, how the set is known, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddsweep.catalog import TrialSpec, parse_dataset
from ddsweep.core.methods import labels_of
from ddsweep.core.methods.bptt import rates as rates_of
from ddsweep.core.outer import DistillState
from ddsweep.data.splits import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import CheckpointError, SettingError, UserError
from ddsweep.one_trial import run_trial
from ddsweep.results.artifacts import load_tensors, save_tensors
from ddsweep.results.code import write_sets
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import expand, sweep_of
from ddsweep.start_set import check_start, resolve_set, set_file
from ddsweep.tensor_file import read_header
from ddsweep.trial import TrialJob, distil_trial, read_distilled
from ddsweep.trial.running import RunningTrial
from ddsweep.trial_plan import TrialSettings

SMALL: dict[str, Any] = {
    **{"dataset": "digits", "network": "convnet(depth=1,width=4)", "images_per_class": 2, "inner_steps": 2},
    **{"inner_epochs": 2, "outer_steps": 4, "outer_lr_rates": 0.2, "real_batch": 32, "models_per_step": 1},
    **{"selection_networks": 1, "inner_lr": 0.5},
}
EVALUATE = {"networks": 1, "group_size": 1, "baselines": "none"}


_made: dict[str, bytes] = {}


def made(folder: Path, **more: Any) -> tuple[DistilledSet, Path]:
    """A set of four outer steps, and its file. Each is distilled once."""
    key = repr(sorted(more.items()))
    if key not in _made:
        found = run_trial({**SMALL, **more}, folder, evaluate=EVALUATE)
        _made[key] = (folder / "artifacts" / found.trial_id / "distilled.safetensors").read_bytes()
    file = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:8]}.safetensors"
    folder.mkdir(exist_ok=True)
    file.write_bytes(_made[key])
    return DistilledSet.load(file), file


def trial(file: Path, **more: Any) -> TrialSpec:
    sweep = sweep_of({"name": "on", "base": {**SMALL, "image_init": {"set": str(file)}, **more}}, "test")
    return expand(sweep, parse_dataset).trials[0]


def first_state(spec: TrialSpec, splits: Splits, directory: SweepDirectory) -> DistillState:
    directory.create()
    write_sets(directory, [spec.start_set or ""])
    begun = RunningTrial.begin(TrialJob(spec, splits, directory, TrialSettings()), lambda: False)
    assert begun is not None
    return begun.run.state


@pytest.mark.parametrize(
    ("change", "rates"),
    [
        ({}, lambda own: own),
        ({"inner_epochs": 4}, lambda own: own[[0, 1, 2, 3, 2, 3, 2, 3]]),
        ({"inner_epochs": 1}, lambda own: own[:2]),
        ({"inner_lr_mode": "shared"}, lambda own: own.mean().expand(4)),
        ({"inner_lr_mode": "fixed"}, lambda own: torch.full((4,), 0.5)),
        ({"network": "convnet(depth=1,width=6)", "init": "fixed", "ema": 0.9}, lambda own: own),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_images_and_rates_are_those_of_the_set(
    change: dict[str, Any], rates: Callable[[Tensor], Tensor], splits: Splits, tmp_path: Path
) -> None:
    before, file = made(tmp_path / "first")
    assert before.rates.std() > 0.01  # else any order of them would do
    spec = trial(file, **change)
    state = first_state(spec, splits, SweepDirectory(tmp_path / "on"))
    assert torch.equal(state.learned["images"], before.images)
    torch.testing.assert_close(rates_of(state.learned, spec), rates(before.rates))
    assert state.step == 0


@pytest.mark.parametrize("theirs", ["hard", "soft"])
@pytest.mark.parametrize("ours", ["hard", "soft"])
def test_labels_are_those_of_the_set_where_they_are_learned(
    theirs: str, ours: str, splits: Splits, tmp_path: Path
) -> None:
    before, file = made(tmp_path / "first", labels=theirs, outer_lr=0.1)
    spec, directory = trial(file, labels=ours), SweepDirectory(tmp_path / "on")
    state = first_state(spec, splits, directory)
    begun = RunningTrial.begin(TrialJob(spec, splits, directory, TrialSettings()), lambda: False)
    assert begun is not None
    classes = torch.arange(10).expand(2, 10)
    soft = before.labels if theirs == "soft" else torch.nn.functional.one_hot(classes, 10).float()
    assert torch.equal(labels_of(state.learned, begun.task), soft if ours == "soft" else classes)


def test_images_are_centred_and_scaled_as_others_are(splits: Splits, tmp_path: Path) -> None:
    before, file = made(tmp_path / "first")
    spec = trial(file, image_centre=True, image_scale=0.5)
    images = first_state(spec, splits, SweepDirectory(tmp_path / "on")).images
    torch.testing.assert_close(images, 0.5 * (before.images - before.images.mean((0, 1))))


def test_matching_begins_with_the_images(splits: Splits, tmp_path: Path) -> None:
    before, file = made(tmp_path / "first")
    lacking = {"inner_lr": 0.02, "outer_lr_rates": None, "real_batch": 1024}  # as by default
    spec = replace(trial(file, **lacking), method="distribution_matching")
    learned = first_state(spec, splits, SweepDirectory(tmp_path / "on")).learned
    assert list(learned) == ["images"] and torch.equal(learned["images"], before.images)


def test_a_set_is_known_by_its_tensors_wherever_it_lies(tmp_path: Path) -> None:
    before, file = made(tmp_path / "first")
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes())
    spec = trial(file)
    assert spec.image_init == f"set@{before.sha256[:12]}"
    assert trial(tmp_path / "other.safetensors").trial_id == spec.trial_id
    _, another = made(tmp_path / "first", seed=1)
    assert trial(another).trial_id != spec.trial_id
    tensors, header = load_tensors(file)
    assert read_header(file.read_bytes()) == (header, before.sha256)
    assert TrialSpec.from_dict(spec.to_dict()).trial_id == spec.trial_id
    assert set(tensors) == {"images", "labels", "rates"}


def test_a_trial_that_is_killed_goes_on_bit_for_bit_without_its_start_set(
    splits: Splits, tmp_path: Path
) -> None:
    _, file = made(tmp_path / "first")
    spec = trial(file)
    whole, cut = SweepDirectory(tmp_path / "whole"), SweepDirectory(tmp_path / "cut")
    for directory in (whole, cut):
        directory.create()
        write_sets(directory, [spec.start_set or ""])
    settings = TrialSettings(checkpoint_every=1)
    distil_trial(spec, splits, whole, settings)
    for steps in (1, 2, 9):
        left = iter([False] * steps)
        distil_trial(spec, splits, cut, settings, should_stop=partial(next, left, True))
        set_file(cut.sets, spec.start_set or "").unlink(missing_ok=True)
    assert read_distilled(spec, cut).sha256 == read_distilled(spec, whole).sha256


def test_a_sweep_goes_on_from_its_copy_and_refuses_an_altered_one(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = made(tmp_path / "first")
    spec, directory = trial(file), SweepDirectory(tmp_path / "on")
    directory.create()
    write_sets(directory, [spec.start_set or ""])
    copy = set_file(directory.sets, spec.start_set or "")
    assert copy.read_bytes() == file.read_bytes()
    monkeypatch.setattr("ddsweep.start_set._read_here", {})  # as in a worker
    check_start(spec, directory.sets)
    _, other = made(tmp_path / "first", seed=1)
    for content, said in (
        (other.read_bytes(), "holds another set than its name says"),
        (file.read_bytes()[:-4], "truncated, altered, or not a safetensors file"),
    ):
        copy.write_bytes(content)
        with pytest.raises(UserError, match=said):
            RunningTrial.begin(TrialJob(spec, splits, directory, TrialSettings()), lambda: False)
    resolve_set({"set": file}, "image_init")  # read again: the altered copy is mended
    write_sets(directory, [spec.start_set or ""])
    assert copy.read_bytes() == file.read_bytes()
    copy.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="holds another set than its name says"):
        RunningTrial.begin(TrialJob(spec, splits, directory, TrialSettings()), lambda: False)
    monkeypatch.setattr("ddsweep.start_set._read_here", {})
    copy.unlink()
    with pytest.raises(UserError, match=f"image_init: {spec.image_init}: .* cannot be read: No such file"):
        check_start(spec, directory.sets)


def test_results_are_run_again_by_their_sweep_file_wherever_they_are(
    tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = made(tmp_path / "first")
    done = run_trial({**SMALL, "image_init": {"set": file}}, tmp_path / "on", evaluate=EVALUATE)
    file.unlink()
    (tmp_path / "on").rename(tmp_path / "moved")
    monkeypatch.setattr("ddsweep.start_set._read_here", {})
    code, out, err = ask("plan", tmp_path / "moved" / "sweep.yaml", "--results", tmp_path / "elsewhere")
    assert code == 0 and "1 trial" in out, out + err
    monkeypatch.setattr("ddsweep.start_set._read_here", {})
    for copy in (tmp_path / "moved" / "sets").iterdir():
        copy.unlink()  # a distilled trial needs it no more
    assert run_trial({**SMALL, "image_init": done.distilled.spec.image_init}, tmp_path / "moved").row
    code, out, err = ask("plan", tmp_path / "moved" / "sweep.yaml", "--results", tmp_path / "elsewhere")
    assert (code, out) == (1, "") and "from its own file again" in err


def test_a_set_of_other_files_of_that_name_is_refused(splits: Splits, tmp_path: Path) -> None:
    _, file = made(tmp_path / "first")
    spec, directory = trial(file), SweepDirectory(tmp_path / "on")
    other = replace(splits, fingerprint="0" * 32)
    with pytest.raises(UserError, match="was made on other files of digits than those that are here"):
        first_state(spec, other, directory)


def test_the_start_is_kept_if_it_is_best(splits: Splits, tmp_path: Path) -> None:
    before, file = made(tmp_path / "first", image_init="real", inner_lr=1.0)
    wild = {"outer_lr": 50.0, "outer_steps": 2, "validate_every": 1}
    best = run_trial({**SMALL, **wild, "image_init": {"set": file}, "keep": "best"}, tmp_path / "on")
    last = run_trial({**SMALL, **wild, "image_init": {"set": file}}, tmp_path / "on")
    assert torch.equal(best.distilled.images, before.images)
    assert best.row["val_score"] > last.row["val_score"]


def test_choices_of_a_search_are_copied_before_they_are_drawn(tmp_path: Path) -> None:
    files = [made(tmp_path / "first", seed=seed)[1] for seed in (0, 1)]
    search = {"kind": "tpe", "samples": 4, "space": {"image_init": {"choice": [{"set": f} for f in files]}}}
    sweep = sweep_of({"name": "on", "base": SMALL, "search": search}, "test")
    directory = SweepDirectory(tmp_path / "on")
    directory.create()
    write_sets(directory, sweep.start_sets())
    assert {path.stem for path in directory.sets.iterdir()} == set(sweep.start_sets()) and len(files) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "digits(size=16)"}, "was made on digits, and this trial is on digits(size=16); a set"),
        ({"images_per_class": 4}, "was made with images_per_class 2, and this trial has 4"),
        ({"inner_steps": 1}, "was made with inner_steps 2, and this trial has 1"),
        ({"split_seed": 3}, "was made with split_seed 0, and this trial has 3"),
        ({"validation_fraction": 0.2}, "was made with validation_fraction 0.1, and this trial has 0.2"),
        ({"whitening": "zca"}, "was made with whitening none, and this trial has zca"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_set_that_may_have_seen_other_images_or_has_another_shape_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    _, file = made(tmp_path / "first")
    with pytest.raises(SettingError) as caught:
        run_trial({**SMALL, "image_init": {"set": file}, **change}, tmp_path / "on")
    assert said in str(caught.value) and "image_init: set@" in str(caught.value)
    assert not (tmp_path / "on").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{set: none.safetensors}", "set: none.safetensors cannot be read: No such file or directory"),
        ("{set: 3}", "{'set': 3}: give {set: FILE}, a distilled.safetensors"),
        ("{file: a.safetensors}", "give {set: FILE}, a distilled.safetensors"),
        ("{set: cut.safetensors}", "cut.safetensors: truncated, altered, or not a safetensors file"),
        ("{set: sweep.yaml}", "sweep.yaml: truncated, altered, or not a safetensors file"),
        ("{set: changed.safetensors}", "altered since it was written: its check sum does not match"),
        ("{set: checkpoint.safetensors}", "holds a checkpoint, not a distilled set"),
        ("set@12", "'set@12' is not the name of a set; in a sweep file, write {set: FILE}"),
        ("set@0123456789ab", "cannot be read: No such file or directory; run the sweep from its own file"),
        ("kmean", "'kmean' is not one of noise, real, kmeans (did you mean kmeans?)"),
    ],
)
def test_bad_input_is_one_message_of_plan(
    value: str, said: str, tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = made(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    data = file.read_bytes()
    tensors, _ = load_tensors(file)
    Path("cut.safetensors").write_bytes(data[: len(data) // 2])
    Path("changed.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    save_tensors(Path("checkpoint.safetensors"), tensors, {"kind": "checkpoint"}, tmp_path / ".tmp")
    Path("sweep.yaml").write_text(f"name: further\nbase: {{dataset: digits, image_init: {value}}}\n")
    code, out, err = ask("plan", "sweep.yaml")
    assert (code, out) == (1, ""), out + err
    assert said in err and "image_init" in err and "Traceback" not in err


@pytest.mark.parametrize("end", [0, 4, 7, 8, 60, -1])
def test_a_file_that_is_cut_anywhere_has_no_header(end: int, tmp_path: Path) -> None:
    _, file = made(tmp_path / "first")
    with pytest.raises(ValueError, match="truncated, altered, or not a safetensors file"):
        read_header(file.read_bytes()[:end])
    (tmp_path / "cut").write_bytes(file.read_bytes()[:end])
    with pytest.raises(CheckpointError, match="truncated, altered, or not a safetensors file"):
        load_tensors(tmp_path / "cut")


def test_two_sets_are_two_trials_of_one_sweep(tmp_path: Path) -> None:
    files = [made(tmp_path / "first", seed=seed)[1] for seed in (0, 1)]
    choices = ["noise", *({"set": str(file)} for file in files)]
    sweep = sweep_of({"name": "on", "base": SMALL, "grid": {"image_init": choices}}, "test")
    trials = expand(sweep, parse_dataset).trials
    assert [spec.start_set is None for spec in trials] == [True, False, False]
    assert sweep.start_sets() == [resolve_set({"set": str(file)}, "image_init")[4:] for file in files]
    sizes = {"grid": {"image_init": choices, "images_per_class": [2, 4]}, "skip_invalid": True}
    sweep = sweep_of({"name": "on", "base": SMALL, **sizes}, "test")
    plan = expand(sweep, parse_dataset, suits=lambda spec: check_start(spec, tmp_path / "none"))
    assert len(plan.trials) == 4 and len(plan.dropped) == 2
    assert all("images_per_class 2, and this trial has 4" in why for _, why in plan.dropped)
