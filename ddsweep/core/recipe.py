"""A recipe says how a network is trained on a distilled set; and the training by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ddsweep.catalog import SETTINGS, TrialSpec, steps_per_epoch, suited_augmentation
from ddsweep.core.augment import draw_augmentation
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.order import BatchOrder, Minibatches, draw_batch_order, minibatches
from ddsweep.core.training import Augment, InnerLoop
from ddsweep.errors import SettingError
from ddsweep.seeds import derive_seed

__all__ = ["Recipe", "batch_order", "held_out_loop"]


_FIRST = ("epochs", "rate", "optimizer", "momentum", "order", "labels")
"""What every file says of a recipe."""


_ONE_OF = {
    "optimizer": SETTINGS["inner_optimizer"].one_of,
    "order": SETTINGS["order"].one_of,
    "labels": SETTINGS["labels"].one_of,
    "schedule": ("constant", "step", "cosine"),
}


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on S batches: ``epochs`` times through them, in the ``order`` of
    `ddsweep.core.order`, with one step of ``optimizer`` (``momentum`` is that of heavy ball) on the mean
    cross-entropy with each. ``weight_decay`` is torch's: that times the weights is added to their gradient.

    ``rate`` is that of every step. None means the set's own: one for each of the T steps it was made for, and
    beyond T those of the last epoch again. ``labels``: ``soft`` are probabilities that come with the images,
    ``hard`` their classes.

    With a ``batch`` an epoch goes once through all images of the set, in minibatches of so many, whatever the
    S batches are (`ddsweep.core.order.minibatches`). ``schedule`` is a factor on the rate, the same for all
    steps of an epoch and, beyond the last epoch, that of the last: ``step`` multiplies it by ``decay_factor``
    after every ``decay_epochs`` (None: half of the epochs, rounded up), ``cosine`` goes to zero. ``augment``
    changes the images of every step, for each network anew (`ddsweep.core.augment`).
    """

    epochs: int = 1
    rate: float | None = None
    optimizer: str = "gd"
    momentum: float = 0.9
    order: str = "fixed"
    labels: str = "hard"
    weight_decay: float = 0.0
    batch: int | None = None
    schedule: str = "constant"
    decay_epochs: int | None = None
    decay_factor: float = 0.1
    augment: str = "none"

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for a value that means nothing."""
        for name, allowed in _ONE_OF.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"recipe: {name}={value!r} is not one of {', '.join(allowed)}")
        for name in ("epochs", "batch", "decay_epochs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"recipe: {name}={value} must be at least 1")
        for name in ("rate", "momentum", "weight_decay", "decay_factor"):
            number: Any = getattr(self, name)
            if number is None and name == "rate":
                continue
            if isinstance(number, bool) or not isinstance(number, Real) or not 0 <= float(number) < math.inf:
                raise ValueError(f"recipe: {name}={number!r} must be a number from 0 on")

    @classmethod
    def of(cls, spec: TrialSpec) -> Recipe:
        """The recipe of the inner loop of ``spec``, with learned rates."""
        return cls(
            epochs=spec.inner_epochs,
            optimizer=spec.inner_optimizer,
            momentum=spec.inner_momentum,
            order=spec.order,
            labels="hard" if "labels" in spec.lacks else spec.labels,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for the header of a file. What came after ``labels`` is left out at its default, so
        that versions before it read the file."""
        later = {item.name: item.default for item in fields(self) if item.name not in _FIRST}
        return {k: v for k, v in asdict(self).items() if k not in later or v != later[k]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise SettingError(f"recipe of a newer version of ddsweep: {', '.join(unknown)}")
        try:
            return cls(**values)
        except ValueError as error:
            raise SettingError(f"recipe of a newer version of ddsweep: {error}") from error

    @property
    def inner_optimizer(self) -> InnerOptimizer:
        return InnerOptimizer(self.optimizer, self.momentum, self.weight_decay)

    def steps_per_epoch(self, made: TrialSpec) -> int:
        """S, or the number of minibatches, of the set of the trial ``made``."""
        return steps_per_epoch(made, self.batch)

    @property
    def decay_every(self) -> int:
        """The epochs between decays of ``step``."""
        return -(-self.epochs // 2) if self.decay_epochs is None else self.decay_epochs

    def rate_factor(self, epoch: int) -> float:
        """The factor of the rate in ``epoch``, from 0."""
        epoch = min(epoch, self.epochs - 1)
        if self.schedule == "step":
            return float(self.decay_factor ** (epoch // self.decay_every))
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        if self.schedule == "constant":
            return 1.0
        raise ValueError(f"schedule: {self.schedule!r} is not one of constant, step, cosine")

    @property
    def one_rate(self) -> float:
        """The rate of every step. Raises ``ValueError`` for a recipe with the rates of a set."""
        if self.rate is None:
            raise ValueError("the recipe has the rates of a set, not one of its own")
        return self.rate

    def rates(self, own: Sequence[float]) -> list[float]:
        """One rate for each of the T steps that a set with the rates ``own`` was made for. Raises
        ``ValueError`` if they differ, and minibatches or a schedule take one."""
        if self.rate is not None:
            return [self.rate] * len(own)
        if (self.batch is not None or self.schedule != "constant") and len(set(own)) > 1:
            raise ValueError("batch and schedule take one rate for all steps: give the recipe a rate")
        return list(own)


def held_out_loop(
    recipe: Recipe, made: TrialSpec, role: str, indices: Sequence[int], total: int
) -> InnerLoop:
    """How networks ``indices`` of a role (``heldout``, ``selection``) are trained by ``recipe`` for ``total``
    steps on the set of the trial ``made``.

    Random orders and augmentations are functions of that trial, the role and the number of a network, so a
    network goes the same way under every recipe with this order.
    """
    seeds = [derive_seed("heldout_order", made.trial_id, role, i) for i in indices]
    order: BatchOrder | Minibatches | None = None
    if recipe.batch is not None:
        order = minibatches(made.images_per_class * made.dataset.classes, recipe.batch, seeds, total)
    elif recipe.order != "fixed":
        order = batch_order(recipe.order, made, seeds, total)
    per_epoch = recipe.steps_per_epoch(made)
    return InnerLoop(
        recipe.inner_optimizer,
        order if isinstance(order, BatchOrder) else None,
        minibatches=order if isinstance(order, Minibatches) else None,
        augments=_augments(recipe, made, role, indices),
        rate_factor=None if recipe.schedule == "constant" else lambda t: recipe.rate_factor(t // per_epoch),
    )


def _augments(recipe: Recipe, made: TrialSpec, role: str, indices: Sequence[int]) -> tuple[Augment, ...]:
    """An augmentation for each of the networks ``indices``, none for a recipe without."""
    parts = suited_augmentation("augment", recipe.augment, made.dataset)
    side = made.dataset.shape[1]
    whose = [(made.trial_id, role, i) for i in indices] if parts else []
    return tuple(partial(_augmented, parts, side, of) for of in whose)


def _augmented(
    parts: Sequence[str], side: int, whose: tuple[str, str, int], images: Tensor, t: int
) -> Tensor:
    """``images [n, c, h, w]`` of step ``t`` for one network, changed."""
    generator = torch.Generator().manual_seed(derive_seed("heldout_augment", *whose, t))
    return draw_augmentation(parts, len(images), side, generator)(images)


def batch_order(order: str, made: TrialSpec, seeds: Sequence[int], total: int) -> BatchOrder:
    """The order in which networks with these ``seeds`` go through the batches of the set of the trial
    ``made``, for ``total`` steps, by ``order``."""
    sizes = (made.inner_steps, made.dataset.classes, made.images_per_class_per_step, made.steps)
    return draw_batch_order(order, *sizes, seeds, total)
