"""Train, validation and test of one data set: checked, split, measured and fingerprinted.

Images stay uint8; ``mean`` and ``std`` go with them; they are normalised on the device, in batches: ``(images
/ 255 - mean) / std``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddsweep.catalog import DatasetSpec
from ddsweep.core.images import RealSet, normalise
from ddsweep.data.sources import Part, Raw, source_of
from ddsweep.data.whitening import Whitening, measure_whitening
from ddsweep.errors import DataError, SettingError
from ddsweep.seeds import derive_seed

__all__ = ["Splits", "check_part", "make_splits"]


@dataclass(frozen=True)
class Splits:
    """One data set, decoded. Images uint8 [N, c, h, w] in 0..255 (or, with a ``whitening``, float32 and
    whitened), labels int64 [N], all on the CPU.

    ``mean`` and ``std`` are per channel, of pixels in 0..1. ``fingerprint`` is 32 hex of a hash over the
    decoded images and labels of the whole train part (validation included) and of test: it does not change
    with the split. ``stand_in`` marks a stand-in for the data set of that name. ``test_in_train`` is the
    number of test images that are training images too.
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
    test_in_train: int = 0

    @property
    def train(self) -> RealSet:
        return RealSet(self.train_images, self.train_labels, self.mean, self.std)

    @property
    def validation(self) -> RealSet:
        return RealSet(self.validation_images, self.validation_labels, self.mean, self.std)

    @property
    def test(self) -> RealSet:
        return RealSet(self.test_images, self.test_labels, self.mean, self.std)

    @property
    def nbytes(self) -> int:
        """Bytes of images and labels."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{len(labels)} {part}"
            for part, labels in (
                ("train", self.train_labels),
                ("validation", self.validation_labels),
                ("test", self.test_labels),
            )
        )
        shape = "x".join(map(str, self.train_images.shape[1:]))
        return f"Splits({self.name}: {counts} images of {shape}, {len(self.class_names)} classes)"


def make_splits(
    spec: DatasetSpec,
    raw: Raw,
    *,
    validation_fraction: float,
    split_seed: int,
    whitening: str = "none",
    stand_in: bool = False,
    test_in_train: int = 0,
) -> Splits:
    """Carve validation out of the training part of ``raw``. Its parts are as `check_part` wants them.

    Raises `DataError` for a class too small to split and for images that cannot be normalised,
    `SettingError` for a fraction outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise SettingError(f"validation_fraction: {validation_fraction} must lie between 0 and 1")
    # What stands for the files in a trial's id must also seed their split: two names for the same files are
    # one trial, so they must have one split. A transformed set has that of its files: the same images.
    key = spec.fingerprint or spec.base_name
    train, test, names = raw
    chosen = _validation_mask(spec, names, train, validation_fraction, derive_seed("split", key, split_seed))
    fingerprint = _hash(train, test)
    labels = train.labels
    kept, held = train.images[~chosen], train.images[chosen]
    mean, std = (spec.mean, spec.std) if spec.mean else _measure(spec.name, kept)
    splits = Splits(
        name=spec.name,
        train_images=_tensor(kept),
        train_labels=_tensor(labels[~chosen]),
        validation_images=_tensor(held),
        validation_labels=_tensor(labels[chosen]),
        test_images=_tensor(test.images),
        test_labels=_tensor(test.labels),
        mean=mean,
        std=std,
        class_names=names,
        fingerprint=fingerprint,
        stand_in=stand_in,
        test_in_train=test_in_train,
    )
    return splits if whitening == "none" else _whitened(splits, whitening)


def _whitened(splits: Splits, kind: str) -> Splits:
    def normalised(pixels: torch.Tensor) -> torch.Tensor:
        return normalise(pixels, splits.mean, splits.std, torch.float32)

    whitening = measure_whitening(normalised(splits.train_images), kind, splits.std)
    return replace(
        splits,
        train_images=whitening.whitened(normalised(splits.train_images)),
        validation_images=whitening.whitened(normalised(splits.validation_images)),
        test_images=whitening.whitened(normalised(splits.test_images)),
        whitening=whitening,
    )


# ------------------------------------------------------------------------- checks, split, statistics


def check_part(spec: DatasetSpec, names: tuple[str, ...], role: str, part: Part) -> None:
    """Raises `DataError` for images of another shape than in ``spec``, for labels out of range or in another
    number than images, and for a class without images."""
    native = spec.read_shape
    count, *shape = part.images.shape
    if tuple(shape) != native:
        found, declared = ("x".join(map(str, item)) for item in (shape, native))
        raise DataError(f"dataset {spec.name}: {part.where}: {role} images are {found}, not {declared}")
    if count != len(part.labels):
        raise DataError(
            f"dataset {spec.name}: {part.where}: {count} {role} images but {len(part.labels)} labels; "
            + source_of(spec).how_to_get(spec)
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
    spec: DatasetSpec, names: tuple[str, ...], train: Part, fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """The training images that become validation, [N] of bool: a random ``fraction`` of each class."""
    generator = np.random.Generator(np.random.PCG64(seed))
    mask = np.zeros(len(train.labels), np.bool_)
    for label, name in enumerate(names):
        members = np.flatnonzero(train.labels == label)
        if len(members) < 2:
            raise DataError(
                f"dataset {spec.name}: class {name!r} has {len(members)} training image; at least 2 are "
                f"needed, because one goes to validation ({train.where})"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        mask[generator.permutation(members)[:count]] = True
    return mask


_COUNTED_TOGETHER = 1024


def _measure(name: str, images: npt.NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population std per channel of pixels in 0..1, from exact integer sums."""
    levels = np.arange(256, dtype=np.int64)
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), _COUNTED_TOGETHER):  # bincount makes eight bytes of each
            some = images[start : start + _COUNTED_TOGETHER, channel].reshape(-1)
            counts += np.bincount(some, minlength=256)
        total, first, second = (int((counts * levels**power).sum()) for power in (0, 1, 2))
        mean.append(first / total / 255)
        std.append(math.sqrt((total * second - first**2) / total**2) / 255)
        if std[-1] == 0:
            raise DataError(
                f"dataset {name}: all training pixels of channel {channel} are {first // total}: the images "
                "cannot be normalised; give mean and std, where the data take them, or leave the channel out"
            )
    return tuple(mean), tuple(std)


def _hash(train: Part, test: Part) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, test):
        digest.update(str(part.images.shape).encode())
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(part.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """``array`` as a tensor in plain row-major memory, without a copy if it is so already.

    A grey image made with ``[:, None]`` has strides that also pass for channels-last. Then convolutions take
    another path, and results differ in their last bits from those of a copy of the same data.
    """
    tensor = torch.from_numpy(array)
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
