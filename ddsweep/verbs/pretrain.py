"""The verb `pretrain`: pools of trained networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddsweep.errors import EXIT_DRAINED, EXIT_INTERRUPTED, UserError
from ddsweep.verbs.arguments import Address, DataRoot, PoolOverrides, ResultsRoot, Smoke, find
from ddsweep.verbs.inputs import aside, data_folder, results_root

if TYPE_CHECKING:
    from ddsweep.catalog import DatasetSpec
    from ddsweep.pools.file import PoolFile
    from ddsweep.spec import SweepSpec
    from ddsweep.sweep.drain import Drain

__all__ = ["pretrain", "pretrain_smoke"]


def pretrain(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A pool file, or the name of one that comes with ddsweep, such as usps_lenet.",
            callback=find("pool file"),
        ),
    ],
    settings: PoolOverrides = None,
    results: ResultsRoot = None,
    data_root: DataRoot = None,
    smoke: Smoke = False,
    address: Address = None,
) -> None:
    """Train a pool of networks for `init: pretrained`. Ctrl-C drains; the same command goes on."""
    from ddsweep.sweep.drain import Drain

    with Drain() as drain:
        from ddsweep.pools.file import load_pool

        with drain.interruptible():
            pool = load_pool(file, settings or (), smoke=smoke)
        _pretrain(pool, results_root(results), data_folder(data_root), address, drain)


def pretrain_smoke(
    sweep: SweepSpec,
    files: Path,
    results: Path,
    data_root: Path | None,
    address: str | None,
    drain: Drain,
) -> None:
    """Make the tiny pools of the smoke version of a sweep, from their files beside it."""
    from ddsweep.catalog import SMOKE
    from ddsweep.pools.file import load_pool

    searched = sweep.search.space.get("pool", {}).get("choice", []) if sweep.search else []
    named = [settings.get("pool") for settings in (sweep.base, *sweep.points)]
    for name in dict.fromkeys(map(str, [*named, *sweep.grid.get("pool", []), *searched])):
        file = files / f"{name.removesuffix(SMOKE)}.yaml"
        if name.endswith(SMOKE) and file.is_file():
            _pretrain(load_pool(file, smoke=True), results, data_root, address, drain)


def _pretrain(
    pool: PoolFile, results: Path, data_root: Path | None, address: str | None, drain: Drain
) -> None:
    from ddsweep.data.files import require_files, resolve_dataset
    from ddsweep.pools.file import listed, load_pool, pool_yaml
    from ddsweep.report.console import report_console
    from ddsweep.report.data import remark_lines
    from ddsweep.report.pool import pool_lines
    from ddsweep.results.files import remove_leftovers, write_atomic
    from ddsweep.results.layout import PoolDirectory
    from ddsweep.results.lock import SweepLock
    from ddsweep.spec import is_smoke

    stand_in = is_smoke(pool.name)

    def dataset(value: Any) -> DatasetSpec:
        return resolve_dataset(value, data_root, stand_in=stand_in, say=aside, may_run=True)

    recipe = pool.recipe(dataset)
    directory, console = PoolDirectory(results / "pools" / pool.name), report_console()
    if directory.pool_file.is_file():
        from ddsweep.pools.train import check_parts, missing_groups  # here: checks of files need no torch

        before = load_pool(directory.pool_file).recipe(dataset)
        if (before.recipe, before.train) != (recipe.recipe, recipe.train) or before.heldout > recipe.heldout:
            raise UserError(
                f"{directory.root} holds a pool of other settings ({directory.pool_file}); give this one "
                "another name, or remove the folder (heldout alone may grow)"
            )
        check_parts(directory, recipe)
        whole = listed(directory) == (recipe.train, recipe.heldout)
        if before == recipe and whole and not missing_groups(recipe, directory):
            for line in pool_lines(directory):
                console.print(line)
            return
    if not stand_in:
        require_files(recipe.dataset, data_root)
    for line in remark_lines([recipe.dataset]):
        console.print(line, soft_wrap=True)
    with drain.interruptible():
        from ddsweep.sweep.drain import Interrupted
        from ddsweep.sweep.pretrain import PoolRequest, train_pool

    def ready() -> None:
        write_atomic(directory.pool_file, pool_yaml(pool).encode(), directory.temporary)

    directory.create()
    with SweepLock(directory.lock) as lock, drain.leftover(lock.release):
        remove_leftovers(directory.temporary)
        try:
            whole = train_pool(
                PoolRequest(pool, recipe, directory, data_root, address, stand_in),
                console.print,
                drain,
                ready,
            )
        except Interrupted:
            console.print("stopped at once; the same command goes on with the networks that are missing")
            raise typer.Exit(EXIT_INTERRUPTED) from None
    if not whole:
        console.print("drained; the same command goes on with the networks that are missing")
        raise typer.Exit(EXIT_DRAINED)
    for line in pool_lines(directory):
        console.print(line)
