"""Training the networks of a pool, a group at a time: resumable, without Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ddsweep.catalog import parse_network
from ddsweep.catalog.numbers import counted
from ddsweep.core.evaluate import count_right
from ddsweep.core.execution import choose_plan
from ddsweep.core.init import draw_networks
from ddsweep.core.memory import is_out_of_memory
from ddsweep.core.networks import build_network
from ddsweep.core.pretrain import TrainingSchedule, train_on_real
from ddsweep.data.splits import Splits
from ddsweep.errors import CheckpointError, DataError, ResultsError, TooLargeError, UserError
from ddsweep.pools.recipe import PoolRecipe
from ddsweep.pools.store import ROLES, save_network
from ddsweep.provenance import device_name, environment, utc_now
from ddsweep.results.artifacts import load_tensors, tensor_sha256
from ddsweep.results.files import patiently
from ddsweep.results.layout import PoolDirectory
from ddsweep.results.parts import list_parts, read_part
from ddsweep.seeds import derive_seed

__all__ = ["PoolGroup", "check_parts", "missing_groups", "train_group"]


@dataclass(frozen=True)
class PoolGroup:
    """The wanted networks ``indices`` of a role, among the ``size`` from ``first`` on, which are trained as
    one computation."""

    role: str
    indices: tuple[int, ...]
    size: int

    @property
    def trained(self) -> range:
        """All networks that are computed, wanted or not: float32 results depend on the whole group."""
        first = self.indices[0] - self.indices[0] % self.size
        return range(first, first + self.size)

    @property
    def label(self) -> str:
        return f"{self.role} {self.indices[0]} to {self.indices[-1]}"


def missing_groups(recipe: PoolRecipe, directory: PoolDirectory) -> list[PoolGroup]:
    """The groups with a missing or torn network."""
    groups = []
    for role, count in zip(ROLES, (recipe.train, recipe.heldout), strict=True):
        size = recipe.group_size
        for first in range(0, count, size):
            group = PoolGroup(role, tuple(range(first, min(first + size, count))), size)
            if not all(_is_trained(directory, role, index) for index in group.indices):
                groups.append(group)
    return groups


def _is_trained(directory: PoolDirectory, role: str, index: int) -> bool:
    try:
        (row,) = read_part(directory.part(role, index)).to_pylist()
        weights, _ = load_tensors(directory.network(role, index))
    except (ResultsError, CheckpointError, ValueError):
        return False
    return bool(tensor_sha256(weights) == row["sha256"])


def check_parts(directory: PoolDirectory, recipe: PoolRecipe, splits: Splits | None = None) -> None:
    """Raises `DataError` if an existing network was trained by another recipe, or on other images than those
    of ``splits``: then the missing ones would be of another kind."""
    for path in list_parts(directory.root / "parts"):
        try:
            rows = read_part(path).to_pylist()
        except ResultsError:  # a torn one is made again
            continue
        for row in rows:
            what = None
            if row["recipe"] != recipe.recipe:
                what = "by another recipe"
            elif splits is not None and row["dataset_fingerprint"] != splits.fingerprint:
                what = "on other images"
            if what is not None:
                raise DataError(
                    f"pool {directory.root}: {row['role']} network {row['index']} was trained {what}; remove "
                    "the folder, or give this pool another name"
                )


def train_group(
    name: str,
    recipe: PoolRecipe,
    group: PoolGroup,
    splits: Splits,
    directory: PoolDirectory,
    device: torch.device,
    threads: int,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train the networks of ``group`` and write the missing ones; False if ``should_stop`` said so.

    Network i of a role is a function of (recipe, role, i): its seed draws its first weights, and the order in
    which it sees the training part (without validation) in each epoch. Its accuracy is that on the whole
    test set of its own data.
    """
    torch.set_num_threads(threads)
    data = recipe.dataset
    network = build_network(parse_network(recipe.network, data.shape), data.shape, data.classes)
    plan = choose_plan(device, threads, network)
    seeds = [derive_seed("pool", recipe.recipe, group.role, index) for index in group.trained]
    drawn = partial(draw_networks, network, recipe.init_law, recipe.init_param, seeds)
    wall, cpu = time.monotonic(), time.process_time()
    try:
        trained = train_on_real(
            network,
            drawn(device=device, dtype=torch.float32),
            splits.train.to(device),
            TrainingSchedule(
                recipe.epochs, recipe.batch, recipe.lr, recipe.decay_epochs, recipe.decay_factor
            ),
            lambda epoch: _order_seeds(recipe, group.role, group.trained, epoch),
            plan,
            should_stop=should_stop,
        )
        if trained is None:
            return False
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
        accuracy, loss, _, _ = count_right(network, trained, splits.test.to(device), plan)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TooLargeError(
            f"pool {name}: {group.label}: {counted(len(group.trained), 'network')} and the images of "
            f"{data.name} do not fit the memory of this {device.type}; give more `gpus`, a smaller "
            "`group_size` or a smaller `batch` (with either it is another pool)"
        ) from error
    spec, count = recipe.spec(name), len(group.trained)
    common: dict[str, Any] = {
        **environment(),
        **{k: getattr(recipe, k) for k in ("network", "init_law", "init_param", "epochs", "batch", "lr")},
        **{k: getattr(recipe, k) for k in ("decay_epochs", "decay_factor")},
        "dataset": data.name,
        "dataset_fingerprint": splits.fingerprint,
        "dataset_stand_in": splits.stand_in,
        "wall_seconds": wall / count,
        "cpu_seconds": cpu / count,
        "device": device.type,
        "device_name": device_name(device.type),
        "threads": threads,
        "trained_at": utc_now(),
    }
    for k, index in enumerate(group.trained):
        if index not in group.indices or _is_trained(directory, group.role, index):
            continue
        if not math.isfinite(float(loss[k])):
            raise UserError(
                f"pool {name}: {group.role} network {index} diverged at lr {recipe.lr:g}: its logits are "
                "not finite; give a smaller lr"
            )
        row = {**common, "seed": seeds[k], "accuracy": float(accuracy[k]), "loss": float(loss[k])}
        weights = {key: value[k].cpu() for key, value in trained.items()}
        patiently(partial(save_network, directory, spec, group.role, index, weights, row), should_stop)
    return True


def _order_seeds(recipe: PoolRecipe, role: str, indices: Sequence[int], epoch: int) -> list[int]:
    return [derive_seed("pool_order", recipe.recipe, role, index, epoch) for index in indices]
