"""What a machine is like, for `ddsweep doctor`: looked at here, and on each node of a short job.

``python -m ddsweep.launch.probe REQUEST`` prints one line of JSON. It looks, leaves nothing behind, and
judges nothing: that is for `ddsweep.launch.doctor`, which sees all machines.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddsweep.data.files import presence
from ddsweep.launch.folder import versions
from ddsweep.launch.ray_cluster import node_limits
from ddsweep.paths import user_path
from ddsweep.results.files import write_atomic

__all__ = ["NONCE", "TOKEN", "Facts", "Request", "look"]

NONCE = "nonce"
TOKEN = "token"


@dataclass(frozen=True)
class Request:
    """What to look for. ``shared`` is a folder in the results with the files `NONCE`, which holds ``nonce``,
    and `TOKEN`; ``data`` are names of data sets, or folders of their own, below ``data_root``."""

    shared: str
    nonce: str
    temporary: str
    first_port: int
    ports: int
    data_root: str | None
    data: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Of one machine. Texts are empty where nothing is wrong; sizes are bytes, ``clock`` seconds of the epoch
    when it was looked at; ``missing`` are data by what is missing of them."""

    host: str
    versions: dict[str, str]
    cpus: int
    gpus: int
    visible: str | None
    torch_gpus: int
    torch_trouble: str
    shared_trouble: str
    token_trouble: str
    temporary_trouble: str
    temporary_free: int
    taken_ports: tuple[int, ...]
    shared_memory: int
    missing: dict[str, str]
    clock: float

    @classmethod
    def read(cls, line: str) -> Facts:
        """From a line of JSON. Raises ValueError for any other."""
        content = json.loads(line)
        try:
            return cls(**{**content, "taken_ports": tuple(content["taken_ports"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not facts: {error}") from None


def look(request: Request) -> Facts:
    """Look at this machine."""
    limits = node_limits(os.environ)
    gpus, trouble = torch_gpus()
    shared = Path(request.shared)
    elsewhere = shared_trouble(shared, request.nonce)
    return Facts(
        host=socket.gethostname(),
        versions=versions(),
        cpus=limits.cpus,
        gpus=limits.gpus,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        torch_gpus=gpus,
        torch_trouble=trouble,
        shared_trouble=elsewhere or folder_trouble(shared),
        token_trouble="" if elsewhere else token_trouble(shared / TOKEN),
        temporary_trouble=socket_trouble(Path(request.temporary)),
        temporary_free=free_bytes(Path(request.temporary)),
        taken_ports=taken_ports(range(request.first_port, request.first_port + request.ports)),
        shared_memory=free_bytes(Path("/dev/shm")),
        missing=missing_data(request.data, None if request.data_root is None else Path(request.data_root)),
        clock=time.time(),
    )


def torch_gpus() -> tuple[int, str]:
    """How many GPUs torch can use, or why it cannot be asked."""
    try:
        import torch

        return (torch.cuda.device_count() if torch.cuda.is_available() else 0), ""
    except Exception as error:  # a library that is missing, or does not fit the machine
        return 0, f"import torch: {' '.join(str(error).split())[:200]}"


def shared_trouble(folder: Path, nonce: str) -> str:
    """Whether ``folder`` is here what it is where it was made."""
    try:
        found = (folder / NONCE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"{folder.parent} is not the folder that the login node has"
    except OSError as error:
        return f"{folder / NONCE}: {error.strerror}"
    return "" if found == nonce else f"{folder / NONCE} holds something else here"


def folder_trouble(folder: Path) -> str:
    """Whether files can be written in ``folder`` as results are: flushed to disk, renamed over one that is
    there, and locked."""
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
    except Exception as error:  # of write_atomic, which says it for people
        return str(error)
    finally:
        for path in (target, guard):
            with suppress(OSError):
                path.unlink()


def token_trouble(path: Path) -> str:
    """Whether the file, made with mode 600 by this user, is that here."""
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
    """Whether Unix sockets can be made in ``folder``."""
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


def taken_ports(ports: range) -> tuple[int, ...]:
    """Those of ``ports`` on which something listens, on any address of this machine."""
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
    """What is missing, of data sets by name, or folders below ``root``."""
    found = {}
    for item in data:
        if item.startswith("folder:"):
            folder = user_path(item.removeprefix("folder:"))
            place = folder if root is None else root / folder
            state = "present" if place.is_dir() else f"missing: {place}"
        else:
            state = presence(item, root)
        if state.startswith("missing"):
            found[item.removeprefix("folder:")] = state.removeprefix("missing: ")
    return found


def main() -> None:
    content: dict[str, Any] = json.loads(sys.argv[1])
    facts = look(Request(**{**content, "data": tuple(content["data"])}))
    print(json.dumps(asdict(facts)), flush=True)


if __name__ == "__main__":
    main()
