"""Whole sweeps on a real Ray: their files, and that killing any process does not change them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pandas as pd
import pytest

from ddsweep import DistilledSet, load_results
from tests.conftest import PATIENCE_S, OneRay, Run
from tests.science import assert_same_science
from tests.sweep.driver import OUTER_STEPS, Driver, descendants, kill, until_ended


def assert_equal_to(undisturbed: Driver, driver: Driver) -> None:
    assert_same_science(driver.results, undisturbed.results)
    for path in undisturbed.results.glob("artifacts/*/distilled.safetensors"):
        one, other = (
            DistilledSet.load(p) for p in (path, driver.results / path.relative_to(undisturbed.results))
        )
        assert one.images.numpy().tobytes() == other.images.numpy().tobytes()
        assert one.rates.numpy().tobytes() == other.rates.numpy().tobytes()


def test_a_sweep_fills_all_tables(undisturbed: Driver) -> None:
    tables = undisturbed.tables()
    trials, evals = tables["trials"], tables["evals"]
    assert sorted(trials["init"]) == ["fixed", "random"]
    assert set(trials["status"]) == {"done"}
    random = trials[trials["init"] == "random"].iloc[0]
    rows = evals[(evals["trial_id"] == random["trial_id"]) & (evals["source"] == "distilled")]
    assert sorted(rows[rows["inner_step"] == 4]["model_seed"]) == list(range(10))
    assert rows[rows["inner_step"] == 4]["accuracy"].mean() == pytest.approx(random["test_accuracy_mean"])
    fixed = trials[trials["init"] == "fixed"].iloc[0]
    assert fixed["test_models"] == 1
    assert pd.isna(fixed["test_accuracy_std"])
    assert list(tables["history"].groupby("trial_id")["outer_step"].max()) == [OUTER_STEPS, OUTER_STEPS]
    for folder in ("trials", "evals", "history"):
        assert not list((undisturbed.results / folder).glob(".*")), "no unfinished file beside the parts"
    assert not list((undisturbed.results / ".tmp").iterdir())


def test_a_distilled_set_beats_random_real_images(undisturbed: Driver) -> None:
    evals = undisturbed.tables()["evals"]
    last = evals[(evals["inner_step"] == 4) & (evals["protocol"] == "as_distilled")]
    means = last.groupby(["trial_id", "source"])["accuracy"].mean().unstack()
    assert (means["distilled"] > means["random_real"] + 0.03).all(), means


def test_running_again_does_nothing(undisturbed: Driver) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.results.glob("*/part-*.parquet")}
    assert undisturbed.run_here() == 0
    assert {path: path.stat().st_mtime_ns for path in undisturbed.results.glob("*/part-*.parquet")} == before


@pytest.mark.ray
@pytest.mark.slow
def test_seconds_in_which_every_worker_and_every_shard_is_killed_change_nothing(
    undisturbed: Driver, tmp_path: Path, environment: dict[str, str], one_ray: OneRay
) -> None:
    """As in a minute without memory, made short. It has two shards; the undisturbed run had one. Neither
    number nor loss of shards shows in the results."""
    driver = Driver(tmp_path, environment, shards=2, spread_s=25, one_ray=one_ray).start()
    killed = {"ray::Distil": 0, "ray::EvalShard": 0}

    def kill_all(title: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for pid in driver.workers(title):
                kill(pid)
                killed[title] += 1
            time.sleep(0.2)

    try:
        driver.until(driver.checkpoint_of_a_running_trial, "a checkpoint")
        kill_all("ray::Distil", 2)
        driver.until(lambda: list(driver.results.glob("evals/part-*.parquet")), "the first evals part")
        kill_all("ray::EvalShard", 4)
        assert driver.wait() == 0, driver.log.read_text()
    finally:
        driver.kill_everything()
    assert_equal_to(undisturbed, driver)
    resumed = load_results(driver.results).trials["n_resumed"]
    assert resumed.max() >= 1, "no trial went on from a checkpoint: the kill came too late to test anything"
    assert not list((driver.results / "failures").iterdir())
    assert killed["ray::Distil"] >= 1 and killed["ray::EvalShard"] >= 2
    log = driver.log.read_text()
    assert "its worker died, and it is tried again: the process was killed from outside" in log
    assert "evaluation: a shard died and is started again: the process was killed from outside" in log


@pytest.mark.ray
def test_a_killed_and_then_drained_driver_is_completed_by_the_same_command(
    undisturbed: Driver, driver: Driver
) -> None:
    driver.start()
    driver.until(driver.checkpoint_of_a_running_trial, "a checkpoint")
    below = descendants(driver.process.pid) if driver.process else []
    driver.signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    assert not list((driver.results / "trials").iterdir())
    # They end by themselves: no process is left to tell them. (Two agents of Ray take a minute more.)
    until_ended(below, "ray::Distil", "ray::EvalShard")
    killed_at = driver.checkpoint_of_a_running_trial()
    assert killed_at is not None
    before = killed_at.stat().st_mtime_ns

    driver.start("resources.dashboard=true")
    driver.until(lambda: killed_at.stat().st_mtime_ns > before, "a checkpoint of the second run")
    assert_dashboard_is_private_and_readable(driver)
    driver.signal(signal.SIGTERM)
    assert driver.wait() == 75, driver.log.read_text()
    assert "SIGTERM: draining" in driver.log.read_text()
    assert not (driver.results / ".lock").exists()

    until_then = len(driver.log.read_text())
    assert driver.run() == 0, driver.log.read_text()
    assert_plain(driver.log.read_text()[until_then:])
    assert_equal_to(undisturbed, driver)


def assert_dashboard_is_private_and_readable(driver: Driver) -> None:
    log = driver.log.read_text()
    found = re.search(r"Ray dashboard: (http://127\.0\.0\.1:\d+) \(log in with the token in (.*)\)", log)
    assert found, log
    url, token = f"{found[1]}/api/v0/actors?detail=True", Path(found[2])
    assert token.stat().st_mode & 0o777 == 0o600
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=PATIENCE_S)
    assert refused.value.code in (401, 403)
    refused.value.close()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token.read_text()}"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        actors = json.load(answer)["data"]["result"]["result"]
    names = {actor["repr_name"] for actor in actors}
    assert {"eval shard 0 of small", "eval shard 1 of small", "distil small"} <= names
    assert {"eval-small-0", "eval-small-1"} <= {actor["name"] for actor in actors}


def test_a_sweep_in_a_pipe_prints_plain_lines_and_no_noise(undisturbed: Driver) -> None:
    log = undisturbed.log.read_text()
    assert re.search(r"1/2 done, .* \| \w{10} init=", log)
    assert_plain(log)


def assert_plain(log: str) -> None:
    assert "\x1b[" not in log
    for noise in ("Configuration for experiment", "WARNING", "Traceback", "View detailed", "(raylet)"):
        assert noise not in log


def test_more_networks_are_evaluated_without_distilling_again(
    undisturbed: Driver, one_ray: OneRay, ddsweep: Run, tmp_path: Path
) -> None:
    results = shutil.copytree(undisturbed.results, tmp_path / "small")
    images = {p: p.stat().st_mtime_ns for p in results.glob("artifacts/*/*.safetensors")}
    result = one_ray("eval", results, "evaluate.networks=14", "evaluate.shards=2")
    assert result.returncode == 0, result.stderr
    after = load_results(results)
    assert list(after.trials.sort_values("init")["test_models"]) == [1, 14]
    assert {p: p.stat().st_mtime_ns for p in images} == images
    before = undisturbed.tables()["evals"]
    keys = ["trial_id", "source", "protocol", "model_seed", "inner_step"]
    merged = before.merge(after.evals, on=keys, suffixes=("", "_after"))
    assert len(merged) == len(before), "no row was lost or doubled"
    assert (merged["accuracy"] == merged["accuracy_after"]).all()
    # The sweep file asks for 10, so more than it asks for is there: nothing is left to do, and nothing goes.
    parts = {p: p.read_bytes() for p in results.glob("*/part-*.parquet")}
    assert "2 trials, 2 done" in ddsweep("plan", undisturbed.file, "--results", tmp_path).stdout
    result = ddsweep("run", undisturbed.file, "--results", tmp_path)
    assert (result.returncode, "Ray" in result.stdout) == (0, False), result.stderr
    assert {p: p.read_bytes() for p in results.glob("*/part-*.parquet")} == parts
