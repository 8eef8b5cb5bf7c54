"""The engine on a GPU: the numbers of the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.distill import applied, gradients_together, initial_state, outer_step
from ddsweep.core.evaluate import count_right, evaluate_networks
from ddsweep.core.execution import choose_plan
from ddsweep.core.images import LabelledImages, RealSet
from ddsweep.core.methods import labels_of
from ddsweep.core.methods.bptt import rates as rates_of
from ddsweep.core.networks import build_network
from ddsweep.core.outer import averaged
from ddsweep.core.pretrain import TrainingSchedule, train_on_real
from ddsweep.core.recipe import Recipe, held_out_loop
from ddsweep.core.task import Task
from ddsweep.core.unroll import outer_gradient
from ddsweep.data.load import load_splits
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings
from tests.gpu.problems import CPU, DEVICE, NETWORKS, problem, relative


@pytest.mark.parametrize("real", ["shared", "per_network"])
@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_gradients_on_the_device_are_those_on_the_cpu(text, shape, rate, mode, real) -> None:
    here, there = (problem(text, shape, device, rate=rate, real=real) for device in (CPU, DEVICE))
    on_cpu = outer_gradient(*here, replace(choose_plan(CPU, 1, here[0]), memory_mode=mode))
    on_device = outer_gradient(*there, replace(choose_plan(DEVICE, 1, there[0]), memory_mode=mode))
    assert on_device.images.device.type == DEVICE.type
    assert relative(on_device.losses, on_cpu.losses) < 1e-9
    assert relative(on_device.images, on_cpu.images) < 1e-9
    assert relative(on_device.raw_rates, on_cpu.raw_rates) < 1e-9


@pytest.mark.parametrize("batching", ["explicit", "vmap", "loop"])
def test_the_ways_to_batch_networks_agree_on_the_device(batching) -> None:
    arguments = problem("lenet", (1, 28, 28), DEVICE)
    plan = choose_plan(DEVICE, 1, arguments[0])
    expected = outer_gradient(*arguments, plan)
    found = outer_gradient(
        *arguments, replace(plan, inner_batching=batching, real_batching=batching, real_chunk=7)
    )
    assert relative(found.images, expected.images.cpu()) < 1e-9
    assert relative(found.raw_rates, expected.raw_rates.cpu()) < 1e-9


@pytest.mark.parametrize(("text", "shape", "rate"), NETWORKS)
def test_accuracies_on_the_device_are_those_on_the_cpu(text, shape, rate) -> None:
    """float64: no logit is close enough to another for rounding to turn an answer."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (500, *shape), generator=generator, dtype=torch.uint8)
    targets = torch.randint(10, (500,), generator=generator)
    mean, std = (0.5,) * shape[0], (0.3,) * shape[0]
    found = []
    for device in (CPU, DEVICE):
        network, params, distilled, *_ = problem(text, shape, device, count=4)
        data = RealSet(pixels, targets, mean, std).to(device)
        plan = replace(choose_plan(device, 1, network), test_chunk=64)
        found.append(evaluate_networks(network, params, distilled, [rate] * 4, (0, 2, 4, 6), data, plan))
    on_cpu, on_device = found
    assert torch.equal(on_device.accuracy, on_cpu.accuracy)
    assert torch.equal(on_device.diverged, on_cpu.diverged)
    torch.testing.assert_close(on_device.loss, on_cpu.loss, rtol=1e-9, atol=0)


def test_training_on_real_images_on_the_device_is_that_on_the_cpu() -> None:
    """What pools are made by, and how many images of a class are called what."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (100, 1, 28, 28), generator=generator, dtype=torch.uint8)
    targets = torch.randint(10, (100,), generator=generator)
    schedule, found = TrainingSchedule(epochs=2, batch=32, lr=1e-3, decay_epochs=1, decay_factor=0.5), []
    for device in (CPU, DEVICE):
        network, params, *_ = problem("lenet", (1, 28, 28), device)
        data, plan = RealSet(pixels, targets, (0.5,), (0.3,)).to(device), choose_plan(device, 1, network)
        trained = train_on_real(network, params, data, schedule, lambda epoch: [epoch, 7, 8], plan)
        assert trained is not None
        found.append((trained, count_right(network, trained, data, plan)))
    (on_cpu, counts), (on_device, other_counts) = found
    for name, value in on_cpu.items():
        assert relative(on_device[name], value) < 1e-9, name
    assert torch.equal(other_counts[3], counts[3]) and int(counts[3].sum()) == 300


ALL_WAYS = {
    "as before": {},
    "shuffled": {
        **{"order": "shuffled", "inner_optimizer": "momentum", "labels": "soft", "window": 4},
        **{"inner_augment": "shift+cutout", "outer_augment": "rotate", "clip_running": 2.0, "ema": 0.5},
        **{"trim": 0.3, "max_rollbacks": 1, "image_init": "real"},
    },
    "sampled": {
        "order": "sampled",
        "inner_optimizer": "adam",
        "inner_lr": 0.02,
        "real_batch_mode": "per_network",
        "outer_cutoff": 3,
        "clip_median": 2.0,
        "outer_lr_rates": 0.001,
        "image_centre": True,
    },
}


@pytest.mark.parametrize("settings", ALL_WAYS.values(), ids=ALL_WAYS)
def test_a_few_outer_steps_on_the_device_are_those_on_the_cpu(settings) -> None:
    """The same networks, orders, real batches and first images on both, and so the same distilled set, which
    does the same to other networks."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
    targets = torch.arange(200) % 10
    spec = TrialSpec(
        dataset=DATASETS["digits"],
        network="convnet(width=4)",
        **{"inner_steps": 2, "images_per_class": 2, "inner_epochs": 3, "real_batch": 32, "dtype": "float64"},
        **({"inner_lr": 0.2} | settings),
    )
    states, accuracies = [], []
    for device in (CPU, DEVICE):
        network = build_network(spec.network_spec, spec.dataset.shape, 10)
        made = Task.of(spec, choose_plan(device, 1, network), RealSet(pixels, targets, (0.5,), (0.3,)))
        state = initial_state(made)
        for _ in range(3):
            state, report = outer_step(made, state)
            assert report.n_skipped == 0
        states.append(state)
        learned = averaged(state)
        found = evaluate_networks(
            network,
            made.networks([1, 2, 3]),
            LabelledImages(learned["images"], labels_of(learned, made)),
            *(rates_of(learned, spec).tolist(), (0, 4, 8), made.real, made.plan),
            loop=held_out_loop(Recipe.of(spec), spec, "heldout", range(3), 8),
        )
        accuracies.append(found.accuracy)
    # Adam divides by the gradient's own size: where that is rounding, so is the direction of the step.
    assert relative(states[1].images, states[0].images) < 1e-6
    assert relative(states[1].learned["raw"], states[0].learned["raw"]) < 1e-6
    torch.testing.assert_close(accuracies[1], accuracies[0], rtol=0, atol=0.011)


