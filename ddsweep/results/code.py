"""The copies of users' code, and of sets in which trials begin, beside the results: ``code/``, ``sets/``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ddsweep.catalog import CodeRef, TrialSpec
from ddsweep.own_code import known_source, load_code, stored_source
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import SweepDirectory
from ddsweep.start_set import set_content, set_file

__all__ = ["load_code_of", "write_code", "write_sets"]


def load_code_of(specs: Iterable[TrialSpec], folder: Path) -> None:
    """Run the code of users' own networks and methods of ``specs``, from its copies in ``folder``. Raises
    `UserError` for copies that do not match the ids."""
    for spec in specs:
        for ref in (spec.network_spec.code, spec.method_code):
            if ref is not None:
                load_code(ref, folder)


def write_code(directory: SweepDirectory, refs: Iterable[CodeRef]) -> None:
    """Put the sources of ``refs`` where workers, `eval` and later readers find them; existing copies stay.

    Raises `UserError` for one that is neither there nor was read by this process, and for a copy that was
    changed since.
    """
    for ref in refs:
        if not ref.is_file:
            continue
        home, source = directory.code / ref.digest, known_source(ref)
        for name, content in ({} if source is None else source.files).items():
            if not (home / name).exists():
                write_atomic(home / name, content, directory.temporary)
        stored_source(ref, directory.code)


def write_sets(directory: SweepDirectory, digests: Iterable[str]) -> None:
    """Put the sets of these hashes where workers find them, as `write_code` does. Raises `UserError` as
    `ddsweep.start_set.set_content` does."""
    for digest in digests:
        content, path = set_content(digest, directory.sets), set_file(directory.sets, digest)
        if not path.exists():
            write_atomic(path, content, directory.temporary)
