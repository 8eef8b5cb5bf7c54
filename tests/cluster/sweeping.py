"""Sweeps that are launched on the test cluster. They must give the same results as on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

import ddsweep
from tests.cluster.machines import Lab
from tests.conftest import PATIENCE_S
from tests.science import assert_same_science

SITE = Path(__file__).parent / "fake_gpus.yaml"
ROOT = Path(__file__).parents[2]


def ddsweep_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ddsweep", *map(str, arguments)]


@dataclass
class Launched:
    """One sweep under ``results``, launched as often as the test likes."""

    lab: Lab
    results: Path
    file: Path
    settings: Sequence[str] = ()
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.file.stem

    @property
    def folder(self) -> Path:
        return self.results / self.name

    def launch(self, *more: object) -> subprocess.CompletedProcess[str]:
        """``ddsweep launch`` to its end, which without --wait is the submission."""
        return self.run(*self.words(*more))

    def words(self, *more: object) -> list[object]:
        return ["launch", self.file, "--site", SITE, "--results", self.results, *self.settings, *more]

    def run(self, *arguments: object, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ddsweep_command(*arguments),
            cwd=ROOT,
            env=self.lab.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def wait(self, condition: object, what: str, seconds: float = PATIENCE_S) -> float:
        """Seconds until ``condition()``; with the logs in the message if it never comes true."""
        begun = time.monotonic()
        try:
            self.lab.wait(condition, what, seconds, every=0.5)  # type: ignore[arg-type]
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        return time.monotonic() - begun

    def wait_until_over(self, seconds: float = PATIENCE_S) -> None:
        self.wait(lambda: not self.lab.jobs(), "the launch is over", seconds)

    def logs(self, lines: int = 60) -> str:
        return self.run("logs", self.folder, "--lines", lines).stdout

    def log_of(self, text: str) -> list[str]:
        return [
            line
            for path in sorted(self.folder.glob("jobs/*/logs/*.out"))
            for line in _lines(path)
            if text in line
        ]

    # --- what must be so

    def assert_complete(self, alone: Path) -> None:
        """Every row that one machine made, once, with the same values and images, and nothing besides."""
        assert_same_science(self.folder, alone, exact=False)

    def assert_nothing_runs(self, *, lost: str | None = None) -> None:
        """No processes on any node, and no folder of Ray on those that were not lost."""
        for node in self.lab.nodes:
            left = [command for _, command in self.lab.processes(node)]
            assert not left, (node, left)
            there = self.lab.exec(node, "ls", "/tmp").stdout.split()
            leftovers = [name for name in there if name in self.temporary_names()]
            assert node == lost or not leftovers, (node, leftovers)

    def temporary_names(self) -> set[str]:
        """The folders of this sweep's jobs on a node; a lost node keeps those of others."""
        jobs = [run.name.partition(".")[0] for run in self.folder.glob("jobs/*/runs/*")]
        return {f"dds{job.replace('_', '-')}" for job in jobs}

    def hosts(self) -> tuple[set[str], set[str]]:
        """The nodes that distilled and those that evaluated."""
        distilled = set(ddsweep.load_results(self.folder).trials["host"])
        parts = self.folder.glob("evals/*.parquet")
        evaluated = {pq.read_schema(part).metadata[b"host"].decode() for part in parts}
        return distilled, evaluated


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def run_alone(folder: Path, file: Path, settings: Sequence[str]) -> Path:
    """The same sweep on one machine, with the same execution plan."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))
    }
    done = subprocess.run(
        ddsweep_command(
            "run", file, "--results", folder, *settings, "resources.device=cpu", "resources.gpus=0"
        ),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder / file.stem
