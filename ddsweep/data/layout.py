"""Folders of data, and messages for missing files. Neither torch nor numpy here."""

from __future__ import annotations

from pathlib import Path

from ddsweep.catalog import DatasetSpec
from ddsweep.errors import DataError
from ddsweep.paths import user_path

__all__ = ["NO_ROOT", "PUT_THERE", "MissingError", "location", "need_all", "need_root", "one_line"]

NO_ROOT = (
    "data root not given: pass --data-root or set DDSWEEP_DATA to the folder that holds the files, or that "
    "`ddsweep data fetch` is to fill"
)
PUT_THERE = "put the files there, or point --data-root or DDSWEEP_DATA at the folder that holds them"


class MissingError(DataError):
    """Files that are not there. ``what`` is the same in short, for a line of a list."""

    def __init__(self, message: str, what: str = "") -> None:
        super().__init__(message)
        self.what = what


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type without a text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def need_root(root: Path | None, name: str) -> Path:
    """``root`` if it is a folder; `MissingError` otherwise."""
    if root is None:
        raise MissingError(
            f"dataset {name}: {NO_ROOT}",
            "no data root (--data-root or DDSWEEP_DATA); `ddsweep data fetch` fills one",
        )
    if not root.is_dir():
        what = f"data root {root} is not a folder; check --data-root or DDSWEEP_DATA"
        raise MissingError(f"dataset {name}: {what}", what)
    return root


def need_all(
    spec: DatasetSpec,
    root: Path | None,
    files: tuple[str, ...],
    how_to_get: str,
    folders: tuple[str, ...] = (),
) -> Path:
    """The folder ``spec.path`` in the data root, if ``files`` and ``folders`` are in it; else `MissingError`
    names the first that is not."""
    folder = need_root(root, spec.name) / spec.path
    absent = [item for item in files if not (folder / item).is_file()]
    absent += [item for item in folders if not (folder / item).is_dir()]
    if absent:
        message = f"dataset {spec.name}: {folder / absent[0]} is missing; {how_to_get}"
        raise MissingError(message, f"{spec.path}/{absent[0]}")
    return folder


def location(spec: DatasetSpec, root: Path | None) -> Path:
    """The folder of own data. An absolute ``path`` needs no data root."""
    folder = user_path(spec.path)
    if not folder.is_absolute():
        folder = need_root(root, spec.name) / folder
    if not folder.is_dir():
        what = f"folder {folder} is missing"
        raise MissingError(f"dataset {spec.name}: {what}; {PUT_THERE}", what)
    return folder
