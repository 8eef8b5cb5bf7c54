"""Arguments and options of several verbs, declared once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ddsweep import completions
from ddsweep.bundled import find_file
from ddsweep.errors import UserError

__all__ = [
    "Address",
    "DataRoot",
    "EvalOverrides",
    "Everything",
    "Overrides",
    "PoolOverrides",
    "ResultsDir",
    "ResultsRoot",
    "SiteFile",
    "Smoke",
    "SweepFile",
    "Track",
    "Watch",
    "find",
    "trackers",
]


def find(kind: str) -> Callable[[Path | None], Path | None]:
    """Turns a path, or the name of a file that comes with ddsweep, into a file."""
    return lambda given: None if given is None else find_file(given, kind)


SweepFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A sweep file, or the name of one that comes with ddsweep, such as quickstart.",
        callback=find("sweep file"),
    ),
]
SiteFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A site file, or the name of one that comes with ddsweep, such as local.",
        callback=find("site file"),
    ),
]


def _settings(help: str, autocompletion: Callable[[str], list[str]] | None = None) -> Any:
    return typer.Argument(metavar="[KEY=VALUE]...", help=help, autocompletion=autocompletion)


Overrides = Annotated[
    list[str] | None,
    _settings("Settings that override the file: outer_steps=10 evaluate.networks=8.", completions.overrides),
]
EvalOverrides = Annotated[
    list[str] | None,
    _settings(
        "Settings of evaluation and resources: evaluate.networks=200 resources.gpus=0.5.",
        completions.overrides,
    ),
]
PoolOverrides = Annotated[
    list[str] | None, _settings("Settings that override the file: train=400 dataset=cifar10-exact.")
]
ResultsRoot = Annotated[
    Path | None,
    typer.Option("--results", help="Folder of results (or DDSWEEP_RESULTS; default: results)."),
]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", help="Folder of data sets (or DDSWEEP_DATA).", metavar="DIR")
]
ResultsDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="Results of one sweep, such as results/quickstart.")
]


Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="Use the tiny settings under `smoke` in the file, to try it out."),
]


Everything = Annotated[
    bool, typer.Option("--all", help="Show every trial at the end, not only the best of each kind.")
]
Address = Annotated[
    str | None, typer.Option(help="Join the Ray cluster at this address instead of starting one.")
]


def seconds(option: str, least: float = 0) -> Callable[[float | None], float | None]:
    """The callback of an option that is a span of time, of a day at most. Raises `UserError`."""

    def check(value: float | None) -> float | None:
        if value is not None and not least <= value <= 86400:
            raise UserError(f"{option}: {value:g} must be {least:g} to 86400 seconds")
        return value

    return check


Watch = Annotated[
    float | None,
    typer.Option(
        "--watch",
        metavar="SECONDS",
        callback=seconds("--watch", 1),
        help="Repeat after so many seconds, until no driver is at work.",
    ),
]


def trackers(kinds: list[str] | None) -> list[str]:
    """The trackers named. Raises `UserError` for one that is unknown or not installed."""
    from ddsweep.trackers.kinds import require_trackers

    found = list(dict.fromkeys(kinds or ()))
    require_trackers(found)
    return found


Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        callback=trackers,
        help="Send curves to tensorboard, mlflow or wandb (offline) beside the sweep; may be repeated.",
    ),
]
