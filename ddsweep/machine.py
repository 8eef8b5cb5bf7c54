"""Checks of a machine, which leave nothing behind. Each returns a few words on the problem, or nothing."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import resource
import secrets
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import ddsweep
from ddsweep.data.files import presence
from ddsweep.errors import UserError
from ddsweep.paths import user_path
from ddsweep.results.files import write_atomic

__all__ = [
    "NONCE",
    "TOKEN",
    "folder_trouble",
    "free_bytes",
    "limits_trouble",
    "missing_data",
    "most_open_files",
    "object_store_bytes",
    "shared_trouble",
    "socket_trouble",
    "taken_ports",
    "token_trouble",
    "torch_gpus",
    "versions",
]

NONCE = "nonce"
TOKEN = "token"
SHARED_MEMORY = Path("/dev/shm")

LEAST_FILES = 128
"""The least number of open files of one process: Ray's raylet has 50, and some for each worker."""

_LEAST_ROOM = 20 * 10**6
_LEAST_STORE = 100 * 2**20
_STORE_OF_MEMORY = 0.3
"""The part of the memory that Ray's object store takes by default."""


def torch_gpus() -> tuple[int, str]:
    """The number of GPUs that torch can use, or why it cannot be told."""
    try:
        import torch

        return (torch.cuda.device_count() if torch.cuda.is_available() else 0), ""
    except Exception as error:  # a library that is missing, or does not fit the machine
        return 0, f"import torch: {' '.join(str(error).split())[:200]}"


def shared_trouble(folder: Path, nonce: str) -> str:
    """Checks that ``folder`` is the same here as where it was made."""
    try:
        found = (folder / NONCE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{folder.parent} is another folder there, or not there"
    except OSError as error:
        return f"{folder / NONCE}: {error.strerror}"
    return "" if found == nonce else f"{folder / NONCE} holds something else there"


def folder_trouble(folder: Path) -> str:
    """Checks that files can be written in ``folder`` as results are: flushed to disk, renamed over an
    existing one, and locked."""
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    target, guard = folder / name, folder / f"{name}.guard"
    try:
        for content in (b"one", b"two"):
            write_atomic(target, content, folder)
        if target.read_bytes() != b"two":
            return f"{folder}: a file that was renamed over another still has the old content"
        with guard.open("w") as first, guard.open("w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return ""
            return f"{folder}: flock lets two holders in; two drivers could take the same sweep"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror or error}"
    except Exception as error:  # from write_atomic, with a message for people
        return str(error)
    finally:
        for path in (target, guard):
            with suppress(OSError):
                path.unlink()


def token_trouble(path: Path) -> str:
    """Checks that the file has mode 600 and this user as its owner, as it was made."""
    try:
        found = path.stat()
    except OSError as error:
        return f"{path}: {error.strerror}"
    mode = stat.S_IMODE(found.st_mode)
    if mode != 0o600:
        return f"{path} has mode {mode:o}, though it was made with 600: others could read tokens"
    if found.st_uid != os.getuid():
        return f"{path} belongs to user {found.st_uid}, and this is {os.getuid()}"
    return ""


def socket_trouble(folder: Path) -> str:
    """Checks that Unix sockets can be made in ``folder``."""
    try:
        place = Path(tempfile.mkdtemp(prefix="dds-", dir=folder))
    except OSError as error:
        return f"{folder}: {error.strerror}"
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(place / "socket"))
    except OSError as error:
        return f"{folder}: takes no Unix sockets: {error.strerror or error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return ""


def free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def most_open_files() -> int:
    """The number of files that a process may have open at its hard limit, which Ray asks for."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def limits_trouble(temporary: Path) -> str:
    """Why a Ray with its folder in ``temporary`` would not start here, as far as one can tell."""
    found = []
    if (most := most_open_files()) < LEAST_FILES:
        found.append(
            f"a process may have {most} files open, and Ray needs {LEAST_FILES}: raise the hard limit "
            "(ulimit -Hn, LimitNOFILE of systemd, nofile of a container)"
        )
    if (free := free_bytes(temporary)) < _LEAST_ROOM:
        found.append(
            f"{temporary} has {free / 1e6:.0f} MB free, and Ray needs {_LEAST_ROOM / 1e6:.0f} there: free "
            "some, or set TMPDIR (of a site: temporary) to another folder"
        )
    return "; ".join(found)


def object_store_bytes(temporary: Path, data: int) -> int | None:
    """The size of Ray's object store for ``data`` bytes of data sets, if Ray's own choice does not fit into
    shared memory: Ray would then put all of it into its folder in ``temporary``. None if its own choice is
    right, or unavoidable. Raises `UserError` if the data fit into neither."""
    need, free = _LEAST_STORE + 2 * data, int(0.9 * free_bytes(SHARED_MEMORY))
    if not SHARED_MEMORY.is_dir() or free >= _STORE_OF_MEMORY * memory_bytes():
        return None
    if free >= need:
        return free
    if (room := free_bytes(temporary)) < need:
        raise UserError(
            f"Ray's object store needs {need / 1e6:.0f} MB; {SHARED_MEMORY} has {free / 0.9e6:.0f} MB free "
            f"and {temporary} {room / 1e6:.0f} MB: make room, or give a container more (its shm size)"
        )
    return None


def memory_bytes() -> int:
    """The memory of this machine, also if a container or a job may use less."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def taken_ports(ports: range) -> tuple[int, ...]:
    """The ``ports`` that are taken on any address of this machine."""
    taken = []
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(port)
    return tuple(taken)


def missing_data(data: Sequence[str], root: Path | None) -> dict[str, str]:
    """The missing or damaged files of data sets, given by name or as folders below ``root``."""
    found = {}
    for item in data:
        if item.startswith("folder:"):
            folder = user_path(item.removeprefix("folder:"))
            place = folder if root is None else root / folder
            state = "present" if place.is_dir() else f"missing: {place}"
        else:
            state = presence(item, root)
        if state not in ("present", "embedded"):
            found[item.removeprefix("folder:")] = state.removeprefix("missing: ")
    return found


@cache
def versions() -> dict[str, str]:
    """The versions that must be the same on all nodes of a launch. ``code`` is a digest of the package's own
    files: a job runs the code of its start, not of its submission."""
    digest = hashlib.sha256()
    package = Path(ddsweep.__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    found = {name: _version(name) for name in ("torch", "ray")}
    python = platform.python_version()
    return {"ddsweep": ddsweep.__version__, "code": digest.hexdigest()[:12], "python": python, **found}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"
