"""The sweep, pool and site files that come with ddsweep: finding them by name, and writing copies to edit.

In a source tree they are the folders ``sweeps/`` and ``slurm/`` beside the package; a wheel holds a copy
inside the package.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path

from ddsweep.errors import SettingError, UserError

__all__ = ["FOLDERS", "Written", "bundled_names", "find_file", "write_files"]

FOLDERS = {"sweep file": "sweeps", "pool file": "sweeps/pools", "site file": "slurm"}
"""The folder of each kind of file, below the common folder."""

_INSIDE = Path(__file__).parent / "_bundled"
_SUFFIXES = (".yaml", ".sbatch")


def _root() -> Path:
    return _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[1]


def bundled_names(kind: str) -> list[str]:
    """The names of the files of ``kind``, a key of `FOLDERS`."""
    return sorted(path.stem for path in (_root() / FOLDERS[kind]).glob("*.yaml"))


def find_file(given: Path, kind: str) -> Path:
    """The file for ``given``: a path, or the bare name of a file of ``kind``.

    A name is looked for first below the current folder, as ``sweeps/NAME.yaml``, then among the files that
    come with ddsweep. Raises `SettingError` for a missing file.
    """
    there = os.path.exists(given)  # False for a name that no file can have
    if there and not given.is_dir():
        return given
    folder, names = FOLDERS[kind], bundled_names(kind)
    by_name = len(given.parts) == 1 and not given.suffix
    for place in (Path(folder), _root() / folder) if by_name else ():
        if os.path.isfile(path := place / f"{given}.yaml"):
            return path
    if there:  # a folder, which its reader refuses
        return given
    if by_name:
        close = difflib.get_close_matches(str(given), names, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        if os.path.isfile(f"{given}.yaml"):
            meant = f" (did you mean {given}.yaml?)"
        raise SettingError(
            f"{given}: no such {kind}{meant}; those that come with ddsweep: {', '.join(names)}"
        )
    hint = ""
    if given.stem in names:
        hint = f"; ddsweep comes with one that goes by its name, {given.stem}; `ddsweep init` writes a copy"
    raise SettingError(f"{given}: no such {kind}{hint}")


@dataclass
class Written:
    """The result of `write_files`, as paths below the folder: ``kept`` existed already; ``differ`` are those
    of them that differ from the files that come with ddsweep."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    differ: list[Path] = field(default_factory=list)


def write_files(directory: Path) -> Written:
    """Write the files that come with ddsweep into ``directory``. An existing file stays as it is. Raises
    `UserError` for a folder that cannot be written."""
    found = Written()
    for folder in FOLDERS.values():
        for source in sorted((_root() / folder).iterdir()):
            if source.suffix not in _SUFFIXES:
                continue
            target = directory / folder / source.name
            name = target.relative_to(directory)
            try:
                if _write_new(target, source.read_bytes()):
                    found.written.append(name)
                    continue
                found.kept.append(name)
                if target.read_bytes() != source.read_bytes():
                    found.differ.append(name)
            except OSError as error:
                where = error.filename or target
                raise UserError(f"{where}: cannot be written: {error.strerror or error}") from None
    return found


def _write_new(path: Path, content: bytes) -> bool:
    """Make ``path`` with ``content``, in full or not at all; False if it exists already."""
    if os.path.lexists(path):
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return True
