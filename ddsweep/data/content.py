"""The hash over the files of a data set that stands for it in trial ids. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ddsweep.catalog import DatasetSpec
from ddsweep.data.folders import list_folder
from ddsweep.data.layout import parquet_files
from ddsweep.errors import DataError

__all__ = ["combined_digest", "content_digest", "file_digest"]


def content_digest(spec: DatasetSpec, root: Path | None) -> str:
    """32 hex of a hash over the chosen files of a ``parquet`` or ``folder`` source.

    What enters: the bytes of each file with its role (train or test), in order, and for ``folder`` its
    class name. What does not: paths, file names, the name of the data set.
    """
    if spec.source == "parquet":
        entries = [
            (role, "", file_digest(spec.name, path))
            for role, paths in parquet_files(spec, root).items()
            for path in paths
        ]
    else:
        listing = list_folder(spec, root)
        entries = [
            (role, listing.names[label], file_digest(spec.name, path))
            for role, files in listing.files.items()
            for label, path in files
        ]
    return combined_digest(spec.source, entries)


def combined_digest(source: str, entries: Iterable[tuple[str, str, bytes]]) -> str:
    """Of (role, class name or nothing, digest of the file's bytes), in order."""
    total = hashlib.blake2b(f"ddsweep {source} 1".encode(), digest_size=16)
    for role, class_name, digest in entries:
        label = class_name.encode()
        total.update(f"{role} {len(label)} ".encode() + label + digest)
    return total.hexdigest()


def file_digest(name: str, path: Path) -> bytes:
    """Of the bytes of a file of data set ``name``."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        raise DataError(f"dataset {name}: {path} cannot be read: {error.strerror or error}") from error
