"""A guided search in rounds: samples that run side by side, then the next ones, from the scores of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import ray

from ddsweep.catalog import TrialSpec
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import Plan, SweepSpec
from ddsweep.sweep.guide import Guide
from ddsweep.sweep.runner import Outcome

__all__ = ["room_for", "room_of_ray", "run_rounds"]


def run_rounds(
    guide: Guide, directory: SweepDirectory, run: Callable[[Plan], tuple[Outcome, int]]
) -> Outcome:
    """Run the plan of ``guide``, and again with more samples, until none is left or the sweep drains.

    ``run`` runs what is missing of a plan, and returns with the outcome how many trials run side by side,
    which is the number of new ones in the next round; 0 if that is not known. What has failed in a round is
    not tried again in the next.
    """
    failed: set[str] = set()
    while True:
        plan = guide.plan
        others = tuple(trial for trial in plan.trials if trial.trial_id not in failed)
        outcome, side_by_side = run(replace(plan, trials=others))
        failed |= {t.trial_id for t in plan.trials if directory.failure_part(t.trial_id).exists()}
        if outcome.left or not guide.left:
            return replace(outcome, failed=len(failed))
        wanted = len(plan.trials) + max(1, side_by_side)
        while len(guide.plan.trials) < wanted and guide.propose():
            pass


def room_of_ray(sweep: SweepSpec, trials: Sequence[TrialSpec]) -> int:
    """How many of the trials run side by side on the Ray that is joined; 0 if none is."""
    return room_for(sweep, trials, ray.cluster_resources()) if ray.is_initialized() else 0


def room_for(sweep: SweepSpec, trials: Sequence[TrialSpec], there: Mapping[str, float]) -> int:
    """How many of the dearest of ``trials`` fit beside each other, by the CPUs and GPUs that are there."""
    asked = [sweep.resources.for_trial(trial) for trial in trials]
    dearest = zip(("CPU", "GPU"), map(max, zip(*asked, strict=True)), strict=True)
    room = [there.get(key, 0.0) / amount for key, amount in dearest if amount]
    if sweep.resources.max_concurrent:
        room.append(sweep.resources.max_concurrent)
    return math.floor(min(room, default=len(trials)) + 1e-9)
