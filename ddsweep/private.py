"""Folders that only their owner may enter, for a Ray with its sockets and its token; and files of that kind.
The process that makes a folder removes it at its end; the next process removes folders of killed ones."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["PREFIX", "is_own", "owned", "private_folder", "remove_folder", "remove_left", "write_secret"]

PREFIX = "dds"
"""The names of all of them begin with this."""

_OWNER = ".ddsweep-owner"
"""A file in each that its process keeps locked. A lock ends with the process, however that ends, and other
containers see it; process numbers mean nothing there."""


_PATIENCE_S = 5.0


@contextmanager
def private_folder(base: Path) -> Iterator[Path]:
    """A new folder in ``base`` with a short name. It is removed afterwards."""
    remove_left(base)
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-", dir=base))
    try:
        with owned(folder):
            yield folder
    finally:
        remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Remove ``folder`` with all that is in it. Processes of Ray that are being killed may still write there,
    and a folder that has got a new file while it was emptied stays: so it is tried again."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder) or time.monotonic() > until:
            return
        time.sleep(0.05)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Marks the existing ``folder`` as in use meanwhile."""
    with (folder / _OWNER).open("w") as owner:
        _lock(owner)
        yield


def remove_left(base: Path) -> list[Path]:
    """Remove the folders in ``base`` whose process has ended, and return them. Those of other users, and
    those without an owner's lock, are left alone."""
    removed = []
    for folder in sorted(base.glob(f"{PREFIX}*")):
        try:
            if not is_own(folder):
                continue
            with (folder / _OWNER).open("r+") as owner:
                if not _lock(owner):
                    continue
                remove_folder(folder)
        except OSError:  # not such a folder, or another process removes it
            continue
        removed.append(folder)
    return removed


def is_own(folder: Path) -> bool:
    """Whether it is a folder of this user, and not a link."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def write_secret(path: Path, text: str) -> None:
    """A new file of mode 600."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
