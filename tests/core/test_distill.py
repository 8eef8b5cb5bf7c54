"""Distillation: outer Adam, schedules, clipping, diverging networks, and going on after a stop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ddsweep.core.distill
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.distill import initial_state, outer_step
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import LabelledImages, RealSet, normalise
from ddsweep.core.methods import bptt, method_of
from ddsweep.core.methods.bptt import rates as rates_of
from ddsweep.core.outer import DistillState, adam, schedule_factor
from ddsweep.core.task import Task, known_seed, network_seeds
from ddsweep.core.unroll import OuterGradient, outer_gradient
from ddsweep.errors import DivergedError
from tests.core.conftest import assert_states_equal, given_lengths, run

MEAN, STD = (0.3,), (0.35,)


@pytest.fixture
def task_of(digits):
    """A small distillation of 60 digits: ``task_of(setting=value, ...)``, or of more with ``images=n``."""

    def make(*, images: int = 60, **settings) -> Task:
        defaults = {"network": "convnet(width=4)", "dtype": "float64", "inner_lr": 0.5, "models_per_step": 3}
        spec = TrialSpec(dataset=DATASETS["digits"], **(defaults | settings))
        pixels, labels = digits
        return Task.of(spec, ExecutionPlan(), RealSet(pixels[:images], labels[:images], MEAN, STD))

    return make


def gradient_of(task: Task, state: DistillState) -> OuterGradient:
    """The outer gradient of the whole training part (the real batch of a trial that asks for more)."""
    spec = task.spec
    real = LabelledImages(task.real.normalised(task.dtype), task.real.labels)
    networks = task.networks(network_seeds(spec, state.step))
    raw = state.learned["raw"].expand(spec.steps)
    distilled = LabelledImages(state.images, task.labels)
    return outer_gradient(task.network, networks, distilled, raw, real, task.plan)


def applied_gradient(state: DistillState) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first update applied: the first moment is half of it, for beta 1 is 0.5."""
    assert state.updates == 1
    return 2 * state.m["images"], 2 * state.m["raw"]


# ------------------------------------------------------------------------------ optimiser and schedule


def test_adam_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    theirs = value.clone().requires_grad_()
    optimiser = torch.optim.Adam([theirs], lr=0.01, betas=(0.5, 0.999), eps=1e-8)
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    for update in range(1, 21):
        gradient = torch.randn(5, 3, generator=generator, dtype=torch.float64) * 10 ** (update % 5 - 3)
        lr = 0.01 * 0.9**update
        (step,), (m,), (v,) = adam([gradient], [m], [v], [update], [lr])
        value = value + step
        optimiser.param_groups[0]["lr"] = lr
        theirs.grad = gradient
        optimiser.step()
        torch.testing.assert_close(value, theirs.detach(), rtol=1e-12, atol=1e-14)


def spec_with(**settings) -> TrialSpec:
    return TrialSpec(dataset=DATASETS["digits"], **settings)


def test_the_outer_rate_is_constant_unless_told_otherwise() -> None:
    assert {schedule_factor(spec_with(), step) for step in (0, 1, 399, 10_000)} == {1.0}


def test_the_step_schedule_multiplies_by_its_factor_every_so_many_steps() -> None:
    spec = spec_with(outer_schedule="step", outer_decay_steps=10, outer_decay_factor=0.5)
    found = [schedule_factor(spec, step) for step in (0, 9, 10, 19, 20, 35)]
    assert found == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.125])


def test_the_cosine_schedule_goes_from_the_outer_rate_to_zero() -> None:
    spec = spec_with(outer_schedule="cosine", outer_steps=100)
    found = [schedule_factor(spec, step) for step in (0, 25, 50, 75, 100)]
    expected = [1.0, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5)), 0.0]
    assert found == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_an_outer_step_moves_by_the_scheduled_rate(task_of, schedule) -> None:
    """Adam's first update is the rate times the sign, for any size of the gradient. Raw inner rates and
    labels may have an outer rate of their own, on the same schedule."""
    task = task_of(
        outer_schedule=schedule,
        outer_decay_steps=3,
        outer_steps=10,
        outer_lr=0.1,
        labels="soft",
        outer_lr_rates=0.003,
        outer_lr_labels=0.02,
    )
    factor = schedule_factor(task.spec, 4)
    assert factor < 1
    start = replace(initial_state(task), step=4)
    after, _ = outer_step(task, start)
    moved = (after.images - start.images).abs()
    assert float(moved.max()) == pytest.approx(0.1 * factor, rel=1e-3)
    for name, rate in (("raw", 0.003), ("labels", 0.02)):
        moved = (after.learned[name] - start.learned[name]).abs()
        assert float(moved.max()) == pytest.approx(rate * factor, rel=1e-3)


