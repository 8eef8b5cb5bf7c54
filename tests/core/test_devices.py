"""Every tensor of the engine is on the device that the networks are on, shown without a GPU.

tests/gpu has the tests, and a device that does the arithmetic of the CPU but refuses tensors of two devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # torch takes one kind of accelerator at a time


def on_pretended_device(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: a device once known to torch stays."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **NO_GPU, "DDSWEEP_TEST_DEVICE": "pretended"},
        check=False,
    )


OFTEN = "a_few_outer_steps or test_step or test_pretended or accuracies_on_the_device and lenet"


def test_outer_steps_and_test_passes_mix_no_devices() -> None:
    done = on_pretended_device("-k", OFTEN)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


@pytest.mark.slow
def test_nothing_else_that_the_engine_does_mixes_devices() -> None:
    done = on_pretended_device("-k", f"not ({OFTEN})")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout
