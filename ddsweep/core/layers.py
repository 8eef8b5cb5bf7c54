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
direct convolutions leave most of a vector unit idle, and K networks are a batch of such products. Images
that all networks share are ``[1, c, h, w, N]``, and their windows are gathered once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Layer", "Params", "Tape", "convnet_layers", "lenet_layers"]

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


# ------------------------------------------------------------------------ convolutions as products

_ROWS_FROM = 16
"""From this product of channels and size on, rows of windows become columns, and not whole windows."""

_WHOLE_UP_TO = 2**24
"""Up to so many numbers, a GPU makes whole windows into columns for any number of channels."""

_LONG = 64
"""From so many images on, a piece of a GPU's product is a pixel of the outputs, and not a row of them."""

_PIECES_UP_TO = 2**28
"""The most numbers in whole windows that are gathered at once for such a product."""


@dataclass(frozen=True)
class _Columns:
    """The windows of images as columns of matrices, so that a convolution is a sum of products.

    With ``parts`` = 1 the one matrix ``[K, c*size*size, h'*w'*N]`` has whole windows: ``size`` squared
    times as much memory as the images. Otherwise ``matrix [K, c*size, h*w'*N]`` has the rows of windows,
    ``size`` times as much, and the columns for row i of the weights are those from image row i on.
    ``images`` are what they were gathered from.
    """

    matrix: Tensor
    images: tuple[Tensor, ...]
    parts: int
    row: int
    length: int

    def part(self, i: int) -> Tensor:
        start = i * self.row if self.parts > 1 else 0
        return self.matrix[:, :, start : start + self.length]

    def kept(self) -> _Columns:
        """The part that `_by_weight` needs: on a GPU the images alone, else the matrix."""
        gpu = self.matrix.is_cuda
        matrix, images = (self.matrix.new_empty(1, 0, 0), self.images) if gpu else (self.matrix, ())
        return _Columns(matrix, images, self.parts, self.row, self.length)

    def half(self, which: int) -> _Columns:
        """The columns of the first or the second of two images that were gathered together."""
        channels = self.matrix.shape[1] // 2
        matrix = self.matrix[:, which * channels : (which + 1) * channels]
        images = self.images[which : which + 1]
        return _Columns(matrix, images, self.parts, self.row, self.length)


def _gather(images: Sequence[Tensor], size: int) -> _Columns:
    """The columns of one or two ``[K, c, h, w, N]``, the second's below the first's."""
    count, channels, h, w, n = images[0].shape
    high, wide = h - size + 1, w - size + 1
    whole = channels * size < _ROWS_FROM
    if images[0].is_cuda:  # fewer kernels, which take the time for small inputs
        whole = whole or count * channels * size**2 * high * wide * n * len(images) <= _WHOLE_UP_TO
    shape = (count, channels, size, size, high, wide, n) if whole else (count, channels, size, h, wide, n)
    views = []
    for x in images:
        k, c, a, b, e = x.stride()
        views.append(x.as_strided(shape, (k, c, a, b, a, b, e) if whole else (k, c, b, a, b, e)))
    if len(views) == 1:
        joined = views[0].reshape(count, channels * shape[2] * (size if whole else 1), -1)
    else:
        joined = images[0].new_empty(count, 2, *shape[1:])
        for place, view in enumerate(views):
            joined[:, place] = view
        joined = joined.view(count, 2 * channels * shape[2] * (size if whole else 1), -1)
    return _Columns(joined, tuple(images), 1 if whole else size, wide * n, high * wide * n)


def _weight_part(weight: Tensor, i: int, parts: int) -> Tensor:
    """Row i of ``weight [K, o, c, size, size]``, or all of it, as a matrix ``[K, o, ...]``."""
    return weight.flatten(2) if parts == 1 else weight[:, :, :, i].flatten(2)


def _convolve(weight: Tensor, columns: _Columns) -> Tensor:
    """``[K, o, h'*w'*N]``."""
    y = _times(_weight_part(weight, 0, columns.parts), columns.part(0))
    for i in range(1, columns.parts):
        _add_times(y, _weight_part(weight, i, columns.parts), columns.part(i))
    return y


