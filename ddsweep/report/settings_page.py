"""What can be set, for people: settings, networks and data sets as the code declares them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ddsweep.catalog import (
    CHOICES,
    DATASETS,
    NETWORKS,
    DatasetSpec,
    TrialSpec,
    layer_shapes,
    parameter_count,
    parse_network,
)
from ddsweep.errors import SettingError
from ddsweep.pools.file import PoolFile
from ddsweep.report.formats import plain
from ddsweep.spec import AshaSpec, EvaluateSpec, ResourcesSpec, SearchSpec, SweepSpec
from ddsweep.spec.meanings import DEFAULTS, MEANINGS
from ddsweep.spec.values import SCIENCE_SETTINGS

__all__ = ["Setting", "names_of_settings", "override_keys", "settings_page"]

TRIAL = "trial"
_SECTIONS: dict[str, type[BaseModel]] = {
    "file": SweepSpec,
    "evaluate": EvaluateSpec,
    "resources": ResourcesSpec,
    "search": SearchSpec,
    "scheduler": AshaSpec,
    "pool": PoolFile,
}
_TITLES = {
    TRIAL: (
        "Settings of a trial, under base, grid, points or search of a sweep file, or NAME=VALUE on the "
        "command line. S is inner_steps, E inner_epochs, m images_per_class_per_step, T = S x E."
    ),
    "file": "Keys of a sweep file.",
    "pool": "Keys of a pool file, for ddsweep pretrain; or NAME=VALUE on the command line.",
    "site": "Keys of a site file, for ddsweep launch and doctor; or site.NAME=VALUE on the command line.",
}
_SIDES = range(4, 513)
_NETWORKS, _DATASETS = "networks", "datasets"


@dataclass(frozen=True)
class Setting:
    """One setting of ``group``. ``default`` is text; ``allowed`` is empty where any fitting value is."""

    name: str
    group: str
    default: str
    meaning: str
    allowed: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """As on the command line."""
        return self.name if self.group in (TRIAL, "file", "pool") else f"{self.group}.{self.name}"


def settings_page(name: str | None, more: Mapping[str, type[BaseModel]]) -> RenderableType:
    """All settings of a trial, networks and data sets; or what ``name`` is: one of them, a section of a file,
    ``networks`` or ``datasets``. ``more`` are further sections. Raises `SettingError` for anything else."""
    groups = _groups(more)
    if name is None:
        rest = [*(group for group in groups if group != TRIAL), _NETWORKS, _DATASETS]
        return Group(
            _section(TRIAL, groups[TRIAL]),
            Text(),
            _networks(NETWORKS),
            Text(),
            _datasets(DATASETS.values()),
            Text(f"\nMore: ddsweep settings NAME, with any name above, or {', '.join(rest)}."),
        )
    if found := _found(name.strip(), groups):
        return Group(*found)
    known = names_of_settings(more)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}?" if near else "ddsweep settings without a name shows all"
    raise SettingError(f"{name!r} is no setting, section, network or data set; {meant}")


def names_of_settings(more: Mapping[str, type[BaseModel]]) -> list[str]:
    """Every name that `settings_page` takes."""
    groups = _groups(more)
    keys = [setting.key for settings in groups.values() for setting in settings]
    return list(dict.fromkeys([*keys, *groups, _NETWORKS, _DATASETS, *NETWORKS, *DATASETS]))


def override_keys(more: Mapping[str, type[BaseModel]]) -> list[str]:
    """What may stand before the ``=`` of an override of a sweep."""
    groups = _groups(more)
    whole = ("name", "seeds", "skip_invalid", "scheduler")
    keys = [setting.key for group in groups for setting in groups[group] if group not in ("file", "pool")]
    return [*whole, *keys]


def _found(name: str, groups: Mapping[str, Sequence[Setting]]) -> list[RenderableType]:
    """What goes by that name, blank lines between: `cpus` is one of `resources` and one of a pool."""
    out: list[RenderableType] = []
    if name in groups:
        out.append(_section(name, groups[name]))
    if name in (_NETWORKS, "network"):
        out.append(_networks(NETWORKS))
    elif name in (_DATASETS, "dataset", "data"):
        out.append(_datasets(DATASETS.values()))
    elif name in NETWORKS:
        out.append(_networks([name]))
    elif name in DATASETS:
        out.append(_datasets([DATASETS[name]]))
    out += [
        _one(setting)
        for settings in groups.values()
        for setting in settings
        if name in (setting.name, setting.key, f"{setting.group}.{setting.name}")
        and (name not in groups or setting.group == TRIAL)
    ]
    return [item for thing in out for item in (Text(), thing)][1:]


# ------------------------------------------------------------------------------------- declarations


def _groups(more: Mapping[str, type[BaseModel]]) -> dict[str, list[Setting]]:
    groups = {TRIAL: [_of_trial(name) for name in sorted(SCIENCE_SETTINGS, key=_place)]}
    for group, model in {**_SECTIONS, **more}.items():
        groups[group] = [_of_model(group, model, name) for name in model.model_fields]
    return groups


def _place(name: str) -> int:
    """In the order of the documents, where what belongs together stands together."""
    return list(MEANINGS[TRIAL]).index(name)


def _of_trial(name: str) -> Setting:
    default: Any = {item.name: item.default for item in fields(TrialSpec)}.get(name, 1)
    return Setting(name, TRIAL, _default(TRIAL, name, default), _meaning(TRIAL, name), CHOICES.get(name, ()))


def _of_model(group: str, model: type[BaseModel], name: str) -> Setting:
    field = model.model_fields[name]
    default = _default(group, name, MISSING if field.is_required() else field.default)
    return Setting(name, group, default, _meaning(group, name), _words(field.annotation))


def _meaning(group: str, name: str) -> str:
    return MEANINGS[group].get(name, "").replace("`", "")


def _default(group: str, name: str, value: Any) -> str:
    if value is MISSING:
        return "required"
    if words := DEFAULTS.get((group, name)):
        return words
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return "its own"
    if value is None or (isinstance(value, list | tuple | dict) and not value):
        return "none"
    return ", ".join(map(plain, value)) if isinstance(value, list | tuple) else plain(value)


def _words(annotation: Any) -> tuple[str, ...]:
    """The words of an annotation that is a `Literal`, or one or None."""
    parts = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) is Literal:
        return tuple(map(str, parts))
    return _words(parts[0]) if get_origin(annotation) in (Union, UnionType) and len(parts) == 1 else ()


# ------------------------------------------------------------------------------------------- tables


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings[:-1]:
        table.add_column(heading, overflow="fold", max_width=26)
    table.add_column(headings[-1], overflow="fold", ratio=1)
    return table


def _section(group: str, settings: Sequence[Setting]) -> RenderableType:
    table = _table("setting", "default", "meaning")
    for setting in settings:
        table.add_row(setting.name, setting.default, setting.meaning)
    other = f"Section {group} of a sweep file, or {group}.NAME=VALUE on the command line."
    return Group(Text(_TITLES.get(group, other)), Text(), table)


def _one(setting: Setting) -> RenderableType:
    files = {"file": "of a sweep file", "pool": "of a pool file", "site": "of a site file"}
    place = {TRIAL: "of a trial", **files}.get(setting.group, f"of section {setting.group} of a sweep file")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(Text(setting.key, "bold"), place)
    table.add_row("default", setting.default)
    if setting.allowed:
        table.add_row("one of", ", ".join(setting.allowed))
    table.add_row("meaning", setting.meaning)
    return table


def _networks(kinds: Iterable[str]) -> RenderableType:
    table = _table("network", "pixels", "weights", "layers")
    for kind in kinds:
        taken = [side for side in _SIDES if _takes(kind, side)]
        pixels = ", ".join(map(str, taken)) if len(taken) < 5 else f"{taken[0]} to {taken[-1]}"
        shape = (3, side := next((side for side in (32, 28, 224) if side in taken), taken[0]), side)
        spec = parse_network(kind, shape)
        layers = ", ".join(
            f"{layer} {outputs}" + (f" ({kernel}x{kernel})" if layer == "conv" else "")
            for layer, _, outputs, kernel, _ in layer_shapes(spec, shape, 10)
            if layer != "norm"
        )
        called = kind if str(spec) == kind else f"{kind} = {spec}"
        table.add_row(called, pixels, f"{parameter_count(spec, shape, 10):,}", layers)
    title = "Networks; weights and layers for ten classes of colour images of 32 pixels, or what they take."
    return Group(Text(title), Text(), table)


def _takes(kind: str, side: int) -> bool:
    try:
        parse_network(kind, (3, side, side))
    except SettingError:
        return False
    return True


def _datasets(specs: Iterable[DatasetSpec]) -> RenderableType:
    table = _table("data set", "images", "classes", "names of classes")
    for spec in specs:
        names = spec.class_names if spec.class_names else ("read from its files",)
        table.add_row(spec.name, "x".join(map(str, spec.shape)), str(spec.classes), ", ".join(names))
    return Group(
        Text("Data sets, also with transforms such as usps(size=28); ddsweep data list says which are here."),
        Text(),
        table,
    )
