"""Draws of the next outer step, made in threads while the device works on this one; and the way of what was
drawn to the device, without waiting for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Ahead", "pinned", "sent"]

T = TypeVar("T")


class Ahead:
    """The draws of a trial for one step ahead, no more. Each is a function of (trial, what, step) alone, so
    it is the same in any thread and at any time. One that is not asked for is dropped: the trial went back,
    or ended. An error of a draw is raised where its result is used.

    ``network`` is a copy of the trial's module, for the threads: ``torch.func.functional_call`` puts the
    weights of a call into the module while it lasts.
    """

    def __init__(self, network: nn.Module, threads: int, steps: int) -> None:
        """For a trial of so many outer ``steps``; all trials of a process share the ``threads``."""
        tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        self.network = copy.deepcopy(network, tensors)
        self._threads, self._steps = threads, steps
        self._waiting: dict[str, tuple[int, Future[Any]]] = {}

    def drawn(self, what: str, step: int, draw: Callable[[int], T]) -> T:
        """``draw(step)``, made before if the last step that was asked for is the one before; and
        ``draw(step + 1)`` begins."""
        of, future = self._waiting.get(what, (None, None))
        if of == step and future is not None:
            del self._waiting[what]
            self._begin(what, step + 1, draw)
            return future.result()  # type: ignore[no-any-return]
        if of != step + 1:  # it is the next one if a step is taken again
            if future is not None:
                future.cancel()
            self._waiting.pop(what, None)
            self._begin(what, step + 1, draw)
        return draw(step)

    def _begin(self, what: str, step: int, draw: Callable[[int], Any]) -> None:
        if step < self._steps:
            self._waiting[what] = step, _pool(self._threads).submit(draw, step)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """As many threads as torch has in the trial. Each has torch's number itself, because the bits of a QR
    decomposition (``init_law: orthogonal``) depend on it; all other draws use one."""
    return ThreadPoolExecutor(threads, "draw", torch.set_num_threads, (threads,))


def pinned(value: Tensor, device: torch.device) -> Tensor:
    """``value`` in memory that CUDA copies from while the host goes on; for other devices as it is."""
    return value.pin_memory() if device.type == "cuda" and not value.is_pinned() else value


def sent(value: Tensor, device: torch.device) -> Tensor:
    """``value`` of the CPU on ``device``. The host does not wait until it is there; what the device does next
    does."""
    if value.device == device or value.device.type != "cpu":
        return value.to(device)
    return pinned(value, device).to(device, non_blocking=True)
