"""`ddsweep doctor` on this machine, and its findings from facts of nodes. Real nodes are in tests/cluster."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ddsweep import machine
from ddsweep.launch import doctor, doctor_job, probe
from ddsweep.launch.doctor_job import Answers
from ddsweep.launch.doctor_nodes import (
    Finding,
    check_clocks,
    check_data,
    check_gpus,
    check_open_files,
    check_ports,
    check_reported,
    check_results,
    check_same_versions,
    check_shared_memory,
    check_temporary,
    check_token,
)
from ddsweep.launch.probe import Facts, Request
from ddsweep.launch.site import Site
from ddsweep.machine import versions
from ddsweep.spec import load_sweep
from tests.conftest import Ask

SITE = Site(scheduler="slurm", cpus_per_node=2, nodes=2, gpus_per_node=2, first_port=20000, ports=20)
HERE = {"ddsweep": "1", "ray": "2"}

Examined = Callable[..., tuple[int, list[str]]]


def facts(host: str = "a", **changes: object) -> Facts:
    """The facts of a healthy node."""
    well = Facts(
        host=host,
        versions=HERE,
        cpus=2,
        gpus=2,
        visible="0,1",
        torch_gpus=2,
        torch_trouble="",
        shared_trouble="",
        token_trouble="",
        temporary_trouble="",
        temporary_free=10**11,
        taken_ports=(),
        shared_memory=10**10,
        open_files=1024,
        missing={},
        clock=1000.0,
    )
    return replace(well, **changes)  # type: ignore[arg-type]


@pytest.fixture
def examined(tmp_path: Path, ask: Ask) -> Examined:
    """``examined(*arguments)``: exit code and lines of ``ddsweep doctor`` in an empty folder, untouched."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = ask("doctor", *arguments)
        assert (err, "\x1b" in out) == ("", False)
        assert sorted(tmp_path.rglob("*")) == before
        return code, out.splitlines()

    return run


# ------------------------------------------------------------------------------------- this machine


def test_this_machine_is_well(examined: Examined) -> None:
    code, lines = examined()
    assert code == 0
    assert [re.split(r" +|:", line)[:2] for line in lines] == [
        ["ok", "packages"],
        ["ok", "results"],
        ["ok", "token"],
        ["ok", "temporary"],
        ["ok", "gpus"],
        [lines[5].split()[0], "shared"],  # it has as much as it has
        ["ok", "open"],
        ["warn", "data"],
    ]
    assert versions()["ray"] in lines[0]


def test_a_folder_that_cannot_be_written(examined: Examined) -> None:
    code, lines = examined("--results", "/proc/none")
    assert code == 1
    assert [line for line in lines if line.startswith("FAIL")] == [lines[1]]
    assert "results: /proc/none: cannot write" in lines[1]
    assert "choose another folder with --results" in lines[1]


def test_data_of_a_sweep(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: s\nbase: {dataset: digits}\n")
    assert examined("s.yaml")[1][-1] == "ok   data: s needs digits: there"
    (tmp_path / "s.yaml").write_text("name: s\ngrid: {dataset: [mnist, digits]}\n")
    code, lines = examined("s.yaml", "--data-root", tmp_path)
    assert code == 1
    assert re.match(r"FAIL data: mnist: MNIST/raw/\S+; ddsweep data list", lines[-1])
    code, lines = examined("--data-root", tmp_path / "none")
    assert (code, lines[-1]) == (
        1,
        f"FAIL data: {tmp_path}/none is not a folder; set --data-root or DDSWEEP_DATA",
    )


def test_data_of_a_sweep_are_found_wherever_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "name: s\n"
        "points:\n  - {dataset: usps}\n  - {dataset: mnist}\n"
        "  - {dataset: {source: folder, path: birds, shape: [3, 8, 8], classes: 2}}\n"
    )
    needed = doctor.data_of(load_sweep(tmp_path / "s.yaml"), None)
    assert needed == ("usps", "mnist", "folder:birds")
    missing = machine.missing_data(needed, tmp_path)
    assert list(missing) == ["usps", "mnist", "birds"]
    (tmp_path / "birds").mkdir()
    assert list(machine.missing_data(needed, tmp_path)) == ["usps", "mnist"]


@pytest.mark.parametrize("mapping", ["{images: x.npz}", "{source: digits, labels: x}", "{path: 5}"])
def test_a_mapping_of_data_that_is_wrong_is_told(examined: Examined, tmp_path: Path, mapping: str) -> None:
    (tmp_path / "s.yaml").write_text(f"name: s\nbase: {{dataset: {mapping}}}\n")
    code, lines = examined("s.yaml")
    assert code == 1 and lines[-1].startswith("FAIL data: ") and "source" in lines[-1]


