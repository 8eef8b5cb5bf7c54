"""The pretended device is one: it has the numbers of the CPU, and refuses tensors of two devices."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.problems import DEVICE


def test_the_pretended_device_refuses_tensors_of_two_devices() -> None:
    there = torch.ones(2, 3, device=DEVICE)
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
        lambda: torch.randn(2, generator=generator, device=DEVICE),
        there.numpy,
    ):
        with pytest.raises((RuntimeError, TypeError)):
            refused()
