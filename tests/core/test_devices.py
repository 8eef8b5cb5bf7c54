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


OFTEN = "few_outer_steps or training_on_real"


def test_outer_steps_and_evaluations_mix_no_devices() -> None:
    done = on_pretended_device("-k", OFTEN)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_network_nor_plan_nor_trial_mixes_devices() -> None:
    done = on_pretended_device("-k", f"not ({OFTEN})", "--timeout=600")
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


def test_the_pretended_device_refuses_tensors_of_two_devices() -> None:
    script = """
import torch
from tests.gpu.pretended import PretendedDevice, register

register()
with PretendedDevice():
    there = torch.ones(2, 3, device="pretended")
    weights = torch.full((3,), 2.0).to(there.device).requires_grad_()
    (gradient,) = torch.autograd.grad((there @ weights).sum(), weights)
    assert gradient.device == there.device and gradient.tolist() == [2.0, 2.0, 2.0]
    there[0] = 5
    assert there.sum().item() == 18 and (there * torch.tensor(2.0)).device == there.device
    generator = torch.Generator().manual_seed(0)
    for refused in (
        lambda: there + torch.ones(3),
        lambda: there[torch.zeros(1, 3, dtype=torch.bool)],
        lambda: there @ torch.ones(3),
        lambda: torch.cat([there, torch.ones(1, 3)]),
        lambda: there.normal_(generator=generator),
        lambda: torch.randn(2, generator=generator, device="pretended"),
        lambda: there.numpy(),
    ):
        try:
            refused()
        except (RuntimeError, TypeError):
            continue
        raise AssertionError("not refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **NO_GPU},
        check=False,
    )
    assert done.returncode == 0, done.stderr
