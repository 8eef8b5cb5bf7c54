"""Recorded outer gradients, where there is no GPU to record them on.

What is shown here is what a recording needs: work that takes all that changes from call to call from its
inputs. CUDA graphs themselves are in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ddsweep.core.unroll
import ddsweep.trial
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.graphs import RecordingError
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.order import draw_course
from ddsweep.core.unroll import InnerLoop, Window, outer_gradient, train_networks
from ddsweep.data.sources import load_splits
from ddsweep.results.artifacts import load_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings, first_plan


@pytest.fixture
def first_work_kept(monkeypatch: pytest.MonkeyPatch) -> list[Hashable]:
    """Like a recording, all calls of a kind do the work that the first one brought. Returns the kinds."""
    kept: dict[Hashable, Callable[..., Sequence[Tensor]]] = {}
    kinds: list[Hashable] = []

    def replayed(
        what: Hashable, work: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        key = (what, tuple((value.shape, value.dtype) for value in inputs))
        kinds.append(key)
        return list(kept.setdefault(key, work)(*[value.clone() for value in inputs]))

    monkeypatch.setattr(ddsweep.core.unroll, "replayed", replayed)
    return kinds


@pytest.mark.parametrize("mode", ["store", "recompute"])
@pytest.mark.parametrize("order", ["fixed", "shuffled", "sampled"])
@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adam"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("real", ["shared", "per_network"])
def test_nothing_of_the_first_call_stays_in_the_work(
    real, soft, optimizer, order, mode, make_case, first_work_kept
) -> None:
    """Other weights, images, labels, rates, real images and orders in each turn."""
    plan = replace(choose_plan(torch.device("cpu"), 1, lenet(make_case)), memory_mode=mode, segment=2)
    for turn in range(3):
        case = make_case("lenet", (1, 28, 28), rate=0.05 * (1 + turn), seed=turn, real=real, batch=10)
        case = replace(case, network=lenet(make_case))
        if soft:
            case = replace(case, labels=torch.rand(2, 10, 10, dtype=torch.float64) / 5)
        seeds = [10 * turn + k for k in range(3)]
        course = None if order == "fixed" else draw_course(order, 2, 10, 1, 4, seeds)
        loop = InnerLoop(InnerOptimizer(optimizer), course)
        expected = outer_gradient(*case.arguments, plan, loop=loop)
        found = outer_gradient(*case.arguments, replace(plan, graph=True), loop=loop)
        for name in ("losses", "images", "raw_rates", *(["labels"] if soft else [])):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-15)
    assert len(first_work_kept) == 3 and len(set(first_work_kept)) == 1


_LENET: list = []


def lenet(make_case):
    """One and the same module: a recording belongs to it."""
    if not _LENET:
        _LENET.append(make_case("lenet", (1, 28, 28)).network)
    return _LENET[0]


@pytest.mark.parametrize("order", ["fixed", "shuffled"])
@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adam"])
@pytest.mark.parametrize("own", [False, True], ids=["one set", "a set each"])
def test_training_by_recordings_is_training(
    own, optimizer, order, make_case, first_work_kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven steps, at most three of them in a recording, and then two more."""
    monkeypatch.setattr(ddsweep.core.unroll, "RECORDED_STEPS", 3)
    for turn in range(2):
        case = replace(make_case("lenet", (1, 28, 28), seed=turn, batch=10), network=lenet(make_case))
        images = torch.stack([case.images * (1 + k) for k in range(3)]) if own else case.images
        course = None if order == "fixed" else draw_course(order, 2, 10, 1, 9, [turn, 1, 2], 9)
        loop = InnerLoop(InnerOptimizer(optimizer), course)
        rates = [0.02 * (1 + turn + t) for t in range(9)]
        if order != "fixed":
            rates = [torch.tensor([rate, 2 * rate, 3 * rate], dtype=torch.float64) for rate in rates]
        found = {}
        for graph in (False, True):
            first = (case.network, case.params, images, case.labels)
            how = {"loop": loop, "graph": graph}
            params, slots = train_networks(*first, rates[:7], "explicit", **how)
            again = (case.network, params, images, case.labels)
            found[graph] = train_networks(*again, rates[7:], "explicit", 7, slots=slots, **how)
        for left, right in zip((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), strict=True):
            for name in left:
                torch.testing.assert_close(left[name], right[name], rtol=1e-12, atol=1e-15)
    kinds = 4 if optimizer == "adam" else 3  # three steps, one step, two steps; and where Adam begins
    assert len(first_work_kept) == 8 and len(set(first_work_kept)) == kinds


def test_windows_networks_and_sizes_have_recordings_of_their_own(make_case, first_work_kept) -> None:
    case, plan = make_case("lenet", (1, 28, 28)), ExecutionPlan(graph=True, inner_batching="explicit")
    for window in (Window(0, 2), Window(1, 3), Window(0, 2)):
        exact = outer_gradient(*case.arguments, replace(plan, graph=False), window=window)
        found = outer_gradient(*case.arguments, plan, window=window)
        torch.testing.assert_close(found.images, exact.images, rtol=1e-12, atol=1e-15)
    assert len(set(first_work_kept)) == 2
    outer_gradient(*case.take([0, 2]).arguments, plan)
    outer_gradient(*make_case("lenet", (1, 28, 28)).arguments, plan)
    assert len(set(first_work_kept)) == 4


def test_an_augmentation_is_refused(make_case) -> None:
    case = make_case("lenet", (1, 28, 28))
    with pytest.raises(ValueError, match="graph: an augmentation is another one in every outer step"):
        outer_gradient(
            *case.arguments, ExecutionPlan(graph=True), loop=InnerLoop(augment=lambda images, t: images)
        )


SPEC = TrialSpec(
    dataset=DATASETS["digits"],
    **{"network": "convnet(depth=1,width=4,norm=none)", "inner_epochs": 2, "outer_steps": 4},
    **{"models_per_step": 2, "real_batch": 32, "selection_networks": 1, "dtype": "float64"},
)


def test_only_outer_steps_that_are_the_same_work_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = TrialSettings(device="cuda")
    assert first_plan(SPEC, settings).graph
    assert not first_plan(SPEC, TrialSettings(device="cpu")).graph
    assert not first_plan(replace(SPEC, window=1), settings).graph
    assert not first_plan(replace(SPEC, inner_augment="shift"), settings).graph
    assert first_plan(replace(SPEC, outer_augment="shift"), settings).graph


def test_a_trial_that_cannot_be_recorded_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_) -> list[Tensor]:
        raise RecordingError("no CUDA graph could be recorded: operation not permitted")

    monkeypatch.setattr(ddsweep.core.unroll, "replayed", refuse)
    splits = load_splits(SPEC.dataset, None, validation_fraction=0.1, split_seed=0)
    plain, refused = SweepDirectory(tmp_path / "plain"), SweepDirectory(tmp_path / "refused")
    assert distil_trial(SPEC, splits, plain, TrialSettings())
    first = ddsweep.trial.first_plan
    monkeypatch.setattr(ddsweep.trial, "first_plan", lambda *given: replace(first(*given), graph=True))
    assert distil_trial(SPEC, splits, refused, TrialSettings())
    assert "is computed without a CUDA graph: no CUDA graph could be recorded" in caplog.text
    _, header = load_tensors(refused.checkpoint(SPEC.trial_id))
    assert header["plan"]["graph"] is False and header["n_replans"] == 1
    found, expected = (read_distilled(SPEC, directory) for directory in (refused, plain))
    assert torch.equal(found.images, expected.images)
