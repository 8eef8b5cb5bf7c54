"""Distillation: outer Adam steps over synthetic images and raw rates (Wang et al. 2018, algorithm 1).

State in, state out. Outer step s draws its networks and its real batch from seeds that are a function
of (trial, role, s) alone, so a state and its step number are all that is needed to go on bit for bit.

What is learned are images, raw rates and, with ``labels: soft``, label probabilities. Beside the state
of Adam a `DistillState` may carry their running mean (``ema``), the best of them so far by ``val_score``
(``keep: best``), and the last healthy state as a whole, to which a trial that explodes is rolled back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import TrialSpec, augmentation_parts
from ddsweep.core.augment import draw_augmentation
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import class_labels, cosine_basis, normalise, sample_per_class
from ddsweep.core.init import draw_networks
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.networks import Params, build_network, stack_networks
from ddsweep.core.objective import rewritten
from ddsweep.core.order import Course, draw_course
from ddsweep.core.precision import stored_dtype
from ddsweep.core.unroll import InnerLoop, OuterGradient, Window, outer_gradient, raw_rates
from ddsweep.errors import DivergedError
from ddsweep.seeds import derive_seed

__all__ = [
    "DistillState",
    "Learned",
    "Pool",
    "Problem",
    "StepReport",
    "adam",
    "evaluation_loop",
    "initial_state",
    "judged",
    "labels_of",
    "outer_step",
    "presented",
    "rates_of",
    "result",
    "rolled_back",
    "schedule_factor",
    "selection_seeds",
]

BETAS, EPSILON = (0.5, 0.999), 1e-8
"""Outer Adam as in Wang et al. 2018."""

MAX_SKIPPED_IN_A_ROW = 10
"""Outer steps without one finite network after which even ``on_nonfinite: skip`` gives up."""

RUNNING_NORM = 0.9
"""Decay of the running norm that ``clip_running`` is relative to (Feng et al. 2024)."""

ROLLBACK_FACTOR = 0.5
"""What the outer rate is multiplied with at every rollback."""

Learned = dict[str, Tensor]
"""``images [S, n, c, h, w]``, ``raw`` rates ``[T]`` (``[1]`` if shared) and, if soft, ``labels``
``[S, n, classes]``."""


Pool = Callable[[Sequence[int]], list[Params]]
"""Training networks of a pool, each ``name -> [...]``, by their numbers."""


@dataclass(frozen=True)
class Problem:
    """What stays the same during one distillation, on its device: settings, data, labels and plan.

    ``real_images [N, c, h, w]`` uint8 and ``real_labels [N]`` int64 are the training part. ``pool`` gives
    training networks of the trial's pool by their numbers. ``known`` holds the networks of a ``fixed`` trial,
    which are the same in every step, once they were drawn.
    """

    spec: TrialSpec
    plan: ExecutionPlan
    network: nn.Module
    real_images: Tensor
    real_labels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: Pool | None = None
    known: dict[tuple[int, ...], Params] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        spec: TrialSpec,
        plan: ExecutionPlan,
        train_images: Tensor,
        train_labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pool: Pool | None = None,
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
            pool=pool,
        )

    @property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.spec.dtype)

    def networks(self, seeds: Sequence[int]) -> Params:
        """Fresh networks ``[K, ...]`` of the trial's law, one for each seed; or, with a pool, its training
        networks of these numbers."""
        if self.spec.init != "fixed":
            return self._drawn(seeds)
        if tuple(seeds) not in self.known:
            self.known[tuple(seeds)] = self._drawn(seeds)
        return self.known[tuple(seeds)]

    def _drawn(self, seeds: Sequence[int]) -> Params:
        spec, device = self.spec, torch.device(self.plan.device)
        if self.pool is not None:
            stacked = stack_networks(self.pool(seeds))
            return {name: value.to(device, self.dtype) for name, value in stacked.items()}
        return draw_networks(
            self.network, spec.init_law, spec.init_param, seeds, device=device, dtype=self.dtype
        )


_PARTS = ("learned", "m", "v", "ema", "best", "healthy")


@dataclass(frozen=True)
class DistillState:
    """Everything that changes: what is learned with its moments of Adam; the running mean, the best so
    far and the last healthy state, each empty if not asked for; and counters. Of those, ``step`` counts
    outer steps and ``updates`` the ones that changed something; ``norm`` is the running gradient norm."""

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

    @property
    def raw(self) -> Tensor:
        return self.learned["raw"]

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


def initial_state(problem: Problem, start: Tensor | None = None) -> DistillState:
    """Images from N(0, 1) in normalised pixel space, or real ones, or ``start [S, n, c, h, w]`` where the
    caller has made them, centred and scaled as asked for; all rates at ``inner_lr``; labels, if learned,
    at the classes themselves."""
    spec = problem.spec
    c, h, w = spec.dataset.shape
    generator = torch.Generator().manual_seed(derive_seed("image_init", spec.trial_id))
    if start is not None:
        images = start.to(problem.dtype)
    elif spec.image_init == "real":
        m, classes = spec.images_per_class_per_step, spec.dataset.classes
        picks = sample_per_class(problem.real_labels.cpu(), classes, spec.images_per_class, generator)
        picks = picks.view(classes, spec.inner_steps, m).transpose(0, 1).reshape(-1)
        images = normalise(problem.real_images.cpu()[picks], problem.mean, problem.std, problem.dtype)
    else:
        images = torch.randn(problem.labels.numel(), c, h, w, generator=generator).to(problem.dtype)
    if spec.image_centre:
        images = images - images.flatten(0, -4).mean(0)
    images = (images * spec.image_scale).reshape(*problem.labels.shape, c, h, w).to(problem.plan.device)
    learned = {
        "images": images,
        "raw": raw_rates(spec.inner_lr, 1 if spec.inner_lr_mode == "shared" else spec.steps).to(images),
    }
    if spec.labels == "soft":
        learned["labels"] = F.one_hot(problem.labels, spec.dataset.classes).to(images)
    zeros = {name: torch.zeros_like(value) for name, value in learned.items()}
    state = DistillState(learned, zeros, zeros, ema=learned if spec.ema is not None else {})
    return _healthy(state) if spec.max_rollbacks else state


def rates_of(learned: Learned, spec: TrialSpec) -> Tensor:
    """The rates ``[T]``, softplus of the raw ones."""
    return F.softplus(learned["raw"]).expand(spec.steps)


def labels_of(learned: Learned, problem: Problem) -> Tensor:
    """Learned probabilities ``[S, n, classes]``, or the classes ``[S, n]``."""
    return learned.get("labels", problem.labels)


def presented(state: DistillState) -> Learned:
    """What a state stands for when it is judged: the running mean if there is one."""
    return state.ema or state.learned


def result(state: DistillState) -> Learned:
    """What a finished distillation hands over: the best by ``val_score`` if it was kept, else the last."""
    return state.best or presented(state)


def judged(state: DistillState, spec: TrialSpec, score: float) -> DistillState:
    """``state`` with its ``val_score`` taken into account: perhaps the best so far, and healthy, since a
    state that was not would have been rolled back before it was judged."""
    if spec.keep == "best" and (state.best_score is None or score > state.best_score):
        state = replace(state, best=presented(state), best_score=score)
    return _healthy(state) if spec.max_rollbacks else state


def _healthy(state: DistillState) -> DistillState:
    """``state`` as one that `rolled_back` comes back to."""
    own = replace(state, best={}, healthy={}, healthy_counters={})
    return replace(state, healthy=own.tensors(), healthy_counters=own.counters())


def rolled_back(state: DistillState, spec: TrialSpec) -> DistillState | None:
    """The last healthy state (the start, if none was judged), to go on from at a smaller outer rate; None if
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


