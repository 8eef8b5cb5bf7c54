"""CUB-200-2011: birds of 200 species, from the lists and images of the official archive."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ddsweep.catalog import DatasetSpec
from ddsweep.data.layout import need_all, one_line
from ddsweep.data.sources import Part, Raw, Source
from ddsweep.data.sources.voc import check_lists
from ddsweep.errors import DataError

__all__ = ["SOURCE"]

_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
_HOW = "unpack CUB_200_2011.tgz (from Caltech's data repository) into the data root"


class Cub(Source):
    """Train and test by ``train_test_split.txt`` (1 is train): images uint8 [N, 3, h, w] by number.

    The whole image is resized to ``spec.shape`` (bicubic), straight from the file; grey ones become RGB.
    Bounding boxes are not used.
    """

    def check(self, spec: DatasetSpec, root: Path | None) -> None:
        check_lists(spec, need_all(spec, root, _LISTS, _HOW, ("images",)), _LISTS, _HOW)

    def read(self, spec: DatasetSpec, root: Path | None) -> Raw:
        folder = need_all(spec, root, _LISTS, _HOW, ("images",))
        names = _class_names(spec, folder / "classes.txt")
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
        return Raw(train, test, names)

    def how_to_get(self, spec: DatasetSpec) -> str:
        return _HOW


def _class_names(spec: DatasetSpec, path: Path) -> tuple[str, ...]:
    """Without their number: ``Black_footed_Albatross``."""
    rows = _table(spec, path)
    if sorted(rows) != list(range(1, spec.classes + 1)):
        raise DataError(
            f"dataset {spec.name}: {path}: {len(rows)} classes, not those numbered 1 to {spec.classes}; "
            + _HOW
        )
    return tuple(rows[i].partition(".")[2] or rows[i] for i in range(1, spec.classes + 1))


def _read(spec: DatasetSpec, folder: Path, files: dict[int, str], labels: dict[int, int]) -> Part:
    import numpy as np

    from ddsweep.data.decode import decode_resized

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
            f"dataset {spec.name}: {path.parent / where} has no image {number}, but {other} has; {_HOW}"
        )
    for number, value in rows.items():
        if not (value.isascii() and value.isdecimal() and low <= int(value) <= high):
            raise DataError(
                f"dataset {spec.name}: {path}: image {number}: {value!r} is not a whole number "
                f"from {low} to {high}"
            )
    return {number: int(value) for number, value in rows.items()}


SOURCE = Cub()
