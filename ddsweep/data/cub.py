"""CUB-200-2011: birds of 200 species, from the lists and images of the official archive."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np

from ddsweep.catalog import DatasetSpec
from ddsweep.data.decode import decode_resized
from ddsweep.data.layout import how_to_get, official_folder, one_line
from ddsweep.data.splits import Part
from ddsweep.errors import DataError

__all__ = ["cub_class_names", "read_cub"]


def cub_class_names(spec: DatasetSpec, root: Path | None) -> tuple[str, ...]:
    """The classes by ``classes.txt``, without their number: ``Black_footed_Albatross``. Raises `DataError` if
    they are not 1 to ``spec.classes``."""
    path = official_folder(spec, root) / "classes.txt"
    rows = _table(spec, path)
    if sorted(rows) != list(range(1, spec.classes + 1)):
        raise DataError(
            f"dataset {spec.name}: {path}: {len(rows)} classes, not those numbered 1 to {spec.classes}; "
            + how_to_get(spec.name)
        )
    return tuple(rows[i].partition(".")[2] or rows[i] for i in range(1, spec.classes + 1))


def read_cub(spec: DatasetSpec, root: Path | None) -> tuple[Part, Part]:
    """Train and test by ``train_test_split.txt`` (1 is train): images uint8 [N, 3, h, w] by number.

    The whole image is resized to ``spec.shape`` (bicubic), straight from the file; grey ones become RGB.
    Bounding boxes are not used. Raises `DataError`, naming the file, for a list or image that is missing or
    cannot be read, a class out of range, and lists that do not have the same images.
    """
    folder = official_folder(spec, root)
    files = _table(spec, folder / "images.txt")
    labels = _numbers(spec, folder / "image_class_labels.txt", set(files), 1, spec.classes)
    split = _numbers(spec, folder / "train_test_split.txt", set(files), 0, 1)
    for number, file in files.items():
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise DataError(f"dataset {spec.name}: {folder / 'images.txt'}: image {number}: {file!r}")
    train, test = (
        _read(spec, folder, {i: files[i] for i in sorted(files) if split[i] == part}, labels)
        for part in (1, 0)
    )
    return train, test


def _read(spec: DatasetSpec, folder: Path, files: dict[int, str], labels: dict[int, int]) -> Part:
    images = np.empty((len(files), *spec.shape), np.uint8)
    for row, (number, file) in enumerate(files.items()):
        try:
            decode_resized(images[row : row + 1], folder / "images" / file, (None,))
        except DataError as error:
            raise DataError(f"dataset {spec.name}: {error} (image {number} of images.txt)") from error
    return Part(images, np.array([labels[i] - 1 for i in files], np.int64), str(folder / "images.txt"))


def _table(spec: DatasetSpec, path: Path) -> dict[int, str]:
    """``NUMBER TEXT`` lines of one of the lists."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"dataset {spec.name}: {path} cannot be read: {one_line(error)}") from error
    rows: dict[int, str] = {}
    for at, line in enumerate(lines, 1):
        number, _, text = line.strip().partition(" ")
        if not number:
            continue
        if not (number.isascii() and number.isdecimal() and text) or int(number) in rows:
            raise DataError(
                f"dataset {spec.name}: {path}: line {at}: {line!r} is not a new number, a space, and a value"
            )
        rows[int(number)] = text.strip()
    return rows


def _numbers(spec: DatasetSpec, path: Path, images: set[int], low: int, high: int) -> dict[int, int]:
    """A list with one number from ``low`` to ``high`` for each image."""
    rows = _table(spec, path)
    for number in sorted(images ^ rows.keys()):
        where = "images.txt" if number in rows else path.name
        other = path.name if number in rows else "images.txt"
        raise DataError(
            f"dataset {spec.name}: {path.parent / where} has no image {number}, but {other} has; "
            + how_to_get(spec.name)
        )
    for number, value in rows.items():
        if not (value.isascii() and value.isdecimal() and low <= int(value) <= high):
            raise DataError(
                f"dataset {spec.name}: {path}: image {number}: {value!r} is not a whole number "
                f"from {low} to {high}"
            )
    return {number: int(value) for number, value in rows.items()}
