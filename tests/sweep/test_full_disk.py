"""A disk that is full in the middle of a sweep: one message, and what finds space goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ddsweep import load_results
from ddsweep.errors import DiskFullError, DivergedError
from ddsweep.sweep.full_disk import FullDisk
from tests.conftest import OneRay
from tests.disks import enlarge, small_disk
from tests.sweep.driver import Driver


def test_it_is_said_once_and_given_up_when_nothing_finds_space_any_more() -> None:
    said: list[str] = []
    given_up: list[int] = []
    disk = FullDisk(said.append, lambda: given_up.append(len(said)), places=2)
    disk.met(DivergedError("of another kind"))
    assert said == []
    for number in range(15):
        disk.met(DiskFullError(f"/results/{number}: no space left"))
    assert said == ["/results/0: no space left (trials that find space go on)"]
    disk.ended()
    for _ in range(15):
        disk.met("no space left")
    assert not given_up, "one of them found space"
    disk.met("no space left")
    assert given_up == [1] and len(said) == 1
    large = FullDisk(said.append, lambda: given_up.append(len(said)), places=1000)
    for _ in range(1999):
        large.met("no space left")
    assert given_up == [1], "on many places not before each had two"


SWEEP = """
name: small
base: {dataset: digits, network: convnet(width=8), init: fixed, outer_steps: 12, inner_steps: 1}
grid: {images_per_class: [1, 200]} # 3 kB and 512 kB of images, and twice as much of moments
seeds: 2
evaluate: {networks: 4, shards: 1, baselines: none, protocols: [as_distilled]}
resources: {dashboard: false, checkpoint_every: 4, cpus: 0.5}
"""


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk(1400) as made:
        yield made


@pytest.mark.slow  # a minute of it is waiting for space
def test_what_finds_space_goes_on_and_the_rest_with_space_again(
    disk: Path, tmp_path: Path, environment: dict[str, str], one_ray: OneRay
) -> None:
    """Real files on a real disk: the two small trials fit, the two large ones do not."""
    driver = Driver(disk, environment, one_ray=one_ray)
    driver.file.write_text(SWEEP)
    driver.log = tmp_path / "log.txt"
    try:
        assert driver.run() == 2, driver.log.read_text()
        log = driver.log.read_text()
        on_the_way, *reasons = log.split("\nfailed ")
        assert on_the_way.count("no space left on this disk or quota (0.") == 1, log
        assert f"MB free in {driver.results}/artifacts/" in log.replace("\n", "")
        for noise in ("Traceback", "WARNING", "Errno", "(raylet)"):
            assert noise not in log, log
        assert "2 trials done; 2 failed" in log
        assert len(reasons) == 2 and all("DiskFullError: " in reason for reason in reasons)
        found = load_results(driver.results).trials
        assert found["images_per_class"].tolist() == [1, 1] and set(found["status"]) == {"done"}
        assert not (driver.results / ".lock").exists()
        assert not list(driver.results.glob(".tmp/*")), "nothing half written"
        before = {path: path.stat().st_mtime_ns for path in driver.results.glob("*/part-*.parquet")}
        enlarge(disk, 20_000)
        assert driver.run() == 0, driver.log.read_text()
    finally:
        driver.kill_everything()
    assert sorted(load_results(driver.results).trials["images_per_class"]) == [1, 1, 200, 200]
    assert not list(driver.results.glob("failures/*"))
    done = [path for path in before if path.parent.name in ("trials", "evals")]
    assert done and {path: path.stat().st_mtime_ns for path in done} == {path: before[path] for path in done}
