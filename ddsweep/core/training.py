"""Training K networks on distilled images, forward only, for evaluation and for the start of an unroll.

Axes: K networks, S inner steps, n images a step. Networks do not mix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ddsweep.core.ahead import sent
from ddsweep.core.derivatives import Derivatives, derivatives_of
from ddsweep.core.graphs import replayed
from ddsweep.core.images import LabelledImages
from ddsweep.core.inner import InnerOptimizer, Rate, Slots
from ddsweep.core.layers import Params
from ddsweep.core.order import BatchOrder, DrawnMinibatches, Minibatches, fixed_batch_order, rate_index
from ddsweep.core.own_network import parts, rest_after, rest_at

__all__ = ["Augment", "Batches", "InnerLoop", "TrainState", "of_each", "rate_at", "train_networks"]

RECORDED_STEPS = 50
"""The number of inner steps without a way back in one recording."""

Augment = Callable[[Tensor, int], Tensor]
"""A map of images ``[..., n, c, h, w]``, of each pixel value a linear function and a number; the int is the
step."""


@dataclass(frozen=True)
class InnerLoop:
    """How networks are trained on distilled images: plain gradient descent in fixed order by default.

    ``augments`` are an augmentation for each of K networks, or of G sets of them, instead of one for all.
    Forward only there can be more: ``minibatches`` instead of a ``batch_order``, and ``rate_factor(t)``, that
    of the rate of step t.
    """

    optimizer: InnerOptimizer = field(default_factory=InnerOptimizer)
    batch_order: BatchOrder | None = None
    augment: Augment | None = None
    minibatches: Minibatches | None = None
    augments: tuple[Augment, ...] = ()
    rate_factor: Callable[[int], float] | None = None

    @property
    def recordable(self) -> bool:
        """Whether all steps are the same work on other numbers, so that a GPU can record them."""
        return self.augment is None and not self.augments and self.minibatches is None

    def of(self, share: slice) -> InnerLoop:
        """That of some of the networks."""
        order, minibatches = self.batch_order, self.minibatches
        return replace(
            self,
            batch_order=None if order is None else order.of(share),
            minibatches=None if minibatches is None else minibatches.of(share),
            augments=self.augments[share],
        )

    def order(self, inner_steps: int, batch: int, total: int) -> BatchOrder | Minibatches:
        """That of S = ``inner_steps`` batches of ``batch`` images, for ``total`` steps."""
        return self.minibatches or self.batch_order or fixed_batch_order(inner_steps, batch, total)


def rate_at(rates: Sequence[Rate], inner_steps: int, t: int, loop: InnerLoop, like: Tensor) -> Rate:
    """The rate of inner step ``t``, or each network's rate, in the type and on the device of ``like``. Beyond
    T the rates of the last epoch repeat. Minibatches have one rate, that of every step."""
    rate = _listed_rate(rates, inner_steps, t, loop, like)
    return rate if loop.rate_factor is None else rate * loop.rate_factor(t)


def _listed_rate(rates: Sequence[Rate], inner_steps: int, t: int, loop: InnerLoop, like: Tensor) -> Rate:
    if loop.batch_order is None:
        return rates[rate_index(t, inner_steps, len(rates))]
    picked = [rates[int(i)] for i in loop.batch_order.rates[t]]
    if len(picked) == 1:
        return picked[0]
    picked = [rate[k] if isinstance(rate, Tensor) else rate for k, rate in enumerate(picked)]
    return torch.tensor(picked, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class TrainState:
    """The state of K networks in training: weights ``[K, ...]``, the optimiser's slots, the number of steps
    taken, and the rest that the networks hold (`ddsweep.core.own_network`)."""

    weights: Params
    slots: Slots
    step: int = 0
    rest: Params = field(default_factory=dict)

    @classmethod
    def start(cls, network: nn.Module, params: Params, optimizer: InnerOptimizer) -> TrainState:
        """The state before the first step."""
        weights, rest = parts(network, params)
        return cls(weights, optimizer.start(weights), 0, rest)

    @property
    def params(self) -> Params:
        """All tensors of the networks."""
        return {**self.weights, **self.rest}

    def of(self, networks: Sequence[int]) -> TrainState:
        """That of some of the networks."""

        def taken(values: Params) -> Params:
            return {name: value[list(networks)] for name, value in values.items()}

        return TrainState(taken(self.weights), tuple(map(taken, self.slots)), self.step, taken(self.rest))

    @classmethod
    def joined(cls, states: Sequence[TrainState]) -> TrainState:
        """The networks of all ``states``, before their next step, which is number 0."""

        def side_by_side(parts: Sequence[Params]) -> Params:
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        return cls(
            side_by_side([state.weights for state in states]),
            tuple(side_by_side(parts) for parts in zip(*(state.slots for state in states), strict=True)),
            0,
            side_by_side([state.rest for state in states]),
        )


class Batches:
    """The distilled images and labels of each inner step, and the way back from a step's derivatives.

    ``distilled`` has images ``[S, n, c, h, w]``, or ``[G, S, n, c, h, w]`` with G sets: then K/G networks in
    a row see the same one. Labels are ``[S, n]`` for all sets, or probabilities ``[S, n, classes]`` or ``[G,
    S, n, classes]``.
    """

    def __init__(
        self, distilled: LabelledImages, loop: InnerLoop, batch_order: BatchOrder | Minibatches
    ) -> None:
        self.own = distilled.images.dim() == 6
        self.images = images = _flat(distilled.images, self.own)
        self._own_labels = distilled.labels.dim() == 4
        self.labels = _flat(distilled.labels, self._own_labels)
        self.augment, self._augments = loop.augment, loop.augments
        self._rates: Tensor | None = None
        self._picks: Tensor | DrawnMinibatches
        if isinstance(batch_order, Minibatches):
            self.shared, self._picks = False, batch_order.drawn(images.device)
        else:
            self.shared, self._picks = batch_order.shared, sent(batch_order.batches, images.device)
            self._rates = sent(batch_order.rates, images.device)

    def at(self, t: int) -> tuple[Tensor, Tensor]:
        """Images ``[n, ...]`` (or ``[K or G, n, ...]``) and targets of step ``t``."""
        picks = self._picks[t]
        picks = picks[0] if self.shared else picks
        images = _taken(self.images, self.own, picks)
        targets = _taken(self.labels, self._own_labels, picks)
        if self._augments and images.dim() == 4:
            images = images.expand(len(self._augments), *images.shape)
        return self._augmented(images, t), targets

    def _augmented(self, images: Tensor, t: int) -> Tensor:
        """``images`` of step ``t``, ``[n, ...]`` or ``[G or K, n, ...]``, changed by the augmentations of
        their sets."""
        if not self._augments:
            return images if self.augment is None else self.augment(images, t)
        changed = [
            augment(own.squeeze(0), t).reshape(own.shape)  # of one network [n, ...], as it is alone
            for augment, own in zip(self._augments, images.chunk(len(self._augments)), strict=True)
        ]
        return torch.cat(changed)

    def rate_of(self, t: int) -> Tensor:
        """The index of the rate of step ``t``: int64 ``[R]`` as in `BatchOrder`, on the device of the
        images."""
        assert self._rates is not None, "minibatches have one rate"
        return self._rates[t]

    def add_to(self, total: Tensor, part: Tensor, t: int) -> None:
        """Add the derivatives ``part [K, n, ...]`` of step ``t`` to ``total [K, S*n, ...]``."""
        count, size = total.shape[:2]
        offsets = torch.arange(count, device=total.device)[:, None] * size
        index = (of_each(self._picks[t], count) + offsets).flatten()
        total.view(count * size, *total.shape[2:]).index_add_(0, index, part.flatten(0, 1).to(total))

    def back_through_augment(self, part: Tensor, t: int) -> Tensor:
        """Derivatives by the images of step ``t``, from those by the changed images."""
        if self.augment is None and not self._augments:
            return part
        with torch.enable_grad():
            leaf = torch.zeros_like(part).requires_grad_()
            made = self._augmented(leaf, t)
        return torch.autograd.grad(made, leaf, part)[0]


def of_each(rows: Tensor, count: int) -> Tensor:
    """``rows [R, ...]`` of ``count`` networks (`BatchOrder`): one for all, or one for each of them."""
    return rows.repeat_interleave(count // len(rows), 0) if 1 < len(rows) < count else rows


def _flat(values: Tensor, own: bool) -> Tensor:
    """``[S, n, ...]`` or, if each set has its ``own``, ``[G, S, n, ...]`` -> ``[S*n, ...]`` or ``[G, S*n,
    ...]``."""
    first = 1 if own else 0
    return values.detach().flatten(first, first + 1)


def _taken(values: Tensor, own: bool, picks: Tensor) -> Tensor:
    """Those of ``values [S*n, ...]``, or ``[G, S*n, ...]``, at ``picks [n]``, or ``[K, n]`` for K
    networks."""
    if not own:
        return values[picks]
    if picks.dim() == 1:
        return values[:, picks]
    network = torch.arange(len(picks), device=picks.device)
    return values[(network // (len(picks) // len(values)))[:, None], picks]


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
    inner_steps, batch = distilled.labels.shape[:2]
    order = loop.order(inner_steps, batch, state.step + len(rates))
    if graph:
        for first in range(0, len(rates), RECORDED_STEPS):
            some = rates[first : first + RECORDED_STEPS]
            state = _train_recorded(network, state, distilled, some, batching, loop, order)
        return state
    math, batches = derivatives_of(network, batching), Batches(distilled, loop, order)
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
    batches: Batches,
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
    order: BatchOrder | Minibatches,
) -> TrainState:
    """`train_networks` as one CUDA graph."""
    if not loop.recordable or isinstance(order, Minibatches):
        raise ValueError("graph: augmentations and minibatches are others in every step: none is recorded")
    names, weight = list(state.weights), next(iter(state.weights.values()))
    sets, stop = 1 + len(state.slots), state.step + len(rates)

    def work(*tensors: Tensor) -> list[Tensor]:
        *values, x, y, picks, numbers, first = tensors
        weights, *slots = (
            dict(zip(names, values[i * len(names) : (i + 1) * len(names)], strict=True)) for i in range(sets)
        )
        batches = Batches(LabelledImages(x, y), loop, BatchOrder(picks, picks.new_zeros(len(picks), 1)))
        rate_of_step = [numbers[i].view(-1) for i in range(len(numbers))]
        before, math = TrainState(weights, tuple(slots)), derivatives_of(network, batching)
        weights, after = _take_steps(math, batches, loop.optimizer, before, rate_of_step, first)
        return [value for part in (weights, *after) for value in part.values()]

    one_each = [torch.as_tensor(rate, dtype=weight.dtype) for rate in rates]
    inputs = [value for part in (state.weights, *state.slots) for value in part.values()]
    picks = order.batches[state.step : stop].to(weight.device)
    inputs += [distilled.images, distilled.labels, picks, torch.stack(one_each).to(weight.device)]
    inputs.append(torch.full((), state.step, dtype=torch.float64, device=weight.device))
    what = ("train", network, tuple(names), batching, loop.optimizer)
    found = iter(replayed(what, work, [value.detach() for value in inputs]))
    weights, *after = ({name: next(found) for name in names} for _ in range(sets))
    return TrainState(weights, tuple(after), stop)
