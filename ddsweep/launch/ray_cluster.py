"""A Ray cluster over the tasks of a job, one a node, and one command run on it.

The task of rank 0 starts the head, waits until it answers, and only then writes its address to a file in
a folder that all nodes share; the others wait for that file, join, and leave when the head says that the
work is done. `run_on_cluster` is called in every task: by the submitted job, and by
``python -m ddsweep.launch.ray_cluster`` in slurm/ray_cluster.sbatch.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ddsweep.dashboards import provision
from ddsweep.errors import EXIT_DRAINED, EXIT_INTERRUPTED, UserError
from ddsweep.interpreter import SAFE_PATH, python_module
from ddsweep.launch.allocation import NodeLimits, Place, node_limits, slurm_place
from ddsweep.launch.folder import read_json, write_json
from ddsweep.launch.processes import Signals, end, spawn, spawn_out_of_reach
from ddsweep.launch.site import PORTS_OF_A_JOB, Site
from ddsweep.machine import limits_trouble, versions
from ddsweep.private import PREFIX, is_own, owned, remove_left
from ddsweep.processes import MARK, kill_marked, kill_with_children
from ddsweep.sweep.retry import RetryPolicy

__all__ = ["LOST_HEAD", "ray_environment", "run_on_cluster"]

LOST_HEAD = 76
"""The exit code of a run whose Ray head died under its command: to be requeued."""

DRIVER_RETRIES = RetryPolicy(4)
"""How often, and when, a command is started again after a signal killed it (for lack of memory, for
example)."""

_RAY = "ray"
"""Ray's own folder, inside the private one."""

_TOKEN = "token"
_LOOK_S = 0.3
_LOOK_AT_NODES_S = 1.0
_DRAIN_S = 10.0
_LEAVE_S = 15.0


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


# ------------------------------------------------------------------------------------- on every node


