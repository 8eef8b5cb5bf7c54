"""A small real sweep on a real Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import OneRay
from tests.sweep.driver import Driver


@pytest.fixture
def driver(tmp_path: Path, environment: dict[str, str], hostile: Path) -> Iterator[Driver]:
    """With a Ray of its own. Files in the current folder do not disturb it."""
    made = Driver(tmp_path, environment, cwd=hostile)
    yield made
    made.kill_everything()


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], one_ray: OneRay
) -> Driver:
    """The sweep with one shard, run to its end: what all others are compared with."""
    made = Driver(tmp_path_factory.mktemp("undisturbed"), environment, shards=1, one_ray=one_ray)
    code = made.run()
    assert code == 0, made.log.read_text()
    return made
