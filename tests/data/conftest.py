"""Real files where there are some, else small ones in the official layouts."""

from __future__ import annotations

import bz2
import io
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import Splits, load_splits


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data root: ``DDSWEEP_DATA``, the folder beside the checkout, or small files made here."""
    given = os.environ.get("DDSWEEP_DATA")
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    for root in (Path(given) if given else None, beside):
        if root is not None and (root / "MNIST/raw").is_dir():
            return root
    return small_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def loaded(data_root: Path) -> Callable[[str], Splits]:
    """``loaded(name)``: a data set of the catalog from the data root with the default split, read once."""

    @cache
    def load(name: str) -> Splits:
        spec = resolve_dataset(name, data_root)
        return load_splits(spec, data_root, validation_fraction=0.1, split_seed=0)

    return load


@pytest.fixture(scope="session")
def small_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_root(tmp_path_factory.mktemp("template"))


@pytest.fixture
def tiny(tmp_path: Path, small_template: Path) -> Path:
    """A data root of small files in the official layouts, free to damage."""
    return Path(shutil.copytree(small_template, tmp_path / "root"))


def small_root(root: Path) -> Path:
    """Ten classes, 4 training and 2 test images of each, as MNIST, USPS and five CIFAR shards."""
    for prefix, per_class in (("train", 4), ("t10k", 2)):
        images, labels = pictures(10 * per_class, (28, 28), seed=per_class)
        write_idx(root / f"MNIST/raw/{prefix}-images-idx3-ubyte", images)
        write_idx(root / f"MNIST/raw/{prefix}-labels-idx1-ubyte", labels)
    for name, per_class in (("usps.bz2", 4), ("usps.t.bz2", 2)):
        write_usps(root / "USPS" / name, *pictures(10 * per_class, (16, 16), seed=per_class))
    for k in range(5):
        write_parquet(root / f"cifar10/train-{k:05d}-of-00005.parquet", *pictures(20, (32, 32, 3), seed=k))
    return root


def pictures(
    count: int, shape: tuple[int, ...], *, classes: int = 10, seed: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """``count`` random pictures with labels 0, 1, ... in turn."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, (np.arange(count) % classes).astype(np.uint8)


def write_idx(path: Path, array: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def write_usps(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        " ".join([str(label + 1), *(f"{i + 1}:{v / 127.5 - 1:.3f}" for i, v in enumerate(image.reshape(-1)))])
        for image, label in zip(images, labels, strict=True)
    ]
    path.write_bytes(bz2.compress("\n".join(lines).encode()))


def png(image: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[npt.NDArray[np.uint8] | bytes | None] | npt.NDArray[np.uint8],
    labels: Sequence[int | None] | npt.NDArray[np.uint8],
) -> None:
    """The Hugging Face image layout; bytes are written as they are, arrays as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"bytes": png(item) if isinstance(item, np.ndarray) else item, "path": f"{i}.png"}
        for i, item in enumerate(images)
    ]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    label = pa.array([None if item is None else int(item) for item in labels], pa.int64())
    pq.write_table(pa.table({"image": image, "label": label}), path)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``<root>/<path>/{train,test}/{cat,dog}/*.png``: per class 4 training and 2 test images."""

    def make(path: str = "pets", shape: tuple[int, ...] = (6, 6, 3), seed: int = 0) -> Path:
        root = tmp_path / "root"
        for role, per_class in (("train", 4), ("test", 2)):
            images, labels = pictures(2 * per_class, shape, classes=2, seed=seed + per_class)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                file = root / path / role / ("cat", "dog")[label] / f"{i:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png(image))
        return root

    return make
