"""Random and guided search: samples of settings, drawn by hashing or proposed from the scores so far.

A drawn value is a pure function of (search seed, number of the sample, setting). The same file gives the same
trials on every machine, more samples keep the first ones, and another setting in the space does not change
the values of the others. A proposal depends on scores, so it is written down (`ddsweep.results.proposals`).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from ddsweep.catalog import SETTINGS
from ddsweep.catalog.numbers import whole
from ddsweep.seeds import derive_seed
from ddsweep.spec.scheduler import AshaSpec
from ddsweep.spec.values import (
    SECTION,
    Count,
    Problem,
    like,
    refuse,
    setting,
    shown,
    unknown,
    word,
)

__all__ = ["DISTRIBUTIONS", "SearchSpec"]

KINDS_OF_SEARCH = ("random", "tpe")
DISTRIBUTIONS = ("uniform", "log_uniform", "integer", "choice")
_STARTUP = 10
_OTHER_QUESTIONS = (*AshaSpec().strata, "seed")
"""Settings by which scores cannot be compared."""
_DIGITS = 4
"""The digits of a drawn number: readable in tables, and independent of the last bit of a logarithm."""


class SearchSpec(BaseModel):
    """``samples`` from ``space``: for each setting one distribution with its values, such as
    ``{log_uniform: [0.001, 0.1]}`` (both ends included) or ``{choice: [fixed, random]}``.

    With kind ``tpe`` the first ``startup`` samples are draws as of random search; each later one is proposed
    from the scores of those before it (Bergstra et al. 2011, tree-structured Parzen estimator).
    """

    model_config = SECTION

    kind: Annotated[Literal["random", "tpe"], BeforeValidator(lambda value: word(value, KINDS_OF_SEARCH))] = (
        "random"
    )
    """`random`, or [`tpe`](#guided-search): guided by the scores so far"""
    samples: Count
    """how many samples there are, for each combination of `points` and `grid`"""
    startup: Count | None = None
    """of `tpe`: how many samples are drawn at random before the scores guide; none: 10"""
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

    @model_validator(mode="after")
    def _kind(self) -> SearchSpec:
        if self.kind == "random":
            if self.startup is not None:
                refuse([("search.startup", "is of kind tpe; random search draws all samples")])
            return self
        if self.startup is not None and self.startup < 2:
            refuse([("search.startup", f"{self.startup} must be at least 2, because scores are compared")])
        refuse(
            [
                (
                    f"search.space.{name}",
                    "tpe compares samples by val_score, and the scores of two values of this setting answer "
                    f"two questions; give it {'as `seeds`' if name == 'seed' else 'under grid or points'}",
                )
                for name in self.space
                if name in _OTHER_QUESTIONS
            ]
        )
        return self

    @property
    def guided(self) -> bool:
        """Whether samples depend on scores, and so on the results so far."""
        return self.kind != "random"

    @property
    def size(self) -> float:
        """The number of different samples; infinite with a setting that is not whole."""
        sizes = [
            len(values) if kind == "choice" else values[1] - values[0] + 1 if kind == "integer" else math.inf
            for given in self.space.values()
            for kind, values in given.items()
        ]
        return math.prod(sizes)

    def draw(self, number: int) -> dict[str, Any]:
        """The values that sample ``number`` has in random search; those of two numbers may be equal."""
        return {
            name: _value(kind, values, _fraction(self.seed, number, name))
            for name, given in self.space.items()
            for kind, values in given.items()
        }

    def all_samples(self) -> Iterator[dict[str, Any]]:
        """Every sample of a space of choices and whole numbers, one by one; none of another space."""
        if math.isinf(self.size):
            return
        axes = [
            values if kind == "choice" else range(values[0], values[1] + 1)
            for given in self.space.values()
            for kind, values in given.items()
        ]
        for values in itertools.product(*axes):
            yield dict(zip(self.space, values, strict=True))

    def known(self, written: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
        """The samples that are known, in order: all of random search. Of a guided one those that are
        ``written`` down and in the space, and then the draws at the start that are not yet written."""
        if not self.guided:
            return [self.draw(number) for number in range(self.samples)]
        found = [sample for sample in map(self.in_space, written) if sample is not None]
        return [*found[: self.samples], *(self.draw(number) for number in range(len(found), self.drawn))]

    @property
    def drawn(self) -> int:
        """How many samples are drawn: all, or those at the start of a guided search."""
        return min(self.samples, self.startup or _STARTUP) if self.guided else self.samples

    @property
    def no_more_marker(self) -> dict[str, Any]:
        """What is written down after the samples if no other one that is new and possible was found. It holds
        for this space and number of samples, until the next run looks again, and is no sample."""
        return {"no_more_of": self.samples, "in": json.loads(json.dumps(self.space))}

    def in_space(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """``values``, as a file has them, with the types of the space; None if they are not in it."""
        if values.keys() != self.space.keys():
            return None
        out = {}
        for name, given in self.space.items():
            ((kind, allowed),) = given.items()
            value = values[name]
            if kind == "choice":
                texts = [_text(item) for item in allowed]
                if _text(value) not in texts:
                    return None
                value = allowed[texts.index(_text(value))]
            elif not _is_number(value, whole=kind == "integer") or not allowed[0] <= value <= allowed[1]:
                return None
            out[name] = value
        return out

    def rounded(self, name: str, value: Any) -> Any:
        """A value of a setting with as many digits as a drawn one has."""
        ((kind, values),) = self.space[name].items()
        return _rounded(kind, values, value) if kind in ("uniform", "log_uniform") else value


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
    if kind == "log_uniform":
        return _rounded(kind, values, low * math.exp(fraction * math.log(high / low)))
    return _rounded(kind, values, low + fraction * (high - low))


def _rounded(kind: str, values: list[Any], value: float) -> Any:
    low, high = values
    # Digits count from the first digit of the width: from 0.9 to 0.91 there are as many values as from 0 to
    # 1.
    decimals = _DIGITS - 1 - _exponent(high - low)
    if kind == "log_uniform":  # small values have more decimals: each has its own digits
        decimals = max(decimals, _DIGITS - 1 - _exponent(value))
    return min(max(round(value, decimals), low), high)


def _is_number(value: Any, whole: bool) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if whole else int | float)


def _text(value: Any) -> str:
    """Text that is the same for a value and for its form in a file."""
    return json.dumps(value, sort_keys=True, default=list)


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
    return ("integer", "choice") if kind.startswith("int") else ("choice",)


def _nature(name: str) -> str:
    kind = SETTINGS[name].kind
    if kind.startswith("float"):
        return "is not a whole number"
    return "is a whole number" if kind.startswith("int") else "is not a number"


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
            bound = setting(name, value)
            if bound is None:  # for settings such as clip_norm
                raise ValueError(f"{value!r} is not a number")
            if kind == "log_uniform" and not bound > 0:
                raise ValueError(f"{value!r} has no logarithm; give a number above 0, or `uniform`")
            out.append(bound)
        except ValueError as error:
            problems.append((f"{where}[{place}]", str(error)))
    if len(out) == 2 and not out[0] < out[1]:
        problems.append((where, f"[{out[0]}, {out[1]}]: low must be below high"))
    elif len(out) == 2 and kind == "log_uniform" and math.isinf(out[1] / out[0]):
        problems.append((where, f"[{out[0]}, {out[1]}]: too wide for numbers of 64 bits"))
    return out
