"""The cost estimate: one value by hand, and that more work never costs less."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ddsweep.catalog import (
    BASELINES,
    DATASETS,
    DatasetSpec,
    EvaluationSpec,
    Protocol,
    TrialSpec,
    measure_of,
)
from ddsweep.catalog.survey import Survey
from ddsweep.core.execution import choose_plan
from ddsweep.core.networks import build_network
from ddsweep.cost import (
    CPU_GFLOPS_PER_THREAD,
    REAL_AT_ONCE_GPU,
    SECONDS_PER_INNER_STEP,
    STORE_AT_MOST,
    choose_memory,
    estimate,
    evaluation_seconds,
    matched_at_a_time,
    protocol_seconds,
    real_at_once_gpu,
)
from ddsweep.spec.model import ResourcesSpec
from ddsweep.verbs.inputs import estimates_of

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


def test_trials_are_dealt_out_by_the_cost_of_their_memory_mode() -> None:
    long = replace(TRIAL, inner_epochs=400)
    found = estimates_of([TRIAL, long], ResourcesSpec(memory_mode="recompute"), {}, lambda trial: 2)
    for trial in (TRIAL, long):
        mode, segment = choose_memory(trial, "recompute", None)
        assert found[trial.trial_id] == estimate(trial, 2, memory_mode=mode, segment=segment)
        assert found[trial.trial_id].seconds_cpu > estimate(trial, 2).seconds_cpu


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
    point, step = 4 * 4 * 61_706, 4 * 4 * 10 * outputs * 2
    assert cost.memory_bytes == 6 * (2 * point + step) + 3 * point + 4 * 100 * 28**2


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
    store, recompute = estimate(long, 1), estimate(long, 1, memory_mode="recompute", segment=10)
    assert recompute.flops > store.flops
    assert recompute.memory_bytes < store.memory_bytes


def test_trials_together_share_what_starts_kernels() -> None:
    alone, shared = estimate(TRIAL, 1), estimate(TRIAL, 1, together=8)
    assert alone.seconds_cpu - shared.seconds_cpu == pytest.approx(7 / 8 * 10 * 6 * SECONDS_PER_INNER_STEP)
    assert (shared.flops, shared.memory_bytes) == (alone.flops, alone.memory_bytes)


@pytest.mark.parametrize(("network", "side"), [("lenet", 28), ("alexcifarnet", 32)])
def test_a_gpu_takes_many_real_images_at_a_time(network: str, side: int) -> None:
    """Those of all networks, if their derivatives are written out, as `choose_plan` has it."""
    shape = (1 if side == 28 else 3, side, side)
    trial = replace(TRIAL, dataset=DATASETS["mnist" if side == 28 else "cifar10"], network=network)
    trial = replace(trial, real_batch=2000)
    module = build_network(trial.network_spec, shape, 10)
    plan = choose_plan(torch.device("cuda"), 1, module)
    assert plan.real_chunk == REAL_AT_ONCE_GPU
    together = trial.models_per_step if plan.real_batching == "explicit" else 1
    found = estimate(trial, 1, real_at_once=real_at_once_gpu(trial))
    more = found.memory_bytes - estimate(trial, 1).memory_bytes
    outputs = measure_of(trial.network_spec, shape, 10).outputs
    assert more == together * 1024 * outputs * 2 * 4


def test_threads_and_dtype() -> None:
    assert estimate(TRIAL, 2).seconds_cpu < estimate(TRIAL, 1).seconds_cpu
    assert estimate(TRIAL, 2).flops == estimate(TRIAL, 1).flops
    assert estimate(replace(TRIAL, dtype="float64"), 1).memory_bytes == 2 * estimate(TRIAL, 1).memory_bytes
    with pytest.raises(ValueError, match="threads"):
        estimate(TRIAL, 0)


def test_a_segment_takes_less_memory_than_either_extreme() -> None:
    long = replace(TRIAL, inner_epochs=150)
    mode, segment = choose_memory(long, "recompute")
    assert (mode, 1 < segment < long.steps) == ("recompute", True)

    def memory(k: int) -> int:
        return estimate(long, 1, memory_mode=mode, segment=k).memory_bytes

    # A whole number of segments: neighbours may do a little better.
    assert memory(segment) < 1.02 * min(memory(k) for k in range(1, 301))


def test_memory_mode_auto_recomputes_only_what_would_not_fit() -> None:
    assert choose_memory(TRIAL) == ("store", 1)
    huge = replace(TRIAL, dataset=DATASETS["cifar10"], network="alexcifarnet", inner_epochs=150)
    assert estimate(huge, 1).memory_bytes > STORE_AT_MOST
    assert choose_memory(huge)[0] == "recompute"
    assert choose_memory(huge, "store", 7) == ("store", 1)
    assert choose_memory(huge, "recompute", 7) == ("recompute", 7)


def test_a_window_keeps_the_steps_that_are_in_it() -> None:
    long = replace(TRIAL, inner_epochs=3000)
    assert long.window is None and choose_memory(long)[0] == "recompute"
    assert choose_memory(replace(long, window=20)) == ("store", 1)


def test_the_training_under_a_protocol_by_hand() -> None:
    """20 networks, 10 at a time, go 301 times through 20 images, 3 minibatches each time."""
    protocol = Protocol(name="field", inner_lr=0.01, inner_epochs=301, inner_batch=8)
    asked = EvaluationSpec(networks=20, group_size=10, protocols=("as_distilled", protocol))
    flops = measure_of(TRIAL.network_spec, TRIAL.dataset.shape, 10).flops
    expected = 20 * 301 * 20 * 3 * flops / (CPU_GFLOPS_PER_THREAD * 1e9 * 2)
    expected += 2 * 301 * 3 * SECONDS_PER_INNER_STEP
    assert protocol_seconds(TRIAL, asked, protocol, 2) == pytest.approx(expected)
    impossible = Protocol(order="shuffled")
    single = replace(TRIAL, inner_steps=1)
    assert protocol_seconds(single, replace(asked, protocols=(impossible,)), impossible, 2) == 0


def test_real_images_of_matching_take_memory_a_few_at_a_time() -> None:
    spec = TrialSpec(
        DATASETS["cifar10"], network="convnet(depth=3,width=128)", method="distribution_matching"
    )
    few, many = (estimate(replace(spec, real_per_class=count), 1).memory_bytes for count in (64, 128))
    assert matched_at_a_time(spec) < 64 * 10
    assert many - few == 4 * 64 * 10 * 3 * 32 * 32, "the images themselves"


def test_groups_of_held_out_networks_are_whole() -> None:
    """All networks of a group are trained, for the same bits, however few are wanted."""
    protocol = Protocol(inner_lr=0.01, inner_epochs=1000)

    def seconds(trial: TrialSpec, networks: int) -> float:
        asked = EvaluationSpec(networks=networks, group_size=16, protocols=("as_distilled", protocol))
        return protocol_seconds(trial, asked, protocol, 1)

    assert seconds(TRIAL, 1) == seconds(TRIAL, 16) < seconds(TRIAL, 17) == seconds(TRIAL, 32)
    known = replace(TRIAL, init="fixed")
    overhead = 2 * 1000 * SECONDS_PER_INNER_STEP
    assert (seconds(TRIAL, 16) - overhead) / 16 == pytest.approx(seconds(known, 16) - overhead)


def test_a_real_batch_has_no_more_images_than_there_are() -> None:
    survey = Survey("", "", (), (100, 50, 2), (9, 9, 9), (1, 28, 28))
    few = replace(TRIAL, dataset=replace(DATASETS["mnist"], survey=survey), real_batch=1024)
    all_of_them = replace(TRIAL, real_batch=90 + 45 + 1)
    assert estimate(few, 1) == estimate(all_of_them, 1)
    assert estimate(replace(few, real_batch=8), 1) == estimate(replace(TRIAL, real_batch=8), 1)


def test_of_the_catalog_too_no_more_real_images_are_taken_than_there_are() -> None:
    digits = replace(TRIAL, dataset=DATASETS["digits"], network="convnet(width=8)", real_batch=10**6)
    assert estimate(digits, 1) == estimate(replace(digits, real_batch=10 * (143 - 14)), 1)
    matching = replace(digits, method="distribution_matching", real_per_class=10**6)
    assert estimate(matching, 1) == estimate(replace(matching, real_per_class=143 - 14), 1)
    for spec in DATASETS.values():
        size, network = ("alexnet", 224) if spec.shape[1] == 224 else ("convnet", 0)
        own = TrialSpec(spec, network=size if network else "convnet(width=8)", real_batch=10**6)
        assert estimate(own, 1) == estimate(replace(own, real_batch=10**5), 1), "it is known how many it has"


def test_of_data_that_nobody_has_looked_at_all_that_is_asked_for_is_taken() -> None:
    unknown = DatasetSpec("mine", "folder", (1, 8, 8), 3, ("a", "b", "c"), path="mine")
    own = TrialSpec(unknown, network="convnet(width=8)", real_batch=1024)
    assert estimate(own, 1).flops > 7 * estimate(replace(own, real_batch=128), 1).flops


def test_steps_beyond_the_epochs_are_counted() -> None:
    asked = EvaluationSpec(networks=4, group_size=4, baselines=())
    beyond = replace(asked, inner_steps_beyond=(600,))  # 100 times as many as the trial has
    more = evaluation_seconds([TRIAL], beyond, 1) - evaluation_seconds([TRIAL], asked, 1)
    flops = measure_of(TRIAL.network_spec, TRIAL.dataset.shape, 10).flops
    passes = 297 * 20 * 3 + 10_000 * 0.4
    expected = 4 * passes * flops / (CPU_GFLOPS_PER_THREAD * 1e9) + 594 * SECONDS_PER_INNER_STEP / 3
    assert more == pytest.approx(expected)


def test_an_evaluation_costs_what_its_passes_cost() -> None:
    """By hand: 4 networks in one group, tested after 0, 1, 2 and 3 epochs, without baselines."""
    asked = EvaluationSpec(networks=4, group_size=4, baselines=())
    flops = measure_of(TRIAL.network_spec, TRIAL.dataset.shape, 10).flops
    passes = 3 * 20 * 3 + 4 * 10_000 * 0.4  # 3 epochs of 20 images, there and back; tests
    expected = 4 * passes * flops / (CPU_GFLOPS_PER_THREAD * 1e9) + 6 * SECONDS_PER_INNER_STEP / 3
    assert evaluation_seconds([TRIAL], asked, 1) == pytest.approx(expected)
    both = [TRIAL, replace(TRIAL, outer_lr=0.5)]
    assert evaluation_seconds(both, asked, 1) == pytest.approx(2 * expected)


def test_baselines_count_once_for_trials_that_share_them() -> None:
    asked, none = EvaluationSpec(networks=4), EvaluationSpec(networks=4, baselines=())
    other = replace(TRIAL, outer_lr=0.5)

    def of_baselines(*trials: TrialSpec) -> float:
        return evaluation_seconds(trials, asked, 1) - evaluation_seconds(trials, none, 1)

    assert of_baselines(TRIAL, other) == pytest.approx(of_baselines(TRIAL)) and of_baselines(TRIAL) > 0
    matched = TrialSpec(
        DATASETS["mnist"], network="lenet", method="distribution_matching", images_per_class=2, inner_steps=2,
        inner_epochs=3,
    )  # fmt: skip
    assert of_baselines(TRIAL, matched) == pytest.approx(of_baselines(TRIAL))
    assert of_baselines(TRIAL, replace(TRIAL, images_per_class=4)) > 1.5 * of_baselines(TRIAL)


@pytest.mark.parametrize(
    "more",
    [
        {"networks": 40},
        {"inner_steps_beyond": (20,)},
        {"baselines": BASELINES},
        {"rates": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)},
        {"protocols": ("as_distilled", Protocol(inner_epochs=50, inner_lr=0.1))},
    ],
)
def test_more_to_judge_costs_more(more: dict[str, Any]) -> None:
    asked = EvaluationSpec(networks=16)
    assert evaluation_seconds([TRIAL], replace(asked, **more), 1) > evaluation_seconds([TRIAL], asked, 1)


def test_a_set_without_learned_rates_is_judged_twice() -> None:
    """At the tuned number of steps as well, here up to 100 in place of 1."""
    one = {"network": "lenet", "images_per_class": 10, "inner_steps": 1, "inner_epochs": 1}
    asked = EvaluationSpec(networks=16, baselines=())
    learned = TrialSpec(DATASETS["mnist"], **one)
    matched = TrialSpec(DATASETS["mnist"], method="distribution_matching", **one)
    assert evaluation_seconds([matched], asked, 1) > 3 * evaluation_seconds([learned], asked, 1)