def _by_weight(g: Tensor, columns: _Columns, shape: Sequence[int]) -> Tensor:
    """The derivative by the weights, ``[K, o, c, size, size]``, from that by the outputs ``g``."""
    if g.is_cuda:
        return _by_weight_in_pieces(g, columns.images[0], shape)
    # Columns @ g^T, and not g @ columns^T: with few outputs it is 1.5 times as fast on the CPU.
    parts = [_times_transposed(columns.part(i), g).transpose(1, 2) for i in range(columns.parts)]
    if columns.parts == 1:
        return parts[0].reshape(tuple(shape))
    channels, size = shape[2:4]
    return torch.stack([part.reshape(*part.shape[:2], channels, size) for part in parts], 3)


def _by_weight_in_pieces(g: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """`_by_weight` for a GPU, from the images ``x [K or 1, c, h, w, N]``: a product of long rows with few
    results would keep few of its processors busy. So it is taken in pieces, which are summed."""
    count, out, channels, size = shape[:4]
    k, _, h, w, n = x.shape
    a, b = x.stride()[2:4]
    high, wide = h - size + 1, w - size + 1
    by_pixel = n >= _LONG
    # The number along each axis and the strides, of pieces and of the values summed in a piece.
    pieces, piece_strides = ((high, wide), (a, b)) if by_pixel else ((high,), (a,))
    length, strides = ((n,), x.stride()[4:]) if by_pixel else ((wide, n), x.stride()[3:])
    total = math.prod(pieces)
    g = g.view(count, out, total, -1)
    shared = k < count
    g = g.permute(2, 0, 1, 3).reshape(total, count * out, -1) if shared else g.transpose(1, 2).flatten(0, 1)
    rows = 1 if k * channels * size**2 * high * wide * n <= _PIECES_UP_TO else size
    parts = []
    for i in range(rows):
        # All rows of the windows at once, or row i of each.
        window, window_strides = ((size, size), (a, b)) if rows == 1 else ((size,), (b,))
        windows = (
            x[:, :, i:]
            .as_strided(
                (k, *pieces, channels, *window, *length),
                (x.stride(0), *piece_strides, x.stride(1), *window_strides, *strides),
            )
            .reshape(k * total, channels * math.prod(window), -1)
        )
        product = torch.bmm(windows, g.transpose(1, 2))
        if shared:
            part = product.sum(0).view(-1, count, out).permute(1, 2, 0)
        else:
            part = product.view(count, total, *product.shape[1:]).sum(1).transpose(1, 2)
        parts.append(part.reshape(count, out, channels, *window))
    return parts[0] if rows == 1 else torch.stack(parts, 3)


def _by_images(weight: Tensor, g: Tensor, shape: Sequence[int]) -> Tensor:
    """The derivative by the images ``[K, c, h, w, N]``: that of each window is added to its pixels."""
    size = weight.shape[-1]
    count, (_, channels, h, w, n) = weight.shape[0], shape
    high, wide = h - size + 1, w - size + 1
    rows = g.new_zeros(count, channels * size, h * wide * n)
    for i in range(size):
        place = slice(i * wide * n, (i + high) * wide * n)
        rows[:, :, place].baddbmm_(_weight_part(weight, i, size).transpose(1, 2), g)
    rows = rows.view(count, channels, size, h, wide, n)
    out = g.new_zeros(count, channels, h, w, n)
    for j in range(size):
        out[:, :, :, j : j + wide] += rows[:, :, j]
    return out


def _times(w: Tensor, x: Tensor) -> Tensor:
    """``w [K, o, i] @ x [K or 1, i, n]``."""
    if x.shape[0] == 1 and w.shape[0] > 1:
        return (w.reshape(-1, w.shape[2]) @ x[0]).view(w.shape[0], w.shape[1], -1)
    return torch.bmm(w, x)


def _add_times(y: Tensor, w: Tensor, x: Tensor) -> None:
    """``y += w @ x``, in place."""
    if x.shape[0] == 1 and w.shape[0] > 1:
        y.view(-1, y.shape[2]).addmm_(w.reshape(-1, w.shape[2]), x[0])
    else:
        y.baddbmm_(w, x)


def _times_transposed(x: Tensor, g: Tensor) -> Tensor:
    """``x [K or 1, i, n] @ g^T`` with ``g [K, o, n]``: ``[K, i, o]``."""
    if x.shape[0] == 1 and g.shape[0] > 1:
        product = x[0] @ g.reshape(-1, g.shape[2]).t()
        return product.view(x.shape[1], g.shape[0], g.shape[1]).transpose(0, 1)
    return torch.bmm(x, g.transpose(1, 2))


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
        columns = _gather([x], weight.shape[-1])
        tape.update(x=x, columns=columns.kept())
        return self._shaped(self._add_bias(params, _convolve(weight, columns)), x, weight.shape[-1])

    def backward(self, params: Params, g: Tensor, tape: Tape, grads: Params, inputs: bool) -> Tensor:
        weight, g = self._weight(params), g.flatten(2)
        tape["g"] = g
        # Columns take several times the memory of their images, so they are not kept beyond this pass.
        grads[f"{self.name}.weight"] = _by_weight(g, tape.pop("columns"), weight.shape)
        if self.bias:
            grads[f"{self.name}.bias"] = g.sum(2)
        return self._unpad(_by_images(weight, g, tape.tensor("x").shape)) if inputs else g

    def tangent(self, params: Params, v: Params, x: Tensor | None, tape: Tape) -> Tensor:
        weight, along, before = self._weight(params), self._weight(v), tape.tensor("x")
        size = weight.shape[-1]
        if x is None:
            columns = _gather([before], size)
        else:  # w x' + v x, as one product
            columns = _gather([self._pad(x), before.expand(weight.shape[0], *before.shape[1:])], size)
            along = torch.cat([weight, along], 2)
        tape.update(columns=columns.kept(), moved=x is not None)
        return self._shaped(self._add_bias(v, _convolve(along, columns)), before, size)

    def tangent_backward(self, params: Params, v: Params, g: Tensor, tape: Tape, grads: Params) -> Tensor:
        weight, before, columns = self._weight(params), tape.tensor("g"), tape.pop("columns")
        g = g.flatten(2)
        if tape.pop("moved"):
            by_weight = _by_weight(g, columns.half(1), weight.shape)
            by_weight += _by_weight(before, columns.half(0), weight.shape)
        else:
            by_weight = _by_weight(g, columns, weight.shape)
        grads[f"{self.name}.weight"] = by_weight
        if self.bias:
            grads[f"{self.name}.bias"] = g.sum(2)
        # w^T g' + v^T g, as one product
        both = torch.cat([weight, self._weight(v)], 1)
        return self._unpad(_by_images(both, torch.cat([g, before], 1), tape.tensor("x").shape))


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
        grads[f"{self.name}.weight"] = self._by_weight(g, tape["x"])
        grads[f"{self.name}.bias"] = g.sum(2)
        if not inputs:
            return g
        return self._to_inputs(params[f"{self.name}.weight"].transpose(1, 2) @ g, tape)

    def _by_weight(self, g: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(g, x.expand(g.shape[0], *x.shape[1:]).transpose(1, 2))

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
        by_weight = self._by_weight(g, tape["x"])
        if moved is not None:
            by_weight.baddbmm_(before, moved.transpose(1, 2))
        grads[f"{self.name}.weight"] = by_weight
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
    """The layers of `ddsweep.core.nets.lenet.LeNet` for images of ``side`` pixels."""
    return (
        *(Conv("conv1", 2 if side == 28 else 0, bias=False), MaxPool(), BiasReLU("conv1")),
        *(Conv("conv2", 0, bias=False), MaxPool(), BiasReLU("conv2")),
        *(Linear("fc1"), ReLU(), Linear("fc2"), ReLU(), Linear("fc3")),
    )


def convnet_layers(depth: int, norm: str) -> tuple[Layer, ...]:
    """The layers of `ddsweep.core.nets.convnet.ConvNet`."""
    layers: list[Layer] = []
    for i in range(depth):
        layers.append(Conv(f"convs.{i}", 1))
        if norm == "instance":
            layers.append(InstanceNorm(f"norms.{i}"))
        layers += [ReLU(), AvgPool()]
    return (*layers, Linear("fc"))
