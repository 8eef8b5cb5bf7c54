"""Losses per network: the inner loss that a network is trained with and the outer loss on real data."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["losses_per_network"]


def losses_per_network(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each network, ``[K]``, from logits ``[K, N, classes]``.

    ``labels`` is ``[N]`` (shared) or ``[K, N]``, int64.
    """
    count, images, classes = logits.shape
    targets = labels.expand(count, images).reshape(-1)
    loss = F.cross_entropy(logits.reshape(-1, classes), targets, reduction="none")
    return loss.view(count, images).mean(1)
