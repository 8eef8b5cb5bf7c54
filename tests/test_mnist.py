"""The short MNIST sweeps reach what their headers promise. Half an hour on two cores: `make test-full`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ddsweep

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("sweep", "least", "models"), [("mnist_fixed_short", 0.90, 1), ("mnist_random_short", 0.70, 64)]
)
def test_a_short_sweep_reaches_its_number(
    sweep: str, least: float, models: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    data = Path(os.environ.get("DDSWEEP_DATA") or BESIDE)
    assert (data / "MNIST").is_dir(), "set DDSWEEP_DATA to a folder with MNIST (ddsweep data fetch mnist)"
    command = [
        "run",
        str(ROOT / "sweeps" / f"{sweep}.yaml"),
        "--results",
        str(tmp_path),
        "--data-root",
        str(data),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ddsweep", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (trial,) = ddsweep.load_results(tmp_path / sweep).trials.to_dict("records")
    assert trial["test_models"] == models
    assert trial["test_accuracy_mean"] > least
