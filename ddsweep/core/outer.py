"""Outer optimisation, shared by all methods: from the gradients of networks to the next state.

Each piece does one thing, and is used only if the trial asks for it (`outer_transforms`). A
`GradientTransform` turns (gradient, state) into (gradient or step, state), as in optax. The output of the
last one is added to the learned values. The running mean follows, and a score may keep the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from ddsweep.catalog import TrialSpec
from ddsweep.core.images import cosine_basis
from ddsweep.core.task import Learned

__all__ = [
    "Adam",
    "ClipToRunningNorm",
    "DistillState",
    "NetworkGradients",
    "adam",
    "averaged",
    "combined",
    "final",
    "network_weights",
    "outer_transforms",
    "rolled_back",
    "schedule_factor",
    "scored",
    "started",
    "updated",
]

BETAS, EPSILON = (0.5, 0.999), 1e-8
"""Outer Adam as in Wang et al. 2018."""

RUNNING_NORM = 0.9
"""The decay of the running norm of ``clip_running`` (Feng et al. 2024)."""

ROLLBACK_FACTOR = 0.5
"""The factor of the outer rate at every rollback."""

_PARTS = ("learned", "m", "v", "ema", "best", "healthy")


@dataclass(frozen=True)
class DistillState:
    """Everything that changes: the learned values with their moments of Adam; the running mean, the best so
    far and the last healthy state, each empty if not asked for; and counters. ``step`` counts outer steps,
    and ``updates`` those that changed something. ``norm`` is the running gradient norm."""

    learned: Learned
    m: Learned
    v: Learned
    ema: Learned = field(default_factory=dict)
    best: Learned = field(default_factory=dict)
    healthy: Learned = field(default_factory=dict)
    step: int = 0
    updates: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    norm: float | None = None
    best_score: float | None = None
    healthy_counters: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> Tensor:
        return self.learned["images"]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{part}.{name}": value for part in _PARTS for name, value in getattr(self, part).items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> DistillState:
        """The state with these `tensors` and `counters`."""
        parts: dict[str, Learned] = {part: {} for part in _PARTS}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        values: dict[str, Any] = {**parts, **counters}
        return cls(**values)

    def counters(self) -> dict[str, Any]:
        """Plain JSON types; floats come back as they were."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _PARTS}


# ------------------------------------------------------------------------- from networks to one gradient


@dataclass(frozen=True)
class NetworkGradients:
    """For each of K networks: outer loss ``[K]``, and its derivative by each part of the learned values,
    ``[K, ...]``. All entries of a ``tied`` part are one learned value: they are summed after the mean over
    networks."""

    losses: Tensor
    by: Learned
    tied: tuple[str, ...] = ()

    @property
    def norms(self) -> Tensor:
        """Norm of each network's whole derivative ``[K]`` (float64: squares overflow float32 early)."""
        squares = [part.flatten(1).double().square().sum(1) for part in self.by.values()]
        return torch.stack(squares).sum(0).sqrt()


def network_weights(spec: TrialSpec, norms: Tensor, finite: Tensor) -> Tensor:
    """How much each network's gradient counts ``[K]``: nothing if it is not finite, less if clipped.

    The sum of the weighted gradients is the mean over the finite networks that are not trimmed: of K, the
    ``trim`` K with the largest norms are. The median is over the networks with a gradient that is not zero:
    dead networks would otherwise clip the others to nothing.
    """
    limit = spec.clip_norm
    alive = norms[finite & (norms > 0)]
    counted = finite
    if spec.trim:
        most = min(int(spec.trim * len(norms)), int(finite.sum()) - 1)
        largest = torch.where(finite, norms, -1.0).argsort(descending=True, stable=True)[:most]
        counted = finite.index_fill(0, largest, False)
    if spec.clip_median is not None and len(alive):
        limit = spec.clip_median * float(alive.median())
    weights = torch.ones_like(norms) if limit is None else (limit / norms.clamp_min(1e-30)).clamp_max(1.0)
    return torch.where(counted, weights, 0.0) / int(counted.sum())


def combined(gradients: NetworkGradients, weights: Tensor, finite: Tensor) -> Learned:
    """Weighted sums over the ``finite`` networks, in the shapes of the learned values."""
    weights = weights[finite].to(gradients.by["images"])  # taken out, not multiplied: 0 * nan would be nan
    out = {name: torch.einsum("k,k...->...", weights, part[finite]) for name, part in gradients.by.items()}
    return {name: part.sum(0, keepdim=True) if name in gradients.tied else part for name, part in out.items()}


# ------------------------------------------------------------------------------------- transformations

GradientTransform = Callable[[Learned, DistillState], tuple[Learned, DistillState]]


def norm_of(gradient: Learned) -> float:
    return float(torch.stack([part.double().square().sum() for part in gradient.values()]).sum().sqrt())


@dataclass(frozen=True)
class ClipToRunningNorm:
    """Shorten a gradient that is longer than ``times`` its running norm (Feng et al. 2024)."""

    times: float

    def __call__(self, gradient: Learned, state: DistillState) -> tuple[Learned, DistillState]:
        norm = norm_of(gradient)
        running = state.norm or norm  # there is no limit without a norm, or with the 0 of dead networks
        if norm > (limit := self.times * running):
            gradient = {name: part * (limit / norm) for name, part in gradient.items()}
            norm = limit
        return gradient, replace(state, norm=RUNNING_NORM * running + (1 - RUNNING_NORM) * norm)


