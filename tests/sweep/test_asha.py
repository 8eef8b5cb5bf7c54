"""ASHA in strata: its decisions on plain results, and whole sweeps on a real Ray."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from ddsweep import DistilledSet, load_results
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.sources import load_splits
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import AshaSpec, expand, load_sweep
from tests.conftest import Run
from tests.sweep.driver import Driver, descendants, until_ended

# ----------------------------------------------------------------------------------- plain results

SMALL, LARGE = (
    [TrialSpec(DATASETS["digits"], images_per_class=n, outer_steps=60, seed=s) for s in range(6)]
    for n in (1, 10)
)
ASHA = AshaSpec(grace=10, reduction=2)


@pytest.fixture
def told() -> Callable[..., str]:
    """``told(trial, step, score)``: what a scheduler of the twelve trials decides."""
    return teller(SMALL + LARGE)


def teller(trials: list[TrialSpec], asha: AshaSpec = ASHA) -> Callable[..., str]:
    from ddsweep.sweep.asha import StratifiedAsha

    scheduler = StratifiedAsha(asha, trials)

    def tell(trial: TrialSpec, step: int, score: float | None = None, state: str = "running") -> str:
        result = {"state": state, "outer_step": step, "val_score": score, "done": False}
        return scheduler.on_trial_result(None, tune_trial(trial), result)

    tell.scheduler = scheduler  # type: ignore[attr-defined]
    return tell


def tune_trial(trial: TrialSpec) -> Any:
    """What Tune says of a trial; its own id is another one in every run."""
    return SimpleNamespace(trial_id="tune_00001", config={"trial_id": trial.trial_id})


def test_the_worse_half_is_stopped_at_a_rung(told: Callable[..., str]) -> None:
    scores = [0.5, 0.4, 0.6, 0.7, 0.45, 0.65]
    decisions = [told(trial, 10, score) for trial, score in zip(SMALL, scores, strict=True)]
    assert decisions == ["CONTINUE", "STOP", "CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    assert told(SMALL[0], 20, 0.55) == "CONTINUE", "the first at a rung always goes on"
    assert told(SMALL[2], 20, 0.54) == "STOP"


def test_trials_are_compared_with_their_own_stratum(told: Callable[..., str]) -> None:
    for trial in LARGE:
        assert told(trial, 10, 0.9) == "CONTINUE"
    assert told(SMALL[0], 10, 0.2) == "CONTINUE", "ten images per class do better, which says nothing"
    assert told(SMALL[1], 10, 0.1) == "STOP"
    assert told(SMALL[2], 10, 0.3) == "CONTINUE"
    # With everything in one stratum it is as Ray does it: the small ones go.
    one = teller(SMALL + LARGE, AshaSpec(grace=10, reduction=2, strata=()))
    assert [one(trial, 10, 0.9) for trial in LARGE] == ["CONTINUE"] * 6
    assert one(SMALL[0], 10, 0.2) == "STOP"


def test_only_rungs_are_decisive(told: Callable[..., str]) -> None:
    assert told(SMALL[0], 10, 0.9) == "CONTINUE"
    assert told(SMALL[1], 4, None) == "CONTINUE"
    assert told(SMALL[1], 5, 0.0) == "CONTINUE", "validated, but no rung"
    assert told(SMALL[1], 15, 0.0) == "CONTINUE", "a rung that was missed is not made up for"
    assert told(SMALL[1], 60, 0.0) == "CONTINUE", "at the last step it is done, not stopped"
    assert told(SMALL[1], 60, state="distilled") == "CONTINUE"
    assert told(SMALL[2], 10, 0.0) == "STOP"


def test_a_trial_without_a_rung_is_never_stopped() -> None:
    short = [TrialSpec(DATASETS["digits"], outer_steps=10, seed=seed) for seed in range(2)]
    told = teller([*short, *SMALL])
    assert [told(trial, 10, score) for trial, score in zip(short, (0.9, 0.1), strict=True)] == [
        "CONTINUE"
    ] * 2
    assert "ASHA in 1 strata" in told.scheduler.debug_string()  # type: ignore[attr-defined]


def test_trials_of_one_stratum_may_differ_in_length() -> None:
    long = TrialSpec(DATASETS["digits"], outer_steps=200)
    told = teller([*SMALL, long])
    assert [told(trial, 40, 0.5) for trial in SMALL[:2]] == ["CONTINUE"] * 2
    assert told(long, 40, 0.4) == "STOP"
    told = teller([*SMALL, long])
    assert [told(long, step, 0.5) for step in (10, 20, 40, 80, 160)] == ["CONTINUE"] * 5


def test_what_an_earlier_run_measured_counts(told: Callable[..., str]) -> None:
    scheduler = told.scheduler  # type: ignore[attr-defined]
    scheduler.replay(SMALL[0].trial_id, {5: 0.1, 10: 0.5, 20: 0.6, 60: 0.9})
    scheduler.replay(LARGE[0].trial_id, {})
    assert told(SMALL[1], 10, 0.4) == "STOP", "without it this would be the first, and go on"
    assert told(SMALL[2], 10, 0.6) == "CONTINUE"
    assert told(SMALL[2], 20, 0.5) == "STOP"
    assert told(SMALL[0], 10, 0.0) == "CONTINUE", "decided then, and not again"


# ----------------------------------------------------------------------------------- on a real Ray

SWEEP = """
name: small
base:
  dataset: digits
  network: convnet(width=8)
  init: fixed
  images_per_class_per_step: 1
  inner_lr: 1.0
  outer_steps: 45
  real_batch: 128
  validate_every: 25
