"""The networks: sizes and counts as published, and the same mathematics under vmap as one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from ddsweep.catalog import measure_of, parse_network
from ddsweep.core.nets.alexcifarnet import local_response_norm
from ddsweep.core.networks import build_network, forward_networks, stack_networks
from ddsweep.errors import SettingError

SHAPES = [
    ("lenet", (1, 28, 28), 61_706),
    ("lenet", (3, 28, 28), 62_006),
    ("lenet", (1, 32, 32), 61_706),
    ("lenet", (3, 32, 32), 62_006),
    ("alexcifarnet", (3, 32, 32), 1_756_426),
    # Zhao et al. 2021: 3 blocks of 128, instance norm, 32 px.
    ("convnet", (3, 32, 32), 320_010),
    ("convnet", (1, 8, 8), 128 * 9 + 128 + 256 + 128 * 128 * 9 + 128 + 256 + 128 * 4 * 10 + 10),
    ("convnet(depth=1,width=5,norm=none)", (1, 16, 16), 5 * 9 + 5 + 5 * 64 * 10 + 10),
]


@pytest.mark.parametrize(("text", "shape", "count"), SHAPES)
def test_parameter_counts_are_the_published_ones(text, shape, count) -> None:
    spec = parse_network(text, shape)
    network = build_network(spec, shape, 10)
    assert sum(value.numel() for value in network.parameters()) == count
    assert measure_of(spec, shape, 10).parameters == count


def test_a_built_network_holds_no_weights() -> None:
    network = build_network(parse_network("alexcifarnet", (3, 32, 32)), (3, 32, 32), 10)
    assert {value.device.type for value in network.parameters()} == {"meta"}
    assert list(network.buffers()) == []


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("lenet", (1, 8, 8)),
        ("lenet", (1, 30, 30)),
        ("alexcifarnet", (3, 28, 28)),
        ("convnet(depth=4)", (1, 8, 8)),
        ("convnet(depth=1)", (1, 8, 6)),
        ("convnet(depth=4,norm=none)", (1, 8, 8)),
    ],
)
def test_sizes_that_a_network_cannot_take_are_refused(text, shape) -> None:
    with pytest.raises(SettingError, match=r"network: .*images of"):
        parse_network(text, shape)


@pytest.mark.parametrize(("text", "shape", "count"), SHAPES)
def test_logits_have_one_column_per_class(make_case, text, shape, count) -> None:
    case = make_case(text, shape, count=2, classes=7, dtype=torch.float32)
    for batching in ("vmap", "loop"):
        logits = forward_networks(case.network, case.params, case.real_images[:3], batching)
        assert logits.shape == (2, 3, 7)
        assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("text", ["convnet(depth=3,width=4)", "convnet(depth=3,width=4,norm=none)"])
def test_the_deepest_convnet_of_a_size_still_answers(make_case, text) -> None:
    case = make_case(text, (1, 8, 8))
    assert forward_networks(case.network, case.params, case.real_images, "vmap").shape == (3, 9, 10)


# ---------------------------------------------------------------------------------- vmap and loops


def derivatives(case, images: Tensor, labels: Tensor, batching: str) -> list[Tensor]:
    """Logits, first derivatives by weights and images, and a product with the second derivatives."""
    names = list(case.params)
    weights = [value.clone().requires_grad_() for value in case.params.values()]
    x = images.clone().requires_grad_()
    logits = forward_networks(case.network, dict(zip(names, weights, strict=True)), x, batching)
    targets = labels.expand(logits.shape[:2]).reshape(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    first = torch.autograd.grad(loss, [*weights, x], create_graph=True)
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in first]
    product = sum((g * d).sum() for g, d in zip(first, along, strict=True))
    second = torch.autograd.grad(product, [*weights, x])
    return [value.detach() for value in (logits, *first, *second)]


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per_network"])
@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("lenet", (1, 28, 28)),
        ("lenet", (3, 32, 32)),
        ("alexcifarnet", (3, 32, 32)),
        ("convnet(depth=2,width=8)", (1, 8, 8)),
        ("convnet(depth=2,width=8,norm=none)", (1, 8, 8)),
    ],
)
def test_vmap_and_loop_agree_in_value_first_and_second_derivative(make_case, text, shape, own) -> None:
    """Max-pool, LRN and instance norm included; float64, to rounding."""
    real = "per_network" if own else "shared"
    case = make_case(text, shape, count=2, real=real, real_batch=2)
    left = derivatives(case, case.real_images, case.real_labels, "vmap")
    right = derivatives(case, case.real_images, case.real_labels, "loop")
    for a, b in zip(left, right, strict=True):
        # The 1: a bias before instance norm has derivative 0, so only rounding is visible.
        assert float((a - b).norm()) <= 1e-12 * (1 + float(b.norm()))


@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_network_k_of_a_batch_is_the_module_called_with_its_own_weights_and_images(
    make_case, batching
) -> None:
    case = make_case("lenet", (1, 28, 28), real="per_network")
    logits = forward_networks(case.network, case.params, case.real_images, batching)
    for k in range(case.count):
        weights = {name: value[k] for name, value in case.params.items()}
        alone = functional_call(case.network, weights, (case.real_images[k],))
        torch.testing.assert_close(logits[k], alone, rtol=1e-12, atol=1e-13)


def test_stacking_puts_networks_in_order() -> None:
    stacked = stack_networks([{"a": torch.full((2,), float(k))} for k in range(3)])
    assert stacked["a"].tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


# ----------------------------------------------------------------------------------- single layers


@pytest.mark.parametrize("channels", [1, 2, 3, 64])
def test_local_response_norm_is_that_of_torch(channels) -> None:
    """Large values, so that the sum over neighbours matters: alpha is only 1.1e-4."""
    generator = torch.Generator().manual_seed(0)
    x = 100 * torch.randn(2, channels, 5, 4, generator=generator, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    left, right = local_response_norm(a), F.local_response_norm(b, 4, 0.001 / 9.0, 0.75, 1.0)
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)
    assert float((left.detach() - x).abs().max()) > 1
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(second_order(left, a, weight), second_order(right, b, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def second_order(y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    (first,) = torch.autograd.grad((y * weight).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first * weight).sum(), x)
    return first.detach(), second


def test_the_instance_norm_of_convnet_is_that_of_torch(make_case) -> None:
    case = make_case("convnet(depth=1,width=6)", (1, 8, 8))
    norm = case.network.norms[0]
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 6, 8, 8, generator=generator, dtype=torch.float64)
    found = functional_call(norm, {"weight": weight, "bias": bias}, (x,))
    torch.testing.assert_close(found, F.instance_norm(x, weight=weight, bias=bias), rtol=1e-11, atol=1e-12)
