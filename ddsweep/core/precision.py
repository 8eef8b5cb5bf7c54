"""The type of a trial's numbers, and products in full float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["products", "stored_dtype"]


def stored_dtype(setting: str) -> torch.dtype:
    """The type in which images, weights and rates of a trial with this ``dtype`` are stored."""
    return torch.float64 if setting == "float64" else torch.float32


@contextmanager
def products(device: str) -> Iterator[None]:
    """Products and convolutions of float32 tensors on a GPU are taken in float32 (torch's default would take
    convolutions in TF32, which spoils gradients: docs/performance.md), and in an order that is always the
    same, so that a resumed trial ends with the same bits. Afterwards the earlier setting is back. It has no
    effect on other devices."""
    if device != "cuda":
        yield
        return
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [flag.fp32_precision for flag in flags]
    any_order = torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = True
        for flag in flags:
            flag.fp32_precision = "ieee"
        yield
    finally:
        torch.backends.cudnn.deterministic = any_order
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value
