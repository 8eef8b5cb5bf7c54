"""``resources: auto``: how many CPUs and how much of a GPU a process gets, and how many trials it distils
together, measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.cohorts import NETWORKS, NETWORKS_GPU, WIDEST, cohort_sizes
from ddsweep.packing import Packed, Room, best, measured
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
    further: int = 0,
) -> tuple[SweepSpec, int | None]:
    """``sweep`` with numbers for ``auto``: those with the most steps of the costliest trial (by estimate) on
    this machine; and the number of networks side by side that keep a process busy, if that was measured. A
    search may add ``further`` trials."""
    resources = sweep.resources
    by_hand = resources.cpus if isinstance(resources.cpus, float) else None
    gpus = 0.0 if resources.gpus != "auto" or resources.device == "cpu" else session.gpus
    if not trials:  # only evaluations are left, which go where trials would
        return _with_resources(sweep, by_hand or 1.0, min(gpus, 0.5)), None
    costliest = max(trials, key=lambda trial: seconds[trial.trial_id])
    count = len(trials) + further
    most = min(count, resources.max_concurrent or count)
    sizes = cohort_sizes(
        trials,
        resources.cohort,
        compile=resources.compile,
        gpus=[gpus] * len(trials),
        memory_mode=resources.memory_mode,
        segment=resources.segment,
        networks=WIDEST,
    )
    board.say(f"resources: auto: measuring trial {costliest.trial_id} beside copies of itself")
    together, fixed = min(sizes[costliest.trial_id], most), resources.cohort != "auto"
    room = Room(int(session.cpus), gpus, most, eval_gpus(sweep, gpus), together, fixed, session.memory)
    found = measured(costliest, trial_settings(sweep, costliest), room, directory)
    chosen = best(found)
    for packed in found:
        board.say(f"  {_said(packed)}{' (chosen)' if packed is chosen else ''}")
    sweep = _with_resources(sweep, by_hand or chosen.cpus, chosen.gpus)
    if room.together == 1 or room.fixed:
        return sweep, None
    networks = chosen.together * costliest.models_per_step
    # With more trials of this shape it might have been more.
    least = (NETWORKS_GPU if gpus else NETWORKS) if chosen.together == room.together else 0
    return sweep, max(networks, least)


def _said(packed: Packed) -> str:
    each = f"{counted(packed.cpus, 'CPU')} and {counted(packed.gpus, 'GPU')} each"
    together = f", {packed.together} trials together in each" if packed.together > 1 else ""
    hourly = f"{packed.steps_per_second * 3600:,.0f} outer steps an hour"
    return f"{counted(packed.count, 'process', 'processes')} at a time, {each}{together}: {hourly}"


def _with_resources(sweep: SweepSpec, cpus: float, gpus: float) -> SweepSpec:
    return sweep.model_copy(
        update={"resources": sweep.resources.model_copy(update={"cpus": cpus, "gpus": gpus})}
    )
