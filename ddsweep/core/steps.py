"""One inner step and the way back through it: eager, or each compiled as a whole.

The compiled way back takes the step's gradient once more, so that nothing of it has to be kept: a few tensors
go in, a few come out. The mathematics is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ddsweep.core.derivatives import Autograd, Derivatives, Functional, derivatives_of
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.inner import InnerOptimizer, Number, Rate, Slots, added
from ddsweep.core.layers import Params

__all__ = [
    "LossAndGradient",
    "StepVjp",
    "Steps",
    "is_compile_error",
    "loss_and_gradient_of",
    "steps_of",
]

LossAndGradient = Callable[[Params, Tensor, Tensor], tuple[Tensor, Params]]


@dataclass(frozen=True)
class StepVjp:
    """Derivatives, carried from after a step to before it: by weights and slots, and by the inputs of the
    step: its rate ``[K]``, images ``[K, n, c, h, w]`` and, if they are probabilities, targets ``[K, n,
    classes]``."""

    weights: Params
    slots: Slots
    rate: Tensor
    images: Tensor
    targets: Tensor | None


class Steps(Protocol):
    def with_rest(self, rest: Params) -> Steps:
        """Steps of networks that hold ``rest`` beside their weights (`ddsweep.core.own_network`)."""
        ...

    def forward(
        self,
        weights: Params,
        slots: Slots,
        images: Tensor,
        targets: Tensor,
        rate: Rate,
        t: Number,
        keep: bool,
    ) -> tuple[Params, Slots, Any]:
        """Weights and slots after step ``t`` and, if ``keep``, the values that `back` needs to go back
        through it."""
        ...

    def back(
        self, weights: Params, slots: Slots, kept: Any, v: Params, by_slots: Slots, rate: Rate, t: Number
    ) -> StepVjp:
        """Back through step ``t``: ``weights`` and ``slots`` are those before it, ``v`` and ``by_slots`` the
        derivatives by those after it."""
        ...


@dataclass(frozen=True)
class _Eager:
    math: Derivatives
    optimizer: InnerOptimizer
    rest: Params = field(default_factory=dict)

    def with_rest(self, rest: Params) -> Steps:
        return replace(self, rest=rest)

    def forward(
        self,
        weights: Params,
        slots: Slots,
        images: Tensor,
        targets: Tensor,
        rate: Rate,
        t: Number,
        keep: bool,
    ) -> tuple[Params, Slots, Any]:
        gradient, kept = self.math.gradient({**weights, **self.rest}, images, targets, keep)
        after = self.optimizer.update(weights, slots, gradient, rate, t)
        return *after, (gradient, kept) if keep else None

    def back(
        self, weights: Params, slots: Slots, kept: Any, v: Params, by_slots: Slots, rate: Rate, t: Number
    ) -> StepVjp:
        gradient, passes = kept
        update = self.optimizer.vjp(v, by_slots, slots, gradient, rate, t)
        pulled = self.math.vjp(weights, passes, update.gradient)
        return StepVjp(added(v, pulled.weights), update.slots, update.rate, pulled.images, pulled.targets)


# --------------------------------------------------------------------------------------- compiled


@dataclass(frozen=True)
class _Compiled:
    """The passes of `_Eager`, compiled. Rate and number change from step to step, so they go in as tensors:
    numbers would be compiled in, once for each value."""

    step: Callable[..., tuple[Params, Slots]]
    way_back: Callable[..., tuple[Params, Slots, Tensor, Tensor, Tensor | None]]
    loss_and_gradient: LossAndGradient

    def with_rest(self, rest: Params) -> Steps:
        raise ValueError("compile: networks of a user's own are not compiled")

    def forward(
        self,
        weights: Params,
        slots: Slots,
        images: Tensor,
        targets: Tensor,
        rate: Rate,
        t: Number,
        keep: bool,
    ) -> tuple[Params, Slots, Any]:
        after, slots_after = self.step(weights, slots, images, targets, *_numbers(rate, t, images))
        return after, slots_after, (images, targets) if keep else None

    def back(
        self, weights: Params, slots: Slots, kept: Any, v: Params, by_slots: Slots, rate: Rate, t: Number
    ) -> StepVjp:
        images, targets = kept
        numbers = _numbers(rate, t, images)
        return StepVjp(*self.way_back(weights, slots, images, targets, v, by_slots, *numbers))


def _numbers(rate: Rate, t: Number, like: Tensor) -> tuple[Tensor, Tensor]:
    """``rate [1 or K]``, and the number of the step in float64, in which Adam's corrections are exact."""
    if not isinstance(rate, Tensor):
        rate = torch.tensor([rate], dtype=torch.float64)
    if isinstance(t, int):  # filled in on the device, as a CUDA graph asks for
        return rate.to(like), torch.full((), t, dtype=torch.float64, device=like.device)
    return rate.to(like), torch.tensor(t, dtype=torch.float64).to(like.device)


