"""Checks whether a method can distil a trial: a user's own is checked before any trial starts.

It runs in float64 on a few random images and two networks: the contract of `ddsweep.core.methods`, and the
gradient against the slope of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ddsweep.catalog import TrialSpec
from ddsweep.core.distill import initial_state
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import RealSet
from ddsweep.core.methods import method_of
from ddsweep.core.outer import NetworkGradients
from ddsweep.core.task import Learned, Task, start_images

__all__ = ["faults"]

_EPS, _TOLERANCE = 1e-7, 1e-2
"""The slope is measured across kinks of ReLU and max-pool, which change it a little."""

_IMAGES_PER_CLASS, _STEP = 8, 3


def faults(spec: TrialSpec) -> Iterator[str]:
    """The faults of the method of ``spec``, each with what to change; empty if it is fine. After the first
    fault later checks may be left out."""
    task, method = _task(spec), method_of(spec)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(*task.labels.shape, *spec.dataset.shape, generator=generator)
    yield from (wrong := list(_wrong_start(method.start(task, start_images(task, start)), start.shape)))
    if wrong:
        return
    learned = initial_state(task, start).learned
    found = method.gradients(task, learned, _STEP)
    yield from (wrong := list(_wrong_gradients(task, learned, found)))
    if wrong:
        return
    if not torch.equal(found.losses, method.gradients(task, learned, _STEP).losses):
        yield (
            "the same outer step has another loss the second time; draw from generators only, with seeds of "
            "ddsweep.seeds.derive_seed(role, task.spec.trial_id, step)"
        )
        return
    rates: object = method.rates(learned, task.spec)
    if rates is not None and not (
        isinstance(rates, Tensor) and rates.shape == (task.spec.steps,) and _is_finite(rates)
    ):
        yield f"rates() is {_told(rates)}; return finite [T] = [{task.spec.steps}], or None for none"
    for name, by in found.by.items():
        along = torch.randn(learned[name].shape, generator=generator, dtype=by.dtype)
        along = along / along.norm()
        slope, told = _slope(task, learned, name, along), (by * along).flatten(1).sum(1)
        off = float(((told - slope).abs() / slope.abs().max().clamp_min(1e-6)).max())
        if not off < _TOLERANCE:
            yield f"by[{name!r}] is not the derivative of the losses: it is off by {off:.0%} in one direction"


def _wrong_start(learned: object, shape: torch.Size) -> Iterator[str]:
    if not isinstance(learned, dict):
        yield f"start() is {_told(learned)}, not a dict of tensors by name"
        return
    images = learned.get("images")
    if not isinstance(images, Tensor) or images.shape != shape:
        yield f"start() returns no `images` of shape {list(shape)}, [S, n, c, h, w]"
        return
    for name, value in learned.items():
        if not isinstance(value, Tensor) or value.dtype != images.dtype or not value.dim():
            yield (
                f"start()[{name!r}] is {_told(value)}; a learned value is a tensor of at least one dimension "
                f"in the type of the images that start() gets (here {images.dtype})"
            )


def _wrong_gradients(task: Task, learned: Learned, found: NetworkGradients) -> Iterator[str]:
    if not isinstance(found, NetworkGradients):
        yield f"gradients() is {_told(found)}, not ddsweep.core.outer.NetworkGradients"
        return
    networks = task.spec.models_per_step
    if found.losses.shape != (networks,):
        yield f"losses have shape {list(found.losses.shape)}, not [{networks}], one for each network"
    if "images" not in found.by:
        yield "by has no 'images': nothing would be distilled"
    for name, by in found.by.items():
        if name not in learned or by.shape != (networks, *learned[name].shape):
            yield f"by[{name!r}] has shape {list(by.shape)}, not [networks, *shape of that learned value]"
    values = {"losses": found.losses, **{f"by[{name!r}]": by for name, by in found.by.items()}}
    for name, value in values.items():
        if value.dtype != task.dtype:
            yield f"{name}: {value.dtype}; compute in the type of the images (here {task.dtype})"
        elif not _is_finite(value):
            yield f"{name}: not finite in the first networks"


def _is_finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _told(value: object) -> str:
    """What ``value`` is, for a message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}{'' if _is_finite(value) else ', not finite'}"
    return f"of type {type(value).__name__}"


def _slope(task: Task, learned: Learned, name: str, along: Tensor) -> Tensor:
    method = method_of(task.spec)
    ends = [
        method.gradients(task, {**learned, name: learned[name] + sign * _EPS * along}, _STEP).losses
        for sign in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * _EPS)


def _task(spec: TrialSpec) -> Task:
    """``spec`` in float64, on random images, with two networks of a law."""
    init = "fixed" if spec.init == "fixed" else "random"
    small = replace(spec, dtype="float64", init=init, pool=None, models_per_step=2, trim=0.0)
    data, generator = spec.dataset, torch.Generator().manual_seed(0)
    number = _IMAGES_PER_CLASS * data.classes
    pixels = torch.randint(256, (number, *data.shape), generator=generator, dtype=torch.uint8)
    labels, channels = torch.arange(number) % data.classes, data.shape[0]
    real = RealSet(pixels, labels, (0.5,) * channels, (0.25,) * channels)
    return Task.of(small, ExecutionPlan(inner_batching="loop", real_batching="loop"), real)
