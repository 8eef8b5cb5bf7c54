"""The static rule by which a trial is computed."""

from __future__ import annotations

import pytest
import torch

from ddsweep.catalog import parse_network
from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.networks import build_network

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("network", "shape", "device", "way", "networks_at_once"),
    [
        ("lenet", (1, 28, 28), CPU, "explicit", 4),
        ("convnet", (3, 32, 32), CPU, "explicit", 4),
        ("alexcifarnet", (3, 32, 32), CPU, "loop", 1),
        ("lenet", (1, 28, 28), CUDA, "explicit", 2**31),
        ("alexcifarnet", (3, 32, 32), CUDA, "vmap", 2**31),
    ],
)
def test_how_networks_are_computed(network, shape, device, way, networks_at_once) -> None:
    module = build_network(parse_network(network, shape), shape, 10)
    plan = choose_plan(device, 2, module, "recompute", 5)
    assert (plan.inner_batching, plan.real_batching, plan.real_block) == (way, way, networks_at_once)
    assert (plan.device, plan.threads, plan.memory_mode, plan.segment) == (device.type, 2, "recompute", 5)
    assert ExecutionPlan.from_dict(plan.to_dict()) == plan


def test_a_plan_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_mode: 'forget' is not one of store, recompute"):
        ExecutionPlan(memory_mode="forget")
    with pytest.raises(ValueError, match="real_batching: 'compiled' is not one of explicit, vmap, loop"):
        ExecutionPlan(real_batching="compiled")
