"""Outer optimisation, shared by all methods: from the gradients of networks to the next state.

All functions of a step take several trials at once, each with its own settings. Elementwise work is one
operation on the values of all trials (``torch._foreach_*``: a few kernels on a GPU, and on the CPU the bits
of one value after another). Sums are taken trial by trial, because their order depends on the number of sums
in an operation, and a trial must not depend on its companions. Nothing here waits for the device: no value
is read, and no choice depends on one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ddsweep.catalog import TrialSpec
from ddsweep.core.images import cosine_basis
from ddsweep.core.task import Learned

__all__ = [
    "DistillState",
    "NetworkGradients",
    "adam",
    "averaged",
    "clipped_to_running",
    "combined",
    "final",
    "network_weights",
    "norms_of",
    "norms_of_networks",
    "rolled_back",
    "running_norm",
    "schedule_factor",
    "scored",
    "started",
    "stepped",
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
    ``[K, ...]``."""

    losses: Tensor
    by: Learned

    def of(self, networks: Sequence[int]) -> NetworkGradients:
        """Those of some of the networks."""

        def taken(values: Tensor) -> Tensor:
            return torch.stack([values[k] for k in networks])

        by = {name: taken(part) for name, part in self.by.items()}
        return NetworkGradients(taken(self.losses), by)


def norms_of_networks(gradients: Sequence[NetworkGradients]) -> list[Tensor]:
    """For each trial, the norm of each network's whole derivative ``[K]`` (float64: squares overflow float32
    early)."""
    squares = iter(_squares([part.flatten(1) for own in gradients for part in own.by.values()]))
    return _roots([[next(squares).sum(1) for _ in own.by] for own in gradients])


def norms_of(gradients: Sequence[Learned]) -> list[Tensor]:
    """For each trial, the norm of its gradient, a float64 scalar."""
    squares = iter(_squares([part for own in gradients for part in own.values()]))
    return _roots([[next(squares).sum() for _ in own] for own in gradients])


def _squares(parts: list[Tensor]) -> list[Tensor]:
    """In float64."""
    wide = [torch.empty_like(part, dtype=torch.float64) for part in parts]
    torch._foreach_copy_(wide, parts)
    torch._foreach_mul_(wide, wide)
    return wide


