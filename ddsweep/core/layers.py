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

Activations are ``[K, channels, h, w, N]`` with the images innermost: then a convolution is a matrix
product over patches gathered in long runs, also for the few channels of LeNet, where direct
convolutions leave most of a vector unit idle, and K networks are a batch of such products. Images that
all networks share are ``[1, c, h, w, N]``, and their patches are gathered once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Layer", "Params", "Tape", "convnet_layers", "lenet_layers"]

Params = dict[str, Tensor]


class Tape(dict[str, Any]):
    """What one layer keeps of its forward and backward pass for the passes after them: tensors, mostly."""

    def tensor(self, key: str) -> Tensor:
        value: Tensor = self[key]
        return value


class Layer(Protocol):
    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor: ...

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor: ...

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor: ...

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor: ...


# ------------------------------------------------------------------------------ patches of images


def _windows(x: Tensor, size: int) -> Tensor:
    """``x [K, c, h, w, N]`` -> a view ``[K, c, size, size, h', w', N]``: all windows of that size."""
    count, channels, h, w, images = x.shape
    k, c, a, b, n = x.stride()
    return x.as_strided(
        (count, channels, size, size, h - size + 1, w - size + 1, images), (k, c, a, b, a, b, n)
    )


def _patches(x: Tensor, size: int) -> Tensor:
    """The windows of ``x`` as the columns of a matrix: ``[K, c*size*size, h'*w'*N]``."""
    return _windows(x, size).reshape(x.shape[0], x.shape[1] * size**2, -1)


def _stacked_patches(first: Tensor, second: Tensor, size: int) -> Tensor:
    """The patches of two ``[K, c, h, w, N]``, one upon the other: ``[K, 2*c*size*size, h'*w'*N]``."""
    windows = [_windows(x, size) for x in (first, second)]
    shape = windows[0].shape
    out = first.new_empty(shape[0], 2, *shape[1:])
    for place, each in enumerate(windows):
        out[:, place] = each
    return out.view(shape[0], 2 * shape[1] * size**2, -1)


def _add_patches(patches: Tensor, shape: Sequence[int], size: int) -> Tensor:
    """The transpose of `_patches`: each window added to where it came from.

    Columns first, then rows: two times ``size`` additions instead of ``size`` squared.
    """
    count, channels, h, w, images = shape
    high, wide = h - size + 1, w - size + 1
    p = patches.view(count, channels, size, size, high, wide, images)
    rows = patches.new_zeros(count, channels, size, high, w, images)
    for j in range(size):
        rows[..., j : j + wide, :] += p[:, :, :, j]
    out = patches.new_zeros(tuple(shape))
    for i in range(size):
        out[:, :, i : i + high] += rows[:, :, i]
    return out


def _times(w: Tensor, x: Tensor) -> Tensor:
    """``w [K, o, i] @ x [K or 1, i, n]``."""
    if x.shape[0] == 1 and w.shape[0] > 1:
        return (w.reshape(-1, w.shape[2]) @ x[0]).view(w.shape[0], w.shape[1], -1)
    return torch.bmm(w, x)


def _times_transposed(g: Tensor, x: Tensor) -> Tensor:
    """``g [K, o, n] @ x^T`` with ``x [K or 1, i, n]``."""
    if x.shape[0] == 1 and g.shape[0] > 1:
        return (g.reshape(-1, g.shape[2]) @ x[0].t()).view(g.shape[0], g.shape[1], -1)
    return torch.bmm(g, x.transpose(1, 2))


