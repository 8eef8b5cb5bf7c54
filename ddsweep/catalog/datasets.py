"""Data sets by name, and the transforms that are part of a name."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, replace
from typing import Any

from ddsweep.catalog.sources import SOURCES
from ddsweep.catalog.survey import Survey
from ddsweep.errors import SettingError

__all__ = [
    "DATASETS",
    "DatasetSpec",
    "as_in_catalog",
    "base_name",
    "parse_dataset",
    "transformed",
    "transforms_of",
]


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: its source, and the shape of its images.

    ``shape`` is (channels, height, width). ``mean`` and ``std`` per channel are the constants that a
    paper names; empty means measured on the training part. ``source`` is one of `SOURCES`. ``path`` is
    relative to the data root, or names the package that the data come with. ``train`` and ``test`` name the
    files (or, by number, the shards) of a ``parquet`` source and the two folders of a ``folder`` source.
    ``fingerprint`` is the content hash of data of one's own: it stands for the path in a trial's id.

    ``shape``, ``mean`` and ``std`` are those of the images as read. ``native`` is the shape of the files if
    it differs (`transformed`); it is empty if it is the same, or if a source has several shapes. Height and
    width are 0 if the user's own files have several sizes.

    ``image_column``, ``label_column`` and ``first_label`` say how a ``parquet`` source is read; the defaults
    are ``image``, ``label`` and 0. ``survey`` is what was found in the files; it does not count in
    comparisons.
    """

    name: str
    source: str
    shape: tuple[int, int, int] = (0, 0, 0)
    classes: int = 0
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    path: str = ""
    train: tuple[str | int, ...] = ()
    test: tuple[str | int, ...] = ()
    fingerprint: str = ""
    native: tuple[int, ...] = ()
    image_column: str = ""
    label_column: str = ""
    first_label: int = 0
    survey: Survey | None = field(default=None, compare=False, repr=False)

    @property
    def native_shape(self) -> tuple[int, int, int]:
        """The shape of the files' own images."""
        if not self.native:
            return self.shape
        channels, height, width = self.native
        return (channels, height, width)

    @property
    def read_shape(self) -> tuple[int, int, int]:
        """The shape of images when they are read: `native_shape` or, if files have several sizes, the
        channels of the files and the size of ``shape``."""
        channels, height, width = self.native_shape
        return (channels, height or self.shape[1], width or self.shape[2])

    @property
    def base_name(self) -> str:
        """The name without transforms."""
        return base_name(self.name)

    def identity(self) -> str | list[Any]:
        """What enters a trial id: the name, or the content of the files and how they are read. The same files
        as grey or RGB, or with another normalisation, are other data."""
        if SOURCES[self.source].by:
            read_as: list[Any] = [list(self.shape), self.classes, list(self.mean), list(self.std)]
            # Only if there is one, so that ids from before transforms stay.
            return [self.fingerprint, *read_as, *([list(self.native)] if self.native else [])]
        return self.name


_DIGITS = tuple(str(i) for i in range(10))
_CIFAR10 = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
_SVHN_MEAN, _SVHN_STD = (0.4379, 0.4440, 0.4729), (0.1980, 0.2010, 0.1970)
_VOC = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CUB_MEAN, _CUB_STD = (0.4785, 0.4993, 0.4022), (0.2321, 0.2277, 0.2665)

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec("digits", "digits", (1, 8, 8), 10, _DIGITS, path="scikit-learn"),
        DatasetSpec("mnist", "idx", (1, 28, 28), 10, _DIGITS, (0.1307,), (0.3081,), "MNIST/raw"),
        DatasetSpec("fashion_mnist", "idx", (1, 28, 28), 10, _FASHION, path="FashionMNIST/raw"),
        DatasetSpec("usps", "usps", (1, 16, 16), 10, _DIGITS, path="USPS"),
        DatasetSpec(
            *("cifar10", "cifar", (3, 32, 32), 10, _CIFAR10, _CIFAR10_MEAN, _CIFAR10_STD),
            path="cifar-10-batches-py",
        ),
        DatasetSpec(
            *("cifar10-exact", "parquet", (3, 32, 32), 10, _CIFAR10, _CIFAR10_MEAN, _CIFAR10_STD),
            path="cifar10",
            train=(0, 1, 2, 3),
            test=(4,),
        ),
        DatasetSpec("svhn", "svhn", (3, 32, 32), 10, _DIGITS, _SVHN_MEAN, _SVHN_STD, "SVHN"),
        DatasetSpec(
            *("voc2007", "voc", (3, 224, 224), 20, _VOC, _IMAGENET_MEAN, _IMAGENET_STD),
            path="VOCdevkit/VOC2007",
        ),
        # Its two hundred class names are read from classes.txt.
        DatasetSpec("cub200", "cub", (3, 224, 224), 200, (), _CUB_MEAN, _CUB_STD, "CUB_200_2011"),
    )
}