@dataclass(frozen=True)
class Adam:
    """Minus the step of Adam of each part: at rate ``lr``, or the part's own in ``rates``, times
    ``factor(outer step)``. With ``cutoff`` the images are stepped in their cosine transform
    (`_smooth_step`)."""

    lr: float
    factor: Callable[[int], float]
    rates: Mapping[str, float | None] = field(default_factory=dict)
    cutoff: float | None = None

    def __call__(self, gradient: Learned, state: DistillState) -> tuple[Learned, DistillState]:
        updates = state.updates + 1
        factor = self.factor(state.step) * ROLLBACK_FACTOR**state.rollbacks
        m, v, steps = dict(state.m), dict(state.v), {}
        for name, part in gradient.items():
            own = self.rates.get(name)
            lr = factor * (self.lr if own is None else own)
            if name == "images" and self.cutoff is not None:
                steps[name], m[name], v[name] = _smooth_step(part, m[name], v[name], updates, lr, self.cutoff)
            else:
                steps[name], m[name], v[name] = adam(part, m[name], v[name], updates, lr)
        return steps, replace(state, m=m, v=v, updates=updates)


def outer_transforms(spec: TrialSpec) -> Sequence[GradientTransform]:
    """The transformations of a trial's outer gradients, in this order."""
    clip = [] if spec.clip_running is None else [ClipToRunningNorm(spec.clip_running)]
    rates = {"raw": spec.outer_lr_rates, "labels": spec.outer_lr_labels}
    return [*clip, Adam(spec.outer_lr, lambda step: schedule_factor(spec, step), rates, spec.outer_cutoff)]


def updated(state: DistillState, steps: Learned, spec: TrialSpec) -> DistillState:
    """``state`` with ``steps`` added to the learned values, and with its running mean updated if it has
    one."""
    learned = {**state.learned, **{name: state.learned[name] + step for name, step in steps.items()}}
    ema = state.ema
    if spec.ema is not None:
        # A shorter memory at first, to forget noise.
        decay = min(spec.ema, (1 + state.updates) / (10 + state.updates))
        ema = {name: ema[name] + (1 - decay) * (value - ema[name]) for name, value in learned.items()}
    return replace(state, learned=learned, ema=ema, step=state.step + 1, skipped_in_a_row=0)


def schedule_factor(spec: TrialSpec, step: int) -> float:
    """The factor of the outer rates at outer step ``step``: 1, decaying in steps, or cosine to zero."""
    if spec.outer_schedule == "step":
        return float(spec.outer_decay_factor ** (step // spec.outer_decay_steps))
    if spec.outer_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / spec.outer_steps))
    return 1.0


def adam(gradient: Tensor, m: Tensor, v: Tensor, updates: int, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Step number ``updates`` of Adam, from 1 (Kingma and Ba 2015, algorithm 1): (step, m, v)."""
    m = BETAS[0] * m + (1 - BETAS[0]) * gradient
    v = BETAS[1] * v + (1 - BETAS[1]) * gradient * gradient
    scale = (v / (1 - BETAS[1] ** updates)).sqrt() + EPSILON
    return -(lr * (m / (1 - BETAS[0] ** updates)) / scale), m, v


def _smooth_step(
    gradient: Tensor, m: Tensor, v: Tensor, updates: int, lr: float, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of Adam on the cosine transform of the images, (step, m, v), shorter for high frequencies.

    The common part of the networks' gradients is smooth; noise spreads over all frequencies. Steps of Adam
    are equally long everywhere, so at frequencies with nothing but noise they would pile it up in the images.
    """
    high, wide = (cosine_basis(side).to(gradient) for side in gradient.shape[-2:])
    transformed = high @ gradient @ wide.T
    step, m, v = adam(transformed, m, v, updates, lr)
    down, across = (torch.arange(n).to(step) for n in gradient.shape[-2:])
    squares = down[:, None] ** 2 + across**2
    return high.T @ (step / (1 + squares / cutoff**2)) @ wide, m, v


# ------------------------------------------------------------------------------ what a score decides


def started(learned: Learned, spec: TrialSpec) -> DistillState:
    """The state before the first outer step."""
    zeros = {name: torch.zeros_like(value) for name, value in learned.items()}
    state = DistillState(learned, zeros, zeros, ema=learned if spec.ema is not None else {})
    return _healthy(state) if spec.max_rollbacks else state


def averaged(state: DistillState) -> Learned:
    """The values of a state that are scored: the running mean if there is one."""
    return state.ema or state.learned


def final(state: DistillState) -> Learned:
    """The result of a finished distillation: the best by ``val_score`` if it was kept, else the last."""
    return state.best or averaged(state)


def scored(state: DistillState, spec: TrialSpec, score: float) -> DistillState:
    """``state`` after its ``val_score``: it may be the best so far. It is healthy: an unhealthy one would
    have been rolled back before it was scored."""
    if spec.keep == "best" and (state.best_score is None or score > state.best_score):
        state = replace(state, best=averaged(state), best_score=score)
    return _healthy(state) if spec.max_rollbacks else state


def _healthy(state: DistillState) -> DistillState:
    """``state`` as one that `rolled_back` comes back to."""
    own = replace(state, best={}, healthy={}, healthy_counters={})
    return replace(state, healthy=own.tensors(), healthy_counters=own.counters())


def rolled_back(state: DistillState, spec: TrialSpec) -> DistillState | None:
    """The last healthy state (the start, if none was scored), to go on from at a smaller outer rate; None if
    too many rollbacks were made already. The best so far stays."""
    if state.rollbacks >= spec.max_rollbacks:
        return None
    healthy = DistillState.of(state.healthy, state.healthy_counters)
    return replace(
        healthy,
        best=state.best,
        best_score=state.best_score,
        healthy=state.healthy,
        healthy_counters=state.healthy_counters,
        rollbacks=state.rollbacks + 1,
    )
