"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from ddsweep.errors import SettingError, UserError

__all__ = ["make_folder", "user_path"]


def make_folder(path: Path, option: str) -> None:
    """Make the folder ``path`` that ``option`` names, with its parents. Raises `UserError` if that cannot
    be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {path}: no folder can be there: {error.strerror or error}") from error


def user_path(text: str | os.PathLike[str]) -> Path:
    """``text`` with a leading ``~`` or ``~name`` replaced by the home folder: a shell does not do that in
    ``--results=~/x``, in quotes, and in files. Raises `SettingError` without such a home."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        whose = path.split("/", maxsplit=1)[0]
        raise SettingError(
            f"{path}: {whose} is nobody's home folder; for a name that begins so, write ./{path}"
        )
    return Path(path)
