"""A user's own code by name: the object, its file or module, its options, and the hash of its source.

Nothing is read or run here: a `CodeRef` is one line of text in ids, tables and files, and back.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddsweep.errors import SettingError

__all__ = ["DIGEST_LENGTH", "CodeRef", "is_code", "own_code", "parse_code"]

DIGEST_LENGTH = 12
"""The number of hex digits of a source's hash in its name."""

_TEXT = re.compile(
    r"(?P<where>[^:()@\s]+):(?P<name>[A-Za-z_]\w*)(?:\((?P<options>.*)\))?(?:@(?P<digest>[0-9a-f]+))?"
)


@dataclass(frozen=True)
class CodeRef:
    """The object ``name`` of ``where``: the name of a file (``my_nets.py``), or a module on the path
    (``torchvision.models``); ``options`` are what it is called with, sorted by name.

    ``digest`` is the hash over the file and those that it imports from its own folder; empty for a module,
    which counts by its path. As text, ``my_nets.py:SmallNet(width=32)@3f2a91c07bd1``, it stands in trial ids
    and tables.
    """

    where: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    digest: str = ""

    @property
    def is_file(self) -> bool:
        return bool(self.digest)

    @property
    def arguments(self) -> dict[str, Any]:
        """The options by name, with lists as they stand in a sweep file."""
        return {key: list(item) if isinstance(item, tuple) else item for key, item in self.options}

    def __str__(self) -> str:
        options = ",".join(f"{key}={_written(value)}" for key, value in self.options)
        source = f"@{self.digest}" if self.digest else ""
        return f"{self.where}:{self.name}{options and f'({options})'}{source}"


def is_code(text: str) -> bool:
    """Whether ``text`` is meant to name a user's code: names that come with ddsweep have no colon."""
    return ":" in text.partition("(")[0]


def own_code(what: str, text: str) -> bool:
    """`is_code` of a value of the setting ``what``. Raises `SettingError` if it is no whole name."""
    if is_code(text):
        parse_code(text, what)
        return True
    return False


def parse_code(text: str, what: str) -> CodeRef:
    """The reference (`CodeRef`) that ``text`` holds; messages begin with the setting ``what``. Raises
    `SettingError` for any other text."""
    match = _TEXT.fullmatch(text.strip())
    options = None if match is None else _options(match["options"] or "")
    if match is None or options is None:
        raise SettingError(f"{what}: {text!r} is not the name of own code, such as {_EXAMPLE}")
    where, digest = match["where"], match["digest"] or ""
    if where.endswith(".py") != bool(digest):
        hint = "names a file without the hash of its source" if not digest else "has the hash of a file"
        raise SettingError(f"{what}: {text!r} {hint}; in a sweep file, write {_EXAMPLE}")
    if digest and len(digest) != DIGEST_LENGTH:
        raise SettingError(f"{what}: {text!r}: the hash of a source has {DIGEST_LENGTH} digits")
    return CodeRef(where, match["name"], code_options(options, what), digest)


_EXAMPLE = "{file: my_code.py, name: NAME}"


def _options(text: str) -> dict[str, Any] | None:
    """The arguments by name between the brackets; None for anything else."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(item.arg is None for item in call.keywords):
            return None
        return {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
    except (SyntaxError, ValueError):
        return None


def code_options(given: Mapping[Any, Any], what: str) -> tuple[tuple[str, Any], ...]:
    """``given`` options sorted by name. Raises `SettingError` for a key that is not the name of an argument,
    and for values other than numbers, texts, truth values, null, and lists of them."""
    for key, value in given.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise SettingError(f"{what}: {key!r} is not the name of an argument")
        items = value if isinstance(value, list | tuple) else [value]
        if any(item is not None and not isinstance(item, bool | int | float | str) for item in items):
            raise SettingError(
                f"{what}: {key}: {value!r} is neither a number, a text, true, false, nor a list"
            )
        if any(isinstance(item, float) and not abs(item) < float("inf") for item in items):
            raise SettingError(f"{what}: {key}: {value!r} is not finite")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return tuple(sorted(plain.items()))


def _written(value: Any) -> str:
    """As Python writes it, without spaces between items; a tuple as a list."""
    if isinstance(value, tuple):
        return f"[{','.join(map(repr, value))}]"
    return repr(value)
