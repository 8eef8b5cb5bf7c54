"""Small data that stand in for missing files: the code runs, and its numbers mean nothing.

They are made from scikit-learn's digits, so that there is something to learn: class k shows the digit k % 10,
and the colours (or, in grey, the background) tell k // 10.
"""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt

from ddsweep.catalog import DATASETS, DatasetSpec
from ddsweep.data.sources import Part, Raw
from ddsweep.data.sources.digits import SOURCE
from ddsweep.data.splits import Splits, make_splits
from ddsweep.data.transforms import transform_images
from ddsweep.errors import DataError

__all__ = ["stand_in"]

_MOST_TRAIN, _MOST_TEST = 100, 33
"""Per class: there are at least 33 of each digit in the last 360."""
_USUAL_BYTES, _MOST_BYTES = 48 << 20, 192 << 20


def stand_in(
    spec: DatasetSpec, *, validation_fraction: float = 0.1, split_seed: int = 0, whitening: str = "none"
) -> Splits:
    """Images of ``spec.shape`` in ``spec.classes`` classes, the same at every call; ``stand_in`` is set.

    100 training (with validation) and 33 test images per class if images are small and classes few, down to
    12 and 6 if not, and 4 and 2 if that would take more than 192 MiB. ``name``, ``mean`` and ``std`` are
    those of ``spec``, the fingerprint is that of these images. Raises `DataError` if ``spec`` has no shape
    yet, because only its files could tell it.
    """
    if 0 in spec.shape or not spec.classes:
        raise DataError(f"dataset {spec.name}: there is no stand-in for data whose shape is not known")
    # Train and test are by different writers, except one.
    digits = SOURCE.read(DATASETS["digits"], None)
    train, test = (_part(spec, part, count) for part, count in zip(digits[:2], _counts(spec), strict=True))
    names = spec.class_names or tuple(str(i) for i in range(spec.classes))
    return make_splits(
        spec,
        Raw(train, test, names),
        validation_fraction=validation_fraction,
        split_seed=split_seed,
        whitening=whitening,
        stand_in=True,
    )


def _counts(spec: DatasetSpec) -> tuple[int, int]:
    """Training and test images per class."""
    one_of_each = int(np.prod(spec.shape)) * spec.classes
    if 18 * one_of_each > _MOST_BYTES:
        return 4, 2
    count = max(12, min(_MOST_TRAIN, 1200 // spec.classes, _USUAL_BYTES // one_of_each))
    return count, min(count // 2, _MOST_TEST)


def _part(spec: DatasetSpec, digits: Part, count: int) -> Part:
    """``count`` images of each class, class by class in turn."""
    channels, height, width = spec.shape
    images = np.empty((count * spec.classes, *spec.shape), np.uint8)
    labels = np.tile(np.arange(spec.classes), count)
    groups = -(-spec.classes // 10)
    large: dict[int, npt.NDArray[np.uint8]] = {}
    for label in range(spec.classes):
        digit, group = label % 10, label // 10
        if digit not in large:
            chosen = np.flatnonzero(digits.labels == digit)[:count]
            large[digit] = transform_images(digits.images[chosen], (1, height, width))
        back, ink = _colours(group, groups, channels)
        for channel in range(channels):
            # By a table: each of the 256 levels of a digit has its colour between background and ink.
            table = np.rint(np.linspace(back[channel], ink[channel], 256)).astype(np.uint8)
            images[label :: spec.classes, channel] = table[large[digit][:, 0]]
    return Part(images, labels.astype(np.int64), "stand-in")


def _colours(group: int, groups: int, channels: int) -> tuple[list[float], list[float]]:
    """Background and ink of a group of ten classes, per channel in 0..255."""
    place = group / groups
    if channels == 1:
        return [160 * place], [255.0]
    back = colorsys.hsv_to_rgb((place + 0.5) % 1, 0.9, 0.4)
    ink = colorsys.hsv_to_rgb(place, 0.6, 1.0)
    return [255 * value for value in back], [255 * value for value in ink]
