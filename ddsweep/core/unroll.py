"""Gradient descent on the distilled images, and the exact derivative of what comes out of it.

Equations (2) and (4) of Wang et al. 2018, with epochs: for t = 0 .. T-1, T = S*E, batch s = t mod S,

    w[t+1] = w[t] - lr[t] * g[t],        g[t] = d/dw loss(w[t]; images[s], labels[s]),

or another inner optimiser (`ddsweep.core.inner`) or order of batches (`ddsweep.core.order`). The outer
loss L is a function of w[T]. Its derivative is accumulated backwards, step by step: a derivative by
w[t+1] (and by the optimiser's state) becomes one by lr[t], by g[t] and by w[t]; and one by g[t], call
it a, becomes the derivative of <g[t], a> by w[t], images[s] and labels[s].

Memory: ``store`` keeps what each step needs for that; ``recompute`` keeps the weights of every
``segment``-th step and takes the steps of a segment again. With a window only its steps are gone back
through: the ones before it start the networks somewhere on their way (Feng et al. 2024, RaT-BPTT).

Axes: K networks, S inner steps, n images a step, T = S*E. Every derivative has a leading K: networks do
not mix, so one that diverges spoils no other. Rates are softplus(raw).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.core.derivatives import Derivatives, derivatives_of, no_bookkeeping
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.graphs import replayed
from ddsweep.core.images import LabelledImages
from ddsweep.core.inner import InnerOptimizer, Rate, Slots
from ddsweep.core.layers import Params
from ddsweep.core.order import BatchOrder, fixed_batch_order
from ddsweep.core.own_network import parts, rest_after, rest_at
from ddsweep.core.precision import products
from ddsweep.core.steps import LossAndGradient, Steps, StepVjp, loss_and_gradient_of, steps_of
from ddsweep.core.teams import in_teams

__all__ = [
    "InnerLoop",
    "OuterGradient",
    "TrainState",
    "Window",
    "loss_and_gradient",
    "outer_gradient",
    "raw_rates",
    "train_networks",
]

RECORDED_STEPS = 50
"""Inner steps without a way back that are recorded as one graph."""

Augment = Callable[[Tensor, int], Tensor]
"""A linear map of images ``[..., n, c, h, w]`` that is the same for all networks; the int is the step."""


@dataclass(frozen=True)
class Window:
    """Inner steps ``start <= t < stop`` are gone back through; the outer loss is that after ``stop``."""

    start: int
    stop: int


@dataclass(frozen=True)
class InnerLoop:
    """How networks are trained on distilled images: plain gradient descent in fixed order by default."""

    optimizer: InnerOptimizer = field(default_factory=InnerOptimizer)
    batch_order: BatchOrder | None = None
    augment: Augment | None = None


@dataclass(frozen=True)
class OuterGradient:
    """Of each network: outer loss ``[K]``, its derivative by images ``[K, S, n, c, h, w]``, by raw rates
    ``[K, T]`` and, if they are learned, by soft labels ``[K, S, n, classes]``."""

    losses: Tensor
    images: Tensor
    raw_rates: Tensor
    labels: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """Norm of each network's whole derivative ``[K]`` (float64: squares overflow float32 early)."""
        parts = [self.images, self.raw_rates, *([] if self.labels is None else [self.labels])]
        return torch.stack([part.flatten(1).double().square().sum(1) for part in parts]).sum(0).sqrt()


@dataclass(frozen=True)
class TrainState:
    """Where K networks are in their training: weights ``[K, ...]``, the optimiser's slots, the number of
    steps taken, and what else the networks hold (`ddsweep.core.own_network`)."""

    weights: Params
    slots: Slots
    step: int = 0
    rest: Params = field(default_factory=dict)

    @classmethod
    def start(cls, network: nn.Module, params: Params, optimizer: InnerOptimizer) -> TrainState:
        """Before the first step."""
        weights, rest = parts(network, params)
        return cls(weights, optimizer.start(weights), 0, rest)

    @property
    def params(self) -> Params:
        """All that the networks are."""
        return {**self.weights, **self.rest}


@dataclass
class _Step:
    """A step taken, with what going back through it needs."""

    before: TrainState
    kept: Any


