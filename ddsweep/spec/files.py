"""Sweep files on disk: reading with ``key=value`` overrides, messages for people, and writing back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ddsweep.catalog import SETTINGS, SMOKE
from ddsweep.catalog.removed import without_removed
from ddsweep.errors import SettingError
from ddsweep.spec.model import EvaluateSpec, ResourcesSpec, SweepSpec, spelled_out
from ddsweep.spec.published import PublishedSpec
from ddsweep.spec.scheduler import AshaSpec
from ddsweep.spec.search import SearchSpec
from ddsweep.spec.values import Problem, shown, unknown
from ddsweep.spec.yaml_text import parse_yaml, yaml_of
from ddsweep.start_set import know_sets

SECTIONS: dict[str, type[BaseModel]] = {
    "evaluate": EvaluateSpec,
    "resources": ResourcesSpec,
    "search": SearchSpec,
    "scheduler": AshaSpec,
    "published": PublishedSpec,
}
"""The keys of a sweep file that are mappings of keys of their own."""


def is_smoke(name: str) -> bool:
    """Whether a sweep or pool of this name is a smoke version: its data may be stand-ins."""
    return name.endswith(SMOKE)


Model = TypeVar("Model", bound=BaseModel)


def load_sweep(path: Path, overrides: Sequence[str] = (), *, smoke: bool = False) -> SweepSpec:
    """The sweep in the YAML file ``path``, with ``overrides`` applied before validation.

    An override is ``key=value`` with a dotted key and a value in YAML: ``evaluate.networks=8``,
    ``grid.seed=[0,1]``. A bare science setting (``outer_steps=10``) holds for every trial: it sets ``base``
    and removes a grid axis, a searched setting or entries of points by that name. With a list of values it
    becomes the grid axis. With ``smoke`` the file's section of that name is applied first, and the name ends
    in ``-smoke``. Raises `SettingError` with all problems in one message.
    """
    sweep = load_model(SweepSpec, path, overrides, what="sweep file", smoke=smoke)
    know_sets(sweep.start_sets(), path.parent / "sets")  # a file of results has copies beside it
    return sweep


def load_model(
    model: type[Model], path: Path, overrides: Sequence[str], *, what: str, smoke: bool = False
) -> Model:
    """The file ``path`` as a ``model``; messages call it ``what``. See `load_sweep`."""
    raw = _read(path, what, model)
    origins: dict[str, str] = {}
    if smoke:
        raw = _smoke(raw, path, model, origins)
    for override in overrides:
        raw = _override(raw, override, origins, model)
    return _validated(model, raw, str(path), origins)


def sweep_of(content: Mapping[str, Any], where: str) -> SweepSpec:
    """The sweep of a file with ``content``; messages begin with ``where``. Raises `SettingError` with all
    problems in one message."""
    return _validated(SweepSpec, content, where, {})


def _validated(model: type[Model], raw: Mapping[Any, Any], where: str, origins: dict[str, str]) -> Model:
    try:
        return model.model_validate(_without_removed(raw))
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None
    except ValidationError as error:
        problems = [_with_origin(problem, origins) for problem in _problems(error, model)]
    if len(problems) == 1:
        raise SettingError(f"{where}: {problems[0]}")
    raise SettingError("\n  ".join([f"{where}: {len(problems)} settings are wrong:", *problems]))


def _without_removed(raw: Mapping[Any, Any]) -> dict[Any, Any]:
    """The content of a file without removed settings: the file in a folder of results has every default
    written out."""
    sections = {key: raw[key] for key in _KINDS_OF_REMOVED if isinstance(raw.get(key), dict)}
    return {**raw, **{key: without_removed(_KINDS_OF_REMOVED[key], given) for key, given in sections.items()}}


_KINDS_OF_REMOVED = {"base": "trial", "evaluate": "evaluate", "resources": "resources"}


def _smoke(
    raw: dict[Any, Any], path: Path, model: type[BaseModel], origins: dict[str, str]
) -> dict[Any, Any]:
    """``raw`` with its own ``smoke`` section applied as overrides, under another name."""
    tiny = raw.get("smoke")
    if not isinstance(tiny, dict) or not tiny:
        raise SettingError(
            f"{path}: has no `smoke` section to try it out with; it is a mapping of settings to small "
            "values, such as {outer_steps: 2, evaluate.networks: 4}"
        )
    for key, value in tiny.items():
        raw = _laid_over(raw, str(key), value, f"smoke: {key}", origins, model)
    return {**raw, "name": f"{raw.get('name')}{SMOKE}"}


def resolved_yaml(sweep: SweepSpec) -> str:
    """``sweep`` with every default written out; `load_sweep` reads it back to an equal model."""
    content = sweep.model_dump()
    for key in ("base", "grid", "points", "search", "scheduler", "smoke", "published"):
        if not content[key]:
            del content[key]
    return yaml_of(content)


# ------------------------------------------------------------------------------------------ reading


def _read(path: Path, what: str, model: type[BaseModel]) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingError(f"{path}: no such {what}") from None
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingError(f"{path}: not a text file in UTF-8") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds {shown(raw)}"
        keys = ", ".join(model.model_fields)
        raise SettingError(f"{path}: {found}; a {what} is a mapping with the keys {keys}")
    return raw


# ---------------------------------------------------------------------------------------- overrides


def _override(
    raw: dict[Any, Any], override: str, origins: dict[str, str], model: type[BaseModel]
) -> dict[Any, Any]:
    key, sign, text = override.partition("=")
    if not sign or not all(key.strip().split(".")):
        raise SettingError(f"{override!r}: not key=value, e.g. {_EXAMPLES[model is SweepSpec]}")
    value = parse_yaml(text, f"override {override!r}")
    return _laid_over(raw, key.strip(), value, override, origins, model)


_EXAMPLES = {True: "outer_steps=10 or evaluate.networks=8", False: "epochs=3"}


def _laid_over(
    raw: dict[Any, Any],
    key: str,
    value: Any,
    override: str,
    origins: dict[str, str],
    model: type[BaseModel],
) -> dict[Any, Any]:
    parts = key.split(".")
    if model is SweepSpec and key in SETTINGS:
        return _everywhere(raw, key, value, override, origins)
    if parts[0] not in model.model_fields:
        science = SETTINGS if model is SweepSpec else ()
        what = unknown(parts[0], [*model.model_fields, *science], _section(model))
        raise SettingError(f"override {override!r}: {what}")
    origins[key] = override
    return _placed(spelled_out(raw), parts, value, override)


def _placed(tree: Any, parts: list[str], value: Any, override: str) -> dict[Any, Any]:
    """A copy of ``tree`` with ``value`` at the end of ``parts`` (aliases in YAML share one mapping)."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise SettingError(f"override {override!r}: {shown(tree)} has no key {parts[0]!r} to set")
    inside = value if len(parts) == 1 else _placed(tree.get(parts[0]), parts[1:], value, override)
    return {**tree, parts[0]: inside}


