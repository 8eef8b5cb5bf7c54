"""The precision of products: full, TF32, or bfloat16.

The setting ``dtype`` of a trial is ``float64``, ``float32`` (products in full float32: torch's own default
would take convolutions of a GPU in TF32), ``tf32`` (float32 whose products round their factors to 10 bits of
mantissa on the GPU), or ``bf16``: weights, updates, sums over real images and everything outside of a pass in
float32, each forward, backward and tangent pass in bfloat16. docs/performance.md shows the effect on
gradients. Distilled sets are always judged in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddsweep.core.derivatives import Derivatives, GradientVjp
from ddsweep.core.networks import Params

__all__ = ["in_precision", "precision_of", "products", "stored_dtype"]


def stored_dtype(setting: str) -> torch.dtype:
    """The type in which images, weights and rates of a trial with this ``dtype`` are stored."""
    return torch.float64 if setting == "float64" else torch.float32


def precision_of(setting: str) -> str:
    """Its name in an execution plan: ``full``, ``tf32`` or ``bf16``."""
    return setting if setting in ("tf32", "bf16") else "full"


def in_precision(math: Derivatives, precision: str) -> Derivatives:
    """``math`` in the precision of a plan; `products` handles TF32."""
    return _InBfloat16(math) if precision == "bf16" else math


@contextmanager
def products(device: str, precision: str = "full") -> Iterator[None]:
    """Sets products and convolutions of float32 tensors on a GPU: in TF32 or exact (torch's default is not
    exact), and in an order that is always the same, so that a resumed trial ends with the same bits.
    Afterwards the earlier setting is back. It has no effect on other devices."""
    if device != "cuda":
        yield
        return
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [flag.fp32_precision for flag in flags]
    any_order = torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = True
        for flag in flags:
            flag.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        torch.backends.cudnn.deterministic = any_order
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def _low(values: Params) -> Params:
    return {name: value.bfloat16() for name, value in values.items()}


def _like(values: Params, params: Params) -> Params:
    return {name: value.to(params[name].dtype) for name, value in values.items()}


@dataclass(frozen=True)
class _InBfloat16:
    """``math`` in bfloat16: inputs are rounded, and outputs have the type of the weights."""

    math: Derivatives

    def logits(self, params: Params, images: Tensor) -> Tensor:
        weight = next(iter(params.values()))
        return self.math.logits(_low(params), images.bfloat16()).to(weight.dtype)

    def gradient(self, params: Params, images: Tensor, targets: Tensor, keep: bool) -> tuple[Params, Any]:
        found, kept = self.math.gradient(_low(params), images.bfloat16(), _targets(targets), keep)
        return _like(found, params), kept

    def vjp(self, params: Params, kept: Any, v: Params) -> GradientVjp:
        pulled = self.math.vjp(_low(params), kept, _low(v))
        dtype = next(iter(params.values())).dtype
        targets = None if pulled.targets is None else pulled.targets.to(dtype)
        return GradientVjp(_like(pulled.weights, params), pulled.images.to(dtype), targets)

    def loss_and_gradient(self, params: Params, images: Tensor, targets: Tensor) -> tuple[Tensor, Params]:
        losses, found = self.math.loss_and_gradient(_low(params), images.bfloat16(), _targets(targets))
        return losses.to(next(iter(params.values())).dtype), _like(found, params)


def _targets(targets: Tensor) -> Tensor:
    return targets.bfloat16() if targets.is_floating_point() else targets
