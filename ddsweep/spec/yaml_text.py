"""YAML to plain values and back. Every file and every override goes through here.

PyYAML reads YAML 1.1, in which ``010`` is 8, ``1:30`` is 90 and ``2026-01-02`` is a date. These are mistakes
in a sweep file, so they are refused; in quotes they are text, as everywhere in YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ddsweep.errors import SettingError

__all__ = ["parse_yaml", "yaml_of"]

_MISREAD = "!misread"
_SURPRISES = {
    "leading zero": r"[-+]?0[0-9_]+",
    "base 60": r"[-+]?([1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)",
    "date": r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?",
}
"""Plain scalars that YAML 1.1 reads in another way than they look."""


def _with_surprises(resolvers: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """``resolvers`` of PyYAML (lists by the first character), with a tag for those scalars before them: a
    loader then refuses them, and a dumper puts texts that look like them in quotes."""
    ours = (_MISREAD, re.compile(rf"(?:{'|'.join(_SURPRISES.values())})\Z"))
    return {**resolvers, **{first: [ours, *resolvers.get(first, [])] for first in "-+0123456789"}}


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing such scalars, and a key that is given twice (YAML would keep the last in
    silence)."""

    yaml_implicit_resolvers = _with_surprises(yaml.SafeLoader.yaml_implicit_resolvers)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._seen: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """What ``<<`` brings is put before the keys of ``node``, which go over it. Here, because afterwards
        they look as if they were given twice, and an alias leads to the same node again."""
        if id(node) not in self._seen:
            self._seen.add(id(node))
            self._refuse_twice(node)
        super().flatten_mapping(node)

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)

    def refuse_misread(self, node: yaml.ScalarNode) -> Any:
        text = node.value
        kind = next(name for name, form in _SURPRISES.items() if re.fullmatch(form, text))
        quoted = f"'{text}' in quotes for text"
        if kind == "leading zero":
            number = ("-" if text.startswith("-") else "") + (text.lstrip("+-0_") or "0")
            what = f"starts with 0, as numbers to the base 8 do in YAML; write {number}, or {quoted}"
        elif kind == "base 60":
            what = f"is a number to the base 60 in YAML; write one to the base 10, or {quoted}"
        else:
            what = f"is a date in YAML; write {quoted}"
        raise yaml.constructor.ConstructorError(None, None, f"{text} {what}", node.start_mark)


_Loader.add_constructor(_MISREAD, _Loader.refuse_misread)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _with_surprises(yaml.SafeDumper.yaml_implicit_resolvers)


def parse_yaml(text: str, where: str) -> Any:
    """The value of ``text``; messages begin with its origin ``where``. Raises `SettingError`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SettingError(f"{where}: {place}{error.problem or 'not YAML'}") from None
    except yaml.YAMLError as error:
        raise SettingError(f"{where}: not YAML: {getattr(error, 'reason', error)}") from None
    except (ValueError, RecursionError) as error:  # e.g. an alias inside itself
        raise SettingError(f"{where}: not YAML that can be read: {error}") from None


def yaml_of(content: Mapping[str, Any]) -> str:
    """``content`` as YAML that `parse_yaml` reads back to an equal mapping (of lists, for tuples)."""
    return yaml.dump(
        _plain(content),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=100,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
