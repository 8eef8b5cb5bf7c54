"""Findings in data sets, kept until one of their files changes.

In the user's cache, ``ddsweep/surveys``: one small file of JSON for each set and way of reading it. It only
saves time: if it cannot be written or read, the data are checked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddsweep.catalog import DatasetSpec, Remark, Survey
from ddsweep.errors import DataError

__all__ = [
    "Files",
    "as_text",
    "files_of",
    "forget_survey",
    "from_text",
    "keep_survey",
    "kept_survey",
    "look_at_files",
]

_VERSION = 1
_SETTLED_S = 2.0
"""A file that changed so shortly before the check may change again within one tick of its clock."""


@dataclass(frozen=True)
class Files:
    """``key`` stands for the state of the files and the settings of reading; ``size`` is their bytes,
    ``changed`` the time of their last change, in seconds of the epoch."""

    key: str
    size: int
    changed: float


def look_at_files(
    spec: DatasetSpec, sized: bool, folder: Path, paths: Sequence[tuple[str, Path]], found: object
) -> Files:
    """The state of ``paths``, (role, file), of ``spec`` in ``folder``. ``found`` are other observations
    there. Raises `DataError` for a missing file."""
    read_as = (spec.native_shape, spec.classes, spec.class_names, spec.image_column, spec.label_column, sized)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((_VERSION, _decoder(), str(folder.resolve()), spec.source, read_as, found)).encode())
    size, changed = 0, 0.0
    for role, path in paths:
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(
                f"dataset {spec.name}: {path} cannot be read: {error.strerror or error}"
            ) from error
        size += state.st_size
        changed = max(changed, state.st_mtime, state.st_ctime)
        known = (role, str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
        digest.update(repr(known).encode())
    return Files(digest.hexdigest(), size, changed)


def files_of(*known: object) -> Files:
    """The state of data that ``known`` alone decides, without files."""
    digest = hashlib.blake2b(repr((_VERSION, *known)).encode(), digest_size=16)
    return Files(digest.hexdigest(), 0, 0.0)


def _decoder() -> str:
    from PIL import __version__

    return __version__


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ddsweep" / "surveys"


def kept_survey(files: Files) -> Survey | None:
    """The findings in ``files``, if they were kept."""
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError):
        return from_text((_folder() / f"{files.key}.json").read_text("utf-8"))
    return None


def forget_survey(files: Files) -> None:
    """Forget the findings: ``files`` are checked again."""
    with suppress(OSError, RuntimeError):
        (_folder() / f"{files.key}.json").unlink(missing_ok=True)


def as_text(found: Survey) -> str:
    return json.dumps(asdict(found))


def from_text(text: str) -> Survey:
    """Read text of `as_text`. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
    content = json.loads(text)
    remarks = tuple(Remark(**{**item, "examples": tuple(item["examples"])}) for item in content["remarks"])
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return Survey(**{**plain, "remarks": remarks})


def keep_survey(files: Files, found: Survey, began: float) -> None:
    """Keep the findings ``found`` of a check that began at ``began``, unless a file may still be changing."""
    if files.changed > began - _SETTLED_S:
        return
    with suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = folder / f".{files.key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            partial.write_text(as_text(found), "utf-8")
            partial.replace(folder / f"{files.key}.json")
        finally:
            partial.unlink(missing_ok=True)
