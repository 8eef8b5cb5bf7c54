"""A user's own code: read without running it, known by a hash over its source, and run only when asked to.

``{file: my_nets.py, name: SmallNet, width: 32}`` names an object of a file and its arguments. `resolve_code`
reads the file and those that it imports from its own folder, and nothing of them runs: the hash over all of
them enters the ids of trials. A copy goes into the results (`ddsweep.results.code`). A process that runs
trials calls `load_code`, which runs that copy if its hash is the one in the id. All others, such as a reader
of tables, never do, and `loaded_code` tells them so. ``{module: torchvision.models, name: resnet18}`` is an
installed module, which counts by its path.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from ddsweep.catalog.numbers import real, whole
from ddsweep.catalog.own_code import DIGEST_LENGTH, CodeRef, code_options
from ddsweep.errors import SettingError, UserError
from ddsweep.paths import user_path

__all__ = [
    "Source",
    "copied_source",
    "data_reference",
    "known_source",
    "load_code",
    "loaded_code",
    "names_code",
    "read_source",
    "resolve_code",
    "stored_source",
    "version_of",
]

_NEVER_OWN = ("ddsweep", "torch", "numpy")
"""Imported as installed, also if the current folder has one of that name, such as a checkout."""

_MOST_FILES, _MOST_BYTES = 200, 8 << 20


@dataclass(frozen=True)
class Source:
    """The bytes of a file and of its imports from its own folder, by path in that folder."""

    main: str
    files: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """A hash over names and bytes of all files."""
        found = hashlib.sha256(self.main.encode() + b"\0")
        for name in sorted(self.files):
            found.update(f"{name}\0{len(self.files[name])}\0".encode() + self.files[name])
        return found.hexdigest()[:DIGEST_LENGTH]


# ----------------------------------------------------------------------------------------- reading


def resolve_code(value: Mapping[Any, Any], what: str) -> tuple[CodeRef, Source | None]:
    """What a mapping ``{file | module, name, options}`` of setting ``what`` means; of a file also its source.

    Nothing is run. Paths are relative to the folder in which ddsweep was started. Raises `SettingError` for a
    mapping of another form, a file that is missing or not Python, a name that it does not have, and a module
    that is not installed.
    """
    homes = [key for key in ("file", "module") if key in value]
    name = value.get("name")
    if len(homes) != 1 or not isinstance(value[homes[0]], str) or not value[homes[0]]:
        raise SettingError(
            f"{what}: {dict(value)!r}: give either `file`, a path, or `module`, an import path"
        )
    if not isinstance(name, str) or not name.isidentifier():
        raise SettingError(f"{what}: name: {name!r} is not the name of a class or function in it")
    given = {key: _typed(item) for key, item in value.items() if key not in ("file", "module", "name")}
    options = code_options(given, what)
    if homes == ["module"]:
        return CodeRef(_installed(value["module"], what), name, options), None
    source = read_source(user_path(value["file"]), what)
    _check_name(source, name, what, value["file"])
    _read_here[source.digest] = source
    return CodeRef(source.main, name, options, source.digest), source


def names_code(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping in a sweep file is meant to name a user's code, and no files of data."""
    return "source" not in value and ("file" in value or "module" in value)


def data_reference(value: Mapping[Any, Any]) -> str:
    """The text for a ``dataset`` that a function gives: its reference (`resolve_code`), and after it ``size``
    and ``channels``, which are no options of the function, as in the name of a transformed data set."""
    code = {key: item for key, item in value.items() if key not in _TRANSFORMS}
    ref, _ = resolve_code(code, "dataset")
    given: dict[str, int] = {}
    for key in _TRANSFORMS:
        if value.get(key) is not None:
            try:
                given[key] = whole(value[key])
            except ValueError:
                raise SettingError(f"dataset: {key} must be a whole number, not {value[key]!r}") from None
    if given.get("channels", 3) != 3:
        raise SettingError(f"dataset: {ref}: channels is 3, which repeats a grey channel, or left out")
    text = ",".join(f"{key}={number}" for key, number in given.items())
    return f"{ref}({text})" if text else str(ref)


_TRANSFORMS = ("channels", "size")


def _typed(value: Any) -> Any:
    """``1e-3``, which PyYAML reads as text, as the number that it is. It reads every other number as one, so
    a text such as ``"2007"`` was in quotes and stays."""
    if not isinstance(value, str) or "e" not in value.lower():
        return value
    try:
        return real(value)
    except ValueError:
        return value


def _installed(module: str, what: str) -> str:
    top = module.partition(".")[0]
    if not all(part.isidentifier() for part in module.split(".")):
        raise SettingError(f"{what}: module: {module!r} is not an import path such as torchvision.models")
    try:
        found = importlib.util.find_spec(top)  # for a top-level module this runs nothing
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise SettingError(f"{what}: module: {module}: there is no package {top!r} installed here")
    return module