def run_on_cluster(
    site: Site,
    place: Place,
    folder: Path,
    command: Callable[[str], Sequence[str]],
    signals: Signals,
    limits: NodeLimits,
    say: Callable[[str], None] = print,
) -> int:
    """Run ``command(address)`` on a Ray cluster over all tasks of the job, and return its exit code.

    ``folder`` is shared by the nodes and of this start of the job alone. Ranks above 0 return 0 once the work
    is done. On ``signals.any`` the command gets one SIGTERM, to drain. Raises `UserError` if the cluster does
    not come up; then, as always, nothing keeps running on this node.
    """
    temporary = Path(site.temporary) / f"{PREFIX}{place.job.replace('_', '-')}"
    token = folder / _TOKEN
    for earlier in range(place.restart):  # left by a SIGKILL on this node
        kill_marked(f"{place.job}.{earlier}.")
        (folder.parent / f"{place.job}.{earlier}" / _TOKEN).unlink(missing_ok=True)
    mark = f"{place.job}.{place.restart}.{place.rank}."
    environment = {**os.environ, **ray_environment(site, temporary / _RAY, token), MARK: mark}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    card = {"host": socket.gethostname(), "versions": versions(), "trouble": ""}
    try:
        remove_left(Path(site.temporary))
        _make_private(temporary)
        if trouble := limits_trouble(temporary):
            raise UserError(f"{socket.gethostname()}: {trouble}")
        write_json(_card(folder, place.rank), card)
        log_file = folder / f"ray-{place.rank}.log"
        with owned(temporary), log_file.open("a", encoding="utf-8") as log:
            node = _Node(site, place, folder, temporary / _RAY, environment, limits, signals, say, log)
            return _head(node, command) if place.is_head else _worker(node)
    except UserError as error:
        write_json(_card(folder, place.rank), {**card, "trouble": str(error)})
        raise
    finally:
        left = kill_marked(mark)
        if left:
            say(f"{socket.gethostname()}: processes that cannot be killed: {left}")
        if is_own(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        # If the head fails at its start, the others must not wait for its address for ever.
        said = _done(folder) if place.is_head else _left(folder, place.rank)
        write_json(said, {"host": socket.gethostname()})


def _make_private(folder: Path) -> None:
    """A private folder around Ray's own, which Ray opens to everybody (mode 777), with its sockets. Another
    user can guess the name and make it first. Raises `UserError`."""
    host = socket.gethostname()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_own(folder):
            raise UserError(f"temporary: {folder} on {host} belongs to somebody else; set another folder")
        folder.chmod(0o700)
    except OSError as error:
        raise UserError(f"temporary: {folder} on {host}: {error.strerror}") from None


@dataclass(frozen=True)
class _Node:
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


def _card(folder: Path, rank: int) -> Path:
    return folder / "nodes" / f"{rank:04d}.json"


def _done(folder: Path) -> Path:
    return folder / "done.json"


def _left(folder: Path, rank: int) -> Path:
    return folder / "left" / f"{rank:04d}.json"


# --------------------------------------------------------------------------------------- the head


def _head(node: _Node, command: Callable[[str], Sequence[str]]) -> int:
    folder, place, site = node.folder, node.place, node.site
    for name, value in node.environment.items():  # GcsClient below reads it from here
        if name.startswith("RAY_"):
            os.environ[name] = value
    ip = _own_ip(place.hosts)
    port = _free_ports(ip, site, place.job)
    address = f"{ip}:{port}"
    _write_token(folder / _TOKEN)
    if site.dashboard:
        node.environment.update(provision(node.temporary.parent))
    ray = node.start_ray(
        "--head",
        f"--node-ip-address={ip}",
        f"--port={port}",
        f"--ray-client-server-port={port + 2}",
        f"--dashboard-agent-listen-port={port + 3}",
        f"--temp-dir={node.temporary}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port + 1}",
        f"--include-dashboard={'true' if site.dashboard else 'false'}",
    )
    try:
        if not _wait_for_head(node, ray, address):
            return EXIT_DRAINED
        write_json(folder / "address.json", {"address": address, "port": port})
        if not _wait_for_nodes(node, ray, address):
            return EXIT_DRAINED
        if site.dashboard:
            host = socket.gethostname()
            node.say(f"dashboard: ssh -N -L {port + 1}:127.0.0.1:{port + 1} {host}")
            node.say(f"  then http://127.0.0.1:{port + 1}, with the token in {folder / _TOKEN}")
        return _drive(node, ray, command(address), address)
    finally:
        write_json(_done(folder), {"host": socket.gethostname()})
        kill_with_children(ray.pid)
        ray.wait()
        (folder / _TOKEN).unlink(missing_ok=True)  # it opens no more files
        _wait_for_leaving(node)


def _write_token(path: Path) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def _own_ip(hosts: Sequence[str]) -> str:
    """The address of this node for the others; loopback without others."""
    if len(hosts) == 1:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((hosts[1], 9))  # sends nothing: the kernel only picks the interface
        except OSError as error:
            raise UserError(f"{hosts[1]}: cannot be found from {hosts[0]}: {error}") from None
        return str(probe.getsockname()[0])


def _free_ports(ip: str, site: Site, job: str) -> int:
    """The first of four free ports in a row, from the number of the job on."""
    blocks = site.ports // PORTS_OF_A_JOB
    number = int("".join(filter(str.isdigit, job)) or 0)
    for offset in range(min(blocks, 20)):
        first = site.first_port + (number + offset) % blocks * PORTS_OF_A_JOB
        if all(_is_free(ip, first + i) for i in range(4)):
            return first
    raise UserError(
        f"first_port, ports: on {socket.gethostname()} no four ports in a row are free from "
        f"{site.first_port + number % blocks * PORTS_OF_A_JOB} on; who listens there is shown by `ss -tlnp`"
    )


def _is_free(ip: str, port: int) -> bool:
    for address in {ip, "127.0.0.1"}:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


def _wait_for_head(node: _Node, ray: subprocess.Popen[str], address: str) -> bool:
    """Wait until it answers. False: the job should end. Raises `UserError` if it does not come up."""
    deadline = time.monotonic() + node.site.wait_for_nodes
    while _alive(address) is None:
        if node.signals.any:
            return False
        if ray.poll() is not None or time.monotonic() > deadline:
            why = f"ended with {ray.poll()}" if ray.poll() is not None else "does not answer"
            raise UserError(f"Ray's head on {socket.gethostname()} {why}: {_tail(node)}")
        _cards(node)
        time.sleep(_LOOK_S)
    return True


def _tail(node: _Node) -> str:
    lines = (node.folder / f"ray-{node.place.rank}.log").read_text(errors="replace").strip().splitlines()
    telling = [line.strip() for line in lines if "rror" in line]
    return (telling or lines or ["it printed nothing"])[-1][:300]


def _alive(address: str) -> set[str] | None:
    """The names of the nodes that are up; None if the head does not answer."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # here: Ray takes a second to import

    try:
        found = GcsClient(address=address).get_all_node_info(timeout=5)
    except Exception:  # Ray raises many kinds of errors; all mean: not yet
        return None
    return {info.node_manager_hostname for info in found.values() if info.state == 0}


def _wait_for_nodes(node: _Node, ray: subprocess.Popen[str], address: str) -> bool:
    """Wait until all nodes have joined, or until the site's time is up. Then go on with the nodes that are
    there, or raise `UserError` for too few, or for nodes with other versions. False: the job should end."""
    site, hosts = node.site, node.place.hosts
    deadline = time.monotonic() + site.wait_for_nodes
    while True:
        cards = _cards(node)
        up = len(_alive(address) or ())
        if up >= len(hosts):
            return True
        trouble = [card["trouble"] for card in cards.values() if card and card["trouble"]]
        if trouble and up + len(trouble) >= len(hosts):
            break  # no other node will come
        if node.signals.any:
            return False
        if ray.poll() is not None:
            raise UserError(f"Ray's head on {hosts[0]} ended with {ray.poll()}: {_tail(node)}")
        if time.monotonic() > deadline:
            break
        time.sleep(_LOOK_S)
    text = "; ".join(trouble) or _silence(node, cards, up)
    if up < site.least_nodes:
        raise UserError(f"{text}; {up} of {len(hosts)} nodes are up, least_nodes is {site.least_nodes}")
    node.say(f"{text}; going on with {up} of {len(hosts)} nodes, late ones may still join")
    return True


def _cards(node: _Node) -> dict[int, dict[str, Any] | None]:
    """The facts that each node reported, None so far without any. Raises `UserError` for a node with other
    versions."""
    cards = {rank: read_json(_card(node.folder, rank)) for rank in range(len(node.place.hosts))}
    for card in cards.values():
        if card is not None and card["versions"] != versions():
            raise UserError(_differ(card, {"versions": versions()}, node.place.hosts[0]))
    return cards


def _silence(node: _Node, cards: Mapping[int, Any], up: int) -> str:
    """The message on nodes that did not come and did not say why."""
    hosts = node.place.hosts
    silent = [hosts[rank] for rank, card in cards.items() if card is None]
    missing = silent or [f"{len(hosts) - up} of {', '.join(hosts[1:])}"]
    why = "never reported (is the results folder visible there?)" if silent else "did not join Ray's head"
    return f"{', '.join(missing)}: {why} within {node.site.wait_for_nodes:.0f} s"


def _differ(card: Mapping[str, Any], head_card: Mapping[str, Any], head: str) -> str:
    other, own = card["versions"], head_card["versions"]
    told = ", ".join(
        f"{key} {other.get(key)} (on {head}: {own[key]})" for key in own if own[key] != other.get(key)
    )
    return f"{card['host']} has other versions: {told}; install the same environment on all nodes"


def _drive(node: _Node, ray: subprocess.Popen[str], command: Sequence[str], address: str) -> int:
    """Run the command to any end. Reports nodes that go and come."""
    up, looked = _alive(address) or set(), time.monotonic()
    killed = 0
    while True:
        driver = spawn(command, node.environment)
        asked, late = False, math.inf
        while driver.poll() is None:
            if time.monotonic() - looked > _LOOK_AT_NODES_S:
                now, looked = _alive(address), time.monotonic()
                if now is not None and now != up:
                    _tell_nodes(node, up, now)
                    up = now
            if node.signals.any and not asked:
                driver.terminate()  # it drains: trials checkpoint and stop
                asked = True
            if node.signals.ending and late == math.inf:
                late = time.monotonic() + _patience(node.site)
            if time.monotonic() > late:
                node.say(f"the sweep has not come to rest within {_patience(node.site):.0f} s: ended now")
                _interrupt(driver)
                break
            if ray.poll() is not None:
                end(driver, _DRAIN_S)
                break
            time.sleep(_LOOK_S)
        code = driver.returncode
        if ray.poll() is not None and code != 0:
            node.say(f"Ray's head ended with {ray.poll()} while the sweep was running: {_tail(node)}")
            return LOST_HEAD
        if node.signals.any and (code < 0 or code == EXIT_INTERRUPTED):
            return EXIT_DRAINED
        if code >= 0:
            return code
        killed += 1
        wait = DRIVER_RETRIES.wait(killed)
        if wait is None:
            node.say(f"the driver was killed by signal {-code}, {killed} times by now: given up")
            return 2
        node.say(f"the driver was killed by signal {-code}; it is started again in {wait:.0f} s")
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and not node.signals.any and ray.poll() is None:
            time.sleep(_LOOK_S)
        if node.signals.any:
            return EXIT_DRAINED


def _patience(site: Site) -> float:
    """Seconds in which the sweep may come to rest before the time limit. The job has ``drain`` of them, and
    what is left is for its nodes to clean up and for Slurm to take the requeue: nobody requeues a job whose
    time is up."""
    return site.drain - min(30.0, site.drain / 3)


def _interrupt(driver: subprocess.Popen[str]) -> None:
    """End it at once; it lets go of the sweep's lock."""
    driver.send_signal(signal.SIGINT)
    end(driver, _DRAIN_S)


def _tell_nodes(node: _Node, before: set[str], now: set[str]) -> None:
    for name, what in [*((n, "lost") for n in before - now), *((n, "joined") for n in now - before)]:
        node.say(f"{name}: {what}; {len(now)} of {len(node.place.hosts)} nodes are up")


def _wait_for_leaving(node: _Node) -> None:
    """Give the other nodes time to clean up: once the job ends, Slurm kills their processes."""
    came = [rank for rank in range(1, len(node.place.hosts)) if _card(node.folder, rank).exists()]
    deadline = time.monotonic() + _LEAVE_S
    while time.monotonic() < deadline and not all(_left(node.folder, rank).exists() for rank in came):
        time.sleep(_LOOK_S)


# --------------------------------------------------------------------------------------- the others


def _worker(node: _Node) -> int:
    """A node of the head's. Signals are for the head to answer: its trials here have to checkpoint first."""
    folder, site = node.folder, node.site
    done = _done(folder)
    while (found := read_json(folder / "address.json")) is None:
        if done.exists():
            return 0
        time.sleep(_LOOK_S)
    address = str(found["address"])
    port = int(address.rpartition(":")[2])
    head = read_json(_card(folder, 0))
    if head is not None and head["versions"] != versions():  # the head does not see a late node
        own = {"host": socket.gethostname(), "versions": versions()}
        raise UserError(_differ(own, head, node.place.hosts[0]))
    os.environ |= {name: value for name, value in node.environment.items() if name.startswith("RAY_")}
    lonely_since = None
    while not done.exists():
        ray = node.start_ray(f"--address={address}", f"--dashboard-agent-listen-port={port + 3}")
        while ray.poll() is None and not done.exists():
            time.sleep(_LOOK_S)
        if ray.poll() is None:
            kill_with_children(ray.pid)
            ray.wait()
            break
        # The head took this node for dead (its network was cut, for example), or is itself gone.
        kill_marked(node.environment[MARK])
        if _alive(address) is not None:
            lonely_since = None
            node.say(f"{socket.gethostname()}: Ray ended with {ray.poll()}; joining again")
        elif lonely_since is None:
            lonely_since = time.monotonic()
        elif time.monotonic() - lonely_since > 3 * site.node_failure:
            node.say(f"{socket.gethostname()}: the head at {address} is gone")
            return 1
        time.sleep(2.0)
    return 0


# ------------------------------------------------------------------------------- from an sbatch file


def main() -> NoReturn:
    """``python -m ddsweep.launch.ray_cluster --site FILE --folder DIR -- COMMAND ...`` in every task of a
    Slurm step: COMMAND runs on rank 0, with ``{address}`` in it replaced by that of the cluster."""
    from ddsweep.launch.site import load_site

    parser = argparse.ArgumentParser(prog="python -m ddsweep.launch.ray_cluster", description=main.__doc__)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="shared by the nodes")
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    signals = Signals()
    try:
        place = slurm_place(os.environ)
        site = load_site(asked.site, [f"nodes={len(place.hosts)}", "least_nodes=1"])
        run = asked.folder.resolve() / f"{place.job}.{place.restart}"
        command = [word.replace("{address}", "\0") for word in asked.command]
        code = run_on_cluster(
            site,
            place,
            run,
            lambda address: [word.replace("\0", address) for word in command],
            signals,
            node_limits(os.environ),
            say=lambda text: print(text, flush=True),
        )
    except UserError as error:
        print(f"ddsweep: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code)


if __name__ == "__main__":
    main()
