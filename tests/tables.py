"""Whole tables of parts, as tests look at them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ddsweep.results.parts import is_whole, list_parts, read_parts


def read_table(directory: Path, schema: pa.Schema) -> pa.Table:
    """All parts of a folder as one table of exactly ``schema``."""
    return read_parts(list_parts(directory), schema)


def torn_parts(directory: Path) -> list[Path]:
    """The parts of a folder that cannot be read in full, sorted by name."""
    return [path for path in list_parts(directory) if not is_whole(path)]