grid:
  images_per_class: [1, 2]
points: # the good one first: it is the one that goes on
  - {outer_lr: 0.1}
  - {outer_lr: 1e-5}
  - {outer_lr: 2e-5}
  - {outer_lr: 3e-5}
scheduler: {grace: 15, reduction: 2}
evaluate: {networks: 4, shards: 1, baselines: none, protocols: [as_distilled]}
resources: {dashboard: false, checkpoint_every: 20, max_concurrent: 1}
"""


def driver_in(folder: Path, environment: dict[str, str]) -> Driver:
    made = Driver(folder, environment)
    made.file.write_text(SWEEP)
    return made


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Driver:
    """The sweep, run to its end under ASHA. Not to be written to."""
    made = driver_in(tmp_path_factory.mktemp("asha"), environment)
    assert made.run() == 0, made.log.read_text()
    return made


def rows(driver: Driver) -> pd.DataFrame:
    return load_results(driver.results).trials.sort_values(
        ["images_per_class", "outer_lr"], ignore_index=True
    )


def parts(driver: Driver) -> dict[str, int]:
    """Every part, checkpoint and set, and when it was written."""
    found = [*driver.results.glob("*/part-*.parquet"), *driver.results.glob("artifacts/*/*")]
    return {str(path.relative_to(driver.results)): path.stat().st_mtime_ns for path in found}


@pytest.mark.ray
def test_some_of_each_stratum_are_stopped_and_one_finishes(stopped: Driver) -> None:
    found = rows(stopped)
    assert len(found) == 8
    for _, stratum in found.groupby("images_per_class"):
        assert stratum["status"].tolist() == ["stopped"] * 3 + ["done"], stratum[["outer_lr", "status"]]
    early, done = found[found["status"] == "stopped"], found[found["status"] == "done"]
    assert set(early["outer_steps_done"]) <= {15, 30} and set(done["outer_steps_done"]) == {45}
    assert early["val_score"].notna().all() and (early["wall_seconds"] > 0).all()
    for column in ("test_accuracy_mean", "test_models", "distilled_sha256", "evaluation_id"):
        assert early[column].isna().all() and done[column].notna().all(), column
    results = load_results(stopped.results)
    assert set(results.evals["trial_id"]) == set(done["trial_id"]), "never evaluated"
    for row in early.itertuples():
        history = results.history[results.history["trial_id"] == row.trial_id]
        assert history["outer_step"].max() == row.outer_steps_done
        assert history["val_score"].iloc[-1] == row.val_score
        files = {path.name for path in (stopped.results / "artifacts" / row.trial_id).iterdir()}
        assert files == {"checkpoint.safetensors"}
    assert not list((stopped.results / "failures").iterdir())
    log = stopped.log.read_text()
    assert "2/8 done" in log and "6 stopped" in log
    assert "2 trials done; 6 stopped by the scheduler (with scheduler=null they go on)" in log
    for noise in ("WARNING", "Traceback", "View detailed", "(raylet)"):
        assert noise not in log


@pytest.mark.ray
def test_status_show_and_plan_say_stopped(stopped: Driver, ddsweep: Run) -> None:
    said = ddsweep("status", stopped.results).stdout
    assert said.startswith("small: 8 trials, 2 done, 6 stopped\nno driver at work; nothing is left to do")
    first = rows(stopped).iloc[0]
    said = ddsweep("show", first["trial_id"], stopped.results).stdout
    assert said.startswith(f"trial {first['trial_id']}: stopped, outer step {first['outer_steps_done']}/45\n")
    results = stopped.folder / "results"
    said = ddsweep("plan", stopped.file, "--results", results).stdout
    assert "8 trials, 2 done, 6 stopped; nothing is left to do" in said
    assert "after outer steps 15, 30, by their val_score" in said and "2 of 4, 4 trials" in said
    said = ddsweep("plan", stopped.file, "scheduler=null", "--results", results).stdout
    assert "8 trials, 2 done; the other 6 take about" in said


@pytest.mark.ray
def test_running_again_runs_nothing(stopped: Driver) -> None:
    before = parts(stopped)
    assert stopped.run() == 0
    assert parts(stopped) == before


def copied(stopped: Driver, folder: Path) -> Driver:
    made = driver_in(folder, stopped.environment)
    shutil.copytree(stopped.results, made.results)
    return made


@pytest.mark.slow
@pytest.mark.ray
def test_without_the_scheduler_stopped_trials_go_on_to_their_end(stopped: Driver, tmp_path: Path) -> None:
    driver = copied(stopped, tmp_path)
    try:
        assert driver.start("scheduler=null").wait() == 0, driver.log.read_text()
    finally:
        driver.kill_everything()
    before, after = rows(stopped), rows(driver)
    assert after["trial_id"].tolist() == before["trial_id"].tolist()
    assert set(after["status"]) == {"done"} and set(after["outer_steps_done"]) == {45}
    assert after["test_accuracy_mean"].notna().all()
    early = before["status"] == "stopped"
    assert after["n_resumed"].tolist() == early.astype(int).tolist(), "each from its checkpoint"
    assert "8 trials done\n" in driver.log.read_text()
    # The same images as if there had never been a scheduler.
    plan = expand(load_sweep(driver.file), lambda name: DATASETS[str(name)])
    spec = next(t for t in plan.trials if t.trial_id == after["trial_id"][0])
    assert early[0]
    alone = distilled_alone(spec, tmp_path / "alone")
    assert alone.sha256 == after["distilled_sha256"][0]


def distilled_alone(spec: TrialSpec, folder: Path) -> DistilledSet:
    import torch

    from ddsweep.trial import distil_trial, read_distilled
    from ddsweep.trial_plan import TrialSettings

    threads = torch.get_num_threads()
    splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    try:
        assert distil_trial(spec, splits, SweepDirectory(folder), TrialSettings())
    finally:
        torch.set_num_threads(threads)
    return read_distilled(spec, SweepDirectory(folder))


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_sweep_goes_on_by_the_same_command(tmp_path: Path, environment: dict[str, str]) -> None:
    driver = driver_in(tmp_path, environment)

    def ended() -> dict[str, int]:
        return {k: v for k, v in parts(driver).items() if k.startswith("trials/")}

    try:
        driver.start()
        driver.until(lambda: len(ended()) >= 3, "one done and two stopped")
        below = descendants(driver.process.pid) if driver.process else []
        driver.signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        until_ended(below, "ray::Distil", "ray::EvalShard")
        before = ended()
        assert set(rows(driver)["status"]) == {"done", "stopped"}
        assert driver.run() == 0, driver.log.read_text()
    finally:
        driver.kill_everything()
    assert {name: ended()[name] for name in before} == before, "done stays done, stopped stays stopped"
    found = rows(driver)
    assert len(found) == 8
    for _, stratum in found.groupby("images_per_class"):
        assert set(stratum["status"]) == {"done", "stopped"}