# ----------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Conv:
    """A square convolution of stride 1. Without ``bias`` if that is added later, by `BiasReLU`."""

    name: str
    padding: int
    bias: bool = True

    def _weight(self, params: Params) -> Tensor:
        return params[f"{self.name}.weight"].flatten(2)

    def _add_bias(self, params: Params, y: Tensor) -> Tensor:
        return y.add_(params[f"{self.name}.bias"][:, :, None]) if self.bias else y

    def _pad(self, x: Tensor) -> Tensor:
        p = self.padding
        return F.pad(x, (0, 0, p, p, p, p)) if p else x

    def _unpad(self, x: Tensor) -> Tensor:
        p = self.padding
        return x[:, :, p : x.shape[2] - p, p : x.shape[3] - p] if p else x

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        weight = params[f"{self.name}.weight"]
        x = self._pad(x)
        size = weight.shape[-1]
        patches = _patches(x, size)
        y = self._add_bias(params, _times(weight.flatten(2), patches))
        tape.update(x=x, size=size, patches=patches)
        return y.view(*weight.shape[:2], x.shape[2] - size + 1, x.shape[3] - size + 1, x.shape[4])

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        x, size = tape["x"], tape["size"]
        g = g.flatten(2)
        tape["g"] = g
        weight = params[f"{self.name}.weight"]
        # Patches take 25 times the memory of what they are made from: not kept beyond this pass.
        grads[f"{self.name}.weight"] = _times_transposed(g, tape.pop("patches")).view_as(weight)
        if self.bias:
            grads[f"{self.name}.bias"] = g.sum(2)
        if not inputs:
            return g
        return self._to_inputs(weight.flatten(2).transpose(1, 2) @ g, x, size)

    def _to_inputs(self, patches: Tensor, x: Tensor, size: int) -> Tensor:
        return self._unpad(_add_patches(patches, (patches.shape[0], *x.shape[1:]), size))

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        before, size = tape.tensor("x"), tape["size"]
        weight = self._weight(v)
        if x is None:
            patches = _patches(before, size)
        else:  # w x' + v x, as one product
            patches = _stacked_patches(self._pad(x), before.expand(weight.shape[0], *before.shape[1:]), size)
            weight = torch.cat([self._weight(params), weight], 2)
        tape["patches"] = patches
        y = self._add_bias(v, _times(weight, patches))
        return y.view(*y.shape[:2], before.shape[2] - size + 1, before.shape[3] - size + 1, -1)

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        x, size, before, patches = tape.tensor("x"), tape["size"], tape.tensor("g"), tape.pop("patches")
        g, weight = g.flatten(2), self._weight(params)
        moved, still = patches[:, : -weight.shape[2]], patches[:, -weight.shape[2] :]
        by_weight = _times_transposed(g, still)
        if moved.shape[1]:
            by_weight.baddbmm_(before, moved.transpose(1, 2))
        grads[f"{self.name}.weight"] = by_weight.view_as(params[f"{self.name}.weight"])
        if self.bias:
            grads[f"{self.name}.bias"] = g.sum(2)
        # w^T g' + v^T g, as one product
        both = torch.cat([weight, self._weight(v)], 1).transpose(1, 2)
        return self._to_inputs(torch.bmm(both, torch.cat([g, before], 1)), x, size)


@dataclass(frozen=True)
class Linear:
    """A fully connected layer on ``[K, features, N]`` (or on activations, which it flattens)."""

    name: str

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        tape["shape"] = x.shape
        x = x.flatten(1, -2)
        tape["x"] = x
        return _times(params[f"{self.name}.weight"], x) + params[f"{self.name}.bias"][:, :, None]

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        tape["g"] = g
        grads[f"{self.name}.weight"] = _times_transposed(g, tape["x"])
        grads[f"{self.name}.bias"] = g.sum(2)
        if not inputs:
            return g
        return self._to_inputs(params[f"{self.name}.weight"].transpose(1, 2) @ g, tape)

    def _to_inputs(self, g: Tensor, tape: Tape) -> Tensor:
        return g.view(g.shape[0], *tape["shape"][1:])

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        y = _times(v[f"{self.name}.weight"], tape["x"]) + v[f"{self.name}.bias"][:, :, None]
        tape["tangent"] = None
        if x is not None:
            x = x.flatten(1, -2)
            tape["tangent"] = x
            y.baddbmm_(params[f"{self.name}.weight"], x)
        return y

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        before, moved = tape["g"], tape["tangent"]
        by_weight = _times_transposed(g, tape["x"])
        if moved is not None:
            by_weight.baddbmm_(before, moved.transpose(1, 2))
        grads[f"{self.name}.weight"] = by_weight
        grads[f"{self.name}.bias"] = g.sum(2)
        to_inputs = torch.bmm(params[f"{self.name}.weight"].transpose(1, 2), g)
        to_inputs.baddbmm_(v[f"{self.name}.weight"].transpose(1, 2), before)
        return self._to_inputs(to_inputs, tape)


