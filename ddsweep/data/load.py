"""From a `DatasetSpec` to tensors: train, validation and test as uint8, decoded once."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddsweep.catalog import DatasetSpec
from ddsweep.data.files import is_here, surveyed
from ddsweep.data.sources import Looking, Part, Raw, source_of
from ddsweep.data.splits import Splits, check_part, make_splits
from ddsweep.data.transforms import transform_images
from ddsweep.errors import DataError

__all__ = ["Splits", "load_splits"]


def load_splits(
    spec: DatasetSpec,
    root: Path | None,
    *,
    validation_fraction: float,
    split_seed: int,
    whitening: str = "none",
    stand_in: bool = False,
) -> Splits:
    """Read and check the data set ``spec`` under the data root ``root``, and carve out validation.

    From each class ``round(validation_fraction * n)`` training images, at least one, become validation; the
    choice is a pure function of the data set and ``split_seed``. All parts keep the order of the files.
    Normalisation is ``spec.mean`` and ``spec.std``, or measured on the training part without validation. With
    ``whitening`` ``zca`` all images are whitened, also by the training part without validation.

    Files are checked first, and images then transformed as the name of ``spec`` says. A set and its
    transformed versions have the same validation images. With ``stand_in``, small made-up data
    (`ddsweep.data.stand_in`) replace missing files, and the result says so.

    Raises `DataError` (one message with the path and how to get the files) for files that are missing,
    damaged, short, of another shape or changed since ``spec`` was resolved, for a class without
    images or too small to split, for test images that are all in train, and for images that do not fit this
    machine; `SettingError` for a fraction outside (0, 1).
    """
    source = source_of(spec)
    if stand_in and not is_here(spec, root):
        from ddsweep.data.stand_in import stand_in as make_stand_in

        return make_stand_in(
            spec, validation_fraction=validation_fraction, split_seed=split_seed, whitening=whitening
        )
    source.check(spec, root)
    spec = _as_planned(spec, root)
    train, test, names = source.read(spec, root)
    names = names or tuple(str(i) for i in range(spec.classes))
    for role, part in (("train", train), ("test", test)):
        check_part(spec, names, role, part)

    def transformed(part: Part) -> Part:
        return part._replace(images=transform_images(part.images, spec.shape))

    return make_splits(
        spec,
        Raw(transformed(train), transformed(test), names),
        validation_fraction=validation_fraction,
        split_seed=split_seed,
        whitening=whitening,
        test_in_train=_test_in_train(spec, train, test),
    )


def _as_planned(spec: DatasetSpec, root: Path | None) -> DatasetSpec:
    """``spec`` of own data with its survey, if its files are still those of the plan and fit this machine."""
    if spec.survey is None:
        found = surveyed(spec, root, Looking(0 in spec.native))
        same = spec.fingerprint in ("", found.fingerprint)
    else:
        found, same = spec, source_of(spec).content(spec, root) == spec.survey.content
    if not same:
        raise DataError(
            f"dataset {spec.name}: the files in {spec.path} have changed since the trial was planned; "
            "run the same command again"
        )
    if found.survey is None:
        return spec
    count = sum(found.survey.train) + sum(found.survey.test)
    size, memory = (
        count * math.prod(found.read_shape),
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    if 2 * size > memory:  # they are there twice while training images are split
        raise DataError(
            f"dataset {spec.name}: {count:,} images of {'x'.join(map(str, found.read_shape))} take "
            f"{size / 1e9:,.0f} GB, twice that while they are split, and this machine has "
            f"{memory / 1e9:,.0f} GB; give a smaller size: N"
        )
    return found


def _test_in_train(spec: DatasetSpec, train: Part, test: Part) -> int:
    """The number of test images that are training images, pixel by pixel. Raises `DataError` if all of them
    are."""
    if spec.survey is not None:
        return spec.survey.test_in_train
    known = set(_digests(train.images))
    count = sum(digest in known for digest in _digests(test.images))
    if count == len(test.images):
        raise DataError(
            f"dataset {spec.name}: all {count:,} test images ({test.where}) are in train ({train.where}), "
            "so a test would say nothing"
        )
    return count


def _digests(images: npt.NDArray[np.uint8]) -> Iterator[bytes]:
    return (hashlib.blake2b(image.data, digest_size=16).digest() for image in np.ascontiguousarray(images))
