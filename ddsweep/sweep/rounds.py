"""A guided search in rounds: samples that run side by side, then the next ones, from the scores of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import Plan
from ddsweep.sweep.guide import Guide
from ddsweep.sweep.runner import Outcome

__all__ = ["run_rounds"]


def run_rounds(
    guide: Guide, directory: SweepDirectory, run: Callable[[Plan], tuple[Outcome, int]]
) -> Outcome:
    """Run the plan of ``guide``, and again with more samples, until none is left or the sweep drains.

    ``run`` runs what is missing of a plan, and returns with the outcome how many trials ran at a time. A
    round has as many, or twice as many as the last one where all of that ran at once. What has failed in a
    round is not tried again in the next.
    """
    failed: set[str] = set()
    done = 0
    while True:
        plan = guide.plan
        outcome, at_once = run(
            replace(plan, trials=tuple(t for t in plan.trials if t.trial_id not in failed))
        )
        failed |= {t.trial_id for t in plan.trials if directory.failure_part(t.trial_id).exists()}
        new, done = len(plan.trials) - done, len(plan.trials)
        if outcome.left or not guide.left:
            return replace(outcome, failed=len(failed))
        wanted = done + max(1, 2 * at_once if at_once >= new else at_once)
        while len(guide.plan.trials) < wanted and guide.propose():
            pass
