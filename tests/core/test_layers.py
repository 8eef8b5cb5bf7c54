"""Derivatives written out against autograd: every layer, every network, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import parse_network
from ddsweep.core import convolution
from ddsweep.core.derivatives import Autograd, Derivatives, derivatives_of
from ddsweep.core.explicit import Explicit
from ddsweep.core.init import draw_networks
from ddsweep.core.layers import (
    AvgPool,
    BiasReLU,
    Conv,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    Linear,
    MaxPool,
    Params,
    ReLU,
    Tape,
)
from ddsweep.core.networks import build_network

K, N = 3, 4
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> bool:
    """Equal up to ``tolerance`` of the largest entry of the right one."""
    assert left.shape == right.shape
    return float((left - right).abs().max()) <= tolerance * float(right.abs().max())


# -------------------------------------------------------------------------------------- single layers


# name: (layer, what torch calls it for one network, shapes of the weights, shape of an image)
LAYERS: dict[str, tuple[Layer, Callable[[Params, Tensor], Tensor], dict[str, Any], tuple[int, ...]]] = {
    "conv": (
        Conv("a", 0),
        lambda p, x: F.conv2d(x, p["a.weight"], p["a.bias"]),
        {"a.weight": (5, 2, 3, 3), "a.bias": (5,)},
        (2, 6, 6),
    ),
    "padded conv": (
        Conv("a", 2),
        lambda p, x: F.conv2d(x, p["a.weight"], p["a.bias"], padding=2),
        {"a.weight": (5, 2, 5, 5), "a.bias": (5,)},
        (2, 7, 7),
    ),
    "conv without bias": (
        Conv("a", 1, bias=False),
        lambda p, x: F.conv2d(x, p["a.weight"], padding=1),
        {"a.weight": (5, 1, 3, 3)},
        (1, 5, 5),
    ),
    "linear": (
        Linear("a"),
        lambda p, x: F.linear(x.flatten(1), p["a.weight"], p["a.bias"]),
        {"a.weight": (7, 18), "a.bias": (7,)},
        (2, 3, 3),
    ),
    "relu": (ReLU(), lambda p, x: F.relu(x), {}, (2, 3, 3)),
    "bias and relu": (
        BiasReLU("a"),
        lambda p, x: F.relu(x + p["a.bias"][:, None, None]),
        {"a.bias": (2,)},
        (2, 3, 3),
    ),
    "max-pool": (MaxPool(), lambda p, x: F.max_pool2d(x, 2), {}, (2, 6, 6)),
    "max-pool of an odd size": (MaxPool(), lambda p, x: F.max_pool2d(x, 2), {}, (2, 7, 5)),
    "average pool": (AvgPool(), lambda p, x: F.avg_pool2d(x, 2), {}, (2, 6, 6)),
    "average pool of an odd size": (AvgPool(), lambda p, x: F.avg_pool2d(x, 2), {}, (2, 5, 7)),
    "instance norm": (
        GroupNorm("a"),
        lambda p, x: F.instance_norm(x, weight=p["a.weight"], bias=p["a.bias"]),
        {"a.weight": (2,), "a.bias": (2,)},
        (2, 4, 4),
    ),
    "instance norm without weights": (
        GroupNorm("a", affine=False),
        lambda p, x: F.instance_norm(x),
        {},
        (2, 4, 4),
    ),
    "group norm": (
        GroupNorm("a", 2, eps=0.1),
        lambda p, x: F.group_norm(x, 2, p["a.weight"], p["a.bias"], 0.1),
        {"a.weight": (6,), "a.bias": (6,)},
        (6, 3, 4),
    ),
    "group norm without weights": (
        GroupNorm("a", 3, affine=False),
        lambda p, x: F.group_norm(x, 3),
        {},
        (6, 4, 3),
    ),
    "mean of each channel": (
        GlobalAvgPool(),
        lambda p, x: F.adaptive_avg_pool2d(x, 1),
        {},
        (2, 5, 4),
    ),
    "linear without bias": (
        Linear("a", bias=False),
        lambda p, x: F.linear(x.flatten(1), p["a.weight"]),
        {"a.weight": (7, 18)},
        (2, 3, 3),
    ),
}
WITH_WEIGHTS = ("conv", "padded conv", "conv without bias", "linear", "linear without bias")


SIZES = [(3, 1, 1, 6, 5, 12, 10), (3, 3, 6, 16, 5, 9, 10), (2, 2, 6, 4, 5, 7, 70), (3, 1, 3, 4, 3, 6, 64)]


@pytest.mark.parametrize("at_once", [2**28, 1], ids=["whole windows", "row by row"])
@pytest.mark.parametrize(("count", "sets", "channels", "out", "size", "side", "images"), SIZES)
def test_a_product_in_pieces_is_the_product(
    count, sets, channels, out, size, side, images, at_once, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does, a row of outputs a piece or, with many images, a pixel; images shared or not."""
    x = random(sets, channels, side, side, images)
    g = random(count, out, (side - size + 1) ** 2 * images)
    shape = (count, out, channels, size, size)
    expected = convolution.weight_derivative(g, convolution.gather([x], size), shape)
    monkeypatch.setattr(convolution, "_PIECES_UP_TO", at_once)
    assert close(convolution._weight_derivative_in_pieces(g, x, shape), expected)


