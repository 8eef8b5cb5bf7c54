"""Work on a GPU recorded once and replayed with other numbers, as a CUDA graph.

The kernels of a small network take less time than starting them one by one does. A graph starts all of
them at once. They are the same kernels in the same order, so what comes out is the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

__all__ = ["RecordingError", "forget_recordings", "replayed"]

MOST_KEPT = 8
"""Recordings of a process; each holds the memory of what it records."""


class RecordingError(RuntimeError):
    """Some operation cannot be part of a CUDA graph."""


class _Recording:
    def __init__(self, work: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self.inputs = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in inputs]
        torch._foreach_copy_(self.inputs, list(inputs))
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        here = torch.cuda.current_stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):  # loads kernels, makes handles and workspaces, compiles
            work(*self.inputs)
        here.wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Another thread may use the GPU meanwhile: that is none of this recording.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.outputs = list(work(*self.inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # torch leaves that of a recording that failed
            raise RecordingError(f"no CUDA graph could be recorded: {error}") from error

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, list(inputs))
        self.graph.replay()
        return [value.clone() for value in self.outputs]


_recordings: OrderedDict[Hashable, _Recording] = OrderedDict()


def replayed(what: Hashable, work: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``work(*inputs)``, recorded when ``what`` is asked for with inputs of these shapes for the first time.

    ``work`` takes all that changes from call to call as a tensor, has no choice that depends on their values,
    and does not move tensors between devices. Raises `RecordingError` if it cannot be recorded.
    """
    key = (what, tuple((value.shape, value.dtype, value.device) for value in inputs))
    recording = _recordings.get(key)
    if recording is None:
        while len(_recordings) >= MOST_KEPT:
            _recordings.popitem(last=False)
        recording = _recordings[key] = _Recording(work, inputs)
    _recordings.move_to_end(key)
    return recording.replay(inputs)


def forget_recordings() -> None:
    """Let go of all of them, and of their memory."""
    _recordings.clear()
