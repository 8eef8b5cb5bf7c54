"""Devices that have no memory left, or answer no more: noticing it, freeing memory, keeping to a part."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from ddsweep.core.graphs import forget_recordings, has_recordings

__all__ = ["end_without_gpu", "fitted", "is_out_of_memory", "keep_to_share", "release_memory"]

T = TypeVar("T")

_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Texts of torch's errors without a class of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the GPU, or this machine, ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def end_without_gpu(error: BaseException) -> None:
    """End this process if its GPU answers no more: after an illegal access, say, or a fault of the hardware,
    every later call of the process fails, and it would spoil all work that it is given. Another process takes
    its place. ``error`` is what was raised; it is printed."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except Exception as lost:
        if is_out_of_memory(lost):
            return
        traceback.print_exception(error)
        print(f"the GPU of this process answers no more ({lost}): it ends", file=sys.stderr, flush=True)
        os._exit(1)


def fitted(work: Callable[[], T], shrink: Callable[[Exception], bool]) -> T:
    """``work()``; where it runs out of memory, once more with the memory that recordings held, and then as
    often as ``shrink`` has made it smaller. ``shrink`` is told the error, and returns whether there was
    anything left to make smaller; if not, the error goes on (or another one that ``shrink`` raises)."""
    freed = False  # once for each size: ``work`` may make recordings of its own
    while True:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            freed = not freed and has_recordings()
            if not freed and not shrink(error):
                raise
        release_memory()  # not earlier: the error held the allocated memory


def release_memory() -> None:
    """Free unused memory, recorded graphs and torch's cache of GPU memory. It has no effect while the error
    is handled: its traceback holds the tensors."""
    forget_recordings()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def keep_to_share(device: str, gpus: float) -> None:
    """On CUDA, limit this process to the granted part of the GPU's memory; whole GPUs, or no grant (0), mean
    all of it. This replaces an earlier limit."""
    if device == "cuda":
        release_memory()
        torch.cuda.set_per_process_memory_fraction(gpus if 0 < gpus < 1 else 1.0)
