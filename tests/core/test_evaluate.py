"""Evaluation: the same for every group size, honest about diverged networks, on the whole test split."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ddsweep.catalog import parse_network
from ddsweep.core import evaluate as core_evaluate
from ddsweep.core.evaluate import Evaluation, count_right, evaluate_networks
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import LabelledImages, RealSet, class_labels, normalise, sample_per_class
from ddsweep.core.init import draw_networks
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.measure import measure
from ddsweep.core.networks import build_network
from ddsweep.core.order import draw_batch_order, rate_index
from ddsweep.core.training import InnerLoop, TrainState, train_networks
from ddsweep.seeds import derive_seed

CPU = torch.device("cpu")
MEAN, STD = (0.3,), (0.35,)
RATES = (0.3, 0.2, 0.25, 0.05)
"""S = 2, E = 2."""


@pytest.fixture(scope="module")
def trained_set(digits) -> tuple[Tensor, Tensor]:
    """Two inner batches of one real digit per class: (images [2, 10, 1, 8, 8], labels [2, 10])."""
    pixels, labels = digits
    picks = sample_per_class(labels, 10, 2, torch.Generator().manual_seed(0)).T.reshape(-1)
    images = normalise(pixels[picks], MEAN, STD, torch.float64).view(2, 10, 1, 8, 8)
    return images, class_labels(2, 10, 1)


@pytest.fixture(scope="module")
def test_split(digits) -> RealSet:
    """211 digits, a prime number: no chunk divides it."""
    pixels, labels = digits
    return RealSet(pixels[-211:], labels[-211:], MEAN, STD)


FIELDS = ("accuracy", "loss", "diverged", "confusion")


def heldout(count: int, text: str = "convnet(width=6)", dtype: torch.dtype = torch.float64):
    network = build_network(parse_network(text, (1, 8, 8)), (1, 8, 8), 10)
    seeds = [derive_seed("heldout", text, "xavier", 1.0, i) for i in range(count)]
    return network, draw_networks(network, "xavier", 1.0, seeds, device=CPU, dtype=dtype)


def evaluate(
    network, params, trained_set, test_split, *, rates=RATES, steps=(0, 2, 4), plan=None
) -> Evaluation:
    plan = plan or ExecutionPlan(test_chunk=64)
    return evaluate_networks(network, params, LabelledImages(*trained_set), rates, steps, test_split, plan)


def assert_same(left: Evaluation, right: Evaluation) -> None:
    assert left.steps == right.steps
    assert torch.equal(left.accuracy, right.accuracy)
    assert torch.equal(left.diverged, right.diverged)
    assert torch.equal(left.confusion, right.confusion)
    torch.testing.assert_close(left.loss, right.loss, rtol=1e-12, atol=0, equal_nan=True)


def rows(params, picks):
    return {name: value[picks] for name, value in params.items()}


# ----------------------------------------------------------------------------------- group by group


@pytest.mark.parametrize("inner", ["vmap", "loop"])
@pytest.mark.parametrize("real", ["vmap", "loop"])
def test_a_group_of_sixteen_gives_what_its_networks_give_alone(trained_set, test_split, inner, real) -> None:
    network, params = heldout(16)
    plan = ExecutionPlan(inner_batching=inner, real_batching=real, test_chunk=64)
    group = evaluate(network, params, trained_set, test_split, plan=plan)
    alone = [evaluate(network, rows(params, [k]), trained_set, test_split) for k in range(16)]
    joined = Evaluation(
        group.steps,
        *(torch.cat([getattr(one, name) for one in alone], 1) for name in FIELDS),
    )
    assert group.accuracy.shape == (3, 16)
    assert_same(group, joined)
    assert len(set(group.accuracy[-1].tolist())) > 5, "networks that all agree would prove nothing"


@pytest.mark.parametrize("teams", [1, 2])
def test_what_comes_out_is_for_anyone_to_go_on_with(trained_set, test_split, teams: int) -> None:
    """Though torch notes nothing down for autograd on the way."""
    network, params = heldout(2)
    plan = ExecutionPlan(inner_batching="explicit", real_batching="explicit", threads=teams, teams=teams)
    found = evaluate(network, params, trained_set, test_split, plan=plan)
    assert not any(getattr(found, name).is_inference() for name in FIELDS)
    assert_same(found, evaluate(network, params, trained_set, test_split))


@pytest.mark.parametrize("inner", ["vmap", "loop", "explicit"])
def test_networks_that_do_not_fit_side_by_side_are_trained_one_after_the_other(
    trained_set, test_split, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a set, rates and an order of its own for each."""
    network, params = heldout(5)
    images, labels = trained_set
    own = LabelledImages(torch.stack([images + 0.01 * k for k in range(5)]), labels)
    rates = [torch.tensor([rate + 0.01 * k for k in range(5)], dtype=torch.float64) for rate in RATES]
    loop = InnerLoop(batch_order=draw_batch_order("shuffled", 2, 10, 1, 4, list(range(5))))
    plan, sizes = ExecutionPlan(inner_batching=inner), []
    start = TrainState.start

    def seen(module, some, optimizer):
        sizes.append(len(next(iter(some.values()))))
        return start(module, some, optimizer)

    def found() -> Evaluation:
        sizes.clear()
        return evaluate_networks(network, params, own, rates, (0, 4), test_split, plan, loop=loop)

    monkeypatch.setattr(TrainState, "start", seen)
    expected = found()
    assert sizes == [5]
    monkeypatch.setattr(
        core_evaluate, "TRAINED_AT_ONCE_BYTES", 2 * 4 * 8 * 10 * measure(network, (1, 8, 8)).outputs
    )
    assert_same(found(), expected)
    assert sizes == [2, 2, 1]


