"""Trials that are computed together: each has the bits that it has alone, whatever is beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ddsweep  # noqa: F401  # before the first product: the math library is told to keep to one order
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.distill import gradients_together, initial_state
from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.images import RealSet
from ddsweep.core.methods import bptt
from ddsweep.core.networks import build_network
from ddsweep.core.outer import NetworkGradients
from ddsweep.core.task import Task

CASES: dict[str, dict[str, Any]] = {
    "a known LeNet": {"dataset": "mnist", "network": "lenet", "init": "fixed", "inner_epochs": 3},
    "LeNets": {"dataset": "mnist", "network": "lenet", "models_per_step": 5, "inner_epochs": 2},
    "LeNets on colours": {"dataset": "cifar10", "network": "lenet", "models_per_step": 3},
    "a known ConvNet": {"init": "fixed", "images_per_class": 2, "inner_steps": 2, "inner_epochs": 2},
    "ConvNets, Adam, soft labels": {
        **{"models_per_step": 2, "inner_optimizer": "adam", "labels": "soft", "inner_lr": 0.01},
        **{"images_per_class": 3, "inner_steps": 3},
    },
    "ConvNets without norm, momentum, shuffled": {
        **{"network": "convnet(width=8,depth=2,norm=none)", "inner_optimizer": "momentum"},
        **{"order": "shuffled", "inner_steps": 3, "images_per_class": 3, "models_per_step": 3},
    },
    "own real images for each network": {"real_batch_mode": "per_network", "models_per_step": 3},
    "one shared rate, sampled": {
        **{"inner_lr_mode": "shared", "order": "sampled", "inner_steps": 2, "images_per_class": 4},
    },
    "recomputed": {"inner_steps": 3, "images_per_class": 3, "models_per_step": 2},
    "windows": {
        "inner_epochs": 9,
        "window": 3,
        "models_per_step": 2,
        "inner_steps": 2,
        "images_per_class": 2,
    },
    "windows of a known LeNet": {
        **{"dataset": "mnist", "network": "lenet", "init": "fixed", "inner_epochs": 6, "window": 2},
        "inner_optimizer": "momentum",
    },
    "windows, Adam, soft labels, shuffled": {
        **{"inner_optimizer": "adam", "labels": "soft", "order": "shuffled", "inner_lr": 0.01},
        **{"inner_epochs": 4, "window": 3, "models_per_step": 2, "inner_steps": 3, "images_per_class": 3},
    },
    "windows, one shared rate, sampled, recomputed": {
        **{"inner_lr_mode": "shared", "order": "sampled", "inner_epochs": 3, "window": 4},
        **{"inner_steps": 2, "images_per_class": 4},
    },
    "augmented": {"inner_augment": "shift+rotate+cutout", "models_per_step": 2, "inner_epochs": 2},
    "augmented, in windows, shuffled": {
        **{
            "inner_augment": "scale",
            "order": "shuffled",
            "window": 2,
            "inner_epochs": 3,
            "models_per_step": 2,
        },
        **{"inner_steps": 2, "images_per_class": 2, "inner_optimizer": "adam", "inner_lr": 0.01},
    },
    "DSA on colours": {
        **{"dataset": "cifar10", "network": "convnet(width=4,depth=1)", "inner_augment": "dsa"},
        **{"inner_epochs": 6, "real_batch": 16},
    },
}


def task_of(case: str, seed: int, dtype: str = "float32", plan: ExecutionPlan | None = None) -> Task:
    settings = {"dataset": "digits", "network": "convnet(width=8)", "real_batch": 65} | CASES[case]
    data = DATASETS[str(settings.pop("dataset"))]
    free = {"outer_lr": 0.01 * (1 + seed), "inner_lr": settings.pop("inner_lr", 0.02) * (1 + 0.1 * seed)}
    spec = TrialSpec(data, seed=seed, dtype=dtype, **settings, **free)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (100, *data.shape), generator=generator, dtype=torch.uint8)
    channels = data.shape[0]
    real = RealSet(pixels, torch.arange(100) % data.classes, (0.5,) * channels, (0.25,) * channels)
    if plan is None:
        network = build_network(spec.network_spec, data.shape, data.classes)
        plan = choose_plan(torch.device("cpu"), 1, network, networks=spec.models_per_step)
        plan = replace(plan, real_block=min(plan.real_block, spec.models_per_step))
        if "recomputed" in case:
            plan = replace(plan, memory_mode="recompute", segment=2)
    return Task.of(spec, plan, real)


def tensors(gradients: NetworkGradients) -> list[Tensor]:
    return [gradients.losses, *gradients.by.values()]


def computed(tasks: list[Task]) -> list[list[Tensor]]:
    return [tensors(own) for own in gradients_together(tasks, [initial_state(task) for task in tasks])]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_trial_has_the_same_bits_in_any_company(case: str, dtype: str) -> None:
    tasks = [task_of(case, seed, dtype) for seed in range(5)]
    alone = [tensors(bptt.gradients(task, initial_state(task).learned, 0)) for task in tasks]
    assert all(value.isfinite().all() and value.any() for values in alone for value in values)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1], [2]):
        for number, values in zip(order, computed([tasks[number] for number in order]), strict=True):
            assert len(values) == 4 if tasks[number].spec.labels == "soft" else 2 <= len(values) <= 3
            for place, (ours, its) in enumerate(zip(values, alone[number], strict=True)):
                assert torch.equal(ours, its), (order, number, place)


def test_trials_may_be_at_different_steps() -> None:
    tasks = [task_of("LeNets", seed) for seed in range(2)]
    states = [replace(initial_state(task), step=7 * number) for number, task in enumerate(tasks)]
    for task, state, own in zip(tasks, states, gradients_together(tasks, states), strict=True):
        its = tensors(bptt.gradients(task, state.learned, state.step))
        assert all(torch.equal(a, b) for a, b in zip(tensors(own), its, strict=True))


def test_teams_of_threads_share_the_trials() -> None:
    tasks = [task_of("ConvNets, Adam, soft labels", seed) for seed in range(5)]
    in_teams = [replace(task, plan=replace(task.plan, threads=2, teams=2)) for task in tasks]
    for one, two in zip(computed(tasks), computed(in_teams), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_teams_share_trials_with_windows_and_augmentations_of_their_own() -> None:
    tasks = [task_of("augmented, in windows, shuffled", seed) for seed in range(5)]
    in_teams = [replace(task, plan=replace(task.plan, threads=2, teams=2)) for task in tasks]
    for one, two in zip(computed(tasks), computed(in_teams), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_windows_of_trials_that_are_together_lie_in_different_places() -> None:
    for case in CASES:
        if "windows" in case:
            starts = {bptt._window(task_of(case, seed).spec, 0).start for seed in range(5)}
            assert len(starts) > 1, case


def test_one_that_is_not_finite_does_not_spoil_the_others() -> None:
    tasks = [task_of("a known ConvNet", seed) for seed in range(3)]
    states = [initial_state(task) for task in tasks]
    broken = {**states[1].learned, "images": torch.full_like(states[1].learned["images"], torch.nan)}
    found = gradients_together(tasks, [states[0], replace(states[1], learned=broken), states[2]])
    assert not found[1].losses.isfinite().any()
    for number in (0, 2):
        its = tensors(bptt.gradients(tasks[number], states[number].learned, 0))
        assert all(torch.equal(a, b) for a, b in zip(tensors(found[number]), its, strict=True))


def test_missing_trials_are_computed_as_copies_up_to_the_width() -> None:
    tasks = [task_of("a known LeNet", seed) for seed in range(3)]
    wide = [replace(task, plan=replace(task.plan, width=8)) for task in tasks]
    seen: list[int] = []
    real, real_batch, drawn = bptt.outer_gradient, bptt._real_batch, []

    def noted(task: Task, step: int) -> Any:
        drawn.append((task.spec.seed, step))
        return real_batch(task, step)

    def counted(network: Any, params: Any, *more: Any, **named: Any) -> Any:
        seen.append(len(next(iter(params.values()))))
        return real(network, params, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bptt, "outer_gradient", counted)
        patch.setattr(bptt, "_real_batch", noted)
        found = computed(wide)
    assert seen == [8] and len(found) == 3
    assert drawn == [(0, 0), (1, 0), (2, 0)], "copies have the draws of what they are copies of"
    for one, two in zip(found, computed(tasks), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_several_sets_take_derivatives_that_are_written_out() -> None:
    tasks = [task_of("a known ConvNet", seed) for seed in range(2)]
    plain = [replace(task, plan=replace(task.plan, inner_batching="loop")) for task in tasks]
    with pytest.raises(ValueError, match="several sets at once"):
        computed(plain)
