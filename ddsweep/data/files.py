"""From what a sweep file says about its data to a `DatasetSpec`, and what is there. No torch.

numpy, pyarrow and PIL are imported only where an inline data set leaves its shape or classes out.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddsweep.catalog import DATASETS, DatasetSpec, base_name, parse_dataset, transformed
from ddsweep.catalog.numbers import counted, real, whole
from ddsweep.data.layout import (
    OFFICIAL,
    TORCHVISION,
    class_folder_names,
    content_fingerprint,
    folder_files,
    how_to_get,
    parquet_files,
)
from ddsweep.errors import DataError, SettingError
from ddsweep.paths import user_path

__all__ = ["DatasetStatus", "data_root", "find_dataset", "list_datasets", "presence", "resolve_dataset"]

_SOURCES = ("parquet", "folder")
_KEYS = (
    *("source", "path", "train", "test", "name", "shape", "classes", "class_names", "mean", "std"),
    *("size", "channels"),
)


def data_root(flag: str | Path | None) -> Path | None:
    """The folder that holds the data: ``--data-root``, else ``DDSWEEP_DATA``, else None."""
    value = flag or os.environ.get("DDSWEEP_DATA") or None
    return None if value is None else user_path(value)


def find_dataset(name: str) -> DatasetSpec:
    """The catalog's entry ``name``, transformed as the name says (`parse_dataset`); `SettingError` with the
    known names for any other."""
    return parse_dataset(name)


def resolve_dataset(
    value: str | Mapping[str, Any], root: Path | None, *, stand_in: bool = False
) -> DatasetSpec:
    """The data set that ``dataset:`` of a sweep file means, complete, with its content fingerprint.

    ``value`` is a name of the catalog, also with transforms such as ``usps(size=28)``, or a mapping
    ``{source: parquet|folder, path, train, test}`` with optionally ``name, shape, classes, class_names,
    mean, std, size, channels``. Shape and number of classes are read from the files when not given;
    ``shape`` is what the files have, ``size`` and ``channels`` what is made of it. The fingerprint of
    parquet and folder sources is a hash over the chosen files; where they lie does not enter it. Without a
    ``name``, an inline data set is called ``<source>-<first 8 of fingerprint>``. Raises `SettingError` for
    an unknown name or key or a value of the wrong type, `DataError` for files that are missing, doubled or
    unreadable. With ``stand_in``, a name of the catalog whose files are missing has no fingerprint instead:
    `load_splits` then makes a stand-in.
    """
    if isinstance(value, str):
        spec = find_dataset(value)
        if spec.source not in _SOURCES:
            return spec
        if stand_in and presence(value, root) != "present":
            return spec
        return replace(spec, fingerprint=content_fingerprint(spec, root))
    if not isinstance(value, Mapping):
        raise SettingError(
            f"dataset: expected a name or a mapping, got {value!r}; names are {', '.join(DATASETS)}"
        )
    spec = _inline(value)
    if spec.source == "folder":
        names = spec.class_names or class_folder_names(spec, root)
        if len(names) < 2:
            where = f"{spec.path}/{spec.train[0]}"
            raise DataError(
                f"dataset {spec.name}: {where} holds {len(names)} class folders, at least 2 needed"
            )
        if spec.classes and spec.classes != len(names):
            raise DataError(
                f"dataset {spec.name}: classes is {spec.classes}, but there are {len(names)} class folders"
            )
        spec = replace(spec, class_names=names, classes=len(names))
    spec = _inferred(replace(spec, fingerprint=content_fingerprint(spec, root)), root)
    if not value.get("name"):
        spec = replace(spec, name=f"{spec.source}-{spec.fingerprint[:8]}")
    spec = transformed(spec, size=_whole(value, "size"), channels=_whole(value, "channels"))
    if spec.mean and len(spec.mean) != spec.shape[0]:
        raise SettingError(
            f"dataset: mean and std have {len(spec.mean)} values, but images have {spec.shape[0]} channels"
        )
    return spec


def _inferred(spec: DatasetSpec, root: Path | None) -> DatasetSpec:
    """``spec`` with the shape of its first image and the classes of its label column, where not given."""
    from ddsweep.data import decode

    if spec.source == "parquet":
        files = parquet_files(spec, root)
        if not spec.classes:
            spec = replace(spec, classes=decode.parquet_class_count((*files["train"], *files["test"])))
        if not any(spec.shape):
            spec = replace(spec, shape=decode.parquet_image_shape(files["train"][0]))
        if not spec.class_names:
            spec = replace(spec, class_names=tuple(str(i) for i in range(spec.classes)))
    elif not any(spec.shape):
        spec = replace(spec, shape=decode.file_image_shape(folder_files(spec, root)["train"][0][1]))
    if spec.classes < 2:
        raise DataError(
            f"dataset {spec.name}: {counted(spec.classes, 'class', 'classes')} found; at least 2 are needed"
        )
    return spec


# ------------------------------------------------------------------------------- the inline mapping


def _inline(value: Mapping[str, Any]) -> DatasetSpec:
    """The mapping as a `DatasetSpec`, each value checked by type; no file is looked at."""
    unknown = [str(key) for key in value if key not in _KEYS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], _KEYS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise SettingError(f"dataset: unknown key {unknown[0]!r}{meant}; allowed are {', '.join(_KEYS)}")
    source = value.get("source")
    if source not in _SOURCES:
        raise SettingError(
            f"dataset: source is one of {', '.join(_SOURCES)}, not {source!r}; "
            f"other data sets go by name: {', '.join(DATASETS)}"
        )
    default = source == "folder"
    spec = DatasetSpec(
        name=_text(value, "name", "(inline)"),
        source=source,
        path=_text(value, "path", None),
        train=_items(value, "train", source, ("train",) if default else None),
        test=_items(value, "test", source, ("test",) if default else None),
        shape=_shape(value.get("shape")),
        classes=_class_count(value.get("classes")),
        class_names=_names(value.get("class_names")),
        mean=_numbers(value, "mean"),
        std=_numbers(value, "std"),
    )
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
        _whole(value, key)  # before any file is read
    if len(spec.mean) != len(spec.std):
        raise SettingError("dataset: mean and std go together, one number of each per channel")
    if any(item <= 0 for item in spec.std):
        raise SettingError(f"dataset: std must be above 0, not {list(spec.std)}")
    return replace(spec, classes=spec.classes or len(spec.class_names))


def _text(value: Mapping[str, Any], key: str, default: str | None) -> str:
    given = value.get(key, default)
    if not isinstance(given, str) or not given:
        raise SettingError(f"dataset: {key} must be a text that is not empty, not {given!r}")
    return given


def _whole(value: Mapping[str, Any], key: str) -> int | None:
    given = value.get(key)
    try:
        return None if given is None else whole(given)
    except ValueError:
        raise SettingError(f"dataset: {key} must be a whole number, not {given!r}") from None


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str | bytes)


def _items(
    value: Mapping[str, Any], key: str, source: str, default: tuple[str, ...] | None
) -> tuple[str | int, ...]:
    given = value.get(key, default)
    items = tuple(given) if _is_list(given) else () if given is None else (given,)
    numbers = source == "parquet"
    if numbers:  # text is the name of a file, also where it looks like a number
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


# ------------------------------------------------------------------------------------ what is there


@dataclass(frozen=True)
class DatasetStatus:
    """One line of ``ddsweep data list``. ``where`` is a path relative to the data root, or a package."""

    name: str
    source: str
    shape: tuple[int, int, int]
    classes: int
    status: str
    where: str


def presence(name: str, root: Path | None) -> str:
    """``embedded``, ``present``, or ``missing: <what>`` for a data set of the catalog; decodes nothing."""
    spec = find_dataset(name)
    if spec.source == "digits":
        return "embedded"
    if root is None:
        return "missing: no data root (--data-root or DDSWEEP_DATA)"
    if spec.source == "torchvision":
        layout = TORCHVISION[spec.base_name]
        absent = [file for file in layout.files if not (root / layout.folder / file).is_file()]
        return f"missing: {layout.folder}/{absent[0]}" if absent else "present"
    if spec.source in OFFICIAL:
        tree = OFFICIAL[spec.source]
        absent = [item for item in tree.files if not (root / tree.folder / item).is_file()]
        absent += [item for item in tree.folders if not (root / tree.folder / item).is_dir()]
        return f"missing: {tree.folder}/{absent[0]}" if absent else "present"
    try:
        parquet_files(spec, root)
    except DataError as error:
        return (
            f"missing: {str(error).removeprefix(f'dataset {name}: ').removesuffix(f'; {how_to_get(name)}')}"
        )
    return "present"


def list_datasets(root: Path | None) -> list[DatasetStatus]:
    """Every data set of the catalog and whether its files are under ``root``."""
    rows = []
    for spec in DATASETS.values():
        where = spec.path
        if spec.source == "torchvision":
            where = TORCHVISION[spec.name].folder
        elif spec.source in OFFICIAL:
            where = OFFICIAL[spec.source].folder
        elif spec.source == "digits":
            where = "scikit-learn"
        status = presence(spec.name, root)
        rows.append(DatasetStatus(spec.name, spec.source, spec.shape, spec.classes, status, where))
    return rows
