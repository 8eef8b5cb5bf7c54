"""A device that runs out of memory: how that shows, and how to give back and keep to a part of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ddsweep.core.graphs import forget_recordings, has_recordings

__all__ = ["fitted", "is_out_of_memory", "keep_to_share", "release_memory"]

T = TypeVar("T")

_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""How torch says so in errors of no class of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the GPU, or this machine, had no memory left to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def fitted(work: Callable[[], T], shrink: Callable[[Exception], bool]) -> T:
    """``work()``; where it runs out of memory, once more with the memory that recordings held, and then as
    often as ``shrink`` has made it smaller. ``shrink`` is told the error, and returns whether there was
    anything left to make smaller; if not, the error goes on (or another one that ``shrink`` raises)."""
    while True:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error) or not (has_recordings() or shrink(error)):
                raise
        release_memory()  # not before: the error held what had been allocated


def release_memory() -> None:
    """Give back what nobody holds any more, with recorded graphs and torch's cache of freed GPU memory. Of no
    use while the error is being handled: its traceback holds the tensors."""
    forget_recordings()
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def keep_to_share(device: str, gpus: float) -> None:
    """On CUDA, let this process allocate the granted part of the GPU's memory and no more; all of it where
    whole GPUs were granted, or nobody grants any (0). Undoes what was set before."""
    if device == "cuda":
        release_memory()
        torch.cuda.set_per_process_memory_fraction(gpus if 0 < gpus < 1 else 1.0)
