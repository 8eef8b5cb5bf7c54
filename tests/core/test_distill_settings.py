"""Settings for better sets: soft labels, running mean, best state, clipping, trimming, rollback, windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.distill import initial_state, outer_step
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import RealSet, cosine_basis
from ddsweep.core.methods import bptt, labels_of
from ddsweep.core.methods.bptt import rates as rates_of
from ddsweep.core.outer import DistillState, averaged, final, rolled_back, scored
from ddsweep.core.recipe import Recipe, held_out_loop
from ddsweep.core.task import Task, network_seeds
from ddsweep.core.unroll import OuterGradient, Window, outer_gradient
from ddsweep.errors import DivergedError
from tests.core.conftest import assert_states_equal, given_lengths, run

MEAN, STD = (0.3,), (0.35,)
Make = Callable[..., Task]


@pytest.fixture
def task_of(digits) -> Make:
    """A small distillation of 60 digits: ``task_of(setting=value, ...)``; S = E = 2."""

    def make(**settings: Any) -> Task:
        defaults = {
            **{"network": "convnet(depth=1,width=4)", "dtype": "float64", "inner_lr": 0.5},
            **{"models_per_step": 3, "inner_steps": 2, "images_per_class": 2, "inner_epochs": 2},
            "real_batch": 30,
        }
        spec = TrialSpec(dataset=DATASETS["digits"], **(defaults | settings))
        pixels, labels = digits
        plan = ExecutionPlan("cpu", 1, "store", "explicit", "explicit", 64, 4)
        return Task.of(spec, plan, RealSet(pixels[:60], labels[:60], MEAN, STD))

    return make


def calls_of(monkeypatch, task: Task, steps: int) -> list[dict[str, Any]]:
    """Loop and window of the outer gradient in each of ``steps`` outer steps."""
    seen: list[dict[str, Any]] = []

    def spy(*arguments, **how):
        seen.append({**how, "real": arguments[4].images, "labels": arguments[2].labels})
        return outer_gradient(*arguments, **how)

    monkeypatch.setattr(bptt, "outer_gradient", spy)
    run(task, initial_state(task), steps)
    return seen


# ----------------------------------------------------------------------------------------- soft labels


def test_soft_labels_start_at_the_classes_and_are_learned(task_of: Make) -> None:
    task = task_of(labels="soft")
    start = initial_state(task)
    assert torch.equal(start.learned["labels"], F.one_hot(task.labels, 10).double())
    after = run(task, start, 3)
    labels = labels_of(after.learned, task)
    assert labels.shape == (2, 10, 10) and labels.dtype == torch.float64
    assert bool((labels != start.learned["labels"]).all())
    assert {"m.labels", "v.labels"} <= after.tensors().keys()


def test_hard_labels_are_no_part_of_what_is_learned(task_of: Make) -> None:
    task = task_of()
    state = run(task, initial_state(task), 1)
    assert state.learned.keys() == {"images", "raw"}
    assert labels_of(state.learned, task) is task.labels


def test_soft_labels_move_by_their_own_mean_gradient(task_of: Make, monkeypatch) -> None:
    task = task_of(labels="soft")
    found: list[OuterGradient] = []
    monkeypatch.setattr(
        bptt, "outer_gradient", lambda *a, **k: found.append(outer_gradient(*a, **k)) or found[-1]
    )
    after, report = outer_step(task, initial_state(task))
    torch.testing.assert_close(2 * after.m["labels"], found[0].labels.mean(0), rtol=1e-12, atol=1e-15)
    parts = [found[0].images.mean(0), found[0].raw_rates.mean(0), found[0].labels.mean(0)]
    norm = math.sqrt(sum(float(part.square().sum()) for part in parts))
    assert report.grad_norm == pytest.approx(norm, rel=1e-12)


# ---------------------------------------------------------------------- what a step hands to the gradient


@pytest.mark.parametrize(("optimizer", "momentum"), [("gd", 0.9), ("momentum", 0.6), ("adam", 0.9)])
def test_a_step_trains_its_networks_as_the_settings_say(task_of, monkeypatch, optimizer, momentum) -> None:
    task = task_of(inner_optimizer=optimizer, inner_momentum=momentum)
    (call,) = calls_of(monkeypatch, task, 1)
    assert (call["loop"].optimizer.kind, call["loop"].optimizer.momentum) == (optimizer, momentum)
    assert call["loop"].batch_order is None and call["loop"].augment is None and call["window"] is None


@pytest.mark.parametrize("order", ["shuffled", "sampled"])
def test_every_network_of_every_step_has_an_order_of_its_own(task_of, monkeypatch, order) -> None:
    task = task_of(order=order, inner_epochs=5)
    calls, again = (calls_of(monkeypatch, task, 2) for _ in range(2))
    rows = [call["loop"].batch_order.batches[:, k].flatten().tolist() for call in calls for k in range(3)]
    assert len({tuple(row) for row in rows}) == 6
    for one, other in zip(calls, again, strict=True):
        assert torch.equal(one["loop"].batch_order.batches, other["loop"].batch_order.batches)
        assert torch.equal(one["loop"].batch_order.rates, other["loop"].batch_order.rates)


def test_windows_lie_anywhere_in_the_unroll(task_of, monkeypatch) -> None:
    task = task_of(window=3, inner_epochs=4, models_per_step=1)
    given_lengths(monkeypatch, task, lambda step: [1.0])
    seen: list[Window] = []
    made = bptt.outer_gradient
    monkeypatch.setattr(bptt, "outer_gradient", lambda *a, **how: seen.append(how["window"]) or made())
    run(task, initial_state(task), 120)
    assert all(window.stop - window.start == 3 for window in seen)
    counts = [sum(window.start == start for window in seen) for start in range(6)]
    assert sum(counts) == 120 and min(counts) >= 8  # of 20 each; all six places, from the first step to T = 8


def test_the_same_step_has_the_same_window_and_the_next_another_draw(task_of) -> None:
    spec = task_of(window=2, inner_epochs=50).spec
    windows = [bptt._window(spec, step) for step in range(20)]
    assert windows == [bptt._window(spec, step) for step in range(20)]
    assert len({window.start for window in windows}) > 10


def test_every_inner_step_has_an_augmentation_of_its_own_and_every_outer_step_too(
    task_of, monkeypatch
) -> None:
    task = task_of(inner_augment="shift+rotate", models_per_step=1)
    x = torch.randn(10, 1, 8, 8, dtype=torch.float64)
    calls = calls_of(monkeypatch, task, 2)
    made = [call["loop"].augment(x, t) for call in calls for t in range(4)]
    assert len({tuple(image.flatten().tolist()) for image in made}) == 8
    assert torch.equal(calls_of(monkeypatch, task, 1)[0]["loop"].augment(x, 3), made[3])


@pytest.mark.parametrize("mode", ["shared", "per_network"])
def test_real_images_are_augmented_when_asked_for(task_of, monkeypatch, mode) -> None:
    plain, changed = (
        calls_of(monkeypatch, task_of(outer_augment=text, real_batch_mode=mode, seed=3), 1)[0]["real"]
        for text in ("none", "cutout")
    )
    assert changed.shape == plain.shape == ((3, 30, 1, 8, 8) if mode == "per_network" else (30, 1, 8, 8))
    assert (changed == 0).flatten(0, -4).flatten(1).sum(1).tolist() == [9] * (changed[..., 0, 0, 0].numel())


def test_the_state_of_a_trial_does_not_depend_on_how_it_is_computed(task_of) -> None:
    settings = {"inner_optimizer": "momentum", "order": "sampled", "labels": "soft", "window": 3}
    task = task_of(**settings, inner_augment="shift")
    other = replace(task, plan=ExecutionPlan(memory_mode="recompute", segment=2))
    left, right = (run(p, initial_state(p), 4) for p in (task, other))
    for name, value in left.tensors().items():
        torch.testing.assert_close(value, right.tensors()[name], rtol=1e-7, atol=1e-11)


# ----------------------------------------------------------------------------------------- running mean


def test_the_running_mean_is_that_of_a_recursion_by_hand_that_warms_up(task_of: Make) -> None:
    task = task_of(ema=0.5, labels="soft", outer_lr=0.1)
    state = initial_state(task)
    mean = {name: value.clone() for name, value in state.learned.items()}
    decays = []
    for update in range(1, 16):
        state = run(task, state, 1)
        decays.append(min(0.5, (1 + update) / (10 + update)))
        for name, value in state.learned.items():
            mean[name] = decays[-1] * mean[name] + (1 - decays[-1]) * value
            torch.testing.assert_close(state.ema[name], mean[name], rtol=1e-12, atol=1e-13)
    assert decays[0] == pytest.approx(2 / 11) and decays == sorted(decays)
    assert decays[6] < 0.5 == decays[7] == decays[-1]
    assert averaged(state) is state.ema and final(state) is state.ema


def test_the_running_mean_never_changes_the_course(task_of: Make) -> None:
    """The learned values are the same for any earlier mean."""
    task = task_of(ema=0.9)
    state = other = initial_state(task)
    for _ in range(3):
        state, other = run(task, state, 1), run(task, replace(other, ema=other.m), 1)
    for name, value in state.learned.items():
        assert torch.equal(other.learned[name], value)
        assert not torch.equal(other.ema[name], state.ema[name])


@pytest.mark.parametrize("inner_lr", [0.02, 0.3, 0.7])
def test_rates_that_are_not_learned_stay_to_the_bit_in_the_running_mean(
    task_of, monkeypatch, inner_lr
) -> None:
    task = task_of(ema=0.999, inner_lr_mode="fixed", dtype="float32", inner_lr=inner_lr)
    given_lengths(monkeypatch, task, lambda step: [1.0])
    start = initial_state(task)
    state = run(task, start, 200)
    assert torch.equal(averaged(state)["raw"], start.learned["raw"])


def test_a_skipped_step_leaves_the_running_mean_alone(task_of: Make) -> None:
    task = task_of(network="convnet(depth=1,width=4,norm=none)", inner_lr=1e200, ema=0.5)
    start = initial_state(task)
    after = run(task, start, 2)
    assert after.updates == 0
    assert all(torch.equal(after.ema[name], value) for name, value in start.ema.items())


# ------------------------------------------------------------------------------------- best so far


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_best_state_by_score_is_kept_and_the_first_of_equals(task_of: Make, ema) -> None:
    task = task_of(keep="best", ema=ema)
    state, shown = initial_state(task), []
    for score in (0.3, 0.8, 0.5, 0.8, 0.79):
        state = run(task, state, 1)
        shown.append(averaged(state))
        state = scored(state, task.spec, score)
    assert state.best_score == 0.8
    for name, value in final(state).items():
        assert torch.equal(value, shown[1][name])
    assert not torch.equal(final(state)["images"], averaged(state)["images"])


def test_without_keep_best_the_last_state_is_handed_over(task_of: Make) -> None:
    task = task_of()
    state = scored(run(task, initial_state(task), 2), task.spec, 0.9)
    assert (state.best, state.best_score) == ({}, None)
    assert final(state) is state.learned


# ---------------------------------------------------------------------------------- clipping, trimming


def test_clip_running_bounds_the_norm_by_a_multiple_of_its_running_mean(task_of, monkeypatch) -> None:
    task = task_of(clip_running=2.0, models_per_step=1, outer_steps=50)
    norms = [3.0, 4.0, 1000.0, 1000.0, 1000.0, 0.5, 2.0]
    given_lengths(monkeypatch, task, lambda step: [norms[step]])
    state, running = initial_state(task), None
    for norm in norms:
        running = norm if running is None else running
        applied = min(norm, 2.0 * running)
        before = state.m["images"]
        state, report = outer_step(task, state)
        assert report.grad_norm == pytest.approx(applied, rel=1e-12)
        gradient = 2 * (state.m["images"] - 0.5 * before)
        assert float(gradient.norm()) == pytest.approx(applied, rel=1e-9)
        running = 0.9 * running + 0.1 * applied
        assert state.norm == pytest.approx(running, rel=1e-12)
    assert state.counters()["norm"] == state.norm


def test_clip_running_is_not_stuck_at_a_first_gradient_of_zero(task_of, monkeypatch) -> None:
    task = task_of(clip_running=2.0, models_per_step=1)
    given_lengths(monkeypatch, task, lambda step: [float(step)])
    state = run(task, initial_state(task), 1)
    assert state.norm == 0.0
    state, report = outer_step(task, state)
    assert report.grad_norm == 1.0 and state.norm == pytest.approx(1.0)


def test_trim_leaves_out_the_largest_gradients(task_of, monkeypatch) -> None:
    task = task_of(trim=0.4, models_per_step=5)
    given_lengths(monkeypatch, task, lambda step: [1.0, 1e9, 2.0, 7.0, 3.0])
    after, report = outer_step(task, initial_state(task))
    found = 2 * after.m["images"][0, 0, 0, 0, :5]
    assert found.tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0, 1.0])
    assert report.n_skipped == 0


def test_trim_counts_what_is_finite_and_always_leaves_a_network(task_of, monkeypatch) -> None:
    task = task_of(trim=0.9, models_per_step=4)
    given_lengths(monkeypatch, task, lambda step: [math.nan, 5.0, 2.0, math.inf])
    after, report = outer_step(task, initial_state(task))
    assert (2 * after.m["images"][0, 0, 0, 0, :4]).tolist() == pytest.approx([0, 0, 2.0, 0])
    assert report.n_skipped == 2


# ------------------------------------------------------------------------------------------- rollback


def test_a_rollback_goes_back_to_the_last_healthy_state_at_half_the_rate(task_of: Make) -> None:
    task = task_of(max_rollbacks=2, keep="best", ema=0.5, outer_lr=0.08)
    start = initial_state(task)
    healthy = scored(run(task, start, 3), task.spec, 0.5)
    later = run(task, healthy, 4)
    back = rolled_back(later, task.spec)
    assert back is not None
    assert (back.step, back.updates, back.rollbacks, back.best_score) == (3, 3, 1, 0.5)
    for part in ("learned", "m", "v", "ema", "best"):
        for name, value in getattr(healthy, part).items():
            assert torch.equal(getattr(back, part)[name], value), (part, name)
    # The step that comes next is the same, at half the rate: Adam's update is linear in that.
    full, half = run(task, healthy, 1), run(task, back, 1)
    torch.testing.assert_close(
        2 * (half.images - back.images), full.images - healthy.images, rtol=1e-9, atol=1e-13
    )
    twice = rolled_back(run(task, back, 2), task.spec)
    assert twice is not None and (twice.step, twice.rollbacks) == (3, 2)
    assert rolled_back(run(task, twice, 1), task.spec) is None


def test_a_state_whose_last_step_had_no_finite_network_is_not_healthy(task_of: Make) -> None:
    """It may have diverged already: all rollbacks would be spent there."""
    task = task_of(max_rollbacks=3, keep="best")
    healthy = scored(run(task, initial_state(task), 2), task.spec, 0.5)
    diverged = scored(replace(run(task, healthy, 2), skipped_in_a_row=1), task.spec, 0.6)
    back = rolled_back(diverged, task.spec)
    assert back is not None and (back.step, back.skipped_in_a_row) == (2, 0)
    assert back.best_score == 0.6, "the score counts all the same"


def test_before_any_score_the_start_is_what_a_trial_goes_back_to(task_of: Make) -> None:
    task = task_of(max_rollbacks=1, ema=0.9)
    start = initial_state(task)
    back = rolled_back(run(task, start, 3), task.spec)
    assert back is not None and (back.step, back.rollbacks) == (0, 1)
    assert_states_equal(replace(back, rollbacks=0), start)


def test_the_best_so_far_outlives_a_rollback(task_of: Make) -> None:
    """A score after the healthy state cannot be, but the best may be older than it."""
    task = task_of(max_rollbacks=1, keep="best")
    best = scored(run(task, initial_state(task), 1), task.spec, 0.9)
    state = scored(run(task, best, 2), task.spec, 0.4)
    back = rolled_back(run(task, state, 1), task.spec)
    assert back is not None and (back.step, back.best_score) == (3, 0.9)
    assert torch.equal(final(back)["images"], best.images)


def test_without_max_rollbacks_nothing_is_kept_to_go_back_to(task_of: Make) -> None:
    task = task_of()
    state = scored(run(task, initial_state(task), 1), task.spec, 0.5)
    assert state.healthy == {} and rolled_back(state, task.spec) is None


def test_a_rate_beyond_its_limit_counts_as_diverged_where_one_can_go_back(task_of: Make) -> None:
    settings = {"inner_lr": 0.5, "outer_lr": 5.0, "rate_limit": 1.0}
    calm = task_of(**settings)
    state = run(calm, initial_state(calm), 1)
    assert float(rates_of(state.learned, calm.spec).max()) > 1.0  # not looked at without max_rollbacks
    task = task_of(**settings, max_rollbacks=1)
    with pytest.raises(
        DivergedError, match=r"outer step 0: an inner rate has grown to .* beyond rate_limit 1 "
    ):
        outer_step(task, initial_state(task))


# -------------------------------------------------------------------------------------------- resuming

EVERYTHING = {
    **{"inner_optimizer": "adam", "inner_lr": 0.02, "order": "shuffled", "window": 3, "labels": "soft"},
    **{"inner_augment": "shift+cutout", "outer_augment": "rotate", "clip_running": 1.5, "trim": 0.4},
    **{"ema": 0.8, "keep": "best", "max_rollbacks": 3, "real_batch_mode": "per_network"},
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_with_everything_on_a_state_and_its_counters_are_all_that_is_needed(task_of, dtype) -> None:
    def go_on(task: Task, state: DistillState, scores: list[float]) -> DistillState:
        for score in scores:
            state = scored(run(task, state, 2), task.spec, score)
        return run(task, state, 1)

    task = task_of(**EVERYTHING, dtype=dtype)
    half = go_on(task, initial_state(task), [0.2, 0.7])
    whole = go_on(task, half, [0.6, 0.9])
    saved = {name: value.clone() for name, value in half.tensors().items()}
    torch.manual_seed(12345)
    torch.randn(7)
    again = task_of(**EVERYTHING, dtype=dtype)
    assert_states_equal(go_on(again, DistillState.of(saved, half.counters()), [0.6, 0.9]), whole)
    assert {name.partition(".")[0] for name in saved} == {"learned", "m", "v", "ema", "best", "healthy"}


# ------------------------------------------------------------------------------------------ evaluation


def test_held_out_networks_have_orders_of_their_own_that_no_outer_step_uses(task_of: Make) -> None:
    spec = task_of(order="shuffled", inner_epochs=10).spec
    loops = {
        role: held_out_loop(Recipe.of(spec), spec, role, range(3), spec.steps)
        for role in ("heldout", "selection")
    }
    assert loops["heldout"].augment is None
    rows = [loop.batch_order.batches[:, k].flatten() for loop in loops.values() for k in range(3)]
    rows += [
        bptt._inner_loop(task_of(order="shuffled", inner_epochs=10), 0).batch_order.batches[:, 0].flatten()
    ]
    assert len({tuple(row.tolist()) for row in rows}) == 7
    # Network 2 gives the same in any company.
    alone = held_out_loop(Recipe.of(spec), spec, "heldout", [2], spec.steps).batch_order
    assert torch.equal(alone.batches[:, 0], loops["heldout"].batch_order.batches[:, 2])


def test_a_fixed_trial_of_one_known_network_has_an_order_at_every_step(task_of: Make) -> None:
    task = task_of(init="fixed", order="shuffled", inner_epochs=10)
    orders = [bptt._inner_loop(task, step).batch_order.batches for step in range(3)]
    assert orders[0].shape[1] == 1 and len(network_seeds(task.spec, 0)) == 1
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])


# ------------------------------------------------------------------------------------- smooth outer steps


def test_the_cosine_transform_is_orthonormal_and_sorted_by_frequency() -> None:
    basis = cosine_basis(9)
    torch.testing.assert_close(basis @ basis.T, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-14)
    for k in range(9):  # k half-waves have k changes of sign
        assert int((basis[k, 1:].sign() != basis[k, :-1].sign()).sum()) == k or k == 0


def test_outer_steps_die_away_beyond_the_cutoff(task_of: Make) -> None:
    """Adam's first step is equally long for every coefficient; 1 / (1 + (f / cutoff)^2) of it is left."""
    task = task_of(outer_cutoff=3.0, outer_lr=0.1)
    start = initial_state(task)
    after = run(task, start, 1)
    basis = cosine_basis(8)
    moved = (basis @ (after.images - start.images) @ basis.T).abs()
    f = torch.tensor([[math.hypot(i, j) for j in range(8)] for i in range(8)], dtype=torch.float64)
    expected = 0.1 / (1 + (f / 3) ** 2)
    assert bool((moved <= expected * (1 + 1e-9)).all()) and bool((moved >= expected * 0.98).all())
    torch.testing.assert_close(moved.amax((0, 1, 2)), expected, rtol=1e-3, atol=0)
