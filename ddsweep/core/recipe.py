"""A recipe says how a network is trained on a distilled set; and the training by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ddsweep.catalog import TrialSpec
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.order import BatchOrder, draw_batch_order
from ddsweep.core.training import InnerLoop
from ddsweep.errors import SettingError
from ddsweep.seeds import derive_seed

__all__ = ["Recipe", "batch_order", "held_out_loop"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained on S batches: ``epochs`` times through them, in the ``order`` of
    `ddsweep.core.order`, with one step of ``optimizer`` (``momentum`` is that of heavy ball) on the mean
    cross-entropy with each. ``weight_decay`` is torch's: that times the weights is added to their gradient.

    ``rate`` is that of every step. None means the set's own: one for each of the T steps it was made for, and
    beyond T those of the last epoch again. ``labels``: ``soft`` are probabilities that come with the images,
    ``hard`` their classes. There is no augmentation and no schedule.
    """

    epochs: int = 1
    rate: float | None = None
    optimizer: str = "gd"
    momentum: float = 0.9
    order: str = "fixed"
    labels: str = "hard"
    weight_decay: float = 0.0

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
        """Plain types, for the header of a file. Versions before weight decay read those without it."""
        found = asdict(self)
        return found if self.weight_decay else {k: v for k, v in found.items() if k != "weight_decay"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise SettingError(f"recipe of a newer version of ddsweep: {', '.join(unknown)}")
        return cls(**values)

    @property
    def inner_optimizer(self) -> InnerOptimizer:
        return InnerOptimizer(self.optimizer, self.momentum, self.weight_decay)

    @property
    def one_rate(self) -> float:
        """The rate of every step. Raises ``ValueError`` for a recipe with the rates of a set."""
        if self.rate is None:
            raise ValueError("the recipe has the rates of a set, not one of its own")
        return self.rate

    def rates(self, own: Sequence[float]) -> list[float]:
        """One rate for each of the T steps that a set with the rates ``own`` was made for."""
        return list(own) if self.rate is None else [self.rate] * len(own)


def held_out_loop(
    recipe: Recipe, made: TrialSpec, role: str, indices: Sequence[int], total: int
) -> InnerLoop:
    """How networks ``indices`` of a role (``heldout``, ``selection``) are trained by ``recipe`` for ``total``
    steps on the set of the trial ``made``.

    Random orders are functions of that trial, the role and the number of a network, so a network goes the
    same way under every recipe with this order.
    """
    if recipe.order == "fixed":
        return InnerLoop(recipe.inner_optimizer)
    seeds = [derive_seed("heldout_order", made.trial_id, role, i) for i in indices]
    return InnerLoop(recipe.inner_optimizer, batch_order(recipe.order, made, seeds, total))


def batch_order(order: str, made: TrialSpec, seeds: Sequence[int], total: int) -> BatchOrder:
    """The order in which networks with these ``seeds`` go through the batches of the set of the trial
    ``made``, for ``total`` steps, by ``order``."""
    sizes = (made.inner_steps, made.dataset.classes, made.images_per_class_per_step, made.steps)
    return draw_batch_order(order, *sizes, seeds, total)
