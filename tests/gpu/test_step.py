"""One outer step of several trials on a GPU: how often the host waits, and draws made meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.distill import applied, gradients_together, initial_state, outer_step
from ddsweep.core.execution import choose_plan
from ddsweep.core.images import RealSet
from ddsweep.core.networks import build_network
from ddsweep.core.outer import NetworkGradients
from ddsweep.core.task import Task
from tests.gpu.problems import DEVICE, PRETENDED
from tests.gpu.waits import waits_of

KINDS = [
    {},
    {"clip_norm": 0.1, "ema": 0.9},
    {"clip_median": 1.0, "trim": 0.5, "outer_schedule": "cosine"},
    {"clip_running": 0.9, "inner_lr_mode": "shared", "max_rollbacks": 2},
    {"outer_cutoff": 3.0, "inner_lr_mode": "fixed"},
    {"objective": "attack", "attack_class": 1, "target_class": 2},
    {"outer_lr_rates": 0.001, "outer_augment": "rotate+cutout", "image_init": "real"},
]


def task_of(seed: int, ahead: bool = False, **more) -> Task:
    settings = {"network": "convnet(depth=1,width=4,norm=none)", "inner_steps": 2, "images_per_class": 2}
    settings |= {"models_per_step": 3, "real_batch": 32, "inner_lr": 0.1, "outer_steps": 6, "labels": "soft"}
    spec = TrialSpec(DATASETS["digits"], seed=seed, **(settings | KINDS[seed % len(KINDS)] | more))
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
    network = build_network(spec.network_spec, (1, 8, 8), 10)
    plan = replace(choose_plan(DEVICE, 2, network, graph=True), ahead=ahead)
    return Task.of(spec, plan, RealSet(pixels, torch.arange(200) % 10, (0.5,), (0.3,)))


def broken(own: NetworkGradients) -> NetworkGradients:
    """With one network that is not finite."""
    losses = own.losses.clone()
    losses[1] = torch.nan
    return replace(own, losses=losses)


def waits(count: int, diverging: bool = False) -> Counter[str]:
    """Of one outer step of so many trials that differ in all that they may; not the first one, in which
    constants are copied."""
    tasks = [task_of(seed) for seed in range(count)]
    states = [initial_state(task) for task in tasks]

    def step() -> None:
        gradients = gradients_together(tasks, states)
        if diverging:
            gradients = [broken(own) for own in gradients]
        outcomes = applied(tasks, states, gradients)
        assert all(isinstance(outcome, tuple) for outcome in outcomes)

    step()
    return waits_of(step)


def test_a_step_waits_for_the_device_once_whatever_the_number_of_trials() -> None:
    for count in (1, 6, 16):
        found = waits(count)
        operations = found.pop("operations", 0)
        assert sum(found.values()) == 1, (count, found)
        print(f"{count} trials: {operations} operations")


def test_it_waits_twice_where_a_network_is_not_finite() -> None:
    for count in (1, 6):
        found = waits(count, diverging=True)
        found.pop("operations", 0)
        assert sum(found.values()) == 2, (count, found)


def test_a_wait_is_seen() -> None:
    there = torch.arange(3.0).to(DEVICE)
    for work in (
        lambda: float(there[0]),
        lambda: there[there > 1],
        lambda: sum(there.tolist()),
        lambda: there.cpu().sum(),
        lambda: torch.arange(2).to(DEVICE) if PRETENDED else there.cpu(),
    ):
        found = waits_of(work)
        found.pop("operations", 0)
        assert sum(found.values()) >= 1


@pytest.mark.parametrize("settings", [{}, {"init": "fixed", "models_per_step": 1, "trim": 0}], ids=str)
def test_draws_ahead_have_the_same_values(settings) -> None:
    states = []
    for ahead in (False, True):
        task = task_of(0, ahead, **settings)
        state = initial_state(task)
        early = state
        for _ in range(3):
            state, _ = outer_step(task, state)
        again, _ = outer_step(task, early)
        states.append((state, again))
    for plain, drawn in zip(*states, strict=True):
        for name, value in plain.tensors().items():
            assert torch.equal(value.cpu(), drawn.tensors()[name].cpu()), name
