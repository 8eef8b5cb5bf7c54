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
from ddsweep.results.files import results_error, unreadable_error, write_atomic
from ddsweep.results.layout import SweepDirectory

__all__ = ["is_of_others", "note_networks"]

_DIGITS = 16


def note_networks(pool: TrainedPool, directory: SweepDirectory) -> None:
    """Remember the networks of ``pool`` beside the results in ``directory``; more of them may come later.

    Raises `UserError` if other networks had the same numbers there. A pool that is trained anew on another
    machine has other ones, and rows and baselines of the two would be paired as if they were the same.
    """
    own, path = _sums(pool), directory.pool_networks
    if own.items() <= _of(pool.spec, _noted(path)).items():
        return
    try:
        directory.cache.mkdir(parents=True, exist_ok=True)
        _note(pool, own, directory)
    except OSError as error:
        raise results_error(error, path) from error


def _note(pool: TrainedPool, own: dict[str, str], directory: SweepDirectory) -> None:
    path = directory.pool_networks
    with FileLock(directory.cache / "pools.lock"):
        noted = _noted(path)
        before = _of(pool.spec, noted)
        others = [network for network in own if before.get(network, own[network]) != own[network]]
        if others:
            raise UserError(
                f"pool {pool.spec.name}: {counted(len(others), 'network')}, {others[0]} first, "
                f"{'is another one' if len(others) == 1 else 'are others'} than in the results in "
                f"{directory.root}: the pool was trained anew. Put {pool.directory.root} of before back, or "
                "give the new networks another results folder; without results of the pool there, remove "
                f"{path}"
            )
        noted[_name(pool.spec)] = before | own
        content = json.dumps(noted, indent=1, sort_keys=True)
        write_atomic(path, content.encode(), directory.temporary)


def is_of_others(directory: SweepDirectory, pool: TrainedPool) -> bool:
    """Whether the results in ``directory`` are known to be of other networks than those of ``pool``. Raises
    `UserError` if that cannot be read."""
    own, there = _sums(pool), _of(pool.spec, _noted(directory.pool_networks))
    return any(own[network] != there[network] for network in own.keys() & there.keys())


def _sums(pool: TrainedPool) -> dict[str, str]:
    return {f"{role} {index}": sha256[:_DIGITS] for (role, index), sha256 in pool.sums.items()}


def _of(spec: PoolSpec, noted: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = noted.get(_name(spec), {})
    return found


def _name(spec: PoolSpec) -> str:
    return f"{spec.name} {spec.recipe}"


def _noted(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise unreadable_error(error, path) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}; remove it, and the networks are noted anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no mapping; remove it, and the networks are noted anew")
    return found
