from __future__ import annotations

import bz2
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddsweep.catalog import DATASETS, DatasetSpec
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import DataError, SettingError

from .conftest import pictures, png, write_idx, write_parquet, write_usps


def load(value: Any, root: Path | None, fraction: float = 0.1, seed: int = 0) -> Splits:
    spec = value if isinstance(value, DatasetSpec) else resolve_dataset(value, root)
    return load_splits(spec, root, validation_fraction=fraction, split_seed=seed)


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train_labels), len(splits.validation_labels), len(splits.test_labels)


def all_rows(splits: Splits) -> list[bytes]:
    images = torch.cat([splits.train_images, splits.validation_images])
    labels = torch.cat([splits.train_labels, splits.validation_labels])
    return sorted(
        bytes([label]) + image.tobytes() for image, label in zip(images.numpy(), labels.tolist(), strict=True)
    )


def is_real(root: Path) -> bool:
    return (root / "MNIST/raw/train-images-idx3-ubyte").stat().st_size > 40_000_000


FOLDER = {"source": "folder", "path": "pets"}
SHARD = "cifar10/train-00000-of-00005.parquet"
ROW = "cifar10: train-00000-of-00005.parquet: row"


# ------------------------------------------------------------------------------------- real sources


def test_digits() -> None:
    splits = load("digits", None)
    assert sizes(splits) == (1295, 142, 360)
    assert splits.train_images.shape == (1295, 1, 8, 8)
    assert splits.train_images.dtype == torch.uint8 and splits.train_labels.dtype == torch.int64
    assert int(splits.train_images.max()) == 255 and int(splits.train_images.min()) == 0
    assert splits.test_labels.bincount().tolist() == [35, 36, 35, 37, 37, 37, 37, 36, 33, 37]
    assert splits.validation_labels.bincount().tolist() == [14, 15, 14, 15, 14, 14, 14, 14, 14, 14]
    assert splits.class_names == tuple("0123456789") and not splits.stand_in
    with pytest.raises(FrozenInstanceError):
        splits.name = "other"  # type: ignore[misc]


def test_digits_are_the_same_everywhere() -> None:
    """Fingerprint and split of the embedded data: a change here changes every result on digits."""
    splits = load("digits", None)
    chosen = hashlib.blake2b(splits.validation_images.numpy().tobytes(), digest_size=8).hexdigest()
    assert (splits.fingerprint, chosen) == ("b28e2f0f1224069160413a27f9131fb2", "eb000fc4c9b2cf49")


def test_normalisation_is_measured_on_the_training_part_only() -> None:
    splits = load("digits", None, fraction=0.5)
    pixels = splits.train_images.double() / 255
    assert splits.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-12)
    assert splits.std[0] == pytest.approx(pixels.std(unbiased=False).item(), abs=1e-12)


def test_mnist(data_root: Path, loaded: Callable[[str], Splits]) -> None:
    splits = loaded("mnist")
    assert splits.train_images.shape[1:] == (1, 28, 28)
    assert (splits.mean, splits.std) == ((0.1307,), (0.3081,))
    if is_real(data_root):
        assert sizes(splits) == (54001, 5999, 10000)
        together = splits.train_labels.bincount() + splits.validation_labels.bincount()
        assert together.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert splits.test_labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
        all_pixels = torch.cat([splits.train_images, splits.validation_images]).double() / 255
        assert round(all_pixels.mean().item(), 4) == 0.1307


def test_usps(data_root: Path, loaded: Callable[[str], Splits]) -> None:
    splits = loaded("usps")
    assert splits.test_images.shape[1:] == (1, 16, 16)
    assert 0 < splits.mean[0] < 1 and 0 < splits.std[0] < 1
    if is_real(data_root):
        assert sizes(splits)[2] == 2007 and sum(sizes(splits)[:2]) == 7291
        assert splits.test_labels.bincount().tolist() == [359, 264, 198, 166, 200, 160, 170, 147, 166, 177]


@pytest.mark.slow
def test_cifar10_exact(data_root: Path, loaded: Callable[[str], Splits]) -> None:
    splits = loaded("cifar10-exact")
    assert splits.train_images.shape[1:] == (3, 32, 32)
    assert splits.class_names[6] == "frog" and splits.std == (0.247, 0.243, 0.261)
    if is_real(data_root):
        assert sizes(splits) == (35999, 4001, 10000)
        # data_batch_5.bin of the official binary layout: label byte, then the R, G and B planes
        rows = np.concatenate(
            [
                splits.test_labels.numpy().astype(np.uint8)[:, None],
                splits.test_images.numpy().reshape(10000, -1),
            ],
            axis=1,
        )
        assert hashlib.md5(rows.tobytes()).hexdigest() == "53f37980c15c3d472c316c40844f3f0d"


