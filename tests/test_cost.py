"""The cost estimate: one value by hand, and that more work never costs less."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.cost import CPU_GFLOPS_PER_THREAD, SECONDS_PER_INNER_STEP, estimate

TRIAL = TrialSpec(
    DATASETS["mnist"],
    network="lenet",
    images_per_class=2,
    inner_steps=2,
    inner_epochs=3,
    outer_steps=10,
    models_per_step=4,
    real_batch=100,
)


def test_value_by_hand() -> None:
    # LeNet at 28 pixels: two operations per multiply-add of two convolutions and three linear layers.
    forward = 2 * (6 * 25 * 28**2 + 16 * 6 * 25 * 10**2 + 400 * 120 + 120 * 84 + 84 * 10)
    assert forward == 833_040
    flops = 10 * 4 * (6 * 10 * 9 + 100 * 3) * forward
    outputs = 6 * 28**2 + 16 * 10**2 + 120 + 84 + 10
    cost = estimate(TRIAL, threads=2)
    assert cost.flops == flops
    assert cost.seconds_cpu == pytest.approx(
        flops / (2e9 * CPU_GFLOPS_PER_THREAD) + 10 * 6 * SECONDS_PER_INNER_STEP
    )
    assert cost.memory_bytes == 4 * (4 * 8 * 61_706 + 4 * (100 + 6 * 10) * outputs * 3)


@pytest.mark.parametrize(
    "more",
    [
        {"outer_steps": 20},
        {"inner_epochs": 4},
        {"models_per_step": 5},
        {"real_batch": 200},
        {"images_per_class": 4},
        {"images_per_class": 4, "inner_steps": 4},
        {"dataset": DATASETS["cifar10"]},
        {"dataset": DATASETS["cifar10"], "network": "alexcifarnet"},
    ],
)
def test_more_work_costs_more(more: dict[str, object]) -> None:
    less, bigger = estimate(TRIAL, 1), estimate(replace(TRIAL, **more), 1)  # type: ignore[arg-type]
    assert bigger.flops > less.flops
    assert bigger.seconds_cpu > less.seconds_cpu
    assert bigger.memory_bytes >= less.memory_bytes


def test_recompute_trades_time_for_memory() -> None:
    long = replace(TRIAL, inner_epochs=100)
    store, recompute = estimate(long, 1), estimate(long, 1, recompute=True)
    assert recompute.flops > store.flops
    assert recompute.memory_bytes < store.memory_bytes


def test_threads_and_dtype() -> None:
    assert estimate(TRIAL, 2).seconds_cpu < estimate(TRIAL, 1).seconds_cpu
    assert estimate(TRIAL, 2).flops == estimate(TRIAL, 1).flops
    assert estimate(replace(TRIAL, dtype="float64"), 1).memory_bytes == 2 * estimate(TRIAL, 1).memory_bytes
    with pytest.raises(ValueError, match="threads"):
        estimate(TRIAL, 0)