def raw_rates(rate: float, steps: int) -> Tensor:
    """Raw rates ``[T]`` (float64) with softplus(raw) = ``rate``."""
    value = torch.tensor(rate, dtype=torch.float64)
    return (value + torch.log(-torch.expm1(-value))).repeat(steps)


class _Batches:
    """The distilled images and labels of each inner step, and the way back from a step's derivatives."""

    def __init__(self, distilled: LabelledImages, loop: InnerLoop, batch_order: BatchOrder) -> None:
        self.own = distilled.images.dim() == 6
        first = 1 if self.own else 0
        self.images = images = distilled.images.detach().flatten(first, first + 1)
        self.labels = distilled.labels.detach().flatten(0, 1)
        self.shared, self.augment = batch_order.shared, loop.augment
        self._picks, self._rates = batch_order.batches.to(images.device), batch_order.rates.to(images.device)

    def at(self, t: int) -> tuple[Tensor, Tensor]:
        """Images ``[n, ...]`` (or ``[K, n, ...]``) and targets of step ``t``."""
        picks = self._picks[t]
        picks = picks[0] if self.shared else picks
        if not self.own:
            images = self.images[picks]
        elif self.shared:
            images = self.images[:, picks]
        else:
            images = self.images[torch.arange(len(picks), device=picks.device)[:, None], picks]
        return images if self.augment is None else self.augment(images, t), self.labels[picks]

    def rate_of(self, t: int) -> Tensor:
        """Which rate step ``t`` has: int64 ``[1]`` or ``[K]``, on the device of the images."""
        return self._rates[t]

    def add_to(self, total: Tensor, part: Tensor, t: int) -> None:
        """Add the derivatives ``part [K, n, ...]`` of step ``t`` to ``total [K, S*n, ...]``."""
        count, size = total.shape[:2]
        offsets = torch.arange(count, device=total.device)[:, None] * size
        index = (self._picks[t] + offsets).flatten()
        total.view(count * size, *total.shape[2:]).index_add_(0, index, part.flatten(0, 1).to(total))

    def back_through_augment(self, part: Tensor, t: int) -> Tensor:
        """Derivatives by the images of step ``t`` from those by what they were made into."""
        if self.augment is None:
            return part
        with torch.enable_grad():
            leaf = torch.zeros_like(part).requires_grad_()
            made = self.augment(leaf, t)
        return torch.autograd.grad(made, leaf, part)[0]


def train_networks(
    network: nn.Module,
    state: TrainState,
    distilled: LabelledImages,
    rates: Sequence[Rate],
    batching: str,
    loop: InnerLoop,
    *,
    graph: bool = False,
) -> TrainState:
    """``state`` after one step per entry of ``rates``.

    ``distilled`` has images ``[S, n, c, h, w]`` (or ``[K, S, n, c, h, w]``, a set for each network) with
    labels ``[S, n]`` (or probabilities ``[S, n, classes]``). In fixed order step t uses batch t mod S. With
    ``graph`` a GPU replays recordings of up to `RECORDED_STEPS` steps.
    """
    if loop.batch_order is None:
        inner_steps, batch = distilled.labels.shape[:2]
        loop = replace(loop, batch_order=fixed_batch_order(inner_steps, batch, state.step + len(rates)))
    if graph:
        for first in range(0, len(rates), RECORDED_STEPS):
            some = rates[first : first + RECORDED_STEPS]
            state = _train_recorded(network, state, distilled, some, batching, loop)
        return state
    assert loop.batch_order is not None
    math, batches = derivatives_of(network, batching), _Batches(distilled, loop, loop.batch_order)
    optimizer, weights, slots, rest = loop.optimizer, state.weights, state.slots, state.rest
    if not rest:
        weights, slots = _take_steps(math, batches, optimizer, state, rates, state.step)
    for t, rate in enumerate(rates if rest else (), state.step):
        images, targets = batches.at(t)
        gradient, _ = math.gradient({**weights, **rest_at(rest, t)}, images, targets, False)
        rest = rest_after(network, weights, rest, images, t)
        weights, slots = optimizer.update(weights, slots, gradient, rate, t)
    return TrainState(weights, slots, state.step + len(rates), rest)


