"""``resources: auto``: how many CPUs and how much of a GPU each trial gets, measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.packing import best, measured
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import SweepSpec
from ddsweep.sweep.observe import Board
from ddsweep.sweep.prepare import eval_gpus, trial_settings
from ddsweep.sweep.session import RaySession

__all__ = ["with_measured_resources"]


def with_measured_resources(
    sweep: SweepSpec,
    trials: Sequence[TrialSpec],
    session: RaySession,
    directory: SweepDirectory,
    board: Board,
    seconds: Mapping[str, float],
) -> SweepSpec:
    """``sweep`` with numbers for ``auto``: those with the most steps of the costliest trial (by estimate) on
    this machine."""
    resources = sweep.resources
    by_hand = resources.cpus if isinstance(resources.cpus, float) else None
    gpus = 0.0 if resources.gpus != "auto" or resources.device == "cpu" else session.gpus
    if not trials:  # only evaluations are left, which go where trials would
        return _with_resources(sweep, by_hand or 1.0, min(gpus, 0.5))
    costliest = max(trials, key=lambda trial: seconds[trial.trial_id])
    most = min(len(trials), resources.max_concurrent or len(trials))
    board.say(f"resources: auto: measuring trial {costliest.trial_id} side by side with copies of itself")
    found = measured(
        costliest,
        trial_settings(sweep, costliest),
        int(session.cpus),
        gpus,
        most,
        directory,
        eval_gpus(sweep, gpus),
    )
    chosen = best(found)
    for packed in found:
        board.say(
            f"  {packed.count} at a time, {counted(packed.cpus, 'CPU')} and {counted(packed.gpus, 'GPU')} "
            f"each: {packed.steps_per_second * 3600:,.0f} outer steps an hour"
            f"{' (chosen)' if packed is chosen else ''}"
        )
    return _with_resources(sweep, by_hand or chosen.cpus, chosen.gpus)


def _with_resources(sweep: SweepSpec, cpus: float, gpus: float) -> SweepSpec:
    return sweep.model_copy(
        update={"resources": sweep.resources.model_copy(update={"cpus": cpus, "gpus": gpus})}
    )