_TRANSFORMS = ("channels", "size")
_LARGEST, _SMALLEST = 512, 4
_DATASET = re.compile(r"\s*([^\s()]+)\s*(?:\(([^()]*)\))?\s*")
_SUFFIX = re.compile(r"\((?:channels=3|size=\d+|channels=3,size=\d+)\)$")


def as_in_catalog(spec: DatasetSpec) -> DatasetSpec:
    """A stored ``spec`` with the catalog's present source: 0.1.0 had other names for some sources."""
    known = DATASETS.get(spec.base_name)
    return replace(spec, source=known.source, path=known.path) if known else spec


def transforms_of(name: str) -> dict[str, int]:
    """``size`` and ``channels`` in the name of a transformed data set."""
    found = _SUFFIX.search(name)
    pairs = (item.split("=") for item in found.group().strip("()").split(",")) if found else ()
    return {key: int(value) for key, value in pairs}


def base_name(name: str) -> str:
    """``name`` of a data set without its transforms: ``usps`` for ``usps(size=28)``."""
    return _SUFFIX.sub("", name)


def parse_dataset(text: str) -> DatasetSpec:
    """The `DatasetSpec` that the catalog has for ``text``: a name, or a name with transforms.

    ``usps(size=28)``, ``mnist(channels=3,size=32)``: see `transformed`. Raises `SettingError` for an unknown
    name or transform, and for an impossible one.
    """
    match = _DATASET.fullmatch(text)
    name = match.group(1) if match else text.partition("(")[0].strip()
    if name not in DATASETS:
        close = difflib.get_close_matches(name.lower(), DATASETS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise SettingError(
            f"dataset: unknown data set {name!r}{meant}; known are {', '.join(DATASETS)}; data of your "
            "own are {source: folder, path: ...}, {source: parquet, ...} or {file: my_data.py, name: load}"
        )
    if match is None:
        cut = (
            "; inside [...] of YAML it needs quotes, because a comma ends it there" if ")" not in text else ""
        )
        raise SettingError(
            f"dataset: {text!r}: transforms are written as {name}(channels=3,size=32), either or both{cut}"
        )
    given: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in (match.group(2) or "").split(","))):
        key, _, value = (piece.strip() for piece in item.partition("="))
        if key not in _TRANSFORMS:
            close = difflib.get_close_matches(key, _TRANSFORMS, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise SettingError(
                f"dataset: {text!r}: unknown transform {key!r}{meant}; there are {', '.join(_TRANSFORMS)}"
            )
        if key in given:
            raise SettingError(f"dataset: {text!r}: {key} is given twice")
        if not (value.isascii() and value.isdecimal()):
            raise SettingError(f"dataset: {text!r}: {key} must be a whole number, not {value!r}")
        given[key] = int(value)
    return transformed(DATASETS[name], size=given.get("size"), channels=given.get("channels"))


def transformed(spec: DatasetSpec, *, size: int | None = None, channels: int | None = None) -> DatasetSpec:
    """``spec`` with its images resized to ``size`` x ``size`` (bicubic), and with ``channels``: 3 of a grey
    set repeats its one channel. Values that the images have already are not part of the name.

    Constants of a paper hold for every size, and are repeated with the channel. ``voc`` and ``cub`` resize
    every image anyway, so ``size`` replaces their own. Raises `SettingError` for a size out of range, and for
    a conversion that does not exist.
    """
    if spec.base_name != spec.name:
        raise SettingError(f"dataset: {spec.name} is transformed already: give size and channels together")
    depth, height, width = spec.shape
    if size is not None and not _SMALLEST <= size <= _LARGEST:
        raise SettingError(
            f"dataset: {spec.name}: size is a whole number from {_SMALLEST} to {_LARGEST}, not {size}"
        )
    if channels not in (None, 1, 3):
        raise SettingError(f"dataset: {spec.name}: channels is 1 or 3, not {channels}")
    if channels == 1 and depth == 3:
        raise SettingError(
            f"dataset: {spec.name}: channels=1: its images are RGB, and there is no one conversion to grey "
            "(the weights of the channels differ); only channels=3 of a grey data set is possible"
        )
    shape = (channels or depth, size or height, size or width)
    if shape == spec.shape:
        return spec
    parts = [f"channels={shape[0]}"] * (shape[0] != depth) + [f"size={size}"] * (shape[1:] != (height, width))
    repeat = shape[0] // depth if len(spec.mean) == depth else 1
    return replace(
        spec,
        name=f"{spec.name}({','.join(parts)})",
        shape=shape,
        native=() if SOURCES[spec.source].any_size else spec.shape,
        mean=spec.mean * repeat,
        std=spec.std * repeat,
    )
