"""Resolves the data set of a sweep file to a `DatasetSpec`, and lists data sets. No torch.

numpy, pyarrow and PIL are imported only to check files of a parquet or folder source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddsweep.catalog import (
    DATASETS,
    DatasetSpec,
    base_name,
    is_code,
    parse_code,
    parse_dataset,
    transformed,
    transforms_of,
)
from ddsweep.data.inline import given_whole, parse_mapping
from ddsweep.data.layout import MissingError, location
from ddsweep.data.sources import Looking, Say, source_of
from ddsweep.errors import DataError, SettingError
from ddsweep.own_code import data_reference, names_code
from ddsweep.paths import user_path

__all__ = [
    "DatasetStatus",
    "data_root",
    "dataset_status",
    "is_here",
    "list_datasets",
    "presence",
    "require_files",
    "resolve_dataset",
    "surveyed",
]


def data_root(flag: str | Path | None) -> Path | None:
    """The folder of the data: ``--data-root``, else ``DDSWEEP_DATA``, else None."""
    value = flag or os.environ.get("DDSWEEP_DATA") or None
    return None if value is None else user_path(value)


def resolve_dataset(
    value: str | Mapping[str, Any],
    root: Path | None,
    *,
    stand_in: bool = False,
    say: Say | None = None,
    may_run: bool = False,
    code: Path | None = None,
) -> DatasetSpec:
    """The data set that ``dataset:`` of a sweep file means, complete, with its content fingerprint.

    ``value`` is a name of the catalog, also with transforms such as ``usps(size=28)``, or a mapping
    ``{source: parquet|folder, path, train, test}`` with optionally ``name, shape, classes, class_names, mean,
    std, size, channels, image_column, label_column``. All images of a parquet or folder source are checked
    once (`ddsweep.data.survey`). They give the values that the mapping leaves out, and ``survey`` of the
    result has the findings. ``shape`` is that of the files; ``size`` and ``channels`` change it. The
    fingerprint is a hash over the chosen files, without their place. Without a ``name`` the data get their
    path as their name, or source and path if the catalog has that name. ``say`` is called if the check takes
    a while.

    A function of the user's own is ``{file, name}`` with its options, or the text that results have of that
    (`CodeRef`), whose source then lies in ``code``. With ``may_run`` it is run, in a process of its own,
    where it is not known what it gives.

    Raises `SettingError` for an unknown name or key or a value of the wrong type, `DataError` for files that
    are missing or doubled, and, all in one message, for whatever makes them unfit: images that cannot be read
    or have another size, labels out of range, classes without images, test images that are all in train. With
    ``stand_in``, a name of the catalog whose files are missing has no fingerprint instead: `load_splits` then
    makes a stand-in.
    """
    if isinstance(value, Mapping) and names_code(value):
        value = data_reference(value)
    if isinstance(value, str) and is_code(value):
        reference = str(parse_code(base_name(value), "dataset"))
        spec = DatasetSpec(reference, "code", path=str(code or ""))
        return transformed(surveyed(spec, root, Looking(say=say, may_run=may_run)), **transforms_of(value))
    if isinstance(value, str):
        spec = parse_dataset(value)
        return spec if stand_in and not is_here(spec, root) else surveyed(spec, root, Looking(say=say))
    if not isinstance(value, Mapping):
        raise SettingError(
            f"dataset: expected a name or a mapping, got {value!r}; names are {', '.join(DATASETS)}"
        )
    spec = parse_mapping(value)
    size, channels = given_whole(value, "size"), given_whole(value, "channels")
    spec = surveyed(spec, root, Looking(size is not None, say, may_run))
    spec = transformed(spec, size=size, channels=channels)
    if spec.mean and len(spec.mean) != spec.shape[0]:
        raise SettingError(
            f"dataset: mean and std have {len(spec.mean)} values, but images have {spec.shape[0]} channels"
        )
    return spec


def surveyed(spec: DatasetSpec, root: Path | None, how: Looking) -> DatasetSpec:
    """``spec`` of own data, completed from its files. Raises `DataError` with all reasons why the files
    cannot be used."""
    found = source_of(spec).survey(spec, root, how)
    if found is None:
        return spec
    if found.problems:
        where = f"dataset {spec.name} in {location(spec, root)}"
        raise DataError(f"{where}: {_numbered(found.problems)}")
    return replace(
        spec,
        shape=spec.shape if any(spec.shape) else found.shape,
        classes=len(found.class_names),
        class_names=spec.class_names or found.class_names,
        fingerprint=found.fingerprint,
        image_column=found.image_column,
        label_column=found.label_column,
        first_label=found.first_label,
        survey=found,
    )


def _numbered(problems: Sequence[str]) -> str:
    """One problem stays in the line; several get a line each."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
    return "\n".join([f"{len(problems)} things make these data unfit:", *lines])


# ------------------------------------------------------------------------------------ what is there


@dataclass(frozen=True)
class DatasetStatus:
    """One line of ``ddsweep data list``. ``where`` is a path relative to the data root, or a package;
    ``remarks`` are the findings in the user's own data."""

    name: str
    source: str
    shape: tuple[int, int, int]
    classes: int
    status: str
    where: str
    remarks: tuple[str, ...] = ()


def presence(name: str, root: Path | None) -> str:
    """The status of a data set of the catalog: ``embedded``, ``present``, ``missing: WHAT``, or ``damaged:
    WHAT``."""
    return _status(parse_dataset(name), root)


def is_here(spec: DatasetSpec, root: Path | None) -> bool:
    """False if files are missing. Raises `DataError` if they are there and damaged."""
    try:
        source_of(spec).check(spec, root)
    except MissingError:
        return False
    return True


def require_files(spec: DatasetSpec, root: Path | None) -> None:
    """Raises `DataError` for files that are not there or cannot be right, in milliseconds."""
    source_of(spec).check(spec, root)


def _status(spec: DatasetSpec, root: Path | None) -> str:
    source = source_of(spec)
    try:
        source.check(spec, root)
    except MissingError as error:
        return f"missing: {error.what}"
    except DataError as error:
        return f"damaged: {str(error).removeprefix(f'dataset {spec.name}: ')}"
    return source.present


def list_datasets(root: Path | None) -> list[DatasetStatus]:
    """Every data set of the catalog and whether its files are under ``root``."""
    return [dataset_status(spec, root) for spec in DATASETS.values()]


def dataset_status(spec: DatasetSpec, root: Path | None, status: str = "") -> DatasetStatus:
    """A line about ``spec``; ``status`` is the state of its files, if that is known."""
    remarks = tuple(map(str, spec.survey.remarks)) if spec.survey else ()
    there = status or _status(spec, root)
    return DatasetStatus(spec.name, spec.source, spec.shape, spec.classes, there, spec.path, remarks)
