"""The copies of users' code, and of sets in which trials begin, beside the results: ``code/``, ``sets/``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ddsweep.catalog import CodeRef, TrialSpec
from ddsweep.own_code import known_source, load_code, stored_source
from ddsweep.results.files import write_atomic
from ddsweep.results.layout import SweepDirectory
from ddsweep.start_set import check_start, known_set, set_file

__all__ = ["check_start_if_needed", "load_code_of", "write_code", "write_sets"]


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


def check_start_if_needed(trial: TrialSpec, directory: SweepDirectory) -> None:
    """`ddsweep.start_set.check_start` of a trial that is not distilled yet; others need no set any more."""
    if not directory.distilled(trial.trial_id).exists():
        check_start(trial, directory.sets)


def write_sets(directory: SweepDirectory, digests: Iterable[str]) -> None:
    """Put those of the sets of these hashes that this process has read where workers find them, over copies
    that were altered."""
    for digest in digests:
        content, path = known_set(digest), set_file(directory.sets, digest)
        if content is not None and not (path.is_file() and path.read_bytes() == content):
            write_atomic(path, content, directory.temporary)
