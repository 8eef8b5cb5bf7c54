"""Which settings of trials a table shows, and the titles of their columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ddsweep.catalog import DEFAULT_METHOD, TrialSpec, find_method, parse_dataset, parse_network
from ddsweep.errors import SettingError
from ddsweep.report.formats import NONE, plain

__all__ = [
    "KIND",
    "NAMES",
    "changed",
    "heading",
    "key_of",
    "lacks",
    "setting_cells",
    "setting_headings",
    "settings_of",
    "settings_of_row",
    "telling",
    "values_told",
    "varying",
]

_FIRST = ("dataset", "network", "init", "images_per_class", "inner_steps", "inner_epochs")
NAMES = (*_FIRST, *(item.name for item in fields(TrialSpec) if item.name not in _FIRST))
"""Every science setting, those that people vary first."""

KIND = (
    *("dataset", "network", "objective", "attack_class", "target_class", "init", "pool", "images_per_class"),
)
"""Trials that differ in these answer different questions; the other settings are ways to answer them."""

_DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(TrialSpec) if item.name != "dataset"}

_HEADINGS = {"images_per_class": "images/class", "inner_steps": "steps", "inner_epochs": "epochs"}


def heading(name: str) -> str:
    """The title of a column. It breaks between words in a narrow column."""
    return _HEADINGS.get(name, name.replace("_", " "))


def settings_of(trial: TrialSpec) -> dict[str, Any]:
    """The settings of ``trial`` by name; data set and pool as their names."""
    settings = {name: None if name in trial.lacks else getattr(trial, name) for name in NAMES}
    return settings | {"dataset": trial.dataset.name, "pool": trial.pool.name if trial.pool else None}


def settings_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a row of ``trials``. A setting that an older file lacks has its default ("as before"),
    unless the trial's method lacks it."""
    lacks = find_method(row.get("method") or DEFAULT_METHOD).lacks
    return {
        name: _DEFAULTS.get(name) if row.get(name) is None and name not in lacks else row[name]
        for name in NAMES
        if name in row
    }


def lacks(settings: Mapping[str, Any], name: str) -> bool:
    """Whether the method of a trial with these settings lacks ``name``, which then has no value."""
    method = settings.get("method") or DEFAULT_METHOD
    return settings.get(name) is None and name in find_method(method).lacks


def values_told(settings: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The values of ``names`` that are there, in words: numbers with the name of their setting."""
    values = {name: settings.get(name) for name in names}
    return [
        plain(value) if isinstance(value, str) else f"{heading(name)} {plain(value)}"
        for name, value in values.items()
        if value is not None
    ]


def key_of(settings: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """The same for trials that agree in the settings ``names``."""
    return tuple(repr(settings.get(name)) for name in names)


def varying(settings: Sequence[Mapping[str, Any]], always: Sequence[str] = ()) -> list[str]:
    """The settings in which trials differ whose methods have them, and those of ``always``, in the order of
    `NAMES`.

    A ``fixed`` trial always has one model per step. Beside ``random`` trials that all have the same number
    this does not count as a difference.
    """
    names = [name for name in NAMES if name in always or _differ(settings, name)]
    free = [item for item in settings if item.get("init") != "fixed"]
    if "models_per_step" not in always and not _differ(free, "models_per_step"):
        names = [name for name in names if name != "models_per_step"]
    return names


_MOST_COLUMNS = 8
"""With so many varying settings, a table has one column for all of them."""


_FEW_TRIALS = 5
"""So few trials have no usual value that could be left out."""


def telling(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """For each trial, the settings of ``names`` that tell it from the others: all that its method has, if
    they or the trials are few. If they are many, for example when each trial changes another setting, those
    whose value differs from that of most trials."""
    having = [[name for name in names if not lacks(item, name)] for item in settings]
    if len(names) <= _MOST_COLUMNS or len(settings) <= _FEW_TRIALS:
        return having
    usual = {name: Counter(repr(item.get(name)) for item in settings).most_common(1)[0][0] for name in names}
    return [
        [name for name in own if repr(item.get(name)) != usual[name]]
        for item, own in zip(settings, having, strict=True)
    ]


def setting_headings(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """The titles of the columns that `setting_cells` fills: one for each of ``names``, or one for all."""
    if len(names) <= _MOST_COLUMNS:
        return [heading(name) for name in names]
    return ["settings" if len(settings) <= _FEW_TRIALS else "settings unlike most"]


def setting_cells(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """The cells of each trial in the columns of `setting_headings`."""
    if len(names) <= _MOST_COLUMNS:
        return [[plain(item.get(name)) for name in names] for item in settings]
    return [
        [", ".join(f"{heading(name)} {plain(item.get(name))}" for name in own) or NONE]
        for item, own in zip(settings, telling(settings, names), strict=True)
    ]


def _differ(settings: Sequence[Mapping[str, Any]], name: str) -> bool:
    return len({repr(item.get(name)) for item in settings if not lacks(item, name)}) > 1


def changed(settings: Mapping[str, Any]) -> list[str]:
    """The settings that differ from their defaults, in the order of `NAMES`, always with the data set."""
    own = [name for name in NAMES if name in settings and not lacks(settings, name)]
    return [name for name in own if settings[name] != _default(name, settings)]


def _default(name: str, settings: Mapping[str, Any]) -> Any:
    if name == "models_per_step" and settings.get("init") == "fixed":
        return 1
    if name == "network" and isinstance(settings.get("dataset"), str):
        try:  # a trial has the full name of its network, and the default depends on the size of the images
            return str(parse_network(_DEFAULTS["network"], parse_dataset(settings["dataset"]).shape))
        except SettingError:
            pass
    return _DEFAULTS.get(name)
