"""One outer step of one trial, or of several together, in the memory there is."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ddsweep.catalog import TrialSpec
from ddsweep.cohorts import cohort_key
from ddsweep.core.distill import StepReport, applied, gradients_together, outer_step
from ddsweep.core.execution import ExecutionPlan, more_frugal
from ddsweep.core.memory import fitted, is_out_of_memory, release_memory
from ddsweep.core.outer import DistillState
from ddsweep.core.steps import is_compile_error
from ddsweep.core.task import Task
from ddsweep.cost import choose_memory, estimate
from ddsweep.errors import DivergedError, TooLargeError, UserError
from ddsweep.trial.run_state import RunState

if TYPE_CHECKING:
    from ddsweep.trial.running import RunningTrial

__all__ = ["step_in_memory", "steps_together"]

_log = logging.getLogger(__name__)


def steps_together(trials: Sequence[RunningTrial]) -> list[StepReport | Exception]:
    """An outer step of each of ``trials``: its report, or the `DivergedError` or `UserError` that it ended
    with.

    Trials with equal plans, of one shape, are computed together, on a GPU as many as the ``width`` of their
    plan at a time. If memory runs out, half of them are tried at a time, and only a trial that is alone gets
    a plan that is leaner otherwise: the number of companions changes no bits.
    """
    found: dict[int, StepReport | Exception] = {}
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, trial in enumerate(trials):
        key, plan = cohort_key(trial.spec), trial.run.plan
        if key is None or plan.compile or plan.inner_batching != "explicit":
            found[place] = _step_alone(trial)
        else:
            # Training parts differ in size where `validation_fraction` does, and a small one is taken whole.
            groups[key, plan, min(trial.spec.real_batch, len(trial.task.real))].append(place)
    for places in groups.values():
        reports = _steps_of_one_shape([trials[place] for place in places])
        found |= dict(zip(places, reports, strict=True))
    return [found[place] for place in range(len(trials))]


def _steps_of_one_shape(trials: Sequence[RunningTrial]) -> list[StepReport | Exception]:
    plan = trials[0].run.plan
    most = len(trials) if plan.device == "cpu" and plan.width == 1 else plan.width
    if len(trials) > most:
        return _so_many_at_a_time(trials, most)
    if most == 1:
        return [_step_alone(trials[0])]

    def work() -> list[tuple[DistillState, StepReport] | DivergedError]:
        tasks, states = [trial.task for trial in trials], [trial.run.state for trial in trials]
        return applied(tasks, states, gradients_together(tasks, states))

    try:
        outcomes = fitted(work, lambda error: False)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return [_reported(trial, outcome) for trial, outcome in zip(trials, outcomes, strict=True)]
    release_memory()  # not earlier: the error held the memory of the step
    half = (most + 1) // 2
    if plan.width > 1:  # copies up to it would take as much memory again
        for trial in trials:
            _narrow(trial, half)
    return _so_many_at_a_time(trials, half)


def _so_many_at_a_time(trials: Sequence[RunningTrial], most: int) -> list[StepReport | Exception]:
    parts = [trials[first : first + most] for first in range(0, len(trials), most)]
    return [report for part in parts for report in _steps_of_one_shape(part)]


def _narrow(trial: RunningTrial, width: int) -> None:
    """``trial`` with a plan of another ``width``, which is checkpointed at once, as in `step_in_memory`."""
    run = trial.run
    run.plan, run.n_replans = replace(run.plan, width=width), run.n_replans + 1
    trial.task = replace(trial.task, plan=run.plan)
    trial.save()


def _reported(
    trial: RunningTrial, outcome: tuple[DistillState, StepReport] | DivergedError
) -> StepReport | Exception:
    if isinstance(outcome, DivergedError):
        return outcome
    trial.run.state, report = outcome
    return report


def _step_alone(trial: RunningTrial) -> StepReport | Exception:
    try:
        trial.task, report = step_in_memory(trial.run, trial.task, trial.job.settings.gpus, trial.save)
    except (DivergedError, UserError) as error:
        return error
    return report


def step_in_memory(
    run: RunState, task: Task, gpus: float, save: Callable[[], None]
) -> tuple[Task, StepReport]:
    """One outer step of ``run``. If memory runs out, it is taken again from the same state with leaner plans,
    and without compiling if that fails. Each plan is checkpointed at once, so that a kill does not bring the
    old one back. ``gpus`` is the granted fraction of a GPU. Returns the task with the plan that did it.

    Raises `TooLargeError` when there is no such plan left.
    """
    wanted, spec = run.plan, task.spec

    def work() -> tuple[Task, StepReport]:
        if wanted != run.plan:
            run.plan, run.n_replans = wanted, run.n_replans + 1
            save()
        used = replace(task, plan=wanted)
        run.state, report = outer_step(used, run.state)
        return used, report

    def shrink(error: Exception) -> bool:
        nonlocal wanted
        if spec.method == "distribution_matching":
            smaller = more_frugal(wanted, None, 1, spec.real_per_class * spec.dataset.classes)
        else:
            _, segment = choose_memory(spec, "recompute")
            smaller = more_frugal(wanted, segment, spec.models_per_step, spec.real_batch)
        if smaller is None:
            raise TooLargeError(_too_large(wanted, run.state.step, spec, gpus, error)) from error
        wanted = smaller
        return True

    try:
        return fitted(work, shrink)
    except Exception as error:
        if not (wanted.compile and is_compile_error(error)):
            raise
        _log.warning("trial %s is not compiled, because torch failed: %s", spec.trial_id, _said(error))
    release_memory()  # not earlier: the error held the memory of the step
    wanted = replace(wanted, compile=False)
    return fitted(work, shrink)


def _too_large(plan: ExecutionPlan, step: int, spec: TrialSpec, gpus: float, error: Exception) -> str:
    on_gpu = plan.device == "cuda"
    at_once = min(plan.real_block, spec.models_per_step) * plan.real_chunk if on_gpu else 0
    needed = estimate(
        spec, 1, memory_mode=plan.memory_mode, segment=plan.segment, real_at_once=at_once
    ).memory_bytes
    where = f"{gpus:g} of a GPU" if on_gpu and 0 < gpus < 1 else plan.device
    more = "a larger resources.gpus" if on_gpu else "a smaller resources.max_concurrent"
    return (
        f"outer step {step} does not fit the memory of {where}, not even with memory_mode: "
        f"{plan.memory_mode}, segment: {plan.segment} and {plan.real_chunk} real images at a time, where the "
        f"trial needs about {needed / 1e9:.2g} GB by estimate; set {more}, or fewer models_per_step, "
        f"inner_steps or images_per_class ({_said(error)})"
    )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
