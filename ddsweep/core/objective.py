"""Losses per network: the inner loss that a network is trained with and the outer loss on real data.

The outer loss of an attack (Wang et al. 2018, section 3.5) is the same cross-entropy on real data whose
labels were rewritten: see `rewritten`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["losses_per_network", "rewritten"]


def rewritten(labels: Tensor, attack_class: int | None, target_class: int | None) -> Tensor:
    """``labels`` for an attack: ``attack_class`` becomes ``target_class``, and the others stay; without an
    attack all stay."""
    if attack_class is None or target_class is None:
        return labels
    return torch.where(labels == attack_class, target_class, labels)


def losses_per_network(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each network, ``[K]``, from logits ``[K, N, classes]``.

    ``targets``: labels, int64 ``[N]`` (shared) or ``[K, N]``; or class probabilities ``[N, classes]`` or
    ``[K, N, classes]``, which need not sum to one.
    """
    count, images, classes = logits.shape
    if targets.is_floating_point():
        return -(targets * logits.log_softmax(-1)).sum(-1).mean(-1)
    labels = targets.expand(count, images).reshape(-1)
    loss = F.cross_entropy(logits.reshape(-1, classes), labels, reduction="none")
    return loss.view(count, images).mean(1)
