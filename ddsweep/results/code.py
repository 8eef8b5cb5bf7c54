"""The copies of users' code beside the results that it made: ``code/<hash>/``."""

from __future__ import annotations

from collections.abc import Iterable

from ddsweep.own_code import Source
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import SweepDirectory

__all__ = ["write_code"]


def write_code(directory: SweepDirectory, sources: Iterable[Source]) -> None:
    """Put ``sources`` where workers, `eval` and a reader next year find them; what is there stays.

    A file that was changed since is left alone as well: whoever runs it is told (`stored_source`).
    """
    for source in sources:
        home = directory.code / source.digest
        for name, content in source.files.items():
            if not (home / name).exists():
                (home / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(home / name, content, directory.temporary)
