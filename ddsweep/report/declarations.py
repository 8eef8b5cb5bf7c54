"""The settings of trials, and the keys of sweep, pool and site files, as they are declared.

The text below a field says what it means, for `ddsweep settings` and for the tables of the documents.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from textwrap import dedent
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from ddsweep.catalog import GROUPS, SettingsGroup, settings_in
from ddsweep.pools.file import PoolFile
from ddsweep.report.formats import plain
from ddsweep.spec import SweepSpec
from ddsweep.spec.files import SECTIONS

__all__ = ["TRIAL", "Key", "declared", "keys_of_group", "plain_text", "texts_below"]

TRIAL = "trial"
_SECTIONS: dict[str, type[BaseModel]] = {"file": SweepSpec, **SECTIONS, "pool": PoolFile}


@dataclass(frozen=True)
class Key:
    """A setting or key of ``section``. ``default`` and ``meaning`` are Markdown. ``one_of`` are the words
    that it takes, and ``limit`` says which numbers, if it does not take every value of its type."""

    name: str
    section: str
    default: str
    meaning: str
    one_of: tuple[str, ...] = ()
    limit: str = ""

    @property
    def dotted(self) -> str:
        """As on the command line."""
        return self.name if self.section in (TRIAL, "file", "pool") else f"{self.section}.{self.name}"


def declared(more: Mapping[str, type[BaseModel]]) -> dict[str, list[Key]]:
    """All declarations by section, with those of ``more``."""
    sections = {TRIAL: [key for group in GROUPS for key in keys_of_group(group)]}
    return sections | {name: _of_model(name, model) for name, model in {**_SECTIONS, **more}.items()}


def keys_of_group(group: type[SettingsGroup]) -> list[Key]:
    meanings = _meanings(group) | {item.name: getattr(group, item.name).__doc__ for item in group.derived}
    return [
        Key(
            item.name,
            TRIAL,
            _default(item.default),
            meanings[item.name],
            item.one_of,
            item.limit.words if item.limit else "",
        )
        for item in settings_in(group)
    ]


def _of_model(section: str, model: type[BaseModel]) -> list[Key]:
    meanings = _meanings(model)
    return [
        Key(
            name,
            section,
            _default(MISSING if item.is_required() else item.default),
            meanings[name],
            _words(item.annotation),
        )
        for name, item in model.model_fields.items()
    ]


@cache
def texts_below(of: type) -> list[tuple[list[str], str]]:
    """The texts in a class, each with the fields above it, back to the previous text."""
    (node,) = ast.parse(dedent(inspect.getsource(of))).body
    assert isinstance(node, ast.ClassDef)
    found: list[tuple[list[str], str]] = []
    above: list[str] = []
    for item in node.body:
        match item:
            case ast.AnnAssign(target=ast.Name(id=name)):
                above.append(name)
            case ast.Expr(value=ast.Constant(value=str(text))) if above:
                found.append((above, " ".join(text.split())))
                above = []
    return found


def _meanings(of: type) -> dict[str, str]:
    return {names[-1]: text for names, text in texts_below(of)}


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    if isinstance(value, BaseModel):
        return "its own"
    if value is None or (isinstance(value, list | tuple | dict) and not value):
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(_default, value))
    return f"`{str(value).lower()}`" if isinstance(value, bool | str) else plain(value)


def _words(annotation: Any) -> tuple[str, ...]:
    """The words of an annotation that is a `Literal`, or one or None."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) is Literal:
        return tuple(map(str, parts))
    return _words(parts[0]) if get_origin(annotation) in (Union, UnionType) and len(parts) == 1 else ()


def plain_text(markdown: str) -> str:
    """For a terminal: without backticks and links."""
    text = re.sub(r" \(\[[^]]*\]\([^)]*\)\)", "", markdown)
    return re.sub(r"\[([^]]*)\]\(([#a-z_-][^)]*)\)", r"\1", text).replace("`", "")
