"""ZCA whitening: images whose pixels are uncorrelated over the training part (Bell and Sejnowski 1997).

With X the training images as rows, m their mean and U diag(s) U^T the eigendecomposition of their covariance,
an image x becomes (x - m) W with

    W = U diag((s + epsilon)^-1/2) U^T,

the whitening that changes images least. epsilon = 0.1 keeps the directions without variance small.

``zca`` whitens normalised images, whose values have a variance near 1. ``zca_pixels`` whitens pixels from 0
to 1, whose variance is below epsilon in most directions, so it is the weaker one. The code of Cazenavette et
al. 2022 (MTT), Cui et al. 2023 (TESLA) and Guo et al. 2024 (DATM) does that with CIFAR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Whitening", "measure_whitening"]

EPSILON = 0.1
_AT_ONCE = 4096


@dataclass(frozen=True)
class Whitening:
    """Of normalised images: their ``mean [d]``, ``forth [d, d]`` and its inverse ``back [d, d]``, float32,
    d = c * h * w. ``kind`` is the setting ``whitening``."""

    kind: str
    mean: Tensor
    forth: Tensor
    back: Tensor

    def whitened(self, images: Tensor) -> Tensor:
        """Normalised images ``[..., c, h, w]``, whitened."""
        flat = images.flatten(-3)
        parts = torch.split(flat.reshape(-1, flat.shape[-1]), _AT_ONCE)
        mean, forth = self.mean.to(flat), self.forth.to(flat)
        return torch.cat([(part - mean) @ forth for part in parts]).view(images.shape)

    def normalised(self, images: Tensor) -> Tensor:
        """Whitened images ``[..., c, h, w]`` as normalised ones: the inverse of `whitened`."""
        flat = images.flatten(-3)
        return (flat @ self.back.to(flat) + self.mean.to(flat)).view(images.shape)


def measure_whitening(images: Tensor, kind: str, std: Sequence[float]) -> Whitening:
    """The whitening of this ``kind`` of normalised training images ``[N, c, h, w]`` float32; ``std`` per
    channel is what they were divided by. Sums are in float64."""
    flat = images.flatten(1)
    count, size = flat.shape
    mean = torch.zeros(size, dtype=torch.float64)
    for part in torch.split(flat, _AT_ONCE):
        mean += part.double().sum(0)
    mean /= count
    covariance = torch.zeros(size, size, dtype=torch.float64)
    for part in torch.split(flat, _AT_ONCE):
        centred = part.double() - mean
        covariance.addmm_(centred.t(), centred)
    # What is whitened is normalised values times these; their mean falls out.
    units = torch.ones(images.shape[1:], dtype=torch.float64)
    if kind == "zca_pixels":
        units *= torch.tensor(std, dtype=torch.float64)[:, None, None]
    units = units.flatten()
    values, vectors = torch.linalg.eigh(units[:, None] * covariance / count * units)
    scale = (values.clamp_min(0) + EPSILON).sqrt()
    forth, back = ((vectors * by) @ vectors.t() for by in (1 / scale, scale))
    return Whitening(kind, mean.float(), (units[:, None] * forth).float(), (back / units).float())
