"""ASHA on settings: decisions on plain scores, and whole sweeps on a real Ray. What becomes of the trials is
in `test_queue`."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
import pytest

from ddsweep import DistilledSet, load_results
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import AshaSpec, expand, load_sweep
from ddsweep.sweep.halving import Halving
from tests.conftest import OneRay, Run
from tests.sweep.driver import Driver, descendants, until_ended

# ----------------------------------------------------------------------------------- plain scores


def settings(images: int, rates: int, seeds: int = 1, outer_steps: int = 60) -> list[list[TrialSpec]]:
    """The seeds of settings that differ in their outer rate."""
    return [
        [
            TrialSpec(
                DATASETS["digits"],
                images_per_class=images,
                outer_lr=0.01 * (1 + rate),
                outer_steps=outer_steps,
                seed=seed,
            )
            for seed in range(seeds)
        ]
        for rate in range(rates)
    ]


def flat(*groups: list[list[TrialSpec]]) -> list[TrialSpec]:
    return [trial for group in groups for seeds in group for trial in seeds]


SMALL, LARGE = settings(1, 6), settings(10, 6)
PAIRS = settings(1, 3, seeds=2)
ASHA = AshaSpec(grace=10, reduction=2)

Tell = Callable[[TrialSpec, int, float], str]


def teller(*groups: list[list[TrialSpec]], asha: AshaSpec = ASHA) -> Tell:
    halving = Halving(asha, flat(*groups))
    return lambda trial, step, score: halving.scored(trial.trial_id, step, score)


def test_the_worse_half_is_stopped_at_a_rung() -> None:
    tell, scores = teller(SMALL), [0.5, 0.4, 0.6, 0.7, 0.45, 0.65]
    said = [tell(seeds[0], 10, score) for seeds, score in zip(SMALL, scores, strict=True)]
    assert said == ["go", "stop", "go", "go", "stop", "go"]
    assert tell(SMALL[0][0], 20, 0.55) == "go", "the first at a rung always goes on"
    assert tell(SMALL[2][0], 20, 0.54) == "stop"


def test_settings_are_compared_with_their_own_stratum() -> None:
    tell = teller(SMALL, LARGE)
    assert {tell(seeds[0], 10, 0.9) for seeds in LARGE} == {"go"}
    assert tell(SMALL[0][0], 10, 0.2) == "go", "ten images per class do better, which says nothing"
    assert tell(SMALL[1][0], 10, 0.1) == "stop"
    assert tell(SMALL[2][0], 10, 0.3) == "go"
    # With everything in one stratum it is as Ray does it: the small ones go.
    one = teller(SMALL, LARGE, asha=AshaSpec(grace=10, reduction=2, strata=()))
    assert {one(seeds[0], 10, 0.9) for seeds in LARGE} == {"go"}
    assert one(SMALL[0][0], 10, 0.2) == "stop"


def test_settings_of_one_stratum_may_differ_in_length() -> None:
    long = settings(1, 1, outer_steps=200)
    tell = teller(SMALL, long)
    assert [tell(seeds[0], 40, 0.5) for seeds in SMALL[:2]] == ["go"] * 2
    assert tell(long[0][0], 40, 0.4) == "stop"
    tell = teller(SMALL, long)
    assert [tell(long[0][0], step, 0.5) for step in (10, 20, 40, 80, 160)] == ["go"] * 5
    short = settings(1, 2, outer_steps=10)
    assert not Halving(ASHA, flat(short, SMALL)).is_rung(short[0][0].trial_id, 10)


def test_seeds_of_one_setting_live_and_die_together_by_their_mean() -> None:
    (a, b), (c, d), (e, f) = PAIRS
    halving = Halving(ASHA, flat(PAIRS))
    tell = teller_of(halving)
    assert tell(a, 10, 0.9) == "wait", "its sibling is not there yet"
    assert tell(c, 10, 0.95) == "wait"
    assert tell(b, 10, 0.1) == "go" and halving.verdict(a.trial_id) == "go"
    assert tell(d, 10, 0.0) == "stop", "0.475 is below 0.5, though one of its seeds is the best of all"
    assert halving.verdict(c.trial_id) == "stop"
    assert tell(e, 10, 0.5) == "wait"
    assert tell(f, 10, 0.6) == "go"
    assert tell(a, 20, 0.9) == "wait", "and so at each rung"
    assert halving.verdict(b.trial_id) == "go"
    assert set(halving.decided) == {trial.trial_id for trial in flat(PAIRS)}


def teller_of(halving: Halving) -> Tell:
    return lambda trial, step, score: halving.scored(trial.trial_id, step, score)


def test_a_seed_that_failed_counts_as_worst_and_is_not_waited_for() -> None:
    (a, b), (c, d), (e, f) = PAIRS
    halving = Halving(ASHA, flat(PAIRS))
    tell = teller_of(halving)
    assert [tell(a, 10, 0.5), tell(b, 10, 0.5)] == ["wait", "go"]
    assert tell(c, 10, 0.9) == "wait"
    halving.failed(d.trial_id)
    assert halving.verdict(c.trial_id) == "stop", "0.45 is below 0.5"
    halving.failed(e.trial_id)
    halving.failed(f.trial_id)
    assert halving.verdict(e.trial_id) == "go", "it has no score: if it is tried again, it runs"
    halving.failed(b.trial_id)
    assert tell(a, 20, 0.5) == "go", "the only one that is left waits for nobody"


def test_what_an_earlier_run_measured_counts() -> None:
    halving = Halving(ASHA, flat(SMALL, LARGE))
    halving.replay(SMALL[0][0].trial_id, {5: 0.1, 10: 0.5, 20: 0.6, 60: 0.9}, reached=60)
    halving.replay(LARGE[0][0].trial_id, {}, reached=0)
    halving.begin()
    tell = teller_of(halving)
    assert tell(SMALL[1][0], 10, 0.4) == "stop", "without it this would be the first, and go on"
    assert tell(SMALL[2][0], 10, 0.6) == "go"
    assert tell(SMALL[2][0], 20, 0.5) == "stop"
    assert tell(SMALL[0][0], 10, 0.0) == "go", "decided then, and not again"


def test_a_killed_run_leaves_who_waits_and_who_was_stopped_in_the_files() -> None:
    (a, b), (c, d), (e, f) = PAIRS
    halving = Halving(ASHA, flat(PAIRS))
    halving.replay(a.trial_id, {10: 0.5}, reached=10)  # waits for b, which had not come so far
    halving.replay(b.trial_id, {}, reached=5)
    halving.replay(c.trial_id, {10: 0.4}, reached=10, stopped=True)
    halving.replay(d.trial_id, {10: 0.4}, reached=10)  # the kill came between the rows of the two
    halving.replay(e.trial_id, {10: 0.6}, reached=20)  # had gone on
    halving.replay(f.trial_id, {10: 0.6}, reached=10)
    halving.begin()
    said = [halving.verdict(trial.trial_id) for trial in (a, b, d, e, f)]
    assert said == ["wait", "go", "stop", "go", "go"]
    assert teller_of(halving)(b, 10, 0.4) == "stop", "0.45 beside 0.4 and 0.6, half way between which is 0.5"


def test_new_seeds_of_a_setting_share_its_fate() -> None:
    (a, b), (c, d), _ = PAIRS
    halving = Halving(ASHA, flat(PAIRS))
    halving.replay(a.trial_id, {10: 0.5, 20: 0.5}, reached=60)
    halving.replay(c.trial_id, {10: 0.4}, reached=10, stopped=True)
    halving.begin()
    tell = teller_of(halving)
    assert [tell(b, step, 0.0) for step in (10, 20, 40)] == ["go"] * 3, "beside one that is done"
    assert tell(d, 10, 0.9) == "stop", "beside one that was stopped here"


# ----------------------------------------------------------------------------------- on a real Ray

SWEEP = """
name: small
base:
  dataset: digits
  network: convnet(width=8)
  init: fixed
  images_per_class: 2
  inner_lr: 1.0
  outer_steps: 45
  real_batch: 128
  validate_every: 25
