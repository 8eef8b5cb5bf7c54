"""Which networks of pools stand behind the results of a sweep: others under the same names are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from ddsweep.catalog import PoolSpec
from ddsweep.catalog.numbers import counted
from ddsweep.errors import UserError
from ddsweep.pools.store import TrainedPool
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import SweepDirectory

__all__ = ["note_networks", "of_other_networks"]

_DIGITS = 16


def note_networks(pool: TrainedPool, directory: SweepDirectory) -> None:
    """Remember the networks of ``pool`` beside the results in ``directory``; more of them may come later.

    Raises `UserError` if other networks had the same numbers there. A pool that is trained anew on another
    machine has other ones, and rows and baselines of the two would be paired as if they were the same.
    """
    own = {f"{role} {index}": sha256[:_DIGITS] for (role, index), sha256 in pool.sums.items()}
    name, path = _name(pool.spec), directory.pool_networks
    if own.items() <= _noted(path).get(name, {}).items():
        return
    directory.cache.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.cache / "pools.lock"):
        noted = _noted(path)
        before = noted.setdefault(name, {})
        others = [network for network in own if before.get(network, own[network]) != own[network]]
        if others:
            raise UserError(
                f"pool {pool.spec.name}: {counted(len(others), 'network')}, {others[0]} first, "
                f"{'is another one' if len(others) == 1 else 'are others'} than in the results in "
                f"{directory.root}: the pool was trained anew. Put {pool.directory.root} of before back, or "
                "give the new networks another results folder"
            )
        before |= own
        content = json.dumps(noted, indent=1, sort_keys=True)
        write_atomic(path, content.encode(), directory.temporary)


def of_other_networks(spec: PoolSpec, one: SweepDirectory, other: SweepDirectory) -> bool:
    """Whether the results in two folders are known to be of different networks of a pool."""
    first, second = (_noted(directory.pool_networks).get(_name(spec), {}) for directory in (one, other))
    return any(first[network] != second[network] for network in first.keys() & second.keys())


def _name(spec: PoolSpec) -> str:
    return f"{spec.name} {spec.recipe}"


def _noted(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: {error}; remove it, and the networks are noted anew") from None
    return found
