"""``scheduler: local``: the whole of a launch on this machine, in both modes, and what may happen to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import ddsweep
from ddsweep.launch.folder import Launch, LaunchFolder, launches_of, read_json
from ddsweep.processes import MARK
from ddsweep.results.layout import SweepDirectory
from tests.conftest import PATIENCE_S
from tests.science import assert_same_science
from tests.sweep.driver import SWEEP

SITE = Path(__file__).parents[2] / "slurm" / "local.yaml"
SHORT = ("inner_epochs=1", "evaluate.networks=4", "evaluate.group_size=2")
"""Settings over those of the sweep of the drivers' tests."""
LONG = "outer_steps=2500"
"""A minute or so of work for a trial: long enough to be hit in the middle."""


class Sweep:
    """One sweep in a folder of its own, run or launched as a user does."""

    def __init__(self, folder: Path, environment: dict[str, str], cwd: Path, *settings: str) -> None:
        folder.mkdir(exist_ok=True)
        self.results = folder / "all results"
        self.file = folder / "small.yaml"
        self.file.write_text(SWEEP.format(outer_steps=60, shards=1))
        self.settings = (*SHORT, *settings)
        self.environment = environment
        self.cwd = cwd
        self.directory = SweepDirectory(self.results / "small")

    def __call__(self, *words: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "ddsweep", *map(str, words)],
            env=self.environment,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run(self) -> subprocess.CompletedProcess[str]:
        return self("run", self.file, *self.settings, "--results", self.results)

    def launch(self, mode: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = ["launch", self.file, *self.settings, *more, "--site", SITE, "--mode", mode]
        return self(*words, "--results", self.results, "site.dashboard=false", "site.object_store=0.1")

    @property
    def folder(self) -> LaunchFolder:
        return launches_of(self.directory)[-1]

    def outcome(self, kind: str) -> dict[str, Any] | None:
        return read_json(self.folder.outcome(kind))

    def processes(self) -> dict[int, str]:
        """What belongs to the newest launch, by its session and by the mark that Ray's processes have."""
        if not launches_of(self.directory):
            return {}
        sessions = {job.id for job in Launch.read(self.folder).jobs}
        marks = [f"{MARK}={path.name}.".encode() for path in self.folder.root.glob("runs/*")]
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, _, session, *_ = (place / "stat").read_text().rpartition(")")[2].split()
                words = (place / "environ").read_bytes().split(b"\0")
                marked = any(word.startswith(mark) for word in words for mark in marks)
                if state not in "ZX" and (session in sessions or marked):
                    command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(place.name)] = command
        return found

    def pids(self, text: str) -> list[int]:
        return [pid for pid, command in self.processes().items() if text in command]

    def until(self, what: Callable[[], object], description: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, f"never: {description}\n{self.told()}"
            time.sleep(0.1)

    def until_in_the_middle(self) -> None:
        self.until(
            lambda: list(self.directory.root.glob("artifacts/*/checkpoint.safetensors")), "a checkpoint"
        )

    def until_nothing_runs(self) -> None:
        self.until(lambda: not self.processes(), f"nothing runs: {self.processes()}")

    def told(self) -> str:
        return self("logs", self.directory.root, "--lines", 30).stdout + "\n".join(self.processes().values())

    def assert_equal_to(self, other: Sweep) -> None:
        assert_same_science(self.directory.root, other.directory.root)

    def end(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def sweep(tmp_path: Path, environment: dict[str, str], hostile: Path) -> Iterator[Callable[..., Sweep]]:
    made = []

    def make(*settings: str) -> Sweep:
        made.append(Sweep(tmp_path, environment, hostile, *settings))
        return made[-1]

    yield make
    for one in made:
        one.end()


def alone(folder: Path, environment: dict[str, str], settings: Sequence[str]) -> Sweep:
    made = Sweep(folder, environment, folder, *settings)
    done = made.run()
    assert done.returncode == 0, done.stdout
    return made


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Sweep:
    """What `ddsweep run` makes of it."""
    return alone(tmp_path_factory.mktemp("short"), environment, [])


@pytest.fixture(scope="session")
def long(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Sweep:
    return alone(tmp_path_factory.mktemp("long"), environment, [LONG])


@pytest.mark.ray
@pytest.mark.parametrize(
    ("mode", "elements"),
    [("array", 1), *(pytest.param(*more, marks=pytest.mark.slow) for more in (("cluster", 1), ("array", 2)))],
)
def test_a_launch_makes_what_a_run_makes(
    short: Sweep, sweep: Callable[..., Sweep], mode: str, elements: int
) -> None:
    here = sweep()
    done = here.launch(mode, "--wait", f"site.array_tasks={elements}")
    assert done.returncode == 0, done.stdout + here.told()
    here.assert_equal_to(short)
    assert re.search(rf"launched \S+-{mode}-\w+: local \d+; 2 of 2 trials to do", done.stdout)
    here.until_nothing_runs()
    assert not here.directory.lock.exists() and not list(here.folder.root.glob("runs/*/token"))
    kinds = {path.name for path in here.folder.root.glob("outcomes/*.json")}
    ran = {f"{kind}-000{n}.json" for kind in ("trials", "evals") for n in range(elements)}
    assert kinds == (ran | {"finish-0000.json"} if mode == "array" else {"cluster-0000.json"})
    again = here.launch(mode)
    assert again.returncode == 0 and "done: all of 2 trials" in again.stdout
    assert len(launches_of(here.directory)) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_an_array_distils_trials_of_one_shape_together(
    sweep: Callable[..., Sweep], tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "by itself").mkdir()
    by_itself = alone(tmp_path / "by itself", environment, ["seeds=4", "resources.cohort=1"])
    here = sweep("seeds=4")
    done = here.launch("array", "--wait", "site.array_tasks=2")
    assert done.returncode == 0, done.stdout + here.told()
    here.assert_equal_to(by_itself)
    assert ddsweep.load_results(by_itself.directory.root).trials["cohort_size"].max() == 1
    assert ddsweep.load_results(here.directory.root).trials["cohort_size"].max() > 1


def test_a_dry_run_leaves_nothing(sweep: Callable[..., Sweep]) -> None:
    here = sweep()
    done = here.launch("cluster", "--dry-run")
    assert done.returncode == 0 and "2 of 2 trials to do" in done.stdout
    assert not here.results.exists()
    assert "no trial asks for one" not in done.stdout
    done = here.launch("cluster", "--dry-run", "--gpus-per-node", "1")
    assert done.returncode == 0 and "gpus_per_node: 1 GPU here, and no trial asks for one" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["array", "cluster"])
@pytest.mark.parametrize("victim", ["task", "launcher"])
def test_a_kill_in_the_middle(long: Sweep, sweep: Callable[..., Sweep], mode: str, victim: str) -> None:
    """A kill of the job itself, or of the process that runs the jobs: everything below it ends by itself, and
    launching again goes on from the checkpoints."""
    here = sweep(LONG)
    assert here.launch(mode).returncode == 0
    here.until_in_the_middle()
    pids = here.pids("submitit.core._submit" if victim == "task" else "ddsweep.launch.local")
    assert len(pids) == 1, here.processes()
    os.kill(pids[0], signal.SIGKILL)
    here.until_nothing_runs()
    again = here.launch(mode, "--wait")
    assert again.returncode == 0, again.stdout + here.told()
    here.assert_equal_to(long)
    assert ddsweep.load_results(here.directory.root).trials["n_resumed"].max() >= 1
    here.until_nothing_runs()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["array", "cluster"])
def test_cancelling_drains_and_launching_goes_on(long: Sweep, sweep: Callable[..., Sweep], mode: str) -> None:
    here = sweep(LONG)
    assert here.launch(mode).returncode == 0
    refused = here.launch(mode)
    assert refused.returncode == 1 and "is still there: job" in refused.stdout
    here.until_in_the_middle()
    cancelled = here("cancel", here.directory.root, "--grace", 120)
    assert cancelled.returncode == 0 and "did not end" not in cancelled.stdout, cancelled.stdout
    here.until_nothing_runs()
    assert not here.directory.stop_file.exists() and not here.directory.lock.exists()
    assert (here.outcome("cluster" if mode == "cluster" else "finish") or {})["code"] == 75
    assert not list(here.directory.root.glob("trials/part-*"))
    assert "no job of it waits or runs" in here("cancel", here.directory.root).stdout
    again = here.launch(mode, "--wait")
    assert again.returncode == 0, again.stdout + here.told()
    here.assert_equal_to(long)
    trials = ddsweep.load_results(here.directory.root).trials
    assert trials["n_resumed"].max() >= 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_element_that_lost_its_lock_drains(sweep: Callable[..., Sweep]) -> None:
    here = sweep(LONG)
    assert here.launch("array").returncode == 0
    here.until_in_the_middle()
    (lock,) = here.directory.root.glob(".lock.d/*")
    lock.unlink()
    here.until(lambda: "another driver took the sweep's lock over" in here.told(), "the element says so")
    here.until_nothing_runs()
    assert (here.outcome("trials") or {})["code"] == 75
    assert not list(here.directory.root.glob("trials/part-*"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_cancelled_before_it_has_begun_does_not_begin(sweep: Callable[..., Sweep]) -> None:
    here = sweep(LONG)
    assert here.launch("cluster").returncode == 0
    cancelled = here("cancel", here.directory.root, "--grace", 120)
    assert cancelled.returncode == 0 and "did not end" not in cancelled.stdout, cancelled.stdout
    here.until_nothing_runs()
    assert not list(here.directory.root.glob("artifacts/*"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["array", "cluster"])
def test_what_does_not_drain_in_time_is_killed_with_all_that_belongs_to_it(
    sweep: Callable[..., Sweep], mode: str
) -> None:
    here = sweep(LONG)
    assert here.launch(mode).returncode == 0
    here.until_in_the_middle()
    task = here.pids("submitit.core._submit")
    os.kill(task[0], signal.SIGSTOP)
    cancelled = here("cancel", here.directory.root, "--grace", 0.5)
    assert "did not end" in cancelled.stdout, cancelled.stdout
    here.until_nothing_runs()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["array", "cluster"])
def test_a_time_limit_shorter_than_the_sweep(long: Sweep, sweep: Callable[..., Sweep], mode: str) -> None:
    """A minute, in whose last 50 s it drains and is started again, once; the rest is for another launch. (How
    much is done in the first 10 s depends on the machine: maybe nothing.)"""
    here = sweep(LONG)
    done = here.launch(mode, "--wait", "--time", "1m", "site.drain=50", "site.requeues=1")
    assert "not requeued again, after 1 time (requeues); launch it again to go on" in done.stdout, here.told()
    assert done.returncode == (75 if mode == "array" else 1)
    outcome = here.outcome("trials" if mode == "array" else "cluster")
    assert outcome is not None and (outcome["code"], outcome["restart"], outcome["requeued"]) == (
        75,
        1,
        False,
    )
    here.until_nothing_runs()
    assert not here.directory.lock.exists() and not list(here.directory.root.glob("trials/part-*"))
    begun = len(list(here.directory.root.glob("artifacts/*/checkpoint.safetensors")))
    again = here.launch(mode, "--wait")
    assert again.returncode == 0, again.stdout + here.told()
    here.assert_equal_to(long)
    assert (ddsweep.load_results(here.directory.root).trials["n_resumed"] > 0).sum() == begun
