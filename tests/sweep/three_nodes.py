"""A Ray of three nodes on this machine, each with one CPU and two pretended GPUs: where shards go, what they
see, and whose data they read. Prints JSON.

For a process of its own: Ray reads its token from the environment when it is imported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddsweep.catalog import DATASETS
from ddsweep.data.load import load_splits
from ddsweep.errors import UserError
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import expand, load_sweep
from ddsweep.sweep.drain import Drain
from ddsweep.sweep.placement import check_gpus_seen, check_placement
from ddsweep.sweep.session import RaySession, ray_session
from ddsweep.sweep.shards import EvalShards, Listener, get_splits, put_splits


def where_shards_are(session: RaySession, evaluate: str, folder: Path, after: Any = None) -> list[str]:
    """The node of each shard in the order of the shards, also once ``after`` was called."""
    file = folder / "sweep.yaml"
    file.write_text(
        "name: placed\nbase: {dataset: digits, images_per_class: 1, inner_steps: 1}\n"
        f"evaluate: {evaluate}\nresources: {{device: cpu}}\n"
    )
    sweep = load_sweep(file)
    placement = check_placement(sweep, expand(sweep, lambda name: DATASETS[str(name)]).trials, session)
    shards = EvalShards(
        *(sweep, placement, {}, SweepDirectory(folder / "results")),
        Listener(on_state=lambda trial_id, state: None),
        earlier={},
        known=KnownParts(),
    )
    shards.start()
    nodes = node_of_each(len(placement.nodes))
    if after is not None:
        after()
        nodes += node_of_each(len(placement.nodes))
    shards.close()
    return nodes


def node_of_each(shards: int) -> list[str]:
    """Asked again until a shard that died is there anew."""
    found, deadline = [], time.monotonic() + 600
    for shard in range(shards):
        while True:
            try:
                actor = ray.get_actor(f"eval-placed-{shard}")
                asked = actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
                found.append(ray.get(asked, timeout=600))
                break
            except (ValueError, ray.exceptions.RayActorError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
    return found


def seen(granted: float) -> dict[str, Any]:
    """In a worker: what it sees, and what `check_gpus_seen` says of that and of other environments."""
    key, said = "CUDA_VISIBLE_DEVICES", {}
    own = os.environ[key]
    for case, value in {"own": own, "all": "0,1", "none": "", "other": "7", "unset": None}.items():
        os.environ.pop(key)
        if value is not None:
            os.environ[key] = value
        try:
            check_gpus_seen(granted, "trial t")
            said[case] = "fine"
        except UserError as error:
            said[case] = str(error)
        os.environ[key] = own
    return {"visible": own, "said": said}


def data_of(shared: Any) -> dict[str, Any]:
    """In a worker: whether the training images are those in the object store of its node."""
    images = get_splits(shared).train_images
    array = ray.get(shared.arrays)["train_images"]
    address, mapped = images.data_ptr(), "nowhere"
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            mapped = line.split(maxsplit=5)[-1] if "/" in line else "private"
    return {
        **{"owndata": array.flags.owndata, "writeable": array.flags.writeable},
        **{"same": address == array.__array_interface__["data"][0], "mapped": mapped},
        "sum": int(images.sum()),
    }


def main(folder: Path, with_shards: bool) -> None:
    # Ray writes the address of a cluster below this folder, which it takes for granted.
    os.environ["RAY_TMPDIR"] = str(folder)
    (folder / "ray").mkdir()
    cluster, found = Cluster(), {}
    own = {"num_cpus": 1, "num_gpus": 2, "include_dashboard": False, "temp_dir": str(folder)}
    try:
        nodes = [cluster.add_node(**own) for _ in range(3)]
        where = {"address": cluster.address, "cpus": None, "gpus": None, "dashboard": False}
        with Drain() as drain, ray_session(drain, job="placed", **where) as session:
            found["nodes"] = [node.name for node in session.nodes]
            found["most"] = [session.cpus, session.gpus]
            if with_shards:
                found["on GPUs"] = where_shards_are(session, "{gpus: 0.1, shards: 4}", folder)
            for granted in (0.5, 2.0):
                worker = ray.remote(seen).options(num_cpus=0, num_gpus=granted)
                found[f"granted {granted:g}"] = ray.get(worker.remote(granted), timeout=600)
            shared = put_splits(load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0))
            there = NodeAffinitySchedulingStrategy(session.nodes[1].name, soft=False)
            read = ray.remote(data_of).options(num_cpus=0, scheduling_strategy=there)
            found["data"] = ray.get([read.remote(shared) for _ in range(2)], timeout=600)
            if not with_shards:
                print(json.dumps(found))
                return
            by_name = {node.node_id: node for node in nodes}
            lost = by_name[next(node.name for node in session.nodes if node.name != nodes[0].node_id)]
            found["lost"] = lost.node_id
            found["without GPUs"] = where_shards_are(session, "{}", folder, lambda: cluster.remove_node(lost))
    finally:
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="dds-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        main(Path(folder), with_shards=sys.argv[1:] == ["shards"])
