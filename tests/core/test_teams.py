"""Teams of threads: who does which share, and in which order the parts come back."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.teams import in_teams


@pytest.mark.parametrize(("teams", "count", "shares"), [(2, 5, [(0, 2), (2, 5)]), (4, 2, [(0, 1), (1, 2)])])
def test_each_team_does_a_share_in_a_thread_and_with_a_module_of_its_own(
    teams: int, count: int, shares: list[tuple[int, int]]
) -> None:
    network, barrier = nn.Linear(2, 2), threading.Barrier(len(shares))

    def work(module: nn.Module, share: slice) -> tuple[str, int, tuple[int, int], bool]:
        barrier.wait(60)  # all of them are at work at once
        time.sleep(0.05 * (count - share.stop))  # the last share is done first
        own = module.weight is network.weight and module is not network
        return threading.current_thread().name, id(module), (share.start, share.stop), own

    plan = ExecutionPlan(threads=teams, teams=teams)
    with torch.no_grad():
        found = in_teams(plan, network, count, work)
    names, modules, done, own = zip(*found, strict=True)
    assert list(done) == shares
    assert all(name.startswith("team") for name in names) and len(set(names)) == len(shares)
    assert len(set(modules)) == len(shares) and all(own)


def test_one_team_works_where_it_is_called() -> None:
    network = nn.Linear(2, 2)
    plan = replace(ExecutionPlan(), threads=4)

    def work(module: nn.Module, share: slice) -> tuple[bool, bool, slice]:
        return module is network, threading.current_thread() is threading.main_thread(), share

    assert in_teams(plan, network, 3, work) == [(True, True, slice(0, 3))]


@pytest.mark.parametrize("grad", [True, False])
def test_teams_note_down_for_autograd_what_their_caller_does(grad: bool) -> None:
    plan = ExecutionPlan(threads=2, teams=2)
    with torch.set_grad_enabled(grad):
        found = in_teams(plan, nn.Linear(2, 2), 2, lambda module, share: torch.is_grad_enabled())
    assert found == [grad, grad]
