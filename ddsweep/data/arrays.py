"""Checks the result of a user's data function: images and labels of train and test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddsweep.data.sources import Part, Raw
from ddsweep.errors import DataError

__all__ = ["arrays_digest", "checked_arrays"]

_KEYS = ("train", "test", "class_names")
_FORM = '{"train": (images, labels), "test": (images, labels)}, and "class_names" if there are any'


def checked_arrays(given: object, where: str) -> Raw:
    """``given`` as a `Raw`; ``where`` begins messages. Class names are as given, or none.

    ``given`` is a mapping ``{"train": (images, labels), "test": (images, labels)}``, with ``class_names``, a
    list of texts, if there are any. Images are uint8, ``[N, h, w]``, ``[N, h, w, c]`` or ``[N, c, h, w]``,
    c 1 or 3; labels are whole numbers ``[N]`` from 0 on. Arrays of numpy, tensors of torch and lists will do.
    Raises `DataError` for anything else.
    """
    if not isinstance(given, Mapping):
        raise DataError(f"{where} gives {_kind(given)}, not {_FORM}")
    unknown = [str(key) for key in given if key not in _KEYS]
    missing = [key for key in _KEYS[:2] if key not in given]
    if unknown or missing:
        told = f"has no {missing[0]!r}" if missing else f"has {unknown[0]!r}"
        raise DataError(f"{where}: what it gives {told}; it must be {_FORM}")
    names = _names(given.get("class_names"), where)
    train, test = (_part(given[role], role, where) for role in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        found = ("x".join(map(str, part.images.shape[1:])) for part in (train, test))
        raise DataError("{}: train images are {}, but test images {}".format(where, *found))
    classes = len(names) or int(train.labels.max()) + 1
    for role, part in (("train", train), ("test", test)):
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= min(classes, len(train.labels))))
        if wrong.size:
            raise DataError(
                f"{where}: {role} label {part.labels[wrong[0]]} of image {wrong[0]} is out of range; "
                f"{_range(classes, bool(names), len(train.labels))}"
            )
    if classes < 2:
        raise DataError(f"{where}: all labels are 0; at least 2 classes are needed")
    if least := int(min(train.labels.min(), test.labels.min())):
        raise DataError(f"{where}: labels start at {least}, not at 0; give labels - {least}")
    return Raw(train, test, names)


def arrays_digest(raw: Raw) -> str:
    """32 hex of a hash over shapes, pixels, labels and given class names."""
    digest = hashlib.blake2b(b"ddsweep code 1", digest_size=16)
    for part in (raw.train, raw.test):
        digest.update(str(part.images.shape).encode())
        digest.update(part.images.data)
        digest.update(part.labels.astype("<i8").data)
    for name in raw.class_names:
        digest.update(f"{len(name.encode())} {name}".encode())
    return digest.hexdigest()


def _range(classes: int, named: bool, images: int) -> str:
    if classes > images:
        return f"train has {images:,} images, too few for {classes:,} classes"
    by = "by class_names" if named else "as in train"
    return f"labels are 0 to {classes - 1}, {by}"


def _part(given: object, role: str, where: str) -> Part:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise DataError(f"{where}: {role!r} is {_kind(given)}, not a pair (images, labels)")
    what = f"{where}: {role} images"
    pixels = _array(given[0], what)
    if isinstance(given[0], list) and pixels.dtype.kind == "i" and pixels.size:
        if not 0 <= pixels.min() <= pixels.max() <= 255:
            raise DataError(f"{what} go from {pixels.min()} to {pixels.max()}, not from 0 to 255")
        pixels = pixels.astype(np.uint8)  # lists have no type of their own
    images = _images(pixels, what)
    labels = _array(given[1], f"{where}: {role} labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: {role} labels are {labels.dtype} {list(labels.shape)}, not whole numbers [N]"
        )
    if len(labels) != len(images):
        raise DataError(f"{where}: {len(images):,} {role} images but {len(labels):,} labels")
    return Part(images, labels.astype(np.int64), f"{role} of {where}")


def _array(given: object, what: str) -> npt.NDArray[Any]:
    try:
        return np.asarray(given.detach().cpu() if hasattr(given, "detach") else given)
    except Exception as error:  # the conversion of a foreign object may raise any error
        raise DataError(f"{what}: {_kind(given)} cannot be made an array: {error}") from None


def _images(images: npt.NDArray[Any], what: str) -> npt.NDArray[np.uint8]:
    """uint8 ``[N, c, h, w]``, in plain row-major memory."""
    if images.dtype != np.uint8:
        hint = ""
        if images.dtype.kind == "f" and images.size:
            hint = (
                f", from {images.min():g} to {images.max():g}; (images * 255).round().astype('uint8') makes"
            )
            hint += " bytes of 0 to 1"
        elif images.dtype.kind in "iu" and images.size and images.min() >= 0 and images.max() <= 255:
            hint = "; .astype('uint8') makes bytes of them"
        raise DataError(f"{what} are {images.dtype}, not bytes (uint8, 0 to 255){hint}")
    if not images.size:
        raise DataError(f"{what}: there are none: {list(images.shape)}")
    shape, allowed = list(images.shape), "[N, h, w], [N, h, w, c] or [N, c, h, w] with c 1 or 3"
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim != 4:
        raise DataError(f"{what} are {shape}, not {allowed}")
    else:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if not (first or last):
            raise DataError(f"{what} are {shape}, not {allowed}")
        if first and last:
            raise DataError(f"{what} are {shape}: it cannot be told which of them are the channels")
        images = images if first else images.transpose(0, 3, 1, 2)
    # A copy, so that nothing that the function keeps can change them.
    return np.array(images, np.uint8, order="C")


def _names(given: object, where: str) -> tuple[str, ...]:
    if given is None:
        return ()
    plain = isinstance(given, Sequence) and not isinstance(given, str)
    names = tuple(given) if isinstance(given, Sequence) and plain else ()
    if len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: class_names is {given!r}, not a list of at least 2 texts")
    if len(set(names)) < len(names):
        raise DataError(f"{where}: class_names has a name twice")
    return names


def _kind(given: object) -> str:
    return f"{type(given).__name__}" if given is not None else "nothing (None)"
