"""Distillation: outer Adam steps over synthetic images and raw rates (Wang et al. 2018, algorithm 1).

State in, state out. Outer step s draws its networks and its real batch from seeds that are a function
of (trial, role, s) alone, so a state and its step number are all that is needed to go on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ddsweep.catalog import TrialSpec
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import class_labels, normalise, sample_per_class
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import Params, build_network
from ddsweep.core.unroll import OuterGradient, outer_gradient, raw_rates
from ddsweep.errors import DivergedError
from ddsweep.seeds import derive_seed

__all__ = [
    "DistillState",
    "Problem",
    "StepReport",
    "adam",
    "initial_state",
    "outer_lr",
    "outer_step",
    "rates",
]

BETAS, EPSILON = (0.5, 0.999), 1e-8
"""Outer Adam as in Wang et al. 2018."""

MAX_SKIPPED_IN_A_ROW = 10
"""Outer steps without one finite network after which even ``on_nonfinite: skip`` gives up."""


@dataclass(frozen=True)
class Problem:
    """What stays the same during one distillation, on its device: settings, data, labels and plan.

    ``real_images [N, c, h, w]`` uint8 and ``real_labels [N]`` int64 are the training part.
    """

    spec: TrialSpec
    plan: ExecutionPlan
    network: nn.Module
    real_images: Tensor
    real_labels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(
        cls,
        spec: TrialSpec,
        plan: ExecutionPlan,
        train_images: Tensor,
        train_labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> Problem:
        device, data = torch.device(plan.device), spec.dataset
        return cls(
            spec=spec,
            plan=plan,
            network=build_network(spec.network_spec, data.shape, data.classes),
            real_images=train_images.to(device),
            real_labels=train_labels.to(device),
            labels=class_labels(spec.inner_steps, data.classes, spec.images_per_class_per_step).to(device),
            mean=mean,
            std=std,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.spec.dtype == "float64" else torch.float32

    def networks(self, seeds: list[int]) -> Params:
        """Fresh networks ``[K, ...]`` of the trial's law, one for each seed."""
        spec = self.spec
        device = torch.device(self.plan.device)
        return draw_networks(
            self.network, spec.init_law, spec.init_param, seeds, device=device, dtype=self.dtype
        )


@dataclass(frozen=True)
class DistillState:
    """Everything that changes: images ``[S, n, c, h, w]``, raw rates ``[T]`` (``[1]`` if shared), the
    moments of Adam for both, the number of outer steps done and of updates among them."""

    images: Tensor
    raw: Tensor
    images_m: Tensor
    images_v: Tensor
    raw_m: Tensor
    raw_v: Tensor
    step: int = 0
    updates: int = 0
    skipped_in_a_row: int = 0

    def tensors(self) -> dict[str, Tensor]:
        names = ("images", "raw", "images_m", "images_v", "raw_m", "raw_v")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> DistillState:
        """The state with these `tensors` and `counters`."""
        values: dict[str, Any] = {**tensors, **counters}
        return cls(**values)

    def counters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("step", "updates", "skipped_in_a_row")}


@dataclass(frozen=True)
class StepReport:
    """One outer step: mean loss over the networks that counted (None if none did), norm of the
    gradient applied, mean inner rate, networks left out; and per network losses and norms ``[K]``."""

    loss: float | None
    grad_norm: float | None
    inner_lr_mean: float
    n_skipped: int
    losses: Tensor
    norms: Tensor


def initial_state(problem: Problem) -> DistillState:
    """Images from N(0, 1) in normalised pixel space (or real ones) and all rates at ``inner_lr``."""
    spec = problem.spec
    c, h, w = spec.dataset.shape
    generator = torch.Generator().manual_seed(derive_seed("image_init", spec.trial_id))
    if spec.image_init == "real":
        m, classes = spec.images_per_class_per_step, spec.dataset.classes
        picks = sample_per_class(problem.real_labels.cpu(), classes, spec.images_per_class, generator)
        picks = picks.view(classes, spec.inner_steps, m).transpose(0, 1).reshape(-1)
        images = normalise(problem.real_images.cpu()[picks], problem.mean, problem.std, problem.dtype)
    else:
        images = torch.randn(problem.labels.numel(), c, h, w, generator=generator).to(problem.dtype)
    images = images.view(*problem.labels.shape, c, h, w).to(problem.plan.device)
    raw = raw_rates(spec.inner_lr, 1 if spec.inner_lr_mode == "shared" else spec.steps).to(images)
    zeros = torch.zeros_like
    return DistillState(images, raw, zeros(images), zeros(images), zeros(raw), zeros(raw))


def rates(state: DistillState, spec: TrialSpec) -> Tensor:
    """The learned rates ``[T]``, softplus of the raw ones."""
    return torch.nn.functional.softplus(state.raw).expand(spec.steps)


