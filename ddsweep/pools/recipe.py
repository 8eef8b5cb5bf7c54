"""The settings that decide the networks of a pool."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from ddsweep.catalog import DatasetSpec, PoolSpec

__all__ = ["GROUP_SIZE", "PoolRecipe"]

POOL_VERSION = 1
"""Raised when the meaning of a setting of a pool changes, or the training of its networks."""

GROUP_SIZE = 8


@dataclass(frozen=True)
class PoolRecipe:
    """The settings that decide network i of a pool, and the number of networks in each role.

    ``train`` networks are for distillation, ``heldout`` ones for evaluation alone; both are trained alike
    on the training part of ``dataset`` (without validation). Adam (0.5, 0.999) at rate ``lr``, times
    ``decay_factor`` every ``decay_epochs``; ``batch`` images a step (Wang et al. 2018).
    ``group_size`` networks are trained together: float32 results depend on how many.
    """

    dataset: DatasetSpec
    network: str
    init_law: str
    init_param: float
    train: int
    heldout: int
    epochs: int
    batch: int
    lr: float
    decay_epochs: int
    decay_factor: float
    seed: int
    group_size: int = GROUP_SIZE

    @property
    def recipe(self) -> str:
        """16 hex digits over all but the numbers of networks: network i does not depend on them."""
        own = {k: v for k, v in vars(self).items() if k not in ("dataset", "train", "heldout")}
        if self.group_size == GROUP_SIZE:
            del own["group_size"]
        content = [self.dataset.identity(), own, POOL_VERSION]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def spec(self, name: str) -> PoolSpec:
        data = self.dataset
        return PoolSpec(
            name=name,
            source_dataset=data.name,
            source_shape=data.shape,
            classes=data.classes,
            network=self.network,
            train=self.train,
            heldout=self.heldout,
            recipe=self.recipe,
            source_fingerprint=data.fingerprint,
        )
