"""The head of a Ray cluster: it starts Ray, waits for the nodes, and runs the command."""

from __future__ import annotations

import math
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ddsweep.dashboards import provision
from ddsweep.errors import EXIT_DRAINED, EXIT_INTERRUPTED, ResultsError, UserError
from ddsweep.launch.folder import read_json, write_json
from ddsweep.launch.processes import end, spawn, time_to_drain
from ddsweep.launch.ray_node import (
    LOOK_S,
    TOKEN,
    Node,
    alive,
    card_path,
    done_path,
    left_path,
    versions_trouble,
)
from ddsweep.launch.site import PORTS_OF_A_JOB, Site
from ddsweep.machine import versions
from ddsweep.private import write_secret
from ddsweep.processes import LOST_RAY_EXIT, kill_with_children
from ddsweep.results.files import is_there
from ddsweep.sweep.retry import RetryPolicy

__all__ = ["LOST_HEAD", "lead"]

LOST_HEAD = 76
"""The exit code of a run whose Ray head died under its command: to be requeued."""

DRIVER_RETRIES = RetryPolicy(4)
"""How often, and when, a command is started again after a signal killed it (for lack of memory, for
example), or after it gave Ray up, which was silent for a while and lives."""

_GAVE_RAY_UP = 77
"""The exit code of such a driver."""

_LOOK_AT_NODES_S = 1.0
_DRAIN_S = 10.0
_LEAVE_S = 15.0


def lead(node: Node, command: Callable[[str], Sequence[str]]) -> int:
    folder, place, site = node.folder, node.place, node.site
    for name, value in node.environment.items():  # GcsClient below reads it from here
        if name.startswith("RAY_"):
            os.environ[name] = value
    ip = _own_ip(place.hosts)
    port = _free_ports(ip, site, place.job)
    address = f"{ip}:{port}"
    (folder / TOKEN).unlink(missing_ok=True)
    write_secret(folder / TOKEN, secrets.token_hex(32))
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
            node.say(f"  then http://127.0.0.1:{port + 1}, with the token in {folder / TOKEN}")
        return _drive(node, ray, command(address), address)
    finally:
        with suppress(ResultsError):  # on a full disk the others see for themselves that the head is gone
            write_json(done_path(folder), {"host": socket.gethostname()})
        kill_with_children(ray.pid)
        ray.wait()
        (folder / TOKEN).unlink(missing_ok=True)  # it opens no more files
        _wait_for_leaving(node)


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


def _wait_for_head(node: Node, ray: subprocess.Popen[str], address: str) -> bool:
    """Wait until it answers. False: the job should end. Raises `UserError` if it does not come up."""
    deadline = time.monotonic() + node.site.wait_for_nodes
    while alive(address) is None:
        if node.signals.any:
            return False
        if ray.poll() is not None or time.monotonic() > deadline:
            why = f"ended with {ray.poll()}" if ray.poll() is not None else "does not answer"
            raise UserError(f"Ray's head on {socket.gethostname()} {why}: {_tail(node)}")
        _cards(node)
        time.sleep(LOOK_S)
    return True


def _tail(node: Node) -> str:
    lines = (node.folder / f"ray-{node.place.rank}.log").read_text(errors="replace").strip().splitlines()
    telling = [line.strip() for line in lines if "rror" in line]
    return (telling or lines or ["it printed nothing"])[-1][:300]


def _wait_for_nodes(node: Node, ray: subprocess.Popen[str], address: str) -> bool:
    """Wait until all nodes have joined, or until the site's time is up. Then go on with the nodes that are
    there, or raise `UserError` for too few, or for nodes with other versions. False: the job should end."""
    site, hosts = node.site, node.place.hosts
    deadline = time.monotonic() + site.wait_for_nodes
    while True:
        cards = _cards(node)
        up = len(alive(address) or ())
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
        time.sleep(LOOK_S)
    text = "; ".join(trouble) or _silence(node, cards, up)
    if up < site.least_nodes:
        raise UserError(f"{text}; {up} of {len(hosts)} nodes are up, least_nodes is {site.least_nodes}")
    node.say(f"{text}; going on with {up} of {len(hosts)} nodes, late ones may still join")
    return True


