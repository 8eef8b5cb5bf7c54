"""SVHN: small .mat files in the official layout, whole and damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torchvision.datasets
from scipy.io import savemat

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.fetch import fetch
from ddsweep.data.files import list_datasets, presence, resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DataError

from .conftest import pictures


def write_svhn(root: Path) -> Path:
    """Ten classes, 4 training and 2 test images of each; as in the official files, 10 means the digit 0."""
    for name, per_class in (("train_32x32.mat", 4), ("test_32x32.mat", 2)):
        images, digits = pictures(10 * per_class, (32, 32, 3), seed=per_class)
        write(root / "SVHN" / name, images, np.where(digits == 0, 10, digits))
    return root


def write(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[Any], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = labels.reshape(-1, 1).astype(np.uint8)
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": columns, **more}, do_compression=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_svhn(tmp_path)


def load(root: Path, name: str = "svhn") -> Splits:
    return load_splits(resolve_dataset(name, root), root, validation_fraction=0.25, split_seed=0)


def fails(root: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert "\n" not in str(caught.value)


def test_images_labels_and_constants(root: Path) -> None:
    splits = load(root)
    images, digits = pictures(20, (32, 32, 3), seed=2)
    assert np.array_equal(splits.test_images.numpy(), images.transpose(0, 3, 1, 2))
    assert splits.test_labels.tolist() == digits.tolist() and set(digits.tolist()) == set(range(10))
    assert (len(splits.train_labels), len(splits.validation_labels)) == (30, 10)
    assert splits.mean == (0.4379, 0.4440, 0.4729) and splits.std == (0.1980, 0.2010, 0.1970)
    assert splits.train_images.is_contiguous()


def test_as_torchvision_reads_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    theirs = torchvision.datasets.SVHN(str(root / "SVHN"), split="test")
    ours = load(root)
    assert np.array_equal(ours.test_images.numpy(), theirs.data)
    assert np.array_equal(ours.test_labels.numpy(), theirs.labels)


def test_smaller_for_a_network_of_mnist(root: Path) -> None:
    splits = load(root, "svhn(size=28)")
    assert splits.train_images.shape[1:] == (3, 28, 28) and splits.mean == DATASETS["svhn"].mean
    assert TrialSpec(DATASETS["svhn"], network="lenet").network_spec.kind == "lenet"


def test_data_list_and_missing_files(root: Path) -> None:
    (row,) = (row for row in list_datasets(root) if row.name == "svhn")
    assert (row.status, row.where, row.shape) == ("present", "SVHN", (3, 32, 32))
    (root / "SVHN/test_32x32.mat").unlink()
    assert presence("svhn(size=28)", root) == "missing: SVHN/test_32x32.mat"
    fails(root, "dataset svhn: .*test_32x32.mat is missing; `ddsweep data fetch svhn` downloads it")


@pytest.mark.parametrize("keep", [0, 3, 100, 128, 200, 1000, 0.5, 0.9999])
def test_truncated(root: Path, keep: float) -> None:
    file = root / "SVHN/train_32x32.mat"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    fails(root, "dataset svhn: .*train_32x32.mat: truncated or .*; `ddsweep data fetch svhn` downloads it")


def test_other_files_under_that_name(root: Path) -> None:
    file = root / "SVHN/train_32x32.mat"
    images, labels = pictures(20, (32, 32, 3))
    file.write_bytes(b"<html>" * 100)
    fails(root, "train_32x32.mat: truncated or not a .mat file")
    savemat(file, {"X": images.transpose(1, 2, 3, 0)})
    fails(root, r"there is no variable y \(labels\)")
    savemat(file, {"X": images.astype(float), "y": labels})
    fails(root, r"X is float64 \[20, 32, 32, 3\], not uint8 \[32, 32, 3, N\]")
    savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": labels.reshape(4, 5)})
    fails(root, r"y is uint8 \[4, 5\], not whole numbers \[N, 1\]")
    savemat(file, {"X": images, "y": labels})
    fails(root, "train images are 32x20x32, not 3x32x32")
    write(file, images, labels[:12])
    fails(root, "20 train images but 12 labels; `ddsweep data fetch svhn`")
    write(file, images, labels + 2)
    fails(root, "train label 11 of image 9 is out of range; labels are 0 to 9")


def test_fetch_asks_torchvision_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(root: str, *, split: str, download: bool) -> None:
        assert download
        asked.append(split)
        write_svhn(Path(root).parent)

    monkeypatch.setattr(torchvision.datasets, "SVHN", download)
    assert fetch("svhn(size=28)", tmp_path) == tmp_path / "SVHN"
    assert asked == ["train", "test"]
    assert presence("svhn", tmp_path) == "present"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fetch.lock", "SVHN"]
