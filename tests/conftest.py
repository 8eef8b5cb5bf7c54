"""Shared by all tests: the command line in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a user without settings of ddsweep's or Ray's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DDSWEEP_", "RAY_"))}
    return {**kept, "COLUMNS": "160"}


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to be in, with a module of the user's own for each name of the standard library."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in sys.stdlib_module_names:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('imported the {name}.py of this folder')\n")
    return folder


@pytest.fixture(scope="session")
def ddsweep(environment: dict[str, str]) -> Run:
    """``ddsweep(*arguments, cwd=...)``: run to the end; output and exit code as they come."""

    def run(*arguments: object, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ddsweep", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=280,
            cwd=cwd,
            env={**environment, **more},
            check=False,
        )

    return run
