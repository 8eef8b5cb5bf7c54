"""Inner optimisers: those of torch, and their updates differentiated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddsweep.core.inner import InnerOptimizer, UpdateVjp
from ddsweep.core.layers import Params
from ddsweep.core.order import draw_batch_order
from ddsweep.core.training import InnerLoop, TrainState, train_networks

KINDS = ("gd", "momentum", "adam")
K = 3


def weights(seed: int, scale: float = 1.0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (K, 4, 3), "b": (K, 5)}
    return {n: scale * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def torchs(kind: str, values: list[Tensor], decay: float = 0.0) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(values, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    return torch.optim.SGD(values, lr=1.0, momentum=0.9 if kind == "momentum" else 0.0, weight_decay=decay)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_is_that_of_torch(kind: str, decay: float) -> None:
    """Adam up to its epsilon, which is small beside every gradient here."""
    params = weights(0)
    theirs = {n: w.clone().requires_grad_() for n, w in params.items()}
    optimizer, reference = InnerOptimizer(kind, 0.9, decay), torchs(kind, list(theirs.values()), decay)
    slots = optimizer.start(params)
    for t in range(12):
        gradient = weights(t + 1, 10.0 ** (t % 4 - 1))
        rate = 0.3 * 0.9**t
        params, slots = optimizer.update(params, slots, gradient, rate, t)
        reference.param_groups[0]["lr"] = rate
        for n, w in theirs.items():
            w.grad = gradient[n]
        reference.step()
    for n, w in theirs.items():
        tolerance = 1e-5 if kind == "adam" else 1e-14
        torch.testing.assert_close(params[n], w.detach(), rtol=tolerance, atol=tolerance)


def test_there_is_no_way_back_through_weight_decay() -> None:
    params = weights(0)
    with pytest.raises(ValueError, match="no way back through a step with weight decay"):
        InnerOptimizer("gd", weight_decay=0.1).vjp(params, (), (), params, 0.1, 0)


def test_adam_leaves_a_weight_without_gradient_where_it_is() -> None:
    params = weights(0)
    zero = {n: torch.zeros_like(w) for n, w in params.items()}
    optimizer = InnerOptimizer("adam")
    slots = optimizer.start(params)
    for t in range(3):
        after, slots = optimizer.update(params, slots, zero, 0.1, t)
        assert all(torch.equal(after[n], w) for n, w in params.items())
    pulled = optimizer.vjp(weights(1), (zero, zero), optimizer.start(params), zero, 0.1, 0)
    for part in (pulled.gradient, *pulled.slots):
        assert all(bool(torch.isfinite(value).all()) for value in part.values())


def by_autograd(
    optimizer: InnerOptimizer, v: Params, by_slots: tuple[Params, ...], slots, gradient, rate, step: int
) -> UpdateVjp:
    """What autograd makes of <v, w'> + <by_slots, slots'>, all of one update."""
    leaf = {n: g.clone().requires_grad_() for n, g in gradient.items()}
    before = tuple({n: a.clone().requires_grad_() for n, a in part.items()} for part in slots)
    rates = torch.as_tensor(rate, dtype=torch.float64).expand(K).clone().requires_grad_()
    after, slots_after = optimizer.update(
        {n: torch.zeros_like(a) for n, a in v.items()}, before, leaf, rates, step
    )
    pairs = [(after, v), *zip(slots_after, by_slots, strict=True)]
    total = sum((left[n] * right[n]).sum() for left, right in pairs for n in v)
    leaves = [*leaf.values(), rates, *(a for part in before for a in part.values())]
    found = iter(torch.autograd.grad(total, leaves))
    by_gradient = {n: next(found) for n in v}
    by_rate = next(found)
    return UpdateVjp(by_gradient, tuple({n: next(found) for n in v} for _ in slots), by_rate)


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(
    "rate", [0.3, torch.tensor([0.3, 0.1, 2.0], dtype=torch.float64)], ids=["one", "own"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_through_an_update_is_that_of_autograd(kind: str, rate, step: int) -> None:
    optimizer = InnerOptimizer(kind, 0.7)
    count = len(optimizer.start(weights(0)))
    slots = tuple(weights(10 + i) for i in range(count))
    if kind == "adam":
        slots = (slots[0], {n: a.square() for n, a in slots[1].items()})
    by_slots = tuple(weights(20 + i) for i in range(count))
    v, gradient = weights(1), weights(2)
    found = optimizer.vjp(v, by_slots, slots, gradient, rate, step)
    expected = by_autograd(optimizer, v, by_slots, slots, gradient, rate, step)
    for left, right in ((found.gradient, expected.gradient), *zip(found.slots, expected.slots, strict=True)):
        for n, value in right.items():
            torch.testing.assert_close(left[n], value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.rate, expected.rate, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batching", ["explicit", "vmap", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_torch(make_case, kind: str, batching: str) -> None:
    """A network alone, through its own order, by torch.optim."""
    case = make_case("convnet(width=6)", (1, 8, 8), batch=10, inner_steps=3)
    batch_order = draw_batch_order("shuffled", 3, 10, 1, 6, [4, 5, 6])
    loop = InnerLoop(InnerOptimizer(kind, 0.9), batch_order)
    learned = 0.1 * F.softplus(case.raw)
    rates = [learned[batch_order.rates[t]] for t in range(6)]
    images, labels = case.images.flatten(0, 1), case.labels.flatten()
    start = TrainState.start(case.network, case.params, loop.optimizer)
    trained = train_networks(case.network, start, case.distilled, rates, batching, loop).weights
    for k in range(case.count):
        own = {n: value[k].clone().requires_grad_() for n, value in case.params.items()}
        reference = torchs(kind, list(own.values()))
        for t in range(6):
            reference.param_groups[0]["lr"] = float(rates[t][k])
            picks = batch_order.batches[t, k]
            reference.zero_grad()
            logits = torch.func.functional_call(case.network, own, (images[picks],))
            F.cross_entropy(logits, labels[picks]).backward()
            reference.step()
        for n, value in own.items():
            if kind == "adam" and n.startswith("convs") and n.endswith("bias"):
                continue  # of no effect before an instance norm: a gradient of rounding, which Adam enlarges
            tolerance = 1e-4 if kind == "adam" else 1e-11
            torch.testing.assert_close(trained[n][k], value.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_two_stretches_is_training_in_one(make_case, kind: str) -> None:
    """The second stretch goes on with the slots of the first, at the batch and the count where it stopped."""
    case = make_case("convnet(width=6)", (1, 8, 8), inner_steps=3)
    loop, rates = InnerLoop(InnerOptimizer(kind)), (0.1 * F.softplus(case.raw)).tolist()
    start = TrainState.start(case.network, case.params, loop.optimizer)
    whole = train_networks(case.network, start, case.distilled, rates, "explicit", loop)
    half = train_networks(case.network, start, case.distilled, rates[:2], "explicit", loop)
    rest = train_networks(case.network, half, case.distilled, rates[2:], "explicit", loop)
    assert (start.step, half.step, rest.step) == (0, 2, len(rates))
    assert all(torch.equal(rest.weights[n], value) for n, value in whole.weights.items())
