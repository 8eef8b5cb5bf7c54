"""Looks at a machine for `ddsweep doctor`: this one, and each node of a short job.

``python -m ddsweep.launch.probe REQUEST`` prints one line of JSON. It leaves nothing behind, and does not
judge: `ddsweep.launch.doctor` does, which sees all machines.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddsweep.launch.allocation import node_limits
from ddsweep.machine import (
    SHARED_MEMORY,
    TOKEN,
    folder_trouble,
    free_bytes,
    missing_data,
    most_open_files,
    shared_trouble,
    socket_trouble,
    taken_ports,
    token_trouble,
    torch_gpus,
    versions,
)

__all__ = ["Facts", "Request", "look"]


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
    """The facts of one machine. Texts are empty if nothing is wrong; sizes are bytes; ``clock`` is the time
    of the look in seconds of the epoch; ``missing`` says what is missing of each data set."""

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
    open_files: int
    missing: dict[str, str]
    clock: float

    @classmethod
    def read(cls, line: str) -> Facts:
        """Read a line of JSON. Raises ValueError for any other line."""
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
        shared_memory=free_bytes(SHARED_MEMORY),
        open_files=most_open_files(),
        missing=missing_data(request.data, None if request.data_root is None else Path(request.data_root)),
        clock=time.time(),
    )


def main() -> None:
    content: dict[str, Any] = json.loads(sys.argv[1])
    facts = look(Request(**{**content, "data": tuple(content["data"])}))
    print(json.dumps(asdict(facts)), flush=True)


if __name__ == "__main__":
    main()
