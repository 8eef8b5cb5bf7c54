"""Writing one file so that it appears in full or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddsweep.errors import DiskFullError, ResultsError, UnreadableError, UserError

__all__ = [
    "file_in_the_way",
    "full_disk",
    "full_disk_told",
    "is_there",
    "names_in",
    "partial_path",
    "patiently",
    "refused",
    "remove_leftovers",
    "results_error",
    "unreadable_error",
    "write_atomic",
    "writing",
]

_SUFFIX = ".partial"
_ELSEWHERE = "choose another folder with --results or DDSWEEP_RESULTS"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EROFS)

PATIENCE_S = 60.0
"""How long a writer waits for space: somebody may make room."""


def results_error(error: OSError, path: Path) -> ResultsError:
    """The `ResultsError` that tells a user what an ``OSError`` on ``path`` means and what to do."""
    if error.errno in _FULL:
        return DiskFullError(
            f"{path}: no space left on this disk or quota{_free(path)}; nothing was lost; "
            "free space and run the same command again"
        )
    if error.errno == errno.EROFS:
        return ResultsError(f"{path}: cannot write, the file system is read-only; {_ELSEWHERE}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return ResultsError(f"{path}: cannot write, no permission; {_ELSEWHERE}")
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return file_in_the_way(error.filename or path)
    return ResultsError(f"{path}: cannot write: {error.strerror or error}; {_ELSEWHERE}")


def file_in_the_way(path: object) -> ResultsError:
    """The `ResultsError` for a file where a folder of results should be."""
    return ResultsError(f"{path}: a file is in the way of a results folder; move it, or {_ELSEWHERE}")


def unreadable_error(error: OSError, path: object) -> UnreadableError:
    """The `UnreadableError` for an ``OSError`` while ``path`` was read, which is there."""
    return UnreadableError(
        f"{path}: cannot be read: {error.strerror or error}. It stays as it is: see to the file or its disk, "
        "and give the same command again"
    )


def is_there(path: Path) -> bool:
    """Whether ``path`` exists. For files that are looked for again and again: while a file system does not
    answer it is false, where `Path.exists` raises."""
    return os.path.exists(path)


def names_in(folder: Path) -> list[str]:
    """The names of what is in ``folder``, sorted; none without a folder. Raises `UnreadableError` for one
    that the system does not list: taken as empty, it would say that nothing was ever done."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable_error(error, folder) from error


def _free(path: Path) -> str:
    """The free space where ``path`` is, in words; empty if the system does not tell."""
    there = next((place for place in (path, *path.parents) if place.is_dir()), None)
    if there is None:
        return ""
    try:
        found = os.statvfs(there)
    except OSError:
        return ""
    if found.f_files and not found.f_favail:
        return f" (no more files fit into {there}: no inodes are left)"
    megabytes = found.f_bavail * found.f_frsize / 1e6
    return f" ({megabytes:,.{0 if megabytes >= 10 else 1}f} MB free in {there})"


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """An error raised inside becomes a `DiskFullError` if a full disk caused it, also as the cause of other
    errors."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        told = full_disk(error, folder)
        if told is None:
            raise
        raise told from error


def full_disk(error: BaseException, folder: Path) -> DiskFullError | None:
    """A `DiskFullError` if a full disk caused ``error``, else None. It names the file, or ``folder`` if the
    file is not known."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, DiskFullError):
            return one
        if isinstance(one, OSError) and one.errno in _FULL:
            found = results_error(one, Path(one.filename) if isinstance(one.filename, str) else folder)
            assert isinstance(found, DiskFullError)
            return found
        # Ray keeps the error of a worker as its cause.
        below = (one.__cause__, one.__context__, getattr(one, "cause", None))
        waiting += [cause for cause in below if isinstance(cause, BaseException)]
    return None


def refused(error: BaseException) -> UserError | None:
    """A `UserError` if ``error`` says that the system refuses a file or folder which it names: no permission,
    a failing disk, a file server that is away. Else None."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED or error.filename is None:
        return None
    return UserError(f"{error.filename}: the system refuses it: {error.strerror}")


def patiently(write: Callable[[], object], should_stop: Callable[[], bool] = lambda: False) -> None:
    """Call ``write``, again for `PATIENCE_S` while the disk is full, until ``should_stop`` says so. Raises
    `DiskFullError` if the disk stays full."""
    begun, wait = time.monotonic(), 0.5
    while True:
        try:
            write()
            return
        except DiskFullError:
            if should_stop() or time.monotonic() - begun >= PATIENCE_S:
                raise
        until, wait = time.monotonic() + wait, min(2 * wait, 8.0)
        while time.monotonic() < until and not should_stop():
            time.sleep(0.25)


def write_atomic(path: Path, write: Callable[[Path], None] | bytes, temporary: Path) -> None:
    """Make ``path`` appear in full or not at all, replacing what was there.

    ``write`` is the content, or a function that writes the content to the path it is given. That path is
    unique and lies in ``temporary``, which must be on the same file system as ``path``; both folders are
    created. Nothing stays behind in ``temporary``, except after a kill. An ``OSError`` becomes a
    `ResultsError` that names ``path``.
    """
    partial = partial_path(path, temporary)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(write):
            write(partial)
        else:
            partial.write_bytes(write)
        _fsync(partial, os.O_RDWR)  # some network file systems report a full disk only here
        os.replace(partial, path)
        _fsync(path.parent, os.O_RDONLY)  # without this a power cut can undo the rename
    except OSError as error:
        raise results_error(error, path) from error
    finally:
        with suppress(OSError):  # renamed, or never made; the first error is the one to report
            partial.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside, while a file or folder is written that a user has named, becomes a
    `UserError` that names ``path``; a full disk a `DiskFullError`."""
    try:
        yield
    except (OSError, ResultsError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, DiskFullError) or not isinstance(cause, OSError):
            raise
        if told := full_disk(cause, path):
            raise told from error
        raise UserError(f"{path}: cannot be written: {cause.strerror or cause}") from error


def partial_path(path: Path, temporary: Path) -> Path:
    """A unique name in ``temporary`` for a file that will become ``path``. `remove_leftovers` knows such
    names."""
    # Short, whatever the names of the file and of the machine are: a name has 255 bytes at most, and names of
    # files here are ASCII.
    begin, host = path.name[:60], socket.gethostname()[:60]
    return temporary / f"{begin}.{host}.{os.getpid()}.{secrets.token_hex(8)}{_SUFFIX}"


def remove_leftovers(temporary: Path, older_than_s: float = 86400.0) -> int:
    """Remove what killed writers left in ``temporary``; returns how many files.

    Younger files may belong to a living writer on another node.
    """
    removed = 0
    for partial in temporary.glob(f"*{_SUFFIX}"):
        try:
            if time.time() - partial.stat().st_mtime > older_than_s:
                partial.unlink()
                removed += 1
        except FileNotFoundError:  # renamed or removed by its own writer
            continue
    return removed


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