def test_a_site_without_slurm_and_a_port(examined: Examined, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as listening:
        port = min(listening.getsockname()[1], 65526)
        file = tmp_path / "site.yaml"
        file.write_text(f"scheduler: local\ncpus_per_node: 1\nfirst_port: {port}\nports: 10\n")
        code, lines = examined("--site", file)
        assert code == 1
        assert f"no four ports in a row are free from {port} to {port + 9}" in "".join(lines)
    code, lines = examined("--site", file)
    assert code == 0
    assert any(f"ports: {port} to {port + 9}: all free" in line for line in lines)


def test_without_slurm_the_nodes_are_not_looked_at(
    examined: Examined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.yaml").write_text("scheduler: slurm\ncpus_per_node: 1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, lines = examined("--site", "site.yaml")
    assert code == 1
    assert lines[-2].startswith(
        "FAIL slurm: no such command: sbatch, srun, squeue, scancel, scontrol, sinfo;"
    )
    assert lines[-1] == "warn nodes: not looked at; put the above right first"


# --------------------------------------------------------------------------- looking at one machine


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "probe"
    folder.mkdir(parents=True)
    (folder / machine.NONCE).write_text("secret")
    (folder / machine.TOKEN).touch(0o600)
    return folder


def test_looking_at_a_machine(shared: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = probe.look(Request(str(shared), "secret", str(tmp_path), 0, 0, None, ("digits", "mnist")))
    assert (found.host, found.versions) == (socket.gethostname(), versions())
    assert (found.shared_trouble, found.token_trouble, found.temporary_trouble) == ("", "", "")
    assert list(found.missing) == ["mnist"]
    assert sorted(tmp_path.rglob("*")) == before
    assert Facts.read(json.dumps(asdict(found))) == found


def test_the_folder_must_be_the_same(shared: Path) -> None:
    assert machine.shared_trouble(shared, "secret") == ""
    assert "holds something else there" in machine.shared_trouble(shared, "other")
    assert "is another folder there, or not there" in machine.shared_trouble(shared / "none", "secret")


def test_files_must_be_written_as_results_are(shared: Path) -> None:
    assert machine.folder_trouble(shared) == ""
    assert "a file is in the way" in machine.folder_trouble(shared / machine.NONCE)
    assert sorted(path.name for path in shared.iterdir()) == [machine.NONCE, machine.TOKEN]


def test_a_lock_that_lets_two_in_is_seen(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a file system without locks.
    monkeypatch.setattr(machine.fcntl, "flock", lambda file, how: None)
    assert "flock lets two holders in" in machine.folder_trouble(shared)


def test_a_token_that_others_can_read(shared: Path) -> None:
    token = shared / machine.TOKEN
    assert machine.token_trouble(token) == ""
    token.chmod(0o644)
    assert "has mode 644, though it was made with 600" in machine.token_trouble(token)
    if os.geteuid() == 0:
        token.chmod(0o600)
        os.chown(token, 65534, -1)
        assert "belongs to user 65534" in machine.token_trouble(token)


def test_a_temporary_folder_takes_sockets(tmp_path: Path) -> None:
    short = Path("/tmp")
    assert machine.socket_trouble(short) == ""
    assert "No such file" in machine.socket_trouble(tmp_path / "none")
    long = tmp_path / ("x" * 100)
    long.mkdir()
    assert "takes no Unix sockets" in machine.socket_trouble(long)
    assert list(long.iterdir()) == []


def test_ports_that_somebody_has() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert machine.taken_ports(range(port, port + 1)) == (port,)
    assert machine.taken_ports(range(port, port + 1)) == ()


# ------------------------------------------------------------------------- judging what nodes say


@pytest.mark.parametrize(
    ("check", "changes", "state", "words"),
    [
        (
            check_results,
            {"shared_trouble": "not it"},
            "FAIL",
            "b: not it; set --results to a folder",
        ),
        (check_token, {"token_trouble": "mode 644"}, "FAIL", "b: mode 644; set --results"),
        (check_temporary, {"temporary_trouble": "none"}, "FAIL", "b: none; set temporary"),
        (check_temporary, {"temporary_free": 10**9}, "warn", "b: less than 2 GB free in /tmp"),
        (check_ports, {"taken_ports": tuple(range(20000, 20003))}, "warn", "at most 3 taken"),
        (
            check_ports,
            {"taken_ports": (20003, 20010)},
            "FAIL",
            "b: no four ports in a row are free",
        ),
        (check_gpus, {"gpus": 1, "visible": "0"}, "FAIL", "b: Slurm gives 1 of 2 GPUs"),
        (check_gpus, {"torch_gpus": 0}, "FAIL", "b: torch can use 0 of 2 GPUs"),
        (check_gpus, {"torch_trouble": "no libcuda"}, "FAIL", "b: no libcuda"),
        (
            check_open_files,
            {"open_files": 256},
            "warn",
            "b: a process may have 256 of them; Ray needs",
        ),
        (check_open_files, {"open_files": 48}, "FAIL", "b: a process may have 48 of them"),
        (
            check_shared_memory,
            {"shared_memory": 5 * 10**8},
            "warn",
            "b: 0.5 GB free in /dev/shm",
        ),
        (
            check_shared_memory,
            {"shared_memory": 64 * 2**20},
            "FAIL",
            "b: 0.1 GB free in /dev/shm",
        ),
        (
            check_data,
            {"missing": {"mnist": "MNIST/raw"}},
            "FAIL",
            "b: mnist: MNIST/raw; set --data",
        ),
        (check_clocks, {"clock": 1030.0}, "warn", "b is 30 s ahead"),
        (check_clocks, {"clock": 500.0}, "FAIL", "b is 500 s late"),
        (
            check_same_versions,
            {"versions": {"ddsweep": "1", "ray": "3"}},
            "FAIL",
            "b: ray 3 (here 2); install the same environment on all nodes",
        ),
    ],
)
def test_one_node_of_two(
    check: Callable[..., Finding], changes: dict[str, object], state: str, words: str
) -> None:
    more = {
        check_results: "/shared/results",
        check_temporary: "/tmp",
        check_ports: SITE,
        check_gpus: SITE,
        check_shared_memory: SITE,
        check_data: ("mnist",),
        check_clocks: {"a": 1001.0, "b": 1000.0},
        check_same_versions: HERE,
    }
    arguments = [more[check]] if check in more else []
    well = check([facts("a"), facts("b")], *arguments)
    assert well.state == "ok", well
    finding = check([facts("a"), facts("b", **changes)], *arguments)
    assert finding.state == state
    assert words in finding.text


def test_nodes_of_the_same_trouble_are_told_together() -> None:
    bad = [facts(host, shared_trouble="elsewhere") for host in ("b", "c")]
    assert check_results([facts(), *bad], "/r").text.startswith("b, c: elsewhere; ")


def test_gpus_that_are_not_used() -> None:
    site = SITE.model_copy(update={"device": "cpu"})
    assert check_gpus([facts(torch_gpus=0)], site) == Finding("ok", "gpus", "2 on a, unused: device is cpu")
    assert "trials run on the CPU" in check_gpus([facts(torch_gpus=0)], None).text
    # The allocation must have them all the same.
    assert check_gpus([facts(gpus=0, torch_gpus=0)], site).state == "FAIL"


def test_who_did_not_answer() -> None:
    def judged(*nodes: Facts, waiting: str = "", **said: tuple[str, ...]) -> Finding:
        lines = {{"srun": -1, "a": 0, "b": 1}[who]: words for who, words in said.items()}
        return check_reported(Answers(nodes, {}, {0: "a", 1: "b"}, lines, waiting), SITE)

    assert judged(facts("a"), facts("b")) == Finding("ok", "nodes", "a, b answered")
    assert (
        "1 of 2 answered; b: no module named ddsweep;"
        in judged(facts("a"), b=("no module named ddsweep",)).text
    )
    assert "b: python printed nothing" in judged(facts("a")).text
    waits = judged(waiting="Priority")
    assert waits.state == "FAIL"
    assert "a job of 2 nodes and 5 min still waits (Priority) and was cancelled" in waits.text


def test_reading_what_srun_printed() -> None:
    line = json.dumps(asdict(facts("b")))
    out = [(1.0, "0: host a"), (1.0, "1: host b"), (2.0, "0: module loaded"), (3.0, f"1: {line}")]
    err = [(1.0, "0: No module named ddsweep"), (2.0, "srun: error: a: task 0: Exited with exit code 1")]
    answers = doctor_job._answers(out, err, "")
    assert answers.facts == (facts("b"),)
    assert answers.arrived == {"b": 3.0}
    assert answers.started == {0: "a", 1: "b"}
    assert answers.said == {
        0: ("No module named ddsweep",),
        -1: ("error: a: task 0: Exited with exit code 1",),
    }
