"""`Driver`: a small sweep, started as a user starts it, so that its processes can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tests.conftest import PATIENCE_S, OneRay
from tests.science import science

SWEEP = """
name: small
base:
  dataset: digits
  network: convnet(width=8)
  inner_lr: 1.0
  outer_lr: 0.05
  outer_steps: {outer_steps}
  real_batch: 128
  models_per_step: 2
  images_per_class: 2
  inner_steps: 2
  inner_epochs: 2
  validate_every: 20
grid:
  init: [fixed, random]
evaluate:
  networks: 10
  group_size: 4
  shards: {shards}
  baselines: [random_real, knn_random]
resources:
  compile: off  # which takes a minute, and by itself begins with many outer steps
  checkpoint_every: 4
  log_every: 4
  dashboard: false
"""

POOL = """
name: tiny
dataset: digits
network: convnet(depth=1,width=4,norm=none)
train: 8
heldout: 8
epochs: {epochs}
batch: 100
lr: 1e-2
decay_epochs: 20
total_cpus: 1
"""

HASTY = """
from ddsweep.cli import main
from ddsweep.sweep.runner import run_sweep
run_sweep.__kwdefaults__["spread_s"] = {spread_s}
main()
"""
"""The command line, with attempts less far apart."""

OUTER_STEPS = 80
"""Some seconds of work for a trial: long enough to be hit in the middle."""


class Driver:
    """``ddsweep run`` in a process of its own, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        shards: int = 2,
        cwd: Path | None = None,
        one_ray: OneRay | None = None,
        spread_s: float | None = None,
    ) -> None:
        self.folder = folder
        self.file = folder / "small.yaml"
        self.file.write_text(SWEEP.format(outer_steps=OUTER_STEPS, shards=shards))
        self.results = folder / "results" / "small"
        self.log = folder / "log.txt"
        self.environment = environment
        self.one_ray = one_ray
        self.cwd = cwd
        self.command = ["-m", "ddsweep"] if spread_s is None else ["-c", HASTY.format(spread_s=spread_s)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *settings: str) -> Driver:
        joined = ["--address", self.one_ray.address] if self.one_ray else []
        results = str(self.folder / "results")
        return self.start_command("run", str(self.file), *settings, "--results", results, *joined)

    def start_command(self, *words: str) -> Driver:
        """Another command than the run of the sweep."""
        variables = self.one_ray.variables if self.one_ray else {}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *self.command, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **variables},
                cwd=self.cwd,
                start_new_session=True,
            )
        return self

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=PATIENCE_S)

    def run(self) -> int:
        return self.start().wait()

    def run_here(self) -> int:
        """In the test's own process, which takes seconds less: for a run that nobody kills."""
        assert self.one_ray is not None
        done = self.one_ray("run", self.file, "--results", self.folder / "results")
        with self.log.open("a") as log:
            log.write(done.stdout + done.stderr)
        return done.returncode

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """As `timeout`, systemd, containers and terminals do: also to all that it has started."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def until(self, what: Callable[[], Any], description: str) -> Any:
        """Wait until ``what`` is true while the driver runs, and return it."""
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while not (found := what()):
            assert self.process.poll() is None, (
                f"the driver ended before {description}:\n{self.log.read_text()}"
            )
            assert time.monotonic() < deadline, f"never {description}:\n{self.log.read_text()}"
            time.sleep(0.02)
        return found

    def checkpoint_of_a_running_trial(self) -> Path | None:
        for path in self.results.glob("artifacts/*/checkpoint.safetensors"):
            if not (path.parent / "distilled.safetensors").exists():
                return path
        return None

    def workers(self, title: str) -> list[int]:
        """Processes of Ray whose title (as Ray sets it) begins with ``title``."""
        assert self.process is not None
        above = self.one_ray.pid if self.one_ray else self.process.pid
        return [pid for pid in descendants(above) if command_line(pid).startswith(title)]

    def tables(self) -> dict[str, pd.DataFrame]:
        return science(self.results)

    def kill_everything(self) -> None:
        if self.process is not None and self.process.poll() is None:
            for pid in [*descendants(self.process.pid), self.process.pid]:
                kill(pid)
            self.process.wait()


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def until_ended(pids: list[int], *titles: str) -> None:
    """Wait until none of ``pids`` is a process whose title begins with one of ``titles`` any more."""
    deadline = time.monotonic() + PATIENCE_S
    while left := [line for pid in pids if (line := command_line(pid)).startswith(titles)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
