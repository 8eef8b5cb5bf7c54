"""A Slurm that answers what a test writes down, and what a launch leaves in its folder."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ddsweep.launch.folder import Job, Launch, LaunchFolder, new_folder
from ddsweep.launch.site import Site
from ddsweep.machine import versions
from ddsweep.results.layout import SweepDirectory

# Prints <command>.out and <command>.err, ends with the code in <command>.code, and records its arguments.
PROGRAM = """#!/bin/sh
here=$(dirname "$0")
name=$(basename "$0")
echo "$name $*" >> "$here/asked"
cat "$here/$name.err" >&2 2> /dev/null
cat "$here/$name.out" 2> /dev/null
exit $(cat "$here/$name.code" 2> /dev/null || echo 0)
"""


@dataclass(frozen=True)
class FakeSlurm:
    """Slurm's commands with the answers that a test has set."""

    folder: Path

    def says(self, command: str, out: str = "", *, error: str = "", code: int = 0) -> None:
        program = self.folder / command
        program.write_text(PROGRAM)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        for suffix, text in (("out", out), ("err", error), ("code", str(code))):
            self.folder.joinpath(f"{command}.{suffix}").write_text(text)

    def asked(self, command: str = "") -> list[str]:
        path = self.folder / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(command)]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """First on the PATH, which has the system's programs besides, but no real Slurm."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin")
    fake = FakeSlurm(folder)
    for command in ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel"):
        fake.says(command)
    fake.says("sinfo", "main|up\nold|down\n")
    return fake


def make_site(**keys: object) -> Site:
    return Site.model_validate({"scheduler": "slurm", "cpus_per_node": 4, **keys})


def make_launch(directory: SweepDirectory, site: Site, *jobs: Job, mode: str = "array") -> LaunchFolder:
    """A launch as if these jobs had been submitted."""
    folder = new_folder(directory, mode)
    make_record(directory, site, *jobs, mode=mode).write(folder)
    return folder


def make_record(directory: SweepDirectory, site: Site, *jobs: Job, mode: str = "array") -> Launch:
    return Launch(
        mode=mode,
        sweep=directory.root.name,
        site=site.model_dump(),
        site_file="slurm/mine.yaml",
        results=str(directory.root.parent),
        data_root=None,
        created="2026-01-01T00:00:00Z",
        versions=versions(),
        jobs=jobs,
    )


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back the handlers of signals that a job sets."""
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    found = SweepDirectory(tmp_path / "results" / "small")
    found.create()
    return found
