"""`train_pool`: trains the missing networks of a pool, a group at a time, on Ray workers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from ddsweep.catalog import POOL_FRACTION
from ddsweep.core.memory import keep_to_share
from ddsweep.data.load import Splits, load_splits
from ddsweep.errors import UserError
from ddsweep.pools.file import PoolFile
from ddsweep.pools.recipe import PoolRecipe
from ddsweep.pools.store import write_index
from ddsweep.pools.train import PoolGroup, check_parts, missing_groups, train_group
from ddsweep.results.files import full_disk_told
from ddsweep.results.layout import PoolDirectory
from ddsweep.sweep.drain import Drain
from ddsweep.sweep.join import check_nodes
from ddsweep.sweep.placement import check_gpus_seen
from ddsweep.sweep.retry import RetryPolicy, told_death
from ddsweep.sweep.session import ray_session
from ddsweep.sweep.shards import SharedSplits, get_splits, put_splits
from ddsweep.trial_plan import pick_device

__all__ = ["PoolRequest", "train_pool"]

RETRIES = RetryPolicy(3)
"""How often, and when, a group is tried again after its worker died."""


@dataclass(frozen=True)
class PoolRequest:
    """A pool to be trained, and where. ``address`` is that of a Ray to join; ``stand_in`` allows small
    made-up data for missing files."""

    pool: PoolFile
    recipe: PoolRecipe
    directory: PoolDirectory
    data_root: Path | None
    address: str | None = None
    stand_in: bool = False


def load_pool_splits(recipe: PoolRecipe, data_root: Path | None, *, stand_in: bool = False) -> Splits:
    """The data of a pool; its validation part, the same as that of trials, is left alone."""
    return load_splits(
        recipe.dataset, data_root, validation_fraction=POOL_FRACTION, split_seed=0, stand_in=stand_in
    )


def train_pool(
    request: PoolRequest, say: Callable[[str], None], drain: Drain, on_ready: Callable[[], None]
) -> bool:
    """Train what is missing of a pool and write its index; False if a signal ended it before that. The caller
    holds the pool's lock. ``on_ready`` is called once all that could be refused has been checked.

    Raises `UserError` before any work for data that is not there and resources that do not fit, `Drained` if
    it is told to end before the work begins.
    """
    pool, recipe, address = request.pool, request.recipe, request.address
    directory = PoolDirectory(request.directory.root.resolve())  # workers may run in another folder
    with drain.interruptible():
        groups = missing_groups(recipe, directory)
    if not groups:
        check_parts(directory, recipe)
        on_ready()
        write_index(directory, recipe.spec(pool.name))
        return True
    with drain.interruptible():
        splits = load_pool_splits(recipe, request.data_root, stand_in=request.stand_in)
        check_parts(directory, recipe, splits)
    directory.stop_file.unlink(missing_ok=True)
    draining = threading.Event()
    with ray_session(
        drain,
        job=f"pretrain {pool.name}",
        address=address,
        cpus=pool.total_cpus,
        gpus=pool.total_gpus,
        dashboard=False,
        data_bytes=splits.nbytes,
    ) as session:
        if address is not None:
            check_nodes({node.name: node.host for node in session.nodes}, directory.temporary)
        for name, asked, there in (("cpus", pool.cpus, session.cpus), ("gpus", pool.gpus, session.gpus)):
            if asked > there:
                raise UserError(f"{name}: a group of networks asks for {asked:g}, but there are {there:g}")
        on_ready()
        shared = put_splits(splits)
        needs = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_retries": 0}
        train = ray.remote(_train_in_worker)

        def start(group: PoolGroup) -> Any:
            there = train.options(name=f"pool {pool.name}, {group.label}", **needs)
            return there.remote(pool, recipe, group, shared, directory)

        def begin_drain(cause: str) -> None:
            draining.set()
            with suppress(OSError):  # no space, say: groups that are begun then end by themselves
                directory.stop_file.touch()
            say(f"{cause}: draining; what is trained stays (again to stop at once)")

        begun, done = time.monotonic(), 0
        try:
            with drain.at_work(begin_drain, directory.stop_file):
                running = {start(group): group for group in groups}
                deaths, resting = Counter[str](), dict[float, PoolGroup]()
                # A drain does not wait: a group is written as a whole, once it is trained.
                while (running or resting) and not draining.is_set():
                    for due in [due for due in resting if due <= time.monotonic()]:
                        group = resting.pop(due)
                        running[start(group)] = group
                    finished: Sequence[Any] = ()
                    if running:
                        finished, _ = ray.wait(list(running), timeout=0.5)
                    else:
                        time.sleep(0.5)
                    for reference in finished:
                        group = running.pop(reference)
                        try:
                            trained = _result(reference, group)
                        except ray.exceptions.RayError as error:  # the worker died
                            deaths[group.label] += 1
                            wait, death = RETRIES.wait(deaths[group.label]), told_death(str(error))
                            if wait is None:
                                times = f"{group.label}: tried {deaths[group.label]} times"
                                raise UserError(f"{times}: {death}") from error
                            resting[time.monotonic() + wait] = group
                            say(f"{pool.name}: {group.label}: tried again in {wait:.0f} s: {death}")
                            continue
                        if trained:
                            done += 1
                            seconds = time.monotonic() - begun
                            left = seconds / done * (len(groups) - done)
                            say(
                                f"{pool.name}: {group.label} trained, {done} of {len(groups)} groups, "
                                f"{_clock(seconds)}, about {_clock(left)} left"
                            )
        finally:
            directory.stop_file.unlink(missing_ok=True)
    if draining.is_set() and missing_groups(recipe, directory):
        return False
    write_index(directory, recipe.spec(pool.name))
    return True


def _train_in_worker(
    pool: PoolFile, recipe: PoolRecipe, group: PoolGroup, shared: SharedSplits, directory: PoolDirectory
) -> bool:
    check_gpus_seen(pool.gpus, group.label)
    device = pick_device(pool.device, pool.gpus)
    keep_to_share(device.type, pool.gpus)
    with full_disk_told(directory.root):
        return train_group(
            pool.name,
            recipe,
            group,
            get_splits(shared),
            directory,
            device,
            max(1, int(pool.cpus)),
            should_stop=directory.stop_file.exists,
        )


def _result(reference: ray.ObjectRef[bool], group: PoolGroup) -> bool:
    """Raises `UserError` for an error of the work itself, and Ray's error if its worker died."""
    try:
        return bool(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise UserError(f"{group.label}: {type(error.cause).__name__}: {error.cause}") from error


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
