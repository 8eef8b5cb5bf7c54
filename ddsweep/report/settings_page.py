"""The pages of ``ddsweep settings``: settings, networks and data sets as the code declares them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ddsweep.catalog import (
    DATASETS,
    METHODS,
    NETWORKS,
    DatasetSpec,
    layers_of,
    measure_of,
    parse_network,
)
from ddsweep.errors import SettingError
from ddsweep.report.console import bare_table
from ddsweep.report.declarations import TRIAL, Key, declared, plain_text

__all__ = ["names_of_settings", "override_keys", "settings_page"]

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


def settings_page(name: str | None, more: Mapping[str, type[BaseModel]]) -> RenderableType:
    """All settings of a trial, networks and data sets; or those of ``name``: one of them, a section of a
    file, ``networks`` or ``datasets``. ``more`` are further sections. Raises `SettingError` for any other
    name."""
    sections = declared(more)
    if name is None:
        rest = [*(section for section in sections if section != TRIAL), _NETWORKS, _DATASETS]
        return Group(
            _section(TRIAL, sections[TRIAL]),
            Text(),
            _networks(NETWORKS),
            Text(),
            _datasets(DATASETS.values()),
            Text(f"\nMore: ddsweep settings NAME, with any name above, or {', '.join(rest)}."),
        )
    if found := _found(name.strip(), sections):
        return Group(*found)
    known = names_of_settings(more)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}?" if near else "ddsweep settings without a name shows all"
    raise SettingError(f"{name!r} is not a setting, section, network or data set; {meant}")


def names_of_settings(more: Mapping[str, type[BaseModel]]) -> list[str]:
    """Every name that `settings_page` takes."""
    sections = declared(more)
    keys = [key.dotted for section in sections.values() for key in section]
    return list(dict.fromkeys([*keys, *sections, _NETWORKS, _DATASETS, *NETWORKS, *DATASETS]))


def override_keys(more: Mapping[str, type[BaseModel]]) -> list[str]:
    """The names that may stand before the ``=`` of an override."""
    sections = declared(more)
    keys = [key.dotted for name in sections if name not in ("file", "pool") for key in sections[name]]
    return ["name", "seeds", "skip_invalid", "scheduler", *keys]


def _found(name: str, sections: Mapping[str, Sequence[Key]]) -> list[RenderableType]:
    """All entries of that name, with blank lines between: `cpus` is a key of `resources` and of a pool."""
    out: list[RenderableType] = []
    if name in sections:
        out.append(_section(name, sections[name]))
    if name in (_NETWORKS, "network"):
        out.append(_networks(NETWORKS))
    elif name in (_DATASETS, "dataset", "data"):
        out.append(_datasets(DATASETS.values()))
    elif name in NETWORKS:
        out.append(_networks([name]))
    elif name in DATASETS:
        out.append(_datasets([DATASETS[name]]))
    out += [
        _one(key)
        for keys in sections.values()
        for key in keys
        if name in (key.name, key.dotted, f"{key.section}.{key.name}")
        and (name not in sections or key.section == TRIAL)
    ]
    return [item for thing in out for item in (Text(), thing)][1:]


# ------------------------------------------------------------------------------------------- tables


def _table(*headings: str) -> Table:
    table = bare_table()
    for heading in headings[:-1]:
        table.add_column(heading, overflow="fold", max_width=26)
    table.add_column(headings[-1], overflow="fold", ratio=1)
    return table


def _section(name: str, keys: Sequence[Key]) -> RenderableType:
    table = _table("setting", "default", "meaning")
    for key in keys:
        table.add_row(key.name, plain_text(key.default), plain_text(key.meaning))
    other = f"Section {name} of a sweep file, or {name}.NAME=VALUE on the command line."
    return Group(Text(_TITLES.get(name, other)), Text(), table)


def _one(key: Key) -> RenderableType:
    files = {"file": "of a sweep file", "pool": "of a pool file", "site": "of a site file"}
    place = {TRIAL: "of a trial", **files}.get(key.section, f"of section {key.section} of a sweep file")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(Text(key.dotted, "bold"), place)
    table.add_row("default", plain_text(key.default))
    if key.one_of:
        table.add_row("one of", ", ".join(key.one_of))
    if key.limit:
        table.add_row("values", key.limit)
    having = [name for name, method in METHODS.items() if key.name not in method.lacks]
    if key.section == TRIAL and len(having) < len(METHODS):
        table.add_row("methods", ", ".join(having))
    table.add_row("meaning", plain_text(key.meaning))
    return table


def _networks(kinds: Iterable[str]) -> RenderableType:
    table = _table("network", "pixels", "weights", "layers")
    for kind in kinds:
        taken = [side for side in _SIDES if _takes(kind, side)]
        pixels = ", ".join(map(str, taken)) if len(taken) < 5 else f"{taken[0]} to {taken[-1]}"
        shape = (3, side := next((side for side in (32, 28, 224) if side in taken), taken[0]), side)
        spec = parse_network(kind, shape)
        called = kind if str(spec) == kind else f"{kind} = {spec}"
        table.add_row(called, pixels, f"{measure_of(spec, shape, 10).parameters:,}", layers_of(kind))
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
