"""Recorded outer gradients and training, where there is no GPU to record them on.

What is shown here is what a recording needs: work that takes all that changes from call to call from its
inputs. CUDA graphs themselves are in tests/gpu.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ddsweep.core.training
import ddsweep.core.unroll
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core import graphs
from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.images import LabelledImages
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.order import draw_batch_order
from ddsweep.core.training import InnerLoop, TrainState, train_networks
from ddsweep.core.unroll import Window, outer_gradient
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

    for module in (ddsweep.core.training, ddsweep.core.unroll):
        monkeypatch.setattr(module, "replayed", replayed)
    return kinds


WAYS = {
    "as before": ("shared", False, "gd", "fixed", "store"),
    "recomputed": ("per_network", False, "gd", "sampled", "recompute"),
    "momentum": ("shared", True, "momentum", "shuffled", "store"),
    "adam": ("per_network", True, "adam", "sampled", "recompute"),
}
"""Every optimiser, order, memory mode, kind of labels and of real batches."""


@pytest.mark.parametrize(("real", "soft", "optimizer", "order", "mode"), WAYS.values(), ids=WAYS)
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
        batch_order = None if order == "fixed" else draw_batch_order(order, 2, 10, 1, 4, seeds)
        loop = InnerLoop(InnerOptimizer(optimizer), batch_order)
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
    monkeypatch.setattr(ddsweep.core.training, "RECORDED_STEPS", 3)
    for turn in range(2):
        case = replace(make_case("lenet", (1, 28, 28), seed=turn, batch=10), network=lenet(make_case))
        images = torch.stack([case.images * (1 + k) for k in range(3)]) if own else case.images
        batch_order = None if order == "fixed" else draw_batch_order(order, 2, 10, 1, 9, [turn, 1, 2], 9)
        loop = InnerLoop(InnerOptimizer(optimizer), batch_order)
        rates = [0.02 * (1 + turn + t) for t in range(9)]
        if order != "fixed":
            rates = [torch.tensor([rate, 2 * rate, 3 * rate], dtype=torch.float64) for rate in rates]
        found = {}
        for graph in (False, True):
            state, distilled = (
                TrainState.start(case.network, case.params, loop.optimizer),
                LabelledImages(images, case.labels),
            )
            for some in (rates[:7], rates[7:]):
                state = train_networks(case.network, state, distilled, some, "explicit", loop, graph=graph)
            found[graph] = (state.weights, *state.slots)
        for left, right in zip(found[0], found[1], strict=True):
            for name in left:
                torch.testing.assert_close(left[name], right[name], rtol=1e-12, atol=1e-15)
    assert len(first_work_kept) == 8 and len(set(first_work_kept)) == 3, "three steps, one step, two steps"


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


class _Refused:
    def __init__(self, *_: Any) -> None:
        raise graphs._UnfitError("operation not permitted when stream is capturing")


def test_work_that_cannot_be_recorded_is_done_without_and_tried_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []
    monkeypatch.setattr(graphs, "_Recording", lambda *given: tried.append(given) or _Refused(*given))
    inputs = [torch.ones(2), torch.ones(3)]
    try:
        for value in inputs * 2:
            assert torch.equal(graphs.replayed("a", lambda x: [x + 1], [value])[0], value + 1)
    finally:
        graphs.forget_recordings()
    assert len(tried) == 2, "for each shape"
    said = "no CUDA graph could be recorded, kernels are started one by one: operation not permitted when"
    assert caplog.text.count(said) == 2


def test_few_recordings_are_kept_and_those_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Recording:
        def __init__(self, work: Any, inputs: Any) -> None:
            made.append(len(inputs[0]))

        def replay(self, inputs: Any) -> list[Tensor]:
            return list(inputs)

    monkeypatch.setattr(graphs, "_Recording", Recording)
    monkeypatch.setattr(graphs, "MOST_KEPT", 2)
    try:
        for size in (1, 2, 1, 3, 1, 2):
            assert len(graphs.replayed("a", lambda x: [x], [torch.ones(size)])[0]) == size
        graphs.forget_recordings()
        graphs.replayed("a", lambda x: [x], [torch.ones(1)])
    finally:
        graphs.forget_recordings()
    assert made == [1, 2, 3, 2, 1]


def test_no_memory_to_record_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    inputs = [torch.ones(1)]
    monkeypatch.setattr(graphs, "_Recording", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.replayed("a", lambda x: [x], inputs)
    assert not graphs._recordings


def test_recordings_make_room_for_one_that_does_not_fit_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recording:
        def __init__(self, work: Any, inputs: Any) -> None:
            if graphs._recordings:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def replay(self, inputs: Any) -> list[Tensor]:
            return [inputs[0] + 1]

    monkeypatch.setattr(graphs, "_Recording", Recording)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    try:
        for what in ("a", "b", "b"):
            assert float(graphs.replayed(what, lambda x: [x], [torch.zeros(1)])[0]) == 1
            assert [key[0] for key in graphs._recordings] == [what]
    finally:
        graphs.forget_recordings()
