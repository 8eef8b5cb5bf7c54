"""The user's own data, for ``ddsweep data list``: in the data root, and in a sweep file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ddsweep.catalog import DATASETS, SOURCES, DatasetSpec, is_code, parse_dataset
from ddsweep.data.files import DatasetStatus, dataset_status, resolve_dataset, surveyed
from ddsweep.data.inline import parse_mapping
from ddsweep.data.sources import Looking, Say, source_of
from ddsweep.errors import DataError, UserError

__all__ = ["list_own", "list_values"]

_MANY, _MUCH = 20_000, 256 << 20
"""A folder of more files or bytes is checked only on demand."""


def list_own(root: Path | None, say: Say | None = None) -> list[DatasetStatus]:
    """The folders in the data root with the layout of own data: ``train`` and ``test`` with class folders in
    them, or Parquet files. Large ones are named and not checked."""
    rows = []
    for folder in _folders(root):
        kind = _kind_of(folder)
        if kind is None:
            continue
        spec = parse_mapping({"source": kind, "path": folder.name})
        if _is_large(folder):
            status = "present, and large: `ddsweep data list FILE` of a sweep looks at it"
            rows.append(dataset_status(spec, root, status))
            continue
        try:
            rows.append(dataset_status(surveyed(spec, root, Looking(True, say)), root, "present"))
        except UserError as error:
            rows.append(dataset_status(spec, root, _refused(error)))
    return rows


def list_values(
    values: Iterable[str | dict[str, Any]], root: Path | None, say: Say | None = None
) -> list[DatasetStatus]:
    """The data sets of the ``values`` of ``dataset:`` in a sweep file. The user's own are checked."""
    rows = []
    for value in values:
        try:
            rows.append(dataset_status(resolve_dataset(value, root, say=say), root))
        except UserError as error:
            if isinstance(value, str) and not is_code(value):
                if not isinstance(error, DataError):
                    raise
                rows.append(dataset_status(parse_dataset(value), root))
                continue
            spec = DatasetSpec(value, "code") if isinstance(value, str) else parse_mapping(value)
            rows.append(dataset_status(spec, root, _refused(error)))
    return rows


def _folders(root: Path | None) -> list[Path]:
    """The folders in the data root that belong to no data set of the catalog."""
    if root is None or not root.is_dir():
        return []
    taken = {PurePosixPath(spec.path).parts[0] for spec in DATASETS.values()}
    inside = sorted(root.iterdir())
    return [path for path in inside if path.is_dir() and path.name not in taken and path.name[0] != "."]


def _kind_of(folder: Path) -> str | None:
    """The source that knows the layout of ``folder``; None if there is none, or if it may not be entered."""
    try:
        for name in SOURCES:
            if source_of(DatasetSpec(folder.name, name)).recognises(folder):
                return name
    except OSError:  # lost+found, for example
        pass
    return None


def _is_large(folder: Path) -> bool:
    count = size = 0
    for place, _, names in os.walk(folder, followlinks=False):
        for name in names:
            count += 1
            try:
                size += os.stat(os.path.join(place, name)).st_size
            except OSError:
                continue
            if count > _MANY or size > _MUCH:
                return True
    return False


def _refused(error: UserError) -> str:
    return "refused: " + " ".join(str(error).split())
