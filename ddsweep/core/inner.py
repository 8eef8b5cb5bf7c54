"""Inner optimisers, each with the exact derivative of its update.

One step turns weights w, the optimiser's own state and the gradient g into new weights and state. Going
back, a derivative by the new ones becomes a derivative by the old ones, by g and by the rate. With
rate r and v = dL/dw':

    gd         w' = w - r g
    momentum   u' = mu u + g,  w' = w - r u'                                  (heavy ball, as torch's SGD)
    adam       m' = b1 m + (1-b1) g,  s' = b2 s + (1-b2) g^2,
               w' = w - r m^ / sqrt(s^ + eps^2)  with  m^ = m'/(1-b1^t), s^ = s'/(1-b2^t), t from 1

With weight decay d, g is the gradient plus d w (as in torch's SGD and Adam). A set can be applied so; there
is no way back through it.

Adam (Kingma and Ba 2015) has its epsilon inside the root: outside, the derivative does not exist at s = 0,
which dead units have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddsweep.core.layers import Params

__all__ = ["InnerOptimizer", "Number", "Rate", "Slots", "UpdateVjp", "added"]

Rate = float | Tensor
"""One for all networks, or ``[K]``, one for each."""

Number = int | tuple[int, ...]
"""The number of a step, from 0: the same for all networks, or K numbers, one for each."""

Slots = tuple[Params, ...]
"""The optimiser's own state: empty for gd, (u,) for momentum, (m, s) for adam."""


@dataclass(frozen=True)
class UpdateVjp:
    """Derivatives by g, by the slots before, and by the rate ``[K]`` of one update. The derivative by the
    weights before the update is v plus the part through g."""

    gradient: Params
    slots: Slots
    rate: Tensor


def _per_network(rate: Rate, like: Tensor) -> Rate:
    return rate.view(-1, *[1] * (like.dim() - 1)) if isinstance(rate, Tensor) else rate


def _part_seen(decay: float, step: Number, like: Tensor) -> Rate:
    """``1 - decay^(step + 1)``: Adam's corrections of moments that began at zero."""
    if isinstance(step, tuple):
        return _per_network(like.new_tensor([1 - decay ** (t + 1) for t in step]), like)
    return 1 - decay ** (step + 1)


def _scaled(values: Params, rate: Rate) -> Params:
    """``rate`` times ``values``, each network's by its own."""
    if isinstance(rate, Tensor):
        if rate.numel() > 1:
            return {n: _per_network(rate, value) * value for n, value in values.items()}
        rate = rate.view(())
    return dict(zip(values, torch._foreach_mul(list(values.values()), rate), strict=True))


def added(left: Params, right: Params) -> Params:
    """``left + right``."""
    total = torch._foreach_add(list(left.values()), [right[n] for n in left])
    return dict(zip(left, total, strict=True))


def _dot(left: Params, right: Params) -> Tensor:
    """Inner product of each network, ``[K]``."""
    if next(iter(left.values())).is_cuda:  # four kernels, not one and more for each tensor
        a, b = (torch.cat([_flat(side[n]) for n in left], 1) for side in (left, right))
        return (a * b).sum(1)
    # Not a product of matrices: it sums in another order for one network than for several.
    return torch.stack([_flat(left[n] * right[n]).sum(1) for n in left], 1).sum(1)


def _flat(values: Tensor) -> Tensor:
    """``[K, ...]`` as ``[K, values]``; a parameter may be a single number."""
    return values.reshape(values.shape[0], -1)


@dataclass(frozen=True)
class InnerOptimizer:
    """``kind`` is gd, momentum or adam; ``momentum`` is mu. Of Adam, betas are (.9, .999), epsilon 1e-8."""

    kind: str = "gd"
    momentum: float = 0.9
    weight_decay: float = 0.0

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def start(self, params: Params) -> Slots:
        """Slots before the first step: zeros."""
        count = {"gd": 0, "momentum": 1, "adam": 2}[self.kind]
        return tuple({n: torch.zeros_like(w) for n, w in params.items()} for _ in range(count))

    def update(
        self, params: Params, slots: Slots, gradient: Params, rate: Rate, step: Number
    ) -> tuple[Params, Slots]:
        """Weights and slots after step ``step``."""
        if self.weight_decay:
            gradient = {n: gradient[n] + self.weight_decay * w for n, w in params.items()}
        slots = self._slots_after(slots, gradient)
        directions = {n: self._direction(n, slots, gradient, step) for n in params}
        moved = _scaled(directions, rate)
        after = torch._foreach_sub(list(params.values()), list(moved.values()))
        return dict(zip(params, after, strict=True)), slots

    def _slots_after(self, slots: Slots, gradient: Params) -> Slots:
        if self.kind == "gd":
            return ()
        if self.kind == "momentum":
            return ({n: self.momentum * slots[0][n] + g for n, g in gradient.items()},)
        a, b = self.BETAS
        m, s = slots
        return (
            {n: a * m[n] + (1 - a) * g for n, g in gradient.items()},
            {n: b * s[n] + (1 - b) * g * g for n, g in gradient.items()},
        )

    def _direction(self, name: str, slots: Slots, gradient: Params, step: Number) -> Tensor:
        """The factor of the rate; ``slots`` are those after the step."""
        if self.kind == "gd":
            return gradient[name]
        if self.kind == "momentum":
            return slots[0][name]
        m, root = self._moments(name, slots, step)
        return m / root

    def _moments(self, name: str, slots: Slots, step: Number) -> tuple[Tensor, Tensor]:
        a, b = self.BETAS
        m, s = slots[0][name], slots[1][name]
        return m / _part_seen(a, step, m), (s / _part_seen(b, step, s) + self.EPSILON**2).sqrt()

    def vjp(
        self, v: Params, by_slots: Slots, slots: Slots, gradient: Params, rate: Rate, step: Number
    ) -> UpdateVjp:
        """Back through one update. ``v`` and ``by_slots``: derivatives by weights and slots after the
        step; ``slots`` those before it. Raises ``ValueError`` with weight decay."""
        if self.weight_decay:
            raise ValueError("weight_decay: there is no way back through a step with weight decay")
        if self.kind == "gd":
            return UpdateVjp(_scaled(v, -rate), (), -_dot(v, gradient))
        after = self._slots_after(slots, gradient)
        if self.kind == "momentum":
            by_gradient = {n: by_slots[0][n] - _per_network(rate, a) * a for n, a in v.items()}
            before = {n: self.momentum * a for n, a in by_gradient.items()}
            return UpdateVjp(by_gradient, (before,), -_dot(v, after[0]))
        return self._vjp_adam(v, by_slots, after, gradient, rate, step)

    def _vjp_adam(
        self, v: Params, by_slots: Slots, after: Slots, gradient: Params, rate: Rate, step: Number
    ) -> UpdateVjp:
        a, b = self.BETAS
        by_m, by_s, by_gradient, directions = {}, {}, {}, {}
        for n, along in v.items():
            m, root = self._moments(n, after, step)
            moved = _per_network(rate, along) * along
            directions[n] = m / root
            m_after = by_slots[0][n] - moved / (root * _part_seen(a, step, m))
            s_after = by_slots[1][n] + 0.5 * moved * m / (root**3 * _part_seen(b, step, m))
            by_gradient[n] = (1 - a) * m_after + 2 * (1 - b) * gradient[n] * s_after
            by_m[n], by_s[n] = a * m_after, b * s_after
        return UpdateVjp(by_gradient, (by_m, by_s), -_dot(v, directions))
