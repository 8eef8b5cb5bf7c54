"""Real disks that are small, so that they can be full."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAME = "ddsweep-test-"
"""What the table of mounts calls such a disk, before the number of the process that made it."""


@contextmanager
def small_disk(kilobytes: int) -> Iterator[Path]:
    """A file system of that size, in a folder of its own. Skips the test where this user may not make one.

    It is not below pytest's temporary folders: tests that are killed leave it mounted, and pytest, which
    cannot remove such a folder, would end its next run with an error. The next call here unmounts it.
    """
    _unmount_those_of_dead_processes()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount on PATH")
    folder = Path(tempfile.mkdtemp(prefix=NAME))
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", f"{NAME}{os.getpid()}", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("making a small file system takes more rights than there are")
    try:
        yield folder
    finally:
        _unmount(folder)


def enlarge(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """The file that takes all the space there is."""
    path = disk / "full"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            pass
    return path


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def _unmount_those_of_dead_processes() -> None:
    mounts = Path("/proc/self/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        device, folder = line.split()[:2]
        owner = device.removeprefix(NAME)
        if device != owner and not Path("/proc", owner).exists():
            _unmount(Path(folder))
