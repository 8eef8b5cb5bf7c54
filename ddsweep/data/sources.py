"""From a `DatasetSpec` to tensors: train, validation and test as uint8, decoded once.

Images stay uint8; ``mean`` and ``std`` go with them, and whoever computes normalises on the device in
batches: ``(images / 255 - mean) / std``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ddsweep.catalog import DatasetSpec
from ddsweep.core.images import normalise
from ddsweep.data.layout import (
    TORCHVISION,
    TorchvisionFiles,
    content_fingerprint,
    folder_files,
    how_to_get,
    one_line,
    parquet_files,
    torchvision_folder,
)
from ddsweep.data.whitening import Whitening, measure_whitening
from ddsweep.errors import DataError, SettingError
from ddsweep.seeds import derive_seed

__all__ = ["Splits", "load_splits"]


@dataclass(frozen=True)
class Splits:
    """One data set, decoded. Images uint8 [N, c, h, w] in 0..255 (or, with a ``whitening``, float32 and
    whitened), labels int64 [N], all on the CPU.

    ``mean`` and ``std`` are per channel, of pixels in 0..1. ``fingerprint`` is 32 hex of a hash over
    the decoded images and labels of the whole train part (validation included) and of test: it does not
    change with the split. ``stand_in`` marks data that takes the place of the data set of that name.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    validation_images: torch.Tensor
    validation_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    fingerprint: str
    stand_in: bool = False
    whitening: Whitening | None = None


class _Part(NamedTuple):
    """Train or test before the split: images uint8 [N, c, h, w], labels int64 [N], and its files."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    where: str


def load_splits(
    spec: DatasetSpec,
    root: Path | None,
    *,
    validation_fraction: float,
    split_seed: int,
    whitening: str = "none",
) -> Splits:
    """Read and check the data set ``spec`` under the data root ``root``, and carve out validation.

    From each class ``round(validation_fraction * n)`` training images, at least one, become
    validation; which ones is a pure function of the data set and ``split_seed``. The order of the
    files is kept in all parts. Normalisation is ``spec.mean`` and ``spec.std``, or measured on the
    training part without validation. With ``whitening`` ``zca`` all images come whitened, by the
    training part without validation too.

    Raises `DataError` (one message with the path and how to get the files) for files that are missing,
    damaged, short, of another shape or changed since ``spec`` was resolved, for a class without
    images, and for a class too small to split; `SettingError` for a fraction outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise SettingError(f"validation_fraction: {validation_fraction} must lie between 0 and 1")
    files_fingerprint = ""
    if spec.source in ("parquet", "folder"):
        files_fingerprint = content_fingerprint(spec, root)
        if spec.fingerprint not in ("", files_fingerprint):
            raise DataError(
                f"dataset {spec.name}: the files in {spec.path} have changed since the trial was planned: "
                f"content {files_fingerprint[:8]}, planned {spec.fingerprint[:8]}"
            )
    if spec.source not in _READERS:
        raise SettingError(
            f"dataset {spec.name}: unknown source {spec.source!r}; known are {', '.join(_READERS)}"
        )
    train, test = _READERS[spec.source](spec, root)
    names = spec.class_names or tuple(str(i) for i in range(spec.classes))
    for role, part in (("train", train), ("test", test)):
        _check(spec, names, role, part)
    # What stands for the data in a trial's id must also seed its split: two names for the same files
    # are one trial, so they must have one split.
    key = files_fingerprint or spec.name
    chosen = _validation_mask(spec, names, train, validation_fraction, derive_seed("split", key, split_seed))
    kept = train.images[~chosen]
    mean, std = (spec.mean, spec.std) if spec.mean else _measure(spec.name, kept)
    splits = Splits(
        name=spec.name,
        train_images=_tensor(kept),
        train_labels=_tensor(train.labels[~chosen]),
        validation_images=_tensor(train.images[chosen]),
        validation_labels=_tensor(train.labels[chosen]),
        test_images=_tensor(test.images),
        test_labels=_tensor(test.labels),
        mean=mean,
        std=std,
        class_names=names,
        fingerprint=_hash(train, test),
    )
    return splits if whitening == "none" else _whitened(splits)


