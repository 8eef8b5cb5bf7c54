"""The static rule by which a trial is computed."""

from __future__ import annotations

import pytest
import torch

from ddsweep.catalog import parse_network
from ddsweep.core.execution import ExecutionPlan, choose_plan, more_frugal, smaller_test
from ddsweep.core.memory import is_out_of_memory, keep_to_share
from ddsweep.core.networks import build_network

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("network", "shape", "device", "ways", "networks_at_once"),
    [
        ("lenet", (1, 28, 28), CPU, ("explicit", "explicit"), 4),
        ("convnet", (3, 32, 32), CPU, ("explicit", "explicit"), 4),
        ("alexcifarnet", (3, 32, 32), CPU, ("loop", "loop"), 1),
        ("lenet", (1, 28, 28), CUDA, ("explicit", "explicit"), 2**31),
        ("alexcifarnet", (3, 32, 32), CUDA, ("vmap", "loop"), 2**31),
    ],
)
def test_how_networks_are_computed(network, shape, device, ways, networks_at_once) -> None:
    module = build_network(parse_network(network, shape), shape, 10)
    plan = choose_plan(device, 2, module)
    assert (plan.inner_batching, plan.real_batching, plan.real_block) == (*ways, networks_at_once)
    assert choose_plan(device, 2, module, graph=True).graph == (device == CUDA) and not plan.graph
    assert (plan.device, plan.threads) == (device.type, 2)
    assert plan.teams == (2 if device == CPU else 1)
    assert ExecutionPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(("networks", "images"), [(1, 128), (2, 64), (3, 32), (4, 32), (8, 32)])
def test_few_networks_see_more_real_images_at_a_time(networks: int, images: int) -> None:
    lenet = build_network(parse_network("lenet", (1, 28, 28)), (1, 28, 28), 10)
    assert choose_plan(CPU, 1, lenet, networks=networks).real_chunk == images
    for native, at_once in ((True, 256), (False, 32)):
        plan = choose_plan(CPU, 1, lenet, native=native)
        assert (plan.native, plan.test_chunk) == (native, at_once), "evaluation: rows depend on it"


def test_plans_of_old_checkpoints_are_what_they_were() -> None:
    """Test passes took as many images at a time as outer steps, and were not compiled."""
    values = ExecutionPlan(real_chunk=1024).to_dict()
    del values["test_chunk"], values["native"]
    plan = ExecutionPlan.from_dict(values)
    assert (plan.test_chunk, plan.native) == (1024, False)


def test_a_plan_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_mode: 'forget' is not one of store, recompute"):
        ExecutionPlan(memory_mode="forget")
    with pytest.raises(ValueError, match="real_batching: 'compiled' is not one of explicit, vmap, loop"):
        ExecutionPlan(real_batching="compiled")


def ladder(step, plan: ExecutionPlan) -> list[ExecutionPlan]:
    plans = []
    while (plan := step(plan)) is not None:
        plans.append(plan)
    return plans


def test_ever_more_frugal_plans_for_outer_steps() -> None:
    """The plan of a GPU: all 5 networks at once, and real batches of 100 images."""
    plan = ExecutionPlan("cuda", 1, "store", "vmap", "vmap", 1024, 2**31)
    plans = ladder(lambda plan: more_frugal(plan, 4, 5, 100), plan)
    assert [(p.memory_mode, p.segment) for p in plans] == [("recompute", 4)] * 7
    assert [p.real_chunk for p in plans] == [1024, 50, 25, 12, 8, 8, 8], "from the batch, not from 1024"
    assert [p.real_block for p in plans] == [2**31] * 5 + [2, 1]
    assert all(p.test_block == plan.test_block and p.inner_batching == "vmap" for p in plans)


def test_a_segment_of_ones_own_gives_way_to_that_of_the_least_memory() -> None:
    plan = ExecutionPlan(memory_mode="recompute", segment=30, real_chunk=8, threads=2, teams=2)
    plans = ladder(lambda plan: more_frugal(plan, 4, 1, 100), plan)
    assert [(p.segment, p.teams) for p in plans] == [(4, 2), (4, 1)]


def test_ever_smaller_test_passes() -> None:
    plan = ExecutionPlan("cuda", test_chunk=1024, test_block=2**31)
    plans = ladder(lambda plan: smaller_test(plan, 4, 30), plan)
    assert [(p.test_chunk, p.test_block) for p in plans] == [(15, 2**31), (8, 2**31), (8, 2), (8, 1)]
    assert {p.memory_mode for p in plans} == {"store"}


def test_want_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)  # four petabytes: the real thing
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(caught.value) and not is_out_of_memory(ValueError("out of memory"))


def test_the_share_of_a_gpu_is_set_anew_for_each_trial_and_never_without_one(monkeypatch) -> None:
    said: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", said.append)
    for device, gpus in (("cuda", 0.25), ("cpu", 0.5), ("cuda", 2), ("cuda", 0.5), ("cuda", 0)):
        keep_to_share(device, gpus)
    assert said == [0.25, 1.0, 0.5, 1.0]
