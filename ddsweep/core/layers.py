"""Layers with their derivatives written out, for K networks at once.

An unroll needs three things of a network: logits, the gradient g of the loss by the weights, and the
derivative of <g, v> by weights and images for a given v. The last one is, because second derivatives
commute, the change of the gradient by (weights, images) when the weights move along v (Pearlmutter
1994, "Fast exact multiplication by the Hessian"): one more forward and backward pass, of tangents. So
each layer here has four methods,

    forward            x               -> y
    backward           dL/dy           -> dL/dx, dL/dw
    tangent            x' (along v)    -> y'
    tangent_backward   (dL/dy)'        -> (dL/dx)', (dL/dw)'

and no graph is ever built. Everything is exact; at kinks the choice is that of torch (the first of
equal maxima, 0 for the derivative of ReLU at 0).

Activations are ``[K, channels, h, w, N]`` with the images innermost: then a convolution is a sum of
matrix products over windows that are gathered in long runs, also for the few channels of LeNet, where
direct convolutions leave most of a vector unit idle, and K networks are a batch of such products. The first
images may be ``[G, c, h, w, N]`` with G a divisor of K (1 if all networks share them): K/G networks in a row
see the same ones, whose windows are gathered once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ddsweep.core.convolution import (
    convolve,
    gather,
    image_derivative,
    times,
    weight_derivative,
)

__all__ = [
    "AvgPool",
    "BiasReLU",
    "Conv",
    "GlobalAvgPool",
    "GroupNorm",
    "Layer",
    "Linear",
    "MaxPool",
    "Params",
    "ReLU",
    "Tape",
]

Params = dict[str, Tensor]


class Tape(dict[str, Any]):
    """The values that one layer keeps of its forward and backward pass for later passes: mostly tensors."""

    def tensor(self, key: str) -> Tensor:
        value: Tensor = self[key]
        return value


class Layer(Protocol):
    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor: ...

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor: ...

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor: ...

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor: ...


# ----------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Conv:
    """A square convolution of stride 1. It has no ``bias`` if `BiasReLU` adds it later."""

    name: str
    padding: int
    bias: bool = True

    def _weight(self, params: Params) -> Tensor:
        return params[f"{self.name}.weight"]

    def _add_bias(self, params: Params, y: Tensor) -> Tensor:
        return y.add_(params[f"{self.name}.bias"][:, :, None]) if self.bias else y

    def _pad(self, x: Tensor) -> Tensor:
        p = self.padding
        return F.pad(x, (0, 0, p, p, p, p)) if p else x

    def _unpad(self, x: Tensor) -> Tensor:
        p = self.padding
        return x[:, :, p : x.shape[2] - p, p : x.shape[3] - p] if p else x

    def _shaped(self, y: Tensor, x: Tensor, size: int) -> Tensor:
        return y.view(*y.shape[:2], x.shape[2] - size + 1, x.shape[3] - size + 1, x.shape[4])

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        weight, x = self._weight(params), self._pad(x)
        columns = gather([x], weight.shape[-1])
        tape.update(x=x, columns=columns.kept())
        return self._shaped(self._add_bias(params, convolve(weight, columns)), x, weight.shape[-1])

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        weight, g = self._weight(params), g.flatten(2)
        tape["g"] = g
        # Columns take several times the memory of their images, so they are not kept beyond this pass.
        grads[f"{self.name}.weight"] = weight_derivative(g, tape.pop("columns"), weight.shape)
        if self.bias:
            grads[f"{self.name}.bias"] = g.sum(2)
        return self._unpad(image_derivative(weight, g, tape.tensor("x").shape)) if inputs else g

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        weight, along, before = self._weight(params), self._weight(v), tape.tensor("x")
        size = weight.shape[-1]
        if x is None:
            columns = gather([before], size)
        else:  # w x' + v x, as one product
            columns = gather([self._pad(x), before.expand(weight.shape[0], *before.shape[1:])], size)
            along = torch.cat([weight, along], 2)
        tape.update(columns=columns.kept(), moved=x is not None)
        return self._shaped(self._add_bias(v, convolve(along, columns)), before, size)

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        weight, before, columns = self._weight(params), tape.tensor("g"), tape.pop("columns")
        g = g.flatten(2)
        if tape.pop("moved"):
            by_weight = weight_derivative(g, columns.half(1), weight.shape)
            by_weight += weight_derivative(before, columns.half(0), weight.shape)
        else:
            by_weight = weight_derivative(g, columns, weight.shape)
        grads[f"{self.name}.weight"] = by_weight
        if self.bias:
            grads[f"{self.name}.bias"] = g.sum(2)
        # w^T g' + v^T g, as one product
        both = torch.cat([weight, self._weight(v)], 1)
        return self._unpad(image_derivative(both, torch.cat([g, before], 1), tape.tensor("x").shape))


@dataclass(frozen=True)
class Linear:
    """A fully connected layer on ``[K, features, N]`` (or on activations, which it flattens)."""

    name: str
    bias: bool = True

    def _add_bias(self, params: Params, y: Tensor) -> Tensor:
        return y + params[f"{self.name}.bias"][:, :, None] if self.bias else y

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        tape["shape"] = x.shape
        x = x.flatten(1, -2)
        tape["x"] = x
        return self._add_bias(params, times(params[f"{self.name}.weight"], x))

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        tape["g"] = g
        grads[f"{self.name}.weight"] = self._by_weight(g, tape["x"])
        if self.bias:
            grads[f"{self.name}.bias"] = g.sum(2)
        if not inputs:
            return g
        return self._to_inputs(params[f"{self.name}.weight"].transpose(1, 2) @ g, tape)

    def _by_weight(self, g: Tensor, x: Tensor) -> Tensor:
        each = g.shape[0] // x.shape[0]
        if each > 1 and x.shape[0] > 1:
            x = x.repeat_interleave(each, 0)
        return torch.bmm(g, x.expand(g.shape[0], *x.shape[1:]).transpose(1, 2))

    def _to_inputs(self, g: Tensor, tape: Tape) -> Tensor:
        return g.view(g.shape[0], *tape["shape"][1:])

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        y = self._add_bias(v, times(v[f"{self.name}.weight"], tape["x"]))
        tape["tangent"] = None
        if x is not None:
            x = x.flatten(1, -2)
            tape["tangent"] = x
            y.baddbmm_(params[f"{self.name}.weight"], x)
        return y

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        before, moved = tape["g"], tape["tangent"]
        by_weight = self._by_weight(g, tape["x"])
        if moved is not None:
            by_weight.baddbmm_(before, moved.transpose(1, 2))
        grads[f"{self.name}.weight"] = by_weight
        if self.bias:
            grads[f"{self.name}.bias"] = g.sum(2)
        to_inputs = torch.bmm(params[f"{self.name}.weight"].transpose(1, 2), g)
        to_inputs.baddbmm_(v[f"{self.name}.weight"].transpose(1, 2), before)
        return self._to_inputs(to_inputs, tape)


class _Selection(ABC):
    """A layer that, at a given point, is linear and has no weights: its tangent is itself, and its
    backward pass the transpose, of values and of tangents alike."""

    @abstractmethod
    def _apply(self, x: Tensor, tape: Tape) -> Tensor: ...

    @abstractmethod
    def _transpose(self, g: Tensor, tape: Tape) -> Tensor: ...

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        return self._transpose(g, tape)

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        assert x is not None  # a layer with weights always comes first
        return self._apply(x, tape)

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        return self._transpose(g, tape)


def _where_positive(x: Tensor, y: Tensor) -> Tensor:
    """``x`` where ``y > 0``, else 0, in one pass."""
    return torch.ops.aten.threshold_backward(x, y, 0)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ReLU(_Selection):
    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        y = x.clamp_min(0)
        tape["y"] = y
        return y

    def _apply(self, x: Tensor, tape: Tape) -> Tensor:
        return _where_positive(x, tape["y"])

    def _transpose(self, g: Tensor, tape: Tape) -> Tensor:
        return self._apply(g, tape)


def _phases(x: Tensor) -> Tensor:
    """``[K, c, h, w, N]`` -> ``[4, K, c, h//2, w//2, N]``: the four pixels of each 2x2 window."""
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    x = x[:, :, :h, :w]
    return torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def _join_phases(phases: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `_phases`, zero where an odd last row or column was dropped."""
    h, w = 2 * phases.shape[3], 2 * phases.shape[4]
    whole = (h, w) == tuple(shape[2:4])
    out = phases.new_empty(tuple(shape)) if whole else phases.new_zeros(tuple(shape))
    for n in range(4):
        out[:, :, n // 2 : h : 2, n % 2 : w : 2] = phases[n]
    return out


@dataclass(frozen=True)
class BiasReLU:
    """The bias of an earlier convolution, and ReLU, after the max-pool: both commute with the maximum, and
    after it they are a quarter of the work."""

    name: str

    def _bias(self, params: Params) -> Tensor:
        return params[f"{self.name}.bias"][:, :, None, None, None]

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        y = (x + self._bias(params)).clamp_min_(0)
        tape["y"] = y
        return y

    def _transpose(self, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        g = _where_positive(g, tape["y"])
        grads[f"{self.name}.bias"] = g.sum((2, 3, 4))
        return g

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        return self._transpose(g, tape, grads)

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        assert x is not None
        return _where_positive(x + self._bias(v), tape["y"])

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        return self._transpose(g, tape, grads)


@dataclass(frozen=True)
class MaxPool(_Selection):
    """2x2 max-pool: the larger of two neighbours in a row, then of two such rows. Of equal maxima the
    first one counts, as in torch.

    Which one it was is kept as 1 or 0 in the type of the activations: products with these, and `lerp`
    between two, are exact for finite numbers, and ten times as fast on the CPU as `where`.
    """

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        left, right = self._columns(x)
        larger = torch.maximum(left, right)
        upper, lower = self._rows(larger)
        tape.update(x=x, larger=larger, shape=x.shape)
        return torch.maximum(upper, lower)

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        return x[:, :, :h, 0:w:2], x[:, :, :h, 1:w:2]

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :, 0::2], x[:, :, 1::2]

    def _choices(self, tape: Tape) -> tuple[Tensor, Tensor]:
        """1 where the left one of two columns was taken, and where the upper one of two rows; else 0."""
        if "left" not in tape:
            columns, rows = self._columns(tape.pop("x")), self._rows(tape.pop("larger"))
            tape.update(left=_first_is_larger(*columns), upper=_first_is_larger(*rows))
        return tape.tensor("left"), tape.tensor("upper")

    def _apply(self, x: Tensor, tape: Tape) -> Tensor:
        left, upper = self._choices(tape)
        first, second = self._columns(x)
        first, second = self._rows(torch.lerp(second, first, left))
        return torch.lerp(second, first, upper)

    def _transpose(self, g: Tensor, tape: Tape) -> Tensor:
        left, upper = self._choices(tape)
        shape = (g.shape[0], *tape["shape"][1:])
        by_rows = g.new_empty(left.shape)
        _split(g, upper, *self._rows(by_rows))
        odd = shape[2] % 2 or shape[3] % 2
        out = g.new_zeros(shape) if odd else g.new_empty(shape)
        _split(by_rows, left, *self._columns(out))
        return out


def _first_is_larger(first: Tensor, second: Tensor) -> Tensor:
    """1 or 0, written directly: converting booleans would take as long again."""
    return torch.ge(first, second, out=torch.empty_like(first))


def _split(g: Tensor, first: Tensor, to_first: Tensor, to_second: Tensor) -> None:
    """Write ``g`` to one of two places, and 0 to the other."""
    if torch.compiler.is_compiling():  # which has no strided ``out``
        to_first.copy_(g * first)
        to_second.copy_(g - to_first)
        return
    torch.mul(g, first, out=to_first)
    torch.sub(g, to_first, out=to_second)


@dataclass(frozen=True)
class AvgPool(_Selection):
    """2x2 average-pool."""

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        tape["shape"] = x.shape
        return self._apply(x, tape)

    def _apply(self, x: Tensor, tape: Tape) -> Tensor:
        return _phases(x).sum(0).mul_(0.25)

    def _transpose(self, g: Tensor, tape: Tape) -> Tensor:
        return _join_phases((0.25 * g).expand(4, *g.shape), (g.shape[0], *tape["shape"][1:]))


@dataclass(frozen=True)
class GlobalAvgPool(_Selection):
    """The mean over all pixels of a channel."""

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        tape["shape"] = x.shape
        return self._apply(x, tape)

    def _apply(self, x: Tensor, tape: Tape) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def _transpose(self, g: Tensor, tape: Tape) -> Tensor:
        _, channels, h, w, images = tape["shape"]
        spread: Tensor = (g / (h * w)).expand(len(g), channels, h, w, images)
        return spread


@dataclass(frozen=True)
class GroupNorm:
    """Per image and group of channels: subtract the mean, divide by the deviation; then, if ``affine``, scale
    and shift each channel. ``groups`` None is one for each channel (instance norm)."""

    name: str
    groups: int | None = None
    affine: bool = True
    eps: float = 1e-5

    def _mean(self, x: Tensor) -> Tensor:
        """Of each group, for each of its channels: ``[K, c, 1, 1, N]``."""
        if self.groups is None:
            return x.mean((2, 3), keepdim=True)
        grouped = x.reshape(len(x), self.groups, -1, *x.shape[2:])
        mean = grouped.mean((2, 3, 4), keepdim=True)
        return mean.expand(*grouped.shape[:3], 1, 1, x.shape[4]).flatten(1, 2)

    def _scaled(self, params: Params, x: Tensor) -> Tensor:
        return x * params[f"{self.name}.weight"][:, :, None, None, None] if self.affine else x

    def _shifted(self, params: Params, x: Tensor) -> Tensor:
        return x + params[f"{self.name}.bias"][:, :, None, None, None] if self.affine else x

    def _keep(self, grads: Params, by_gain: Tensor, by_shift: Tensor) -> None:
        grads[f"{self.name}.weight"] = by_gain.sum((2, 3, 4))
        grads[f"{self.name}.bias"] = by_shift.sum((2, 3, 4))

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        centred = x - self._mean(x)
        scale = (self._mean(centred * centred) + self.eps).rsqrt()
        unit = centred * scale
        tape.update(centred=centred, scale=scale, unit=unit)
        return self._shifted(params, self._scaled(params, unit))

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        unit = tape.tensor("unit")
        if self.affine:
            self._keep(grads, g * unit, g)
        by_unit = self._scaled(params, g)
        along = self._mean(by_unit * unit)
        inner = by_unit - self._mean(by_unit) - unit * along
        tape.update(g=g, by_unit=by_unit, along=along, inner=inner)
        return tape.tensor("scale") * inner

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        assert x is not None
        centred, scale = tape.tensor("centred"), tape.tensor("scale")
        moved = x - self._mean(x)
        scale_moved = -(scale**3) * self._mean(centred * moved)
        unit_moved = moved * scale + centred * scale_moved
        tape.update(unit_moved=unit_moved, scale_moved=scale_moved)
        if not self.affine:
            return unit_moved
        return self._shifted(v, self._scaled(params, unit_moved) + self._scaled(v, tape.tensor("unit")))

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        unit, unit_moved, before = tape.tensor("unit"), tape.tensor("unit_moved"), tape.tensor("g")
        by_unit = self._scaled(params, g)
        if self.affine:
            self._keep(grads, g * unit + before * unit_moved, g)
            by_unit = by_unit + self._scaled(v, before)
        along = self._mean(by_unit * unit + tape["by_unit"] * unit_moved)
        inner: Tensor = by_unit - self._mean(by_unit) - unit_moved * tape["along"] - unit * along
        return tape.tensor("scale_moved") * tape.tensor("inner") + tape.tensor("scale") * inner
