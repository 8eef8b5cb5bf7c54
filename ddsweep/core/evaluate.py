"""Applying a distilled set to a group of networks, and counting right answers on real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import normalise
from ddsweep.core.networks import Params, forward_networks
from ddsweep.core.unroll import train_networks

__all__ = ["Evaluation", "count_right", "evaluate_networks", "rate_at"]

Rate = float | Tensor
"""One for all networks, or ``[K]``, one for each."""


@dataclass(frozen=True)
class Evaluation:
    """At each chosen inner step, of each network: ``accuracy``, ``loss`` and ``diverged``, all
    ``[steps, K]``. Accuracies are fractions and never NaN: a network with a logit that is not finite
    answers wrongly there, is marked as diverged, and has a loss of NaN."""

    steps: tuple[int, ...]
    accuracy: Tensor
    loss: Tensor
    diverged: Tensor


def rate_at(rates: Sequence[Rate], inner_steps: int, t: int) -> Rate:
    """The rate of inner step ``t``. Beyond T the rates of the last epoch repeat."""
    if t < len(rates):
        return rates[t]
    return rates[len(rates) - inner_steps + t % inner_steps]


def count_right(
    network: nn.Module,
    params: Params,
    pixels: Tensor,
    labels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    plan: ExecutionPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """(accuracy, mean loss, diverged), each ``[K]`` on the CPU, of K networks on all the images.

    ``pixels [N, c, h, w]`` uint8 and ``labels [N]`` on the device of ``params``; images are normalised
    and passed on in batches of ``plan.real_chunk``.
    """
    weight = next(iter(params.values()))
    right = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
    loss = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    finite = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    with torch.no_grad():
        for start in range(0, len(labels), plan.real_chunk):
            batch = slice(start, start + plan.real_chunk)
            x = normalise(pixels[batch], mean, std, weight.dtype)
            logits = forward_networks(network, params, x, plan.real_batching)
            y = labels[batch].expand(len(weight), -1)
            usable = torch.isfinite(logits).all(-1)
            right += ((logits.argmax(-1) == y) & usable).sum(1)
            finite &= usable.all(1)
            # In float64: large but finite logits of a network that is about to diverge overflow float32.
            each = F.cross_entropy(logits.flatten(0, 1).double(), y.reshape(-1), reduction="none")
            loss += each.view(y.shape).sum(1)
    loss = torch.where(finite, loss / len(labels), torch.nan)
    return (right.double() / len(labels)).cpu(), loss.cpu(), ~finite.cpu()


def evaluate_networks(
    network: nn.Module,
    params: Params,
    images: Tensor,
    labels: Tensor,
    rates: Sequence[Rate],
    steps: Sequence[int],
    pixels: Tensor,
    targets: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    plan: ExecutionPlan,
) -> Evaluation:
    """Train K networks on the distilled batches and count right answers at the inner steps ``steps``.

    ``params [K, ...]`` initial weights, untouched; ``images [S, n, c, h, w]`` (or ``[K, S, ...]``, a set for
    each network), ``labels [S, n]``, ``rates`` of length T (numbers, or ``[K]`` each); ``steps`` ascending,
    0 is before training, beyond T see `rate_at`; ``pixels`` and ``targets`` as in `count_right`.
    """
    inner_steps, done = labels.shape[0], 0
    accuracy, loss, diverged = [], [], []
    for step in steps:
        if step > done:
            todo = [rate_at(rates, inner_steps, t) for t in range(done, step)]
            params = train_networks(network, params, images, labels, todo, plan.inner_batching, done)
            done = step
        a, b, c = count_right(network, params, pixels, targets, mean, std, plan)
        accuracy.append(a)
        loss.append(b)
        diverged.append(c)
    return Evaluation(tuple(steps), torch.stack(accuracy), torch.stack(loss), torch.stack(diverged))
