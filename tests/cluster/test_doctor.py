"""`ddsweep doctor` with a Slurm: its findings on a healthy site, and on each kind of problem."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.machines import REPOSITORY, Lab

SITE = """
scheduler: slurm
partition: {partition}
account: {account}
time: 10m
nodes: {nodes}
cpus_per_node: 2
gpus_per_node: 2
gpu_syntax: gres
device: cpu
first_port: 20000
ports: 100
"""

Examine = Callable[..., tuple[int, dict[str, list[str]]]]


@pytest.fixture
def examine(lab: Lab, shared: Path) -> Examine:
    """``examine(*arguments, **keys)``: exit code, and for each name the lines on it. The queue and the
    shared folder are then as they were."""

    def run(
        *arguments: object,
        partition: str = "main",
        account: str | None = None,
        nodes: int = 3,
        more: str = "",
        results: Path = shared / "results",
    ) -> tuple[int, dict[str, list[str]]]:
        file = shared / "site.yaml"
        file.write_text(SITE.format(partition=partition, account=account or "null", nodes=nodes) + more)
        before = sorted(shared.rglob("*")), lab.jobs()
        said = lab.ddsweep("doctor", "--site", file, "--results", results, *arguments)
        assert said.stderr == ""
        assert (sorted(shared.rglob("*")), lab.jobs()) == before
        lines: dict[str, list[str]] = {}
        for line in said.stdout.splitlines():
            state, _, rest = line.partition(" ")
            lines.setdefault(rest.strip().partition(":")[0], []).append(line)
            assert state in ("ok", "warn", "FAIL")
        assert said.returncode == any(line.startswith("FAIL") for found in lines.values() for line in found)
        return said.returncode, lines

    return run


def test_a_healthy_site(examine: Examine, lab: Lab, tmp_path: Path) -> None:
    data = lab.shared / "data"
    try:
        for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
            (data / "MNIST/raw" / name).parent.mkdir(parents=True, exist_ok=True)
            (data / "MNIST/raw" / name).touch()
        (data / "MNIST/raw/t10k-labels-idx1-ubyte").touch()
        code, lines = examine("--data-root", data, "sweeps/quickstart.yaml")
    finally:
        subprocess.run(["rm", "-rf", data], check=True)
    assert code == 0, lines
    assert {name: len(found) for name, found in lines.items()} == {
        "packages": 1,
        "results": 2,  # here, and on the nodes
        "data": 2,
        **dict.fromkeys(("slurm", "accounting", "partition", "request", "nodes", "versions", "token"), 1),
        **dict.fromkeys(("temporary", "ports", "gpus", "shared memory", "open files", "clocks"), 1),
    }
    assert lines["nodes"] == ["ok   nodes: node1, node2, node3 answered"]
    assert "to start at" in lines["request"][0]
    assert lines["gpus"] == ["ok   gpus: 2 on 3 nodes, unused: device is cpu"]


def test_what_slurm_refuses(examine: Examine, lab: Lab) -> None:
    code, lines = examine(partition="nosuch")
    assert code == 1
    assert "'nosuch' is not one of main, low, high, closed; set partition" in lines["partition"][0]
    assert lines["nodes"] == ["warn nodes: not looked at; put the above right first"]
    assert "'closed' is down" in examine(partition="closed")[1]["partition"][0]
    assert "Slurm refuses 9 nodes for 10 min" in examine(nodes=9)[1]["request"][0]
    if lab.accounting == "db":
        assert "Invalid account" in examine(account="nosuch")[1]["request"][0]


def test_a_job_that_waits(examine: Examine, lab: Lab) -> None:
    other = lab.sbatch("-w", "node1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    lab.wait(lambda: lab.jobs().get(other) == "RUNNING", "a node is taken")
    code, lines = examine("--patience", "2")
    assert code == 1
    assert "still waits (Resources) and was cancelled; wait longer with --patience" in lines["nodes"][0]
    assert list(lab.jobs()) == [other]


def test_nodes_that_are_wrong_in_every_way(
    examine: Examine, lab: Lab, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # node2 has another Ray, node3 no Python; neither results nor data are seen by any node.
    folder = "/tmp/other/ray-2.59.0.dist-info"
    text = "Metadata-Version: 2.1\\nName: ray\\nVersion: 2.59.0\\n"
    lab.exec("node2", "sh", "-c", f"mkdir -p {folder}; printf '{text}' > {folder}/METADATA")
    monkeypatch.setitem(lab.environment, "PYTHONPATH", f"/tmp/other:{REPOSITORY}")
    (tmp_path / "data/birds").mkdir(parents=True)
    (tmp_path / "s.yaml").write_text(
        "name: s\nbase: {dataset: {source: folder, path: birds, shape: [3, 8, 8], classes: 2}}\n"
    )
    more = f"setup: [{json.dumps('test $(hostname) != node3 || { echo no python here >&2; exit 1; }')}]\n"
    more += "temporary: /var/none\n"
    try:
        code, lines = examine(
            *(tmp_path / "s.yaml", "--data-root", tmp_path / "data"), results=tmp_path / "results", more=more
        )
    finally:
        lab.exec("node2", "rm", "-r", "/tmp/other")
    assert code == 1
    bad = {name: found[-1] for name, found in lines.items() if found[-1].startswith("FAIL")}
    assert set(bad) == {"nodes", "versions", "results", "temporary", "data"}
    assert "2 of 3 answered; node3: no python here" in bad["nodes"]
    assert "node2: ray 2.59.0 (here " in bad["versions"]
    assert f"node1, node2: {tmp_path / 'results'} is another folder there, or not" in bad["results"]
    assert "node1, node2: /var/none: No such file or directory" in bad["temporary"]
    assert f"node1, node2: birds: {tmp_path / 'data/birds'}; set --data-root" in bad["data"]
    assert not (tmp_path / "results").exists()
