"""Looking at own data before they are believed: every image once, and what was found as a `Survey`.

No torch, for ``plan`` does it. What was found is kept (`ddsweep.data.survey_cache`) until a file changes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ddsweep.catalog import DatasetSpec, Survey
from ddsweep.data.columns import IMAGE, LABEL, find_columns, read_rows
from ddsweep.data.content import combined_digest, file_digest
from ddsweep.data.decode import Look, look, unusable
from ddsweep.data.folders import Listing, list_folder
from ddsweep.data.labels import ROLES, Label, Labelled, Place, label_folder, label_parquet
from ddsweep.data.layout import location, parquet_files
from ddsweep.data.survey_cache import keep_survey, kept_survey, look_at_files
from ddsweep.data.tally import Tally
from ddsweep.errors import DataError

__all__ = ["Say", "survey"]

Say = Callable[[str], None]

_THREADS = 8
"""They wait for a file server together; decoding takes one after the other."""
_AT_ONCE, _TOGETHER = 1024, 32
"""Images that are waited for, and that one thread takes, at a time."""
_MANY, _MUCH = 10_000, 256 << 20
"""Files and bytes from which on a user is told that this takes a while."""


class _Item(NamedTuple):
    """An image to look at: its role, its label as it is, where it lies, and its file or bytes."""

    role: str
    label: Label
    place: Place
    source: Path | bytes


def survey(spec: DatasetSpec, root: Path | None, *, sized: bool, say: Say | None = None) -> Survey:
    """Look at every image of ``spec``, whose ``shape``, ``classes`` and ``class_names`` may be left out.

    ``sized``: images are resized anyway, so they may have different sizes. ``say`` is told once where it
    takes a while. Paths in the result are those below the folder of ``spec``. Raises `DataError` for files
    that are missing, doubled, or no readable Parquet; all else that is wrong is in ``problems``.
    """
    listing, shards = None, None
    if spec.source == "folder":
        listing = list_folder(spec, root)
        paths = [(role, path) for role in ROLES for _, path in listing.files[role]]
    else:
        shards = parquet_files(spec, root)
        paths = [(role, path) for role in ROLES for path in shards[role]]
    began, folder = time.time(), location(spec, root)
    seen = listing and (listing.names, listing.remarks, listing.broken)
    files = look_at_files(spec, sized, folder, paths, seen)
    kept = kept_survey(files)
    if kept is not None:
        return kept
    if say and (files.size > _MUCH or len(paths) > _MANY):
        say(f"dataset {spec.name}: looking at {files.size / 1e6:,.0f} MB of images; next time that is known")
    found = _of_folder(spec, listing, sized) if listing else _of_parquet(spec, shards or {}, sized)
    found = _from(f"{folder}/", found)
    keep_survey(files, found, began)
    return found


def _from(folder: str, found: Survey) -> Survey:
    """``found`` with paths from ``folder`` on, which whoever shows it names once."""
    remarks = [
        replace(remark, examples=tuple(item.replace(folder, "") for item in remark.examples))
        for remark in found.remarks
    ]
    problems = [problem.replace(folder, "") for problem in found.problems]
    return replace(found, remarks=tuple(remarks), problems=tuple(problems))


def _of_folder(spec: DatasetSpec, listing: Listing, sized: bool) -> Survey:
    tally, entries = Tally(), []
    items = (_Item(role, label, (path, None), path) for role in ROLES for label, path in listing.files[role])
    for item, digest, seen in _looked_at(items):
        entries.append((item.role, listing.names[int(item.label or 0)], digest))
        tally.add(item.role, item.label, item.place, seen)
    for path, reason in listing.broken:
        tally.troubles.add(f"{path}: {reason}")
    content = combined_digest("folder", entries)
    found = _summed_up(spec, sized, tally, label_folder(spec, listing), content, {})
    return replace(found, remarks=(*listing.remarks, *found.remarks))


def _of_parquet(spec: DatasetSpec, shards: dict[str, tuple[Path, ...]], sized: bool) -> Survey:
    first_file = shards["train"][0]
    columns = find_columns(first_file, spec.image_column, spec.label_column)
    tally, entries = Tally(), []
    roles: dict[bytes, tuple[str, Path]] = {}
    every = [(role, path) for role in ROLES for path in shards[role]]
    for role, path in every:
        digest = file_digest(spec.name, path)
        entries.append((role, "", digest))
        other, before = roles.setdefault(digest, (role, path))
        if other != role:
            raise DataError(f"dataset {spec.name}: {path} is in both train and test: it equals {before}")
        own = find_columns(path, columns.image, columns.label)
        if own.text != columns.text or (own.names and columns.names and own.names != columns.names):
            raise DataError(
                f"dataset {spec.name}: {path}: column {columns.label!r} has other classes than that of "
                f"{first_file}"
            )
        for item, _, seen in _looked_at(_rows(role, path, (columns.image, columns.label))):
            tally.add(item.role, item.label, item.place, seen)
    labels = label_parquet(spec, columns.names, columns.label, tally.labels, tally.places)
    read_as: dict[str, Any] = {}
    if (columns.image, columns.label) != (IMAGE, LABEL):
        read_as["columns"] = [columns.image, columns.label]
    if columns.text:
        read_as["classes"] = labels.names
    found = _summed_up(spec, sized, tally, labels, combined_digest("parquet", entries), read_as)
    return replace(
        found,
        image_column="" if columns.image == IMAGE else columns.image,
        label_column="" if columns.label == LABEL else columns.label,
        first_label=labels.first,
    )


def _rows(role: str, path: Path, columns: tuple[str, str]) -> Iterator[_Item]:
    row = itertools.count()
    for contents, labels in read_rows(path, *columns):
        for content, label in zip(contents, labels, strict=True):
            yield _Item(role, label, (path, next(row)), content or b"")


def _summed_up(
    spec: DatasetSpec, sized: bool, tally: Tally, labels: Labelled, content: str, read_as: dict[str, Any]
) -> Survey:
    """``read_as`` is what decides beside the files, whose hash is ``content``, what is read from them."""
    shape = tally.shape(spec)
    shared, doubled, same = tally.doubles(labels.classes)
    if tally.transparent:
        read_as = {**read_as, "transparent": "white"}
    text = json.dumps([content, read_as], sort_keys=True)
    return Survey(
        content=content,
        fingerprint=hashlib.blake2b(text.encode(), digest_size=16).hexdigest() if read_as else content,
        class_names=labels.names,
        train=labels.counts("train"),
        test=labels.counts("test"),
        shape=shape,
        test_in_train=shared,
        remarks=(*labels.remarks, *tally.remarks(shape), *doubled),
        problems=(*tally.problems(shape, sized), *labels.problems, *same),
    )


# ----------------------------------------------------------------------------------------- looking


def _looked_at(items: Iterable[_Item]) -> Iterator[tuple[_Item, bytes, Look]]:
    """Each item with the digest of its file (nothing for bytes) and what it looks like, in order."""
    rest = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        while batch := list(itertools.islice(rest, _AT_ONCE)):
            chunks = [batch[i : i + _TOGETHER] for i in range(0, len(batch), _TOGETHER)]
            for looks in pool.map(_look_at_chunk, chunks):
                yield from looks


def _look_at_chunk(chunk: Sequence[_Item]) -> list[tuple[_Item, bytes, Look]]:
    return [(item._replace(source=b""), *_look_at(item.source)) for item in chunk]


def _look_at(source: Path | bytes) -> tuple[bytes, Look]:
    if isinstance(source, bytes):
        return b"", look(source)
    try:
        content = source.read_bytes()
    except OSError as error:
        return b"", unusable(f"cannot be read: {error.strerror or error}")
    return hashlib.blake2b(content, digest_size=16).digest(), look(content)
