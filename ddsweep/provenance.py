"""The provenance of results: versions, commit, host, and what the process used."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import time
import weakref
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch

import ddsweep

__all__ = ["Meter", "device_name", "environment", "utc_now"]


def utc_now() -> datetime:
    return datetime.now(UTC)


@functools.cache
def environment() -> dict[str, Any]:
    """Columns of the ``trials`` table that are the same for all that this process computes.

    ``git_commit`` is that of the checkout the package runs from; null when it is installed elsewhere.
    """
    commit, dirty = _git()
    return {
        "host": platform.node(),
        "ddsweep_version": ddsweep.__version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "ray_version": _version("ray"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    package = Path(__file__).resolve().parent
    if not (package.parent / ".git").exists():
        return None, None
    try:
        commit = _run_git(package, "rev-parse", "HEAD")
        return commit, bool(_run_git(package, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _run_git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


@functools.cache
def device_name(device: str) -> str:
    """The marketing name of the processor or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@dataclass(eq=False)
class Meter:
    """Seconds and peak memory of one trial, also when its process has done other trials before.

    ``wall``, ``cpu`` and ``peak`` are those of earlier runs of the same trial. ``seconds_of_others`` is the
    part of the wall time in which its device worked on the trials beside it.
    """

    device: str
    wall: float = 0.0
    cpu: float = 0.0
    peak: int | None = None
    seconds_of_others: float = 0.0
    _cpu_of_others: float = 0.0
    _wall_start: float = field(default_factory=time.monotonic)
    _cpu_start: float = field(default_factory=time.process_time)
    _resettable: bool = False
    _running: ClassVar[weakref.WeakSet[Meter]] = weakref.WeakSet()

    def __post_init__(self) -> None:
        for other in list(self._running):  # their peaks so far are lost with the reset
            other.peak = other.peak_memory_bytes()
        self._running.add(self)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux: 5 resets the peak resident size of the process, which otherwise spans its life.
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                self._resettable = True
            except OSError:
                self._resettable = False

    def wall_seconds(self) -> float:
        """Wall time of the trial."""
        return self.wall + time.monotonic() - self._wall_start

    def cpu_seconds(self) -> float:
        """CPU time of the trial: that of the process without the shares `of_others`."""
        return self.cpu + time.process_time() - self._cpu_start - self._cpu_of_others

    def of_others(self, cpu: float, wall: float) -> None:
        """So many seconds of the process belong to other trials, which are distilled beside this one."""
        self._cpu_of_others += cpu
        self.seconds_of_others += wall

    def peak_memory_bytes(self) -> int | None:
        """Peak memory of the trial: allocated on the GPU, or resident on the CPU (null if the system cannot
        reset its count)."""
        now = self._peak_now()
        return now if self.peak is None or now is None else max(now, self.peak)

    def _peak_now(self) -> int | None:
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        if not self._resettable:
            return None
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
