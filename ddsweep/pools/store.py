"""Networks of a pool on disk: one safetensors file each, and an index with their roles."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddsweep.catalog import PoolSpec
from ddsweep.catalog.numbers import counted
from ddsweep.core.networks import Params
from ddsweep.errors import CheckpointError, DataError, ResultsError
from ddsweep.results.artifacts import load_tensors, save_tensors, tensor_sha256
from ddsweep.results.layout import PoolDirectory
from ddsweep.results.parts import read_part, write_part
from ddsweep.results.schemas import POOL

__all__ = ["ROLES", "TrainedPool", "open_pool", "save_network", "write_index"]

ROLES = ("train", "heldout")
"""The roles: for distillation, and for evaluation alone."""

_AGAIN = "`ddsweep pretrain` with the file of the pool trains it again"

_KEEPING = threading.Lock()

_KEPT_BYTES = 2**29
"""Networks that were read stay in memory up to this size: outer steps draw them again and again."""


def save_network(
    directory: PoolDirectory, spec: PoolSpec, role: str, index: int, weights: Params, row: dict[str, Any]
) -> None:
    """Write network ``index`` of a role, then its row: a network with a row is whole."""
    header = {"kind": "network", "recipe": spec.recipe, "role": role, "index": index}
    save_tensors(directory.network(role, index), weights, header, directory.temporary)
    full = {**row, "pool": spec.name, "role": role, "index": index, "recipe": spec.recipe}
    full["sha256"] = tensor_sha256(weights)
    write_part(directory.part(role, index), [full], POOL, directory.temporary)


def write_index(directory: PoolDirectory, spec: PoolSpec) -> None:
    """Write ``index.parquet``, all rows as one table. Raises `DataError` for a missing or torn row, and for a
    network in both roles."""
    rows = []
    for role, count in zip(ROLES, (spec.train, spec.heldout), strict=True):
        for index in range(count):
            rows += read_part(directory.part(role, index)).to_pylist()
    _check_disjoint(directory.root, rows)
    counts = {"train": str(spec.train), "heldout": str(spec.heldout)}
    write_part(directory.index, rows, POOL, directory.temporary, counts)


def _check_disjoint(where: Path, rows: Sequence[dict[str, Any]]) -> None:
    """No network, by its seed or by its weights, may be in both roles."""
    for key in ("seed", "sha256"):
        train = {row[key]: row["index"] for row in rows if row["role"] == "train" and row[key] is not None}
        for row in rows:
            if row["role"] == "heldout" and row[key] in train:
                raise DataError(
                    f"pool {where}: held-out network {row['index']} is training network {train[row[key]]} "
                    f"(the same {key}): nothing may be judged on networks that it was made with; remove the "
                    "pool and make it again"
                )


@dataclass(frozen=True)
class TrainedPool:
    """The networks of a pool, read on demand. ``sums`` are their hashes by role and number. ``stand_in``:
    their training data were a stand-in."""

    directory: PoolDirectory
    spec: PoolSpec
    sums: dict[tuple[str, int], str]
    stand_in: bool = False
    kept: dict[tuple[str, int], Params] = field(default_factory=dict)

    def networks(self, role: str, indices: Sequence[int]) -> list[Params]:
        """Networks of ``role`` by their numbers, each ``name -> [...]`` float32. Raises `DataError` for a
        network that is missing, torn, or not the one in the index."""
        return [self._network(role, index) for index in indices]

    @property
    def learned_from(self) -> str:
        """A hash of the training networks that the pool has for a trial. Another one means that they were
        trained anew: then they are others of the same kind."""
        sums = [self.sums["train", index] for index in range(self.spec.train)]
        return hashlib.sha256("\n".join(sums).encode()).hexdigest()[:16]

    def _network(self, role: str, index: int) -> Params:
        key = (role, index)
        weights = self.kept.get(key)
        if weights is None:
            weights = self._read(role, index)
            size = sum(value.nbytes for value in weights.values())
            with _KEEPING:
                if (len(self.kept) + 1) * size > max(_KEPT_BYTES, size):
                    self.kept.pop(next(iter(self.kept)))
                self.kept[key] = weights
        return weights

    def _read(self, role: str, index: int) -> Params:
        path = self.directory.network(role, index)
        if (role, index) not in self.sums:
            raise DataError(f"pool {self.directory.root}: has no {role} network {index}")
        try:
            weights, header = load_tensors(path)
        except CheckpointError as error:
            raise DataError(f"pool {self.spec.name}: {error}; {_AGAIN}") from error
        found = (header.get("kind"), header.get("recipe"), header.get("role"), header.get("index"))
        if found != ("network", self.spec.recipe, role, index):
            raise DataError(f"{path}: not {role} network {index} of pool {self.spec.name}; {_AGAIN}")
        if tensor_sha256(weights) != self.sums[role, index]:
            raise DataError(f"{path}: not the network that {self.directory.index} lists; {_AGAIN}")
        return weights


_open: dict[tuple[Path, PoolSpec], TrainedPool] = {}


def open_pool(spec: PoolSpec, pools: Path) -> TrainedPool:
    """The pool ``spec`` in the folder ``pools``, opened once in a process.

    Raises `DataError` for one that is not there, not finished, of another recipe, or whose held-out
    networks are not disjoint from its training networks.
    """
    directory = PoolDirectory(pools / spec.name)
    if (directory.root, spec) in _open:
        return _open[directory.root, spec]
    if not directory.index.is_file():
        state = "is not finished" if directory.root.is_dir() else "is not there"
        raise DataError(
            f"pool {spec.name}: {directory.root} {state}: `ddsweep pretrain` with its file makes it, and "
            "goes on where it was"
        )
    try:
        rows = read_part(directory.index).to_pylist()
    except ResultsError as error:
        raise DataError(
            f"pool {spec.name}: {directory.index} is torn: `ddsweep pretrain` with its file writes it again"
        ) from error
    other = {row["recipe"] for row in rows} - {spec.recipe}
    if other:
        raise DataError(
            f"pool {spec.name}: {directory.index} lists networks of another recipe "
            f"({', '.join(sorted(other))}, not {spec.recipe}); remove the folder and make the pool again"
        )
    _check_disjoint(directory.root, rows)
    sums = {(row["role"], row["index"]): row["sha256"] for row in rows}
    pool = TrainedPool(directory, spec, sums, any(row["dataset_stand_in"] for row in rows))
    for role, count in zip(ROLES, (spec.train, spec.heldout), strict=True):
        there = sum(1 for found, _ in pool.sums if found == role)
        if there < count:
            raise DataError(
                f"pool {spec.name}: {directory.index} lists {counted(there, f'{role} network')}, not "
                f"{count}: `ddsweep pretrain` with its file makes the rest"
            )
    _open[directory.root, spec] = pool
    return pool
