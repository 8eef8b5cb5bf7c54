"""Ordinary training of K networks on real images at once, for pools of trained networks.

Adam with step decay on mean cross-entropy, as Wang et al. 2018 train the networks that they adapt and attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ddsweep.core.derivatives import derivatives_of
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import RealSet
from ddsweep.core.layers import Params
from ddsweep.core.outer import adam
from ddsweep.core.precision import products
from ddsweep.core.unroll import loss_and_gradient

__all__ = ["TrainingSchedule", "train_on_real"]


@dataclass(frozen=True)
class TrainingSchedule:
    """``epochs`` over all images in batches of ``batch``, at rate ``lr`` times ``decay_factor`` for each
    ``decay_epochs`` gone by."""

    epochs: int
    batch: int
    lr: float
    decay_epochs: int
    decay_factor: float


def train_on_real(
    network: nn.Module,
    params: Params,
    real: RealSet,
    schedule: TrainingSchedule,
    seeds: Callable[[int], Sequence[int]],
    plan: ExecutionPlan,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Params | None:
    """``params [K, ...]`` after training on the N images of ``real``; None if ``should_stop`` (asked at every
    step) said so.

    Each network sees the images of an epoch in an order of its own, that of ``seeds(epoch)[k]``; the last
    batch is the rest.
    """
    math, count = derivatives_of(network, plan.real_batching), len(real)
    names = list(params)
    m = [torch.zeros_like(value) for value in params.values()]
    v, updates = list(m), 0
    for epoch in range(schedule.epochs):
        lr = schedule.lr * schedule.decay_factor ** (epoch // schedule.decay_epochs)
        generators = (torch.Generator().manual_seed(seed) for seed in seeds(epoch))
        order = torch.stack([torch.randperm(count, generator=g) for g in generators]).to(real.pixels.device)
        for start in range(0, count, schedule.batch):
            if should_stop():
                return None
            batch = real.take(order[:, start : start + schedule.batch])
            images = batch.normalised(next(iter(params.values())).dtype)
            with products(plan.device):
                _, gradient = loss_and_gradient(math.loss_and_gradient, params, images, batch.labels, plan)
            updates += 1
            pieces = [gradient[name] for name in names]
            steps, m, v = adam(pieces, m, v, [updates] * len(names), [lr] * len(names))
            values = torch._foreach_add([params[name] for name in names], steps)
            params = dict(zip(names, values, strict=True))
    return params
