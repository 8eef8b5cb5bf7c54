"""Gradient descent on the distilled images, and the exact derivative of its result.

Equations (2) and (4) of Wang et al. 2018, with epochs: for t = 0 .. T-1, T = S*E, batch s = t mod S,

    w[t+1] = w[t] - lr[t] * g[t],        g[t] = d/dw loss(w[t]; images[s], labels[s]),

or another inner optimiser (`ddsweep.core.inner`) or order of batches (`ddsweep.core.order`). The outer loss L
is a function of w[T]. Its derivative is accumulated backwards, step by step. A derivative by w[t+1] (and by
the optimiser's state) becomes one by lr[t], by g[t] and by w[t]. The one by g[t], a, becomes the derivative
of <g[t], a> by w[t], images[s] and labels[s].

Memory: ``store`` keeps all that each step needs for this; ``recompute`` keeps the weights of every
``segment``-th step and repeats the steps of a segment. With a window the way back goes through its steps
only; the steps before it bring the networks to its start (Feng et al. 2024, RaT-BPTT).

Axes: K networks, S inner steps, n images a step, T = S*E. Every derivative has a leading K: networks do not
mix, so one that diverges does not spoil others. Rates are softplus(raw). The networks may belong to G sets of
images, the first K/G of them to the first set, and so on: several distillations in the same operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.core.ahead import sent
from ddsweep.core.derivatives import no_bookkeeping
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.graphs import replayed
from ddsweep.core.images import LabelledImages
from ddsweep.core.inner import Number, Rate, Slots
from ddsweep.core.layers import Params
from ddsweep.core.order import BatchOrder, fixed_batch_order
from ddsweep.core.own_network import rest_after, rest_at
from ddsweep.core.precision import products
from ddsweep.core.steps import LossAndGradient, Steps, StepVjp, loss_and_gradient_of, steps_of
from ddsweep.core.teams import in_teams
from ddsweep.core.training import Augment, Batches, InnerLoop, TrainState, of_each

__all__ = [
    "OuterGradient",
    "Window",
    "loss_and_gradient",
    "outer_gradient",
    "raw_rates",
]


@dataclass(frozen=True)
class Window:
    """The way back goes through inner steps ``start <= t < stop``; the outer loss is that after ``stop``."""

    start: int
    stop: int


@dataclass(frozen=True)
class OuterGradient:
    """For each network: outer loss ``[K]``, its derivative by images ``[K, S, n, c, h, w]``, by raw rates
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

    def of(self, networks: slice) -> OuterGradient:
        """That of some of the networks."""
        labels = None if self.labels is None else self.labels[networks]
        return OuterGradient(self.losses[networks], self.images[networks], self.raw_rates[networks], labels)


@dataclass
class _Step:
    """A step, with the values that going back through it needs."""

    before: TrainState
    kept: Any


def raw_rates(rate: float, steps: int) -> Tensor:
    """Raw rates ``[T]`` (float64) with softplus(raw) = ``rate``."""
    return raw_of(torch.tensor(rate, dtype=torch.float64)).repeat(steps)


def raw_of(rates: Tensor) -> Tensor:
    """Raw rates with softplus(raw) = ``rates``, which are above 0."""
    return rates + torch.log(-torch.expm1(-rates))


