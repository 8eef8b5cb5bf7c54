"""Distillation: outer steps on the learned values of a method. State in, state out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddsweep.core.methods import METHODS, Together, method_of
from ddsweep.core.outer import (
    DistillState,
    NetworkGradients,
    combined,
    network_weights,
    norm_of,
    outer_transforms,
    started,
    updated,
)
from ddsweep.core.task import Learned, Task, start_images
from ddsweep.errors import DivergedError

__all__ = [
    "MAX_SKIPPED_IN_A_ROW",
    "StepReport",
    "applied",
    "gradients_together",
    "initial_state",
    "outer_step",
]

MAX_SKIPPED_IN_A_ROW = 10
"""After so many outer steps without one finite network even ``on_nonfinite: skip`` gives up."""


@dataclass(frozen=True)
class StepReport:
    """One outer step: mean loss over the networks that counted (None if none did), norm of the
    gradient applied, mean inner rate (None for a method that learns none), networks left out; and per network
    losses and norms ``[K]``."""

    loss: float | None
    grad_norm: float | None
    inner_lr_mean: float | None
    n_skipped: int
    losses: Tensor
    norms: Tensor


def initial_state(task: Task, start: Tensor | None = None) -> DistillState:
    """The state before the first outer step; ``start [S, n, c, h, w]`` as in `start_images`."""
    return started(method_of(task.spec).start(task, start_images(task, start)), task.spec)


def outer_step(task: Task, state: DistillState) -> tuple[DistillState, StepReport]:
    """One outer step: the gradients of ``models_per_step`` networks, their mean, one update.

    A network whose loss or gradient is not finite is left out of the mean (``on_nonfinite: skip``). Raises
    `DivergedError` under ``stop``, after ten steps in a row without a finite network, or (with
    ``max_rollbacks``) if a rate has grown beyond ``rate_limit``.
    """
    return applied(task, state, method_of(task.spec).gradients(task, state.learned, state.step))


def gradients_together(tasks: Sequence[Task], states: Sequence[DistillState]) -> list[NetworkGradients]:
    """The gradients of one outer step of each of several trials with one `ddsweep.cohorts.cohort_key`,
    computed together; each has the bits that it has alone.

    On a GPU, where the number of networks decides how a product is computed, missing trials up to the
    ``width`` of the plan are computed as copies.
    """
    spec, missing = tasks[0].spec, max(0, tasks[0].plan.width - len(tasks))
    method = METHODS[spec.method]
    assert isinstance(method, Together)
    found = method.together(
        [*tasks, *[tasks[0]] * missing],
        [*[state.learned for state in states], *[states[0].learned] * missing],
        [*[state.step for state in states], *[states[0].step] * missing],
    )
    return found[: len(tasks)]


def applied(task: Task, state: DistillState, gradients: NetworkGradients) -> tuple[DistillState, StepReport]:
    """The state after an outer step with these ``gradients`` of its networks; raises as `outer_step` does."""
    spec, norms = task.spec, gradients.norms
    finite = torch.isfinite(gradients.losses) & torch.isfinite(norms)
    n_skipped = int((~finite).sum())
    if n_skipped and spec.on_nonfinite == "stop":
        raise DivergedError(
            f"outer step {state.step}: {n_skipped} of {len(finite)} networks have a loss or gradient that "
            "is not finite (on_nonfinite: stop; skip leaves such networks out, a smaller inner_lr or "
            "clip_norm avoids them)"
        )
    mean_lr, _ = _mean_and_largest_rate(task, state.learned)
    if n_skipped == len(finite):
        in_a_row = state.skipped_in_a_row + 1
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            rate = "" if mean_lr is None else f"mean inner rate {mean_lr:.3g}; "
            raise DivergedError(
                f"outer step {state.step}: no network was finite for {in_a_row} steps in a row ({rate}"
                "a smaller inner_lr, or clip_norm, avoids it)"
            )
        report = StepReport(None, None, mean_lr, n_skipped, gradients.losses, norms)
        return replace(state, step=state.step + 1, skipped_in_a_row=in_a_row), report
    update = combined(gradients, network_weights(spec, norms, finite), finite)
    *clips, optimizer = outer_transforms(spec)
    for clip in clips:
        update, state = clip(update, state)
    report = StepReport(
        loss=float(gradients.losses[finite].mean()),
        grad_norm=norm_of(update),
        inner_lr_mean=mean_lr,
        n_skipped=n_skipped,
        losses=gradients.losses,
        norms=norms,
    )
    update, state = optimizer(update, state)
    state = updated(state, update, spec)
    _, largest = _mean_and_largest_rate(task, state.learned)
    if spec.max_rollbacks and largest is not None and not largest <= spec.rate_limit:
        raise DivergedError(
            f"outer step {state.step - 1}: an inner rate has grown to {largest:.3g}, beyond rate_limit "
            f"{spec.rate_limit:g} (a smaller outer_lr, or clipping, avoids it)"
        )
    return state, report


def _mean_and_largest_rate(task: Task, learned: Learned) -> tuple[float, float] | tuple[None, None]:
    """Mean and largest of the learned rates; None twice for a method without learned rates."""
    rates = method_of(task.spec).rates(learned, task.spec)
    return (None, None) if rates is None else (float(rates.mean()), float(rates.max()))
