"""Folders that only their owner may enter, for a Ray with its sockets and its token. They go with the process
that made them; what one that was killed left behind, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["PREFIX", "is_own", "owned", "private_folder", "remove_left"]

PREFIX = "dds"
"""How the names of all of them begin."""

_OWNER = ".ddsweep-owner"
"""A file in each that its process keeps locked. A lock ends with the process, however that ends, and is seen
from other containers; a process number says nothing there."""


@contextmanager
def private_folder(base: Path) -> Iterator[Path]:
    """A new one in ``base`` with a short name, and gone afterwards."""
    remove_left(base)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-", dir=base))
    try:
        with owned(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Nobody takes ``folder``, which is there, for left behind meanwhile."""
    with (folder / _OWNER).open("w") as owner:
        _lock(owner)
        yield


def remove_left(base: Path) -> list[Path]:
    """Remove the folders in ``base`` whose process is gone, and return them. Those of other users, and those
    that say nothing of an owner, are left alone."""
    removed = []
    for folder in sorted(base.glob(f"{PREFIX}*")):
        try:
            if not is_own(folder):
                continue
            with (folder / _OWNER).open("r+") as owner:
                if not _lock(owner):
                    continue
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # not one of these, or somebody else removes it
            continue
        removed.append(folder)
    return removed


def is_own(folder: Path) -> bool:
    """Whether it is a folder, no link to one, of this user."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
