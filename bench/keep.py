"""Keep the results of a finished sweep in the repository: sets, pictures and tables, without hosts' names.

python bench/keep.py results/mnist_random docs/reproduction/mnist_random
python bench/keep.py --tables results/ablation_steps_epochs_ipc docs/studies/ablation_steps_epochs_ipc
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from ddsweep.catalog.numbers import counted
from ddsweep.errors import UserError
from ddsweep.results.artifacts import load_tensors, save_tensors
from ddsweep.results.collect import sorted_rows
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import PoolDirectory, SweepDirectory

TABLES = ("trials", "evals", "history")


def keep(directory: SweepDirectory, out: Path, *, sets: bool = True) -> list[str]:
    """Write what belongs to the finished trials of ``directory`` into the folder ``out``, with the file of
    their pool; their ids. Without ``sets``, only the sweep and its tables. Trials that the sweep file no
    longer has are left out, and their sets in ``out`` removed.

    Raises `UserError` for parts that are torn, if no trial is done, and for trials of several pools.
    """
    torn: list[Path] = []
    tables = {name: pa.concat_tables([*sorted_rows(directory, name, torn.append)]) for name in TABLES}
    if torn:
        raise UserError(f"{torn[0]}: torn; run the sweep again first")
    trials = tables["trials"].to_pylist()
    done = [row["trial_id"] for row in trials if row["status"] == "done" and row["in_sweep"] is not False]
    if not done:
        raise UserError(f"{directory.root}: no trial is done")
    pools = {row["pool"] for row in trials if row["trial_id"] in done} - {None}
    if len(pools) > 1:
        raise UserError(
            f"{directory.root}: trials of several pools, {', '.join(sorted(pools))}: keep one sweep each"
        )
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / ".tmp"
    for name, table in tables.items():
        mine = table.filter(pa.compute.is_in(table["trial_id"], pa.array(done)))
        pq.write_table(_without_host(mine), out / f"{name}.parquet", compression="zstd")
    for trial_id in done if sets else ():
        _copy_set(directory.distilled(trial_id), out / f"{trial_id}.safetensors", temporary)
        write_atomic(out / f"{trial_id}.png", directory.grid(trial_id).read_bytes(), temporary)
    write_atomic(out / "sweep.yaml", directory.sweep_file.read_bytes(), temporary)
    for copy in directory.sets.glob("*.safetensors"):  # sets in which trials begin
        _copy_set(copy, out / "sets" / copy.name, temporary)
    for name in pools:
        if (file := PoolDirectory(directory.pools / name).pool_file).is_file():
            write_atomic(out / "pool.yaml", file.read_bytes(), temporary)
    for old in out.glob("*.safetensors"):
        if old.stem not in done:  # of settings that the sweep has no more
            old.unlink()
            old.with_suffix(".png").unlink(missing_ok=True)
    shutil.rmtree(temporary)
    return done


def _copy_set(path: Path, to: Path, temporary: Path) -> None:
    tensors, header = load_tensors(path)
    header["provenance"].pop("host", None)
    save_tensors(to, tensors, header, temporary)


def _without_host(table: pa.Table) -> pa.Table:
    if "host" not in table.schema.names:
        return table
    place = table.schema.get_field_index("host")
    return table.set_column(place, table.schema.field(place), pa.nulls(len(table), pa.string()))


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="the folder of a finished sweep")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tables", action="store_true", help="no sets and pictures: many trials")
    options = parser.parse_args(given)
    try:
        kept = keep(SweepDirectory(options.results), options.out, sets=not options.tables)
        print(f"{options.out}: {counted(len(kept), 'trial')}: {', '.join(kept)}")
    except UserError as error:
        print(f"keep: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