@pytest.mark.parametrize("real", ["shared", "per_network"])
def test_trials_together_on_the_device_are_those_on_the_cpu(real) -> None:
    """Three steps of three trials at three steps of their own, in a plan whose width is four trials."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
    data = RealSet(pixels, torch.arange(200) % 10, (0.5,), (0.3,))
    specs = [
        TrialSpec(
            dataset=DATASETS["digits"],
            network="convnet(width=4)",
            **{
                "inner_steps": 2,
                "images_per_class": 2,
                "inner_epochs": 2,
                "real_batch": 32,
                "dtype": "float64",
            },
            **{"models_per_step": 2, "labels": "soft", "order": "shuffled", "real_batch_mode": real},
            **{"seed": seed, "inner_lr": 0.1 * (1 + seed)},
        )
        for seed in range(3)
    ]
    ends = []
    for device in (CPU, DEVICE):
        network = build_network(specs[0].network_spec, specs[0].dataset.shape, 10)
        plan = replace(choose_plan(device, 1, network, networks=2), width=4)
        tasks = [Task.of(spec, plan, data) for spec in specs]
        states = [replace(initial_state(task), step=5 * number) for number, task in enumerate(tasks)]
        for _ in range(3):
            found = gradients_together(tasks, states)
            states = [state for state, _ in applied(tasks, states, found)]
        ends.append(states)
    for here, there in zip(*ends, strict=True):
        assert there.images.device.type == DEVICE.type
        for name, value in here.learned.items():
            assert relative(there.learned[name], value) < 1e-6, name


@pytest.mark.parametrize("augment", ["none", "shift+cutout", "dsa"])
@pytest.mark.parametrize("batch", [7, 256])
def test_minibatches_and_augmentations_on_the_device_are_those_on_the_cpu(batch, augment) -> None:
    """By a plan that records what can be recorded."""
    spec = TrialSpec(DATASETS["digits"], network="convnet(width=4)", images_per_class=2, dtype="float64")
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (200, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images = torch.randn(1, 20, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = (torch.arange(20) % 10)[None]
    recipe = Recipe(6, 0.05, "momentum", weight_decay=5e-4, batch=batch, schedule="step", augment=augment)
    steps, found = 6 * recipe.steps_per_epoch(spec), []
    for device in (CPU, DEVICE):
        network = build_network(spec.network_spec, spec.dataset.shape, 10)
        plan = choose_plan(device, 1, network, graph=True)
        made = Task.of(spec, plan, RealSet(pixels, torch.arange(200) % 10, (0.5,), (0.3,)))
        trained_on = LabelledImages(images.to(device), labels.to(device))
        loop = held_out_loop(recipe, spec, "heldout", range(3), steps)
        networks = made.networks([1, 2, 3])
        found.append(
            evaluate_networks(network, networks, trained_on, [0.05], (0, steps), made.real, plan, loop=loop)
        )
    assert relative(found[1].loss, found[0].loss) < 1e-9


def test_a_trial_on_the_device_is_that_on_the_cpu(tmp_path, monkeypatch) -> None:
    """Whole, with its choice by validation, and in two goes through a checkpoint."""
    spec = TrialSpec(
        dataset=DATASETS["digits"],
        network="convnet(width=16)",
        **{"images_per_class": 2, "inner_epochs": 2, "inner_lr": 0.2, "outer_steps": 4, "validate_every": 2},
        **{"selection_networks": 2, "keep": "best", "ema": 0.5, "image_init": "kmeans", "dtype": "float64"},
    )
    splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    found = []
    for device in (CPU, DEVICE):
        monkeypatch.setattr("ddsweep.trial_plan.pick_device", lambda *_, device=device: device)
        directory = SweepDirectory(tmp_path / device.type)
        settings = TrialSettings(device="auto", checkpoint_every=1)
        asked = iter([False, False])
        assert not distil_trial(spec, splits, directory, settings, should_stop=lambda a=asked: next(a, True))
        assert directory.checkpoint(spec.trial_id).exists()
        assert distil_trial(spec, splits, directory, settings)
        found.append(read_distilled(spec, directory))
    assert relative(found[1].images, found[0].images) < 1e-6
