"""Back-propagation through training (Wang et al. 2018, algorithm 1).

It learns images, one rate for each inner step and, if asked for, labels, by the exact derivative of the loss
after T steps; with a window, of the loss after some of them (Feng et al. 2024, RaT-BPTT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ddsweep.catalog import TrialSpec, augmentation_parts
from ddsweep.core.ahead import pinned, sent
from ddsweep.core.augment import Augmentation, draw_augmentation
from ddsweep.core.images import LabelledImages
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.objective import rewritten
from ddsweep.core.order import joined_orders
from ddsweep.core.outer import NetworkGradients
from ddsweep.core.recipe import batch_order
from ddsweep.core.task import Learned, Task, soft_labels
from ddsweep.core.training import InnerLoop
from ddsweep.core.unroll import OuterGradient, Window, outer_gradient, raw_of, raw_rates
from ddsweep.seeds import derive_seed

__all__ = ["gradients", "rates", "start", "together"]


_LEAST_RATE = 1e-8
"""A rate of 0, such as a stored one may have become by rounding, has no raw rate."""


def start(task: Task, images: Tensor) -> Learned:
    """``images``; ``raw`` rates ``[T]`` (``[1]`` if shared); and, if they are learned, ``labels [S, n,
    classes]``. Rates are at ``inner_lr`` and labels at the classes themselves, or as the start set has them:
    beyond its epochs the rates of its last one repeat, one shared rate is their mean."""
    spec, first = task.spec, task.start_set
    shared = spec.inner_lr_mode == "shared"
    raw = raw_rates(spec.inner_lr, 1 if shared else spec.steps)
    if first is not None and first.rates is not None and spec.inner_lr_mode != "fixed":
        epochs = first.rates.double().clamp_min(_LEAST_RATE).view(-1, spec.inner_steps)
        going_on = epochs[[min(epoch, len(epochs) - 1) for epoch in range(spec.inner_epochs)]].flatten()
        raw = raw_of(going_on.mean().view(1) if shared else going_on)
    learned = {"images": images, "raw": raw.to(images)}
    labels = soft_labels(task, images)
    return learned if labels is None else {**learned, "labels": labels}


def gradients(task: Task, learned: Learned, step: int) -> NetworkGradients:
    """Unroll ``models_per_step`` networks, and go back (equations 2 and 4 of Wang et al. 2018)."""
    real = _real_batch(task, step)
    loop = task.drawn("loop", step, _inner_loop)
    found = outer_gradient(
        task.network,
        task.outer_networks(step),
        LabelledImages(learned["images"], learned.get("labels", task.labels)),
        learned["raw"].expand(task.spec.steps),
        real,
        task.plan,
        loop=loop,
        window=_window(task.spec, step),
    )
    return _by_learned(found, task.spec)


def together(
    tasks: Sequence[Task], learned: Sequence[Learned], steps: Sequence[int]
) -> list[NetworkGradients]:
    """`gradients` of several trials of one shape, as one outer gradient of all their networks."""
    first, drawn = tasks[0], {}
    for task, step in zip(tasks, steps, strict=True):
        if (id(task), step) not in drawn:  # copies of a trial have its draws
            loop = task.drawn("loop", step, _inner_loop)
            drawn[id(task), step] = (
                *(task.outer_networks(step), _real_batch(task, step)),
                *(loop, _window(task.spec, step)),
            )
    each = [drawn[id(task), step] for task, step in zip(tasks, steps, strict=True)]
    networks, real, loops, windows = (list(column) for column in zip(*each, strict=True))
    joined = torch.stack if first.spec.real_batch_mode == "shared" else torch.cat
    labels = first.labels
    if "labels" in learned[0]:
        labels = torch.stack([own["labels"] for own in learned])
    found = outer_gradient(
        first.network,
        {name: torch.cat([own[name] for own in networks]) for name in networks[0]},
        LabelledImages(torch.stack([own["images"] for own in learned]), labels),
        torch.stack([own["raw"].expand(first.spec.steps) for own in learned]),
        LabelledImages(joined([batch.images for batch in real]), joined([batch.labels for batch in real])),
        first.plan,
        loop=replace(
            loops[0],
            batch_order=joined_orders([loop.batch_order for loop in loops]),
            augment=None,
            augments=tuple(loop.augment for loop in loops if loop.augment is not None),
        ),
        window=[window for window in windows if window is not None] or None,
    )
    count = first.spec.models_per_step
    return [
        _by_learned(found.of(slice(i * count, (i + 1) * count)), task.spec) for i, task in enumerate(tasks)
    ]


def _by_learned(found: OuterGradient, spec: TrialSpec) -> NetworkGradients:
    by = {"images": found.images}
    if spec.inner_lr_mode != "fixed":
        shared = spec.inner_lr_mode == "shared"  # the rates of all steps are one learned value
        by["raw"] = found.raw_rates.sum(1, keepdim=True) if shared else found.raw_rates
    if found.labels is not None:
        by["labels"] = found.labels
    return NetworkGradients(found.losses, by)


def rates(learned: Learned, spec: TrialSpec) -> Tensor:
    """The rates ``[T]``, softplus of the raw ones."""
    return F.softplus(learned["raw"]).expand(spec.steps)


def _inner_loop(task: Task, step: int) -> InnerLoop:
    """The training of the networks of outer step ``step``."""
    spec = task.spec
    optimizer = InnerOptimizer(spec.inner_optimizer, spec.inner_momentum)
    seeds = [derive_seed("order", spec.trial_id, step, k) for k in range(spec.models_per_step)]
    order = None if spec.order == "fixed" else batch_order(spec.order, spec, seeds, spec.steps)
    parts = augmentation_parts("inner_augment", spec.inner_augment, spec.dataset.name)
    if not parts:
        return InnerLoop(optimizer, order)
    generator = torch.Generator().manual_seed(derive_seed("augment", spec.trial_id, "inner", step))
    count, side = task.labels.shape[1], spec.dataset.shape[1]
    draws = [draw_augmentation(parts, count, side, generator) for _ in range(spec.steps)]
    return InnerLoop(optimizer, order, lambda images, t: draws[t](images))


def _window(spec: TrialSpec, step: int) -> Window | None:
    """The window of outer step ``step``: anywhere in the T steps, with equal chance."""
    if spec.window is None:
        return None
    generator = torch.Generator().manual_seed(derive_seed("window", spec.trial_id, step))
    start = int(torch.randint(spec.steps - spec.window + 1, (), generator=generator))
    return Window(start, start + spec.window)


def _real_batch(task: Task, step: int) -> LabelledImages:
    """Real images of one outer step, ``[N, ...]`` shared or ``[K, N, ...]``, without replacement."""
    spec = task.spec
    picks, augmentation = task.drawn("real_batch", step, _draw_real)
    batch = task.real.take(sent(picks, task.real.pixels.device))
    images = batch.normalised(task.dtype)
    if augmentation is not None:
        images = augmentation(images)
    return LabelledImages(images, rewritten(batch.labels, spec.attack_class, spec.target_class))


def _draw_real(task: Task, step: int) -> tuple[Tensor, Augmentation | None]:
    """Which images they are, ``[N]`` or ``[K, N]``, and their ``outer_augment``."""
    spec, available = task.spec, len(task.real)
    size = min(spec.real_batch, available)
    generator = torch.Generator().manual_seed(derive_seed("real_batch", spec.trial_id, step))
    draws = spec.models_per_step if spec.real_batch_mode == "per_network" else 1
    picks = torch.stack([torch.randperm(available, generator=generator)[:size] for _ in range(draws)])
    if spec.real_batch_mode == "shared":
        picks = picks[0]
    picks = pinned(picks, task.real.pixels.device)
    parts = augmentation_parts("outer_augment", spec.outer_augment, spec.dataset.name)
    if not parts:
        return picks, None
    own = torch.Generator().manual_seed(derive_seed("augment", spec.trial_id, "outer", step))
    return picks, draw_augmentation(parts, size, spec.dataset.shape[1], own)
