"""PASCAL VOC 2007 as a set of objects: every bounding box of the official annotations is one image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from ddsweep.catalog import DatasetSpec
from ddsweep.data.layout import need_all, one_line
from ddsweep.data.sources import Part, Raw, Source
from ddsweep.errors import DataError

__all__ = ["SOURCE", "check_lists"]

_LISTS = ("ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt")
_FOLDERS = ("Annotations", "JPEGImages")
_HOW = (
    "unpack VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar (from the PASCAL VOC site) into the data "
    "root"
)
_ROLES = {"train": "trainval", "test": "test"}
_LONGEST = 1 << 20
"""Bytes of an annotation; the official ones have a few thousand."""
_EDGES = ("xmin", "ymin", "xmax", "ymax")


class _Picture(NamedTuple):
    """An image file and its objects."""

    path: Path
    boxes: list[tuple[int, int, int, int]]
    labels: list[int]


class Voc(Source):
    """Train (image set ``trainval``) and test (``test``): images uint8 [N, 3, h, w], one per bounding box, in
    the order of the image set and of the annotation.

    All objects are kept, those marked difficult or truncated too. A box, whose official coordinates count
    from 1 and include their ends, is cut out and resized to ``spec.shape`` (bicubic), straight from the file.
    A class that is none of ``spec.class_names``, or a box that is empty or not inside its image, is refused.
    """

    def check(self, spec: DatasetSpec, root: Path | None) -> None:
        check_lists(spec, need_all(spec, root, _LISTS, _HOW, _FOLDERS), _LISTS, _HOW)

    def read(self, spec: DatasetSpec, root: Path | None) -> Raw:
        folder = need_all(spec, root, _LISTS, _HOW, _FOLDERS)
        names = {role: _image_set(spec, folder, _ROLES[role]) for role in _ROLES}
        both = sorted(set(names["train"]) & set(names["test"]))
        if both:
            raise DataError(f"dataset {spec.name}: {folder}: image {both[0]} is in both trainval and test")
        train, test = (_read(spec, folder, _ROLES[role], names[role]) for role in _ROLES)
        return Raw(train, test, spec.class_names)

    def how_to_get(self, spec: DatasetSpec) -> str:
        return _HOW


def check_lists(spec: DatasetSpec, folder: Path, lists: tuple[str, ...], how_to_get: str) -> None:
    """Raises `DataError` for one that is empty."""
    for path in (folder / name for name in lists):
        if not path.stat().st_size:
            raise DataError(f"dataset {spec.name}: {path}: the list is empty; {how_to_get}")


def _image_set(spec: DatasetSpec, folder: Path, name: str) -> list[str]:
    path = folder / f"ImageSets/Main/{name}.txt"
    try:
        names = path.read_text("utf-8").split()
    except (OSError, ValueError) as error:
        raise DataError(f"dataset {spec.name}: {path} cannot be read: {one_line(error)}") from error
    wrong = [item for item in names if not re.fullmatch(r"\w+", item)]
    if wrong:
        raise DataError(f"dataset {spec.name}: {path}: {wrong[0]!r} is not an image's name such as 000005")
    if len(set(names)) < len(names):
        raise DataError(f"dataset {spec.name}: {path}: an image is named twice")
    return names


def _read(spec: DatasetSpec, folder: Path, image_set: str, names: list[str]) -> Part:
    import numpy as np

    from ddsweep.data.decode import decode_resized

    listed = folder / f"ImageSets/Main/{image_set}.txt"
    pictures = [_annotation(spec, folder, name, listed) for name in names]
    labels = [label for picture in pictures for label in picture.labels]
    images = np.empty((len(labels), *spec.shape), np.uint8)
    start = 0
    for picture in pictures:
        stop = start + len(picture.labels)
        try:
            decode_resized(images[start:stop], picture.path, picture.boxes)
        except DataError as error:
            raise DataError(f"dataset {spec.name}: {error} (named by {listed})") from error
        start = stop
    return Part(images, np.array(labels, np.int64), str(listed))


def _annotation(spec: DatasetSpec, folder: Path, name: str, listed: Path) -> _Picture:
    path = folder / f"Annotations/{name}.xml"

    def refused(reason: str) -> DataError:
        return DataError(f"dataset {spec.name}: {path}: {reason}")

    if not path.is_file():
        raise DataError(f"dataset {spec.name}: {path} is missing, but {listed} names it; {_HOW}")
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise refused(f"an annotation of more than {_LONGEST} bytes is none of VOC")
        text = content.decode("utf-8")
        # Entities are declared in a DOCTYPE, and grow without bound. The official files have neither.
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise refused("an annotation that declares a document type is none of VOC")
        objects = ElementTree.fromstring(text).findall("object")
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise refused(f"the annotation cannot be read: {one_line(error)}") from error
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for number, item in enumerate(objects, 1):
        label = (item.findtext("name") or "").strip()
        if label not in spec.class_names:
            raise refused(
                f"object {number}: {label!r} is not a class of VOC; classes are {', '.join(spec.class_names)}"
            )
        try:
            left, upper, right, lower = (
                round(float(item.findtext(f"bndbox/{edge}") or "")) for edge in _EDGES
            )
        except (ValueError, OverflowError):
            raise refused(f"object {number}: bndbox has no numbers {', '.join(_EDGES)}") from None
        if not (1 <= left <= right and 1 <= upper <= lower):
            raise refused(
                f"object {number}: box x {left} to {right}, y {upper} to {lower} is empty or not inside the "
                "image; the first pixel is 1"
            )
        labels.append(spec.class_names.index(label))
        boxes.append((left - 1, upper - 1, right, lower))
    return _Picture(folder / f"JPEGImages/{name}.jpg", boxes, labels)


SOURCE = Voc()
