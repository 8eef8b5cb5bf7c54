"""What every data source must do (`ddsweep.data.sources`). A new one is a line in `CASES`."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar

from ddsweep.catalog import SOURCES, DatasetSpec, TrialSpec
from ddsweep.data.files import resolve_dataset
from ddsweep.data.layout import MissingError
from ddsweep.data.load import Splits, load_splits
from ddsweep.data.sources import Source, cifar, source_of
from ddsweep.errors import DataError

from .conftest import pictures, png, small_root, write_idx, write_parquet, write_usps
from .test_official_trees import CUB, SMALL, save_jpeg, write_cub, write_voc
from .test_svhn import write, write_svhn

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
TOY = """
import numpy as np

def load(data_root, seed=1):
    def part(seed, count):
        images = np.random.default_rng(seed).integers(0, 256, (count, 6, 6), dtype=np.uint8)
        return images, np.arange(count) % 3

    return {"train": part(seed, 30), "test": part(seed + 1, 9)}
"""


def write_cifar(root: Path) -> None:
    for seed, name in enumerate(BATCHES):
        images, labels = pictures(20, (3072,), seed=seed)
        path = root / "cifar-10-batches-py" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps({"data": images, "labels": labels.tolist()}))
    (path.parent / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))


def write_folder(root: Path) -> None:
    for i, image in enumerate(pictures(12, (6, 6, 3))[0]):
        file = root / "pets" / ("train" if i < 8 else "test") / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))


def write_toy(root: Path) -> None:
    (root / "toy.py").write_text(TOY)


@dataclass(frozen=True)
class Case:
    """``write`` makes the files in an empty root, ``value`` is what a sweep file says, or a spec. ``file`` is
    one without which nothing goes, ``change`` puts other pixels there."""

    value: Any
    write: Callable[[Path], object]
    file: str = ""
    change: Callable[[Path], object] | None = None

    def spec(self, root: Path) -> DatasetSpec:
        if isinstance(self.value, DatasetSpec):
            return self.value
        value = self.value
        if isinstance(value, dict) and "file" in value:
            value = {**value, "file": str(root / value["file"])}
        return resolve_dataset(value, root, may_run=True)


SHARD = "cifar10/train-00004-of-00005.parquet"
CASES = {
    "digits": Case("digits", lambda root: None),
    "idx": Case(
        *("mnist", small_root, "MNIST/raw/t10k-images-idx3-ubyte"),
        lambda path: write_idx(path, pictures(20, (28, 28), seed=9)[0]),
    ),
    "usps": Case(
        *("usps(size=20)", small_root, "USPS/usps.t.bz2"),
        lambda path: write_usps(path, *pictures(20, (16, 16), seed=9)),
    ),
    "cifar": Case(
        *("cifar10", write_cifar, "cifar-10-batches-py/test_batch"),
        lambda path: path.write_bytes(
            pickle.dumps({"data": pictures(20, (3072,), seed=9)[0], "labels": list(range(10)) * 2})
        ),
    ),
    "svhn": Case(
        *("svhn", write_svhn, "SVHN/test_32x32.mat"),
        lambda path: write(path, *pictures(20, (32, 32, 3), seed=9)),
    ),
    "voc": Case(
        *(SMALL, write_voc, "VOCdevkit/VOC2007/JPEGImages/000001.jpg"),
        lambda path: save_jpeg(path, pictures(1, (16, 20, 3), seed=99)[0][0]),
    ),
    "cub": Case(
        *(CUB, lambda root: write_cub(root, 3), "CUB_200_2011/images/001.Bird_of_Kind_1/Bird_0000_1.jpg"),
        lambda path: save_jpeg(path, pictures(1, (10, 12, 3), seed=99)[0][0]),
    ),
    "parquet": Case(
        *("cifar10-exact", small_root, SHARD),
        lambda path: write_parquet(path, *pictures(20, (32, 32, 3), seed=9)),
    ),
    "folder": Case(
        *({"source": "folder", "path": "pets"}, write_folder, "pets/train/cat/00.png"),
        lambda path: path.write_bytes(png(pictures(1, (6, 6, 3), seed=9)[0][0])),
    ),
    "code": Case(
        *({"file": "toy.py", "name": "load"}, write_toy, "toy.py"),
        lambda path: path.write_text(TOY.replace("seed=1)", "seed=4)")),
    ),
}


FINGERPRINTED = ["parquet", "folder"]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    # The hashes of the published batches are those of no small ones, and neither are their sizes.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar, "_LEAST", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return CASES[request.param]


@pytest.fixture
def root(case: Case, tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    case.write(tmp_path / "root")
    return tmp_path / "root"


def load(spec: DatasetSpec, root: Path, seed: int = 0) -> Splits:
    return load_splits(spec, root, validation_fraction=0.3, split_seed=seed)


def rows(*parts: torch.Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for part in parts for image in part)


def test_every_source_has_a_case_and_is_one() -> None:
    assert set(CASES) == set(SOURCES)
    for name in SOURCES:
        assert isinstance(source_of(DatasetSpec("any", name)), Source)


def test_what_is_whole_passes_and_is_read_as_it_is_described(case: Case, root: Path) -> None:
    spec = case.spec(root)
    source = source_of(spec)
    source.check(spec, root)
    train, test, names = source.read(spec, root)
    assert len(names or spec.class_names) in (0, spec.classes)
    for part in (train, test):
        assert part.images.dtype == np.uint8 and part.images.shape[1:] == spec.read_shape
        assert part.labels.dtype == np.int64 and part.labels.shape == part.images.shape[:1]
        assert set(part.labels) == set(range(spec.classes))
        assert part.where
    assert load(spec, root).train_images.shape[1:] == spec.shape
    assert pickle.loads(pickle.dumps(spec)) == spec
    if spec.survey:
        assert (sum(spec.survey.train), sum(spec.survey.test)) == (len(train.labels), len(test.labels))
        assert source.content(spec, root) == spec.survey.content


def test_validation_is_a_part_of_train_that_follows_from_content_and_seed(case: Case, root: Path) -> None:
    spec = case.spec(root)
    one, again, other = (load(spec, root, seed) for seed in (0, 0, 1))
    everything = source_of(spec).read(spec, root).train.images
    assert len(one.validation_labels) >= spec.classes
    assert len(one.train_labels) + len(one.validation_labels) == len(everything)
    assert rows(one.train_images, one.validation_images) == rows(other.train_images, other.validation_images)
    assert rows(one.validation_images) == rows(again.validation_images) != rows(other.validation_images)
    assert one.fingerprint == again.fingerprint == other.fingerprint


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(
    case: Case, root: Path, tmp_path: Path
) -> None:
    spec, there = case.spec(root), Path(shutil.copytree(root, tmp_path / "elsewhere"))
    moved = case.spec(there)
    first, second = load(spec, root), load(moved, there)
    assert (spec.fingerprint, first.fingerprint) == (moved.fingerprint, second.fingerprint)
    assert rows(first.validation_images) == rows(second.validation_images)
    network = "convnet(depth=1,width=4)"
    ids = [TrialSpec(item, network=network).trial_id for item in (spec, moved)]
    assert ids[0] == ids[1]
    if case.change is None:
        return
    case.change(there / case.file)
    changed = case.spec(there)
    assert load(changed, there).fingerprint != first.fingerprint
    changed_id = TrialSpec(changed, network=network).trial_id
    assert (changed_id != ids[0]) == bool(SOURCES[spec.source].by or spec.fingerprint)


# Of the others the name stands for the content, or what counts is what was read when they were planned.
@pytest.mark.parametrize("case", FINGERPRINTED, indirect=True)
def test_data_that_changed_under_a_planned_trial_are_refused(case: Case, root: Path) -> None:
    spec = case.spec(root)
    assert spec.fingerprint and case.change is not None
    case.change(root / case.file)
    with pytest.raises(DataError, match="changed since the trial was planned; run the same command again"):
        load(spec, root)


@pytest.mark.parametrize("case", [name for name, one in CASES.items() if one.file], indirect=True)
def test_a_missing_file_is_named(case: Case, root: Path) -> None:
    spec = case.spec(root)
    place = root / case.file
    while place.parent != root:  # what is listed in no file is missing only with its folder
        place.unlink() if place.is_file() else shutil.rmtree(place)
        with pytest.raises(DataError) as caught:
            load(spec, root)
        assert spec.name in str(caught.value) and "\n" not in str(caught.value)
        place = place.parent
    if case.file.endswith(".py"):
        return  # what was read of it when it was planned is what counts
    place.unlink() if place.is_file() else shutil.rmtree(place)
    with pytest.raises(MissingError, match="missing") as missing:
        source_of(spec).check(spec, root)
    assert missing.value.what


OF_IMAGES = [name for name, one in CASES.items() if one.file and not one.file.endswith(".py")]


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.8])
@pytest.mark.parametrize("case", OF_IMAGES, indirect=True)
def test_a_damaged_file_is_named(case: Case, root: Path, keep: float) -> None:
    spec, path = case.spec(root), root / case.file
    os.truncate(path, int(keep * path.stat().st_size) if 0 < keep < 1 else int(keep))
    with pytest.raises(DataError) as caught:
        load(case.spec(root), root)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value) or path.parent.name in str(caught.value)
    if keep in (0, 3) and path.suffix not in (".jpg", ".png"):
        with pytest.raises(DataError, match=path.name):
            source_of(spec).check(spec, root)
