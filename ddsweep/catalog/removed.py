"""Removed settings of earlier versions, and reading files that still have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ddsweep.errors import SettingError

__all__ = ["REMOVED", "without_removed"]

REMOVED: dict[str, dict[str, Any]] = {
    "trial": {},
    "plan": {"channels_last": False, "precision": "full"},
    "evaluate": {},
    "resources": {"channels_last": False},
}
"""By section (``plan`` is the execution plan of a trial): each name, with the value that means the present
behaviour."""


def without_removed(section: str, values: Mapping[str, Any], known: Iterable[str] = ()) -> dict[str, Any]:
    """``values`` of a file without removed settings. Raises `SettingError` for a removed setting with another
    value than the one that means the present behaviour and, given all ``known`` names, for unknown names."""
    gone = REMOVED[section]
    for name in values.keys() & gone.keys():
        if values[name] != gone[name]:
            raise SettingError(f"{name}: {values[name]!r}: {name} was removed, and is always {gone[name]!r}")
    kept = {name: value for name, value in values.items() if name not in gone}
    if known and (unknown := sorted(kept.keys() - set(known))):
        raise SettingError(f"settings of a newer version of ddsweep: {', '.join(unknown)}")
    return kept
