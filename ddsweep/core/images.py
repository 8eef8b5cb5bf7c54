"""Images between storage and use: uint8 pixels in, normalised floats out, on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["class_labels", "cosine_basis", "normalise", "sample_per_class"]


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 ``[..., c, h, w]`` to (pixels/255 - mean) / std per channel, on the device of ``pixels``; floats
    are normalised (and whitened) images already, and only change their type."""
    if pixels.is_floating_point():
        return pixels.to(dtype)
    scale = torch.tensor(std, dtype=dtype, device=pixels.device)[:, None, None]
    shift = torch.tensor(mean, dtype=dtype, device=pixels.device)[:, None, None]
    return (pixels.to(dtype) / 255 - shift) / scale


def cosine_basis(side: int) -> Tensor:
    """The orthonormal cosine transform of ``side`` values (DCT-II), float64 ``[side, side]``: row k has k
    half-waves. ``basis @ x`` transforms, ``basis.T @ x`` brings back."""
    k = torch.arange(side, dtype=torch.float64)
    basis = torch.cos(math.pi / side * (k + 0.5) * k[:, None]) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return basis


def class_labels(inner_steps: int, classes: int, per_class: int) -> Tensor:
    """Hard labels ``[S, classes * per_class]`` int64 of the distilled batches, sorted by class."""
    return torch.arange(classes).repeat_interleave(per_class).repeat(inner_steps, 1)


def sample_per_class(labels: Tensor, classes: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices ``[classes, per_class]`` of images drawn without replacement from each class.

    A class with fewer images than ``per_class`` repeats them in the drawn order. ``labels [N]`` on CPU.
    """
    rows = []
    for label in range(classes):
        members = torch.nonzero(labels == label).flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        rows.append(order.repeat(-(-per_class // len(order)))[:per_class])
    return torch.stack(rows)
