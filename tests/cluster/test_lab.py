"""The lab is what the other tests take it for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import submitit

from tests.cluster.machines import Lab


def count_restarts(path: Path, seconds: float) -> str:
    """Say by ``path`` that it runs; work; return how often it was started before."""
    path.touch()
    time.sleep(seconds)
    return os.environ.get("SLURM_RESTART_COUNT", "0")


@pytest.fixture
def submit(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., submitit.Job[Any]]:
    # By default it looks after 2, 4, 8, ... and finally 600 s.
    monkeypatch.setattr(submitit.SlurmJob, "watcher", type(submitit.SlurmJob.watcher)(delay_s=2))

    def submit(function: Callable[..., Any], *arguments: object, **settings: Any) -> submitit.Job[Any]:
        executor = submitit.AutoExecutor(folder=shared / "%j", cluster="slurm")
        executor.update_parameters(timeout_min=5, **settings)
        return executor.submit(function, *arguments)

    return submit


def test_each_node_is_a_machine(lab: Lab, shared: Path) -> None:
    script = (
        f'hostname > {shared}/$SLURM_PROCID; ip -4 -o addr show eth0 >> {shared}/$SLURM_PROCID; echo "$HOME"'
    )
    homes = lab.sh("srun", "-N3", "-n3", "sh", "-c", script).splitlines()
    assert homes == [str(lab.directory / "home/root")] * 3
    texts = sorted(path.read_text() for path in shared.iterdir())
    assert [text.split()[0] for text in texts] == lab.nodes
    assert [text.split()[4] for text in texts] == [f"10.213.0.{i}/24" for i in (11, 12, 13)]


def test_tmp_is_a_node_s_own(lab: Lab, shared: Path, tmp_path: Path) -> None:
    own = ("/tmp", "/root", "/dev/shm")
    lab.exec("node1", "touch", *(f"{folder}/of-node1" for folder in own), shared / "of-all")
    for folder in own:
        assert "of-node1" in lab.exec("node1", "ls", folder).stdout
        assert "of-node1" not in lab.exec("node2", "ls", folder).stdout
        assert not Path(folder, "of-node1").exists()
    assert lab.exec("node2", "test", "-e", shared / "of-all").returncode == 0
    assert lab.exec("node2", "test", "-e", tmp_path).returncode != 0
    # What runs there is this checkout, by this Python.
    told = lab.exec("node2", sys.executable, "-c", "import tests.cluster.machines as m; print(m.__file__)")
    assert told.stdout.strip() == str(Path(__file__).parent / "machines.py")


def test_two_jobs_on_a_node_get_a_gpu_each(lab: Lab, shared: Path) -> None:
    # Each waits for the other, so that both do run at the same time.
    script = "echo $CUDA_VISIBLE_DEVICES > {me}; until test -e {other}; do sleep 0.1; done"
    a, b = shared / "a", shared / "b"
    for me, other in ((a, b), (b, a)):
        wrap = script.format(me=me, other=other)
        lab.sbatch("-w", "node2", "-c1", "--gres=gpu:1", "-o", "/dev/null", "--wrap", wrap)
    lab.wait(lambda: not lab.jobs(), "both jobs are over")
    assert {a.read_text().strip(), b.read_text().strip()} == {"0", "1"}


def test_a_submitit_job_gives_its_result(lab: Lab, submit: Callable[..., submitit.Job[Any]]) -> None:
    job = submit(divmod, 7, 3)
    assert job.result() == (2, 1)
    # The result lies there before Slurm has seen the end.
    lab.wait(lambda: lab.job(job.job_id)["JobState"] == "COMPLETED", "the job is over")
    lab.wait(lambda: job.get_info(mode="force").get("State") == "COMPLETED", "sacct says so too")


def test_processes_are_those_of_jobs(lab: Lab) -> None:
    assert [lab.processes(node) for node in lab.nodes] == [[], [], []]
    job = lab.sbatch("-w", "node1", "-o", "/dev/null", "--wrap", "sleep 1234 & sleep 4321")
    commands = ("sleep 1234", "sleep 4321")
    lab.wait(lambda: {*commands} <= {command for _, command in lab.processes("node1")}, "the job runs")
    assert lab.processes("node2") == []
    lab.sh("scancel", job)
    lab.wait(lambda: not lab.processes("node1"), "nothing is left")


def test_who_is_refused(lab: Lab) -> None:
    with pytest.raises(RuntimeError, match="invalid partition"):
        lab.sbatch("-p", "nosuch", "--wrap", "true")
    if lab.accounting == "db":
        with pytest.raises(RuntimeError, match="Invalid account"):
            lab.sbatch("-A", "nosuch", "--wrap", "true")
        lab.sbatch("-A", "ddsweep", "-p", "closed", "--wrap", "true")
    job = lab.sbatch("-p", "closed", "--wrap", "true")
    lab.wait(lambda: lab.job(job)["Reason"] == "PartitionDown", "the closed partition takes it and waits")


def test_another_user_is_another(lab: Lab, shared: Path) -> None:
    private = shared / "private"
    private.write_text("mine")
    private.chmod(0o600)
    told = lab.exec("node1", sys.executable, "-c", "import os; print(os.getuid())", user="nobody")
    assert told.stdout.strip() not in ("", "0")
    refused = lab.exec("node1", "cat", private, user="nobody")
    assert (refused.returncode, "Permission denied" in refused.stdout) == (1, True)
    assert lab.exec("node1", "cat", private).stdout == "mine"


@pytest.mark.slow
@pytest.mark.usefixtures("slurm")
def test_a_lab_ends_with_its_owner() -> None:
    # The owner stands for a test run that is killed.
    owner = subprocess.Popen(["sleep", "1000"])
    other = Lab(nodes=1, accounting="shim", owner=owner.pid)
    try:
        other.up()
        stuck = subprocess.Popen(
            ["sbatch", "-W", "-o", "/dev/null", "--wrap", "sleep 1000"], env=other.environment
        )
        other.wait(lambda: "RUNNING" in other.jobs().values(), "a job runs")
        owner.kill()
        owner.wait()
        other.wait(lambda: not other.directory.exists(), "all is gone")
        assert stuck.wait() != 0
        left = subprocess.run(
            ["pgrep", "-f", other.directory.name], capture_output=True, text=True, check=False
        )
        assert left.stdout == ""
    finally:
        owner.kill()
        owner.wait()
        other.down()


@pytest.mark.slow
def test_a_lost_node_is_noticed_and_its_job_requeued(
    lab: Lab, shared: Path, submit: Callable[..., submitit.Job[Any]]
) -> None:
    started = shared / "started"
    job = submit(count_restarts, started, 8, slurm_additional_parameters={"nodelist": "node3"})
    lab.wait(started.exists, "the job runs")
    lab.power_off("node3")
    lab.wait(lambda: lab.job(job.job_id)["JobState"] == "PENDING", "Slurm has noticed")
    assert lab.node_state("node3") == "down*"
    lab.power_on("node3")
    lab.wait(job.paths.result_pickle.exists, "the job has run again")
    # What submitit has seen of the loss counts as final for this Job: read it anew.
    assert submitit.SlurmJob[str](folder=shared / "%j", job_id=job.job_id).result() == "1"


@pytest.mark.slow
def test_a_cut_node_goes_on_alone_and_comes_back(lab: Lab, shared: Path) -> None:
    beats = shared / "beats"
    lab.sbatch(*("-w", "node2", "-o", "/dev/null"), "--wrap", f"while sleep 0.2; do echo b >> {beats}; done")
    lab.wait(beats.exists, "the job runs")
    lab.cut("node2")
    lab.wait(lambda: lab.node_state("node2").endswith("*"), "Slurm misses it")
    size = beats.stat().st_size
    lab.wait(lambda: beats.stat().st_size > size, "its job goes on")
    lab.mend("node2")
    lab.wait(lambda: not lab.node_state("node2").endswith("*"), "it is back")
