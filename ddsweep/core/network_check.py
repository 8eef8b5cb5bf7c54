"""Checks whether a network can be distilled through: a user's own is checked before any trial starts.

In float32: two passes that draw the same give the same, and nothing but their generators is drawn from; its
gradient has a derivative. In float64, if it computes in that: this derivative is the measured slope.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ddsweep.core.derivatives import Autograd
from ddsweep.core.init import draw_networks
from ddsweep.core.layers import Params
from ddsweep.core.memory import is_out_of_memory
from ddsweep.core.own_network import is_built_alike, parts, rest_at, traits_of

__all__ = ["faults"]

_COUNT, _IMAGES, _BUILT = 2, 3, 12
_EPS, _TOLERANCE = 1e-7, 1e-2
"""The slope is measured across kinks of ReLU and max-pool, which change it a little; a missing or wrong
derivative (``detach``) is off by all of it."""


def faults(network: nn.Module, shape: tuple[int, int, int], classes: int) -> Iterator[str]:
    """The faults of ``network`` for images of ``shape``, each with what to change; empty if it is fine. After
    the first fault later checks may be left out."""
    try:
        copy.deepcopy(network)
    except Exception as error:
        yield f"it cannot be copied ({_said(error)}); keep no open files, locks or generators in the module"
        return
    # A choice between two is often the same several times.
    if traits_of(network) is not None and not is_built_alike(network, _BUILT, shape):
        yield (
            "two networks that are built with the same seed differ; everything that building draws must come "
            "from torch, and not from Python's random, numpy or a generator of its own"
        )
        return
    images, targets, params = _case(network, shape, classes, torch.float32)
    math = Autograd(network, "loop")
    before = torch.get_rng_state()
    try:
        gradient, kept = math.gradient(params, images, targets, True)
        pulled = math.vjp(params, kept, {name: torch.ones_like(g) for name, g in gradient.items()})
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        yield (
            f"its gradient cannot be differentiated again ({_said(error)}); write what it does in operations "
            "of torch that have second derivatives, and over no tensor that is used later (no +=, no inplace)"
        )
        return
    math.loss_and_gradient(params, images, targets)
    with torch.no_grad():
        logits = math.logits(params, images)
    if not bool(torch.isfinite(logits).all()):
        yield "its logits at its first weights are not finite"
        return
    sums = logits.sum(-1)
    if bool((logits >= 0).all()) and torch.allclose(sums, torch.ones_like(sums)):
        yield (
            "its outputs are probabilities, which add up to one for each image; leave the last softmax out: "
            "losses take logits"
        )
        return
    if not torch.equal(before, torch.get_rng_state()):
        yield (
            "it draws random numbers in evaluation mode, where a network is one function of its images; draw "
            "only where self.training is true, as torch.nn.Dropout does"
        )
    # With a graph, as the first time: without one torch sums a group norm in another order.
    again, _ = math.gradient(params, images, targets, True)
    if any(not torch.equal(gradient[name], again[name]) for name in gradient):
        yield (
            "two passes over the same images differ; everything it draws must come from torch, and what it "
            "remembers must be a buffer (register_buffer)"
        )
        return
    found = (*gradient.values(), *pulled.weights.values(), pulled.images)
    if not all(bool(torch.isfinite(value).all()) for value in found):
        yield "its derivatives at its first weights are not finite"
        return
    try:
        off = _slope_error(network, shape, classes)
    except RuntimeError as reason:
        if is_out_of_memory(reason):
            raise
        return  # it does not compute in float64
    if not off < _TOLERANCE:
        yield (
            f"the derivative of its gradient is not the measured slope (off by {off:.0%}): something it "
            "computes is hidden from autograd (detach, no_grad, .data, .item, a buffer that training moves)"
        )


def _case(
    network: nn.Module, shape: tuple[int, int, int], classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Params]:
    """A few images, their classes, and two networks as in the first inner step."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(_IMAGES, *shape, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.arange(_IMAGES) % classes
    drawn = draw_networks(network, "xavier", 1.0, range(_COUNT), device=images.device, dtype=dtype)
    weights, rest = parts(network, drawn)
    return images, targets, {**weights, **rest_at(rest, 0)}


def _slope_error(network: nn.Module, shape: tuple[int, int, int], classes: int) -> float:
    """The largest |measured - computed| / |measured| over networks, for <gradient, v> by images and by
    weights together, along a random direction."""
    images, targets, params = _case(network, shape, classes, torch.float64)
    math = Autograd(network, "loop")
    weights, rest = parts(network, params)
    generator = torch.Generator().manual_seed(2)

    def direction(like: Params) -> Params:
        """A random direction of length one for each network."""
        found = {name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in like.items()}
        return {name: value / _inner(found, found).max().sqrt() for name, value in found.items()}

    v, ahead = direction(weights), direction(weights)
    along = direction({"images": images[None]})["images"][0]
    _, kept = math.gradient(params, images, targets, True)
    pulled = math.vjp(params, kept, v)
    computed = (pulled.images * along).flatten(1).sum(1) + _inner(pulled.weights, ahead)

    def at(step: float) -> Tensor:
        moved = {name: value + step * ahead[name] for name, value in weights.items()}
        return _inner(math.gradient({**moved, **rest}, images + step * along, targets, False)[0], v)

    measured = (at(_EPS) - at(-_EPS)) / (2 * _EPS)
    return float(((measured - computed).abs() / measured.abs().clamp_min(1e-12)).max())


def _inner(left: Params, right: Params) -> Tensor:
    # A parameter may be a single number, with no dimension but that of the networks.
    return torch.stack([(left[name] * right[name]).reshape(_COUNT, -1).sum(1) for name in left]).sum(0)


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
