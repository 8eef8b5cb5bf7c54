"""The summary of a finished pool of networks."""

from __future__ import annotations

from ddsweep.catalog.numbers import counted
from ddsweep.results.layout import PoolDirectory
from ddsweep.results.parts import read_part
from ddsweep.results.statistics import mean_std_ci

__all__ = ["pool_lines"]


def pool_lines(directory: PoolDirectory) -> list[str]:
    """One line for each role: accuracy of its networks on the test set of their own data, and their cost."""
    rows = read_part(directory.index).to_pylist()
    lines = []
    for role in ("train", "heldout"):
        own = [row for row in rows if row["role"] == role]
        mean, std, _ = mean_std_ci([row["accuracy"] for row in own])
        spread = "" if std is None else f" ± {100 * std:.1f}"
        data = own[0]["dataset"] + (" (stand-in)" if own[0]["dataset_stand_in"] else "")
        lines.append(
            f"{role}: {counted(len(own), 'network')}, {100 * mean:.1f}{spread} % on the test set of {data}, "
            f"{counted(round(sum(row['cpu_seconds'] for row in own)), 'CPU second')}"
        )
    return [*lines, f"Index: {directory.index}"]