def read_source(path: Path, what: str) -> Source:
    """The source in ``path`` and the files of its folder that it imports, directly or not, by ``import`` and
    ``from ... import`` anywhere in them. Raises `SettingError` for a file that cannot be read or parsed, and
    for an import from outside the folder."""
    folder = path.parent
    if not re.fullmatch(r"[\w-]+\.py", path.name) or path.name == "__init__.py":
        raise SettingError(
            f"{what}: file: {path} is not a file of Python: NAME.py, of letters, digits, _ and -"
        )
    files: dict[str, bytes] = {}
    todo = [PurePosixPath(path.name)]
    while todo:
        inside = todo.pop()
        if str(inside) in files:
            continue
        files[str(inside)] = content = _read(folder / inside, what)
        if len(files) > _MOST_FILES or sum(map(len, files.values())) > _MOST_BYTES:
            raise SettingError(f"{what}: file: {path} imports more than {_MOST_FILES} files of its folder")
        for names in _imports(_parsed(content, folder / inside, what), inside, f"{what}: {folder / inside}"):
            todo += _files_of(folder, names)
    return Source(path.name, files)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingError(f"{what}: file: {path} cannot be read: {error.strerror or error}") from None


def _parsed(content: bytes, path: Path, what: str) -> ast.Module:
    try:
        return ast.parse(content, str(path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise SettingError(f"{what}: file: {path}{line}: not Python: {reason}") from None


def _imports(tree: ast.Module, inside: PurePosixPath, where: str) -> Iterator[tuple[str, ...]]:
    """The import paths, from the folder of the main file, that ``tree`` may mean by its imports."""
    package = inside.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level > len(package) + 1:
                raise SettingError(
                    f"{where}, line {node.lineno}: imports from outside the folder of the file"
                )
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            yield base
            yield from ((*base, alias.name) for alias in node.names)


def _files_of(folder: Path, names: tuple[str, ...]) -> list[PurePosixPath]:
    """The files in ``folder`` that importing ``names`` runs: packages on the way, and the module."""
    if not names or names[0] in _NEVER_OWN or "*" in names:
        names = names[:-1] if names and names[-1] == "*" and names[0] not in _NEVER_OWN else ()
    found = []
    for length in range(1, len(names) + 1):
        place = PurePosixPath(*names[:length])
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if (folder / file).is_file():
                found.append(file)
                break
    return found


def _check_name(source: Source, name: str, what: str, file: str) -> None:
    """Whether the main file binds ``name``, as far as that can be seen without running it."""
    tree = ast.parse(source.files[source.main])
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    if name not in bound and "*" not in bound:
        raise SettingError(f"{what}: name: {file} has no {name!r}{_like(name, bound)}")


def _like(name: str, there: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, there, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


_read_here: dict[str, Source] = {}
"""The sources that this process has read from where users keep them, by hash."""


def known_source(ref: CodeRef) -> Source | None:
    """The source of ``ref`` if this process has read it from its own file."""
    return _read_here.get(ref.digest)


def copied_source(ref: CodeRef, folder: Path, to: Path) -> None:
    """Put the source of ``ref``, which this process has read or `stored_source` finds in ``folder``, into
    ``to``, an empty folder for a process that is to run it."""
    for name, content in (known_source(ref) or stored_source(ref, folder)).files.items():
        path = to / ref.digest / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def stored_source(ref: CodeRef, folder: Path) -> Source:
    """The source of ``ref`` as it lies in ``folder``, ``folder/<hash>/``, where `ddsweep.results.code` puts
    it. Raises `UserError` if it is missing, or has another hash."""
    home = folder / ref.digest
    paths = [path for path in sorted(home.rglob("*.py")) if path.is_file()]
    if not (home / ref.where).is_file():
        raise UserError(
            f"{home / ref.where}: the code of {ref} is not there; run the sweep from its file again"
        )
    files = {path.relative_to(home).as_posix(): path.read_bytes() for path in paths}
    source = Source(ref.where, files)
    if source.digest != ref.digest:
        raise UserError(
            f"{home}: changed since {ref} was run: its hash is {source.digest} now; it is not run. "
            "Remove the folder and run the sweep from its file again"
        )
    return source


# ----------------------------------------------------------------------------------------- running

_loaded: dict[CodeRef, Any] = {}
"""The objects of this process, by reference without options, as sys.modules keeps modules."""


def load_code(ref: CodeRef, folder: Path) -> Any:
    """Run the code of ``ref`` once in a process (for a file, its copy in ``folder``: `stored_source`), and
    return its object. Raises `UserError` for a copy with another hash, code that raises, and a name that it
    does not have."""
    key = replace(ref, options=())
    if key not in _loaded:
        name = ref.where
        if ref.is_file:
            name = f"{_package(ref)}.{PurePosixPath(ref.where).stem}"
            if _package(ref) not in {
                finder.package for finder in sys.meta_path if isinstance(finder, _Finder)
            }:
                source = stored_source(ref, folder)
                sys.meta_path.insert(0, _Finder(_package(ref), source, folder / ref.digest))
        try:
            module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            told = place_and_error(error, ref)
            raise UserError(f"{ref}: importing {ref.where} failed: {told}") from error
        if not hasattr(module, ref.name):
            raise UserError(f"{ref}: {ref.where} has no {ref.name!r}{_like(ref.name, vars(module))}")
        _loaded[key] = getattr(module, ref.name)
    return _loaded[key]


def loaded_code(ref: CodeRef) -> Any:
    """The object of ``ref``, if this process has loaded it. Runs nothing. Raises `UserError` if not."""
    key = replace(ref, options=())
    if key not in _loaded:
        raise UserError(
            f"{ref}: this is code of a user's own, and it does not run here; `run`, `eval` and `launch` "
            "of a sweep that names it run it, and ddsweep.own_code.load_code does, where you trust it"
        )
    return _loaded[key]


def version_of(ref: CodeRef) -> str | None:
    """The package of a module and its version, ``torchvision 0.24.0``; None for a file, and if it is not
    known."""
    if ref.is_file:
        return None
    return _version_of_package(ref.where.partition(".")[0])


@functools.cache
def _version_of_package(top: str) -> str | None:
    for name in importlib.metadata.packages_distributions().get(top, []):
        return f"{name} {importlib.metadata.version(name)}"
    return None


def place_and_error(error: BaseException, *refs: CodeRef) -> str:
    """``my_nets.py, line 12, in forward: ValueError: ...``: the last line that is in the files, or in the
    packages, of ``refs``. Without such a line the error alone."""
    said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = PurePosixPath(frame.filename)
        for ref in refs:
            top = ref.digest if ref.is_file else ref.where.partition(".")[0]
            if top in path.parts:
                inside = path.parts[path.parts.index(top) + ref.is_file :]
            elif not ref.is_file and path.stem == top:
                inside = (path.name,)
            else:
                continue
            return f"{PurePosixPath(*inside)}, line {frame.lineno}, in {frame.name}: {said}"
    return said


def _package(ref: CodeRef) -> str:
    return f"ddsweep_own_{ref.digest}"


class _Finder(MetaPathFinder, Loader):
    """Imports the files of one source as modules of a package of their own, so that two versions of a file,
    or two files of one name, can be in one process. The hashed bytes are what runs."""

    def __init__(self, package: str, source: Source, home: Path) -> None:
        self.package, self.home = package, home
        self.files = dict(source.files)
        self.top = {PurePosixPath(name).parts[0].removesuffix(".py") for name in self.files}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, inside = fullname.partition(".")
        if root != self.package:
            return None
        place = PurePosixPath(*inside.split(".")) if inside else None
        init = str(place / "__init__.py") if place else "__init__.py"
        if place and init not in self.files and f"{place}.py" in self.files:
            return ModuleSpec(fullname, self, origin=str(self.home / f"{place}.py"))
        if place and not any(name.startswith(f"{place}/") for name in self.files):
            return None
        spec = ModuleSpec(fullname, self, origin=str(self.home / init), is_package=True)
        spec.submodule_search_locations = []
        return spec

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None and module.__spec__.origin is not None
        file = Path(module.__spec__.origin)
        module.__file__ = str(file)
        content = self.files.get(file.relative_to(self.home).as_posix())
        if content is None:  # a folder without __init__.py
            return
        tree = _Renamed(self.package, self.top).visit(ast.parse(content, str(file)))
        code = compile(ast.fix_missing_locations(tree), str(file), "exec", dont_inherit=True)
        exec(code, module.__dict__)


class _Renamed(ast.NodeTransformer):
    """Imports of own modules, prefixed with their package here."""

    def __init__(self, package: str, top: set[str]) -> None:
        self.package, self.top = package, top

    def _own(self, name: str) -> bool:
        first = name.partition(".")[0]
        return first in self.top and first not in _NEVER_OWN

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.level == 0 and node.module and self._own(node.module):
            node.module = f"{self.package}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for alias in node.names:
            if not self._own(alias.name):
                out.append(ast.Import([alias]))
                continue
            out.append(ast.Import([ast.alias(f"{self.package}.{alias.name}", alias.asname)]))
            if alias.asname is None:  # `import a.b` binds a
                out.append(ast.ImportFrom(self.package, [ast.alias(alias.name.partition(".")[0])], 0))
        return [ast.copy_location(statement, node) for statement in out]
