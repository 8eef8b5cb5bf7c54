"""Single values of a sweep file: corrected types, ranges, and the words of the messages.

PyYAML reads ``1e-3`` as text and ``on`` as true; only this module decides which values and spellings are
allowed. `TrialSpec` itself decides whether a value is possible.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ddsweep.catalog import SETTINGS, parse_network
from ddsweep.catalog.numbers import real, whole
from ddsweep.errors import SettingError
from ddsweep.own_code import data_reference, names_code, resolve_code
from ddsweep.start_set import resolve_set

SIZES = ("images_per_class", "inner_steps", "images_per_class_per_step")
MOST_TRIALS = 100_000


def folder_name(value: Any, what: str) -> str:
    """The name of a folder of results."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", value):
        raise ValueError(
            f"{shown(value)} names a folder of {what}: small letters, digits, - and _, starting with a "
            "letter or digit, at most 100"
        )
    return value


Count = Annotated[int, BeforeValidator(whole), Field(ge=1)]


def like(word: Any, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def word(value: Any, allowed: Sequence[str], more: str = "") -> str:
    """Raises `ValueError` unless ``value`` is one of ``allowed``; its text ends with ``more``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{value!r} is not one of {', '.join(allowed)}{like(value, allowed)}{more}")
    return value


def setting(name: str, value: Any) -> Any:
    """One science setting with its type corrected. Raises `ValueError` if the value alone is wrong."""
    try:
        return _setting(name, value)
    except SettingError as error:
        raise ValueError(str(error).partition(": ")[2]) from None


def _setting(name: str, value: Any) -> Any:
    declared = SETTINGS[name]
    if declared.optional and (value is None or value == "none"):
        return None
    if isinstance(value, dict):
        if name == "image_init":
            return resolve_set(value, name)
        if name == "dataset" and names_code(value):
            return data_reference(value)
        if name in _CODE:
            return str(resolve_code(value, name)[0])
    if name in _GIVEN_AS:
        if not value or not isinstance(value, str | dict):
            raise ValueError(f"{value!r} is neither {_GIVEN_AS[name]}")
        return value
    if not declared.takes(value):
        own = "; one of your own is {file: my_methods.py, name: MyMethod}" if name == "method" else ""
        return word(value, declared.one_of, own)
    kind = declared.kind.removesuffix(" | None")
    if kind in ("int", "float"):
        value = whole(value) if kind == "int" else real(value)
    elif kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
    elif not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    declared.refuse(value)
    if name == "network":  # at a size that every network of its kind takes, however deep
        side = {"convnet": 1 << 20, "alexnet": 224}.get(value.partition("(")[0].strip(), 32)
        parse_network(value, (3, side, side))
    return value


_CODE = ("network", "method")
"""The settings of which every mapping is a user's own code."""

_GIVEN_AS = {
    "dataset": "a name nor a mapping such as {source: folder, ...}",
    "pool": "the name of a pool nor {name: imagenet, weights: FILE}",
}


# ------------------------------------------------------------------------------ groups of settings

SECTION = ConfigDict(frozen=True, extra="forbid")
"""The base of every mapping in a sweep file: frozen, and unknown keys are errors."""

Problem = tuple[str, str]
"""(dotted key, its problem)"""


def settings_of(given: Any, where: str, problems: list[Problem]) -> dict[str, Any]:
    """A mapping of science settings, typed; problems are added to ``problems``."""
    if not isinstance(given, dict):
        problems.append((where, f"{shown(given)} is not a mapping of settings to values"))
        return {}
    out: dict[str, Any] = {}
    for key, value in given.items():
        if key not in SETTINGS:
            problems.append((f"{where}.{key}", unknown(key, SETTINGS)))
            continue
        try:
            out[key] = setting(key, value)
        except ValueError as error:
            problems.append((f"{where}.{key}", str(error)))
    return out


_MOST_NAMED = 16
"""A message lists at most so many names; of more it says where they are."""


def unknown(key: Any, allowed: Iterable[str], section: str = "") -> str:
    """The problem of a key that is not in ``allowed``; `ddsweep settings` lists these under ``section``."""
    allowed = list(allowed)
    names = f"allowed are {', '.join(allowed)}"
    if len(allowed) > _MOST_NAMED:
        names = f"`ddsweep settings{section and f' {section}'}` lists all there are"
    return f"unknown key {key!r}{like(key, allowed)}; {names}"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse(problems: list[Problem]) -> None:
    if problems:
        raise PydanticCustomError("settings", "wrong settings", {"problems": problems})


def words_of(
    allowed: Sequence[str], *, short: Mapping[str, tuple[str, ...]] | None = None
) -> BeforeValidator:
    """Validates a list of distinct words; ``short`` are words that stand for a whole list."""

    def check(value: Any) -> tuple[str, ...]:
        if isinstance(value, str) and short and value in short:
            return short[value]
        if not isinstance(value, list | tuple):
            raise ValueError(f"{shown(value)} is not a list of words from {', '.join(allowed)}")
        words = tuple(word(item, allowed) for item in value)
        if len(set(words)) < len(words):
            raise ValueError(f"{list(words)} names one of them twice")
        return words

    return BeforeValidator(check)


def wholes(value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{shown(value)} is not a list of whole numbers")
    numbers = tuple(whole(item) for item in value)
    if numbers and min(numbers) < least:
        raise ValueError(f"{min(numbers)} must be at least {least}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{shown(value)} gives a number twice")
    return numbers


def positives(value: Any) -> tuple[float, ...]:
    """Distinct positive numbers, the smallest first."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{shown(value)} is not a list of numbers")
    numbers = tuple(sorted(real(item) for item in value))
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"{shown(value)}: every number must be positive")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{shown(value)} gives a number twice")
    return numbers


def amount(value: Any, *, shared: bool = False) -> float | dict[Any, Any]:
    """CPUs or GPUs of a trial: a number, or ``{by: setting, value: number, ..., default: number}``.

    ``shared``: beyond one only whole numbers, for one trial cannot have a part of a second GPU.
    """
    if not isinstance(value, dict):
        return _number_of(value, shared)
    by = value.get("by")
    if not isinstance(by, str) or by not in SETTINGS:
        near = like(by, SETTINGS)
        raise ValueError(f"by: {by!r} is not a setting{near}; e.g. {{by: images_per_class, 1: 0.1}}")
    if len(value) < 2:
        raise ValueError(f"{shown(value)} gives no amount; e.g. {{by: {by}, default: 1}}")
    entries = {
        key if key == "default" else setting(by, key): _number_of(number, shared)
        for key, number in value.items()
        if key != "by"
    }
    return {"by": by, **entries}


def _number_of(value: Any, shared: bool) -> float:
    number = real(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{value!r} must be at least 0")
    if shared and number > 1 and not number.is_integer():
        raise ValueError(f"{value!r} must be a fraction between 0 and 1, or a whole number")
    return number
