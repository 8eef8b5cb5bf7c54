"""Stand-ins: small, deterministic, learnable, and marked as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddsweep.catalog import DATASETS, DatasetSpec, parse_dataset
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.data.stand_in import stand_in
from ddsweep.errors import DataError

SIZES = [
    ("mnist", 100, 33),
    ("usps(size=28)", 100, 33),
    ("cifar10", 100, 33),
    ("mnist(channels=3,size=32)", 100, 33),
    ("voc2007(size=32)", 60, 30),
    ("voc2007", 16, 8),
    ("cub200(size=32)", 12, 6),
]


def nearest_neighbour(splits: Splits) -> float:
    """Accuracy of 1-NN on the test images, at 16 pixels: memory."""

    def rows(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 16).flatten(1)

    nearest = torch.cdist(rows(splits.test_images), rows(splits.train_images)).argmin(1)
    return float((splits.train_labels[nearest] == splits.test_labels).double().mean())


@pytest.mark.parametrize(("name", "train", "test"), SIZES)
def test_every_class_is_there_and_can_be_learned(name: str, train: int, test: int) -> None:
    spec = parse_dataset(name)
    splits = stand_in(spec)
    assert splits.stand_in and splits.name == name
    assert splits.train_images.shape[1:] == splits.test_images.shape[1:] == spec.shape
    assert splits.train_images.dtype == torch.uint8 and splits.train_images.is_contiguous()
    together = splits.train_labels.bincount() + splits.validation_labels.bincount()
    assert together.tolist() == [train] * spec.classes
    assert splits.test_labels.bincount().tolist() == [test] * spec.classes
    assert train * spec.classes <= 2400
    assert splits.mean == spec.mean or not spec.mean
    assert min(splits.std) > 0
    assert nearest_neighbour(splits) > 0.5


def test_two_hundred_classes_at_224_pixels_fit_into_memory() -> None:
    splits = stand_in(DATASETS["cub200"])
    assert len(splits.train_labels) + len(splits.validation_labels) == 800 and len(splits.test_labels) == 400
    images = (splits.train_images, splits.validation_images, splits.test_images)
    assert sum(item.numel() for item in images) <= 192 << 20
    assert len(splits.class_names) == 200
    assert splits.validation_labels.bincount().tolist() == [1] * 200


def test_grey_with_many_classes_and_sides_that_differ() -> None:
    splits = stand_in(DatasetSpec("letters", "folder", (1, 20, 14), 26))
    assert splits.train_images.shape[1:] == (1, 20, 14)
    assert len(set(splits.test_labels.tolist())) == 26
    assert nearest_neighbour(splits) > 0.5


def test_the_same_at_every_call() -> None:
    spec = DATASETS["svhn"]
    one, again, other = stand_in(spec), stand_in(spec), stand_in(spec, split_seed=1)
    assert torch.equal(one.train_images, again.train_images)
    assert one.fingerprint == again.fingerprint == other.fingerprint
    assert not torch.equal(one.validation_images, other.validation_images)
    assert one.fingerprint != stand_in(DATASETS["mnist"]).fingerprint
    assert stand_in(DATASETS["usps"], whitening="zca").whitening is not None


def load(value: Any, root: Path | None, **more: Any) -> Splits:
    spec = resolve_dataset(value, root, stand_in=True)
    return load_splits(spec, root, validation_fraction=0.1, split_seed=0, **more)


def test_real_files_are_used_where_they_are(tiny: Path) -> None:
    for name in ("mnist", "cifar10-exact"):
        real = load(name, tiny, stand_in=True)
        assert not real.stand_in and real.fingerprint == load(name, tiny).fingerprint
    assert not load("digits", None, stand_in=True).stand_in
    for name in ("svhn", "fashion_mnist", "cub200(size=16)", "voc2007(size=16)"):
        assert load(name, tiny, stand_in=True).stand_in
        with pytest.raises(DataError, match=r"is missing"):
            load(name, tiny)
    for name in ("mnist(size=32)", "cifar10-exact"):
        assert load(name, None, stand_in=True).stand_in
        with pytest.raises(DataError, match="data root not given"):
            load_splits(parse_dataset(name), None, validation_fraction=0.1, split_seed=0)


def test_damaged_files_are_told_and_not_replaced(tiny: Path) -> None:
    file = tiny / "MNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="truncated"):
        load("mnist", tiny, stand_in=True)


def test_no_stand_in_without_a_shape() -> None:
    with pytest.raises(DataError, match="no stand-in for data whose shape is not known"):
        stand_in(DatasetSpec("mine", "folder", path="mine"))
