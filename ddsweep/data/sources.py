"""From a `DatasetSpec` to tensors: train, validation and test as uint8, decoded once."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddsweep.catalog import DatasetSpec
from ddsweep.data.content import content_digest
from ddsweep.data.files import surveyed
from ddsweep.data.folders import list_folder
from ddsweep.data.inline import OWN_SOURCES
from ddsweep.data.layout import (
    TORCHVISION,
    TorchvisionFiles,
    how_to_get,
    one_line,
    parquet_files,
    require_files,
    torchvision_folder,
)
from ddsweep.data.splits import Part, Splits, check_part, make_splits
from ddsweep.data.transforms import transform_images
from ddsweep.errors import DataError, SettingError

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

    From each class ``round(validation_fraction * n)`` training images, at least one, become
    validation; which ones is a pure function of the data set and ``split_seed``. The order of the
    files is kept in all parts. Normalisation is ``spec.mean`` and ``spec.std``, or measured on the
    training part without validation. With ``whitening`` ``zca`` all images come whitened, by the
    training part without validation too.

    Files are checked as they are, and images then transformed as the name of ``spec`` says. A set and its
    transformed versions have the same validation images. With ``stand_in``, small data made here
    (`ddsweep.data.stand_in`) takes the place of files that are missing, and the result says so.

    Raises `DataError` (one message with the path and how to get the files) for files that are missing,
    damaged, short, of another shape or changed since ``spec`` was resolved, for a class without
    images or too small to split, for test images that are all in train, and for images that do not fit this
    machine; `SettingError` for a fraction outside (0, 1).
    """
    if spec.source not in _READERS:
        raise SettingError(
            f"dataset {spec.name}: unknown source {spec.source!r}; known are {', '.join(_READERS)}"
        )
    if stand_in and not _is_here(spec, root):
        from ddsweep.data.stand_in import stand_in as make_stand_in

        return make_stand_in(
            spec, validation_fraction=validation_fraction, split_seed=split_seed, whitening=whitening
        )
    if spec.source in OWN_SOURCES:
        spec = _as_planned(spec, root)
    names = _class_names(spec, root)
    train, test = _READERS[spec.source](spec, root)
    for role, part in (("train", train), ("test", test)):
        check_part(spec, names, role, part)
    return make_splits(
        spec,
        names,
        train._replace(images=transform_images(train.images, spec.shape)),
        test._replace(images=transform_images(test.images, spec.shape)),
        validation_fraction=validation_fraction,
        split_seed=split_seed,
        whitening=whitening,
        test_in_train=_test_in_train(spec, train, test),
    )


def _as_planned(spec: DatasetSpec, root: Path | None) -> DatasetSpec:
    """``spec`` of a parquet or folder source with its survey, if its files are those that it was planned with
    and fit this machine."""
    if spec.survey is None:
        found = surveyed(spec, root, sized=0 in spec.native)
        same = spec.fingerprint in ("", found.fingerprint)
    else:
        found, same = spec, content_digest(spec, root) == spec.survey.content
    if not same or found.survey is None:
        raise DataError(
            f"dataset {spec.name}: the files in {spec.path} have changed since the trial was planned; "
            "run the same command again"
        )
    count = sum(found.survey.train) + sum(found.survey.test)
    size, memory = (
        count * math.prod(found.read_shape),
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    )
    if size > memory:
        raise DataError(
            f"dataset {spec.name}: {count:,} images of {'x'.join(map(str, found.read_shape))} take "
            f"{size / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB; give a smaller size: N"
        )
    return found


def _test_in_train(spec: DatasetSpec, train: Part, test: Part) -> int:
    """How many test images are training images, pixel by pixel. Raises `DataError` where all of them are."""
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


def _is_here(spec: DatasetSpec, root: Path | None) -> bool:
    try:
        require_files(spec, root)
    except DataError:
        return False
    return True


def _class_names(spec: DatasetSpec, root: Path | None) -> tuple[str, ...]:
    if spec.source == "cub" and not spec.class_names:
        from ddsweep.data.cub import cub_class_names

        return cub_class_names(spec, root)
    return spec.class_names or tuple(str(i) for i in range(spec.classes))


# ------------------------------------------------------------------------------------------ sources


def _digits(spec: DatasetSpec, root: Path | None) -> tuple[Part, Part]:
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
        Part(images[:1437], labels[:1437], "scikit-learn"),
        Part(images[1437:], labels[1437:], "scikit-learn"),
    )