def images_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


def images_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize(
    ("name", "own"), [(n, True) for n in LAYERS] + [(n, False) for n in WITH_WEIGHTS], ids=str
)
def test_a_layer_has_the_four_passes_of_autograd(name: str, own: bool) -> None:
    """Values, gradients, and their changes when weights and input move. Without ``own`` images (which only a
    first layer has, and that has weights) the input is the same for all networks and does not move."""
    layer, call, shapes, shape = LAYERS[name]
    params = {n: random(K, *s, seed=1) for n, s in shapes.items()}
    moved = {n: random(K, *s, seed=2) for n, s in shapes.items()}
    x = random(K if own else 1, N, *shape, seed=3)
    x_moved = random(K, N, *shape, seed=4) if own else torch.zeros(K, N, *shape, dtype=torch.float64)
    y = layer.forward(params, images_last(x), tape := Tape())
    g, g_moved = random(*images_first(y).shape, seed=5), random(*images_first(y).shape, seed=6)

    grads: Params = {}
    back = layer.backward(params, images_last(g), tape, grads, True)
    tangent = layer.tangent(params, moved, images_last(x_moved) if own else None, tape)
    grads_moved: Params = {}
    back_moved = layer.tangent_backward(params, moved, images_last(g_moved), tape, grads_moved)

    for k in range(K):

        def forward_and_back(weights: Params, inputs: Tensor, outer: Tensor) -> tuple[Tensor, Tensor, Params]:
            out, pull = torch.func.vjp(call, weights, inputs)
            by_weights, by_inputs = pull(outer.reshape(out.shape))
            return out, by_inputs, by_weights

        mine = {n: value[k] for n, value in params.items()}
        along = {n: value[k] for n, value in moved.items()}
        values, changes = torch.func.jvp(
            forward_and_back, (mine, x[k if own else 0], g[k]), (along, x_moved[k], g_moved[k])
        )
        assert close(images_first(y)[k].reshape(values[0].shape), values[0])
        assert close(images_first(back)[k], values[1])
        assert close(images_first(tangent)[k].reshape(changes[0].shape), changes[0])
        assert close(images_first(back_moved)[k], changes[1])
        assert grads.keys() == grads_moved.keys() == params.keys()
        for n in params:
            assert close(grads[n][k], values[2][n]), n
            assert close(grads_moved[n][k], changes[2][n]), n


def test_relu_has_the_derivative_0_at_0() -> None:
    tape = Tape()
    x = torch.tensor([-1.0, 0.0, 2.0]).view(1, 1, 1, 1, 3)
    assert ReLU().forward({}, x, tape).flatten().tolist() == [0, 0, 2]
    assert ReLU().backward({}, torch.ones_like(x), tape, {}, True).flatten().tolist() == [0, 0, 1]


def test_of_equal_maxima_the_first_one_is_taken_as_torch_takes_it() -> None:
    windows = torch.tensor(
        [[1.0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1], [2, 1, 2, 1], [-1, -3, -1, -1], [0.0, -0.0, 0, -0.0]]
    )
    x = windows.view(len(windows), 1, 2, 2).requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)
    tape = Tape()
    y = MaxPool().forward({}, images_last(x.detach()[None]), tape)
    found = MaxPool().backward({}, torch.ones_like(y), tape, {}, True)
    assert torch.equal(images_first(found)[0], expected)
    assert expected.flatten(1).argmax(1).tolist() == [0, 1, 2, 0, 0, 0]


# ----------------------------------------------------------------------------------- whole networks

NETWORKS = [
    ("lenet", (1, 28, 28)),
    ("lenet", (3, 32, 32)),
    *(
        (f"convnet(depth={depth},width=4,norm={norm})", (2, side, side))
        for depth, side in ((1, 6), (2, 8), (3, 12), (1, 7), (2, 9), (3, 13))
        for norm in ("instance", "none")
    ),
]


def module_of(network: str, shape: tuple[int, int, int]) -> nn.Module:
    return build_network(parse_network(network, shape), shape, 10)


def networks_of(module: nn.Module, dtype: torch.dtype = torch.float64) -> Params:
    """K networks without special weights: biases and gains are random too."""
    drawn = draw_networks(module, "xavier", 1.0, list(range(K)), device=CPU, dtype=dtype)
    return {n: w + 0.05 * random(*w.shape, seed=7).to(dtype) for n, w in drawn.items()}


def problem(shape: tuple[int, int, int], own: bool, soft: bool) -> tuple[Tensor, Tensor]:
    lead = (K, N) if own else (N,)
    images = random(*lead, *shape, seed=8)
    if soft:
        return images, random(*lead, 10, seed=9)
    return images, torch.randint(10, lead, generator=torch.Generator().manual_seed(9))


