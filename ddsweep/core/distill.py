"""Distillation: outer steps on the learned values of a method. State in, state out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddsweep.core.methods import METHODS, Together, method_of
from ddsweep.core.outer import (
    DistillState,
    NetworkGradients,
    clipped_to_running,
    combined,
    network_weights,
    norms_of,
    norms_of_networks,
    running_norm,
    started,
    stepped,
)
from ddsweep.core.precision import products
from ddsweep.core.task import Task, start_images
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

_LARGEST_NORM = 1e18
"""A gradient that is larger counts as not finite: the squares that Adam keeps would be, in float32, and what
they belong to would never move again."""


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
    with products(task.plan.device):
        gradients = method_of(task.spec).gradients(task, state.learned, state.step)
    (found,) = applied([task], [state], [gradients])
    if isinstance(found, DivergedError):
        raise found
    return found


def gradients_together(tasks: Sequence[Task], states: Sequence[DistillState]) -> list[NetworkGradients]:
    """The gradients of one outer step of each of several trials with one `ddsweep.cohorts.cohort_key`,
    computed together; each has the bits that it has alone.

    On a GPU, where the number of networks decides how a product is computed, missing trials up to the
    ``width`` of the plan are computed as copies.
    """
    spec, missing = tasks[0].spec, max(0, tasks[0].plan.width - len(tasks))
    method = METHODS[spec.method]
    assert isinstance(method, Together)
    with products(tasks[0].plan.device):
        found = method.together(
            [*tasks, *[tasks[0]] * missing],
            [*[state.learned for state in states], *[states[0].learned] * missing],
            [*[state.step for state in states], *[states[0].step] * missing],
        )
    return found[: len(tasks)]


def applied(
    tasks: Sequence[Task], states: Sequence[DistillState], gradients: Sequence[NetworkGradients]
) -> list[tuple[DistillState, StepReport] | DivergedError]:
    """For each of several trials the state after an outer step with these ``gradients`` of its networks, or
    the error that `outer_step` raises. None depends on the others.

    The device is waited for once, when all is on its way: the step counts all networks, and its numbers say
    whether they were finite. Where some were not, it is taken again without them.
    """
    drawn = [len(own.losses) for own in gradients]
    found: dict[int, tuple[DistillState, StepReport] | DivergedError] = {}
    again: dict[int, list[int]] = {}
    steps = _taken(tasks, states, gradients, drawn)
    for i, step in enumerate(steps):
        task, finite = tasks[i], step.finite
        if len(finite) == drawn[i]:
            found[i] = _outcome(task, step, step)
        elif finite and task.spec.on_nonfinite != "stop":
            again[i] = finite
        else:
            found[i] = _without_update(task, states[i], step)
    if again:
        of = list(again)
        rest = [gradients[i].of(finite) for i, finite in again.items()]
        repeated = _taken([tasks[i] for i in of], [states[i] for i in of], rest, [drawn[i] for i in of])
        for i, step in zip(of, repeated, strict=True):
            found[i] = _outcome(tasks[i], step, steps[i])
    return [found[i] for i in range(len(tasks))]


@dataclass(frozen=True)
class _Step:
    """An outer step that counts all networks it was given: the state after it, and its numbers on the host.
    ``mean_rate`` is that of the learned rates before the step, ``largest_rate`` one after it."""

    state: DistillState
    losses: Tensor
    norms: Tensor
    finite: list[int]
    loss: float
    grad_norm: float
    mean_rate: float | None
    largest_rate: float | None


def _taken(
    tasks: Sequence[Task],
    states: Sequence[DistillState],
    gradients: Sequence[NetworkGradients],
    drawn: Sequence[int],
) -> list[_Step]:
    """``drawn``: see `network_weights`."""
    specs = [task.spec for task in tasks]
    norms = norms_of_networks(gradients)
    weights = network_weights(specs, norms, drawn)
    sums = [combined(own, theirs) for own, theirs in zip(gradients, weights, strict=True)]
    lengths = norms_of(sums)
    before = list(lengths)
    clipped = {i: spec.clip_running for i, spec in enumerate(specs) if spec.clip_running is not None}
    if clipped:
        for i, times in clipped.items():
            sums[i] = clipped_to_running(sums[i], lengths[i], times, states[i].norm)
        for i, length in zip(clipped, norms_of([sums[i] for i in clipped]), strict=True):
            lengths[i] = length
    after = stepped(specs, states, sums)
    numbers: list[list[Tensor]] = []
    for i, (task, own) in enumerate(zip(tasks, gradients, strict=True)):
        rates = method_of(task.spec).rates(states[i].learned, task.spec)
        numbers.append([own.losses, own.losses.mean(), norms[i], lengths[i], before[i]])
        if rates is not None:
            numbers[i].append(rates.mean())
            if task.spec.max_rollbacks:
                later = method_of(task.spec).rates(after[i].learned, task.spec)
                assert later is not None
                numbers[i].append(later.max())
    steps = []
    for i, values in enumerate(_on_host(numbers)):
        losses, (loss,), norms_of_all, (grad_norm,), (unclipped,), *of_rates = values
        state = after[i]
        if i in clipped:
            state = replace(state, norm=running_norm(unclipped, clipped[i], states[i].norm))
        pairs = enumerate(zip(losses, norms_of_all, strict=True))
        finite = [k for k, (value, norm) in pairs if math.isfinite(value) and norm < _LARGEST_NORM]
        rate, largest = [*(number for (number,) in of_rates), None, None][:2]
        steps.append(_Step(state, gradients[i].losses, norms[i], finite, loss, grad_norm, rate, largest))
    return steps


def _on_host(numbers: Sequence[Sequence[Tensor]]) -> list[list[list[float]]]:
    """The values of all tensors, of no or one dimension. This is where the host waits for the device."""
    flat = [value.reshape(-1) for row in numbers for value in row]
    places: dict[torch.dtype, list[int]] = {}
    for place, value in enumerate(flat):
        places.setdefault(value.dtype, []).append(place)
    joined = [torch.cat([flat[place] for place in same]).double() for same in places.values()]
    values = iter(torch.cat(joined).tolist())
    found = {place: [next(values) for _ in flat[place]] for same in places.values() for place in same}
    ordered = iter(range(len(flat)))
    return [[found[next(ordered)] for _ in row] for row in numbers]


def _without_update(
    task: Task, state: DistillState, step: _Step
) -> tuple[DistillState, StepReport] | DivergedError:
    """What becomes of an outer step without a finite network, or with some under ``on_nonfinite: stop``."""
    count, n_skipped = len(step.losses), len(step.losses) - len(step.finite)
    if task.spec.on_nonfinite == "stop":
        return DivergedError(
            f"outer step {state.step}: {n_skipped} of {count} networks have a loss or gradient that "
            "is not finite (on_nonfinite: stop; skip leaves such networks out, a smaller inner_lr or "
            "clip_norm avoids them)"
        )
    in_a_row = state.skipped_in_a_row + 1
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        rate = "" if step.mean_rate is None else f"mean inner rate {step.mean_rate:.3g}; "
        return DivergedError(
            f"outer step {state.step}: no network was finite for {in_a_row} steps in a row ({rate}"
            "a smaller inner_lr, or clip_norm, avoids it)"
        )
    report = StepReport(None, None, step.mean_rate, n_skipped, step.losses, step.norms)
    return replace(state, step=state.step + 1, skipped_in_a_row=in_a_row), report


def _outcome(task: Task, step: _Step, of_all: _Step) -> tuple[DistillState, StepReport] | DivergedError:
    """What becomes of a ``step`` that was taken; ``of_all`` is the one with all networks."""
    spec, largest = task.spec, step.largest_rate
    if largest is not None and not largest <= spec.rate_limit:
        return DivergedError(
            f"outer step {step.state.step - 1}: an inner rate has grown to {largest:.3g}, beyond rate_limit "
            f"{spec.rate_limit:g} (a smaller outer_lr, or clipping, avoids it)"
        )
    report = StepReport(
        loss=step.loss,
        grad_norm=step.grad_norm,
        inner_lr_mean=step.mean_rate,
        n_skipped=len(of_all.losses) - len(of_all.finite),
        losses=of_all.losses,
        norms=of_all.norms,
    )
    return step.state, report
