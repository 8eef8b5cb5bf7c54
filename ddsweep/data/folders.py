"""The images of a ``folder`` source: their files, and other files among them.

Neither torch nor numpy here. PIL is imported only if a file's name does not tell whether it is an image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ddsweep.catalog import MOST_EXAMPLES, DatasetSpec, Remark
from ddsweep.data.layout import PUT_THERE, MissingError, location
from ddsweep.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "Listing", "class_order", "list_folder", "printable", "split_folders"]

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".pbm", ".tif", ".tiff", ".webp"}
)
"""A file with one of these is taken for an image. For other files the content decides."""

_NO_IMAGE = "left out: not readable as images"
_HIDDEN = "left out: names that begin with a dot"
_LOOSE = "left out: beside the class folders, not in one"
_NESTED = "images in folders inside the class folders, read like the others"

_LISTED = 8
"""So many folders are named in a message."""


@dataclass(frozen=True)
class Listing:
    """The images of a ``folder`` source by role, as (label, file), sorted by class, folder, and path in it.

    ``names`` are the classes. ``remarks`` are about files that were left out; ``broken`` are (path, reason)
    of broken links and of unreadable folders and files.
    """

    names: tuple[str, ...]
    files: dict[str, list[tuple[int, Path]]]
    remarks: tuple[Remark, ...]
    broken: tuple[tuple[str, str], ...]


@dataclass
class _Found:
    by_kind: dict[str, list[str]] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)

    def note(self, kind: str, path: str) -> None:
        self.by_kind.setdefault(kind, []).append(printable(path))

    def cannot(self, path: str, reason: str) -> None:
        self.broken.append((printable(path), reason))

    def remarks(self) -> tuple[Remark, ...]:
        return tuple(
            Remark(kind, len(paths), tuple(paths[:MOST_EXAMPLES])) for kind, paths in self.by_kind.items()
        )


def printable(path: str) -> str:
    """``path`` as text. Bytes that are not UTF-8 are spelt out."""
    return path.encode("utf-8", "backslashreplace").decode()


def class_order(names: Iterable[str]) -> tuple[str, ...]:
    """``names`` in the order of their classes: by number if all are whole numbers, else as text."""
    names = set(names)
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def list_folder(spec: DatasetSpec, root: Path | None) -> Listing:
    """The files in the folders of ``spec``. Folders inside class folders belong to the class.

    ``spec.class_names`` gives the classes and their order; if empty they are the folders in train, in the
    order of `class_order`. Raises `DataError` for a missing folder, a folder in both train and test, and a
    class folder without a class.
    """
    found = _Found()
    parts = split_folders(spec, root)
    folders = {role: [_class_folders(parent, found) for parent in parts[role]] for role in parts}
    names = spec.class_names or class_order({name for inside in folders["train"] for name in inside})
    files: dict[str, list[tuple[int, Path]]] = {}
    for role, parents in folders.items():
        extra = sorted({name for inside in parents for name in inside} - set(names))
        if extra:
            where = " and ".join(map(str, parts[role]))
            raise DataError(
                f"dataset {spec.name}: {role} has a folder {extra[0]!r} in {where} "
                f"that is not a class; classes are {', '.join(names)}"
            )
        files[role] = [
            (label, Path(path))
            for label, name in enumerate(names)
            for inside in parents
            if name in inside
            for path in _images(inside[name], found, frozenset())
        ]
    return Listing(names, files, found.remarks(), tuple(found.broken))


def split_folders(spec: DatasetSpec, root: Path | None) -> dict[str, list[Path]]:
    """The folders of train and of test. Raises `DataError` for one that is missing, or in both."""
    base = location(spec, root)
    parts = {
        role: [base / str(item) for item in items]
        for role, items in (("train", spec.train), ("test", spec.test))
    }
    for role, folders in parts.items():
        for folder in folders:
            if not folder.is_dir():
                what = f"{role} folder {folder} is missing"
                hint = PUT_THERE
                if base.is_dir():
                    there = sorted(item.name for item in base.iterdir() if item.is_dir())
                    listed = ", ".join(there[:_LISTED]) + (", ..." if there[_LISTED:] else "") or "no folders"
                    hint = (
                        f"{base} has {listed}; `train` and `test` of a data set name its folders, and a "
                        "function of your own (docs/settings.md) may split images that are in one"
                    )
                raise MissingError(f"dataset {spec.name}: {what}; {hint}", what)
    everything = [(role, folder.resolve()) for role, folders in parts.items() for folder in folders]
    for i, (role, folder) in enumerate(everything):
        for other, before in everything[:i]:
            if folder == before or folder in before.parents or before in folder.parents:
                places = f"twice in {role}" if role == other else "in both train and test"
                raise DataError(f"dataset {spec.name}: folder {folder} is {places}")
    return parts


def _class_folders(parent: Path, found: _Found) -> dict[str, str]:
    """The folders in ``parent`` that are not hidden, by name."""
    folders = {}
    for entry, kind in _entries(str(parent), found):
        if kind == "folder" and printable(entry.name) != entry.name:
            found.cannot(entry.path, "the name of a class must be UTF-8")
        elif kind == "folder":
            folders[entry.name] = entry.path
        elif kind == "file" and _is_image(entry.path):
            found.note(_LOOSE, entry.path)
    return folders


def _images(folder: str, found: _Found, above: frozenset[str]) -> Iterator[str]:
    """The image files in ``folder`` and the folders in it. Each folder is entered once on the way down."""
    here = os.path.realpath(folder)
    if here in above:
        found.cannot(folder, "the link leads back to a folder that it is in")
        return
    for entry, kind in _entries(folder, found):
        if kind == "folder":
            for path in _images(entry.path, found, above | {here}):
                if not above:
                    found.note(_NESTED, path)
                yield path
        elif kind == "file" and _is_image(entry.path):
            yield entry.path
        else:
            found.note(_NO_IMAGE, entry.path)


def _entries(folder: str, found: _Found) -> Iterator[tuple[os.DirEntry[str], str]]:
    """The entries of ``folder``, sorted by name, each a ``folder``, a ``file``, or a ``special`` one such as
    a pipe. Hidden entries are left out, and broken links are noted as broken."""
    try:
        with os.scandir(folder) as inside:
            entries = sorted(inside, key=lambda entry: entry.name)
    except OSError as error:
        found.cannot(folder, f"cannot be looked at: {error.strerror or error}")
        return
    for entry in entries:
        if entry.name.startswith("."):
            if not entry.name.startswith("._") and _suffix(entry.name) in IMAGE_SUFFIXES:
                found.note(_HIDDEN, entry.path)
            continue
        try:
            kind = "folder" if entry.is_dir() else "file" if entry.is_file() else "special"
            if kind == "special" and entry.is_symlink() and not os.path.exists(entry.path):
                found.cannot(entry.path, "a link to a file that is not there")
                continue
        except OSError as error:
            found.cannot(entry.path, f"cannot be looked at: {error.strerror or error}")
            continue
        yield entry, kind


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_image(path: str) -> bool:
    if _suffix(path) in IMAGE_SUFFIXES:
        return True
    from ddsweep.data.decode import is_image

    return is_image(Path(path))