def _take_steps(
    math: Derivatives,
    batches: _Batches,
    optimizer: InnerOptimizer,
    state: TrainState,
    rates: Sequence[Rate],
    number: Any,
) -> tuple[Params, Slots]:
    """Weights and slots after steps on the batches from ``state.step`` on; for the optimiser they are steps
    ``number`` (an int, or a float64 tensor, in which Adam's corrections are exact) and after."""
    weights, slots = state.weights, state.slots
    for i, rate in enumerate(rates):
        gradient, _ = math.gradient(weights, *batches.at(state.step + i), False)
        weights, slots = optimizer.update(weights, slots, gradient, rate, number + i)
    return weights, slots


def _train_recorded(
    network: nn.Module,
    state: TrainState,
    distilled: LabelledImages,
    rates: Sequence[Rate],
    batching: str,
    loop: InnerLoop,
) -> TrainState:
    """`train_networks` as one CUDA graph. ``loop`` has a batch order."""
    if loop.augment is not None:
        raise ValueError("graph: an augmentation is another one in every step and cannot be recorded")
    assert loop.batch_order is not None
    names, weight = list(state.weights), next(iter(state.weights.values()))
    sets, stop = 1 + len(state.slots), state.step + len(rates)

    def work(*tensors: Tensor) -> list[Tensor]:
        *values, x, y, picks, numbers, first = tensors
        weights, *slots = (
            dict(zip(names, values[i * len(names) : (i + 1) * len(names)], strict=True)) for i in range(sets)
        )
        batches = _Batches(LabelledImages(x, y), loop, BatchOrder(picks, picks.new_zeros(len(picks), 1)))
        rate_of_step = [numbers[i].view(-1) for i in range(len(numbers))]
        before, math = TrainState(weights, tuple(slots)), derivatives_of(network, batching)
        weights, after = _take_steps(math, batches, loop.optimizer, before, rate_of_step, first)
        return [value for part in (weights, *after) for value in part.values()]

    one_each = [torch.as_tensor(rate, dtype=weight.dtype) for rate in rates]
    inputs = [value for part in (state.weights, *state.slots) for value in part.values()]
    picks = loop.batch_order.batches[state.step : stop].to(weight.device)
    inputs += [distilled.images, distilled.labels, picks, torch.stack(one_each).to(weight.device)]
    inputs.append(torch.full((), state.step, dtype=torch.float64, device=weight.device))
    what = ("train", network, tuple(names), batching, loop.optimizer)
    found = iter(replayed(what, work, [value.detach() for value in inputs]))
    weights, *after = ({name: next(found) for name in names} for _ in range(sets))
    return TrainState(weights, tuple(after), stop)


def loss_and_gradient(
    passes: LossAndGradient, params: Params, images: Tensor, labels: Tensor, plan: ExecutionPlan
) -> tuple[Tensor, Params]:
    """Outer loss ``[K]`` on real images ``[N, ...]`` or ``[K, N, ...]`` and its gradient by the weights.

    ``plan.real_block`` networks and ``plan.real_chunk`` images go through at a time, and gradients of
    chunks are summed: what is at work fits the cache, and memory does not grow with N or K.
    """
    count, total = next(iter(params.values())).shape[0], labels.shape[-1]
    losses, gradients = [], []
    for first in range(0, count, plan.real_block):
        block = slice(first, first + plan.real_block)
        weights = {name: value[block] for name, value in params.items()}
        loss: Tensor | None = None
        gradient: Params = {}
        for start in range(0, total, plan.real_chunk):
            chunk = slice(start, start + plan.real_chunk)
            x, y = images[..., chunk, :, :, :], labels[..., chunk]
            if x.dim() == 5:
                x, y = x[block], y[block]
            part, pieces = passes(weights, x, y)
            share = y.shape[-1] / total
            loss = part * share if loss is None else loss + part * share
            for name, piece in pieces.items():
                gradient[name] = (
                    gradient[name].add_(piece, alpha=share) if name in gradient else piece * share
                )
        assert loss is not None
        losses.append(loss)
        gradients.append(gradient)
    return torch.cat(losses), {name: torch.cat([g[name] for g in gradients]) for name in gradients[0]}


