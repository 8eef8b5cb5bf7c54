"""The passes of K networks whose layers have their derivatives written out (`ddsweep.core.layers`).

Images are ``[n, c, h, w]`` (all networks see the same), ``[K, n, c, h, w]``, or ``[G, ...]`` with G a divisor
of K: K/G networks in a row see the same. Targets are labels, int64 ``[n]`` and so on, or class probabilities
``[n, classes]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddsweep.core.layers import Layer, Params, Tape

__all__ = ["Explicit", "GradientVjp"]


@dataclass(frozen=True)
class GradientVjp:
    """The derivative of <g, v>, the gradient g times a given v: by weights, by images ``[K, n, c, h, w]``
    and, if they are probabilities, by targets ``[K, n, classes]``."""

    weights: Params
    images: Tensor
    targets: Tensor | None


@dataclass
class _Kept:
    """The kept values of one forward and backward pass: those of each layer, the probabilities ``[K, classes,
    n]``, and for learned targets (None for labels) the sum for each image."""

    tapes: list[Tape]
    probabilities: Tensor
    mass: Tensor | None


def _images_last(images: Tensor) -> Tensor:
    """``[n, c, h, w]`` or ``[K, n, c, h, w]`` -> ``[1 or K, c, h, w, n]``."""
    if images.dim() == 4:
        images = images[None]
    return images.permute(0, 2, 3, 4, 1).contiguous()


@dataclass(frozen=True)
class Explicit:
    """Nothing here builds a graph. The loss is cross-entropy, the mean over images."""

    layers: Sequence[Layer]

    @torch.no_grad()
    def logits(self, params: Params, images: Tensor) -> Tensor:
        x = _images_last(images)
        for layer in self.layers:
            x = layer.forward(params, x, Tape())
        return x.transpose(1, 2)

    @torch.no_grad()
    def gradient(self, params: Params, images: Tensor, targets: Tensor, keep: bool) -> tuple[Params, Any]:
        _, found, kept = self._pass(params, images, targets)
        return found, kept if keep else None

    @torch.no_grad()
    def loss_and_gradient(self, params: Params, images: Tensor, targets: Tensor) -> tuple[Tensor, Params]:
        losses, found, _ = self._pass(params, images, targets)
        return losses, found

    def _pass(self, params: Params, images: Tensor, targets: Tensor) -> tuple[Tensor, Params, _Kept]:
        """Losses ``[K]``, gradient, and the kept values of one forward and one backward pass."""
        x = _images_last(images)
        tapes = [Tape() for _ in self.layers]
        for layer, tape in zip(self.layers, tapes, strict=True):
            x = layer.forward(params, x, tape)
        count, _, total = x.shape
        logs = x.log_softmax(1)
        probabilities, mass = logs.exp(), None
        soft = targets.is_floating_point()
        sets = 1 if targets.dim() == (2 if soft else 1) else len(targets)
        if 1 < sets < count:
            targets = targets.repeat_interleave(count // sets, 0)
        if soft:
            targets = targets.transpose(-1, -2)
            mass = targets.sum(-2, keepdim=True)
            losses = -(targets * logs).sum(1).mean(1)
            g = (probabilities * mass - targets) / total
        else:
            index = targets.expand(count, total)[:, None]
            losses = -logs.gather(1, index).mean((1, 2))
            g = probabilities.scatter_add(1, index, logs.new_full((count, 1, total), -1)) / total
        found: Params = {}
        for i in range(len(self.layers) - 1, -1, -1):
            g = self.layers[i].backward(params, g, tapes[i], found, i > 0)
        return losses, {name: found[name] for name in params}, _Kept(tapes, probabilities, mass)

    @torch.no_grad()
    def vjp(self, params: Params, kept: Any, v: Params) -> GradientVjp:
        x: Tensor | None = None
        for layer, tape in zip(self.layers, kept.tapes, strict=True):
            x = layer.tangent(params, v, x, tape)
        assert x is not None
        total = x.shape[2]
        by_log = x - (kept.probabilities * x).sum(1, keepdim=True)
        g = kept.probabilities * by_log / total
        if kept.mass is not None:
            g = g * kept.mass
        found: Params = {}
        for layer, tape in zip(reversed(self.layers), reversed(kept.tapes), strict=True):
            g = layer.tangent_backward(params, v, g, tape, found)
        return GradientVjp(
            weights={name: found[name] for name in params},
            images=g.permute(0, 4, 1, 2, 3),
            targets=-by_log.transpose(1, 2) / total if kept.mass is not None else None,
        )
