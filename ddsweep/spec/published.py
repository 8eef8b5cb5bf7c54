"""Published numbers to compare a sweep with: the key ``published`` of a sweep file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, field_validator, model_validator

from ddsweep.catalog.numbers import real
from ddsweep.spec.values import SECTION, Problem, refuse, settings_of, shown

__all__ = ["PublishedSpec", "one_or_several"]


def _fraction(value: Any) -> float | None:
    if value is None:
        return None
    number = real(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} must lie between 0 and 1; 79.5 % is 0.795")
    return number


Fraction = Annotated[float | None, BeforeValidator(_fraction)]


class PublishedSpec(BaseModel):
    """One number of a paper. It changes no id and no result."""

    model_config = SECTION

    accuracy: Fraction = None
    """on test images, as a fraction"""
    attack_success: Fraction = None
    """of an attack, instead of `accuracy`"""
    std: Fraction = None
    """standard deviation over networks, as a fraction"""
    source: Annotated[str, Field(strict=True), StringConstraints(min_length=1)]
    """where the number was published"""
    where: dict[str, Any] = {}
    """settings of the trials that it is compared with; none: all trials"""

    @field_validator("where", mode="before")
    @classmethod
    def _where(cls, value: Any) -> dict[str, Any]:
        problems: list[Problem] = []
        out = settings_of(value, "published.where", problems)
        refuse(problems)
        return out

    @model_validator(mode="after")
    def _one_number(self) -> PublishedSpec:
        if (self.accuracy is None) == (self.attack_success is None):
            raise ValueError("give accuracy, or attack_success of an attack: one of the two")
        return self

    @property
    def value(self) -> float:
        number = self.attack_success if self.accuracy is None else self.accuracy
        assert number is not None
        return number

    @property
    def measure(self) -> str:
        return "attack_success" if self.accuracy is None else "accuracy"

    def applies(self, settings: dict[str, Any]) -> bool:
        """Whether it is compared with trials of ``settings``. A network, data set or pool stands for all of
        its name that have the parameters it gives, such as ``convnet(width=128)`` of any depth."""
        return all(_same(wanted, settings.get(name)) for name, wanted in self.where.items())


def _same(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, str) and isinstance(value, str):
        (kind, given), (theirs, whole) = _parameters(wanted), _parameters(value)
        return kind == theirs and given <= whole
    return bool(wanted == value)


def _parameters(text: str) -> tuple[str, set[str]]:
    """``convnet(depth=3, width=128)`` as its name and its parameters."""
    name, _, inside = text.partition("(")
    return name.strip(), {"".join(item.split()) for item in inside.rstrip(") ").split(",") if item.strip()}


def one_or_several(value: Any) -> Any:
    """``published`` as a list; a single mapping is a list of one."""
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{shown(value)} is neither a mapping such as {{accuracy: 0.795, source: ...}} nor a list of them"
        )
    return value
