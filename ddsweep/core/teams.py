"""Deals networks out to teams of CPU threads, which work side by side.

Threads inside of one operation wait for each other at its end, and the operations of a small network are
short. Networks do not mix, so each team can take some of them from the first step to the last
(docs/performance.md has the gain).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import nn

from ddsweep.core.execution import ExecutionPlan

__all__ = ["in_teams"]

T = TypeVar("T")


def in_teams(
    plan: ExecutionPlan, network: nn.Module, count: int, work: Callable[[nn.Module, slice], T]
) -> list[T]:
    """``work(network, share)`` for consecutive shares of ``count`` networks, one share a team of ``plan``, in
    order. The result does not depend on which team is faster.

    Each team has a ``network`` of its own (with the same tensors): ``torch.func.functional_call`` puts
    the weights of a call into the module while it lasts.
    """
    teams = min(plan.teams, count)
    if teams <= 1:
        return [work(network, slice(0, count))]
    ends = [count * i // teams for i in range(teams + 1)]
    grad = torch.is_grad_enabled()  # set for each thread

    def as_here(module: nn.Module, share: slice) -> T:
        with torch.set_grad_enabled(grad):
            return work(module, share)

    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    modules = [copy.deepcopy(network, dict(tensors)) for _ in range(teams)]
    threads = _threads(plan.teams, plan.threads // plan.teams)
    return list(threads.map(as_here, modules, [slice(*pair) for pair in pairwise(ends)]))


@cache
def _threads(teams: int, threads: int) -> ThreadPoolExecutor:
    """torch's number of threads is set for each Python thread, once it has begun."""
    return ThreadPoolExecutor(teams, "team", torch.set_num_threads, (threads,))
