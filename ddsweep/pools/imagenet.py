"""The pool of a trial; and the pool `imagenet`: AlexNet with torchvision's weights of ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ddsweep.catalog import IMAGENET, SMOKE, NetworkSpec, PoolSpec, TrialSpec
from ddsweep.core.init import draw_network
from ddsweep.core.networks import Params, build_network
from ddsweep.data.weights import find_weights, read_weights
from ddsweep.pools.store import TrainedPool, open_pool, save_network, write_index
from ddsweep.provenance import environment, utc_now
from ddsweep.results.layout import PoolDirectory

__all__ = ["pool_of", "ready_pool"]

_LAST_LAYER = ("classifier.6.weight", "classifier.6.bias")


@dataclass(frozen=True)
class _WithNewLastLayer(TrainedPool):
    """A pool with a new last layer for ``classes``: weights 0, biases 1, as Wang et al. 2018 start their
    AlexNet."""

    classes: int = 0

    def networks(self, role: str, indices: Sequence[int]) -> list[Params]:
        return [self._with_new_layer(weights) for weights in super().networks(role, indices)]

    def _with_new_layer(self, weights: Params) -> Params:
        weight, bias = _LAST_LAYER
        inputs = weights[weight].shape[1]
        return {**weights, weight: torch.zeros(self.classes, inputs), bias: torch.ones(self.classes)}


def pool_of(trial: TrialSpec, pools: Path) -> TrainedPool | None:
    """The pool of a trial, if it has one. Raises `DataError` as `open_pool` does."""
    if trial.pool is None:
        return None
    pool = open_pool(trial.pool, pools)
    if trial.pool.classes:
        return pool
    return _WithNewLastLayer(**vars(pool), classes=trial.dataset.classes)


def ready_pool(spec: PoolSpec, pools: Path, data_root: Path | None) -> None:
    """See that the pool of a trial can be used. Weights of ImageNet are copied into ``pools`` once.

    Raises `DataError` for weights that are not there or not whole, and as `open_pool` does.
    """
    directory = PoolDirectory(pools / spec.name)
    if not spec.classes and not directory.index.is_file():
        directory.create()
        weights = _weights(spec, data_root)
        row = {**environment(), "dataset": IMAGENET, "network": spec.network, "trained_at": utc_now()}
        row["dataset_stand_in"] = spec.name == IMAGENET + SMOKE
        save_network(directory, spec, "train", 0, weights, row)
        write_index(directory, spec)
    open_pool(spec, pools)


def _weights(spec: PoolSpec, data_root: Path | None) -> Params:
    if spec.name == IMAGENET + SMOKE:  # the name tells that it is a stand-in
        network = build_network(NetworkSpec("alexnet"), (3, 224, 224), 1000)
        return draw_network(network, "kaiming", 0.0, 0)
    return read_weights(find_weights(Path(spec.weights) if spec.weights else None, data_root))