def _roots(squares: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For each trial, the root of the sum of the squares of its parts."""
    sums = [own[0] for own in squares]
    for place in range(1, max(len(own) for own in squares)):
        having = [i for i, own in enumerate(squares) if len(own) > place]
        added = torch._foreach_add([sums[i] for i in having], [squares[i][place] for i in having])
        for i, value in zip(having, added, strict=True):
            sums[i] = value
    return list(torch._foreach_sqrt(sums))


def network_weights(
    specs: Sequence[TrialSpec], norms: Sequence[Tensor], drawn: Sequence[int]
) -> list[Tensor]:
    """For each trial, how much the gradient of each of its finite networks counts, float64 ``[K]``: less if
    it is clipped, and nothing if it is trimmed. ``drawn`` are the numbers of networks of the step, with
    those that are not finite.

    The sum of the weighted gradients is the mean over the networks that are not trimmed: of all drawn, the
    ``trim`` part with the largest norms are. The median of ``clip_median`` is over the networks with a
    gradient that is not zero: dead networks would otherwise clip the others to nothing.
    """
    inverse = list(torch._foreach_reciprocal(torch._foreach_clamp_min(list(norms), 1e-30)))
    limits, counted = [], []
    for i, (spec, own) in enumerate(zip(specs, norms, strict=True)):
        if spec.clip_median is not None:
            inverse[i] = inverse[i] * (spec.clip_median * _median_of_alive(own))
        limited = spec.clip_norm if spec.clip_median is None else 1.0
        limits.append(math.inf if limited is None else limited)
        counted.append(len(own) - min(int(spec.trim * drawn[i]), len(own) - 1))
    torch._foreach_mul_(inverse, limits)
    torch._foreach_clamp_max_(inverse, 1.0)
    for weights, own, count in zip(inverse, norms, counted, strict=True):
        if count < len(own):
            weights.index_fill_(0, own.argsort(descending=True, stable=True)[: len(own) - count], 0.0)
    torch._foreach_div_(inverse, [float(count) for count in counted])
    return inverse


def _median_of_alive(norms: Tensor) -> Tensor:
    """The median of those above 0, the lower of two, as a scalar; infinite if there are none."""
    alive = norms > 0
    ordered = torch.where(alive, norms, math.inf).sort().values
    return ordered.gather(0, ((alive.sum() - 1) // 2).clamp_min(0).view(1))[0]


def combined(gradients: NetworkGradients, weights: Tensor) -> Learned:
    """Weighted sums over the networks, in the shapes of the learned values."""
    weights = weights.to(gradients.by["images"])
    return {name: torch.einsum("k,k...->...", weights, part) for name, part in gradients.by.items()}


# --------------------------------------------------------------------------------- from a gradient to a step


def clipped_to_running(gradient: Learned, norm: Tensor, times: float, running: float | None) -> Learned:
    """``gradient``, shortened if its ``norm`` is more than ``times`` its running norm (Feng et al. 2024).
    There is no limit without a running norm, or with the 0 of dead networks: then it is ``norm``."""
    limit = torch.full_like(norm, running) * times if running else norm * times
    factor = torch.where(norm > limit, limit / norm, 1.0)
    return {name: part * factor.to(part) for name, part in gradient.items()}


def running_norm(norm: float, times: float, running: float | None) -> float:
    """The running norm after a gradient whose norm was ``norm`` before `clipped_to_running`."""
    running = running or norm
    limit = times * running
    return RUNNING_NORM * running + (1 - RUNNING_NORM) * (limit if norm > limit else norm)


def stepped(
    specs: Sequence[TrialSpec], states: Sequence[DistillState], gradients: Sequence[Learned]
) -> list[DistillState]:
    """The state of each trial after minus the step of Adam along its gradient, and with its running mean
    updated if it has one.

    The rate is ``outer_lr``, or the part's own, times the factors of schedule and rollbacks. With
    ``outer_cutoff`` the images are stepped in their cosine transform: see `_low_pass`.
    """
    states = [replace(state, updates=state.updates + 1) for state in states]
    whose = [(i, name) for i, gradient in enumerate(gradients) for name in gradient]
    bases = {
        i: _bases(gradients[i]["images"], spec.outer_cutoff)
        for i, spec in enumerate(specs)
        if spec.outer_cutoff is not None
    }
    parts = [gradients[i][name] for i, name in whose]
    smooth = {place: bases[i] for place, (i, name) in enumerate(whose) if name == "images" and i in bases}
    for place, (high, wide, _) in smooth.items():
        parts[place] = high @ parts[place] @ wide.T
    steps, m, v = adam(
        parts,
        [states[i].m[name] for i, name in whose],
        [states[i].v[name] for i, name in whose],
        [states[i].updates for i, _ in whose],
        [_rate(specs[i], states[i], name) for i, name in whose],
    )
    for place, (high, wide, damping) in smooth.items():
        steps[place] = high.T @ (steps[place] / damping) @ wide
    values = torch._foreach_add([states[i].learned[name] for i, name in whose], steps)
    changed = [(dict(state.learned), dict(state.m), dict(state.v)) for state in states]
    for place, (i, name) in enumerate(whose):
        for mapping, found in zip(changed[i], (values, m, v), strict=True):
            mapping[name] = found[place]
    after = [
        replace(state, learned=learned, m=m, v=v, step=state.step + 1, skipped_in_a_row=0)
        for state, (learned, m, v) in zip(states, changed, strict=True)
    ]
    return _with_running_mean(specs, after)


def _rate(spec: TrialSpec, state: DistillState, name: str) -> float:
    own = {"raw": spec.outer_lr_rates, "labels": spec.outer_lr_labels}.get(name)
    factor = schedule_factor(spec, state.step) * ROLLBACK_FACTOR**state.rollbacks
    return factor * (spec.outer_lr if own is None else own)


def _with_running_mean(specs: Sequence[TrialSpec], states: Sequence[DistillState]) -> list[DistillState]:
    whose = [
        (i, name)
        for i, (spec, state) in enumerate(zip(specs, states, strict=True))
        if spec.ema is not None
        for name in state.learned
    ]
    if not whose:
        return list(states)
    shares = []
    for i, _ in whose:
        spec, updates = specs[i], states[i].updates
        assert spec.ema is not None
        shares.append(1 - min(spec.ema, (1 + updates) / (10 + updates)))  # a shorter memory at first
    before = [states[i].ema[name] for i, name in whose]
    way = list(torch._foreach_sub([states[i].learned[name] for i, name in whose], before))
    torch._foreach_mul_(way, shares)
    after = torch._foreach_add(before, way)
    means: dict[int, Learned] = {}
    for (i, name), value in zip(whose, after, strict=True):
        means.setdefault(i, {})[name] = value
    return [replace(state, ema=means.get(i, state.ema)) for i, state in enumerate(states)]


def schedule_factor(spec: TrialSpec, step: int) -> float:
    """The factor of the outer rates at outer step ``step``: 1, decaying in steps, or cosine to zero."""
    if spec.outer_schedule == "step":
        return float(spec.outer_decay_factor ** (step // spec.outer_decay_steps))
    if spec.outer_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / spec.outer_steps))
    return 1.0


def adam(
    gradients: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    updates: Sequence[int],
    rates: Sequence[float],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Steps of Adam of several values, with their own numbers (from 1) and rates (Kingma and Ba 2015,
    algorithm 1): (steps, m, v)."""
    gradients = list(gradients)
    means = list(torch._foreach_mul(list(m), BETAS[0]))
    torch._foreach_add_(means, torch._foreach_mul(gradients, 1 - BETAS[0]))
    squares = torch._foreach_mul(gradients, 1 - BETAS[1])
    torch._foreach_mul_(squares, gradients)
    spreads = list(torch._foreach_mul(list(v), BETAS[1]))
    torch._foreach_add_(spreads, squares)
    scale = torch._foreach_div(spreads, [1 - BETAS[1] ** number for number in updates])
    torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, EPSILON)
    steps = list(torch._foreach_div(means, [1 - BETAS[0] ** number for number in updates]))
    torch._foreach_mul_(steps, list(rates))
    torch._foreach_div_(steps, scale)
    torch._foreach_neg_(steps)
    return steps, means, spreads


def _bases(images: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    height, width = images.shape[-2:]
    return _low_pass(height, width, cutoff, images.dtype, images.device)


@lru_cache(maxsize=64)
def _low_pass(
    height: int, width: int, cutoff: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The cosine transforms of columns and rows, and the divisors ``[height, width]`` that make steps shorter
    for high frequencies. Kept: a GPU would be waited for at each copy.

    The common part of the networks' gradients is smooth; noise spreads over all frequencies. Steps of Adam
    are equally long everywhere, so at frequencies with nothing but noise they would pile it up in the images.
    """
    with torch.inference_mode(False):  # whoever asks first
        high, wide = (cosine_basis(side).to(device, dtype) for side in (height, width))
        down, across = (torch.arange(side).to(device, dtype) for side in (height, width))
        return high, wide, 1 + (down[:, None] ** 2 + across**2) / cutoff**2


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
    """``state`` after its ``val_score``: it may be the best so far. It is healthy, unless no network of its
    last outer step was finite: from there the next steps may fail as well."""
    if spec.keep == "best" and (state.best_score is None or score > state.best_score):
        state = replace(state, best=averaged(state), best_score=score)
    return _healthy(state) if spec.max_rollbacks and state.skipped_in_a_row == 0 else state


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