class _Unroll:
    """Forward through inner steps and back again, in the memory mode of the plan."""

    def __init__(
        self,
        network: nn.Module,
        steps: Steps,
        batches: _Batches,
        batch_order: BatchOrder,
        rates: Tensor,
        plan: ExecutionPlan,
    ) -> None:
        self.network, self.steps, self.batches = network, steps, batches
        self.batch_order, self.rates = batch_order, rates
        # A number is one for every replay of a recording.
        self.numbers = None if plan.graph else rates.tolist()
        self.keep_all = plan.memory_mode == "store"
        self.segment = plan.segment

    def rate(self, t: int) -> Rate:
        """The rate of step ``t``: one number, or ``[K]``."""
        which = self.batch_order.rates[t]
        if self.numbers is not None and len(which) == 1:
            return float(self.numbers[int(which)])
        return self.rates[self.batches.rate_of(t)]

    def step(self, point: TrainState, keep: bool) -> tuple[TrainState, _Step]:
        t = point.step
        images, targets = self.batches.at(t)
        steps, rest = self.steps, point.rest
        if rest:
            steps = steps.with_rest(rest_at(rest, t))
            rest = rest_after(self.network, point.weights, rest, images, t)
        weights, slots, kept = steps.forward(
            point.weights, point.slots, images, targets, self.rate(t), t, keep
        )
        return TrainState(weights, slots, t + 1, rest), _Step(point, kept)

    def back(self, step: _Step, v: Params, by_slots: Slots) -> StepVjp:
        before = step.before
        t = before.step
        return self.steps.back(before.weights, before.slots, step.kept, v, by_slots, self.rate(t), t)

    def forward(self, point: TrainState, stop: int) -> tuple[TrainState, list[_Step | TrainState]]:
        """The point after step ``stop``, and a tape: the steps, or the first point of each segment."""
        tape: list[_Step | TrainState] = []
        for count in range(stop - point.step):
            if not self.keep_all and count % self.segment == 0:
                tape.append(point)
            point, step = self.step(point, self.keep_all)
            if self.keep_all:
                tape.append(step)
        return point, tape

    def steps_of(self, entry: _Step | TrainState, stop: int) -> list[_Step]:
        """The steps of one entry of the tape, up to ``stop``; those of a segment are taken again."""
        if isinstance(entry, _Step):
            return [entry]
        steps = []
        while entry.step < stop:
            entry, step = self.step(entry, True)
            steps.append(step)
        return steps


def outer_gradient(
    network: nn.Module,
    params: Params,
    distilled: LabelledImages,
    raw: Tensor,
    real: LabelledImages,
    plan: ExecutionPlan,
    *,
    loop: InnerLoop | None = None,
    window: Window | None = None,
) -> OuterGradient:
    """The outer loss of K networks and its exact derivative w.r.t. images, raw rates and soft labels.

    ``params``: initial weights ``[K, ...]``, left untouched. ``distilled``: images ``[S, n, c, h, w]`` with
    labels ``[S, n]`` int64, or probabilities ``[S, n, classes]``, which are then differentiated too; ``raw
    [T]`` with T a multiple of S. ``real``: images ``[N, c, h, w]`` with labels ``[N]`` for all networks, or
    ``[K, N, ...]`` and ``[K, N]`` with a real batch for each. With a ``window``, the derivative of the
    loss after its last step by what its steps use, the point before it held fixed. Raises
    ``ValueError`` if T is not a multiple of S, or for an augmentation, which is another one in every outer
    step, where ``plan`` records a graph.
    """
    inner_steps, total = distilled.labels.shape[0], raw.shape[0]
    if total % inner_steps:
        raise ValueError(f"{total} rates do not go into {inner_steps} inner steps")
    loop = InnerLoop() if loop is None else loop
    batch_order = (
        fixed_batch_order(inner_steps, distilled.labels.shape[1], total)
        if loop.batch_order is None
        else loop.batch_order
    )
    window = Window(0, total) if window is None else window
    own = real.labels.dim() == 2
    if plan.graph:
        with products(plan.device, plan.precision):
            whole = replace(loop, batch_order=batch_order)
            return _recorded(network, params, distilled, raw, real, plan, whole, window)

    def of(module: nn.Module, share: slice) -> OuterGradient:
        weights = {name: value[share] for name, value in params.items()}
        batch = LabelledImages(real.images[share], real.labels[share]) if own else real
        theirs = replace(loop, batch_order=batch_order.of(share))
        with no_bookkeeping(plan) if loop.augment is None else nullcontext():  # whose way back is autograd's
            return _outer_gradient(module, weights, distilled, raw, batch, plan, theirs, window)

    with products(plan.device, plan.precision):
        return _joined(in_teams(plan, network, len(next(iter(params.values()))), of))


