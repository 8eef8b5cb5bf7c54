"""A distilled set in which trials begin: read and checked without torch, known by the hash of its tensors.

``image_init: {set: FILE}`` names the file (`resolve_set`). The hash enters the ids of trials, and a copy goes
with the results (`ddsweep.results.code.write_sets`), where the processes that run trials find it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddsweep.catalog import TrialSpec
from ddsweep.errors import SettingError, UserError
from ddsweep.paths import user_path
from ddsweep.tensor_file import read_header

__all__ = ["check_starts", "resolve_set", "set_content", "set_file", "sets_of"]

_DIGITS = 12

_read_here: dict[str, bytes] = {}
"""The files that this process has read from where users keep them, by the hash in their names."""

_ALIKE = ("images_per_class", "inner_steps", "whitening", "split_seed", "validation_fraction")


def set_file(folder: Path, digest: str) -> Path:
    """Where the copy of a set lies in ``folder``."""
    return folder / f"{digest}.safetensors"


def resolve_set(value: Mapping[Any, Any], what: str) -> str:
    """The name ``set@<hash>`` of the set in a mapping ``{set: FILE}`` of the setting ``what``. The path is
    relative to the folder in which ddsweep was started. Raises `SettingError` for another mapping, and for a
    file that is no whole distilled set."""
    if set(value) != {"set"} or not isinstance(value["set"], str) or not value["set"]:
        raise SettingError(f"{what}: {dict(value)!r}: give {{set: FILE}}, a distilled.safetensors")
    path = user_path(value["set"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingError(f"{what}: set: {path} cannot be read: {error.strerror or error}") from None
    digest = _digest(data, f"{what}: set: {path}")
    _read_here[digest] = data
    return f"set@{digest}"


def _digest(data: bytes, where: str) -> str:
    """The name of the set in a file. Raises `SettingError`, which begins with ``where``."""
    try:
        header, found = read_header(data)
    except ValueError as error:
        raise SettingError(f"{where}: {error}") from None
    if header.get("kind") != "distilled":
        raise SettingError(f"{where}: holds a {header.get('kind', 'file')}, not a distilled set")
    return found[:_DIGITS]


def check_starts(trials: Iterable[TrialSpec], folder: Path) -> None:
    """Whether the sets in which ``trials`` begin are there, in this process or as copies in ``folder``, and
    suit them. Raises `SettingError` for one that does not suit, and `UserError` for a missing or altered
    copy."""
    made: dict[str, TrialSpec] = {}
    for trial in trials:
        if trial.start_set is None:
            continue
        if trial.start_set not in made:
            header, _ = read_header(set_content(trial.start_set, folder))
            made[trial.start_set] = TrialSpec.from_dict(header["spec"])
        _check(trial, made[trial.start_set])


def _check(trial: TrialSpec, made: TrialSpec) -> None:
    """A set is a start for trials on its own data, split as they were: else it may have seen images that
    trials are judged by."""
    if made.dataset.identity() != trial.dataset.identity():
        raise SettingError(
            f"image_init: {trial.image_init} was made on {made.dataset.name}, and this trial is on "
            f"{trial.dataset.name}; a set is a start on its own data alone"
        )
    for name in _ALIKE:
        theirs, ours = getattr(made, name), getattr(trial, name)
        if theirs != ours:
            raise SettingError(
                f"image_init: {trial.image_init} was made with {name} {theirs}, and this trial has {ours}; "
                f"the trial and its first set must agree in {', '.join(_ALIKE)}"
            )


def sets_of(trials: Iterable[TrialSpec]) -> list[str]:
    """The sets in which ``trials`` begin, by their hashes."""
    return [digest for digest in dict.fromkeys(trial.start_set for trial in trials) if digest is not None]


def set_content(digest: str, folder: Path) -> bytes:
    """The bytes of the file of a set that this process has read, or of its copy in ``folder``. Raises
    `UserError` if it is neither, and for a copy that was altered."""
    if digest in _read_here:
        return _read_here[digest]
    path = set_file(folder, digest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"image_init: set@{digest}: {path} cannot be read: {error.strerror or error}; run the sweep from "
            "its own file again, which says where the set is"
        ) from None
    if _digest(data, f"image_init: {path}") != digest:
        raise UserError(f"image_init: {path} holds another set than its name says; remove it")
    return data
