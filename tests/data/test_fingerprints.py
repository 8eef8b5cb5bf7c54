"""Fingerprints of data that were fine stay as they are: ids of trials and validation splits hang on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddsweep.catalog import TrialSpec
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import Splits, load_splits

from .conftest import pictures


def load(value: Any, root: Path | None) -> tuple[str, str, Splits]:
    """The content fingerprint, the id of a trial with default settings, and the data."""
    spec = resolve_dataset(value, root)
    splits = load_splits(spec, root, validation_fraction=0.1, split_seed=0)
    return spec.fingerprint, TrialSpec(spec).trial_id, splits


def chosen(splits: Splits) -> str:
    """Which images are validation."""
    return hashlib.blake2b(splits.validation_images.numpy().tobytes(), digest_size=8).hexdigest()


@pytest.mark.parametrize(
    ("name", "fingerprint", "trial_id", "pixels", "validation"),
    [
        ("digits", "", "58af475130", "b28e2f0f1224069160413a27f9131fb2", "eb000fc4c9b2cf49"),
        ("mnist", "", "b6ffdfb51b", "9b6e5db38a26ee9be2cae0233cada169", "175bb1c3b4caddb5"),
        ("usps", "", "36ca630f61", "a8197f71eda9d7bc65bb5b97ce744da5", "87d5890beb3e3104"),
        pytest.param(
            *("cifar10-exact", "afc381b5e311c6721a97bfaa8c251097", "7ee6d7e053"),
            *("90d3c6f117ffcf32114aaa73d041f887", "268d5d25ebd6a528"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_of_the_catalog(
    name: str,
    fingerprint: str,
    trial_id: str,
    pixels: str,
    validation: str,
    data_root: Path,
    loaded: Callable[[str], Splits],
) -> None:
    if name != "digits" and not (data_root / "README.md").exists():
        pytest.skip("the real data sets are not here: set DDSWEEP_DATA")
    spec, splits = resolve_dataset(name, data_root), loaded(name)
    assert (spec.fingerprint, TrialSpec(spec).trial_id) == (fingerprint, trial_id)
    assert (splits.fingerprint, chosen(splits)) == (pixels, validation)


def netpbm(image: np.ndarray[Any, Any]) -> bytes:
    """An image file whose bytes no library decides."""
    height, width, *channels = image.shape
    return f"P{6 if channels else 5} {width} {height} 255\n".encode() + image.tobytes()


@pytest.mark.parametrize(
    ("shape", "changes", "expected"),
    [
        (
            (6, 6, 3),
            {},
            (
                "50beb90832eb9c6c80a407644a403675",
                "55619a8a8a",
                "bc9cb0c03fccd02bddb842a1c7eae0a4",
                "87e088221efe1596",
            ),
        ),
        (
            (6, 6, 3),
            {"shape": [1, 6, 6]},
            (
                "50beb90832eb9c6c80a407644a403675",
                "7473e2c3e0",
                "ffb6d59cef27d8bdff9b86b07e9a8ef9",
                "50af0f601a890e56",
            ),
        ),
        (
            (6, 6),
            {},
            (
                "15ed38c60b3b4ac0c9458fcf2767b2e3",
                "a61df34b5c",
                "8e5ef55379a63959f75ffdcbf2f0a1cf",
                "71af0b334aedad34",
            ),
        ),
        (
            (5, 7),
            {"size": 8, "channels": 3, "class_names": ["dog", "cat"]},
            (
                "de266bf6de2a0995815b68527048f506",
                "c56f70a06a",
                "e565bb7cbb6885b6123ddf0fa7dd47fb",
                "654dcccdde84e2fa",
            ),
        ),
    ],
)
def test_of_a_folder(
    shape: tuple[int, ...], changes: dict[str, Any], expected: tuple[str, ...], tmp_path: Path
) -> None:
    for role, per_class in (("train", 4), ("test", 2)):
        images, labels = pictures(2 * per_class, shape, classes=2, seed=per_class)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = tmp_path / "pets" / role / ("cat", "dog")[label] / f"{i}.{'ppm' if i % 2 else 'PGM'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(netpbm(image))
    content, trial, splits = load({"source": "folder", "path": "pets", **changes}, tmp_path)
    assert (content, trial, splits.fingerprint, chosen(splits)) == expected


def test_of_parquet_files(tiny: Path) -> None:
    """Each file's bytes with its role, in the order that was asked for."""
    total = hashlib.blake2b(b"ddsweep parquet 1", digest_size=16)
    for role, number in (("train", 2), ("train", 0), ("test", 4)):
        content = (tiny / f"cifar10/train-0000{number}-of-00005.parquet").read_bytes()
        total.update(f"{role} 0 ".encode() + hashlib.blake2b(content, digest_size=16).digest())
    spec = resolve_dataset({"source": "parquet", "path": "cifar10", "train": [2, 0], "test": 4}, tiny)
    assert spec.fingerprint == total.hexdigest()
    assert spec.identity() == [spec.fingerprint, [3, 32, 32], 10, [], []]
