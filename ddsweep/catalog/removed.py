"""Settings of earlier versions that were removed: how files that still hold them are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ddsweep.errors import SettingError

__all__ = ["REMOVED", "without_removed"]

REMOVED: dict[str, dict[str, Any]] = {"trial": {}, "plan": {}, "evaluate": {}, "resources": {}}
"""By section (``plan`` is how a trial is computed): each name, with the value that means what is done now."""


def without_removed(section: str, values: Mapping[str, Any], known: Iterable[str] = ()) -> dict[str, Any]:
    """``values`` of a file without what was removed. Raises `SettingError` where one of that has another
    value than the one that means what is done now and, given all ``known`` names, for others than these."""
    gone = REMOVED[section]
    for name in values.keys() & gone.keys():
        if values[name] != gone[name]:
            raise SettingError(f"{name}: {values[name]!r}: {name} was removed, and is always {gone[name]!r}")
    kept = {name: value for name, value in values.items() if name not in gone}
    if known and (unknown := sorted(kept.keys() - set(known))):
        raise SettingError(f"settings of a newer version of ddsweep: {', '.join(unknown)}")
    return kept
