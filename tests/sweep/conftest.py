"""A small real sweep on a real Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sweep.driver import Driver


@pytest.fixture
def driver(tmp_path: Path, environment: dict[str, str]) -> Iterator[Driver]:
    made = Driver(tmp_path, environment)
    yield made
    made.kill_everything()


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], hostile: Path
) -> Driver:
    """The sweep with one shard, run to its end: what all others are compared with. Nothing of the folder that
    the user is in disturbs it."""
    made = Driver(tmp_path_factory.mktemp("undisturbed"), environment, shards=1, cwd=hostile)
    code = made.run()
    assert code == 0, made.log.read_text()
    return made
