"""Who may import whom: imports go to a smaller room only, and ray and submitit stay where they are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import imported_by

PACKAGE = Path(__file__).resolve().parents[1] / "ddsweep"
# The lowest first. Rooms of one line do not know each other.
LEVELS = (
    ("errors", "interpreter", "private"),
    ("seeds", "catalog", "bundled", "paths", "processes", "tensor_file"),
    ("own_code", "start_set"),
    ("core",),
    ("data", "results", "baselines", "spec", "cost", "measuring", "compilation", "provenance", "dashboards"),
    ("distilled", "pools", "trial_plan", "machine", "cohorts"),
    ("trial", "packing", "imported", "exported"),
    ("evaluation",),
    ("sweep", "report", "trackers"),
    ("launch", "one_trial"),
    ("completions",),
    ("verbs",),
    ("cli",),
    ("__main__",),
)
ROOMS = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
HOMES = {"ray": ("sweep", "launch"), "submitit": ("launch",)}
# The lazy exports of `ddsweep/__init__.py` name modules of every room.
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MODULES.remove(Path("__init__.py"))


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def imports_of(module: Path, *, top_level: bool = False) -> Iterator[str]:
    """Full names imported by ``module``, also inside functions unless ``top_level``."""
    tree = ast.parse((PACKAGE / module).read_text())
    package = ("ddsweep", *module.with_suffix("").parts[:-1])
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*above, *filter(None, [node.module])])
            # `from ddsweep import trial` names a module, `from ddsweep.trial import run` is in one.
            yield from (f"{source}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_to_a_smaller_room(module: Path) -> None:
    room = room_of(module)
    assert room in ROOMS, f"{module} is in no room: name one in tests/test_imports.py"
    for name in imports_of(module):
        parts = name.split(".")
        if parts[0] != "ddsweep" or parts[1:] in ([], ["__version__"]):
            continue
        other = parts[1]
        assert other in ROOMS, f"{module} imports {name}, which is in no room"
        assert other == room or ROOMS[other] < ROOMS[room], (
            f"{module} (level {ROOMS[room]}) imports {name} (level {ROOMS[other]})"
        )


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_ray_and_submitit_stay_at_home(module: Path) -> None:
    for name in imports_of(module):
        homes = HOMES.get(name.split(".")[0])
        assert homes is None or room_of(module) in homes, f"{module} imports {name}; that is for {homes}"


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) == "core"], ids=str)
def test_core_needs_torch_only(module: Path) -> None:
    foreign = {name.split(".")[0] for name in imports_of(module, top_level=True)}
    foreign -= {"ddsweep", "torch", *sys.stdlib_module_names}
    assert not foreign, f"{module} imports {foreign}"


@pytest.mark.parametrize(
    ("code", "slow"),
    [
        ("import ddsweep", "torch ray pandas pyarrow numpy pydantic typer yaml"),
        ("import ddsweep.spec, ddsweep.cost", "torch ray pandas pyarrow"),
        (
            "from ddsweep.results import artifacts, layout, lock, parts, schemas, statistics",
            "torch ray pandas matplotlib scipy",
        ),
        (
            "from ddsweep.data.files import list_datasets, resolve_dataset\n"
            "list_datasets(None), resolve_dataset('mnist', None)",
            "torch torchvision numpy pyarrow PIL",
        ),
        (
            "from ddsweep.catalog import SOURCES, DatasetSpec\n"
            "from ddsweep.data.sources import source_of\n"
            "[source_of(DatasetSpec('any', name)) for name in SOURCES]",
            "torch torchvision numpy pyarrow PIL",
        ),
        ("import ddsweep.trial, ddsweep.evaluation", "ray pydantic typer pandas"),
        ("from ddsweep import run_trial", "ray"),
    ],
)
def test_what_must_be_instant_imports_nothing_slow(code: str, slow: str) -> None:
    assert imported_by(code, *slow.split()) == []
