"""Placing work on the nodes of a Ray: what fits, the evaluation shards, the GPUs that a worker sees."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.compilation import check_compiler
from ddsweep.errors import UserError
from ddsweep.spec import SweepSpec
from ddsweep.sweep.prepare import eval_gpus
from ddsweep.sweep.session import RaySession

__all__ = [
    "Placement",
    "check_gpus_seen",
    "check_placement",
    "largest_request",
    "place_shards",
    "room_for",
    "side_by_side",
]

LEAST_SHARDS = 2
"""The least automatic number: one shard alone would leave work waiting when it dies."""

_TINY = 1e-9


@dataclass(frozen=True)
class Placement:
    """The evaluation shards: the part of a GPU for each, and the node of each."""

    gpus: float
    nodes: tuple[str, ...]


def check_placement(sweep: SweepSpec, trials: Sequence[TrialSpec], session: RaySession) -> Placement:
    """Place the evaluation shards. Raises `UserError` for trials or shards that can never be placed: each
    trial must fit one node, and all shards must fit beside the largest trial."""
    resources, evaluate = sweep.resources, sweep.evaluate
    check_compiler(resources.compile)
    one = " on one machine" if len(session.nodes) > 1 else ""
    needs = {resources.for_trial(trial) for trial in trials}
    if isinstance(resources.memory, float) and resources.memory * 1e9 > session.memory:
        raise UserError(
            f"resources.memory: a trial asks for {resources.memory:g} GB, but Ray found "
            f"{session.memory / 1e9:.3g}{one}; ask for less, or for auto"
        )
    for cpus, gpus in sorted(needs, reverse=True):
        if cpus > session.cpus:
            raise UserError(
                f"resources.cpus: a trial asks for {counted(cpus, 'CPU')}, but there are "
                f"{session.cpus:g}{one}; ask for less, or set resources.total_cpus to what may be used"
            )
        if gpus > session.gpus:
            raise UserError(
                f"resources.gpus: a trial asks for {counted(gpus, 'GPU')}, but Ray found "
                f"{session.gpus:g}{one}; set resources.gpus=0 to run on the CPU"
            )
        if not any(cpus <= node.cpus and gpus <= node.gpus for node in session.nodes):
            raise UserError(
                f"resources: a trial asks for {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}, and "
                "no machine has both; ask for less of one of them"
            )
    largest = max(gpus for _, gpus in needs)
    share = eval_gpus(sweep, largest)
    there = [node.gpus for node in session.nodes]
    chosen = place_shards(evaluate.shards, share, largest, there)
    if chosen is None:
        what = "not even one shard" if evaluate.shards is None else counted(evaluate.shards, "shard")
        raise UserError(
            f"evaluate: {what} of {share:g} GPU each cannot be placed beside a trial of {largest:g} on "
            f"{counted(sum(there), 'GPU')}; ask for fewer evaluate.shards, or a smaller evaluate.gpus or "
            "resources.gpus"
        )
    return Placement(share, tuple(session.nodes[i].name for i in chosen))


def largest_request(
    sweep: SweepSpec, trials: Sequence[TrialSpec], session: RaySession
) -> tuple[float, float]:
    """CPUs and GPUs that are enough for each of ``trials``: the places of a guided search are all alike.
    Raises `UserError` if no node has both."""
    cpus, gpus = map(max, zip(*map(sweep.resources.for_trial, trials), strict=True))
    if not any(cpus <= node.cpus and gpus <= node.gpus for node in session.nodes):
        raise UserError(
            "resources: the processes of a guided search take trials of every kind, so each asks for "
            f"{cpus:g} CPUs and {gpus:g} GPUs at once, and no node has that; give each kind its own sweep"
        )
    return cpus, gpus


def place_shards(
    wanted: int | None, share: float, trial: float, gpus: Sequence[float]
) -> tuple[int, ...] | None:
    """The node of each shard, where node i has ``gpus[i]`` GPUs, or None if they do not fit.

    Shards without a GPU go round the nodes. Shards with a ``share`` of a GPU go round the GPUs, unless that
    costs more than a quarter of the trials (of ``trial`` GPUs each) that could run at once; then they are
    packed on as few nodes as possible. Both ways leave room for one trial. Without a ``wanted`` number there
    is one shard for each GPU if that many fit, else one for each node, at least two.
    """
    if share == 0:
        count = max(LEAST_SHARDS, len(gpus)) if wanted is None else wanted
        return tuple(i % len(gpus) for i in range(count))
    automatic = (int(sum(gpus)), max(LEAST_SHARDS, len(gpus)), 1)
    for count in automatic if wanted is None else (wanted,):
        spread, packed = _spread(count, gpus), _packed(count, share, trial, gpus)
        beside_spread = _trials_beside(spread, share, trial, gpus)
        beside_packed = _trials_beside(packed, share, trial, gpus)
        if spread and beside_spread and beside_spread >= 0.75 * beside_packed:
            return spread
        if packed and beside_packed:
            return packed
    return None


def _spread(count: int, gpus: Sequence[float]) -> tuple[int, ...]:
    """The first GPU of every node comes before any second one; empty without GPUs."""
    order = [i for turn in range(int(max(gpus))) for i, own in enumerate(gpus) if turn < int(own)]
    return tuple(order[k % len(order)] for k in range(count)) if order else ()


def _packed(count: int, share: float, trial: float, gpus: Sequence[float]) -> tuple[int, ...]:
    """One node after the other; the first node that takes a trial comes last. Empty if they do not fit so."""
    kept = next((i for i in range(len(gpus)) if _room(0, share, trial, gpus[i])), -1)
    chosen: list[int] = []
    for i in sorted(range(len(gpus)), key=lambda i: i == kept):
        least = 1 if i == kept else 0
        while len(chosen) < count and _room(chosen.count(i) + 1, share, trial, gpus[i]) >= least:
            chosen.append(i)
    return tuple(chosen) if len(chosen) == count else ()


def _trials_beside(chosen: Sequence[int], share: float, trial: float, gpus: Sequence[float]) -> int:
    """The number of trials that fit beside shards on the nodes ``chosen``; 0 also if the shards do not
    fit."""
    rooms = [_room(chosen.count(i), share, trial, own) for i, own in enumerate(gpus)]
    return 0 if min(rooms) < 0 else sum(rooms)


def _room(shards: int, share: float, trial: float, gpus: float) -> int:
    """The number of trials that fit on a node beside ``shards``; -1 if not even the shards fit. A part never
    spans two GPUs, and Ray fills one GPU with parts before it begins the next. A trial without a GPU fits
    anywhere."""
    per_device = int((1 + _TINY) / share)
    full, rest = divmod(shards, per_device)
    free = int(gpus) - full - (rest > 0)
    if free < 0:
        return -1
    if trial == 0:
        return 1
    if trial >= 1:
        return free // int(trial)

    def parts(left: float) -> int:
        return int((left + _TINY) / trial)

    beside_rest = parts(1 - rest * share) if rest else 0
    return free * parts(1) + full * parts(1 - per_device * share) + beside_rest


def check_gpus_seen(granted: float, who: str) -> None:
    """Raises `UserError` unless this Ray worker sees exactly the GPUs that it was granted: one for a part,
    else as many as ``granted``. Otherwise all workers of a node would meet on its first GPU. It reads only
    Ray and the environment, so it works with pretended GPUs too."""
    if granted == 0:
        return
    ids = [str(number) for number in ray.get_gpu_ids()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [name.strip() for name in visible.split(",") if name.strip()] if visible is not None else None
    if seen is not None and len(seen) == max(1, int(granted)) and sorted(seen) == sorted(ids):
        return
    shown = "is not set" if visible is None else f"is {visible!r}"
    raise UserError(
        f"{who} was granted {granted:g} GPU, that is number {', '.join(ids) or 'none'} in Ray, but "
        f"CUDA_VISIBLE_DEVICES {shown}: a worker must see exactly what it was granted; leave the "
        "variable to Ray, and RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES unset on every node"
    )


def side_by_side(sweep: SweepSpec, trials: Sequence[TrialSpec], session: RaySession) -> float:
    """The greatest number of trials at a time."""
    by_cpus, by_gpus = 0.0, 0.0
    for cpus, gpus in (sweep.resources.for_trial(trial) for trial in trials):
        by_cpus = max(by_cpus, sum(node.cpus for node in session.nodes) / cpus if cpus else math.inf)
        by_gpus = max(by_gpus, sum(node.gpus for node in session.nodes) / gpus if gpus else math.inf)
    return min(len(trials), sweep.resources.max_concurrent or math.inf, by_cpus, by_gpus)


def room_for(sweep: SweepSpec, trials: Sequence[TrialSpec], session: RaySession, shards: Placement) -> int:
    """How many trials run side by side, beside the evaluation ``shards``, if each may be the dearest of
    ``trials``; at least one."""
    cpus, gpus = map(max, zip(*map(sweep.resources.for_trial, trials), strict=True))
    room = 0
    for node in session.nodes:
        own = [int(node.cpus / cpus + _TINY)] if cpus else []
        if gpus:
            beside = shards.nodes.count(node.name) if shards.gpus else 0
            own.append(max(0, _room(beside, shards.gpus or 1.0, gpus, node.gpus)))
        room += min(own, default=len(trials))
    return max(1, min(room, sweep.resources.max_concurrent or room))
