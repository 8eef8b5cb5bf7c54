"""A Slurm of three nodes on this machine: one for the session, idle and whole for each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.cluster.machines import Lab, why_not

FAILED = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("cluster")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session")
def slurm() -> Iterator[Lab]:
    """The cluster. Tests take `lab`, which leaves it as it was."""
    if reason := why_not():
        if os.environ.get("DDSWEEP_REQUIRE_CLUSTER") == "1":
            pytest.fail(f"DDSWEEP_REQUIRE_CLUSTER=1, but there can be no cluster here: {reason}")
        pytest.skip(reason)
    made = Lab()
    try:
        print(made.up())
        yield made
    finally:
        made.down()


@pytest.fixture
def lab(
    slurm: Lab, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Lab]:
    """The cluster, idle and whole; this process has the environment of its login node.

    After a test that failed, Slurm's logs are in its tmp_path.
    """
    for name in set(os.environ) - set(slurm.environment):
        if not name.startswith("PYTEST_"):  # pytest's own, which it takes away itself
            monkeypatch.delenv(name)
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm
    if request.node.stash.get(FAILED, False):
        shutil.copytree(slurm.logs, tmp_path / "slurm-logs")
        print("Slurm's logs:", tmp_path / "slurm-logs")
    slurm.repair()


@pytest.fixture
def shared(lab: Lab, request: pytest.FixtureRequest) -> Path:
    """A new folder that all nodes see: a test's ``tmp_path`` is not on them."""
    folder = lab.shared / request.node.name.replace("/", "_")
    folder.mkdir()
    return folder
