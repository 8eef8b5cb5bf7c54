"""Rows and folders that the tests of the results room share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import write_part
from ddsweep.results.schemas import EVALS, HISTORY, TRIALS


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDirectory:
    directory = SweepDirectory(tmp_path / "a sweep")
    directory.create()
    return directory


def write_trial(sweep: SweepDirectory, trial_id: str, accuracy: float = 0.5) -> None:
    """One small trial in three tables, its evals in two groups."""
    tmp = sweep.temporary
    row: dict[str, Any] = {"trial_id": trial_id, "inner_steps": 2, "seed": 3, "test_accuracy_mean": accuracy}
    row["in_sweep"] = True
    write_part(sweep.trials_part(trial_id), [row], TRIALS, tmp)
    for group in (0, 1):
        rows = [
            {
                **{"trial_id": trial_id, "source": "distilled", "protocol": "as_distilled", "group": group},
                **{"model_seed": 16 * group + i, "inner_step": 4, "accuracy": accuracy, "diverged": False},
            }
            for i in range(3)
        ]
        path = sweep.evals_part(trial_id, "as_distilled", "xavier", group)
        write_part(path, rows, EVALS, tmp, {"evaluation_id": "abc"})
    history = [{"trial_id": trial_id, "outer_step": step, "outer_loss": 1.0 / step} for step in (1, 2)]
    write_part(sweep.history_part(trial_id), history, HISTORY, tmp)


@pytest.fixture
def run_python() -> Callable[..., subprocess.Popen[str]]:
    """Start a Python process on ``code`` with arguments; its output is piped."""

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start