def test_parquet_and_folder_keep_pixels_and_order(tiny: Path, make_folder: Callable[..., Path]) -> None:
    splits = load("cifar10-exact", tiny)
    expected, labels = pictures(20, (32, 32, 3), seed=4)
    assert np.array_equal(splits.test_images.numpy(), expected.transpose(0, 3, 1, 2))
    assert splits.test_labels.tolist() == labels.tolist()
    root = make_folder()
    test = load(FOLDER, root)
    expected, labels = pictures(4, (6, 6, 3), classes=2, seed=2)
    assert test.test_labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(test.test_images.numpy(), expected[[0, 2, 1, 3]].transpose(0, 3, 1, 2))
    grey = load({**FOLDER, "shape": [1, 6, 6]}, root)
    assert grey.test_images.shape == (4, 1, 6, 6)


# --------------------------------------------------------------------------------- validation split


def test_validation_is_stratified_disjoint_and_seeded() -> None:
    whole = load("digits", None, fraction=0.001)
    one = load("digits", None, fraction=0.2, seed=1)
    assert whole.validation_labels.bincount().tolist() == [1] * 10
    per_class = one.train_labels.bincount() + one.validation_labels.bincount()
    assert one.validation_labels.bincount().tolist() == [round(0.2 * n) for n in per_class.tolist()]
    # Together the parts are all training images, each once, for any split.
    assert all_rows(one) == all_rows(whole) and len(all_rows(one)) == 1437
    again, other = load("digits", None, fraction=0.2, seed=1), load("digits", None, fraction=0.2, seed=2)
    assert torch.equal(one.validation_images, again.validation_images)
    assert not torch.equal(one.validation_images, other.validation_images)
    assert one.fingerprint == other.fingerprint == whole.fingerprint


def test_the_split_follows_the_content_not_the_name(tiny: Path) -> None:
    inline = {"source": "parquet", "path": "cifar10", "train": [0, 1, 2, 3], "test": [4]}
    named, unnamed = load("cifar10-exact", tiny), load({**inline, "name": "mine"}, tiny)
    assert torch.equal(named.validation_images, unnamed.validation_images)
    assert named.fingerprint == unnamed.fingerprint


def test_loading_touches_no_global_generator() -> None:
    before, numpy_before = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    load("digits", None)
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == pickle.dumps(np.random.get_state())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(SettingError, match=r"validation_fraction: .* must lie between 0 and 1"):
        load("digits", None, fraction=fraction)


# -------------------------------------------------------------------------------------- bad files


