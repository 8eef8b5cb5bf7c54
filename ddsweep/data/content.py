"""The hash over the files of a data set, which enters trial ids. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ddsweep.errors import DataError

__all__ = ["combined_digest", "file_digest"]


def combined_digest(source: str, entries: Iterable[tuple[str, str, bytes]]) -> str:
    """32 hex of (role, class name or nothing, digest of the file's bytes), in order.

    Paths, file names and the name of the data set do not enter.
    """
    total = hashlib.blake2b(f"ddsweep {source} 1".encode(), digest_size=16)
    for role, class_name, digest in entries:
        label = class_name.encode()
        total.update(f"{role} {len(label)} ".encode() + label + digest)
    return total.hexdigest()


def file_digest(name: str, path: Path) -> bytes:
    """The digest of the bytes of a file of data set ``name``."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        raise DataError(f"dataset {name}: {path} cannot be read: {error.strerror or error}") from error
