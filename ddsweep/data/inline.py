"""The mapping that describes the user's own data set in a sweep file. Each value is checked; no file is
opened."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from ddsweep.catalog import DATASETS, SOURCES, DatasetSpec, base_name
from ddsweep.catalog.numbers import real, whole
from ddsweep.data.sources import source_of
from ddsweep.errors import SettingError

__all__ = ["described_items", "given_whole", "parse_mapping", "text"]

_KEYS = (
    *("source", "path", "train", "test", "name", "shape", "classes", "class_names", "mean", "std"),
    *("size", "channels", "image_column", "label_column"),
)


def parse_mapping(value: Mapping[str, Any]) -> DatasetSpec:
    """The mapping as a `DatasetSpec`. The type of each value is checked; no file is opened."""
    unknown = [str(key) for key in value if key not in _KEYS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], _KEYS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise SettingError(f"dataset: unknown key {unknown[0]!r}{meant}; allowed are {', '.join(_KEYS)}")
    source, own = value.get("source"), [name for name, kind in SOURCES.items() if kind.by == "path"]
    if source not in own:
        raise SettingError(
            f"dataset: source is one of {', '.join(own)}, not {source!r}; data in another format are read by "
            "a function of your own, {file: my_data.py, name: load}; other data sets go by name: "
            f"{', '.join(DATASETS)}"
        )
    path = text(value, "path", None)
    called = path_name(path) or source
    if called in DATASETS or base_name(called) != called:
        called = f"{source}-{called.replace('(', '-').replace(')', '')}"
    spec = DatasetSpec(
        name=text(value, "name", called),
        source=source,
        path=path,
        shape=_shape(value.get("shape")),
        classes=_class_count(value.get("classes")),
        class_names=_names(value.get("class_names")),
        mean=_numbers(value, "mean"),
        std=_numbers(value, "std"),
    )
    spec = replace(spec, **source_of(spec).described(value))
    if spec.class_names and spec.classes and len(spec.class_names) != spec.classes:
        raise SettingError(f"dataset: classes is {spec.classes}, but class_names has {len(spec.class_names)}")
    if spec.name in DATASETS:
        raise SettingError(f"dataset: the name {spec.name!r} is taken by the catalog; give another")
    if base_name(spec.name) != spec.name:
        raise SettingError(
            f"dataset: the name {spec.name!r} ends as that of a transformed data set; size and channels are "
            "keys of their own here"
        )
    for key in ("size", "channels"):
        given_whole(value, key)  # before any file is read
    if len(spec.mean) != len(spec.std):
        raise SettingError("dataset: mean and std go together, one number of each per channel")
    if any(item <= 0 for item in spec.std):
        raise SettingError(f"dataset: std must be above 0, not {list(spec.std)}")
    return replace(spec, classes=spec.classes or len(spec.class_names))


def text(value: Mapping[str, Any], key: str, default: str | None) -> str:
    """The text of a mapping under ``key``. Raises `SettingError` for anything but text."""
    given = value.get(key)
    if given is None and default is not None:
        return default
    if not isinstance(given, str) or not given:
        raise SettingError(f"dataset: {key} must be a text that is not empty, not {given!r}")
    return given


def given_whole(value: Mapping[str, Any], key: str) -> int | None:
    given = value.get(key)
    try:
        return None if given is None else whole(given)
    except ValueError:
        raise SettingError(f"dataset: {key} must be a whole number, not {given!r}") from None


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str | bytes)


def path_name(path: str) -> str:
    """The name of data in the folder ``path``: the path as it is written, if it leads down from the data
    root, else its last folder."""
    plain = PurePosixPath(path)
    below = not plain.is_absolute() and not {"..", "~"} & set(plain.parts)
    return str(plain) if below and plain.parts else plain.name


def described_items(value: Mapping[str, Any], default: str, *, numbers: bool) -> dict[str, Any]:
    """``train`` and ``test`` of a mapping: names of files or folders (left out: ``default`` with the role in
    it) or, with ``numbers``, places among them."""
    return {role: _items(value, role, default.format(role), numbers) for role in ("train", "test")}


def _items(value: Mapping[str, Any], key: str, default: str, numbers: bool) -> tuple[str | int, ...]:
    given = value.get(key, default)
    items = tuple(given) if _is_list(given) else () if given is None else (given,)
    if numbers:  # text is the name of a file, also if it looks like a number
        items = tuple(int(i) if isinstance(i, float) and i.is_integer() else i for i in items)
    what = "shard numbers or file names" if numbers else "folder names"
    for item in items:
        number = numbers and isinstance(item, int) and not isinstance(item, bool) and item >= 0
        if not number and not (isinstance(item, str) and item):
            raise SettingError(f"dataset: {key} is a list of {what}, and {item!r} is not one")
    if not items:
        raise SettingError(f"dataset: {key} is missing or empty: say which {what} are the {key} part")
    return items


def _shape(given: Any) -> tuple[int, int, int]:
    if given is None:
        return (0, 0, 0)
    numbers: list[int] = []
    with suppress(ValueError):
        numbers = [whole(item) for item in given] if _is_list(given) else []
    if len(numbers) != 3 or numbers[0] not in (1, 3) or min(numbers) < 1:
        raise SettingError(f"dataset: shape is [channels, height, width] with 1 or 3 channels, not {given!r}")
    return (numbers[0], numbers[1], numbers[2])


def _class_count(given: Any) -> int:
    if given is None:
        return 0
    number = 0
    with suppress(ValueError):
        number = whole(given)
    if number < 2:
        raise SettingError(f"dataset: classes must be a whole number of at least 2, not {given!r}")
    return number


def _names(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    if not _is_list(given) or not all(isinstance(i, str) and i for i in given) or len(given) < 2:
        raise SettingError(f"dataset: class_names must be a list of at least 2 texts, not {given!r}")
    if len(set(given)) < len(given):
        raise SettingError("dataset: class_names has a name twice")
    return tuple(given)


def _numbers(value: Mapping[str, Any], key: str) -> tuple[float, ...]:
    given = value.get(key)
    if given is None:
        return ()
    numbers: list[float] = []
    with suppress(ValueError):
        numbers = [real(item) for item in given] if _is_list(given) else []
    if not numbers or not all(abs(number) < float("inf") for number in numbers):
        raise SettingError(f"dataset: {key} must be a list of numbers, one per channel, not {given!r}")
    return tuple(numbers)