def fails(root: Path | None, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(value, root)
    assert "\n" not in str(caught.value)


def test_no_root_and_missing_files(tiny: Path) -> None:
    fails(None, "mnist", "dataset mnist: data root not given: pass --data-root or set DDSWEEP_DATA")
    fails(tiny / "gone", "usps", "data root .*gone is not a folder")
    fails(tiny, "fashion_mnist", "train-images-idx3-ubyte is missing; `ddsweep data fetch fashion_mnist`")
    fails(tiny, "cifar10", "data_batch_1 is missing; `ddsweep data fetch cifar10` downloads it")


@pytest.mark.parametrize("keep", [0, 3, 6, 12, 16, 5000])
def test_truncated_idx(tiny: Path, keep: int) -> None:
    file = tiny / "MNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:keep])
    fails(tiny, "mnist", "t10k-images-idx3-ubyte: (truncated|not an idx file).*; `ddsweep data fetch mnist`")


def test_damaged_idx(tiny: Path) -> None:
    labels = tiny / "MNIST/raw/train-labels-idx1-ubyte"
    good = labels.read_bytes()
    labels.write_bytes(good + b"xx")
    fails(tiny, "mnist", "train-labels-idx1-ubyte: damaged: 50 bytes, but its header promises 48")
    labels.write_bytes(b"<html>" + good)
    fails(tiny, "mnist", "train-labels-idx1-ubyte: not an idx file of bytes")
    labels.write_bytes((tiny / "MNIST/raw/train-images-idx3-ubyte").read_bytes())
    fails(tiny, "mnist", "damaged or short: x should have 1 dimension instead of 3")
    write_idx(labels, pictures(30, ())[1])
    fails(tiny, "mnist", "40 train images but 30 labels")
    write_idx(labels, np.full(40, 11, np.uint8))
    fails(tiny, "mnist", "train label 11 of image 0 is out of range; labels are 0 to 9")
    write_idx(labels, (np.arange(40) % 9).astype(np.uint8))
    fails(tiny, "mnist", "class '9' has no images in train")


def test_mnist_of_another_size(tiny: Path) -> None:
    write_idx(tiny / "MNIST/raw/t10k-images-idx3-ubyte", pictures(20, (32, 32))[0])
    fails(tiny, "mnist", "test images are 1x32x32, not 1x28x28")


def test_damaged_usps(tiny: Path) -> None:
    file = tiny / "USPS/usps.t.bz2"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    fails(tiny, "usps", "usps.t.bz2: damaged or short: .*; `ddsweep data fetch usps`")
    file.write_bytes(b"not bzip2 at all")
    fails(tiny, "usps", "usps.t.bz2: damaged or short: Invalid data stream")
    text = bz2.decompress(good).decode()
    file.write_bytes(bz2.compress(text[: len(text) // 2].encode()))
    fails(tiny, "usps", "usps.t.bz2: damaged or short")
    file.write_bytes(b"")
    fails(tiny, "usps", r"usps.t.bz2(: damaged or short|\) *)")
    write_usps(file, pictures(20, (16, 16))[0], np.full(20, 10, np.uint8))
    fails(tiny, "usps", "test label 10 of image 0 is out of range")


def test_foreign_cifar_pickles_are_not_opened(tiny: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tiny / "opened",))

    folder = tiny / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    fails(
        tiny, "cifar10", "data_batch_1: damaged or short: .* bytes, but its images alone have 30720000; `ddsw"
    )
    for file in folder.iterdir():
        os.truncate(file, 31_000_000)  # as large as the published ones
    fails(tiny, "cifar10", "cifar-10-batches-py: damaged or short: Dataset not found or corrupted; `ddsweep")
    assert not (tiny / "opened").exists()


def test_damaged_parquet(tiny: Path) -> None:
    good = (tiny / SHARD).read_bytes()
    (tiny / SHARD).write_bytes(good[: len(good) // 2])
    fails(tiny, "cifar10-exact", f"{SHARD}: not a readable parquet file")
    (tiny / SHARD).write_bytes(good[:200] + bytes(4000) + good[4200:])
    fails(tiny, "cifar10-exact", SHARD)
    (tiny / SHARD).unlink()
    fails(tiny, "cifar10-exact", r"asks for shard 4, but .* holds 4 \*.parquet files")


def test_damaged_images_and_labels_in_parquet_name_the_row(tiny: Path) -> None:
    images, labels = pictures(20, (32, 32, 3))
    rows: list[Any] = list(images)
    rows[7] = png(images[7])[:300]
    write_parquet(tiny / SHARD, rows, labels)
    fails(tiny, "cifar10-exact", f"{ROW} 7: the image cannot be read")
    rows[7] = np.zeros((16, 16, 3), np.uint8)
    write_parquet(tiny / SHARD, rows, labels)
    fails(tiny, "cifar10-exact", f"{ROW} 7: the image is 16x16 pixels, not 32x32 as declared")
    rows[7] = None
    write_parquet(tiny / SHARD, rows, labels)
    fails(tiny, "cifar10-exact", f"{ROW} 7: the image cannot be read: there are no bytes")
    write_parquet(tiny / SHARD, images, [*labels[:5], 10, *labels[6:]])
    fails(tiny, "cifar10-exact", rf"{ROW} 5: label 10 is out of range \(0 to 9\)")
    write_parquet(tiny / SHARD, images, [*labels[:5], None, *labels[6:]])
    fails(tiny, "cifar10-exact", f"{ROW} 5: the label is null")


def test_damaged_images_in_folders_name_the_file(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    shape = {**FOLDER, "shape": [3, 6, 6]}
    file = root / "pets/train/dog/03.png"
    good = file.read_bytes()
    file.write_bytes(good[:60])
    fails(root, shape, "dog/03.png: the image cannot be read")
    file.write_bytes(good[:50] + b"\0\0\0\0" + good[54:])
    fails(root, shape, "dog/03.png: the image cannot be read")
    file.write_bytes(b"")
    fails(root, shape, "dog/03.png: the image cannot be read: there are no bytes")
    file.write_bytes(png(np.zeros((6, 7, 3), np.uint8)))
    fails(root, shape, "dog/03.png: the image is 6x7 pixels, not 6x6 as declared")


def test_class_too_small_to_split(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    for file in sorted((root / "pets/train/cat").iterdir())[1:]:
        file.unlink()
    fails(root, FOLDER, "class 'cat' has 1 training image; at least 2 are needed")


def test_constant_images_cannot_be_normalised(make_folder: Callable[..., Path]) -> None:
    root = make_folder()
    for file in (root / "pets/train").rglob("*.png"):
        pixels = np.random.default_rng(1).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        pixels[..., 1] = 9
        file.write_bytes(png(pixels))
    fails(root, FOLDER, "all training pixels of channel 1 are 9: .* give mean and std")
    given = {**FOLDER, "mean": [0.5] * 3, "std": [0.25] * 3}
    assert load(given, root).std == (0.25, 0.25, 0.25)


def test_a_parquet_class_only_in_train(tiny: Path) -> None:
    write_parquet(
        tiny / "cifar10/train-00004-of-00005.parquet", *pictures(20, (32, 32, 3), classes=9, seed=9)
    )
    fails(tiny, "cifar10-exact", "class 'truck' has no images in test")


def test_files_that_changed_since_they_were_planned_with(tiny: Path) -> None:
    spec = resolve_dataset("cifar10-exact", tiny)
    shutil.copy(tiny / SHARD, tiny / "kept")
    write_parquet(tiny / SHARD, *pictures(20, (32, 32, 3), seed=50))
    fails(tiny, spec, "the files in cifar10 have changed since the trial was planned")
    load(replace(DATASETS["cifar10-exact"]), tiny)  # nothing planned: nothing to compare with
