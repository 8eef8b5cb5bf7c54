"""Random changes of images: shifts, rotations, scalings, mirrored images, cut-outs; and those of DSA.

Each is a linear map of the pixels (brightness adds a number), drawn for every image of a batch. So the way
back from derivatives by the changed images is its transpose, and autograd gives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ddsweep.core.ahead import sent

__all__ = ["Augmentation", "draw_augmentation"]

SHIFT, DEGREES, SCALE, CUTOUT = 0.1, 15.0, 0.15, 0.4
"""The largest shift (as a part of the side), rotation, and change of size; the side of the cut-out square."""

DSA_CROP, DSA_SCALE, DSA_CUTOUT = 0.125, 1.2, 0.5
"""Of DSA: the largest shift of a crop, the largest factor of a scaling, and the side of the cut-out
square."""


@dataclass(frozen=True)
class Augmentation:
    """One draw for n images: ``affine [n, 2, 3]`` maps each pixel to its origin (as in ``F.affine_grid``),
    ``mask [n, 1, h, w]`` marks kept pixels, and ``color [n, 3]`` are brightness, saturation and contrast.
    None means no change. Beyond its edges an image repeats its edge or, with ``zeros``, is 0 (the mean of the
    data); with ``zeros`` the corners of the grid are the centres of pixels."""

    affine: Tensor | None
    mask: Tensor | None
    color: Tensor | None = None
    zeros: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """``images [n, c, h, w]`` or ``[K, n, c, h, w]``. Cut-out pixels are 0, the mean of the data."""
        out = images
        if self.affine is not None:
            flat = images.flatten(0, -4)
            affine = sent(self.affine, flat.device).to(flat).repeat(len(flat) // len(self.affine), 1, 1)
            grid = F.affine_grid(affine, list(flat.shape), align_corners=self.zeros)
            edge = "zeros" if self.zeros else "border"
            out = F.grid_sample(flat, grid, "bilinear", edge, align_corners=self.zeros).view(images.shape)
        if self.color is not None:
            brightness, saturation, contrast = (
                sent(self.color, out.device).to(out)[:, :, None, None, None].unbind(1)
            )
            out = out + brightness
            grey = out.mean(-3, keepdim=True)
            out = grey + (out - grey) * saturation
            mean = out.mean((-3, -2, -1), keepdim=True)
            out = mean + (out - mean) * contrast
        return out if self.mask is None else out * sent(self.mask, out.device).to(out)


def draw_augmentation(
    parts: Sequence[str], count: int, side: int, generator: torch.Generator
) -> Augmentation:
    """``parts`` of shift, rotate, scale, flip and cutout, for ``count`` images of ``side`` pixels; or, if the
    first part is ``dsa``, one of the others (see `_draw_dsa`)."""
    if parts and parts[0] == "dsa":
        return _draw_dsa(parts[1:], count, side, generator)

    def uniform(reach: float) -> Tensor:
        return (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1) * reach

    zero, one = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
    angle = uniform(math.radians(DEGREES)) if "rotate" in parts else zero
    size = 1 + uniform(SCALE) if "scale" in parts else one
    mirror = torch.where(uniform(1.0) < 0, -1.0, 1.0).double() if "flip" in parts else one
    # Coordinates run from -1 to 1, so a shift by a part of the side is twice that part.
    shift = [uniform(2 * SHIFT) if "shift" in parts else zero for _ in range(2)]
    affine = None
    if set(parts) - {"cutout"}:
        cos, sin = angle.cos() / size, angle.sin() / size
        rows = [cos * mirror, -sin, shift[0], sin * mirror, cos, shift[1]]
        affine = torch.stack(rows, 1).view(count, 2, 3)
    mask = None
    if "cutout" in parts:
        edge = max(1, round(CUTOUT * side))
        corner = torch.randint(side - edge + 1, (count, 2, 1), generator=generator)
        inside = (torch.arange(side) >= corner) & (torch.arange(side) < corner + edge)
        mask = _outside(inside)
    return Augmentation(affine, mask)


def _outside(inside: Tensor) -> Tensor:
    """The mask ``[n, 1, side, side]`` without the squares of rows and columns ``inside [n, 2, side]``."""
    return (~(inside[:, 0, :, None] & inside[:, 1, None, :]))[:, None]


def _draw_dsa(parts: Sequence[str], count: int, side: int, generator: torch.Generator) -> Augmentation:
    """One of ``parts``, all equally likely, for the whole batch, and its values for each image: the
    augmentation of Zhao and Bilen 2021, *Dataset Condensation with Differentiable Siamese Augmentation*."""
    part = parts[int(torch.randint(len(parts), (), generator=generator))]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    if part == "color":
        color = torch.stack([uniform(-0.5, 0.5), uniform(0.0, 2.0), uniform(0.5, 1.5)], 1)
        return Augmentation(None, None, color)
    if part == "cutout":
        edge = int(DSA_CUTOUT * side + 0.5)
        first = torch.randint(side + 1 - edge % 2, (count, 2, 1), generator=generator) - edge // 2
        inside = (torch.arange(side) >= first) & (torch.arange(side) < first + edge)
        return Augmentation(None, _outside(inside))
    affine = torch.eye(2, 3, dtype=torch.float64).repeat(count, 1, 1)
    if part == "crop":
        reach = int(DSA_CROP * side + 0.5)
        pixels = torch.randint(-reach, reach + 1, (count, 2), generator=generator)
        affine[:, :, 2] = 2 * pixels / max(1, side - 1)
    elif part == "scale":
        affine[:, 0, 0], affine[:, 1, 1] = (uniform(1 / DSA_SCALE, DSA_SCALE) for _ in range(2))
    elif part == "rotate":
        angle = uniform(-math.radians(DEGREES), math.radians(DEGREES))
        affine[:, 0, 0] = affine[:, 1, 1] = angle.cos()
        affine[:, 0, 1], affine[:, 1, 0] = -angle.sin(), angle.sin()
    else:
        affine[:, 0, 0] = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0).double()
    return Augmentation(affine, None, zeros=True)
