"""A Ray cluster over the tasks of a job, one a node, and one command run on it.

The task of rank 0 starts the head, waits until it answers, and only then writes its address to a file in
a folder that all nodes share; the others wait for that file, join, and leave when the head says that the
work is done. `run_on_cluster` is called in every task: by the submitted job, and by
``python -m ddsweep.launch.ray_cluster`` in slurm/ray_cluster.sbatch.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ddsweep.errors import ResultsError, UserError
from ddsweep.launch.allocation import NodeLimits, Place, node_limits, slurm_place
from ddsweep.launch.folder import read_json, write_json
from ddsweep.launch.processes import Signals
from ddsweep.launch.ray_head import lead
from ddsweep.launch.ray_node import (
    LOOK_S,
    TOKEN,
    Node,
    alive,
    card_path,
    done_path,
    left_path,
    make_private,
    ray_environment,
    versions_trouble,
)
from ddsweep.launch.site import Site
from ddsweep.machine import limits_trouble, versions
from ddsweep.private import PREFIX, is_own, owned, remove_folder, remove_left
from ddsweep.processes import MARK, kill_marked, kill_with_children
from ddsweep.results.files import is_there

__all__ = ["run_on_cluster"]

_RAY = "ray"
"""Ray's own folder, inside the private one."""


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
    token = folder / TOKEN
    for earlier in range(place.restart):  # left by a SIGKILL on this node
        kill_marked(f"{place.job}.{earlier}.")
        (folder.parent / f"{place.job}.{earlier}" / TOKEN).unlink(missing_ok=True)
    mark = f"{place.job}.{place.restart}.{place.rank}."
    environment = {**os.environ, **ray_environment(site, temporary / _RAY, token), MARK: mark}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    card = {"host": socket.gethostname(), "versions": versions(), "trouble": ""}
    try:
        remove_left(Path(site.temporary))
        make_private(temporary)
        if trouble := limits_trouble(temporary):
            raise UserError(f"{socket.gethostname()}: {trouble}")
        write_json(card_path(folder, place.rank), card)
        log_file = folder / f"ray-{place.rank}.log"
        with owned(temporary), log_file.open("a", encoding="utf-8") as log:
            node = Node(site, place, folder, temporary / _RAY, environment, limits, signals, say, log)
            return lead(node, command) if place.is_head else _worker(node)
    except UserError as error:
        with suppress(ResultsError):  # a full disk may be the trouble
            write_json(card_path(folder, place.rank), {**card, "trouble": str(error)})
        raise
    finally:
        left = kill_marked(mark)
        if left:
            say(f"{socket.gethostname()}: processes that cannot be killed: {left}")
        if is_own(temporary):
            remove_folder(temporary)
        # If the head fails at its start, the others must not wait for its address for ever.
        said = done_path(folder) if place.is_head else left_path(folder, place.rank)
        with suppress(ResultsError):
            write_json(said, {"host": socket.gethostname()})


# --------------------------------------------------------------------------------------- the others


def _worker(node: Node) -> int:
    """A node that serves the head. Only the head reacts to signals, because its trials on this node must
    checkpoint first."""
    folder, site = node.folder, node.site
    done = done_path(folder)
    while (found := read_json(folder / "address.json")) is None:
        if is_there(done):
            return 0
        time.sleep(LOOK_S)
    address = str(found["address"])
    port = int(address.rpartition(":")[2])
    head = read_json(card_path(folder, 0))
    if head is not None and head["versions"] != versions():  # the head does not see a late node
        own = {"host": socket.gethostname(), "versions": versions()}
        raise UserError(versions_trouble(own, head, node.place.hosts[0]))
    os.environ |= {name: value for name, value in node.environment.items() if name.startswith("RAY_")}
    lonely_since = None
    while not is_there(done):
        ray = node.start_ray(f"--address={address}", f"--dashboard-agent-listen-port={port + 3}")
        while ray.poll() is None and not is_there(done):
            time.sleep(LOOK_S)
        if ray.poll() is None:
            kill_with_children(ray.pid)
            ray.wait()
            break
        # The head took this node for dead (its network was cut, for example), or is itself gone.
        kill_marked(node.environment[MARK])
        if alive(address) is not None:
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
