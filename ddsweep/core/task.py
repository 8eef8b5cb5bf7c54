"""The constants of one distillation: settings, data, plan; and the networks of each outer step.

Every draw is a function of (trial, role, outer step) alone, so a state and its step number are all that is
needed to go on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import TrialSpec
from ddsweep.core.ahead import Ahead, pinned, sent
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import RealSet, class_labels, sample_per_class
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import Params, build_network, stack_networks
from ddsweep.core.own_network import DRAWS
from ddsweep.core.precision import stored_dtype
from ddsweep.seeds import derive_seed

__all__ = [
    "Learned",
    "PoolNetworks",
    "StartSet",
    "Task",
    "known_seed",
    "network_seeds",
    "selection_seeds",
    "soft_labels",
    "start_images",
]

T = TypeVar("T")

Learned = dict[str, Tensor]
"""The learned values of a method, by name: ``images [S, n, c, h, w]`` always, and those that the method
adds."""

PoolNetworks = Callable[[Sequence[int]], list[Params]]
"""Training networks of a pool, each ``name -> [...]``, by their numbers."""


@dataclass(frozen=True)
class StartSet:
    """The set in which a trial begins: ``images [S, n, c, h, w]``, ``labels`` (classes ``[S, n]``, or learned
    probabilities ``[S, n, classes]``), and ``rates [S*E]``, with an E of its own; None if it has none that
    were made with it."""

    images: Tensor
    labels: Tensor
    rates: Tensor | None


@dataclass(frozen=True)
class Task:
    """The constants of one distillation, on its device: settings, data, labels and plan.

    ``real`` is the training part, and ``real_labels`` are its classes on the CPU. ``labels [S, n]`` are the
    classes of the distilled images. ``pool`` gives training networks of the trial's pool by their numbers.
    ``known`` holds the networks of a ``fixed`` trial after their first draw; they are the same in every step.
    ``ahead`` holds the draws of the next step, under a plan that has them. ``start_set`` is that in which the
    trial begins, if it is one; only the start of a method needs it.
    """

    spec: TrialSpec
    plan: ExecutionPlan
    network: nn.Module
    real: RealSet
    real_labels: Tensor
    labels: Tensor
    pool: PoolNetworks | None = None
    known: dict[tuple[int, ...], Params] = field(default_factory=dict, compare=False)
    ahead: Ahead | None = field(default=None, compare=False)
    start_set: StartSet | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, spec: TrialSpec, plan: ExecutionPlan, train: RealSet, pool: PoolNetworks | None = None
    ) -> Task:
        device, data = torch.device(plan.device), spec.dataset
        network = build_network(spec.network_spec, data.shape, data.classes)
        return cls(
            spec=spec,
            plan=plan,
            network=network,
            real=train.shared_on(device),
            real_labels=train.labels.cpu(),
            labels=class_labels(spec.inner_steps, data.classes, spec.images_per_class_per_step).to(device),
            pool=pool,
            ahead=Ahead(network, plan.threads, spec.outer_steps) if plan.ahead else None,
        )

    def of_trial(self, spec: TrialSpec) -> Task:
        """That of another trial of the same shape, on the same data."""
        ahead = Ahead(self.network, self.plan.threads, spec.outer_steps) if self.plan.ahead else None
        return replace(self, spec=spec, known={}, ahead=ahead)

    @property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.spec.dtype)

    def networks(self, seeds: Sequence[int]) -> Params:
        """Fresh networks ``[K, ...]`` of the trial's law, one for each seed; or, with a pool, its training
        networks of these numbers."""
        if self.spec.init != "fixed":
            return self._drawn(seeds)
        if tuple(seeds) not in self.known:
            self.known[tuple(seeds)] = self._drawn(seeds)
        return self.known[tuple(seeds)]

    def outer_networks(self, step: int) -> Params:
        """The networks of one outer step; random numbers that they draw in training are those of the step."""
        if self.spec.init == "fixed":
            networks = self.networks(network_seeds(self.spec, step))
        else:
            networks = self._sent(self.drawn("networks", step, Task._of_step))
        if DRAWS in networks:
            count = len(networks[DRAWS])
            seeds = [derive_seed("dropout", self.spec.trial_id, step, k) for k in range(count)]
            networks = {**networks, DRAWS: sent(torch.tensor(seeds), networks[DRAWS].device)}
        return networks

    def drawn(self, what: str, step: int, draw: Callable[[Task, int], T]) -> T:
        """``draw(task, step)``: something that is drawn on the CPU for each outer step, by a function of the
        trial and the step alone. It may have been drawn ahead, in a thread."""
        if self.ahead is None:
            return draw(self, step)
        in_thread = replace(self, network=self.ahead.network, ahead=None)
        return self.ahead.drawn(what, step, lambda of: draw(in_thread, of))

    def _of_step(self, step: int) -> Params:
        return self._on_cpu(network_seeds(self.spec, step))

    def _drawn(self, seeds: Sequence[int]) -> Params:
        return self._sent(self._on_cpu(seeds))

    def _on_cpu(self, seeds: Sequence[int]) -> Params:
        spec, cpu, device = self.spec, torch.device("cpu"), torch.device(self.plan.device)
        if self.pool is not None:
            stacked = stack_networks(self.pool(seeds))
            drawn = {name: value.to(cpu, self.dtype) for name, value in stacked.items()}
        else:
            law, param = spec.init_law, spec.init_param
            drawn = draw_networks(self.network, law, param, seeds, device=cpu, dtype=self.dtype)
        return {name: pinned(value, device) for name, value in drawn.items()}

    def _sent(self, networks: Params) -> Params:
        device = torch.device(self.plan.device)
        return {name: sent(value, device) for name, value in networks.items()}


def start_images(task: Task, start: Tensor | None = None) -> Tensor:
    """The images at the start, ``[S, n, c, h, w]``: N(0, 1) in normalised pixel space, real ones, those of
    the start set, or ``start [S, n, c, h, w]`` from the caller; centred and scaled as asked for."""
    spec = task.spec
    c, h, w = spec.dataset.shape
    generator = torch.Generator().manual_seed(derive_seed("image_init", spec.trial_id))
    if start is not None:
        images = start.to(task.dtype)
    elif task.start_set is not None:
        images = task.start_set.images.to(task.dtype)
    elif spec.image_init == "real":
        m, classes = spec.images_per_class_per_step, spec.dataset.classes
        picks = sample_per_class(task.real_labels, classes, spec.images_per_class, generator)
        picks = picks.view(classes, spec.inner_steps, m).transpose(0, 1).reshape(-1)
        images = task.real.to("cpu").take(picks).normalised(task.dtype)
    else:
        images = torch.randn(task.labels.numel(), c, h, w, generator=generator).to(task.dtype)
    if spec.image_centre:
        images = images - images.flatten(0, -4).mean(0)
    return (images * spec.image_scale).reshape(*task.labels.shape, c, h, w).to(task.plan.device)


def soft_labels(task: Task, images: Tensor) -> Tensor | None:
    """With ``labels: soft``, those at the start, ``[S, n, classes]`` in the type of ``images``: of the start
    set, or the classes themselves. None for ``hard`` ones."""
    if task.spec.labels != "soft":
        return None
    labels = task.labels if task.start_set is None else task.start_set.labels.to(images.device)
    soft = labels.is_floating_point()
    return (labels if soft else F.one_hot(labels, task.spec.dataset.classes)).to(images)


def selection_seeds(spec: TrialSpec) -> list[int]:
    """The networks of validation scores: with a law, their own seeds; with a pool, its first training
    networks; with ``fixed``, the known network."""
    if spec.init == "fixed":
        return [known_seed(spec)]
    if spec.pool is not None:
        return list(range(min(spec.selection_networks, spec.pool.train)))
    law = (spec.network, spec.init_law, spec.init_param)
    return [derive_seed("selection", *law, i) for i in range(spec.selection_networks)]


def network_seeds(spec: TrialSpec, step: int) -> list[int]:
    """The networks of one outer step: seeds of fresh ones, numbers in their pool (drawn without replacement),
    or the one known network of ``fixed``."""
    if spec.init == "fixed":
        return [known_seed(spec)]
    if spec.pool is not None:
        generator = torch.Generator().manual_seed(derive_seed("pool_draw", spec.trial_id, step))
        return torch.randperm(spec.pool.train, generator=generator)[: spec.models_per_step].tolist()
    return [derive_seed("outer", spec.trial_id, step, k) for k in range(spec.models_per_step)]


def known_seed(spec: TrialSpec) -> int:
    """The known initial network of a ``fixed`` trial: number ``seed`` of its law, or of its pool."""
    if spec.pool is not None:
        return spec.seed
    return derive_seed("known", spec.network, spec.init_law, spec.init_param, spec.seed)
