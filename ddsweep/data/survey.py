"""Checks the user's own data: every image once, with a `Survey` as the result.

No torch: ``plan`` does it. The result is kept (`ddsweep.data.survey_cache`) until a file changes. The source
finds files and labels; the functions here check them.
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
from ddsweep.data.decode import Look, look, unusable
from ddsweep.data.labels import Label, Labelled, Place
from ddsweep.data.sources import Looking
from ddsweep.data.survey_cache import keep_survey, kept_survey, look_at_files
from ddsweep.data.tally import Tally

__all__ = ["Item", "looked_at", "summed_up", "survey_once"]

_THREADS = 8
"""Threads wait for a file server together; decoding goes one after the other."""
_AT_ONCE, _TOGETHER = 1024, 32
"""Images in progress, and images of one thread at a time."""
_MANY, _MUCH = 10_000, 256 << 20
"""With so many files or bytes the user is told that this takes a while."""


class Item(NamedTuple):
    """An image to check: its role, its raw label, its place, and its file or bytes."""

    role: str
    label: Label
    place: Place
    source: Path | bytes


def survey_once(
    spec: DatasetSpec,
    folder: Path,
    paths: Sequence[tuple[str, Path]],
    look_at_all: Callable[[], Survey],
    how: Looking,
    *,
    seen: object = None,
) -> Survey:
    """What ``look_at_all`` finds in ``paths``, (role, file), or what is kept of it.

    ``seen`` are other findings in ``folder``. Paths in the result are those below ``folder``.
    """
    began = time.time()
    files = look_at_files(spec, how.sized, folder, paths, seen)
    kept = kept_survey(files)
    if kept is not None:
        return kept
    if how.say and (files.size > _MUCH or len(paths) > _MANY):
        how.say(
            f"dataset {spec.name}: looking at {files.size / 1e6:,.0f} MB of images; next time that is known"
        )
    found = _from(f"{folder}/", look_at_all())
    keep_survey(files, found, began)
    return found


def _from(folder: str, found: Survey) -> Survey:
    """``found`` with paths relative to ``folder``."""
    remarks = [
        replace(remark, examples=tuple(item.replace(folder, "") for item in remark.examples))
        for remark in found.remarks
    ]
    problems = [problem.replace(folder, "") for problem in found.problems]
    return replace(found, remarks=tuple(remarks), problems=tuple(problems))


def summed_up(
    spec: DatasetSpec, sized: bool, tally: Tally, labels: Labelled, content: str, read_as: dict[str, Any]
) -> Survey:
    """``read_as`` are the settings of reading; ``content`` is the hash of the files."""
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


def looked_at(items: Iterable[Item]) -> Iterator[tuple[Item, bytes, Look]]:
    """Each item with the digest of its file (empty for bytes) and its properties, in order."""
    rest = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        while batch := list(itertools.islice(rest, _AT_ONCE)):
            chunks = [batch[i : i + _TOGETHER] for i in range(0, len(batch), _TOGETHER)]
            for looks in pool.map(_look_at_chunk, chunks):
                yield from looks


def _look_at_chunk(chunk: Sequence[Item]) -> list[tuple[Item, bytes, Look]]:
    return [(item._replace(source=b""), *_look_at(item.source)) for item in chunk]


def _look_at(source: Path | bytes) -> tuple[bytes, Look]:
    if isinstance(source, bytes):
        return b"", look(source)
    try:
        content = source.read_bytes()
    except OSError as error:
        return b"", unusable(f"cannot be read: {error.strerror or error}")
    return hashlib.blake2b(content, digest_size=16).digest(), look(content)
