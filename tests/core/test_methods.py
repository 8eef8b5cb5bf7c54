"""The contract that every method passes; and what distribution matching is, written down again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from ddsweep.catalog import DATASETS, METHODS, TrialSpec
from ddsweep.core import methods
from ddsweep.core.distill import initial_state, outer_step
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.methods import distribution_matching
from ddsweep.core.networks import build_network
from ddsweep.core.outer import DistillState
from ddsweep.core.task import Task, network_seeds
from ddsweep.data.load import load_splits
from ddsweep.errors import SettingError

NAMES = sorted({*METHODS} - {"given"})
"""The methods that learn."""
SMALL: dict[str, dict[str, Any]] = {
    "bptt": {"inner_epochs": 2, "real_batch": 40},
    "distribution_matching": {"real_per_class": 7},
}


def task_of(method: str, plan: ExecutionPlan | None = None, **settings: Any) -> Task:
    settings = {"network": "convnet(width=4)", "images_per_class": 2, "models_per_step": 3, **settings}
    spec = TrialSpec(DATASETS["digits"], method=method, dtype="float64", **{**SMALL[method], **settings})
    splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    train = splits.train.take(slice(400))
    return Task.of(spec, plan or ExecutionPlan(inner_batching="loop"), train)


def states(task: Task, steps: int, state: DistillState | None = None) -> DistillState:
    state = initial_state(task) if state is None else state
    for _ in range(steps):
        state, _ = outer_step(task, state)
    return state


def equal(left: DistillState, right: DistillState) -> bool:
    a, b = left.tensors(), right.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_method_of_the_catalog_is_there() -> None:
    assert set(methods.METHODS) == set(METHODS) == {*SMALL, "given"}


@pytest.mark.parametrize("augment", ["shift", "dsa"])
@pytest.mark.parametrize("method", NAMES)
def test_the_gradient_is_that_of_the_loss(method: str, augment: str) -> None:
    """Directional central differences; ReLU has kinks, so the step is tiny."""
    task = task_of(method, outer_augment=augment)
    found, module = states(task, 2).learned, methods.method_of(task.spec)
    gradients = module.gradients(task, found, 5)
    generator = torch.Generator().manual_seed(1)
    assert set(gradients.by) == set(found)
    for name, value in found.items():
        along = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        ends = [
            module.gradients(task, {**found, name: value + sign * 1e-7 * along}, 5).losses for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / 2e-7
        torch.testing.assert_close(
            (gradients.by[name] * along).flatten(1).sum(1), expected, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("method", NAMES)
def test_a_step_is_a_function_of_state_and_number(method: str) -> None:
    task = task_of(method)
    assert equal(states(task, 4), states(task, 4))
    half = states(task, 2)
    read_again = DistillState.of(half.tensors(), half.counters())
    assert equal(states(task_of(method), 2, read_again), states(task, 4))
    assert not torch.equal(states(task, 1).images, initial_state(task).images)


@pytest.mark.parametrize("method", NAMES)
def test_side_by_side_as_one_after_another(method: str) -> None:
    alone, together = (
        states(task_of(method, ExecutionPlan(inner_batching=way, real_batching=way)), 2).images
        for way in ("loop", "vmap")
    )
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", NAMES)
def test_a_network_that_is_not_finite_spoils_no_other(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(method)
    drawn = Task.outer_networks

    def networks(self: Task, step: int) -> dict[str, Tensor]:
        found = {name: value.clone() for name, value in drawn(self, step).items()}
        next(iter(found.values()))[1] = torch.nan
        return found

    whole = methods.method_of(task.spec).gradients(task, initial_state(task).learned, 0)
    monkeypatch.setattr(Task, "outer_networks", networks)
    _, report = outer_step(task, initial_state(task))
    assert report.n_skipped == 1 and not torch.isfinite(report.losses[1])
    torch.testing.assert_close(report.losses[[0, 2]], whole.losses[[0, 2]])


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_given_images_stay_as_they_are(labels: str) -> None:
    """Bit for bit, whatever changes images in other methods."""
    changed = {"ema": 0.9, "outer_cutoff": 2.0, "clip_median": 0.5, "trim": 0.3, "clip_running": 2.0}
    task = replace(
        task_of("bptt"), spec=replace(task_of("bptt").spec, method="given", labels=labels, **changed)
    )
    begun, after = initial_state(task), states(task, 5)
    assert set(begun.learned) == ({"images"} if labels == "hard" else {"images", "labels"})
    for name, value in begun.learned.items():
        assert torch.equal(after.learned[name], value) and torch.equal(after.ema[name], value)


# --------------------------------------------------------------------------- distribution matching


def test_the_loss_of_distribution_matching_written_down_again() -> None:
    task = task_of("distribution_matching")
    learned = states(task, 1).learned
    found = distribution_matching.gradients(task, learned, 3)
    real, labels = distribution_matching._real_batch(task, 3)
    assert labels.bincount(minlength=10).tolist() == [7] * 10
    weights = task.networks(network_seeds(task.spec, 3))
    for k in range(3):
        module = build_network(task.spec.network_spec, task.spec.dataset.shape, 10)
        module.fc = torch.nn.Flatten()  # what the last layer is given
        own = {name: value[k] for name, value in weights.items() if not name.startswith("fc")}
        total = torch.zeros((), dtype=torch.float64)
        for c in range(10):
            theirs = functional_call(module, own, (real[labels == c],)).mean(0)
            ours = functional_call(module, own, (learned["images"][task.labels == c],)).mean(0)
            total += (theirs - ours).square().sum()
        torch.testing.assert_close(found.losses[k], total)


def test_real_images_go_through_a_few_at_a_time() -> None:
    plans = [ExecutionPlan(inner_batching="loop", real_chunk=chunk) for chunk in (10_000, 9)]
    whole, few = (states(task_of("distribution_matching", plan), 2).tensors() for plan in plans)
    for name, value in whole.items():
        torch.testing.assert_close(few[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("augment", ["shift+rotate+scale+cutout", "dsa"])
def test_one_augmentation_for_real_and_distilled_images(augment: str) -> None:
    """Siamese: were the distilled images the real ones, the loss would be zero under any augmentation."""
    task = task_of("distribution_matching", images_per_class=7, outer_augment=augment)
    real, labels = distribution_matching._real_batch(task, 4)
    images = torch.stack([real[labels == c] for c in range(10)]).flatten(0, 1)[None]
    found = distribution_matching.gradients(task, {"images": images}, 4)
    assert float(found.losses.max()) < 1e-20
    other = distribution_matching.gradients(task, {"images": images}, 5)
    assert float(other.losses.min()) > 1e-6, "other real images"


def test_distribution_matching_brings_the_means_together() -> None:
    task = task_of("distribution_matching", outer_lr=0.05, image_init="noise")

    def mean_loss(learned: dict[str, Tensor]) -> float:
        steps = range(1000, 1010)
        return sum(
            float(distribution_matching.gradients(task, learned, step).losses.mean()) for step in steps
        )

    start = initial_state(task)
    assert mean_loss(states(task, 60, start).learned) < 0.5 * mean_loss(start.learned)


def test_what_a_method_lacks_decides_nothing() -> None:
    plain = TrialSpec(DATASETS["digits"], method="distribution_matching")
    assert replace(plain, inner_lr=0.5, window=1, real_batch=7).trial_id == plain.trial_id
    assert replace(plain, real_per_class=7).trial_id != plain.trial_id
    assert replace(plain, inner_epochs=7).trial_id != plain.trial_id, "networks are trained so long on it"
    gradients = TrialSpec(DATASETS["digits"])
    assert replace(gradients, real_per_class=7).trial_id == gradients.trial_id != plain.trial_id
    with pytest.raises(SettingError, match="distribution_matching has no objective: attack"):
        replace(plain, objective="attack", attack_class=0, target_class=1)


def test_images_are_in_normalised_space() -> None:
    task = task_of("distribution_matching")
    real, labels = distribution_matching._real_batch(task, 0)
    pixels = task.real.normalised(torch.float64)
    assert all(bool((pixels == image).flatten(1).all(1).any()) for image in real[:5])
    assert F.one_hot(labels).sum(0).unique().tolist() == [7]
