"""What a cluster refuses, or what is wrong with it: one message, exit code 1, and nothing left behind.

What needs no Slurm is in tests/launch/test_bad_input.py.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddsweep.errors import UserError
from ddsweep.launch.folder import read_json, write_json
from ddsweep.launch.watch import latest, wait_for
from ddsweep.results.layout import SweepDirectory
from tests.cluster.machines import REPOSITORY, Lab

SITE = """
scheduler: slurm
partition: main
time: 10m
nodes: 2
least_nodes: 2
cpus_per_node: 2
gpus_per_node: 2
gpu_syntax: gres
memory_per_node: 3
device: cpu
poll: 0.5
wait_for_nodes: 120
requeues: 0
"""

Refuse = Callable[..., str]


@pytest.fixture
def refuse(lab: Lab, shared: Path) -> Refuse:
    """``refuse(*arguments, **keys of the site)``: the message with which a launch with ``--wait`` ends. The
    queue and the nodes are then as they were before."""

    def on(node: str) -> set[str]:
        files = lab.exec(node, "ls", "-A", "/tmp").stdout.split()
        return {command for _, command in lab.processes(node)} | {f for f in files if f.startswith("dds")}

    def run(*arguments: object, results: Path = shared / "results", **keys: object) -> str:
        file = shared / "site.yaml"
        lines = [line for line in SITE.splitlines() if line.partition(":")[0] not in keys]
        file.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in keys.items())]))
        before = [on(node) for node in lab.nodes]
        said = lab.ddsweep(
            *("launch", "sweeps/quickstart.yaml", "--site", file, "--results", results, "--wait"), *arguments
        )
        assert said.returncode == 1, said.stdout + said.stderr
        assert re.fullmatch(r"ddsweep: .*\n", said.stderr), "one line"
        lab.wait(lambda: not lab.jobs(), "no job is in the queue")
        lab.wait(lambda: [on(node) for node in lab.nodes] == before, "nothing is left on the nodes")
        return said.stderr

    return run


@pytest.fixture
def occupied(lab: Lab, shared: Path) -> Iterator[None]:
    """Somebody on node1 listens on ports 20000 to 20099 until the end of the test."""
    over = shared / "over"
    script = (
        "import pathlib, socket, time\n"
        "kept = [socket.create_server(('', port)) for port in range(20000, 20100)]\n"
        "print('ready')\n"
        f"while not pathlib.Path('{over}').exists(): time.sleep(0.1)"
    )
    process = lab.start("node1", sys.executable, "-uc", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield
    over.touch()
    process.communicate()


# ------------------------------------------------------------------------ refused before it is a job


@pytest.mark.parametrize("mode", ["cluster", "array"])
def test_a_partition_that_is_not_there(refuse: Refuse, shared: Path, mode: str) -> None:
    said = refuse("--mode", mode, partition="nosuch")
    assert "partition: 'nosuch' is not one of main, low, high, closed" in said
    assert not (shared / "results").exists()


def test_a_partition_that_is_down(refuse: Refuse, shared: Path) -> None:
    assert "partition: 'closed' is down: jobs would wait for ever" in refuse(partition="closed")
    assert not (shared / "results").exists()


@pytest.mark.parametrize("mode", ["cluster", "array"])
def test_an_account_that_is_refused(refuse: Refuse, shared: Path, lab: Lab, mode: str) -> None:
    if lab.accounting != "db":
        pytest.skip("only Slurm's database knows who may submit")
    said = refuse("--mode", mode, account="nosuch")
    assert "Slurm refused the job" in said
    assert "Invalid account" in said
    assert "set account in the site file (now nosuch)" in said
    assert not (shared / "results").exists()


def test_more_than_there_is(refuse: Refuse, shared: Path) -> None:
    assert "nodes: 9; partition 'main' has 3" in refuse(nodes=9)
    said = refuse(memory_per_node=4000)
    assert "Slurm refused the job" in said
    assert "ask for fewer nodes, cpus_per_node, gpus_per_node or memory_per_node" in said
    assert not (shared / "results").exists()


def test_an_array_of_which_the_end_is_refused_leaves_no_beginning(refuse: Refuse, shared: Path) -> None:
    said = refuse("--mode", "array", array_tasks=5000)
    assert "array_tasks: 5000; this Slurm takes at most 1000 in an array" in said
    assert not (shared / "results").exists()


# ----------------------------------------------------------------------------------- refused by Slurm


def test_a_job_that_only_waits_is_given_up(lab: Lab, shared: Path) -> None:
    other = lab.sbatch("-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    lab.wait(lambda: lab.jobs().get(other) == "RUNNING", "all nodes are taken")
    (shared / "site.yaml").write_text(SITE)
    results = shared / "results"
    said = lab.ddsweep(
        *("launch", "sweeps/quickstart.yaml", "--site", shared / "site.yaml", "--results", results)
    )
    assert said.returncode == 0, said.stderr
    folder = latest(SweepDirectory(results / "quickstart"))
    record = read_json(folder.record)
    assert record is not None
    record["site"]["longest_pending"] = 0.05  # a file takes whole minutes
    write_json(folder.record, record)
    told: list[str] = []
    with pytest.raises(UserError, match=r"nothing started \(\d+: (Resources|Priority)\)"):
        wait_for(folder, told.append)
    assert any("pending" in line for line in told)
    lab.wait(lambda: list(lab.jobs()) == [other], "it is cancelled")
    assert list(results.iterdir()) == []


# ----------------------------------------------------------------------------------- wrong on the nodes


@pytest.mark.parametrize("mode", ["cluster", "array"])
def test_a_results_folder_that_no_node_sees(refuse: Refuse, tmp_path: Path, mode: str) -> None:
    # Their /tmp is their own.
    said = refuse("--mode", mode, results=tmp_path / "results")
    assert f"is {tmp_path / 'results'} the same folder there as here? ddsweep doctor --site" in said
    assert re.search(r"node\S* wrote no log \(job ", said)
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.slow
def test_a_results_folder_that_one_node_does_not_see(refuse: Refuse, lab: Lab, shared: Path) -> None:
    results = shared / "results"
    results.mkdir()
    lab.exec("node2", "mount", "-t", "tmpfs", "none", results)
    try:
        said = refuse(wait_for_nodes=45)
    finally:
        lab.exec("node2", "umount", results)
    assert "node2: never reported (is the results folder visible there?) within 45 s" in said
    assert "least_nodes is 2" in said


def test_a_temporary_folder_that_cannot_be_made(refuse: Refuse) -> None:
    assert re.search(r"temporary: /proc/none/dds\d+ on node1: No such file", refuse(temporary="/proc/none"))


def test_a_temporary_folder_of_somebody_else(refuse: Refuse, lab: Lab) -> None:
    # Another user who knows the next job number can be there first.
    number = int(lab.sbatch("-o", "/dev/null", "--wrap", "true")) + 1
    lab.wait(lambda: not lab.jobs(), "that was the last number")
    folder = f"/tmp/dds{number}"
    lab.exec("node1", "sh", "-c", f"mkdir -m 777 {folder}; touch {folder}/of-nobody", user="nobody")
    try:
        said = refuse(nodes=1, least_nodes=1)
        assert f"temporary: {folder} on node1 belongs to somebody else; set another folder" in said
        assert lab.exec("node1", "ls", folder).stdout == "of-nobody\n"
    finally:
        lab.exec("node1", "rm", "-r", folder)


@pytest.mark.slow
def test_a_temporary_folder_that_one_node_cannot_make(refuse: Refuse, lab: Lab) -> None:
    lab.exec("node2", "touch", "/tmp/file")
    try:
        said = refuse(temporary="/tmp/file/below")
    finally:
        lab.exec("node2", "rm", "/tmp/file")
        lab.exec("node1", "rm", "-r", "/tmp/file")
    assert re.search(
        r"temporary: /tmp/file/below/dds\d+ on node2: Not a directory; 1 of 2 nodes are up", said
    )


@pytest.mark.usefixtures("occupied")
def test_ports_that_are_taken(refuse: Refuse) -> None:
    said = refuse(ports=100)
    assert re.search(r"on node1 no four ports in a row are free from 20\d\d0 on; .* `ss -tlnp`", said)


def test_a_node_with_another_version(refuse: Refuse, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    # The version of Ray, by the metadata of its installation there, which is found before the one of all
    # nodes.
    folder = "/tmp/other/ray-2.59.0.dist-info"
    text = "Metadata-Version: 2.1\\nName: ray\\nVersion: 2.59.0\\n"
    lab.exec("node2", "sh", "-c", f"mkdir -p {folder}; printf '{text}' > {folder}/METADATA")
    monkeypatch.setitem(lab.environment, "PYTHONPATH", f"/tmp/other:{REPOSITORY}")
    try:
        said = refuse()
    finally:
        lab.exec("node2", "rm", "-r", "/tmp/other")
    assert re.search(r"node2 has other versions: ray 2\.59\.0 \(on node1: \S+\); install the same", said)
