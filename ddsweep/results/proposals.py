"""The samples that guided searches have proposed: ``proposals/<search>.json``, one file for each search.

A proposal depends on the scores at its time, so it is written down before its trials start. From then on it
is part of the sweep. Only the holder of the sweep's lock writes; others may read at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddsweep.errors import ResultsError
from ddsweep.results.files import names_in, unreadable_error, write_atomic
from ddsweep.results.layout import SweepDirectory

__all__ = ["read_proposals", "write_proposals"]


def read_proposals(directory: SweepDirectory) -> dict[str, list[dict[str, Any]]]:
    """The samples of each search in the order in which they were proposed, by the key of the search; the
    folder need not be there. Raises `ResultsError` for a file that is not one of proposals, and
    `UnreadableError`."""
    paths = (directory.proposals / name for name in names_in(directory.proposals) if name.endswith(".json"))
    return {path.stem: _samples(path) for path in paths}


def write_proposals(
    directory: SweepDirectory, key: str, settings: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Write all ``samples`` of a search, the last ones new. ``settings`` are those outside its space; they
    are for readers. Raises `ResultsError`."""
    lines = ",\n  ".join(map(_json, samples))
    text = f'{{"settings": {_json(settings)},\n "samples": [\n  {lines}\n ]}}\n'
    write_atomic(directory.proposals / f"{key}.json", text.encode(), directory.temporary)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, default=list, allow_nan=False)


def _samples(path: Path) -> list[dict[str, Any]]:
    try:
        samples = json.loads(path.read_bytes())["samples"]
        if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
            raise ValueError
    except OSError as error:
        raise unreadable_error(error, path) from error
    except (ValueError, KeyError, TypeError):
        raise ResultsError(
            f"{path}: not a file of proposals; put a copy back, or remove it: then this search begins anew"
        ) from None
    return samples