def everything(math: Derivatives, params: Params, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """All that an unroll can ask for, by name."""
    found = {"logits": math.logits(params, images).detach()}
    gradient, none = math.gradient(params, images, targets, False)
    assert none is None
    kept_gradient, kept = math.gradient(params, images, targets, True)
    v = {n: random(*w.shape, seed=10).to(w) for n, w in params.items()}
    pulled = math.vjp(params, kept, v)
    losses, other = math.loss_and_gradient(params, images, targets)
    found |= {f"gradient {n}": g for n, g in gradient.items()}
    found |= {f"kept gradient {n}": g for n, g in kept_gradient.items()}
    found |= {f"gradient beside the loss {n}": g for n, g in other.items()}
    found |= {f"pulled {n}": g for n, g in pulled.weights.items()}
    found |= {"losses": losses, "pulled images": pulled.images}
    assert (pulled.targets is None) == (not targets.is_floating_point())
    return found if pulled.targets is None else found | {"pulled targets": pulled.targets}


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize(("network", "shape"), NETWORKS)
def test_a_network_written_out_is_that_of_autograd(network, shape, own, soft) -> None:
    module = module_of(network, shape)
    params = networks_of(module)
    images, targets = problem(shape, own, soft)
    found = everything(Explicit(module.layers), params, images, targets)
    for batching in ("vmap", "loop"):
        expected = everything(Autograd(module, batching), params, images, targets)
        assert found.keys() == expected.keys()
        largest = max(float(v.abs().max()) for n, v in expected.items() if n.startswith("pulled"))
        for name, value in expected.items():
            # Before an instance norm a bias does nothing: its derivative is 0, and rounding of the others.
            scale = (
                largest if ".bias" in name and float(value.abs().max()) < 1e-10 else float(value.abs().max())
            )
            assert found[name].shape == value.shape
            assert float((found[name] - value).abs().max()) <= 1e-12 * scale, name


@pytest.mark.parametrize(("network", "shape"), [NETWORKS[0], NETWORKS[4], NETWORKS[5]])
def test_constant_images_are_full_of_ties_and_give_what_autograd_gives(network, shape) -> None:
    """Weights and images are multiples of powers of two: sums of products are exact in any order, so that
    ties are exact, in any order of a machine's matrix product."""
    module = module_of(network, shape)
    params = {name: (w * 256).round() / 256 for name, w in networks_of(module).items()}
    images = torch.full((N, *shape), 0.75, dtype=torch.float64)
    images[1] = 0
    targets = torch.arange(N)
    found = everything(Explicit(module.layers), params, images, targets)
    expected = everything(Autograd(module, "loop"), params, images, targets)
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= 1e-10 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("what", [float("nan"), float("inf"), 1e200], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize(("network", "shape"), [NETWORKS[0], NETWORKS[4], NETWORKS[5]])
def test_a_broken_network_leaves_every_bit_of_the_others_alone(network, shape, own, what) -> None:
    module = module_of(network, shape)
    params = networks_of(module)
    images, targets = problem(shape, own, True)
    healthy = everything(Explicit(module.layers), params, images, targets)
    params = {n: w.clone() for n, w in params.items()}
    for value in params.values():
        value[1] *= what
    broken = everything(Explicit(module.layers), params, images, targets)
    assert not bool(torch.isfinite(broken["losses"][1]))
    for name, value in healthy.items():
        assert torch.equal(broken[name][[0, 2]], value[[0, 2]]), name


def test_what_was_kept_is_used_up_by_nothing(make_case) -> None:
    """Going back along two directions from one pass, and the images that went in are untouched."""
    case = make_case("lenet", (1, 28, 28))
    math = derivatives_of(case.network, "explicit")
    before = case.images[0].clone()
    _, kept = math.gradient(case.params, case.images[0], case.labels[0], True)
    v = {n: random(*w.shape, seed=11) for n, w in case.params.items()}
    twice = {n: 2 * a for n, a in v.items()}
    one, two = math.vjp(case.params, kept, v), math.vjp(case.params, kept, twice)
    assert close(two.images, 2 * one.images)
    assert torch.equal(case.images[0], before)


def test_one_network_at_a_time_and_float32_are_near(make_case) -> None:
    case = make_case("convnet(width=8)", (1, 8, 8), count=1, dtype=torch.float32)
    x, y = case.images[0], case.labels[0]
    single = everything(derivatives_of(case.network, "explicit"), case.params, x, y)
    exact = everything(
        derivatives_of(case.network, "loop"), {n: w.double() for n, w in case.params.items()}, x.double(), y
    )
    for name in ("logits", "losses", "pulled images", "pulled fc.weight"):
        assert single[name].dtype == torch.float32
        assert close(single[name].double(), exact[name], 1e-4), name


def test_a_network_that_is_not_written_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"explicit: AlexCifarNet has no layers written out"):
        derivatives_of(module_of("alexcifarnet", (3, 32, 32)), "explicit")