def _whitened(splits: Splits) -> Splits:
    def normalised(pixels: torch.Tensor) -> torch.Tensor:
        return normalise(pixels, splits.mean, splits.std, torch.float32)

    whitening = measure_whitening(normalised(splits.train_images))
    return replace(
        splits,
        train_images=whitening.whitened(normalised(splits.train_images)),
        validation_images=whitening.whitened(normalised(splits.validation_images)),
        test_images=whitening.whitened(normalised(splits.test_images)),
        whitening=whitening,
    )


# ------------------------------------------------------------------------- checks, split, statistics


def _check(spec: DatasetSpec, names: tuple[str, ...], role: str, part: _Part) -> None:
    count, *shape = part.images.shape
    if tuple(shape) != spec.shape:
        found, declared = ("x".join(map(str, item)) for item in (shape, spec.shape))
        raise DataError(f"dataset {spec.name}: {part.where}: {role} images are {found}, not {declared}")
    if count != len(part.labels):
        raise DataError(
            f"dataset {spec.name}: {part.where}: {count} {role} images but {len(part.labels)} labels; "
            + how_to_get(spec.name)
        )
    if len(names) != spec.classes:
        raise DataError(f"dataset {spec.name}: {len(names)} class names for {spec.classes} classes")
    wrong = (part.labels < 0) | (part.labels >= spec.classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"dataset {spec.name}: {part.where}: {role} label {part.labels[row]} of image {row} is out of "
            f"range; labels are 0 to {spec.classes - 1}"
        )
    empty = np.flatnonzero(np.bincount(part.labels, minlength=spec.classes) == 0)
    if empty.size:
        raise DataError(
            f"dataset {spec.name}: class {names[empty[0]]!r} has no images in {role} ({part.where})"
        )


def _validation_mask(
    spec: DatasetSpec, names: tuple[str, ...], train: _Part, fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Which training images become validation, [N] of bool: a random ``fraction`` of each class."""
    generator = np.random.Generator(np.random.PCG64(seed))
    mask = np.zeros(len(train.labels), np.bool_)
    for label, name in enumerate(names):
        members = np.flatnonzero(train.labels == label)
        if len(members) < 2:
            raise DataError(
                f"dataset {spec.name}: class {name!r} has {len(members)} training image; at least 2 are "
                f"needed, for one goes to validation ({train.where})"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        mask[generator.permutation(members)[:count]] = True
    return mask


def _measure(name: str, images: npt.NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population std per channel of pixels in 0..1, from exact integer sums."""
    levels = np.arange(256, dtype=np.int64)
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].reshape(-1), minlength=256)
        total, first, second = (int((counts * levels**power).sum()) for power in (0, 1, 2))
        mean.append(first / total / 255)
        std.append(math.sqrt((total * second - first**2) / total**2) / 255)
        if std[-1] == 0:
            raise DataError(
                f"dataset {name}: all training pixels of channel {channel} are {first // total}: the images "
                "cannot be normalised; give mean and std"
            )
    return tuple(mean), tuple(std)