def schedule_factor(spec: TrialSpec, step: int) -> float:
    """Factor on the outer rates at outer step ``step``: 1, ever smaller in steps, or cosine to zero."""
    if spec.outer_schedule == "step":
        return float(spec.outer_decay_factor ** (step // spec.outer_decay_steps))
    if spec.outer_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / spec.outer_steps))
    return 1.0


def adam(
    value: Tensor, gradient: Tensor, m: Tensor, v: Tensor, updates: int, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam update (Kingma and Ba 2015, algorithm 1), the ``updates``-th from 1: (value, m, v)."""
    m = BETAS[0] * m + (1 - BETAS[0]) * gradient
    v = BETAS[1] * v + (1 - BETAS[1]) * gradient * gradient
    scale = (v / (1 - BETAS[1] ** updates)).sqrt() + EPSILON
    return value - lr * (m / (1 - BETAS[0] ** updates)) / scale, m, v


def evaluation_loop(spec: TrialSpec, role: str, indices: Sequence[int], total: int) -> InnerLoop:
    """How networks ``indices`` of a role (``heldout``, ``selection``) are trained on the finished set for
    ``total`` steps: as in distillation, each in an order of its own, without augmentation."""
    optimizer = InnerOptimizer(spec.inner_optimizer, spec.inner_momentum)
    if spec.order == "fixed":
        return InnerLoop(optimizer)
    seeds = [derive_seed("heldout_order", spec.trial_id, role, i) for i in indices]
    return InnerLoop(optimizer, _course(spec, seeds, total))


def _course(spec: TrialSpec, seeds: Sequence[int], total: int) -> Course:
    sizes = (spec.inner_steps, spec.dataset.classes, spec.images_per_class_per_step, spec.steps)
    return draw_course(spec.order, *sizes, seeds, total)


def _inner_loop(problem: Problem, step: int) -> InnerLoop:
    """How the networks of outer step ``step`` are trained."""
    spec = problem.spec
    optimizer = InnerOptimizer(spec.inner_optimizer, spec.inner_momentum)
    seeds = [derive_seed("order", spec.trial_id, step, k) for k in range(spec.models_per_step)]
    course = None if spec.order == "fixed" else _course(spec, seeds, spec.steps)
    parts = augmentation_parts("inner_augment", spec.inner_augment, spec.dataset.name)
    if not parts:
        return InnerLoop(optimizer, course)
    generator = torch.Generator().manual_seed(derive_seed("augment", spec.trial_id, "inner", step))
    count, side = problem.labels.shape[1], spec.dataset.shape[1]
    draws = [draw_augmentation(parts, count, side, generator) for _ in range(spec.steps)]
    return InnerLoop(optimizer, course, lambda images, t: draws[t](images))


def _window(spec: TrialSpec, step: int) -> Window | None:
    """Where the window of outer step ``step`` lies: anywhere in the T steps, with equal chance."""
    if spec.window is None:
        return None
    generator = torch.Generator().manual_seed(derive_seed("window", spec.trial_id, step))
    start = int(torch.randint(spec.steps - spec.window + 1, (), generator=generator))
    return Window(start, start + spec.window)


def selection_seeds(spec: TrialSpec) -> list[int]:
    """What names the networks of validation scores: of a law, ones of their own; of a pool, its first
    training networks; the known network of ``fixed``."""
    if spec.init == "fixed":
        return [known_seed(spec)]
    if spec.pool is not None:
        return list(range(min(spec.selection_networks, spec.pool.train)))
    law = (spec.network, spec.init_law, spec.init_param)
    return [derive_seed("selection", *law, i) for i in range(spec.selection_networks)]


def network_seeds(spec: TrialSpec, step: int) -> list[int]:
    """What names the networks of one outer step: seeds of fresh ones, numbers in their pool (drawn without
    replacement), or the one known network of ``fixed``."""
    if spec.init == "fixed":
        return [known_seed(spec)]
    if spec.pool is not None:
        generator = torch.Generator().manual_seed(derive_seed("pool_draw", spec.trial_id, step))
        return torch.randperm(spec.pool.train, generator=generator)[: spec.models_per_step].tolist()
    return [derive_seed("outer", spec.trial_id, step, k) for k in range(spec.models_per_step)]


def known_seed(spec: TrialSpec) -> int:
    """The known initial network of a ``fixed`` trial: number ``seed`` of its law, or of its pool."""
    if spec.pool is not None:
        return spec.seed
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
    images = normalise(problem.real_images[picks], problem.mean, problem.std, problem.dtype)
    parts = augmentation_parts("outer_augment", spec.outer_augment, spec.dataset.name)
    if parts:
        own = torch.Generator().manual_seed(derive_seed("augment", spec.trial_id, "outer", step))
        images = draw_augmentation(parts, size, spec.dataset.shape[1], own)(images)
    return images, problem.real_labels[picks]


def _weights_of_networks(spec: TrialSpec, norms: Tensor, finite: Tensor) -> Tensor:
    """How much each network's gradient counts ``[K]``: nothing if it is not finite, less if clipped.

    The sum of the weighted gradients is the mean over the finite networks that are not trimmed: of K, the
    ``trim`` K with the largest norms are. The median is over those that have a gradient at all: dead
    networks would otherwise clip the living ones to nothing.
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


def outer_step(problem: Problem, state: DistillState) -> tuple[DistillState, StepReport]:
    """One outer step: unroll ``models_per_step`` networks, average their gradients, one Adam update.

    A network whose loss or gradient is not finite is left out of the mean (``on_nonfinite: skip``).
    Raises `DivergedError` under ``stop``, when for ten steps in a row no network was finite, or (with
    ``max_rollbacks``) when a rate has grown beyond ``rate_limit``.
    """
    spec, learned = problem.spec, state.learned
    networks = problem.networks(network_seeds(spec, state.step))
    real_images, real_labels = _real_batch(problem, state.step)
    real_labels = rewritten(real_labels, spec.attack_class, spec.target_class)
    gradient = outer_gradient(
        problem.network,
        networks,
        state.images,
        labels_of(learned, problem),
        state.raw.expand(spec.steps),
        real_images,
        real_labels,
        problem.plan,
        loop=_inner_loop(problem, state.step),
        window=_window(spec, state.step),
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
    mean_lr = float(rates_of(learned, spec).mean())
    if n_skipped == len(finite):
        in_a_row = state.skipped_in_a_row + 1
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"outer step {state.step}: no network was finite for {in_a_row} steps in a row (mean inner "
                f"rate {mean_lr:.3g}; a smaller inner_lr, or clip_norm, avoids it)"
            )
        report = StepReport(None, None, mean_lr, n_skipped, gradient.losses, norms)
        return replace(state, step=state.step + 1, skipped_in_a_row=in_a_row), report
    combined = _combine(gradient, _weights_of_networks(spec, norms, finite), finite, spec)
    state, norm = _clip_to_running_norm(state, combined, spec)
    report = StepReport(
        loss=float(gradient.losses[finite].mean()),
        grad_norm=norm,
        inner_lr_mean=mean_lr,
        n_skipped=n_skipped,
        losses=gradient.losses,
        norms=norms,
    )
    state = _updated(state, combined, spec)
    largest = float(rates_of(state.learned, spec).max())
    if spec.max_rollbacks and not largest <= spec.rate_limit:
        raise DivergedError(
            f"outer step {state.step - 1}: an inner rate has grown to {largest:.3g}, beyond rate_limit "
            f"{spec.rate_limit:g} (a smaller outer_lr, or clipping, avoids it)"
        )
    return state, report


def _updated(state: DistillState, gradient: Learned, spec: TrialSpec) -> DistillState:
    """``state`` after one Adam update of all that is learned, and of its running mean."""
    updates, factor = state.updates + 1, schedule_factor(spec, state.step) * ROLLBACK_FACTOR**state.rollbacks
    learned, m, v = dict(state.learned), dict(state.m), dict(state.v)
    for name, part in gradient.items():
        if name == "raw" and spec.inner_lr_mode == "fixed":
            continue
        own = {"raw": spec.outer_lr_rates, "labels": spec.outer_lr_labels}.get(name)
        lr = factor * (spec.outer_lr if own is None else own)
        if name == "images" and spec.outer_cutoff is not None:
            step, m[name], v[name] = _smooth_step(part, m[name], v[name], updates, lr, spec.outer_cutoff)
            learned[name] = learned[name] + step
        else:
            learned[name], m[name], v[name] = adam(learned[name], part, m[name], v[name], updates, lr)
    ema = state.ema
    if spec.ema is not None:
        decay = min(spec.ema, (1 + updates) / (10 + updates))  # shorter at first: noise should be forgotten
        ema = {name: ema[name] + (1 - decay) * (value - ema[name]) for name, value in learned.items()}
    return replace(
        state,
        learned=learned,
        m=m,
        v=v,
        ema=ema,
        step=state.step + 1,
        updates=updates,
        skipped_in_a_row=0,
    )


def _smooth_step(
    gradient: Tensor, m: Tensor, v: Tensor, updates: int, lr: float, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of Adam on the cosine transform of the images, (step, m, v), shorter for high frequencies.

    What networks have in common in their gradients is smooth; what they have not spreads over all
    frequencies, and where there is nothing but noise the steps of Adam, as long there as anywhere, would
    pile it up in the images.
    """
    high, wide = (cosine_basis(side).to(gradient) for side in gradient.shape[-2:])
    transformed = high @ gradient @ wide.T
    step, m, v = adam(torch.zeros_like(gradient), transformed, m, v, updates, lr)
    down, across = (torch.arange(n).to(step) for n in gradient.shape[-2:])
    squares = down[:, None] ** 2 + across**2
    return high.T @ (step / (1 + squares / cutoff**2)) @ wide, m, v


def _clip_to_running_norm(
    state: DistillState, gradient: Learned, spec: TrialSpec
) -> tuple[DistillState, float]:
    """The norm of the gradient, which is first made shorter in place, with ``clip_running``, if it is longer
    than that many times its running norm."""
    norm = float(torch.stack([part.double().square().sum() for part in gradient.values()]).sum().sqrt())
    if spec.clip_running is None:
        return state, norm
    running = state.norm or norm  # no limit is relative to nothing, or to the 0 of dead networks
    if norm > (limit := spec.clip_running * running):
        for part in gradient.values():
            part.mul_(limit / norm)
        norm = limit
    return replace(state, norm=RUNNING_NORM * running + (1 - RUNNING_NORM) * norm), norm


def _combine(gradient: OuterGradient, weights: Tensor, finite: Tensor, spec: TrialSpec) -> Learned:
    """Weighted sums over networks, of the shapes of what is learned."""
    weights = weights[finite].to(gradient.images)  # taken out, not multiplied: 0 * nan would be nan
    raw = torch.einsum("k,kt->t", weights, gradient.raw_rates[finite])
    out = {
        "images": torch.einsum("k,k...->...", weights, gradient.images[finite]),
        "raw": raw.sum(0, keepdim=True) if spec.inner_lr_mode == "shared" else raw,
    }
    if gradient.labels is not None:
        out["labels"] = torch.einsum("k,k...->...", weights, gradient.labels[finite])
    return out