class _Selection:
    """A layer that, at a given point, is linear and has no weights: its tangent is itself, and its
    backward pass the transpose, of values and of tangents alike."""

    def _apply(self, x: Tensor, tape: Tape) -> Tensor:
        raise NotImplementedError

    def _transpose(self, g: Tensor, tape: Tape) -> Tensor:
        raise NotImplementedError

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
    out = torch.zeros(tuple(shape), dtype=phases.dtype, device=phases.device)
    h, w = 2 * phases.shape[3], 2 * phases.shape[4]
    for n in range(4):
        out[:, :, n // 2 : h : 2, n % 2 : w : 2] = phases[n]
    return out


@dataclass(frozen=True)
class BiasReLU:
    """The bias of a convolution that came before a max-pool, and ReLU: both commute with taking the
    maximum, and after it there is a quarter of the work."""

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
    """2x2 max-pool."""

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        phases = _phases(x)
        highest = phases.amax(0)
        tape.update(phases=phases, highest=highest, shape=x.shape)
        return highest

    def _taken(self, tape: Tape) -> Tensor:
        """1 where a pixel of a window is its maximum, else 0: ``[4, K, c, h, w, N]``."""
        if "taken" not in tape:
            phases, highest = tape.pop("phases"), tape.pop("highest")
            taken = phases == highest
            seen = taken[0].clone()
            for n in (1, 2, 3):  # of equal maxima the first one counts
                taken[n] &= ~seen
                seen |= taken[n]
            tape["taken"] = taken.to(highest.dtype)
        return tape.tensor("taken")

    def _apply(self, x: Tensor, tape: Tape) -> Tensor:
        return (_phases(x) * self._taken(tape)).sum(0)

    def _transpose(self, g: Tensor, tape: Tape) -> Tensor:
        return _join_phases(self._taken(tape) * g, (g.shape[0], *tape["shape"][1:]))


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


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


@dataclass(frozen=True)
class InstanceNorm:
    """Per image and channel: subtract the mean, divide by the deviation, scale and shift."""

    name: str
    eps: float = field(default=1e-5)

    def _gain(self, params: Params) -> Tensor:
        return params[f"{self.name}.weight"][:, :, None, None, None]

    def forward(self, params: Params, x: Tensor, tape: Tape) -> Tensor:
        centred = x - _mean(x)
        scale = (_mean(centred * centred) + self.eps).rsqrt()
        unit = centred * scale
        tape.update(centred=centred, scale=scale, unit=unit)
        return unit * self._gain(params) + params[f"{self.name}.bias"][:, :, None, None, None]

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        unit = tape.tensor("unit")
        grads[f"{self.name}.weight"] = (g * unit).sum((2, 3, 4))
        grads[f"{self.name}.bias"] = g.sum((2, 3, 4))
        by_unit = g * self._gain(params)
        along = _mean(by_unit * unit)
        inner = by_unit - _mean(by_unit) - unit * along
        tape.update(g=g, by_unit=by_unit, along=along, inner=inner)
        return tape.tensor("scale") * inner

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        assert x is not None
        centred, scale = tape.tensor("centred"), tape.tensor("scale")
        moved = x - _mean(x)
        scale_moved = -(scale**3) * _mean(centred * moved)
        unit_moved = moved * scale + centred * scale_moved
        tape.update(unit_moved=unit_moved, scale_moved=scale_moved)
        bias = v[f"{self.name}.bias"][:, :, None, None, None]
        return unit_moved * self._gain(params) + tape.tensor("unit") * self._gain(v) + bias

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        unit, unit_moved = tape.tensor("unit"), tape.tensor("unit_moved")
        grads[f"{self.name}.weight"] = (g * unit + tape["g"] * unit_moved).sum((2, 3, 4))
        grads[f"{self.name}.bias"] = g.sum((2, 3, 4))
        by_unit = g * self._gain(params) + tape["g"] * self._gain(v)
        along = _mean(by_unit * unit + tape["by_unit"] * unit_moved)
        inner: Tensor = by_unit - _mean(by_unit) - unit_moved * tape["along"] - unit * along
        return tape.tensor("scale_moved") * tape.tensor("inner") + tape.tensor("scale") * inner


# --------------------------------------------------------------------------------------- networks


def lenet_layers(side: int) -> tuple[Layer, ...]:
    """The layers of `ddsweep.core.networks.LeNet` for images of ``side`` pixels."""
    return (
        *(Conv("conv1", 2 if side == 28 else 0, bias=False), MaxPool(), BiasReLU("conv1")),
        *(Conv("conv2", 0, bias=False), MaxPool(), BiasReLU("conv2")),
        *(Linear("fc1"), ReLU(), Linear("fc2"), ReLU(), Linear("fc3")),
    )


def convnet_layers(depth: int, norm: str) -> tuple[Layer, ...]:
    """The layers of `ddsweep.core.networks.ConvNet`."""
    layers: list[Layer] = []
    for i in range(depth):
        layers.append(Conv(f"convs.{i}", 1))
        if norm == "instance":
            layers.append(InstanceNorm(f"norms.{i}"))
        layers += [ReLU(), AvgPool()]
    return (*layers, Linear("fc"))
