"""HTML as text. Only this module escapes text from files."""

from __future__ import annotations

import html
import json
from typing import Any

__all__ = ["Markup", "inline_json", "join", "tag", "text"]


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """``value`` as HTML: escaped, unless it is HTML."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(*parts: object) -> Markup:
    return Markup("".join(map(text, parts)))


_EMPTY = ("br", "img", "input", "link", "meta")


def tag(name: str, /, *inside: object, **attributes: object) -> Markup:
    """An element. An attribute ``class_`` is ``class``, ``data_v`` is ``data-v``; one that is None or False
    is left out, and one that is True has no value."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{given}>" if name in _EMPTY else f"<{name}{given}>{join(*inside)}</{name}>")


def inline_json(value: Any) -> Markup:
    """JSON that can stand in a ``<script>``: no ``<`` in it ends one, or begins a comment."""
    words = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for letter in "<>&\u2028\u2029":
        words = words.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(words)