def test_accuracy_and_loss_are_those_of_a_plain_loop(trained_set, test_split) -> None:
    """Training by torch's SGD, then one pass over the whole test split at once."""
    network, params = heldout(3)
    found = evaluate(network, params, trained_set, test_split, steps=(0, 1, 2, 3, 4))
    images, labels = trained_set
    x, y = test_split.normalised(torch.float64), test_split.labels
    for k in range(3):
        weights = {name: nn.Parameter(value[k].clone()) for name, value in params.items()}
        optimiser = torch.optim.SGD(weights.values(), lr=1.0)
        for step in range(5):
            with torch.no_grad():
                logits = functional_call(network, weights, (x,))
                right = int((logits.argmax(1) == y).sum())
                assert float(found.accuracy[step, k]) == right / 211
                loss = float(F.cross_entropy(logits, y))
                assert float(found.loss[step, k]) == pytest.approx(loss, rel=1e-10)
            if step < 4:
                optimiser.param_groups[0]["lr"] = RATES[step]
                optimiser.zero_grad()
                logits = functional_call(network, weights, (images[step % 2],))
                F.cross_entropy(logits, labels[step % 2]).backward()
                optimiser.step()


@pytest.mark.parametrize("chunk", [1, 64, 210, 211, 4096])
def test_the_whole_test_split_is_used_whatever_the_chunk(trained_set, test_split, chunk) -> None:
    """A network that always says 3 is right as often as there are threes, down to the last image."""

    class AlwaysThree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.empty(10))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(x.shape[0], 10)

    bias = torch.zeros(1, 10, dtype=torch.float64)
    bias[0, 3] = 1.0
    labels = test_split.labels
    ends_with_three = torch.cat([labels[:-1], torch.tensor([3])])
    for targets in (labels, ends_with_three):
        plan = ExecutionPlan(test_chunk=chunk)
        test = replace(test_split, labels=targets)
        accuracy, loss, diverged, confusion = count_right(AlwaysThree(), {"bias": bias}, test, plan)
        threes = int((targets == 3).sum())
        assert float(accuracy) == threes / 211
        expected = math.log(9 + math.e) - threes / 211
        assert float(loss) == pytest.approx(expected, rel=1e-12)
        assert not bool(diverged)
        assert confusion.shape == (1, 10, 11) and int(confusion.sum()) == 211
        assert torch.equal(confusion[0, :, 3], torch.bincount(targets, minlength=10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_answers_do_not_depend_on_how_images_lie_in_memory(dtype) -> None:
    """In a loop over networks the channels of colour images lie innermost; under vmap they do not."""
    network = build_network(parse_network("alexcifarnet", (3, 32, 32)), (3, 32, 32), 10)
    params = draw_networks(network, "xavier", 1.0, [1, 2], device=CPU, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (37, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (37,), generator=generator)
    test = RealSet(pixels, labels, (0.5,) * 3, (0.25,) * 3)
    found, expected = (
        count_right(network, params, test, ExecutionPlan(real_batching=batching, test_chunk=16))
        for batching in ("loop", "vmap")
    )
    assert len(set(found[3].sum(1).flatten().tolist())) > 2, "one answer for all images would prove nothing"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_training_helps(trained_set, test_split) -> None:
    """One real digit per class and batch, 40 steps: far above chance on average."""
    network, params = heldout(8, dtype=torch.float32)
    images, labels = trained_set
    found = evaluate(network, params, (images.float(), labels), test_split, steps=(0, 40))
    assert found.accuracy.dtype == torch.float64
    assert float(found.accuracy[0].mean()) < 0.25
    assert float(found.accuracy[1].mean()) > 0.4


# -------------------------------------------------------------------------------- steps and rates


def test_beyond_the_last_step_the_rates_of_the_last_epoch_repeat() -> None:
    # S = 3, E = 2
    assert [rate_index(t, 3, 6) for t in range(6)] == list(range(6))
    assert [rate_index(t, 3, 6) for t in range(6, 13)] == [3, 4, 5, 3, 4, 5, 3]
    assert [rate_index(t, 1, 1) for t in range(3)] == [0, 0, 0]


def test_an_epoch_more_is_the_last_epoch_again(trained_set, test_split) -> None:
    network, params = heldout(4)
    found = evaluate(network, params, trained_set, test_split, steps=(4, 5, 6))
    longer = (*RATES, 0.25, 0.05)
    expected = evaluate(network, params, trained_set, test_split, rates=longer, steps=(4, 5, 6))
    assert_same(found, expected)
    loop = InnerLoop()
    start = TrainState.start(network, params, loop.optimizer)
    trained = train_networks(network, start, LabelledImages(*trained_set), longer, "vmap", loop).weights
    accuracy, _, _, _ = count_right(network, trained, test_split, ExecutionPlan())
    assert torch.equal(found.accuracy[2], accuracy)


def test_step_zero_is_the_network_before_training(trained_set, test_split) -> None:
    network, params = heldout(4)
    found = evaluate(network, params, trained_set, test_split, steps=(0,))
    plan = ExecutionPlan(test_chunk=64)
    accuracy, loss, _, _ = count_right(network, params, test_split, plan)
    assert torch.equal(found.accuracy[0], accuracy)
    assert torch.equal(found.loss[0], loss)


def test_a_step_gives_the_same_whichever_others_are_asked_for(trained_set, test_split) -> None:
    network, params = heldout(4)
    every = evaluate(network, params, trained_set, test_split, steps=(0, 1, 2, 3, 4))
    for step in (1, 3, 4):
        alone = evaluate(network, params, trained_set, test_split, steps=(step,))
        assert torch.equal(alone.accuracy[0], every.accuracy[step])
        assert torch.equal(alone.loss[0], every.loss[step])


def test_initial_weights_are_left_untouched(trained_set, test_split) -> None:
    network, params = heldout(2)
    before = {name: value.clone() for name, value in params.items()}
    evaluate(network, params, trained_set, test_split)
    for name, value in params.items():
        assert torch.equal(value, before[name]) and not value.requires_grad


@pytest.mark.parametrize("inner", ["vmap", "loop"])
def test_a_set_for_each_network_equals_separate_calls(trained_set, test_split, inner) -> None:
    network, params = heldout(3)
    images, labels = trained_set
    own = torch.stack([images, images.flip(-1), images * 0.5])
    plan = ExecutionPlan(inner_batching=inner, test_chunk=64)
    together = evaluate(network, params, (own, labels), test_split, plan=plan)
    for k in range(3):
        one = evaluate(network, rows(params, [k]), (own[k], labels), test_split)
        part = {
            name: getattr(together, name)[:, [k]] for name in ("accuracy", "loss", "diverged", "confusion")
        }
        assert_same(replace(together, **part), one)
    assert len(set(together.loss[-1].tolist())) == 3


@pytest.mark.parametrize("inner", ["explicit", "vmap", "loop"])
@pytest.mark.parametrize("optimizer", ["gd", "momentum", "adam"])
@pytest.mark.parametrize("order", ["shuffled", "sampled"])
def test_networks_in_orders_of_their_own_are_what_they_are_alone(
    trained_set, test_split, order, optimizer, inner
) -> None:
    """In float64: rates of networks at different batches are not rounded on the way."""
    network, params = heldout(3)
    images, labels = trained_set
    plan = ExecutionPlan("cpu", 1, "store", inner, "explicit", 64, 2)
    rates = tuple(rate / (30 if optimizer == "adam" else 3) for rate in RATES)  # 0.1 is no float32

    def evaluated(seeds, weights) -> Evaluation:
        batch_order = draw_batch_order(order, 2, 10, 1, 4, seeds, 7)
        loop = InnerLoop(InnerOptimizer(optimizer), batch_order)
        steps, distilled = (0, 2, 4, 7), LabelledImages(images, labels)
        return evaluate_networks(network, weights, distilled, rates, steps, test_split, plan, loop=loop)

    together = evaluated([7, 8, 9], params)
    plan = replace(plan, threads=2, teams=2)
    assert_same(evaluated([7, 8, 9], params), together)
    for k in range(3):
        alone = evaluated([7 + k], rows(params, [k]))
        assert torch.equal(alone.accuracy[:, 0], together.accuracy[:, k])
        torch.testing.assert_close(alone.loss[:, 0], together.loss[:, k], rtol=1e-10, atol=0)


# ------------------------------------------------------------------------------ diverged networks


def test_a_diverged_network_answers_wrongly_is_marked_and_has_no_loss(trained_set, test_split) -> None:
    network, params = heldout(3, "convnet(width=6,norm=none)")
    healthy = evaluate(network, rows(params, [0, 2]), trained_set, test_split)
    params["fc.weight"][1] = math.nan
    found = evaluate(network, params, trained_set, test_split)
    assert found.diverged.tolist() == [[False, True, False]] * 3
    assert found.accuracy[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert bool(found.loss[:, 1].isnan().all())
    others = {name: getattr(found, name)[:, [0, 2]] for name in ("accuracy", "loss", "diverged", "confusion")}
    assert_same(replace(found, **others), healthy)


def test_a_network_that_diverges_on_the_way_counts_before_and_not_after(trained_set, test_split) -> None:
    network, params = heldout(2, "convnet(width=6,norm=none)", torch.float32)
    images, labels = trained_set
    rates = (0.1, 1e30, 1e30, 1e30)
    found = evaluate(network, params, (images.float(), labels), test_split, rates=rates, steps=(0, 1, 4, 8))
    assert found.diverged.tolist() == [[False] * 2] * 2 + [[True] * 2] * 2
    assert bool(torch.isfinite(found.loss[:2]).all()) and bool(found.loss[2:].isnan().all())
    assert found.accuracy[2:].tolist() == [[0.0, 0.0]] * 2
    assert not bool(found.accuracy.isnan().any())


class Scaled(nn.Module):
    """Two classes, logits (s, -s) times the sum of the pixels: overflows on bright images only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        logit = x.flatten(1).sum(1, keepdim=True) * self.weight
        return torch.cat([logit, -logit], 1)


def scaled(weight: float, sums: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`count_right` of `Scaled` on one image of 2 pixels for each of ``sums``, all of class 0."""
    pixels = torch.tensor([[[[int(127.5 * total)] * 2]] for total in sums], dtype=torch.uint8)
    labels = torch.zeros(len(sums), dtype=torch.int64)
    test, plan = RealSet(pixels, labels, (0.0,), (1.0,)), ExecutionPlan(test_chunk=1)
    return count_right(Scaled(), {"weight": torch.tensor([[weight]])}, test, plan)


def test_only_the_images_whose_logits_overflow_are_answered_wrongly() -> None:
    accuracy, loss, diverged, confusion = scaled(2e38, [0.5, 2.0, 0.5, 2.0])
    assert float(accuracy) == 0.5
    assert bool(diverged) and math.isnan(float(loss))
    assert confusion.tolist() == [[[2, 0, 2], [0, 0, 0]]]  # the last column: no answer


def test_a_loss_is_finite_or_its_network_is_marked_as_diverged() -> None:
    """Logits of 3e38 and -3e38 are float32 numbers, but their difference is not."""
    pixels, labels = torch.full((2, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([0, 1])
    weights = {"weight": torch.tensor([[3e38], [1.0]])}
    test, plan = RealSet(pixels, labels, (0.0,), (1.0,)), ExecutionPlan(real_batching="vmap")
    accuracy, loss, diverged, _ = count_right(Scaled(), weights, test, plan)
    assert not bool(accuracy.isnan().any())
    assert math.isfinite(float(loss[1])) and not bool(diverged[1])
    assert math.isfinite(float(loss[0])) or (math.isnan(float(loss[0])) and bool(diverged[0]))
