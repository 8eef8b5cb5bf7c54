"""Random changes of images: shifts, rotations, scalings, mirrored images, cut-outs.

Each is a linear map of the pixels, drawn for every image of a batch and the same for all networks. So the way
back from derivatives by the changed images is its transpose, and autograd gives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Augmentation", "draw_augmentation"]

SHIFT, DEGREES, SCALE, CUTOUT = 0.1, 15.0, 0.15, 0.4
"""The largest shift (as a part of the side), rotation, and change of size; the side of the cut-out square."""


@dataclass(frozen=True)
class Augmentation:
    """One draw for n images: ``affine [n, 2, 3]`` maps each pixel to its origin (as in ``F.affine_grid``),
    and ``mask [n, 1, h, w]`` marks kept pixels. None means no change."""

    affine: Tensor | None
    mask: Tensor | None

    def __call__(self, images: Tensor) -> Tensor:
        """``images [n, c, h, w]`` or ``[K, n, c, h, w]``. Beyond its edges an image repeats its edge; cut-out
        pixels are 0, the mean of the data."""
        out = images
        if self.affine is not None:
            flat = images.flatten(0, -4)
            affine = self.affine.to(flat).repeat(len(flat) // len(self.affine), 1, 1)
            grid = F.affine_grid(affine, list(flat.shape), align_corners=False)
            out = F.grid_sample(flat, grid, "bilinear", "border", align_corners=False).view(images.shape)
        return out if self.mask is None else out * self.mask.to(out)


def draw_augmentation(
    parts: Sequence[str], count: int, side: int, generator: torch.Generator
) -> Augmentation:
    """``parts`` of shift, rotate, scale, flip and cutout, for ``count`` images of ``side`` pixels."""

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
        mask = (~(inside[:, 0, :, None] & inside[:, 1, None, :]))[:, None]
    return Augmentation(affine, mask)
