"""One node of a Ray cluster: how Ray is started on it, and the files by which nodes know of each other."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddsweep.errors import UserError
from ddsweep.interpreter import SAFE_PATH, python_module
from ddsweep.launch.allocation import NodeLimits, Place
from ddsweep.launch.processes import Signals, spawn_out_of_reach
from ddsweep.launch.site import Site
from ddsweep.private import is_own

__all__ = [
    "LOOK_S",
    "TOKEN",
    "Node",
    "alive",
    "card_path",
    "done_path",
    "left_path",
    "make_private",
    "ray_environment",
    "versions_trouble",
]

TOKEN = "token"
LOOK_S = 0.3


def ray_environment(site: Site, temporary: Path, token: Path) -> dict[str, str]:
    """Environment variables for every process of the cluster. They are set explicitly if Ray's default
    differs between its own commands, or would hide a lost node for minutes."""
    third = site.node_failure * 1000 / 3
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(temporary),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Three checks in a row must fail: each waits for its time-out, and then for the next period.
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_timeout_ms": str(round(third * 0.7)),
        "RAY_health_check_period_ms": str(round(third * 0.3)),
        "RAY_health_check_initial_delay_ms": "2000",
        # Without these a call to a node that was silently cut off waits for minutes.
        "RAY_grpc_client_keepalive_time_ms": str(round(third * 1.5)),
        "RAY_grpc_client_keepalive_timeout_ms": str(round(third * 1.5)),
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(max(5, round(site.node_failure))),
        # Slurm kills processes that take too much memory. Ray's own monitor looks at the whole machine.
        "RAY_memory_monitor_refresh_ms": "0",
        "PYTHONUNBUFFERED": "1",
        **SAFE_PATH,
    }


def make_private(folder: Path) -> None:
    """A private folder around Ray's own. Ray opens its folder, with its sockets, to everybody (mode 777), and
    another user could guess its name and make it first. Raises `UserError`."""
    host = socket.gethostname()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_own(folder):
            raise UserError(f"temporary: {folder} on {host} belongs to somebody else; set another folder")
        folder.chmod(0o700)
    except OSError as error:
        raise UserError(f"temporary: {folder} on {host}: {error.strerror}") from None


@dataclass(frozen=True)
class Node:
    site: Site
    place: Place
    folder: Path
    temporary: Path
    environment: dict[str, str]
    limits: NodeLimits
    signals: Signals
    say: Callable[[str], None]
    log: Any

    def start_ray(self, *options: str) -> subprocess.Popen[str]:
        """``ray start --block``: its processes are children of this task and end with it."""
        limits = self.limits
        known = [f"--num-cpus={limits.cpus}", f"--num-gpus={limits.gpus}"]
        if limits.memory is not None:
            known.append(f"--memory={limits.memory - self.object_store()}")
        known.append(f"--object-store-memory={self.object_store()}")
        ray = python_module("ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
        own = {"TMPDIR": str(self.temporary.parent)}  # a compiler that is killed leaves files there
        return spawn_out_of_reach([*ray, *known, *options], {**self.environment, **own}, self.log)

    def object_store(self) -> int:
        """Bytes of the object store: from the site file, else a fifth of the memory, and never more than
        shared memory has."""
        free = shutil.disk_usage("/dev/shm").free
        if self.site.object_store is not None:
            wanted = int(self.site.object_store * 1e9)
        else:
            whole = self.limits.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            wanted = min(whole // 5, 20 * 10**9)
        return max(100 * 2**20, min(wanted, int(free * 0.9)))


def card_path(folder: Path, rank: int) -> Path:
    return folder / "nodes" / f"{rank:04d}.json"


def done_path(folder: Path) -> Path:
    return folder / "done.json"


def left_path(folder: Path, rank: int) -> Path:
    return folder / "left" / f"{rank:04d}.json"


def alive(address: str) -> set[str] | None:
    """The names of the nodes that are up; None if the head does not answer."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # here: Ray takes a second to import

    try:
        found = GcsClient(address=address).get_all_node_info(timeout=5)
    except Exception:  # Ray raises many kinds of errors; all mean: not yet
        return None
    return {info.node_manager_hostname for info in found.values() if info.state == 0}


def versions_trouble(card: Mapping[str, Any], head_card: Mapping[str, Any], head: str) -> str:
    other, own = card["versions"], head_card["versions"]
    told = ", ".join(
        f"{key} {other.get(key)} (on {head}: {own[key]})" for key in own if own[key] != other.get(key)
    )
    return f"{card['host']} has other versions: {told}; install the same environment on all nodes"