@lru_cache(maxsize=8)
def _compiled(network: nn.Module, batching: str, optimizer: InnerOptimizer, plan: ExecutionPlan) -> _Compiled:
    """Compiled once for each of these; torch compiles again for every other shape."""
    math = _math(network, batching, plan)
    eager = _Eager(math, optimizer)

    def step(weights: Params, slots: Slots, images: Tensor, targets: Tensor, rate: Tensor, t: Any) -> Any:
        return _contiguous(eager.forward(weights, slots, images, targets, rate, t, False)[:2])

    def way_back(
        weights: Params,
        slots: Slots,
        images: Tensor,
        targets: Tensor,
        v: Params,
        by_slots: Slots,
        rate: Tensor,
        t: Any,
    ) -> Any:
        kept = eager.forward(weights, slots, images, targets, rate, t, True)[2]
        back = eager.back(weights, slots, kept, v, by_slots, rate, t)
        return _contiguous((back.weights, back.slots, back.rate, back.images, back.targets))

    def loss_and_gradient(weights: Params, images: Tensor, targets: Tensor) -> Any:
        return _contiguous(math.loss_and_gradient(weights, images, targets))

    return _Compiled(_whole(step), _whole(way_back), _whole(loss_and_gradient))


def _contiguous(values: Any) -> Any:
    """All tensors in ``values`` with plain strides: torch compiles again for every other stride, also for
    that of an axis of one entry, which ``Tensor.contiguous`` does not change."""

    def plain(value: Tensor) -> Tensor:
        return value.clone(memory_format=torch.contiguous_format)

    return tree_map_only(Tensor, plain, values)


def _whole(function: Any) -> Callable[..., Any]:
    """Compiled in one piece or not at all."""
    # It gets its own code object, because torch limits how often it compiles one.
    code = function.__code__.replace()
    function = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    return torch.compile(function, fullgraph=True, dynamic=False)


# ------------------------------------------------------------------------------------ by the plan


def _math(network: nn.Module, batching: str, plan: ExecutionPlan) -> Derivatives:
    math = derivatives_of(network, batching)
    if plan.compile and isinstance(math, Autograd):
        math = Functional(network, batching)
    return math


def steps_of(network: nn.Module, optimizer: InnerOptimizer, plan: ExecutionPlan) -> Steps:
    """The inner steps by ``plan``."""
    if plan.compile:
        return _compiled(network, plan.inner_batching, optimizer, plan)
    return _Eager(_math(network, plan.inner_batching, plan), optimizer)


def loss_and_gradient_of(
    network: nn.Module, optimizer: InnerOptimizer, plan: ExecutionPlan
) -> LossAndGradient:
    """The function for losses on real images ``[K]`` and their gradients by the weights."""
    if plan.compile:
        return _compiled(network, plan.real_batching, optimizer, plan).loss_and_gradient
    return _math(network, plan.real_batching, plan).loss_and_gradient


def is_compile_error(error: Exception) -> bool:
    """Whether ``error`` says that torch could not compile a pass."""
    from torch._dynamo.exc import TorchDynamoException  # its import takes seconds

    return isinstance(error, TorchDynamoException)
