"""A setting of a trial is declared once: a field of its group, with default and limit, and below it a text.

Sweep files, ids, columns, `ddsweep settings` and the tables of docs/settings.md follow from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ddsweep.errors import SettingError

if TYPE_CHECKING:
    from ddsweep.catalog.trials import TrialSpec

__all__ = [
    "BELOW_ONE",
    "COUNT",
    "NOT_NEGATIVE",
    "POSITIVE",
    "SEED",
    "Limit",
    "Setting",
    "SettingsGroup",
    "setting",
    "settings_in",
]


@dataclass(frozen=True)
class Limit:
    """The numbers that a setting takes: the words for messages, and the check."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Limit("must be at least 1 and below 2**31", lambda value: 1 <= value < 2**31)
NOT_NEGATIVE = Limit("must be at least 0 and below 2**31", lambda value: 0 <= value < 2**31)
SEED = Limit("must be at least 0 and below 2**63", lambda value: 0 <= value < 2**63)
POSITIVE = Limit("must be a positive number", lambda value: 0 < value < math.inf)
BELOW_ONE = Limit("must be at least 0 and below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class Setting:
    """One setting. ``kind`` is its type as text, such as ``float | None``; ``default`` is dataclasses'
    ``MISSING`` if a value is required. ``one_of`` are the words that it takes, and ``beside(name, value)``
    says whether a text is another value, such as a user's own code; it raises `SettingError` for one that is
    meant as such and wrong. ``check(name, value)`` raises `SettingError` for other impossible values."""

    name: str
    kind: str
    default: Any
    limit: Limit | None = None
    one_of: tuple[str, ...] = ()
    beside: Callable[[str, str], object] | None = None
    check: Callable[[str, Any], Any] | None = None

    @property
    def optional(self) -> bool:
        return self.kind.endswith("None")

    def takes(self, value: Any) -> bool:
        """Whether ``value`` is one of the words, or a text beside them; true for a setting without words.
        Raises `SettingError` for a text that is meant as one of those beside them and wrong."""
        if not self.one_of or value in self.one_of:
            return True
        return self.beside is not None and isinstance(value, str) and bool(self.beside(self.name, value))

    def refuse(self, value: Any) -> None:
        """Raises `SettingError` if no trial can have this value, with any other settings."""
        if value is None and self.optional:
            return
        if not self.takes(value):
            raise SettingError(f"{self.name}: {value!r} is not one of {', '.join(self.one_of)}")
        if self.limit is not None and not self.limit.holds(value):
            raise SettingError(f"{self.name}: {value} {self.limit.words}")
        if self.check is not None:
            self.check(self.name, value)


def setting(
    default: Any,
    limit: Limit | None = None,
    *,
    one_of: tuple[str, ...] = (),
    beside: Callable[[str, str], object] | None = None,
    check: Callable[[str, Any], Any] | None = None,
) -> Any:
    """A field of a `SettingsGroup` that does not take every value of its type; see `Setting`."""
    found = {"limit": limit, "one_of": one_of, "beside": beside, "check": check}
    return field(default=default, metadata=found)


@dataclass(frozen=True)
class SettingsGroup:
    """Settings that belong together; `TrialSpec` has those of all groups as its own.

    A default means "as before". The text below a field says what it means (in Markdown), the docstring of
    a group is the title of its table. ``derived`` are properties that a sweep file may give as well.
    """

    derived: ClassVar[tuple[Setting, ...]] = ()

    @staticmethod
    def check(trial: TrialSpec) -> None:
        """Raises `SettingError` for settings of the group that are impossible together, or in this trial."""


def settings_in(group: type[SettingsGroup]) -> tuple[Setting, ...]:
    """The settings that ``group`` declares, in that order."""
    found = [Setting(item.name, str(item.type), item.default, **item.metadata) for item in fields(group)]
    return (*found, *group.derived)