def _cards(node: Node) -> dict[int, dict[str, Any] | None]:
    """The facts that each node reported, None so far without any. Raises `UserError` for a node with other
    versions."""
    cards = {rank: read_json(card_path(node.folder, rank)) for rank in range(len(node.place.hosts))}
    for card in cards.values():
        if card is not None and card["versions"] != versions():
            raise UserError(versions_trouble(card, {"versions": versions()}, node.place.hosts[0]))
    return cards


def _silence(node: Node, cards: Mapping[int, Any], up: int) -> str:
    """The message on nodes that did not come and did not say why."""
    hosts = node.place.hosts
    silent = [hosts[rank] for rank, card in cards.items() if card is None]
    missing = silent or [f"{len(hosts) - up} of {', '.join(hosts[1:])}"]
    why = "never reported (is the results folder visible there?)" if silent else "did not join Ray's head"
    return f"{', '.join(missing)}: {why} within {node.site.wait_for_nodes:.0f} s"


def _drive(node: Node, ray: subprocess.Popen[str], command: Sequence[str], address: str) -> int:
    """Run the command to any end. Reports nodes that go and come."""
    up, looked = alive(address) or set(), time.monotonic()
    starts = 0
    while True:
        driver = spawn(command, {**node.environment, LOST_RAY_EXIT: str(_GAVE_RAY_UP)})
        asked, late = False, math.inf
        while driver.poll() is None:
            if time.monotonic() - looked > _LOOK_AT_NODES_S:
                now, looked = alive(address), time.monotonic()
                if now is not None and now != up:
                    _tell_nodes(node, up, now)
                    up = now
            if node.signals.any and not asked:
                driver.terminate()  # it drains: trials checkpoint and stop
                asked = True
            if node.signals.ending and late == math.inf:
                late = time.monotonic() + time_to_drain(node.site.drain)
            if time.monotonic() > late:
                within = time_to_drain(node.site.drain)
                node.say(f"the sweep has not come to rest within {within:.0f} s: ended now")
                _interrupt(driver)
                break
            if ray.poll() is not None:
                end(driver, _DRAIN_S)
                break
            time.sleep(LOOK_S)
        code = driver.returncode
        if ray.poll() is not None and code != 0:
            node.say(f"Ray's head ended with {ray.poll()} while the sweep was running: {_tail(node)}")
            return LOST_HEAD
        if node.signals.any and (code < 0 or code in (EXIT_INTERRUPTED, _GAVE_RAY_UP)):
            return EXIT_DRAINED
        if code >= 0 and code != _GAVE_RAY_UP:
            return code
        starts += 1
        wait = DRIVER_RETRIES.wait(starts)
        how = f"was killed by signal {-code}" if code < 0 else "gave Ray up, which was silent for a while"
        if wait is None:
            node.say(f"the driver {how}; it was started {starts} times by now: given up")
            return 2 if code < 0 else EXIT_DRAINED
        node.say(f"the driver {how}; it is started again in {wait:.0f} s")
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and not node.signals.any and ray.poll() is None:
            time.sleep(LOOK_S)
        if node.signals.any:
            return EXIT_DRAINED


def _interrupt(driver: subprocess.Popen[str]) -> None:
    """End it at once; it lets go of the sweep's lock."""
    driver.send_signal(signal.SIGINT)
    end(driver, _DRAIN_S)


def _tell_nodes(node: Node, before: set[str], now: set[str]) -> None:
    for name, what in [*((n, "lost") for n in before - now), *((n, "joined") for n in now - before)]:
        node.say(f"{name}: {what}; {len(now)} of {len(node.place.hosts)} nodes are up")


def _wait_for_leaving(node: Node) -> None:
    """Give the other nodes time to clean up: once the job ends, Slurm kills their processes."""
    came = [rank for rank in range(1, len(node.place.hosts)) if is_there(card_path(node.folder, rank))]
    deadline = time.monotonic() + _LEAVE_S
    while time.monotonic() < deadline and not all(is_there(left_path(node.folder, rank)) for rank in came):
        time.sleep(LOOK_S)