def _torchvision(spec: DatasetSpec, root: Path | None) -> tuple[Part, Part]:
    """MNIST, Fashion-MNIST, USPS, CIFAR-10 and SVHN as torchvision reads them; it never downloads here.

    CIFAR-10 comes as pickles. torchvision checks the md5 of each (`_check_integrity`) before it opens
    one, so a file that is not the published one is refused, not executed.
    """
    layout, base = TORCHVISION[spec.base_name], torchvision_folder(spec, root)
    if layout.cls == "SVHN":
        folder = base / layout.folder
        return _svhn_part(spec, folder / layout.train[0]), _svhn_part(spec, folder / layout.test[0])
    return _torchvision_part(spec, layout, base, True), _torchvision_part(spec, layout, base, False)


def _torchvision_part(spec: DatasetSpec, layout: TorchvisionFiles, base: Path, train: bool) -> Part:
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
    return Part(np.ascontiguousarray(stacked, dtype=np.uint8), labels, where)


def _svhn_part(spec: DatasetSpec, path: Path) -> Part:
    """One .mat file of SVHN, ``X [32, 32, 3, N]`` uint8 and ``y [N, 1]`` 1 to 10, where 10 means the digit 0.

    Read with scipy, as torchvision does, and not through its class: that compares the md5 of the file with
    the published one and says only "not found or corrupted", for a truncated file and for a subset in the
    same layout alike. A .mat file holds arrays and is no pickle, so nothing is lost in safety.
    """
    from scipy.io import loadmat

    def refused(reason: str) -> DataError:
        return DataError(f"dataset {spec.name}: {path}: {reason}; {how_to_get(spec.name)}")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what scipy only warns of shows in the arrays
            content = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # of a damaged file, scipy passes on whatever its parsing raises
        raise refused(f"truncated or not a .mat file: {one_line(error)}") from error
    for key, what in (("X", "images"), ("y", "labels")):
        if key not in content:
            raise refused(f"truncated or of another layout: there is no variable {key} ({what})")
    images, labels = content["X"], content["y"]
    if images.dtype != np.uint8 or images.ndim != 4:
        raise refused(f"X is {images.dtype} {list(images.shape)}, not uint8 [32, 32, 3, N]")
    if labels.dtype.kind not in "ui" or labels.size != max(labels.shape, default=0):
        raise refused(f"y is {labels.dtype} {list(labels.shape)}, not whole numbers [N, 1]")
    digits = labels.reshape(-1).astype(np.int64)
    digits[digits == 10] = 0
    return Part(np.ascontiguousarray(images.transpose(3, 2, 0, 1)), digits, str(path))


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


def _parquet(spec: DatasetSpec, root: Path | None) -> tuple[Part, Part]:
    from ddsweep.data.columns import decode_parquet, find_columns

    files = parquet_files(spec, root)
    columns = find_columns(files["train"][0], spec.image_column, spec.label_column)
    classes: dict[int | str | None, int] = {
        (name if columns.text else spec.first_label + i): i for i, name in enumerate(spec.class_names)
    }

    def part(role: str) -> Part:
        where, chosen = ", ".join(map(str, files[role])), (columns.image, columns.label)
        read = decode_parquet(files[role], chosen, classes, spec.read_shape, resize=0 in spec.native)
        return Part(*read, where)

    return part("train"), part("test")


def _folder(spec: DatasetSpec, root: Path | None) -> tuple[Part, Part]:
    from ddsweep.data.decode import decode_files

    files = list_folder(spec, root).files

    def part(role: str) -> Part:
        read = decode_files(files[role], spec.read_shape, resize=0 in spec.native)
        return Part(
            *read, f"{spec.path}: {', '.join(map(str, spec.train if role == 'train' else spec.test))}"
        )

    return part("train"), part("test")


def _voc(spec: DatasetSpec, root: Path | None) -> tuple[Part, Part]:
    from ddsweep.data.voc import read_voc

    return read_voc(spec, root)


def _cub(spec: DatasetSpec, root: Path | None) -> tuple[Part, Part]:
    from ddsweep.data.cub import read_cub

    return read_cub(spec, root)


_READERS: dict[str, Callable[[DatasetSpec, Path | None], tuple[Part, Part]]] = {
    "digits": _digits,
    "torchvision": _torchvision,
    "parquet": _parquet,
    "folder": _folder,
    "voc": _voc,
    "cub": _cub,
}
