"""Pools of trained networks, as far as a trial needs to know of them."""

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
"""The pool of one network that is not trained here: torchvision's AlexNet."""

POOL_FRACTION = 0.1
"""The part of its data that a pool leaves out as validation, with split_seed 0: the default of trials."""

SMOKE = "-smoke"
"""What the names of tiny sweeps and pools end with, which only try out the way."""


@dataclass(frozen=True)
class PoolSpec:
    """A pool of trained networks: ``train`` of them for distillation, ``heldout`` for evaluation alone.

    ``recipe`` is a hash over all that decides what one of them is. ``source_shape`` and ``classes`` are of
    the data they were trained on; 0 classes: the last layer is new for each data set (weights of
    ImageNet, ``weights`` is the file they were given in). ``source_fingerprint`` is that of the files, where
    they are of one's own.
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
        """Whether there are no networks of its kind to judge on."""
        return self.heldout == 0

    def identity(self) -> list[Any]:
        """What stands for this pool in a trial id: not its name, nor how many there are to judge on."""
        return [self.recipe, self.train]