def _everywhere(
    raw: dict[Any, Any], key: str, value: Any, override: str, origins: dict[str, str]
) -> dict[Any, Any]:
    out = dict(raw)
    if isinstance(grid := out.get("grid"), dict) and key in grid:
        out["grid"] = {axis: values for axis, values in grid.items() if axis != key}
        if not out["grid"] and not isinstance(value, list):
            del out["grid"]
    search = out.get("search")
    if isinstance(search, dict) and isinstance(axes := search.get("space"), dict) and key in axes:
        space = {axis: values for axis, values in axes.items() if axis != key}
        out["search"] = {**search, "space": space}
        if not space:
            del out["search"]
    if isinstance(points := out.get("points"), list):
        rest = [
            {k: v for k, v in point.items() if k != key} if isinstance(point, dict) else point
            for point in points
        ]
        # Points that differed in nothing else are one now, as the values of an axis are.
        out["points"] = [one for place, one in enumerate(rest) if one == {} or one not in rest[:place]]
        if rest and all(one == {} for one in rest):
            del out["points"]
    place = "grid" if isinstance(value, list) else "base"
    origins[f"{place}.{key}"] = override
    return _placed(out, [place, key], value, override)


# ----------------------------------------------------------------------------------------- messages


def _with_origin(problem: Problem, origins: dict[str, str]) -> str:
    where, what = problem
    source = next((origins[key] for key in origins if where == key or where.startswith(f"{key}[")), "")
    return (f"{where}: {what}" if where else what) + (f" (from {source!r})" if source else "")


def _problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """(dotted key, reason) for each problem that pydantic found, in words for the writer of the file."""
    out: list[Problem] = []
    for item in error.errors(include_url=False):
        context: dict[str, Any] = item.get("ctx", {})
        if "problems" in context:
            out += context["problems"]
            continue
        if item["type"] == "invalid_key":
            out.append(("", f"{item['input']!r} is a key, but keys are words"))
            continue
        places = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]]
        out.append(("".join(places).lstrip("."), _reason(item, context, model)))
    return out


def _reason(item: Mapping[str, Any], context: Mapping[str, Any], model: type[BaseModel]) -> str:
    kind, given = item["type"], item["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _misplaced(item["loc"], model)
    if kind == "missing":
        return "is required"
    reasons = {
        "bool_type": "is not true or false",
        "string_type": "is not text; put it in quotes",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "greater_than": f"must be greater than {context.get('gt')}",
        "less_than": f"must be less than {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "literal_error": f"is not one of {context.get('expected')}",
        "too_short": "is empty; give at least one",
        "model_type": "is not a mapping of settings to values",
    }
    return f"{shown(given)} {reasons.get(kind, f'is not allowed ({kind})')}"


def _misplaced(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    *home, key = loc
    if model is SweepSpec and not home and key in SETTINGS:
        return (
            f"unknown key {key!r} at the top level; settings of a trial go under `base`, `grid` or `points`"
        )
    section = str(home[0]) if home else _section(model)
    return unknown(key, (SECTIONS[section] if home else model).model_fields, section)


def _section(model: type[BaseModel]) -> str:
    """The name by which `ddsweep settings` shows the keys of a file; without one, those of trials too."""
    return "" if model is SweepSpec else model.__name__.removesuffix("File").lower()
