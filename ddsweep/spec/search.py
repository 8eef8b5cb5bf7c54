"""Random search: samples of settings, drawn by hashing.

A value is a pure function of (search seed, number of the sample, setting). The same file gives the same
trials on every machine, more samples keep the first ones, and another setting in the space does not change
the values of the others.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from ddsweep.catalog import SETTINGS
from ddsweep.catalog.numbers import whole
from ddsweep.seeds import derive_seed
from ddsweep.spec.values import (
    SECTION,
    Count,
    Problem,
    like,
    refuse,
    setting,
    shown,
    unknown,
)

__all__ = ["DISTRIBUTIONS", "SearchSpec"]

DISTRIBUTIONS = ("uniform", "log_uniform", "integer", "choice")
_DIGITS = 4
"""The digits of a drawn number: readable in tables, and independent of the last bit of a logarithm."""


class SearchSpec(BaseModel):
    """``samples`` draws from ``space``: for each setting one distribution with its values, such as
    ``{log_uniform: [0.001, 0.1]}`` (both ends included) or ``{choice: [fixed, random]}``."""

    model_config = SECTION

    samples: Count
    """how many are drawn"""
    seed: Annotated[int, BeforeValidator(whole), Field(ge=0)] = 0
    """seed of the draw; nothing else in a trial depends on it"""
    space: dict[str, dict[str, list[Any]]]
    """settings, and for each one distribution: `uniform` or `log_uniform` for numbers, `integer` for whole
    numbers (`[low, high]`, both included), `choice` for any setting"""

    @field_validator("space", mode="before")
    @classmethod
    def _space(cls, value: Any) -> dict[str, dict[str, list[Any]]]:
        if not isinstance(value, dict) or not value:
            raise ValueError(
                f"{shown(value)} is not a mapping of settings to distributions, such as "
                "{outer_lr: {log_uniform: [1e-3, 0.1]}}; leave `search` out for none"
            )
        problems: list[Problem] = []
        out = {name: _distribution(name, given, problems) for name, given in value.items()}
        refuse(problems)
        return out

    def draw(self) -> list[dict[str, Any]]:
        """The samples in order, each a mapping of settings to values; two may be equal."""
        return [
            {
                name: _value(kind, values, _fraction(self.seed, number, name))
                for name, given in self.space.items()
                for kind, values in given.items()
            }
            for number in range(self.samples)
        ]


# ------------------------------------------------------------------------------------------ drawing


def _fraction(seed: int, number: int, name: str) -> float:
    """Uniform in [0, 1), in steps of 2**-53."""
    return (derive_seed("search", seed, number, name) >> 10) / 2**53


def _value(kind: str, values: list[Any], fraction: float) -> Any:
    if kind == "choice":
        return values[int(fraction * len(values))]
    low, high = values
    if kind == "integer":
        return low + int(fraction * (high - low + 1))
    # Digits count from the first digit of the width: from 0.9 to 0.91 there are as many values as from 0 to
    # 1.
    decimals = _DIGITS - 1 - _exponent(high - low)
    if kind == "log_uniform":
        value = low * math.exp(fraction * math.log(high / low))
        # Small values have more decimals: each has its own digits.
        decimals = max(decimals, _DIGITS - 1 - _exponent(value))
    else:
        value = low + fraction * (high - low)
    return min(max(round(value, decimals), low), high)


def _exponent(number: float) -> int:
    """The power of ten: -2 for 0.05."""
    return int(f"{number:e}".partition("e")[2])


# --------------------------------------------------------------------------------------- validation


def _distribution(name: Any, given: Any, problems: list[Problem]) -> dict[str, list[Any]]:
    """One axis of the space, typed; problems are added to ``problems``."""
    where = f"search.space.{name}"
    if name not in SETTINGS:
        problems.append((where, unknown(name, SETTINGS)))
        return {}
    if not isinstance(given, dict) or len(given) != 1:
        problems.append(
            (
                where,
                f"{shown(given)} is not one distribution with its values, such as {_example(name)}; "
                f"allowed are {', '.join(_allowed(name))}",
            )
        )
        return {}
    ((kind, values),) = given.items()
    if kind not in _allowed(name):
        known = kind in DISTRIBUTIONS
        what = (
            f"{name} {_nature(name)}"
            if known
            else f"unknown distribution {kind!r}{like(kind, DISTRIBUTIONS)}"
        )
        problems.append((f"{where}.{kind}", f"{what}; allowed are {', '.join(_allowed(name))}"))
        return {}
    check = _choice if kind == "choice" else _range
    return {kind: check(name, kind, values, f"{where}.{kind}", problems)}


def _allowed(name: str) -> tuple[str, ...]:
    """The distributions that make sense for a setting."""
    kind = SETTINGS[name].kind
    if kind.startswith("float"):
        return ("uniform", "log_uniform", "choice")
    return ("integer", "choice") if kind == "int" else ("choice",)


def _nature(name: str) -> str:
    kind = SETTINGS[name].kind
    if kind.startswith("float"):
        return "is not a whole number"
    return "is a whole number" if kind == "int" else "is not a number"


def _example(name: str) -> str:
    return {
        "uniform": "{log_uniform: [1e-3, 0.1]}",
        "integer": "{integer: [1, 10]}",
        "choice": "{choice: [A, B]}",
    }[_allowed(name)[0]]


def _choice(name: str, kind: str, values: Any, where: str, problems: list[Problem]) -> list[Any]:
    if not isinstance(values, list) or not values:
        what = "is empty" if values == [] else f"{shown(values)} is not a list"
        problems.append((where, f"{what}; a choice is a list of at least one value"))
        return []
    out = []
    for place, value in enumerate(values):
        try:
            out.append(setting(name, value))
        except ValueError as error:
            problems.append((f"{where}[{place}]", str(error)))
    if len({repr(value) for value in out}) < len(out):
        problems.append((where, f"{shown(values)} gives a value twice"))
    return out


def _range(name: str, kind: str, values: Any, where: str, problems: list[Problem]) -> list[Any]:
    if not isinstance(values, list) or len(values) != 2:
        problems.append((where, f"{shown(values)} is not a pair [low, high]"))
        return []
    out = []
    for place, value in enumerate(values):
        try:
            if value is None:  # None is for settings such as clip_norm; a bound cannot be None
                raise ValueError("None is not a number")
            out.append(setting(name, value))
        except ValueError as error:
            problems.append((f"{where}[{place}]", str(error)))
    if len(out) == 2 and not out[0] < out[1]:
        problems.append((where, f"[{out[0]}, {out[1]}]: low must be below high"))
    return out
