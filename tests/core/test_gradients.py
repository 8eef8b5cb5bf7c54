"""The outer gradient is the derivative of the outer loss: by finite differences, and by autograd.

Everything is float64. The reference in this file trains one network at a time with plain autograd and
shares no line with the engine but the modules themselves.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import LabelledImages
from ddsweep.core.training import InnerLoop, TrainState, train_networks
from ddsweep.core.unroll import OuterGradient, outer_gradient, raw_rates
from tests.core.conftest import smooth_network

MODES = ("store", "recompute")


def unrolled_loss(case, k: int, images: Tensor, raw: Tensor, graph: bool) -> Tensor:
    """Outer loss of network k after T steps, as one end-to-end graph if ``graph``."""
    inner_steps = case.labels.shape[0]
    weights = {name: value[k].detach().requires_grad_() for name, value in case.params.items()}
    for t in range(raw.shape[0]):
        s = t % inner_steps
        loss = F.cross_entropy(functional_call(case.network, weights, (images[s],)), case.labels[s])
        gradient = torch.autograd.grad(loss, list(weights.values()), create_graph=graph)
        rate = F.softplus(raw[t])
        stepped = [w - rate * g for w, g in zip(weights.values(), gradient, strict=True)]
        if not graph:
            stepped = [w.detach().requires_grad_() for w in stepped]
        weights = dict(zip(weights, stepped, strict=True))
    own = case.real_images.dim() == 5
    x, y = (case.real_images[k], case.real_labels[k]) if own else (case.real_images, case.real_labels)
    return F.cross_entropy(functional_call(case.network, weights, (x,)), y)


def losses(case, images: Tensor, raw: Tensor) -> Tensor:
    return torch.stack([unrolled_loss(case, k, images, raw, False).detach() for k in range(case.count)])


def finite_differences(case, eps: float, directions: int) -> dict:
    """Directional central differences ``[directions, K]`` by images and by raw rates."""
    generator = torch.Generator().manual_seed(99)
    found: dict = {}
    for which in ("images", "raw"):
        value = getattr(case, which)
        along = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for _ in range(directions)]
        slopes = []
        for d in along:
            ends = []
            for sign in (1, -1):
                moved = {"images": case.images, "raw": case.raw} | {which: value + sign * eps * d}
                ends.append(losses(case, **moved))
            slopes.append((ends[0] - ends[1]) / (2 * eps))
        found[which] = (along, torch.stack(slopes))
    return found


def worst_error(slopes: tuple[list[Tensor], Tensor], gradient: Tensor) -> float:
    """Largest over networks of |measured - computed| / |measured|, as vectors over the directions."""
    along, measured = slopes
    computed = torch.stack([(gradient * d).flatten(1).sum(1) for d in along])
    return float(((measured - computed).norm(dim=0) / measured.norm(dim=0)).max())


# ----------------------------------------------------------------------------- finite differences

# ReLU and max-pool have kinks, and T = 4 steps amplify a step across one: eps 1e-6 misses by a factor
# of 4 with LeNet. At eps 1e-7 rounding is what remains.
KINKED = {
    "lenet": ("lenet", (1, 28, 28), {}),
    "alexcifarnet": ("alexcifarnet", (3, 32, 32), {"batch": 2, "real_batch": 4, "rate": 0.02}),
    "convnet": ("convnet(width=16)", (1, 8, 8), {}),
}
KINKED_EPS = 1e-7

# Relative errors measured with torch 2.15 on a CPU, the largest over networks, the larger of shared and
# per-network real batches: lenet 4.6e-8 by images and 4.2e-9 by rates, alexcifarnet 6.6e-8 and 1.1e-8 (4.0e-7
# by images on one thread: rounding of the losses), convnet 4.6e-8 and 3.8e-8.
KINKED_TOLERANCE = 1e-6

# The same for the smooth network, T = 6: 3.0e-9 by images and 6.6e-10 by rates at eps 3e-6.
SMOOTH_EPS = 3e-6
SMOOTH_TOLERANCE = 2e-8


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, real), id=f"{name}-{real}", marks=marks)
        for name in KINKED
        for real in ("shared", "per_network")
        for marks in [pytest.mark.slow if (name, real) == ("alexcifarnet", "per_network") else ()]
    ],
)
def kinked(request, make_case):
    """(case with K = 3, its finite differences, losses): measured once for all plans and every K."""
    name, real = request.param
    network, shape, options = KINKED[name]
    case = make_case(network, shape, real=real, **options)
    directions = 1 if name == "alexcifarnet" else 2  # 1.8 million weights take their time
    return case, finite_differences(case, KINKED_EPS, directions), losses(case, case.images, case.raw)


def plan_for(case, mode: str) -> ExecutionPlan:
    """Both ways to compute K networks: vmapped with a shared real batch, one by one with one for each."""
    return ExecutionPlan(memory_mode=mode, inner_batching="vmap" if case.real_images.dim() == 4 else "loop")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_three_networks_at_once_are_the_measured_slopes(kinked, mode) -> None:
    case, slopes, expected_losses = kinked
    gradient = outer_gradient(*case.arguments, plan_for(case, mode))
    assert case.raw.shape == (4,)
    assert worst_error(slopes["images"], gradient.images) < KINKED_TOLERANCE
    assert worst_error(slopes["raw"], gradient.raw_rates) < KINKED_TOLERANCE
    torch.testing.assert_close(gradient.losses, expected_losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_one_network_are_the_measured_slopes(kinked, mode) -> None:
    case, slopes, expected_losses = kinked
    k = 2 if mode == "store" else 1
    gradient = outer_gradient(*case.take([k]).arguments, plan_for(case, mode))
    assert gradient.images.shape[0] == 1
    for which, computed in (("images", gradient.images), ("raw", gradient.raw_rates)):
        along, measured = slopes[which]
        assert worst_error((along, measured[:, [k]]), computed) < KINKED_TOLERANCE
    torch.testing.assert_close(gradient.losses, expected_losses[[k]], rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("real", ["shared", "per_network"])
def test_gradients_of_a_smooth_network_are_the_measured_slopes_closely(make_case, real, mode) -> None:
    case = make_case(smooth_network(4, 12, 10), (1, 8, 8), real=real, inner_steps=3, rate=0.5)
    gradient = outer_gradient(*case.arguments, ExecutionPlan(memory_mode=mode))
    slopes = finite_differences(case, SMOOTH_EPS, directions=4)
    assert case.raw.shape == (6,)
    assert worst_error(slopes["images"], gradient.images) < SMOOTH_TOLERANCE
    assert worst_error(slopes["raw"], gradient.raw_rates) < SMOOTH_TOLERANCE


# ----------------------------------------------------------------------- equality of ways to compute


def assert_same(left, right, tolerance: float = 1e-12) -> None:
    """Equal to ``tolerance`` of the largest entry of each network, in each of the three results."""
    for name in ("losses", "images", "raw_rates"):
        a, b = getattr(left, name).flatten(1 if name != "losses" else 0), getattr(right, name)
        b = b.reshape(a.shape)
        if name == "losses":
            a, b = a[:, None], b[:, None]
        scale = b.abs().amax(1)
        assert bool(((a - b).abs().amax(1) <= tolerance * scale).all()), name


ALL_PLANS = [
    *(ExecutionPlan(memory_mode=mode) for mode in MODES),
    *(
        ExecutionPlan(memory_mode=mode, inner_batching=inner, real_batching=real, real_chunk=7)
        for mode in MODES
        for inner in ("vmap", "loop")
        for real in ("vmap", "loop")
    ),
    *(
        ExecutionPlan("cpu", 1, mode, inner, real, real_chunk=chunk, real_block=block, segment=segment)
        for mode, segment in (("store", 1), ("recompute", 1), ("recompute", 3))
        for inner, real, chunk, block in (
            ("explicit",) * 2 + (7, 2),
            ("explicit", "loop", 4, 1),
            ("vmap", "explicit", 64, 4),
        )
    ),
    ExecutionPlan("cpu", 2, "store", "explicit", "explicit", 7, 2, teams=2),
    ExecutionPlan("cpu", 2, "recompute", "vmap", "loop", 7, 2, teams=2),
]


@pytest.mark.parametrize("real", ["shared", "per_network"])
@pytest.mark.parametrize("name", ["lenet", "convnet"])
def test_every_plan_gives_the_gradient_of_one_end_to_end_graph(make_case, name, real) -> None:
    network, shape, options = KINKED[name]
    case = make_case(network, shape, real=real, **options)
    expected = end_to_end(case)
    for plan in ALL_PLANS:
        assert_same(outer_gradient(*case.arguments, plan), expected)


def test_alexcifarnet_gives_the_gradient_of_one_end_to_end_graph(make_case) -> None:
    network, shape, options = KINKED["alexcifarnet"]
    case = make_case(network, shape, count=1, **options)
    expected = end_to_end(case)
    for mode in MODES:
        for inner, real in (("vmap", "vmap"), ("loop", "loop")):
            plan = ExecutionPlan(memory_mode=mode, inner_batching=inner, real_batching=real, real_chunk=3)
            assert_same(outer_gradient(*case.arguments, plan), expected)


def test_a_long_smooth_unroll_gives_the_gradient_of_one_end_to_end_graph(make_case) -> None:
    case = make_case(smooth_network(4, 12, 10), (1, 8, 8), inner_steps=3, inner_epochs=5, rate=0.5)
    for mode in MODES:
        assert_same(outer_gradient(*case.arguments, ExecutionPlan(memory_mode=mode)), end_to_end(case))


def end_to_end(case):
    """What autograd makes of the whole unroll, one network at a time."""
    rows = []
    for k in range(case.count):
        images, raw = case.images.clone().requires_grad_(), case.raw.clone().requires_grad_()
        loss = unrolled_loss(case, k, images, raw, True)
        rows.append((loss.detach(), *torch.autograd.grad(loss, (images, raw))))
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return OuterGradient(*stacked)


def test_a_network_has_the_same_gradient_alone_and_among_others(make_case) -> None:
    case = make_case("convnet(width=16)", (1, 8, 8), real="per_network")
    together = outer_gradient(*case.arguments, ExecutionPlan())
    for k in range(case.count):
        row = OuterGradient(together.losses[[k]], together.images[[k]], together.raw_rates[[k]])
        assert_same(outer_gradient(*case.take([k]).arguments, ExecutionPlan()), row)


def trained(case, rates, batching) -> TrainState:
    loop = InnerLoop()
    start = TrainState.start(case.network, case.params, loop.optimizer)
    return train_networks(case.network, start, case.distilled, rates, batching, loop)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_are_left_untouched(make_case, mode) -> None:
    case = make_case("convnet(width=16)", (1, 8, 8))
    inputs = [*case.params.values(), case.images, case.raw, case.real_images]
    before = [value.clone() for value in inputs]
    outer_gradient(*case.arguments, ExecutionPlan(memory_mode=mode))
    trained(case, [0.1, 0.2], "vmap")
    for value, old in zip(inputs, before, strict=True):
        assert torch.equal(value, old)
        assert not value.requires_grad and value.grad is None


# ------------------------------------------------------------------------------------- closed form


class OneWeight(nn.Module):
    """Logistic regression with a single weight w: logits (0, w x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        logit = x.flatten(1) @ self.weight
        return torch.cat([torch.zeros_like(logit), logit], 1)


@pytest.mark.parametrize("mode", MODES)
def test_one_step_of_logistic_regression_has_the_gradient_derived_by_hand(mode) -> None:
    """loss(w; x) = log(1 + exp(-w x)) for label 1, so g = -x s(-w x), w' = w - r g, L = loss(w'; z)."""

    def s(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    w, x, z, rate = 0.7, 1.3, -0.4, 0.25
    g = -x * s(-w * x)
    after = w - rate * g
    v = -z * s(-after * z)
    dg_dx = -s(-w * x) + x * w * s(-w * x) * s(w * x)
    raw = math.log(math.expm1(rate))

    def tensor(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64).view(1, 1, 1, 1)

    label = torch.ones(1, dtype=torch.int64)
    gradient = outer_gradient(
        *(OneWeight(), {"weight": tensor(w)[:, 0]}, LabelledImages(tensor(x)[None], label[None])),
        *(torch.tensor([raw], dtype=torch.float64), LabelledImages(tensor(z), label)),
        ExecutionPlan(memory_mode=mode),
    )
    assert gradient.losses.item() == pytest.approx(math.log1p(math.exp(-after * z)), rel=1e-14)
    assert gradient.images.item() == pytest.approx(-rate * v * dg_dx, rel=1e-13)
    assert gradient.raw_rates.item() == pytest.approx(-v * g * s(raw), rel=1e-13)


# ------------------------------------------------------------------------------- rates and training


def test_raw_rates_are_the_inverse_of_softplus_from_tiny_to_huge() -> None:
    for rate in (1e-6, 0.02, 1.0, 50.0, 1e30):
        raw = raw_rates(rate, 3)
        assert raw.shape == (3,) and raw.dtype == torch.float64
        torch.testing.assert_close(F.softplus(raw), torch.full_like(raw, rate), rtol=1e-9, atol=0)


def test_rates_that_do_not_go_into_the_inner_steps_are_refused(make_case) -> None:
    case = make_case("convnet(width=4)", (1, 8, 8))
    arguments = list(case.arguments)
    arguments[3] = case.raw[:3]
    with pytest.raises(ValueError, match="3 rates do not go into 2 inner steps"):
        outer_gradient(*arguments, ExecutionPlan())


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_training_in_two_stretches_is_training_in_one(make_case, batching) -> None:
    """The second stretch starts with the batch at which the first one stopped."""
    case = make_case("convnet(width=8)", (1, 8, 8), inner_steps=3)
    rates = F.softplus(case.raw).tolist()
    whole, half = trained(case, rates, batching), trained(case, rates[:2], batching)
    rest = train_networks(case.network, half, case.distilled, rates[2:], batching, InnerLoop())
    for name, value in whole.weights.items():
        assert torch.equal(rest.weights[name], value)


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_training_is_plain_gradient_descent(make_case, batching) -> None:
    case = make_case("lenet", (1, 28, 28))
    rates = F.softplus(case.raw).tolist()
    found = trained(case, rates, batching).weights
    for k in range(case.count):
        weights = {name: nn.Parameter(value[k].clone()) for name, value in case.params.items()}
        optimiser = torch.optim.SGD(weights.values(), lr=1.0)
        for t, rate in enumerate(rates):
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad()
            logits = functional_call(case.network, weights, (case.images[t % 2],))
            F.cross_entropy(logits, case.labels[t % 2]).backward()
            optimiser.step()
        for name, value in weights.items():
            torch.testing.assert_close(found[name][k], value.detach(), rtol=1e-11, atol=1e-13)
