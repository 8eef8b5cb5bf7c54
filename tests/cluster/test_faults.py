"""What can happen to a sweep on a cluster: it ends with the tables that it would have had anyway.

Each test prints its figures (seconds to notice, to recover, steps done twice) for docs/reliability.md.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

import ddsweep
from ddsweep.errors import CheckpointError
from ddsweep.results.artifacts import load_tensors
from tests.cluster.machines import Lab
from tests.cluster.sweeping import ROOT, Launched, ddsweep_command, run_alone

SWEEP = """
name: faults
base:
  dataset: digits
  network: convnet(width=16)
  init: random
  image_init: real
  inner_lr: 1.0
  outer_lr: 0.05
  outer_steps: 400
  real_batch: 256
  models_per_step: 2
  images_per_class: 2
  images_per_class_per_step: 1
  inner_epochs: 2
  validate_every: 100
seeds: 6
evaluate:
  networks: 8
  group_size: 4
  shards: 3
  baselines: [random_real]
resources:
  checkpoint_every: 20
  log_every: 20
"""
GPUS = ["resources.gpus=0.5"]


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "faults.yaml"
    path.write_text(SWEEP)
    return path


@pytest.fixture(scope="session")
def alone(slurm: Lab, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_alone(tmp_path_factory.mktemp("alone"), file, ["evaluate.shards=2"])


@pytest.fixture
def sweep(lab: Lab, shared: Path, file: Path) -> Launched:
    return Launched(lab, shared, file, GPUS)


# ----------------------------------------------------------------------------------------- helpers


def workers_on(lab: Lab, node: str) -> list[str]:
    """Trials at work on a node; idle workers of Ray have another name."""
    return [
        command for _, command in lab.processes(node) if "distil" in command.lower() and "ray::" in command
    ]


def checkpoints(sweep: Launched, node: str | None = None) -> int:
    """Trials that have saved something and are not distilled yet; of ``node`` only."""
    hosts = []
    for path in sweep.folder.glob("artifacts/*/checkpoint.safetensors"):
        if not path.with_name("distilled.safetensors").exists():
            with suppress(CheckpointError):  # it was distilled meanwhile
                hosts.append(load_tensors(path)[1]["provenance"]["host"])
    return len(hosts) if node is None else hosts.count(node)


def wait_for_work(sweep: Launched, node: str) -> None:
    """Until a trial at work on ``node`` has saved something."""

    def at_work() -> bool:
        return checkpoints(sweep, node) > 0 and bool(workers_on(sweep.lab, node))

    sweep.wait(at_work, f"trials run on {node}")


def clock(line: str) -> float:
    """Seconds of the day of a line of the log."""
    found = re.match(r"(\d\d):(\d\d):(\d\d) ", line)
    assert found, line
    hours, minutes, seconds = map(int, found.groups())
    return 3600.0 * hours + 60 * minutes + seconds


def now() -> float:
    moment = datetime.now()
    return 3600.0 * moment.hour + 60 * moment.minute + moment.second + moment.microsecond / 1e6


def resumed(sweep: Launched) -> int:
    """Trials that went on from a checkpoint in another process than they began in."""
    return int((ddsweep.load_results(sweep.folder).trials["n_resumed"] > 0).sum())


def figures(**found: object) -> None:
    print("FIGURES", json.dumps(found, default=lambda value: round(value, 1)))


def restarts(lab: Lab, job: str) -> int:
    return int(lab.job(job)["Restarts"])


def job_of(sweep: Launched, place: int = -1) -> str:
    record = sorted(sweep.folder.glob("jobs/*/launch.json"))[place]
    return str(json.loads(record.read_text())["jobs"][0]["id"])


def outcome(sweep: Launched) -> dict[str, object]:
    found: dict[str, object] = json.loads(sorted(sweep.folder.glob("jobs/*/outcomes/*.json"))[-1].read_text())
    return found


def end_well(sweep: Launched, alone: Path, *, lost: str | None = None) -> None:
    sweep.wait_until_over()
    assert outcome(sweep)["code"] == 0, sweep.logs()
    sweep.assert_nothing_runs(lost=lost)
    sweep.assert_complete(alone)


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_loses_power(lab: Lab, sweep: Launched, alone: Path) -> None:
    assert sweep.launch().returncode == 0
    wait_for_work(sweep, "node3")
    lost, at, begun = len(workers_on(lab, "node3")), now(), time.monotonic()
    lab.power_off("node3")
    sweep.wait(lambda: sweep.log_of("node3: lost"), "the loss is noticed")
    noticed = clock(sweep.log_of("node3: lost")[-1]) - at
    sweep.wait_until_over()
    over = time.monotonic() - begun
    lab.power_on("node3")
    end_well(sweep, alone, lost="node3")
    assert resumed(sweep) >= 1
    figures(fault="power", trials_on_it=lost, noticed_s=noticed, resumed=resumed(sweep), over_after_s=over)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_network_is_cut_and_mended(lab: Lab, sweep: Launched, alone: Path) -> None:
    assert sweep.launch().returncode == 0
    wait_for_work(sweep, "node3")
    lost, at, begun = len(workers_on(lab, "node3")), now(), time.monotonic()
    lab.cut("node3")
    sweep.wait(lambda: sweep.log_of("node3: lost"), "the loss is noticed")
    noticed = clock(sweep.log_of("node3: lost")[-1]) - at
    lab.mend("node3")
    mended = now()
    sweep.wait(lambda: sweep.log_of("node3: joined") or not lab.jobs(), "the node is back, or all is over")
    back = [clock(line) - mended for line in sweep.log_of("node3: joined")]
    end_well(sweep, alone)
    figures(
        fault="network",
        trials_on_it=lost,
        noticed_s=noticed,
        back_s=back[-1] if back else None,
        resumed=resumed(sweep),
        over_after_s=time.monotonic() - begun,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_slurmd_is_killed(lab: Lab, sweep: Launched, alone: Path) -> None:
    """Slurm takes the node for lost and ends the step on it; the job goes on without it."""
    assert sweep.launch().returncode == 0
    wait_for_work(sweep, "node3")
    begun = time.monotonic()
    lab.kill_slurmd("node3")
    sweep.wait(lambda: "down" in lab.node_state("node3") or not lab.jobs(), "Slurm has noticed")
    noticed = time.monotonic() - begun
    sweep.wait_until_over()
    lab.start_slurmd("node3")
    assert outcome(sweep)["code"] == 0, sweep.logs()
    sweep.assert_complete(alone)
    sweep.wait(lambda: not lab.processes("node3"), "nothing is left on it")
    figures(fault="slurmd", noticed_s=noticed, resumed=resumed(sweep), over_after_s=time.monotonic() - begun)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_job_is_requeued_by_somebody(lab: Lab, sweep: Launched, alone: Path) -> None:
    assert sweep.launch().returncode == 0
    wait_for_work(sweep, "node2")
    job, at, begun = job_of(sweep), now(), time.monotonic()
    lab.sh("scontrol", "requeue", job)
    sweep.wait(lambda: restarts(lab, job) == 1 and lab.job(job)["JobState"] == "RUNNING", "it runs again")
    running = time.monotonic() - begun
    end_well(sweep, alone)
    assert resumed(sweep) >= 1
    again = [clock(line) - at for line in sweep.log_of(" dashboard: ssh")][-1]
    figures(fault="requeue", running_s=running, head_up_s=again, resumed=resumed(sweep))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_process_of_the_job_gets_sigterm(lab: Lab, sweep: Launched, alone: Path) -> None:
    """As a preemption without ``preempt_send_user_signal`` does: all nodes of Ray are signalled."""
    assert sweep.launch().returncode == 0
    wait_for_work(sweep, "node2")
    job, begun = job_of(sweep), time.monotonic()
    lab.sh("scancel", "--signal=TERM", job)
    sweep.wait(lambda: restarts(lab, job) == 1, "it is requeued")
    requeued = time.monotonic() - begun
    end_well(sweep, alone)
    assert resumed(sweep) >= 1
    figures(fault="SIGTERM to all", requeued_s=requeued, resumed=resumed(sweep))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_time_limit_shorter_than_the_sweep(lab: Lab, shared: Path, file: Path, alone: Path) -> None:
    """Three minutes, with a drain in the last 60 s; as often as it takes."""
    sweep = Launched(lab, shared, file, [*GPUS, "site.drain=60", "site.time=3m", "site.requeues=20"])
    done = sweep.launch("--wait", "outer_steps=1200")
    assert done.returncode == 0, done.stdout + sweep.logs()
    job = job_of(sweep)
    assert restarts(lab, job) >= 1
    sweep.assert_nothing_runs()
    longer = run_alone(alone.parent / "longer", file, ["evaluate.shards=2", "outer_steps=1200"])
    sweep.assert_complete(longer)
    figures(fault="time limit", requeued=restarts(lab, job), resumed=resumed(sweep))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_requeues_are_bounded(lab: Lab, shared: Path, file: Path) -> None:
    sweep = Launched(lab, shared, file, [*GPUS, "site.drain=50", "site.time=1m", "site.requeues=1"])
    done = sweep.launch("--wait", "outer_steps=100000", "site.nodes=1")
    assert (done.returncode, "not requeued again, after 1 time" in done.stdout) == (1, True), done.stdout
    assert "launch it again" in done.stdout
    sweep.assert_nothing_runs()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_head_node_is_lost(lab: Lab, sweep: Launched, alone: Path) -> None:
    """The batch script dies with it. Slurm requeues the job when the node is back: it outlives lost nodes."""
    assert sweep.launch().returncode == 0
    wait_for_work(sweep, "node2")
    job, at, begun = job_of(sweep), now(), time.monotonic()
    lab.power_off("node1")
    time.sleep(6)
    lab.power_on("node1")
    sweep.wait(lambda: "PENDING" in lab.jobs().values() or restarts(lab, job) >= 1, "Slurm has noticed")
    noticed = time.monotonic() - begun
    sweep.wait(lambda: len(sweep.log_of(" dashboard: ssh")) >= 2, "a new head is up")
    head = clock(sweep.log_of(" dashboard: ssh")[-1]) - at
    end_well(sweep, alone, lost="node1")
    assert restarts(lab, job) >= 1
    figures(fault="head", noticed_s=noticed, head_up_s=head, resumed=resumed(sweep))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_head_node_is_lost_for_good(lab: Lab, sweep: Launched, alone: Path) -> None:
    """Nothing on the cluster would requeue the job: who waits for it does."""
    words = sweep.words("--wait", "site.nodes=2")
    with subprocess.Popen(
        ddsweep_command(*words), env=lab.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as waiting:
        wait_for_work(sweep, "node2")
        job, begun = job_of(sweep), time.monotonic()
        lab.power_off("node1")
        sweep.wait(lambda: restarts(lab, job) == 1, "it is requeued")
        noticed = time.monotonic() - begun
        printed = waiting.communicate(timeout=600)[0]
    lab.power_on("node1")
    assert waiting.returncode == 0, printed + sweep.logs()
    assert f"job {job}: node1, where its driver was, is lost; requeued" in printed
    sweep.assert_nothing_runs(lost="node1")
    sweep.assert_complete(alone)
    assert resumed(sweep) >= 1
    figures(fault="head for good", noticed_s=noticed, resumed=resumed(sweep))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_driver_is_killed(lab: Lab, sweep: Launched, alone: Path) -> None:
    """For lack of memory, for example: the head starts it again."""
    assert sweep.launch().returncode == 0
    wait_for_work(sweep, "node2")
    drivers = [pid for pid, command in lab.processes("node1") if " -m ddsweep run " in command]
    assert len(drivers) == 1
    lab.exec("node1", "kill", "-KILL", drivers[0])
    end_well(sweep, alone)
    assert sweep.log_of("the driver was killed by signal 9")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_element_of_an_array_loses_its_node(lab: Lab, sweep: Launched, alone: Path) -> None:
    assert sweep.launch("--mode", "array").returncode == 0
    sweep.wait(lambda: checkpoints(sweep) >= 3, "trials run")
    begun = time.monotonic()
    lab.power_off("node2")
    sweep.wait(
        lambda: "PENDING" in [s for j, s in lab.jobs().items() if "_" in j and "[" not in j], "requeued"
    )
    noticed = time.monotonic() - begun
    lab.power_on("node2")
    end_well(sweep, alone)
    assert resumed(sweep) >= 1
    figures(
        fault="array element",
        noticed_s=noticed,
        resumed=resumed(sweep),
        over_after_s=time.monotonic() - begun,
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_never_comes(lab: Lab, shared: Path, file: Path, alone: Path) -> None:
    """Slurm gives it, but its results folder is not there, so it never reports."""
    sweep = Launched(lab, shared, file, [*GPUS, "site.wait_for_nodes=40"])
    hidden = lab.exec("node3", "mount", "-t", "tmpfs", "tmpfs", shared)
    assert hidden.returncode == 0, hidden.stdout
    try:
        assert sweep.launch().returncode == 0
        sweep.wait(lambda: sweep.log_of("node3"), "the missing node is named")
        told = sweep.log_of("node3")[0]
        assert "never reported" in told and "going on with 2 of 3 nodes" in told
        sweep.wait_until_over()
        assert outcome(sweep)["code"] == 0, sweep.logs()
        sweep.assert_complete(alone)
    finally:
        lab.exec("node3", "umount", shared)
