"""How a trial is computed: chosen once by a static rule, stored, and reused.

Two plans give the same result up to rounding; the same plan on the same kind of machine gives the
same bits. That is why a resumed trial takes its plan from the checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ddsweep.catalog.removed import without_removed
from ddsweep.core.native import native_logits
from ddsweep.core.own_network import traits_of, written_out
from ddsweep.errors import SettingError

__all__ = ["ExecutionPlan", "choose_plan", "more_frugal", "runnable", "smaller_test"]

SMALLEST_CHUNK = 8
"""The least number of real images at a time: fewer would take more time and save hardly any memory."""


@dataclass(frozen=True)
class ExecutionPlan:
    """``memory_mode``: ``store`` keeps all that going back through each inner step needs, ``recompute`` only
    the weights of every ``segment``-th one.

    ``inner_batching`` and ``real_batching`` say how K networks are computed on the small synthetic and on the
    large real batches: ``explicit`` (derivatives written out), or autograd under ``vmap`` or in a ``loop``.
    ``real_block`` networks and ``real_chunk`` real images go through at a time. ``threads`` is the number of
    CPU threads, ``device`` a torch device type. Without gradients, in the test pass, as many as
    ``test_block`` networks and ``test_chunk`` images go through at a time; with ``native`` by compiled code
    (`ddsweep.core.native`). The networks are dealt out to ``teams``, each with its part
    of the threads. With ``compile`` each inner step, the way back through it and the pass over real images
    are compiled (`ddsweep.core.steps`), and nothing is kept of a step but where it began. With ``graph`` a
    GPU records an outer gradient once and replays it, and the training of networks that are judged, too
    (`ddsweep.core.graphs`). With ``whole_batches`` all real images go through at once: the loss of one
    depends on the others (batch norm). On a GPU ``width`` trials are computed together, with copies of one
    where there are fewer. With ``ahead`` the draws of the next outer step are made while the device works
    (`ddsweep.core.ahead`), with the same bits."""

    device: str = "cpu"
    threads: int = 1
    memory_mode: str = "store"
    inner_batching: str = "vmap"
    real_batching: str = "loop"
    real_chunk: int = 256
    real_block: int = 1
    segment: int = 1
    test_block: int = 1
    test_chunk: int = 256
    native: bool = False
    teams: int = 1
    compile: bool = False
    graph: bool = False
    whole_batches: bool = False
    width: int = 1
    ahead: bool = False

    def __post_init__(self) -> None:
        if self.memory_mode not in ("store", "recompute"):
            raise ValueError(f"memory_mode: {self.memory_mode!r} is not one of store, recompute")
        for name in ("inner_batching", "real_batching"):
            if getattr(self, name) not in ("explicit", "vmap", "loop"):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of explicit, vmap, loop")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExecutionPlan:
        """A stored plan; without a ``test_chunk`` it took as many images in test passes as in outer steps.
        Raises `SettingError` for one that this version cannot follow."""
        kept = without_removed("plan", values, [item.name for item in fields(cls)])
        try:
            return cls(**{"test_chunk": values.get("real_chunk", cls.test_chunk)} | kept)
        except ValueError as error:
            raise SettingError(str(error)) from None


def choose_plan(
    device: torch.device,
    threads: int,
    network: nn.Module,
    *,
    networks: int = 4,
    compile: bool = False,
    graph: bool = False,
    native: bool = False,
) -> ExecutionPlan:
    """The static rule for what depends on device and network; the rest is as by default. Networks whose
    layers are written out are computed so, a few at a time on the real images of the CPU, whose cache they
    then fit: four with 32 images, one or two ``networks`` with more.
    Other networks have wide convolutions, with which the CPU is busy one network at a time, and so is a GPU
    on the many real images; the few distilled ones it takes for all networks at once. Compiled code is one
    team's, for each has modules of its own. Only CUDA has graphs: elsewhere ``graph`` has no effect. A
    ``native`` test pass needs code for the network, and a compiler; its images need not fit the cache.
    Networks of a user's own go one after another and record no graph, unless their layers are written out.
    Only a GPU leaves cores free to draw ``ahead``; a user's own code may use torch's one generator, so it is
    not run in threads."""
    own = traits_of(network)
    explicit = written_out(network) is not None
    native = native and device.type == "cpu" and native_logits(network) is not None
    how = ExecutionPlan(
        device=device.type,
        threads=threads,
        compile=compile,
        graph=graph and device.type == "cuda" and (own is None or explicit),
        whole_batches=own is not None and own.mixes,
        ahead=device.type == "cuda" and own is None,
    )
    if own is not None and not explicit:
        how = replace(how, inner_batching="loop", real_batching="loop", test_chunk=128)
        chunk = 2**31 if own.mixes else 128
        return replace(how, real_chunk=chunk, teams=threads if device.type == "cpu" else 1)
    if device.type != "cpu":
        return replace(
            how,
            inner_batching="explicit" if explicit else "vmap",
            real_batching="explicit" if explicit else "loop",
            real_chunk=1024,
            real_block=2**31,
            test_block=2**31,
            test_chunk=1024,
        )
    how = replace(how, teams=1 if compile else threads)
    if explicit:
        chunk = 32 * max(1, 4 // networks)
        return replace(
            how,
            inner_batching="explicit",
            real_batching="explicit",
            real_chunk=chunk,
            real_block=4,
            test_block=16,
            test_chunk=256 if native else chunk,
            native=native,
        )
    return replace(how, inner_batching="loop", real_batching="loop", real_chunk=128, test_chunk=128)


def runnable(plan: ExecutionPlan, network: nn.Module) -> ExecutionPlan:
    """A stored ``plan``, without compiled code if there is no compiler any more."""
    if plan.native and native_logits(network) is None:
        return replace(plan, native=False, test_chunk=plan.real_chunk)
    return plan


def more_frugal(plan: ExecutionPlan, segment: int | None, networks: int, images: int) -> ExecutionPlan | None:
    """The next leaner plan for outer steps that ran out of memory under ``plan``; None after the last one.

    First the inner steps get leaner, then the real images, then the networks that see them: ``recompute``,
    with ``segment`` (the one that takes the least memory); half the chunk of the ``images`` of a real batch,
    repeatedly; half the block of the ``networks``; at last one team instead of several. Results are equal up
    to rounding. ``segment`` None is for a method without inner steps, where networks go one by one: only the
    real images can get fewer.
    """
    if segment is None:
        fewer = max(SMALLEST_CHUNK, min(plan.real_chunk, images) // 2)
        return replace(plan, real_chunk=fewer) if fewer < min(plan.real_chunk, images) else None
    if plan.memory_mode == "store" or plan.segment != segment:
        return replace(plan, memory_mode="recompute", segment=segment)
    if (chunk := min(plan.real_chunk, images)) > SMALLEST_CHUNK and not plan.whole_batches:
        return replace(plan, real_chunk=max(SMALLEST_CHUNK, chunk // 2))
    if (block := min(plan.real_block, networks)) > 1:
        return replace(plan, real_block=block // 2)
    return replace(plan, teams=1) if plan.teams > 1 else None


def smaller_test(plan: ExecutionPlan, networks: int, images: int) -> ExecutionPlan | None:
    """The next plan for a test pass of ``networks`` over ``images`` that ran out of memory under ``plan``:
    half the images at a time, then half the networks; None after the last one."""
    if (chunk := min(plan.test_chunk, images)) > SMALLEST_CHUNK:
        return replace(plan, test_chunk=max(SMALLEST_CHUNK, chunk // 2))
    if (block := min(plan.test_block, networks)) > 1:
        return replace(plan, test_block=block // 2)
    return None