def _recorded(
    network: nn.Module,
    params: Params,
    distilled: LabelledImages,
    raw: Tensor,
    real: LabelledImages,
    plan: ExecutionPlan,
    loop: InnerLoop,
    window: Window,
) -> OuterGradient:
    """`_outer_gradient` of all networks, as a CUDA graph."""
    if loop.augment is not None:
        raise ValueError("graph: an augmentation is another one in every outer step and cannot be recorded")
    assert loop.batch_order is not None
    names, device = list(params), distilled.images.device

    def work(*tensors: Tensor) -> list[Tensor]:
        weights = dict(zip(names, tensors, strict=False))
        x, y, raw_of_all, real_x, real_y, batches, rates = tensors[len(names) :]
        theirs = replace(loop, batch_order=BatchOrder(batches, rates))
        one, batch = LabelledImages(x, y), LabelledImages(real_x, real_y)
        found = _outer_gradient(network, weights, one, raw_of_all, batch, plan, theirs, window)
        parts = (found.losses, found.images, found.raw_rates, found.labels)
        return [part for part in parts if part is not None]

    batch_order = loop.batch_order.batches.to(device), loop.batch_order.rates.to(device)
    inputs = [*params.values(), distilled.images, distilled.labels, raw]
    inputs += [real.images, real.labels, *batch_order]
    what = ("outer gradient", network, tuple(names), plan, loop.optimizer, window)
    return OuterGradient(*replayed(what, work, [value.detach() for value in inputs]))


def _joined(parts: Sequence[OuterGradient]) -> OuterGradient:
    labels = [part.labels for part in parts if part.labels is not None]
    return OuterGradient(
        losses=torch.cat([part.losses for part in parts]),
        images=torch.cat([part.images for part in parts]),
        raw_rates=torch.cat([part.raw_rates for part in parts]),
        labels=torch.cat(labels) if labels else None,
    )


def _outer_gradient(
    network: nn.Module,
    params: Params,
    distilled: LabelledImages,
    raw: Tensor,
    real: LabelledImages,
    plan: ExecutionPlan,
    loop: InnerLoop,
    window: Window,
) -> OuterGradient:
    """Of the networks of one team. ``loop`` has a batch order."""
    assert loop.batch_order is not None
    batch_order, total = loop.batch_order, raw.shape[0]
    count = next(iter(params.values())).shape[0]
    rates = F.softplus(raw.detach())
    batches = _Batches(distilled, loop, batch_order)
    unroll = _Unroll(network, steps_of(network, loop.optimizer, plan), batches, batch_order, rates, plan)

    point = TrainState.start(network, params, loop.optimizer)
    point = replace(point, weights={name: value.detach() for name, value in point.weights.items()})
    while point.step < window.start:
        point, _ = unroll.step(point, False)
    point, tape = unroll.forward(point, window.stop)
    passes = loss_and_gradient_of(network, loop.optimizer, plan)
    losses, v = loss_and_gradient(passes, point.params, real.images, real.labels, plan)

    images, labels = distilled.images, distilled.labels
    by_images = images.new_zeros(count, *batches.images.shape)
    by_labels = batches.labels.new_zeros(count, *batches.labels.shape) if labels.is_floating_point() else None
    by_rates, networks = images.new_zeros(count, total), torch.arange(count, device=images.device)
    by_slots = tuple({name: torch.zeros_like(a) for name, a in v.items()} for _ in point.slots)
    stop = window.stop
    while tape:
        steps = unroll.steps_of(tape.pop(), stop)
        stop = steps[0].before.step
        while steps:
            step = steps.pop()
            t, back = step.before.step, unroll.back(step, v, by_slots)
            by_rates[networks, batches.rate_of(t)] += back.rate
            batches.add_to(by_images, batches.back_through_augment(back.images, t), t)
            if by_labels is not None and back.targets is not None:
                batches.add_to(by_labels, back.targets, t)
            v, by_slots = back.weights, back.slots
    return OuterGradient(
        losses=losses,
        images=by_images.view(count, *images.shape),
        raw_rates=by_rates * torch.sigmoid(raw),
        labels=None if by_labels is None else by_labels.view(count, *labels.shape),
    )