def loss_and_gradient(
    passes: LossAndGradient, params: Params, images: Tensor, labels: Tensor, plan: ExecutionPlan
) -> tuple[Tensor, Params]:
    """Outer loss ``[K]`` on real images ``[N, ...]`` or ``[G, N, ...]`` and its gradient by the weights.

    ``plan.real_block`` networks and ``plan.real_chunk`` images go through at a time, and gradients of chunks
    are summed. So the working data fit the cache, and memory does not grow with N or K.
    """
    count, total = next(iter(params.values())).shape[0], labels.shape[-1]
    own = images.dim() == 5
    each = count // len(images) if own else count
    losses, gradients = [], []
    for block in _blocks(count, each, plan.real_block):
        weights = {name: value[block] for name, value in params.items()}
        sets = slice(block.start // each, -(-block.stop // each))
        loss: Tensor | None = None
        gradient: Params = {}
        for start in range(0, total, plan.real_chunk):
            chunk = slice(start, start + plan.real_chunk)
            x, y = images[..., chunk, :, :, :], labels[..., chunk]
            if own:
                x, y = x[sets], y[sets]
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


def _blocks(count: int, each: int, most: int) -> list[slice]:
    """``count`` networks in blocks of at most ``most``: part of one set, each of which has ``each`` networks,
    or several whole sets."""
    if most >= each:
        most = most // each * each
        return [slice(first, min(first + most, count)) for first in range(0, count, most)]
    return [
        slice(first, min(first + most, start + each))
        for start in range(0, count, each)
        for first in range(start, start + each, most)
    ]


class _Unroll:
    """Forward through inner steps and back again, in the memory mode of the plan."""

    def __init__(
        self,
        network: nn.Module,
        steps: Steps,
        batches: Batches,
        batch_order: BatchOrder,
        rates: Tensor,
        plan: ExecutionPlan,
        starts: tuple[int, ...] = (),
    ) -> None:
        """``rates [T]``, or ``[K, T]`` for networks of several sets. With ``starts``, K numbers, step 0 of
        the order is for each network that step of its training."""
        self.network, self.steps, self.batches = network, steps, batches
        self.batch_order, self.rates, self.starts = batch_order, rates, starts
        # A number would be the same in every replay of a recording.
        self.numbers = None if plan.graph or rates.dim() == 2 else rates.tolist()
        self.keep_all = plan.memory_mode == "store"
        self.segment = plan.segment

    def rate(self, t: int) -> Rate:
        """The rate of step ``t``: one number, or ``[K]``."""
        which = self.batch_order.rates[t]
        if self.numbers is not None and len(which) == 1:
            return float(self.numbers[int(which)])
        if self.rates.dim() == 1:
            return self.rates[self.batches.rate_of(t)]
        networks = torch.arange(len(self.rates), device=self.rates.device)
        return self.rates[networks, of_each(self.batches.rate_of(t), len(networks))]

    def number(self, t: int) -> Number:
        """The number of step ``t`` for the optimiser."""
        return tuple(start + t for start in self.starts) if self.starts else t

    def step(self, point: TrainState, keep: bool) -> tuple[TrainState, _Step]:
        t = point.step
        images, targets = self.batches.at(t)
        steps, rest = self.steps, point.rest
        if rest:
            steps = steps.with_rest(rest_at(rest, t))
            rest = rest_after(self.network, point.weights, rest, images, t)
        weights, slots, kept = steps.forward(
            point.weights, point.slots, images, targets, self.rate(t), self.number(t), keep
        )
        return TrainState(weights, slots, t + 1, rest), _Step(point, kept)

    def back(self, step: _Step, v: Params, by_slots: Slots) -> StepVjp:
        before = step.before
        t = before.step
        rate, number = self.rate(t), self.number(t)
        return self.steps.back(before.weights, before.slots, step.kept, v, by_slots, rate, number)

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
    window: Window | Sequence[Window] | None = None,
) -> OuterGradient:
    """The outer loss of K networks and its exact derivative w.r.t. images, raw rates and soft labels.

    ``params``: initial weights ``[K, ...]``, left untouched. ``distilled``: images ``[S, n, c, h, w]`` with
    labels ``[S, n]`` int64, or probabilities ``[S, n, classes]``, which are then differentiated too; ``raw
    [T]`` with T a multiple of S. ``real``: images ``[N, c, h, w]`` with labels ``[N]`` for all networks, or
    ``[K, N, ...]`` and ``[K, N]`` with a real batch for each. With a ``window``, the derivative of the loss
    after its last step by the inputs of its steps; the point before it is held fixed.

    G sets at once: images ``[G, S, n, c, h, w]`` with labels ``[S, n]``, or probabilities ``[G, S, n,
    classes]``, raw ``[G, T]`` and real images ``[G, N, ...]`` or ``[K, N, ...]``; K/G networks in a row
    belong to one set. Each set may have a ``window`` of its own, all of one length, and an augmentation
    (``loop.augments``). That takes derivatives that are written out (``explicit``).

    Raises ``ValueError`` if T is not a multiple of S, for several sets under another plan, or for an
    augmentation if ``plan`` records a graph: it is another one in every outer step.
    """
    (inner_steps, batch), total = distilled.images.shape[-5:-3], raw.shape[-1]
    if total % inner_steps:
        raise ValueError(f"{total} rates do not go into {inner_steps} inner steps")
    sets = len(raw) if raw.dim() == 2 else 1
    if raw.dim() == 2 and not plan.inner_batching == plan.real_batching == "explicit":
        raise ValueError("several sets at once: their derivatives are not written out in this plan")
    loop = InnerLoop() if loop is None else loop
    batch_order = (
        fixed_batch_order(inner_steps, batch, total) if loop.batch_order is None else loop.batch_order
    )
    window = Window(0, total) if window is None else window
    windows = (window,) if isinstance(window, Window) else tuple(window)
    own = real.labels.dim() == 2
    if plan.graph:
        with products(plan.device):
            whole = replace(loop, batch_order=batch_order)
            return _recorded(network, params, distilled, raw, real, plan, whole, windows)

    count = len(next(iter(params.values())))

    def of(module: nn.Module, share: slice) -> OuterGradient:
        some = share
        theirs_distilled, theirs_raw = distilled, raw
        if raw.dim() == 2:  # a share of the sets
            some = slice(share.start * count // sets, share.stop * count // sets)
            labels = distilled.labels[share] if distilled.labels.dim() == 4 else distilled.labels
            theirs_distilled, theirs_raw = LabelledImages(distilled.images[share], labels), raw[share]
        weights = {name: value[some] for name, value in params.items()}
        of_real = some if own and len(real.labels) == count else share
        batch = LabelledImages(real.images[of_real], real.labels[of_real]) if own else real
        theirs = replace(loop, batch_order=batch_order.of(some), augments=loop.augments[share])
        their_windows = windows[share] if len(windows) > 1 else windows
        augmented = loop.augment is not None or loop.augments  # autograd goes back through it
        with nullcontext() if augmented else no_bookkeeping(plan):
            return _outer_gradient(
                module, weights, theirs_distilled, theirs_raw, batch, plan, theirs, their_windows
            )

    with products(plan.device):
        return _joined(in_teams(plan, network, sets if raw.dim() == 2 else count, of))


def _recorded(
    network: nn.Module,
    params: Params,
    distilled: LabelledImages,
    raw: Tensor,
    real: LabelledImages,
    plan: ExecutionPlan,
    loop: InnerLoop,
    windows: tuple[Window, ...],
) -> OuterGradient:
    """`_outer_gradient` of all networks, as a CUDA graph."""
    if loop.augment is not None or loop.augments:
        raise ValueError("graph: an augmentation is another one in every outer step and cannot be recorded")
    assert loop.batch_order is not None
    names, device = list(params), distilled.images.device

    def work(*tensors: Tensor) -> list[Tensor]:
        weights = dict(zip(names, tensors, strict=False))
        x, y, raw_of_all, real_x, real_y, batches, rates = tensors[len(names) :]
        theirs = replace(loop, batch_order=BatchOrder(batches, rates))
        one, batch = LabelledImages(x, y), LabelledImages(real_x, real_y)
        found = _outer_gradient(network, weights, one, raw_of_all, batch, plan, theirs, windows)
        parts = (found.losses, found.images, found.raw_rates, found.labels)
        return [part for part in parts if part is not None]

    batch_order = sent(loop.batch_order.batches, device), sent(loop.batch_order.rates, device)
    inputs = [*params.values(), distilled.images, distilled.labels, raw]
    inputs += [real.images, real.labels, *batch_order]
    what = ("outer gradient", network, tuple(names), plan, loop.optimizer, windows)
    return OuterGradient(*replayed(what, work, [value.detach() for value in inputs]))


def _joined(parts: Sequence[OuterGradient]) -> OuterGradient:
    labels = [part.labels for part in parts if part.labels is not None]
    return OuterGradient(
        losses=torch.cat([part.losses for part in parts]),
        images=torch.cat([part.images for part in parts]),
        raw_rates=torch.cat([part.raw_rates for part in parts]),
        labels=torch.cat(labels) if labels else None,
    )


def _of_each_set(function: Callable[[Tensor], Tensor], raw: Tensor, count: int) -> Tensor:
    """``function(raw)``; of raw ``[G, T]`` ``[K, T]``. Each set is computed by itself: torch computes the
    first and the last values of a tensor in different ways, and the values of a set must not depend on other
    sets."""
    if raw.dim() == 1:
        return function(raw)
    return torch.stack([function(one) for one in raw]).repeat_interleave(count // len(raw), 0)


def _later(augment: Augment, window: Window) -> Augment:
    """``augment`` of steps that are counted from the start of ``window``."""
    return lambda images, t: augment(images, window.start + t)


def _at_starts(
    network: nn.Module,
    steps: Steps,
    point: TrainState,
    distilled: LabelledImages,
    rates: Tensor,
    plan: ExecutionPlan,
    loop: InnerLoop,
    starts: Sequence[int],
) -> TrainState:
    """The networks of each of several sets after the steps that ``starts`` has for it. As long as sets have
    steps to go, they are side by side. ``rates [K, T]``."""
    assert loop.batch_order is not None
    each = len(rates) // len(starts)
    left, there = list(range(len(starts))), {}
    while left:
        until = min(starts[g] for g in left)
        networks = [g * each + k for g in left for k in range(each)]
        labels = distilled.labels[left] if distilled.labels.dim() == 4 else distilled.labels
        order = loop.batch_order.of(networks)
        augments = tuple(loop.augments[g] for g in left) if loop.augments else ()
        theirs = LabelledImages(distilled.images[left], labels)
        batches = Batches(theirs, replace(loop, augments=augments), order)
        unroll = _Unroll(network, steps, batches, order, rates[networks], plan)
        while point.step < until:
            point, _ = unroll.step(point, False)
        for place, g in enumerate(left):
            if starts[g] == until:
                there[g] = point.of(range(place * each, (place + 1) * each))
        stay = [place for place, g in enumerate(left) if starts[g] > until]
        if stay:
            point = point.of([place * each + k for place in stay for k in range(each)])
        left = [left[place] for place in stay]
    return TrainState.joined([there[g] for g in range(len(starts))])


def _outer_gradient(
    network: nn.Module,
    params: Params,
    distilled: LabelledImages,
    raw: Tensor,
    real: LabelledImages,
    plan: ExecutionPlan,
    loop: InnerLoop,
    windows: tuple[Window, ...],
) -> OuterGradient:
    """The outer gradient of the networks of one team. ``loop`` has a batch order."""
    assert loop.batch_order is not None
    batch_order, total = loop.batch_order, raw.shape[-1]
    count = next(iter(params.values())).shape[0]
    rates, slopes = (_of_each_set(function, raw.detach(), count) for function in (F.softplus, torch.sigmoid))
    point = TrainState.start(network, params, loop.optimizer)
    point = replace(point, weights={name: value.detach() for name, value in point.weights.items()})
    passes_of_step = steps_of(network, loop.optimizer, plan)
    if len(windows) == 1:
        batches, stop = Batches(distilled, loop, batch_order), windows[0].stop
        unroll = _Unroll(network, passes_of_step, batches, batch_order, rates, plan)
        while point.step < windows[0].start:
            point, _ = unroll.step(point, False)
    else:
        each = [one.start for one in windows]
        point = _at_starts(network, passes_of_step, point, distilled, rates, plan, loop, each)
        batch_order = batch_order.between([(one.start, one.stop) for one in windows])
        loop = replace(loop, augments=tuple(map(_later, loop.augments, windows)))
        batches, stop = Batches(distilled, loop, batch_order), windows[0].stop - windows[0].start
        starts = [start for start in each for _ in range(count // len(windows))]
        unroll = _Unroll(network, passes_of_step, batches, batch_order, rates, plan, tuple(starts))
    point, tape = unroll.forward(point, stop)
    passes = loss_and_gradient_of(network, loop.optimizer, plan)
    losses, v = loss_and_gradient(passes, point.params, real.images, real.labels, plan)

    images, labels = distilled.images, distilled.labels
    by_images = images.new_zeros(count, *batches.images.shape[-4:])
    soft = labels.is_floating_point()
    by_labels = batches.labels.new_zeros(count, *batches.labels.shape[-2:]) if soft else None
    by_rates, networks = images.new_zeros(count, total), torch.arange(count, device=images.device)
    by_slots = tuple({name: torch.zeros_like(a) for name, a in v.items()} for _ in point.slots)
    while tape:
        steps = unroll.steps_of(tape.pop(), stop)
        stop = steps[0].before.step
        while steps:
            step = steps.pop()
            t, back = step.before.step, unroll.back(step, v, by_slots)
            by_rates[networks, of_each(batches.rate_of(t), count)] += back.rate
            batches.add_to(by_images, batches.back_through_augment(back.images, t), t)
            if by_labels is not None and back.targets is not None:
                batches.add_to(by_labels, back.targets, t)
            v, by_slots = back.weights, back.slots
    return OuterGradient(
        losses=losses,
        images=by_images.view(count, *images.shape[-5:]),
        raw_rates=by_rates * slopes,
        labels=None if by_labels is None else by_labels.view(count, *labels.shape[-3:]),
    )
