"""How a trial is computed, as opposed to what: chosen once by a static rule, stored, and reused.

Two plans give the same result up to rounding; the same plan on the same kind of machine gives the
same bits. That is why a resumed trial takes its plan from the checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["ExecutionPlan", "choose_plan"]


@dataclass(frozen=True)
class ExecutionPlan:
    """``memory_mode``: ``store`` keeps the graph of every inner step, ``recompute`` only its parameters.

    ``inner_batching`` and ``real_batching`` say how K networks are computed (``vmap`` or ``loop``) on the
    small synthetic and on the large real batches; ``real_chunk`` images of a real batch go through at a
    time. ``threads`` is the number of CPU threads, ``device`` a torch device type.
    """

    device: str = "cpu"
    threads: int = 1
    memory_mode: str = "store"
    inner_batching: str = "vmap"
    real_batching: str = "loop"
    real_chunk: int = 256

    def __post_init__(self) -> None:
        if self.memory_mode not in ("store", "recompute"):
            raise ValueError(f"memory_mode: {self.memory_mode!r} is not one of store, recompute")
        for name in ("inner_batching", "real_batching"):
            if getattr(self, name) not in ("vmap", "loop"):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of vmap, loop")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExecutionPlan:
        return cls(**values)


def choose_plan(device: torch.device, threads: int, memory_mode: str = "auto") -> ExecutionPlan:
    """The static rule. On the CPU the small inner batches run as one vmapped computation and the large
    real batches network by network in chunks that fit the cache; a GPU takes both at once."""
    if memory_mode == "auto":
        memory_mode = "store"
    if device.type == "cuda":
        return ExecutionPlan("cuda", threads, memory_mode, "vmap", "vmap", 1024)
    return ExecutionPlan("cpu", threads, memory_mode)