def outer_lr(spec: TrialSpec, step: int) -> float:
    """Outer rate at outer step ``step``: constant, halved (or so) every few steps, or cosine to zero."""
    if spec.outer_schedule == "step":
        return float(spec.outer_lr * spec.outer_decay_factor ** (step // spec.outer_decay_steps))
    if spec.outer_schedule == "cosine":
        return spec.outer_lr * 0.5 * (1 + math.cos(math.pi * step / spec.outer_steps))
    return spec.outer_lr


def adam(
    value: Tensor, gradient: Tensor, m: Tensor, v: Tensor, updates: int, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam update (Kingma and Ba 2015, algorithm 1), the ``updates``-th from 1: (value, m, v)."""
    m = BETAS[0] * m + (1 - BETAS[0]) * gradient
    v = BETAS[1] * v + (1 - BETAS[1]) * gradient * gradient
    scale = (v / (1 - BETAS[1] ** updates)).sqrt() + EPSILON
    return value - lr * (m / (1 - BETAS[0] ** updates)) / scale, m, v


def network_seeds(spec: TrialSpec, step: int) -> list[int]:
    """Seeds of the networks of one outer step: fresh ones, or the one known network of ``fixed``."""
    if spec.init == "fixed":
        return [known_seed(spec)]
    return [derive_seed("outer", spec.trial_id, step, k) for k in range(spec.models_per_step)]


def known_seed(spec: TrialSpec) -> int:
    """The known initial network of a ``fixed`` trial: number ``seed`` of its law."""
    return derive_seed("known", spec.network, spec.init_law, spec.init_param, spec.seed)


def _real_batch(problem: Problem, step: int) -> tuple[Tensor, Tensor]:
    """Real images of one outer step, ``[N, ...]`` shared or ``[K, N, ...]``, without replacement."""
    spec, available = problem.spec, len(problem.real_labels)
    size = min(spec.real_batch, available)
    generator = torch.Generator().manual_seed(derive_seed("real_batch", spec.trial_id, step))
    draws = spec.models_per_step if spec.real_batch_mode == "per_network" else 1
    picks = torch.stack([torch.randperm(available, generator=generator)[:size] for _ in range(draws)])
    picks = picks.to(problem.real_images.device)
    if spec.real_batch_mode == "shared":
        picks = picks[0]
    return (
        normalise(problem.real_images[picks], problem.mean, problem.std, problem.dtype),
        problem.real_labels[picks],
    )


def _weights_of_networks(spec: TrialSpec, norms: Tensor, finite: Tensor) -> Tensor:
    """How much each network's gradient counts ``[K]``: nothing if it is not finite, less if clipped.

    The sum of the weighted gradients is the mean over the finite networks. The median is over those
    that have a gradient at all: dead networks would otherwise clip the living ones to nothing.
    """
    limit = spec.clip_norm
    alive = norms[finite & (norms > 0)]
    if spec.clip_median is not None and len(alive):
        limit = spec.clip_median * float(alive.median())
    weights = torch.ones_like(norms) if limit is None else (limit / norms.clamp_min(1e-30)).clamp_max(1.0)
    return weights / int(finite.sum())


def outer_step(problem: Problem, state: DistillState) -> tuple[DistillState, StepReport]:
    """One outer step: unroll ``models_per_step`` networks, average their gradients, one Adam update.

    A network whose loss or gradient is not finite is left out of the mean (``on_nonfinite: skip``).
    Raises `DivergedError` under ``stop``, or when for ten steps in a row no network was finite.
    """
    spec = problem.spec
    raw = state.raw.expand(spec.steps)
    networks = problem.networks(network_seeds(spec, state.step))
    real_images, real_labels = _real_batch(problem, state.step)
    gradient = outer_gradient(
        problem.network, networks, state.images, problem.labels, raw, real_images, real_labels, problem.plan
    )
    if spec.inner_lr_mode == "fixed":
        gradient = replace(gradient, raw_rates=torch.zeros_like(gradient.raw_rates))
    norms = gradient.norms
    finite = torch.isfinite(gradient.losses) & torch.isfinite(norms)
    n_skipped = int((~finite).sum())
    if n_skipped and spec.on_nonfinite == "stop":
        raise DivergedError(
            f"outer step {state.step}: {n_skipped} of {len(finite)} networks have a loss or gradient that "
            "is not finite (on_nonfinite: stop; skip leaves such networks out, a smaller inner_lr or "
            "clip_norm avoids them)"
        )
    mean_lr = float(rates(state, spec).mean())
    if n_skipped == len(finite):
        in_a_row = state.skipped_in_a_row + 1
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"outer step {state.step}: no network was finite for {in_a_row} steps in a row (mean inner "
                f"rate {mean_lr:.3g}; a smaller inner_lr, or clip_norm, avoids it)"
            )
        report = StepReport(None, None, mean_lr, n_skipped, gradient.losses, norms)
        return replace(state, step=state.step + 1, skipped_in_a_row=in_a_row), report
    weights = _weights_of_networks(spec, norms, finite)
    images, raw_gradient = _combine(gradient, weights, finite, spec)
    updates, lr = state.updates + 1, outer_lr(spec, state.step)
    new_images, images_m, images_v = adam(state.images, images, state.images_m, state.images_v, updates, lr)
    new_raw, raw_m, raw_v = adam(state.raw, raw_gradient, state.raw_m, state.raw_v, updates, lr)
    if spec.inner_lr_mode == "fixed":
        new_raw, raw_m, raw_v = state.raw, state.raw_m, state.raw_v
    report = StepReport(
        loss=float(gradient.losses[finite].mean()),
        grad_norm=float((images.square().sum() + raw_gradient.square().sum()).sqrt()),
        inner_lr_mean=mean_lr,
        n_skipped=n_skipped,
        losses=gradient.losses,
        norms=norms,
    )
    return DistillState(
        new_images, new_raw, images_m, images_v, raw_m, raw_v, state.step + 1, updates, 0
    ), report


def _combine(
    gradient: OuterGradient, weights: Tensor, finite: Tensor, spec: TrialSpec
) -> tuple[Tensor, Tensor]:
    """Weighted sums over networks: (images ``[S, n, c, h, w]``, raw rates ``[T]`` or ``[1]``)."""
    weights = weights[finite].to(gradient.images)  # taken out, not multiplied: 0 * nan would be nan
    images = torch.einsum("k,k...->...", weights, gradient.images[finite])
    raw = torch.einsum("k,kt->t", weights, gradient.raw_rates[finite])
    return images, raw.sum(0, keepdim=True) if spec.inner_lr_mode == "shared" else raw