def _hash(train: _Part, test: _Part) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, test):
        digest.update(str(part.images.shape).encode())
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(part.labels.astype("<i8").tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ sources


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """``array`` as a tensor in plain row-major memory.

    A grey image made with ``[:, None]`` has strides that also pass for channels-last, convolutions then
    take another path, and results differ in their last bits from those of a copy of the same data.
    """
    return torch.from_numpy(array).clone(memory_format=torch.contiguous_format)


def _digits(spec: DatasetSpec, root: Path | None) -> tuple[_Part, _Part]:
    """scikit-learn's 1797 handwritten digits: the first 1437 are train, the last 360 test, in file order.

    The file goes writer by writer, in blocks of about 130 images. Cut in file order, test is by writers
    that are not in train, but for the one at the cut (22 of its images are in train). A shuffled cut
    would test on writers that were trained on: 1-NN scores 98.8 % there, and 95.6 % on this split.
    Pixels 0..16 become ``round(v * 255 / 16)``.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = data.target.astype(np.int64)
    return (
        _Part(images[:1437], labels[:1437], "scikit-learn"),
        _Part(images[1437:], labels[1437:], "scikit-learn"),
    )


def _torchvision(spec: DatasetSpec, root: Path | None) -> tuple[_Part, _Part]:
    """MNIST, Fashion-MNIST, USPS and CIFAR-10 as torchvision reads them; it never downloads here.

    CIFAR-10 comes as pickles. torchvision checks the md5 of each (`_check_integrity`) before it opens
    one, so a file that is not the published one is refused, not executed.
    """
    layout, base = TORCHVISION[spec.name], torchvision_folder(spec, root)
    return _torchvision_part(spec, layout, base, True), _torchvision_part(spec, layout, base, False)


def _torchvision_part(spec: DatasetSpec, layout: TorchvisionFiles, base: Path, train: bool) -> _Part:
    import torchvision.datasets

    paths = [base / layout.folder / file for file in (layout.train if train else layout.test)]
    where = " and ".join(map(str, paths[:2])) if len(paths) < 3 else str(base / layout.folder)
    for path in paths:
        if path.name.endswith("-ubyte"):
            _check_idx(spec.name, path)
    try:
        data = getattr(torchvision.datasets, layout.cls)(str(base / layout.root), train=train, download=False)
        images, labels = np.asarray(data.data), np.asarray(data.targets, dtype=np.int64)
    except Exception as error:  # of a damaged file, torchvision passes on whatever its parsing raises
        reason = one_line(error).removesuffix(". You can use download=True to download it")
        raise DataError(
            f"dataset {spec.name}: {where}: damaged or short: {reason}; {how_to_get(spec.name)}"
        ) from error
    stacked = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return _Part(np.ascontiguousarray(stacked, dtype=np.uint8), labels, where)


def _check_idx(name: str, path: Path) -> None:
    """The size that an idx header promises against the size of the file: torchvision says only 'shape'."""
    with path.open("rb") as file:
        magic = file.read(4)
        dims = magic[3] if len(magic) == 4 and magic[:3] == b"\0\0\x08" else 0
        header = file.read(4 * dims)
    size = path.stat().st_size
    if dims not in (1, 3) or len(header) < 4 * dims:
        raise DataError(
            f"dataset {name}: {path}: not an idx file of bytes ({size} bytes); {how_to_get(name)}"
        )
    counts = [int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(dims)]
    promised = 4 + 4 * dims + math.prod(counts)
    if size != promised:
        raise DataError(
            f"dataset {name}: {path}: {'truncated' if size < promised else 'damaged'}: {size} bytes, "
            f"but its header promises {promised}; {how_to_get(name)}"
        )


def _parquet(spec: DatasetSpec, root: Path | None) -> tuple[_Part, _Part]:
    from ddsweep.data.decode import decode_parquet

    files = parquet_files(spec, root)
    train, test = (
        _Part(*decode_parquet(files[role], spec.shape, spec.classes), ", ".join(map(str, files[role])))
        for role in ("train", "test")
    )
    return train, test


def _folder(spec: DatasetSpec, root: Path | None) -> tuple[_Part, _Part]:
    from ddsweep.data.decode import decode_files

    files = folder_files(spec, root)
    train, test = (
        _Part(*decode_files(files[role], spec.shape), str(files[role][0][1].parents[1]))
        for role in ("train", "test")
    )
    return train, test


_READERS: dict[str, Callable[[DatasetSpec, Path | None], tuple[_Part, _Part]]] = {
    "digits": _digits,
    "torchvision": _torchvision,
    "parquet": _parquet,
    "folder": _folder,
}
