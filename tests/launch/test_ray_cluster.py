"""What a node may use, and a head that cannot begin. The cluster itself is tested in tests/cluster."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddsweep.errors import DiskFullError, UserError
from ddsweep.launch import ray_cluster, ray_head, ray_node
from ddsweep.launch.allocation import NodeLimits, Place, node_limits, slurm_place
from ddsweep.launch.processes import Signals, spawn
from ddsweep.launch.ray_cluster import run_on_cluster
from ddsweep.launch.site import Site

GIB = 2**30


@pytest.mark.parametrize(
    ("environment", "cpus", "gpus", "memory"),
    [
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_CPUS_ON_NODE": "16"}, 4, 0, None),
        ({"SLURM_CPUS_ON_NODE": "16", "SLURM_MEM_PER_NODE": "2048"}, 16, 0, 2 * GIB),
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_MEM_PER_CPU": "1024"}, 4, 0, 4 * GIB),
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_MEM_PER_NODE": "0"}, 4, 0, None),
        ({"SLURM_CPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,3", "SLURM_GPUS_ON_NODE": "4"}, 4, 2, None),
        ({"SLURM_CPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "4"}, 4, 0, None),
        ({"SLURM_CPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 4, 0, None),
        (
            {"SLURM_CPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "2"},
            4,
            2,
            None,
        ),
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_TRES_PER_TASK": "cpu=4,gres/gpu:a100=2"}, 4, 2, None),
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:3"}, 4, 3, None),
    ],
)
def test_limits_are_those_of_the_allocation(
    environment: dict[str, str], cpus: int, gpus: int, memory: int | None
) -> None:
    assert node_limits(environment) == NodeLimits(cpus, gpus, memory)


def test_limits_without_slurm_are_those_asked_for() -> None:
    assert node_limits({}, 3) == NodeLimits(3, 0, None)


def test_outside_of_a_job_there_is_no_place() -> None:
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST is not set"):
        slurm_place({})


@pytest.fixture
def signals(handlers: None) -> Signals:
    return Signals()


def head(tmp_path: Path, signals: Signals, **keys: object) -> int:
    site = Site.model_validate({"scheduler": "local", "cpus_per_node": 1, **keys})
    place = Place("4711", 0, (socket.gethostname(),), 0)
    return run_on_cluster(
        site, place, tmp_path / "run", lambda address: ["true"], signals, NodeLimits(1, 0, None)
    )


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = Path(f"/tmp/t{os.getpid()}")
    path.mkdir()
    yield path
    for made in path.iterdir():
        made.rmdir()
    path.rmdir()


def test_a_head_without_ports_says_so_and_sets_the_others_free(
    tmp_path: Path, short: Path, signals: Signals
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"no four ports in a row are free from {first} on"):
            head(tmp_path, signals, first_port=first, ports=10, temporary=str(short))
    assert (tmp_path / "run" / "done.json").exists(), "the other nodes wait for this or an address"
    assert list(short.iterdir()) == []
    assert not (tmp_path / "run" / "token").exists()


def test_a_full_disk_keeps_no_head_from_ending(
    tmp_path: Path, short: Path, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is ended, its token goes, and the code of the run is that of the run."""
    started: list[subprocess.Popen[str]] = []

    def start(node: ray_node.Node, *options: str) -> subprocess.Popen[str]:
        started.append(spawn([sys.executable, "-c", "import time; time.sleep(600)"], os.environ))
        return started[0]

    def full(path: Path, content: object) -> None:
        raise DiskFullError(f"{path}: no space left")

    monkeypatch.setattr(ray_node.Node, "start_ray", start)
    monkeypatch.setattr(ray_head, "_wait_for_head", lambda *arguments: False)
    for module in (ray_head, ray_cluster):
        monkeypatch.setattr(module, "write_json", full, raising=True)
    monkeypatch.setattr(ray_cluster, "card_path", lambda folder, rank: folder / "card.json")
    with pytest.raises(DiskFullError, match=r"card\.json"):  # before anything was started
        head(tmp_path, signals, temporary=str(short), dashboard=False)
    assert started == []
    monkeypatch.setattr(
        ray_cluster, "write_json", lambda path, content: "done" in path.name and full(path, 0)
    )
    assert head(tmp_path, signals, temporary=str(short), dashboard=False) == 75
    assert started[0].poll() is not None and not (tmp_path / "run" / "token").exists()
    assert list(short.iterdir()) == []


@pytest.mark.parametrize("what", ["a link", "a file"])
def test_a_temporary_folder_of_somebody_else_is_not_used(
    tmp_path: Path, short: Path, signals: Signals, what: str
) -> None:
    there = short / "dds4711"
    if what == "a link":
        (short / "other").mkdir(mode=0o700)
        there.symlink_to(short / "other")
    else:
        there.touch()
    with pytest.raises(UserError, match=f"^temporary: {there} on "):
        head(tmp_path, signals, temporary=str(short))
    assert there.exists(), "and not removed"
    assert (tmp_path / "run" / "done.json").exists()
    there.unlink()


DRIVER = """
import os, pathlib, sys
starts = pathlib.Path(sys.argv[1])
starts.write_text((starts.read_text() if starts.exists() else "") + "x")
first = os.environ["DDSWEEP_LOST_RAY_EXIT"] if sys.argv[2] == "gave Ray up" else 75
sys.exit(int(first) if len(starts.read_text()) == 1 else 2)
"""

HEAD = """
import pathlib, socket, sys
from ddsweep.launch.allocation import NodeLimits, Place
from ddsweep.launch.processes import Signals
from ddsweep.launch.ray_cluster import run_on_cluster
from ddsweep.launch.site import Site

folder, driver, what = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
keys = {"scheduler": "local", "cpus_per_node": 1, "dashboard": False, "object_store": 0.1}
sys.exit(
    run_on_cluster(
        Site.model_validate(keys), Place("4711", 0, (socket.gethostname(),), 0), folder / "run",
        lambda address: [sys.executable, "-c", driver, str(folder / "starts"), what],
        Signals(), NodeLimits(1, 0, None),
    )
)
"""
"""In a process of its own, as a head is: Ray keeps the token of the first cluster to which it speaks."""


@pytest.mark.ray
@pytest.mark.parametrize("what", ["gave Ray up", pytest.param("drained", marks=pytest.mark.slow)])
def test_a_driver_that_gave_ray_up_is_started_again_and_one_that_drained_is_not(
    tmp_path: Path, what: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HEAD, str(tmp_path), DRIVER, what],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    again = what == "gave Ray up"
    code, starts = (2, "xx") if again else (75, "x")
    assert (done.returncode, (tmp_path / "starts").read_text()) == (code, starts), done.stderr
    told = "the driver gave Ray up, which was silent for a while; it is started again in"
    assert (told in done.stdout + done.stderr) is again
