"""What a trial knows about its pool of trained networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "IMAGENET",
    "POOL_FRACTION",
    "SMOKE",
    "PoolSpec",
]


IMAGENET = "imagenet"
"""The pool with one network that ddsweep does not train: torchvision's AlexNet."""

POOL_FRACTION = 0.1
"""A pool leaves out this part of its data as validation, with split_seed 0: the default of trials."""

SMOKE = "-smoke"
"""The names of smoke sweeps and smoke pools end with this."""


@dataclass(frozen=True)
class PoolSpec:
    """A pool of trained networks: ``train`` of them for distillation, ``heldout`` for evaluation alone.

    ``recipe`` is a hash over all that decides one network. ``source_shape`` and ``classes`` are those of the
    training data. 0 classes means that the last layer is new for each data set (weights of ImageNet from the
    file ``weights``). ``source_fingerprint`` is that of the files, for the user's own data.
    """

    name: str
    source_dataset: str
    source_shape: tuple[int, int, int]
    classes: int
    network: str
    train: int
    heldout: int
    recipe: str
    weights: str = ""
    source_fingerprint: str = ""

    @property
    def known(self) -> bool:
        """Whether it has no held-out networks."""
        return self.heldout == 0

    def identity(self) -> list[Any]:
        """What enters a trial id: not the name, and not the number of held-out networks."""
        return [self.recipe, self.train]
