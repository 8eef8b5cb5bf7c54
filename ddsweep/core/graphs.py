"""Work on a GPU that is recorded once as a CUDA graph and replayed with other numbers.

Starting the kernels of a small network one by one takes longer than the kernels themselves. A graph starts
all of them at once. They are the same kernels in the same order, so the results are the same.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["forget_recordings", "has_recordings", "replayed"]

MOST_KEPT = 8
"""The number of recordings of a process; each holds the memory of its work."""

_log = logging.getLogger(__name__)

Work = Callable[..., Sequence[Tensor]]


class _UnfitError(Exception):
    """Work that cannot be part of a CUDA graph."""


@cache
def _beside() -> torch.cuda.Stream:
    """One stream for all warm-ups: each stream keeps a workspace of the matrix library."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class _Recording:
    """Raises `_UnfitError`, and what ``work`` raises on its own."""

    def __init__(self, work: Work, inputs: Sequence[Tensor]) -> None:
        self.inputs = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in inputs]
        torch._foreach_copy_(self.inputs, list(inputs))
        here, beside = torch.cuda.current_stream(), _beside()
        beside.wait_stream(here)
        try:
            with torch.cuda.stream(beside):  # loads kernels, makes handles and workspaces, compiles
                work(*self.inputs)
        finally:
            here.wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may use the GPU meanwhile: that does not belong to this recording.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.outputs = list(work(*self.inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise _UnfitError(" ".join(str(error).split())[:200]) from error
        finally:
            torch.cuda.set_stream(here)  # torch leaves the state of a failed recording

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return [value.clone() for value in self.outputs]


_recordings: OrderedDict[Hashable, _Recording | None] = OrderedDict()
"""None for work that cannot be recorded."""


def replayed(what: Hashable, work: Work, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``work(*inputs)``, recorded when ``what`` is asked for with inputs of these shapes for the first time.

    ``work`` takes all that changes from call to call as a tensor, has no choice that depends on their values,
    and does not move tensors between devices. If it cannot be recorded, it is done without a recording.
    """
    key = (what, tuple((value.shape, value.dtype, value.device) for value in inputs))
    if key not in _recordings:
        while len(_recordings) >= MOST_KEPT:
            _recordings.popitem(last=False)
        _recordings[key] = _record(work, inputs)
    _recordings.move_to_end(key)
    recording = _recordings[key]
    return list(work(*inputs)) if recording is None else recording.replay(inputs)


def _record(work: Work, inputs: Sequence[Tensor]) -> _Recording | None:
    """If memory runs out, it is tried again without the earlier recordings."""
    try:
        return _Recording(work, inputs)
    except torch.OutOfMemoryError:
        if not _recordings:
            raise
    except _UnfitError as error:
        _log.warning("no CUDA graph could be recorded, kernels are started one by one: %s", error)
        return None
    forget_recordings()  # not earlier: the error held the allocated memory
    torch.cuda.empty_cache()
    return _record(work, inputs)


def has_recordings() -> bool:
    """Whether there are any recordings, which hold memory."""
    return any(recording is not None for recording in _recordings.values())


def forget_recordings() -> None:
    """Drop all recordings, and free their memory."""
    _recordings.clear()