def test_an_outer_step_is_one_update_by_the_mean_gradient_of_its_networks(task_of) -> None:
    task = task_of(inner_steps=2, images_per_class=2, inner_epochs=2)
    start = initial_state(task)
    expected = gradient_of(task, start)
    after, report = outer_step(task, start)
    images, raw = applied_gradient(after)
    torch.testing.assert_close(images, expected.images.mean(0), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(raw, expected.raw_rates.mean(0), rtol=1e-9, atol=1e-13)
    (step,), _, _ = adam([images], [start.m["images"]], [start.v["images"]], [1], [task.spec.outer_lr])
    updated = start.images + step
    torch.testing.assert_close(after.images, updated, rtol=1e-12, atol=1e-13)
    assert report.loss == pytest.approx(float(expected.losses.mean()), rel=1e-12)
    norm = math.hypot(float(expected.images.mean(0).norm()), float(expected.raw_rates.mean(0).norm()))
    assert report.grad_norm == pytest.approx(norm, rel=1e-9)
    assert report.inner_lr_mean == pytest.approx(0.5) and report.n_skipped == 0
    torch.testing.assert_close(report.norms, expected.norms, rtol=1e-9, atol=0)


# --------------------------------------------------------------------------- state in, state out


def test_the_state_that_goes_in_is_left_as_it_was(task_of) -> None:
    task = task_of()
    start = run(task, initial_state(task), 2)
    before = {name: value.clone() for name, value in start.tensors().items()}
    counters = start.counters()
    after, _ = outer_step(task, start)
    assert start.counters() == counters
    for name, value in start.tensors().items():
        assert torch.equal(value, before[name])
    assert after.step == start.step + 1 and not torch.equal(after.images, start.images)


@pytest.mark.parametrize("method", ["bptt", "distribution_matching"])
def test_any_method_takes_products_in_full_precision_on_its_device(task_of, method, monkeypatch) -> None:
    """And in one order: `products` does it on a GPU, whatever the method calls."""
    task, inside, seen = task_of(method=method, inner_steps=1, inner_epochs=1), [], []
    real = method_of(task.spec).gradients

    @contextmanager
    def products(device: str) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def gradients(*given: Any) -> Any:
        seen.append(list(inside))
        return real(*given)

    monkeypatch.setattr(ddsweep.core.distill, "products", products)
    monkeypatch.setattr(method_of(task.spec), "gradients", gradients)
    outer_step(task, initial_state(task))
    assert seen == [["cpu"]]


@pytest.mark.parametrize("init", ["fixed", "random"])
def test_a_stopped_distillation_goes_on_bit_for_bit(task_of, init) -> None:
    """The content of a checkpoint (tensors and counters) is all that is needed, also after other draws."""
    settings = {"init": init, "real_batch": 20, "real_batch_mode": "per_network", "dtype": "float32"}
    task = task_of(**settings, inner_epochs=2, outer_schedule="cosine", outer_steps=9)
    whole = run(task, initial_state(task), 9)
    half = run(task, initial_state(task), 4)
    saved = {name: value.clone() for name, value in half.tensors().items()}
    torch.manual_seed(12345)
    torch.randn(7)
    again = task_of(**settings, inner_epochs=2, outer_schedule="cosine", outer_steps=9)
    assert_states_equal(run(again, DistillState.of(saved, half.counters()), 5), whole)


def test_two_trials_that_differ_in_seed_differ_in_everything_drawn(task_of) -> None:
    one, other = task_of(seed=0), task_of(seed=1)
    assert not torch.equal(initial_state(one).images, initial_state(other).images)
    assert not set(network_seeds(one.spec, 0)) & set(network_seeds(other.spec, 0))


def test_random_init_draws_fresh_networks_in_every_step(task_of) -> None:
    spec = task_of(models_per_step=4).spec
    assert len({seed for step in range(25) for seed in network_seeds(spec, step)}) == 100


def test_fixed_init_knows_one_network_that_depends_on_the_seed(task_of) -> None:
    spec = task_of(init="fixed", models_per_step=5).spec
    assert spec.models_per_step == 1
    assert {tuple(network_seeds(spec, step)) for step in range(20)} == {(known_seed(spec),)}
    assert known_seed(spec) != known_seed(replace(spec, seed=1))
    # The same known network for every trial of that seed, so that their comparison is paired.
    assert known_seed(spec) == known_seed(replace(spec, images_per_class=5, outer_lr=0.5))


def test_fixed_init_unrolls_its_known_network(task_of) -> None:
    task = task_of(init="fixed")
    start = initial_state(task)
    _, report = outer_step(task, start)
    _, later = outer_step(task, replace(start, step=17))
    assert report.losses.shape == (1,)
    # The real batch is the whole training part, in another order at another step.
    torch.testing.assert_close(later.losses, report.losses, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------ real batches


def seen_batches(task: Task, monkeypatch, steps: int) -> list[torch.Tensor]:
    """The real images given to the gradient, as indices into the training part: [N] or [K, N] a step."""
    seen = []
    data = normalise(task.real.pixels, MEAN, STD, task.dtype).flatten(1)

    def spy(network, params, distilled, raw, real, plan, **how):
        flat = real.images.flatten(-3)
        picks = (flat[..., None, :] == data).all(-1).to(torch.int64).argmax(-1)
        assert torch.equal(task.real.labels[picks], real.labels)
        assert torch.equal(data[picks], flat)
        seen.append(picks)
        return outer_gradient(network, params, distilled, raw, real, plan, **how)

    monkeypatch.setattr(bptt, "outer_gradient", spy)
    run(task, initial_state(task), steps)
    return seen


def test_a_shared_real_batch_is_drawn_anew_in_each_step_without_replacement(task_of, monkeypatch) -> None:
    seen = seen_batches(task_of(real_batch=20), monkeypatch, 3)
    assert [picks.shape for picks in seen] == [(20,)] * 3
    assert all(len(set(picks.tolist())) == 20 for picks in seen)
    assert len({tuple(sorted(picks.tolist())) for picks in seen}) == 3


def test_per_network_real_batches_differ_between_networks(task_of, monkeypatch) -> None:
    (picks,) = seen_batches(task_of(real_batch=20, real_batch_mode="per_network"), monkeypatch, 1)
    assert picks.shape == (3, 20)
    assert all(len(set(row.tolist())) == 20 for row in picks)
    assert len({tuple(sorted(row.tolist())) for row in picks}) == 3


def test_a_real_batch_is_never_larger_than_the_training_part(task_of, monkeypatch) -> None:
    (picks,) = seen_batches(task_of(real_batch=1024), monkeypatch, 1)
    assert sorted(picks.tolist()) == list(range(60))


# --------------------------------------------------------------------------------- images and rates


def test_noise_images_are_standard_normal_in_normalised_space(task_of) -> None:
    task = task_of(images_per_class=10, inner_steps=5)
    images = initial_state(task).images
    assert images.shape == (5, 20, 1, 8, 8)
    assert abs(float(images.mean())) < 5 / math.sqrt(images.numel())
    assert float(images.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * images.numel()))


def test_real_images_start_as_different_images_of_their_class(task_of) -> None:
    task = task_of(images_per_class=4, inner_steps=2, image_init="real", images=300)
    images = initial_state(task).images.flatten(0, 1).flatten(1)
    data = normalise(task.real.pixels, MEAN, STD, torch.float64).flatten(1)
    same = (images[:, None] == data).all(-1)
    assert bool(same.any(1).all())
    picks = same.to(torch.int64).argmax(1)
    assert torch.equal(task.real.labels[picks], task.labels.flatten())
    assert len(set(picks.tolist())) == 40


def test_a_class_with_too_few_real_images_repeats_them(task_of) -> None:
    task = task_of(images_per_class=12, image_init="real", images=60)
    images = initial_state(task).images[0].flatten(1)
    data = normalise(task.real.pixels, MEAN, STD, torch.float64).flatten(1)
    picks = (images[:, None] == data).all(-1).to(torch.int64).argmax(1)
    assert torch.equal(task.real.labels[picks], task.labels[0])
    for label in range(10):
        members = int((task.real.labels == label).sum())
        assert len(set(picks[task.labels[0] == label].tolist())) == min(members, 12)


@pytest.mark.parametrize("image_init", ["noise", "real"])
def test_start_images_are_centred_and_then_scaled(task_of, image_init) -> None:
    """Each less the mean image of all S x n, so that nothing is left that all of them have."""
    sizes = {"images_per_class": 4, "inner_steps": 2, "images": 300}
    only_scaled = initial_state(task_of(image_init=image_init, image_scale=1.5, **sizes)).images
    start = initial_state(task_of(image_init=image_init, image_centre=True, image_scale=1.5, **sizes)).images
    assert float(only_scaled.mean((0, 1)).abs().max()) > 0.01
    assert float(start.mean((0, 1)).abs().max()) < 1e-14
    if image_init == "noise":
        assert float(start.std()) == pytest.approx(1.5 * math.sqrt(79 / 80), rel=0.05)


@pytest.mark.parametrize("mode", ["per_step", "shared", "fixed"])
def test_rates_start_at_the_inner_rate(task_of, mode) -> None:
    task = task_of(inner_lr_mode=mode, inner_lr=0.02, inner_epochs=3)
    start = initial_state(task)
    assert start.learned["raw"].shape == ((1,) if mode == "shared" else (3,))
    torch.testing.assert_close(
        rates_of(start.learned, task.spec), torch.full((3,), 0.02, dtype=torch.float64)
    )


def test_per_step_rates_move_apart(task_of) -> None:
    task = task_of(inner_epochs=3)
    found = rates_of(run(task, initial_state(task), 5).learned, task.spec)
    assert len({round(float(rate), 9) for rate in found}) == 3
    assert bool((found > 0).all())


def test_a_shared_rate_is_one_number_with_the_summed_gradient(task_of) -> None:
    task = task_of(inner_lr_mode="shared", inner_epochs=3)
    start = initial_state(task)
    after, _ = outer_step(task, start)
    assert after.learned["raw"].shape == (1,)
    _, raw = applied_gradient(after)
    expected = gradient_of(task, start).raw_rates.mean(0).sum(0, keepdim=True)
    torch.testing.assert_close(raw, expected, rtol=1e-9, atol=1e-13)
    assert len(set(rates_of(run(task, after, 3).learned, task.spec).tolist())) == 1


def test_fixed_rates_never_change_while_images_do(task_of) -> None:
    task = task_of(inner_lr_mode="fixed", inner_epochs=3)
    start = initial_state(task)
    after, report = outer_step(task, start)
    images, _ = applied_gradient(after)
    assert report.grad_norm == pytest.approx(float(images.norm()), rel=1e-12)
    later = run(task, after, 3)
    assert torch.equal(later.learned["raw"], start.learned["raw"])
    assert not torch.equal(later.images, start.images)


def test_the_norm_of_a_network_is_that_of_what_is_learned(task_of) -> None:
    """Of one shared rate, the derivative by it: the sum over its steps, whatever their signs."""
    task = task_of(inner_lr_mode="shared", inner_epochs=3, clip_norm=1e-3, models_per_step=4)
    start = initial_state(task)
    found = gradient_of(task, start)
    by_rate = found.raw_rates.sum(1)
    norms = (found.images.flatten(1).square().sum(1) + by_rate.square()).sqrt()
    factors = 1e-3 / norms
    assert float(factors.max()) < 1, "every network is clipped"
    after, report = outer_step(task, start)
    torch.testing.assert_close(report.norms, norms, rtol=1e-9, atol=0)
    images, raw = applied_gradient(after)
    torch.testing.assert_close(raw, (factors * by_rate).mean(0, keepdim=True), rtol=1e-9, atol=1e-13)
    expected = torch.einsum("k,k...->...", factors, found.images) / len(factors)
    torch.testing.assert_close(images, expected, rtol=1e-9, atol=1e-13)


# ------------------------------------------------------------------------------------------ clipping


def clipped(gradient: OuterGradient, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over networks of the gradients, none longer than ``limit``, written as a loop."""
    images, raw = torch.zeros_like(gradient.images[0]), torch.zeros_like(gradient.raw_rates[0])
    count = len(gradient.losses)
    for k in range(count):
        length = math.hypot(float(gradient.images[k].norm()), float(gradient.raw_rates[k].norm()))
        factor = min(1.0, limit / length) / count
        images += factor * gradient.images[k]
        raw += factor * gradient.raw_rates[k]
    return images, raw


def test_clip_norm_bounds_what_one_network_contributes(task_of) -> None:
    start = initial_state(task_of())
    # A limit between the norms, so that some are clipped and some are not.
    limit = float(gradient_of(task_of(), start).norms.median())
    task = task_of(clip_norm=limit)
    start = initial_state(task)
    gradient = gradient_of(task, start)
    limited = gradient.norms > limit
    assert int(limited.sum()) > 0, "the limit must bind for this test to say anything"
    after, report = outer_step(task, start)
    images, raw = clipped(gradient, limit)
    found_images, found_raw = applied_gradient(after)
    torch.testing.assert_close(found_images, images, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found_raw, raw, rtol=1e-9, atol=1e-13)
    assert report.n_skipped == 0
    torch.testing.assert_close(report.norms, gradient.norms, rtol=1e-9, atol=0)


def test_clip_median_bounds_a_network_by_a_multiple_of_the_median_norm(task_of) -> None:
    task = task_of(clip_median=1.0, models_per_step=5)
    start = initial_state(task)
    gradient = gradient_of(task, start)
    after, _ = outer_step(task, start)
    images, raw = clipped(gradient, float(gradient.norms.sort().values[2]))
    found_images, found_raw = applied_gradient(after)
    torch.testing.assert_close(found_images, images, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found_raw, raw, rtol=1e-9, atol=1e-13)
    assert float((images - gradient.images.mean(0)).norm()) > 1e-3 * float(images.norm())


def test_one_exploding_network_outweighs_no_other_when_clipped(task_of, monkeypatch) -> None:
    task = task_of(clip_median=2.0, models_per_step=3)
    given_lengths(monkeypatch, task, lambda step: [1.0, 3.0, 1e12])
    after, _ = outer_step(task, initial_state(task))
    images, _ = applied_gradient(after)
    assert images[0, 0, 0, 0, :3].tolist() == pytest.approx([1 / 3, 1.0, 2.0])


def test_a_network_without_gradient_is_finite_and_not_skipped(task_of, monkeypatch) -> None:
    task = task_of(clip_norm=1.0, models_per_step=3)
    given_lengths(monkeypatch, task, lambda step: [0.0, 1.0, 4.0])
    after, report = outer_step(task, initial_state(task))
    images, _ = applied_gradient(after)
    assert images[0, 0, 0, 0, :3].tolist() == pytest.approx([0.0, 1 / 3, 1 / 3])
    assert report.n_skipped == 0 and report.loss == 1.0


def test_networks_are_not_skipped_because_the_median_norm_is_zero(task_of, monkeypatch) -> None:
    """Skipped means not finite: two dead networks of three are no reason to stop a trial."""
    task = task_of(clip_median=2.0, models_per_step=3, on_nonfinite="stop")
    given_lengths(monkeypatch, task, lambda step: [0.0, 0.0, 1.0])
    _, report = outer_step(task, initial_state(task))
    assert report.n_skipped == 0


# ------------------------------------------------------------------------------- what is not finite


def spoil(monkeypatch, *broken: int) -> None:
    """Make the networks ``broken`` of every outer step so large that their logits overflow."""
    drawn = Task.outer_networks

    def networks(self, step):
        params = drawn(self, step)
        for value in params.values():
            value[list(broken)] *= 1e200
        return params

    monkeypatch.setattr(Task, "outer_networks", networks)


NO_NORM = "convnet(width=4,norm=none)"


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.05}, {"clip_median": 1.0}], ids=str)
def test_a_diverging_network_leaves_the_mean_and_is_counted(task_of, monkeypatch, clip) -> None:
    task = task_of(network=NO_NORM, **clip)
    start = initial_state(task)
    gradient = gradient_of(task, start)
    spoil(monkeypatch, 1)
    after, report = outer_step(task, start)
    assert report.n_skipped == 1
    assert torch.isfinite(report.norms).tolist() == [True, False, True]
    kept = OuterGradient(gradient.losses[[0, 2]], gradient.images[[0, 2]], gradient.raw_rates[[0, 2]])
    limit = clip.get("clip_norm", math.inf)
    if "clip_median" in clip:
        limit = float(kept.norms.min())  # the lower of two is torch's median
    images, raw = clipped(kept, limit)
    found_images, found_raw = applied_gradient(after)
    torch.testing.assert_close(found_images, images, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found_raw, raw, rtol=1e-9, atol=1e-13)
    assert report.loss == pytest.approx(float(kept.losses.mean()), rel=1e-12)
    assert all(bool(torch.isfinite(value).all()) for value in after.tensors().values())


def test_a_gradient_whose_square_overflows_in_float32_counts_as_not_finite(task_of, monkeypatch) -> None:
    """Adam would keep an infinite mean of squares, and what it belongs to would never move again."""
    task = task_of(models_per_step=3)
    given_lengths(monkeypatch, task, lambda step: [1.0, 1e25, 1.0])
    after, report = outer_step(task, initial_state(task))
    assert report.n_skipped == 1 and report.grad_norm < 10
    assert all(bool(torch.isfinite(value).all()) for value in after.tensors().values())


def test_a_diverging_network_stops_a_trial_that_asks_for_it(task_of, monkeypatch) -> None:
    task = task_of(network=NO_NORM, on_nonfinite="stop")
    state = run(task, initial_state(task), 2)
    spoil(monkeypatch, 0, 2)
    with pytest.raises(
        DivergedError, match=r"outer step 2: 2 of 3 networks .* not finite .*on_nonfinite: stop"
    ):
        outer_step(task, state)


def test_a_step_without_a_finite_network_changes_nothing_but_the_count(task_of) -> None:
    task = task_of(network=NO_NORM, inner_lr=1e200, inner_epochs=3)
    start = initial_state(task)
    after, report = outer_step(task, start)
    assert (report.loss, report.grad_norm, report.n_skipped) == (None, None, 3)
    assert after.counters() == start.counters() | {"step": 1, "skipped_in_a_row": 1}
    for name, value in after.tensors().items():
        assert torch.equal(value, start.tensors()[name])


@pytest.mark.parametrize(("dtype", "inner_lr"), [("float32", 1e30), ("float64", 1e200)])
def test_ten_steps_in_a_row_without_a_finite_network_end_the_trial(task_of, dtype, inner_lr) -> None:
    task = task_of(network=NO_NORM, inner_lr=inner_lr, inner_epochs=3, dtype=dtype)
    state = run(task, initial_state(task), 9)
    with pytest.raises(
        DivergedError, match=r"no network was finite for 10 steps in a row .*smaller inner_lr"
    ):
        outer_step(task, state)


def test_a_finite_step_starts_the_count_of_skipped_steps_again(task_of, monkeypatch) -> None:
    task = task_of(network=NO_NORM)
    start = initial_state(task)
    with monkeypatch.context() as broken:
        spoil(broken, 0, 1, 2)
        state = run(task, start, 9)
    assert state.counters() == start.counters() | {"step": 9, "skipped_in_a_row": 9}
    state, report = outer_step(task, state)
    assert report.n_skipped == 0
    assert state.counters() == start.counters() | {"step": 10, "updates": 1}


# ------------------------------------------------------------------------------------ does it distil


def test_a_short_distillation_of_digits_lowers_the_outer_loss(task_of) -> None:
    task = task_of(
        images=1200,
        network="convnet(width=8)",
        init="fixed",
        inner_epochs=3,
        inner_lr=1.0,
        outer_lr=0.05,
        real_batch=256,
        dtype="float32",
    )
    state, losses = initial_state(task), []
    for _ in range(60):
        state, report = outer_step(task, state)
        losses.append(report.loss)
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    # Measured: 2.46 over the first five steps, 1.17 over the last; chance is 2.30.
    assert first > 2.0 and last < 1.5, (first, last)
    assert bool((F.softplus(state.learned["raw"]) > 0).all())
