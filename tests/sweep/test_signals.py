"""A signal to a run and all that it has started, at every moment: exit code 75, and nothing left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.sweep.driver import POOL, Driver, command_line, descendants, kill

pytestmark = pytest.mark.ray


@pytest.fixture
def private() -> Iterator[Path]:
    """The temporary folder of a run, in the place of /tmp: short, for Ray's sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def driver(tmp_path: Path, private: Path, environment: dict[str, str]) -> Iterator[Driver]:
    made = Driver(tmp_path, {**environment, "TMPDIR": str(private)})
    yield made
    made.kill_everything()


def in_session(driver: Driver) -> list[str]:
    """What still runs of it: Ray's services and workers are all in the session of the driver."""
    assert driver.process is not None
    command = ["pgrep", "-a", "-s", str(driver.process.pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [line for line in found if "<defunct>" not in line]  # it ended, and init has not looked yet


def assert_drained(driver: Driver, private: Path) -> None:
    assert driver.wait() == 75, driver.log.read_text()
    assert in_session(driver) == []
    # Tune imports wandb if it is here, and a driver that lost its Ray leaves at once: two empty folders stay.
    left = [path for path in private.iterdir() if not (path.match("*wandb-*") and not any(path.iterdir()))]
    assert left == [], "Ray's folder, with its token"
    assert not (driver.results / ".lock").exists()
    assert not (driver.results / ".tmp" / "STOP").exists()
    assert "Traceback" not in driver.log.read_text()


MOMENTS: dict[str, tuple[int, Callable[[Driver, Path], object]]] = {
    "before Ray is up": (signal.SIGHUP, lambda driver, private: (driver.results / ".lock").exists()),
    "while Ray comes up": (signal.SIGTERM, lambda driver, private: list(private.glob("dds-*/ray/session_*"))),
    "while workers start": (signal.SIGINT, lambda driver, private: (driver.results / "sweep.yaml").exists()),
    "before the first step": (signal.SIGTERM, lambda driver, private: driver.workers("ray::Distil")),
    "in evaluation": (signal.SIGHUP, lambda driver, private: list(driver.results.glob("evals/part-*"))),
}
QUICK = ("before Ray is up", "while Ray comes up")


@pytest.mark.parametrize(
    "moment", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS]
)
def test_a_signal_to_all_processes_drains(driver: Driver, private: Path, moment: str) -> None:
    number, there = MOMENTS[moment]
    driver.start("evaluate.networks=400", "evaluate.group_size=1", "outer_steps=20")
    driver.until(lambda: there(driver, private), moment)
    driver.signal_group(number)
    assert_drained(driver, private)
    if moment in QUICK:
        assert f"ddsweep: {signal.Signals(number).name}: stopped" in driver.log.read_text()
        assert not driver.results.exists(), "nothing was begun"


@pytest.mark.slow
def test_trials_that_wait_are_not_started_to_be_drained(driver: Driver, private: Path) -> None:
    """64 trials on two slots, and a signal during one of many checkpoints; twice, as by `timeout`."""
    alone = ("resources.cohort=1", "resources.total_cpus=2")
    driver.start("seeds=32", "outer_steps=100000", "resources.checkpoint_every=1", *alone)
    driver.until(driver.checkpoint_of_a_running_trial, "a checkpoint")
    driver.signal(signal.SIGTERM)
    driver.signal_group(signal.SIGTERM)
    assert_drained(driver, private)
    log = driver.log.read_text()
    assert "SIGTERM: draining" in log and "64 left" in log
    assert 1 <= log.count(": drained") <= 2
    assert len(list(driver.results.glob("artifacts/*"))) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("service", ["gcs_server", "raylet"])
def test_a_ray_that_is_lost_is_a_drain(driver: Driver, private: Path, service: str) -> None:
    """Somebody takes Ray's services away right after the signal: trials cannot come to rest any more."""
    driver.start("outer_steps=100000")
    driver.until(driver.checkpoint_of_a_running_trial, "a checkpoint")
    assert driver.process is not None
    lost = [pid for pid in descendants(driver.process.pid) if f"/{service} " in command_line(pid)]
    assert len(lost) == 1
    driver.signal_group(signal.SIGTERM)
    kill(lost[0])
    assert_drained(driver, private)
    assert f"SIGTERM, and Ray was lost ({service} ended with -9)" in driver.log.read_text()


@pytest.mark.slow
def test_an_evaluation_by_itself_drains(driver: Driver, private: Path, ddsweep: Run) -> None:
    driver.start("outer_steps=4", "evaluate.networks=1")
    assert driver.wait() == 0, driver.log.read_text()
    before = len(list(driver.results.glob("evals/part-*")))
    command = ["eval", str(driver.results), "evaluate.networks=4000", "evaluate.group_size=1"]
    driver.start_command(*command)
    driver.until(lambda: len(list(driver.results.glob("evals/part-*"))) > before, "a part")
    driver.signal_group(signal.SIGINT)
    assert_drained(driver, private)


@pytest.mark.slow
def test_the_training_of_a_pool_drains(driver: Driver, private: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(POOL.format(epochs=100000))
    driver.results = tmp_path / "results" / "pools" / "tiny"
    driver.start_command("pretrain", str(tmp_path / "tiny.yaml"), "--results", str(tmp_path / "results"))
    driver.until(lambda: driver.workers("ray::pool tiny"), "a group is at work")
    driver.signal_group(signal.SIGTERM)
    assert_drained(driver, private)
    assert "SIGTERM: draining" in driver.log.read_text()


def test_a_launch_that_is_only_waited_for_goes_on(driver: Driver, tmp_path: Path, ddsweep: Run) -> None:
    """The jobs are not below this command, and nobody asked for their end."""
    results = driver.results
    driver.start_command(
        *("launch", str(driver.file), "--site", "local", "--wait", "--results", str(results.parent)),
        *("outer_steps=100000", "site.cpus_per_node=1"),
    )
    try:
        driver.until(lambda: list(results.glob("jobs/*/runs/*/begun")), "the job runs")
        driver.signal_group(signal.SIGHUP)
        assert driver.wait() == 75, driver.log.read_text()
        assert "SIGHUP: the jobs go on without this command" in driver.log.read_text()
        assert "running" in ddsweep("status", results).stdout
    finally:
        assert ddsweep("cancel", results).returncode == 0
    assert not (results / ".lock").exists()
    assert os.listdir(driver.environment["TMPDIR"]) == []
