"""ZCA whitening: images whose pixels are uncorrelated over the training part (Bell and Sejnowski 1997).

With X the normalised training images as rows, m their mean and U diag(s) U^T the eigendecomposition of
their covariance, an image x becomes (x - m) W with

    W = U diag((s + epsilon)^-1/2) U^T,

the whitening that changes images least. epsilon = 0.1 keeps the directions without variance small, as in
Cazenavette et al. 2022 (MTT) and its successors, who whiten CIFAR.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Whitening", "measure_whitening"]

EPSILON = 0.1
_AT_ONCE = 4096


@dataclass(frozen=True)
class Whitening:
    """``mean [d]``, ``forth [d, d]`` and its inverse ``back [d, d]``, float32, d = c * h * w."""

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


def measure_whitening(images: Tensor) -> Whitening:
    """The ZCA whitening of normalised training images ``[N, c, h, w]`` float32; sums in float64."""
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
    values, vectors = torch.linalg.eigh(covariance / count)
    scale = (values.clamp_min(0) + EPSILON).sqrt()
    forth, back = ((vectors * by) @ vectors.t() for by in (1 / scale, scale))
    return Whitening(mean.float(), forth.float(), back.float())
