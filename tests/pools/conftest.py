"""A tiny pool of networks trained on digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddsweep.catalog import DATASETS, PoolSpec
from ddsweep.data.load import Splits
from ddsweep.pools.recipe import PoolRecipe
from ddsweep.pools.store import write_index
from ddsweep.pools.train import missing_groups, train_group
from ddsweep.results.layout import PoolDirectory

NETWORK = "convnet(depth=1,width=4,norm=none)"
NAME = "tiny"


@pytest.fixture(scope="session")
def recipe() -> PoolRecipe:
    return PoolRecipe(
        dataset=DATASETS["digits"],
        network=NETWORK,
        init_law="xavier",
        init_param=1.0,
        train=10,
        heldout=5,
        epochs=3,
        batch=100,
        lr=0.01,
        decay_epochs=2,
        decay_factor=0.5,
        seed=0,
    )


def train_all(
    recipe: PoolRecipe, splits: Splits, directory: PoolDirectory, stop: Callable[[], bool] = lambda: False
) -> None:
    for group in missing_groups(recipe, directory):
        train_group(NAME, recipe, group, splits, directory, torch.device("cpu"), 1, should_stop=stop)


def make_pool(recipe: PoolRecipe, splits: Splits, pools: Path) -> PoolSpec:
    directory = PoolDirectory(pools / NAME)
    train_all(recipe, splits, directory)
    spec = recipe.spec(NAME)
    write_index(directory, spec)
    return spec


@pytest.fixture(scope="session")
def pools(recipe: PoolRecipe, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pools with one in it, `NAME`; tests that alter it take a copy."""
    root = tmp_path_factory.mktemp("results") / "pools"
    make_pool(recipe, splits, root)
    return root
