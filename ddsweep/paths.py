"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from ddsweep.errors import SettingError

__all__ = ["user_path"]


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
