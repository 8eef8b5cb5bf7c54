"""Distilled sets as files for other programs: what is in them, that they suffice, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from ddsweep.core.images import normalise, renormalised
from ddsweep.data.splits import Splits
from ddsweep.distilled import DistilledSet, apply
from ddsweep.errors import DiskFullError
from ddsweep.exported import export_set
from ddsweep.one_trial import run_trial
from tests.conftest import Ask
from tests.documents import blocks

SETTINGS: dict[str, Any] = {
    **{"dataset": "digits", "network": "convnet(depth=1,width=4)", "images_per_class": 4},
    **{"inner_steps": 2, "inner_epochs": 2, "outer_steps": 3, "models_per_step": 1, "real_batch": 32},
    **{"image_init": "real", "selection_networks": 1, "outer_lr": 0.3, "outer_lr_rates": 0.1},
}


def distilled(folder: Path, **more: Any) -> DistilledSet:
    return run_trial({**SETTINGS, **more}, folder, evaluate={"networks": 1, "baselines": "none"}).distilled


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> DistilledSet:
    return distilled(tmp_path_factory.mktemp("hard"))


@pytest.fixture(scope="module")
def soft(tmp_path_factory: pytest.TempPathFactory) -> DistilledSet:
    return distilled(tmp_path_factory.mktemp("soft"), labels="soft", outer_lr_labels=0.1)


def read_pt(path: Path) -> dict[str, Any]:
    """As a program without ddsweep may: no code of the file is run."""
    found: dict[str, Any] = torch.load(path, weights_only=True)
    ((images, labels),) = found.pop("data")
    return {**found, "images": images, "labels": labels}


def read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as arrays:
        return {
            name: torch.from_numpy(a) if a.dtype.kind in "fi" else a.tolist() for name, a in arrays.items()
        }


READERS = {".pt": read_pt, ".npz": read_npz}


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("space", ["normalised", "pixels"])
def test_everything_of_a_set_is_in_the_file(
    suffix: str, space: str, hard: DistilledSet, tmp_path: Path
) -> None:
    export_set(hard, tmp_path / f"set{suffix}", space)
    found = READERS[suffix](tmp_path / f"set{suffix}")
    for name in ("mean", "std"):
        torch.testing.assert_close(found.pop(name), torch.tensor(getattr(hard, name)))
    images, expected = found.pop("images"), hard.images.flatten(0, 1)
    if space == "pixels":
        images = renormalised(images, ([0.0], [1.0]), (hard.mean, hard.std))
    torch.testing.assert_close(images, expected, rtol=0, atol=0 if space == "normalised" else 1e-5)
    assert torch.equal(found.pop("labels"), hard.labels.flatten()) and found.pop("space") == space
    assert found.pop("batches").tolist() == [0] * 20 + [1] * 20
    assert torch.equal(found.pop("rates"), hard.rates) and hard.rates.unique().numel() == 4
    assert found.pop("class_names") == list(hard.class_names)
    assert json.loads(found.pop("recipe")) == hard.recipe.to_dict()
    assert json.loads(found.pop("made_for")) == json.loads(json.dumps(hard.spec.to_dict()))
    assert found == {
        "order": "batches 0..S-1 in order, S*E steps, rates[t] at step t",
        "optimizer": "gradient descent on mean cross-entropy",
        "trial_id": hard.spec.trial_id,
    }
    assert os.listdir(tmp_path) == [f"set{suffix}"]


@pytest.mark.parametrize("which", ["hard", "soft", "another recipe"])
def test_the_file_suffices_to_train_a_network(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of the page, which knows nothing of ddsweep, ends where `apply` does. So it does with more
    epochs than the set has rates for."""
    made: DistilledSet = request.getfixturevalue("soft" if which == "soft" else "hard")
    if which == "another recipe":
        made = replace(made, recipe=replace(made.recipe, epochs=3))
    (block,) = (block for block in blocks("python") if block.text.startswith("# from mnist.npz"))
    export_set(made, tmp_path / "mnist.npz")
    monkeypatch.chdir(tmp_path)
    model, before = made.network(), made.network()
    exec(block.text, {"model": model})
    trained = apply(made, made.network())
    for theirs, ours, first in zip(*(net.parameters() for net in (model, trained, before)), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
        assert not torch.equal(ours, first)


@pytest.mark.parametrize("which", ["hard", "soft"])
@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("space", ["normalised", "pixels"])
def test_what_was_exported_can_be_imported(
    space: str, suffix: str, which: str, request: pytest.FixtureRequest, ask: Ask, tmp_path: Path
) -> None:
    made: DistilledSet = request.getfixturevalue(which)
    made.save(tmp_path / "made.safetensors")
    said = ask("export", "made.safetensors", "--out", f"a/set{suffix}", "--space", space)
    assert (said.code, said.err) == (0, "")
    told = []
    if space == "normalised":
        mean, std = said.words.partition("normalised by mean ")[2].split(" and std ")
        told = ["--mean", mean, "--std", std]
    words = ("import", f"a/set{suffix}", "--dataset", "digits", "--out", "back.safetensors", "--space", space)
    assert ask(*words, *told).code == 0
    back = DistilledSet.load(tmp_path / "back.safetensors")
    assert back.labels.is_floating_point() == (which == "soft")

    def by_class(found: DistilledSet, values: Tensor) -> Tensor:
        return values.flatten(0, 1)[found.classes.flatten().argsort(stable=True)]

    for ours, theirs in ((made.images, back.images), (made.labels, back.labels)):
        torch.testing.assert_close(by_class(back, theirs), by_class(made, ours), rtol=0, atol=1e-4)


def test_pictures_are_read_as_a_folder_of_images(hard: DistilledSet, ask: Ask, tmp_path: Path) -> None:
    hard.save(tmp_path / "made.safetensors")
    said = ask("export", "made.safetensors", "--out", "new/pictures")
    assert (said.code, said.err) == (0, "")
    found = ImageFolder(str(tmp_path / "new" / "pictures"))
    assert found.classes == [f"{c}_{c}" for c in range(10)] and len(found) == 40
    levels = 255 * renormalised(hard.images, (hard.mean, hard.std), ([0.0], [1.0]))
    for path, label in found.samples:
        batch, image = (int(part[-3:]) for part in Path(path).stem.split("_"))
        assert label == hard.labels[batch, image]
        read = pil_to_tensor(found.loader(path))[:1].float()
        torch.testing.assert_close(read, levels[batch, image].clamp(0, 255), rtol=0, atol=0.5001)
    beyond = 100 * float(((levels < -0.5) | (levels > 255.5)).double().mean())
    assert (
        beyond > 1 and f"40 pictures in 10 folders; {beyond:.1f} % of the numbers were beyond" in said.words
    )
    assert os.listdir(tmp_path / "new") == ["pictures"]


def test_real_images_lose_nothing_as_pictures(hard: DistilledSet, splits: Splits, tmp_path: Path) -> None:
    """Black is not beyond black by the last digit of a float."""
    real = normalise(splits.train_images[:40], splits.mean, splits.std, torch.float32)
    said = export_set(replace(hard, images=real.view_as(hard.images)), tmp_path / "pictures")
    assert "; 0.0 % of the numbers were beyond black and white" in said
    files = (tmp_path / "pictures").glob("*/batch000_image007.png")
    read = pil_to_tensor(Image.open(next(files)))
    assert torch.equal(read, splits.train_images[7])


def test_folders_are_in_the_order_of_the_classes(hard: DistilledSet, tmp_path: Path) -> None:
    """Whatever their names and however many there are; and colours are those of the set."""
    names = ("b/a", "..", "猫", "x y", "z" * 300, *"fghijkl")
    labels = torch.arange(12).repeat(2, 1)
    images = torch.rand(2, 12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    means, stds = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    made = renormalised(images, ([0.0] * 3, [1.0] * 3), (means, stds))
    more = {"images": made, "labels": labels, "mean": means, "std": stds, "class_names": names}
    export_set(replace(hard, **more), tmp_path / "pictures")
    found = ImageFolder(str(tmp_path / "pictures"))
    assert found.classes[:5] == ["00_b-a", "01_..", "02_猫", "03_x-y", "04_" + "z" * 50]
    assert [label for _, label in found.samples] == [c for c in range(12) for _ in range(2)]
    path, _ = found.samples[7]
    assert Path(path).name == "batch001_image003.png"
    read = pil_to_tensor(found.loader(path)).float() / 255
    torch.testing.assert_close(read, images[1, 3], rtol=0, atol=0.51 / 255)


def test_a_recipe_is_told_as_apply_takes_it(hard: DistilledSet, tmp_path: Path) -> None:
    """Its own rate, and what it has beyond steps of gradient descent."""
    more = {"weight_decay": 0.1, "batch": 16, "augment": "flip", "schedule": "step", "decay_epochs": 1}
    recipe = replace(hard.recipe, rate=0.5, epochs=2, **more)
    tuned, told = replace(hard.recipe, rate=0.25, epochs=9), {"file": "theirs.pt"}
    made = replace(hard, recipe=recipe, tuned=tuned, imported=told, spec=replace(hard.spec, method="given"))
    export_set(made, tmp_path / "set.pt")
    found = read_pt(tmp_path / "set.pt")
    torch.testing.assert_close(found["rates"], torch.tensor([0.5] * 3 + [0.05] * 3))
    assert found["optimizer"].endswith(
        "weight decay 0.1, minibatches of 16 images in random order, images changed in every step by flip"
    )
    assert json.loads(found["tuned"])["epochs"] == 9 and json.loads(found["imported"]) == told


def test_an_imported_set_has_no_rates_to_give(hard: DistilledSet, tmp_path: Path) -> None:
    spec = replace(hard.spec, method="given")
    export_set(replace(hard, spec=spec, recipe=replace(hard.recipe, rate=None)), tmp_path / "set.pt")
    assert "rates" not in read_pt(tmp_path / "set.pt")


def whitened(found: DistilledSet) -> DistilledSet:
    return replace(found, spec=replace(found.spec, whitening="zca"))


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        (lambda x: x, ("--out", "set.npy"), "--out: set.npy: give a file in .pt or .npz, or a folder"),
        (lambda x: x, ("--out", "set.h5"), "--out: set.h5: give a file in .pt or .npz, or a folder"),
        (lambda x: x, ("--out", ".npz"), "--out: .npz: give a file in .pt or .npz, or a folder"),
        (lambda x: x, ("--out", "made.safetensors"), "--out: made.safetensors is what is to be read"),
        (lambda x: x, ("--out", "a" * 300), "aaa: cannot be written: File name too long"),
        (lambda x: x, ("--out", "a" * 300 + ".pt"), "aaa.pt: cannot be written: File name too long"),
        (lambda x: x, ("--out", "folder.pt"), "folder.pt: cannot be written: Is a directory"),
        (
            lambda x: x,
            ("--out", "made.safetensors/set"),
            "made.safetensors/set: cannot be written: Not a direc",
        ),
        (lambda x: x, ("--out", "link"), "link: is there already; give a folder that is not"),
        (
            lambda x: x,
            ("--out", "set.pt", "--space", "grey"),
            "--space: 'grey' is not one of normalised, pixels",
        ),
        (lambda x: x, ("--out", "set", "--space", "normalised"), "a folder of pictures, which hold pixels"),
        (lambda x: x, ("--out", "there"), "there: is there already; give a folder that is not"),
        (whitened, ("--out", "set.pt"), "the set was made for whitened images (whitening: zca)"),
        (
            lambda x: replace(x, labels=torch.rand(2, 20, 10)),
            ("--out", "set"),
            "a folder of pictures cannot hold learned labels; a .pt or .npz can",
        ),
    ],
)
def test_what_cannot_be_exported(
    change: Callable[[DistilledSet], DistilledSet],
    words: tuple[str, ...],
    told: str,
    hard: DistilledSet,
    ask: Ask,
    tmp_path: Path,
) -> None:
    change(hard).save(tmp_path / "made.safetensors")
    for name in ("there", "folder.pt"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    said = ask("export", "made.safetensors", *words)
    assert said.code == 1 and told in said.words and said.out == "" and "--results" not in said.err
    assert sorted(os.listdir(tmp_path)) == ["folder.pt", "link", "made.safetensors", "there"]
    DistilledSet.load(tmp_path / "made.safetensors")


def test_what_is_no_set(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"no")
    for name in ("torn.safetensors", "none.safetensors"):
        said = ask("export", name, "--out", "set.pt")
        assert said.code == 1 and name in said.words and not (tmp_path / "set.pt").exists()


@pytest.mark.parametrize("name", ["set.pt", "pictures"])
def test_on_a_full_disk_nothing_is_left(name: str, hard: DistilledSet, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    with pytest.raises(DiskFullError, match=name):
        export_set(hard, disk / name)
    assert os.listdir(disk) == ["filler"]
