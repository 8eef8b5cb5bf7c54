"""A distilled set in which trials begin: read and checked without torch, known by the hash of its tensors.

``image_init: {set: FILE}`` names the file (`resolve_set`). The hash enters the ids of trials, and a copy goes
with the results (`ddsweep.results.code.write_sets`), where the processes that run trials find it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ddsweep.catalog import TrialSpec
from ddsweep.errors import SettingError, UserError
from ddsweep.paths import user_path
from ddsweep.tensor_file import read_header

__all__ = ["check_start", "is_unsorted", "know_sets", "known_set", "resolve_set", "set_digest", "set_file"]

_DIGITS = 12

_read_here: dict[str, bytes] = {}
"""The files that this process has read from where users keep them, by the hash in their names."""

_ALIKE = ("images_per_class", "inner_steps", "whitening")
_SPLIT = ("split_seed", "validation_fraction")


def set_file(folder: Path, digest: str) -> Path:
    """Where the copy of a set lies in ``folder``."""
    return folder / f"{digest}.safetensors"


def set_digest(sha256: str) -> str:
    """The name of a set, of the SHA-256 of its tensors."""
    return sha256[:_DIGITS]


def resolve_set(value: Mapping[Any, Any], what: str) -> str:
    """The name ``set@<hash>`` of the set in a mapping ``{set: FILE}`` of the setting ``what``. The path is
    relative to the folder in which ddsweep was started. Raises `SettingError` for another mapping, and for a
    file that is no whole distilled set."""
    given = value.get("set")
    if set(value) != {"set"} or not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise SettingError(f"{what}: {dict(value)!r}: give {{set: FILE}}, a distilled.safetensors")
    path = user_path(given)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(
            f"{what}: set: {path} cannot be read: {error.strerror or error}; a sweep that has begun goes on "
            "by the sweep.yaml of its results, which have a copy"
        ) from None
    digest, _ = _looked_into(data, f"{what}: set: {path}")
    _read_here[digest] = data
    return f"set@{digest}"


def know_sets(digests: Iterable[str], folder: Path) -> None:
    """Take the copies in ``folder`` for sets of these hashes that this process has not read."""
    for digest in digests:
        with suppress(OSError, SettingError):  # whoever needs the set says what is wrong
            if digest not in _read_here:
                data = set_file(folder, digest).read_bytes()
                if _looked_into(data, digest)[0] == digest:
                    _read_here[digest] = data


def known_set(digest: str) -> bytes | None:
    """The bytes of the file of a set, if this process has read it."""
    return _read_here.get(digest)


_header = lru_cache(maxsize=64)(read_header)


def _looked_into(data: bytes, where: str) -> tuple[str, Mapping[str, Any]]:
    """The name and the header of the set in a file. Raises `SettingError`, which begins with ``where``."""
    try:
        header, found = _header(data)
    except ValueError as error:
        raise SettingError(f"{where}: {error}") from None
    if header.get("kind") != "distilled":
        raise SettingError(f"{where}: holds a {header.get('kind', 'file')}, not a distilled set")
    return set_digest(found), header


def check_start(trial: TrialSpec, folder: Path) -> None:
    """Whether the set in which ``trial`` begins, if it does, was read by this process or has a copy in
    ``folder``, and suits it. Raises `SettingError` for one that does not suit, and `UserError` for a missing
    or altered copy."""
    if trial.start_set is None:
        return
    path = set_file(folder, trial.start_set)
    try:
        data = _read_here.get(trial.start_set) or path.read_bytes()
    except OSError as error:
        raise UserError(
            f"image_init: {trial.image_init}: {path} cannot be read: {error.strerror or error}; run the "
            "sweep from its own file again, which says where the set is"
        ) from None
    try:
        digest, header = _looked_into(data, f"image_init: {path}")
    except SettingError as error:  # no fault of the trial
        raise UserError(str(error)) from None
    if digest != trial.start_set:
        raise UserError(f"image_init: {path} holds another set than its name says; remove it")
    try:
        made = TrialSpec.from_dict(header["spec"])
    except (SettingError, TypeError, KeyError) as error:
        raise UserError(f"image_init: {trial.image_init} was made by another version: {error}") from None
    imported = header.get("imported")
    # A trial that went on from an imported set has learned on its own training images.
    unknown = imported and made.method == "given"
    _check(trial, made, _ALIKE if unknown else (*_ALIKE, *_SPLIT), unsorted=is_unsorted(imported))


def is_unsorted(imported: Mapping[str, Any] | None) -> bool:
    """Whether the images of a set with this remark on its import are in the order of a file, and not sorted
    by class."""
    return imported is not None and imported.get("order") == "file"


def _check(trial: TrialSpec, made: TrialSpec, alike: Sequence[str], *, unsorted: bool) -> None:
    """A set is a start for trials on its own data, split as they were: else it may have seen images that
    trials are judged by. Nobody knows which training images an imported set has seen."""
    theirs, ours = made.dataset, trial.dataset
    if theirs.identity() != ours.identity():
        other = ours.name if theirs.name != ours.name else "other content of that name"
        raise SettingError(
            f"image_init: {trial.image_init} was made on {theirs.name}, and this trial is on {other}; a set "
            "is a start on its own data alone"
        )
    if (trial.method, trial.labels, made.labels) == ("given", "hard", "soft"):
        raise SettingError(
            f"labels: hard: {trial.image_init} has soft labels, and method: given takes it as it is; give "
            "labels: soft"
        )
    if unsorted and trial.labels != "soft":
        raise SettingError(
            f"image_init: {trial.image_init} was imported with soft labels whose largest numbers are not the "
            "classes in equal numbers, so its images stand for no classes by their places; give labels: soft"
        )
    for name in alike:
        before, now = getattr(made, name), getattr(trial, name)
        if before != now:
            raise SettingError(
                f"image_init: {trial.image_init} was made with {name} {before}, and this trial has {now}; "
                f"the trial and its start set must agree in {', '.join(alike)}"
            )
