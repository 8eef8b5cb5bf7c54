"""Convolutions as sums of matrix products over gathered windows, for K networks at once.

Images are ``[K, channels, h, w, N]``: see `ddsweep.core.layers`. They may also be ``[G, ...]`` with G a
divisor of K: then K/G networks in a row see the same images, which are gathered once, and their products are
merged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Columns",
    "convolve",
    "gather",
    "image_derivative",
    "times",
    "weight_derivative",
]

_ROWS_FROM = 16
"""From this product of channels and size on, rows of windows become columns, and not whole windows."""

_WHOLE_UP_TO = 2**24
"""Up to so many numbers, a GPU makes whole windows into columns for any number of channels."""

_LONG = 64
"""From so many images on, a piece of a GPU's product is a pixel of the outputs, and not a row of them."""

_PIECES_UP_TO = 2**28
"""The most numbers in whole windows that are gathered at once for such a product."""


@dataclass(frozen=True)
class Columns:
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

    def kept(self) -> Columns:
        """The part that `weight_derivative` needs: on a GPU the images alone, else the matrix."""
        gpu = self.matrix.is_cuda
        matrix, images = (self.matrix.new_empty(1, 0, 0), self.images) if gpu else (self.matrix, ())
        return Columns(matrix, images, self.parts, self.row, self.length)

    def half(self, which: int) -> Columns:
        """The columns of the first or the second of two images that were gathered together."""
        channels = self.matrix.shape[1] // 2
        matrix = self.matrix[:, which * channels : (which + 1) * channels]
        images = self.images[which : which + 1]
        return Columns(matrix, images, self.parts, self.row, self.length)


def gather(images: Sequence[Tensor], size: int) -> Columns:
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
    return Columns(joined, tuple(images), 1 if whole else size, wide * n, high * wide * n)


def _weight_part(weight: Tensor, i: int, parts: int) -> Tensor:
    """Row i of ``weight [K, o, c, size, size]``, or all of it, as a matrix ``[K, o, ...]``."""
    return weight.flatten(2) if parts == 1 else weight[:, :, :, i].flatten(2)


def convolve(weight: Tensor, columns: Columns) -> Tensor:
    """``[K, o, h'*w'*N]``."""
    y = times(_weight_part(weight, 0, columns.parts), columns.part(0))
    for i in range(1, columns.parts):
        _add_times(y, _weight_part(weight, i, columns.parts), columns.part(i))
    return y


def weight_derivative(g: Tensor, columns: Columns, shape: Sequence[int]) -> Tensor:
    """The derivative by the weights, ``[K, o, c, size, size]``, from that by the outputs ``g``."""
    if g.is_cuda:
        return _weight_derivative_in_pieces(g, columns.images[0], shape)
    # Columns @ g^T, and not g @ columns^T: with few outputs it is 1.5 times as fast on the CPU.
    parts = [_times_transposed(columns.part(i), g).transpose(1, 2) for i in range(columns.parts)]
    if columns.parts == 1:
        return parts[0].reshape(tuple(shape))
    channels, size = shape[2:4]
    return torch.stack([part.reshape(*part.shape[:2], channels, size) for part in parts], 3)


def _weight_derivative_in_pieces(g: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
    """`weight_derivative` for a GPU, from the images ``x [G, c, h, w, N]``: a product of long rows with
    few results would keep few of its processors busy. So it is taken in pieces, which are summed."""
    count, out, channels, size = shape[:4]
    k, _, h, w, n = x.shape
    each = count // k
    a, b = x.stride()[2:4]
    high, wide = h - size + 1, w - size + 1
    by_pixel = n >= _LONG
    # The number along each axis and the strides, of pieces and of the values summed in a piece.
    pieces, piece_strides = ((high, wide), (a, b)) if by_pixel else ((high,), (a,))
    length, strides = ((n,), x.stride()[4:]) if by_pixel else ((wide, n), x.stride()[3:])
    total = math.prod(pieces)
    g = g.view(k, each * out, total, -1).transpose(1, 2).flatten(0, 1)
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
        part = product.view(k, total, *product.shape[1:]).sum(1).transpose(1, 2)
        parts.append(part.reshape(count, out, channels, *window))
    return parts[0] if rows == 1 else torch.stack(parts, 3)


def image_derivative(weight: Tensor, g: Tensor, shape: Sequence[int]) -> Tensor:
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


def times(w: Tensor, x: Tensor) -> Tensor:
    """``w [K, o, i] @ x [G, i, n]``: ``[K, o, n]``."""
    count, out, rows = w.shape
    sets = x.shape[0]
    if sets == count:
        return torch.bmm(w, x)
    if sets == 1:
        return (w.reshape(-1, rows) @ x[0]).view(count, out, -1)
    return torch.bmm(w.reshape(sets, -1, rows), x).view(count, out, -1)


def _add_times(y: Tensor, w: Tensor, x: Tensor) -> None:
    """``y += w @ x``, in place."""
    sets = x.shape[0]
    if sets == w.shape[0]:
        y.baddbmm_(w, x)
    elif sets == 1:
        y.view(-1, y.shape[2]).addmm_(w.reshape(-1, w.shape[2]), x[0])
    else:
        y.view(sets, -1, y.shape[2]).baddbmm_(w.reshape(sets, -1, w.shape[2]), x)


def _times_transposed(x: Tensor, g: Tensor) -> Tensor:
    """``x [G, i, n] @ g^T`` with ``g [K, o, n]``: ``[K, i, o]``."""
    count, out, images = g.shape
    sets = x.shape[0]
    if sets == count:
        return torch.bmm(x, g.transpose(1, 2))
    if sets == 1:
        product = x[0] @ g.reshape(-1, images).t()
        return product.view(x.shape[1], count, out).transpose(0, 1)
    product = torch.bmm(x, g.reshape(sets, -1, images).transpose(1, 2))
    return product.view(sets, x.shape[1], -1, out).transpose(1, 2).flatten(0, 1)