points: # the good one first: it is the one that goes on
  - {outer_lr: 0.1}
  - {outer_lr: 1e-5}
seeds: 2
scheduler: {grace: 15, reduction: 2}
evaluate: {networks: 4, shards: 1, baselines: none, protocols: [as_distilled]}
resources: {dashboard: false, checkpoint_every: 20, max_concurrent: 1}
"""


def driver_in(folder: Path, environment: Mapping[str, str], one_ray: OneRay | None = None) -> Driver:
    made = Driver(folder, environment, one_ray=one_ray)
    made.file.write_text(SWEEP)
    return made


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], one_ray: OneRay) -> Driver:
    """The sweep, run to its end under ASHA. Not to be written to."""
    made = driver_in(tmp_path_factory.mktemp("asha"), environment, one_ray)
    assert made.run_here() == 0, made.log.read_text()
    return made


def rows(driver: Driver) -> pd.DataFrame:
    return load_results(driver.results).trials.sort_values(["outer_lr", "seed"], ignore_index=True)


def parts(driver: Driver) -> dict[str, int]:
    """Every part, checkpoint and set, and when it was written."""
    found = [*driver.results.glob("*/part-*.parquet"), *driver.results.glob("artifacts/*/*")]
    return {str(path.relative_to(driver.results)): path.stat().st_mtime_ns for path in found}


def test_the_poor_setting_is_stopped_with_all_its_seeds(stopped: Driver) -> None:
    """One trial at a time, so no two seeds are ever at a rung together: one of them has to pause."""
    found = rows(stopped)
    assert found["status"].tolist() == ["stopped"] * 2 + ["done"] * 2, found[["outer_lr", "seed", "status"]]
    early, done = found[found["status"] == "stopped"], found[found["status"] == "done"]
    assert set(early["outer_steps_done"]) == {15} and set(done["outer_steps_done"]) == {45}
    assert done["n_resumed"].sum() >= 2, "at both rungs one seed of a setting waits for the other"
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
    assert "2/4 done" in log and "2 stopped" in log and ": paused, step 15/45" in log
    assert "2 trials done; 2 stopped by the scheduler (with scheduler=null they go on)" in log
    for noise in ("WARNING", "Traceback", "View detailed", "(raylet)"):
        assert noise not in log


@pytest.mark.slow
@pytest.mark.ray
def test_seeds_that_are_distilled_alone_make_room_at_a_rung_and_come_back(
    tmp_path: Path, environment: dict[str, str], one_ray: OneRay
) -> None:
    """Two slots, both with a seed of the first setting: the one that is first at the rung lets the second
    setting begin."""
    driver = driver_in(tmp_path, environment, one_ray)
    driver.file.write_text(SWEEP.replace("max_concurrent: 1", "cohort: 1, total_cpus: 2"))
    assert driver.run_here() == 0, driver.log.read_text()
    found = rows(driver)
    assert found["status"].tolist() == ["stopped"] * 2 + ["done"] * 2, found[["outer_lr", "seed", "status"]]
    assert not list((driver.results / "failures").iterdir())
    log = driver.log.read_text()
    for noise in ("WARNING", "Traceback", "died", "Error", "(raylet)"):
        assert noise not in log, log


def test_a_pause_changes_no_bit(stopped: Driver, tmp_path: Path) -> None:
    found = rows(stopped)
    paused = found[(found["status"] == "done") & (found["n_resumed"] > 0)].iloc[0]
    alone = distilled_alone(spec_of(stopped, paused["trial_id"]), tmp_path)
    assert alone.sha256 == paused["distilled_sha256"]


def test_status_show_and_plan_say_stopped(stopped: Driver, ddsweep: Run) -> None:
    said = ddsweep("status", stopped.results).stdout
    assert said.startswith("small: 4 trials, 2 done, 2 stopped\nno driver at work; nothing is left to do")
    first = rows(stopped).iloc[0]
    said = ddsweep("show", first["trial_id"], stopped.results).stdout
    assert said.startswith(f"trial {first['trial_id']}: stopped, outer step {first['outer_steps_done']}/45\n")
    results = stopped.folder / "results"
    said = ddsweep("plan", stopped.file, "--results", results).stdout
    assert "4 trials, 2 done, 2 stopped; nothing is left to do" in said
    assert "after outer steps 15, 30 settings may be stopped" in said
    said = ddsweep("plan", stopped.file, "scheduler=null", "--results", results).stdout
    assert "4 trials, 2 done; the other 2 take under 1 CPU-minute" in said


def test_running_again_runs_nothing(stopped: Driver) -> None:
    before = parts(stopped)
    assert stopped.run_here() == 0
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
    resumed = before["n_resumed"].fillna(0) + early
    assert after["n_resumed"].tolist() == resumed.tolist(), "each from its checkpoint"
    assert "4 trials done\n" in driver.log.read_text()
    # The same images as if there had never been a scheduler.
    assert early[0]
    alone = distilled_alone(spec_of(driver, after["trial_id"][0]), tmp_path / "alone")
    assert alone.sha256 == after["distilled_sha256"][0]


def spec_of(driver: Driver, trial_id: str) -> TrialSpec:
    plan = expand(load_sweep(driver.file), lambda name: DATASETS[str(name)])
    return next(trial for trial in plan.trials if trial.trial_id == trial_id)


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
def test_drained_and_killed_while_a_seed_waits_the_same_command_goes_on(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """A drain does not wait for seeds that wait, and a killed driver forgets none of them."""
    driver = driver_in(tmp_path, environment)

    def ended() -> dict[str, int]:
        return {k: v for k, v in parts(driver).items() if k.startswith("trials/")}

    def waits() -> bool:
        return ": paused, step 15/45" in driver.log.read_text()

    try:
        driver.start()
        driver.until(waits, "a seed waits")
        driver.signal(signal.SIGINT)
        assert driver.wait() == 75, driver.log.read_text()
        assert not ended(), "drained, not stopped for good"
        driver.log.unlink()
        driver.start()
        driver.until(waits, "the first seed of the next setting waits")
        below = descendants(driver.process.pid) if driver.process else []
        driver.signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        until_ended(below, "ray::Distil", "ray::EvalShard")
        before = ended()
        assert driver.run() == 0, driver.log.read_text()
    finally:
        driver.kill_everything()
    assert {name: ended()[name] for name in before} == before, "done stays done, stopped stays stopped"
    found = rows(driver)
    assert found["status"].tolist() == ["stopped"] * 2 + ["done"] * 2
