"""Chooses one constant rate and a number of epochs for images that have none of their own, by accuracy.

It is for baseline images, and for the sets of methods without learned rates. The caller gives selection
networks and validation images, never held-out ones or the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from ddsweep.core.evaluate import evaluate_networks
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import LabelledImages, RealSet
from ddsweep.core.layers import Params
from ddsweep.core.training import InnerLoop

__all__ = ["best_of", "score_rates"]

AT_ONCE_BYTES = 2**30
"""The most weights of networks on which rates are tried together: all rates at once, except for networks as
large as AlexNet."""


def score_rates(
    network: nn.Module,
    networks: Params,
    distilled: LabelledImages,
    rates: Sequence[float],
    epochs: Sequence[int],
    validation: RealSet,
    plan: ExecutionPlan,
    loop: InnerLoop,
) -> list[list[float]]:
    """Accuracy ``[rates][epochs]`` on ``validation``, mean over K ``networks``, each trained on ``distilled``
    as in `evaluate_networks`, by ``loop``."""
    first = next(iter(networks.values()))
    count, inner_steps, order = len(first), distilled.labels.shape[0], loop.batch_order
    steps = [inner_steps * number for number in epochs]
    # All rates at once: network k of the batch is network k mod K at rate k div K.
    once = max(1, AT_ONCE_BYTES // sum(value.nbytes for value in networks.values()))
    scores: list[list[float]] = []
    for start in range(0, len(rates), once):
        some = rates[start : start + once]
        each = torch.tensor(some, dtype=first.dtype, device=first.device).repeat_interleave(count)
        own = distilled.images.repeat(len(some), *[1] * 5) if distilled.images.dim() == 6 else None
        found = evaluate_networks(
            network,
            {name: value.repeat(len(some), *[1] * (value.dim() - 1)) for name, value in networks.items()},
            distilled if own is None else replace(distilled, images=own),
            [each] * steps[-1],
            steps,
            validation,
            plan,
            loop=replace(loop, batch_order=None if order is None else order.repeated(len(some))),
            fewer_at_once=True,
        )
        scores += found.accuracy.view(len(steps), len(some), count).mean(2).T.tolist()
    return scores


def best_of(
    scores: Sequence[Sequence[float]], rates: Sequence[float], epochs: Sequence[int]
) -> tuple[float, int]:
    """The rate and the number of epochs with the best of ``scores [rates][epochs]``; the first of equal
    ones."""
    places = [(r, e) for r in range(len(rates)) for e in range(len(epochs))]
    r, e = max(places, key=lambda place: scores[place[0]][place[1]])
    return rates[r], epochs[e]
