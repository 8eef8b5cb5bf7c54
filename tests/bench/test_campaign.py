"""A campaign goes on period after period, killed or not, and ends with the sets that each trial has alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import campaign
import campaign_jobs
import campaign_tasks
import numpy as np
import pieces
import pytest
from PIL import Image

from ddsweep.catalog import TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.errors import TooLargeError
from ddsweep.evaluation import trial_is_done
from ddsweep.pools.file import load_pool
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.results.reader import load_results
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings
from tests.conftest import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """\
name: tiny
base:
  dataset: digits
  network: convnet(width=4)
  outer_steps: {steps}
  models_per_step: 1
  real_batch: 32
  selection_networks: 2
  images_per_class: 1
  inner_steps: 1
grid:
  init: [fixed, random]
seeds: 2
evaluate:
  networks: 4
  group_size: 2
  baselines: [random_real]
  rates: [0.1]
  epochs: [1]
resources:
  checkpoint_every: 5
"""
POOL = """\
name: small
dataset: digits
network: convnet(width=4)
train: 4
heldout: 4
epochs: 1
batch: 64
lr: 1e-2
decay_epochs: 1
group_size: 4
"""


def start(
    folder: Path, blocked: Path, *options: str, script: str = "bench/campaign.py", **variables: str
) -> subprocess.Popen[str]:
    """A period as a process of its own group, where ray and pydantic cannot be imported."""
    for name in ("ray", "pydantic", "typer"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name}')\n")
    environment = {**os.environ, "PYTHONPATH": str(blocked), **variables}
    command = [sys.executable, script, "run", str(folder), "--seconds", "600", "--device", "cpu", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


def planned(tmp_path: Path, steps: int, *settings: str) -> tuple[Path, object]:
    folder, file = tmp_path / "campaign", tmp_path / "tiny.yaml"
    file.write_text(SWEEP.format(steps=steps))
    return folder, campaign_jobs.plan(folder, file, settings, None)


def of_period(folder: Path, job: object, seconds: float = 0.0, side_by_side: int = 1) -> object:
    place = campaign_tasks.Place(folder, (job,), None, "cpu", side_by_side, 1, time.time() + seconds)
    place.directory(job).create()
    return place


def workers_of(driver: int) -> list[int]:
    children = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
    return [
        int(pid) for pid in children if b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.slow
def test_killed_stopped_and_gone_on_with(tmp_path: Path) -> None:
    """Two cohorts of two trials: the period is killed, then a worker of one, and then it is stopped."""
    folder, job = planned(tmp_path, 200)
    directory = SweepDirectory(folder / "tiny")
    first, second = (directory.checkpoint(trial.trial_id) for trial in job.trials[:2])

    killed = start(folder, tmp_path)
    wait_until(lambda: first.exists() and second.exists(), killed)
    (orphan,) = workers_of(killed.pid)
    killed.kill()
    killed.communicate()
    wait_until(lambda: not Path(f"/proc/{orphan}").exists())
    assert not directory.distilled(job.trials[0].trial_id).exists()

    bereft = start(folder, tmp_path)
    wait_until(changed(first), bereft)
    (worker,) = workers_of(bereft.pid)
    os.kill(worker, signal.SIGKILL)
    wait_until(directory.checkpoint(job.trials[2].trial_id).exists, bereft)
    assert json.loads((folder / "deaths.json").read_text()) == {trial.trial_id: 1 for trial in job.trials[:2]}
    os.killpg(bereft.pid, signal.SIGTERM)
    said, _ = bereft.communicate()
    assert bereft.returncode == 75, said
    assert f"{job.trials[0].trial_id} and 1 more: its process was killed; next: together" in said
    assert f"{job.trials[2].trial_id} and 1 more: to be gone on with after" in said

    last = start(folder, tmp_path, "--side-by-side", "2")
    said, _ = last.communicate()
    assert last.returncode == 0, said
    check_whole(job, directory, tmp_path)
    for trial in job.trials:
        assert read_distilled(trial, directory).provenance["cohort_size"] == 2
        assert read_distilled(trial, directory).provenance["n_resumed"] >= 1


KILLER = """
import os, signal, sys
from ddsweep.trial.running import RunningTrial
begin = RunningTrial.begin
def dies(job, should_stop):
    if job.spec.trial_id == os.environ["KILLER"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return begin(job, should_stop)
RunningTrial.begin = dies
sys.path.append("bench")
from campaign import main
if __name__ == "__main__":
    while (code := main()) == 75:
        print("period", flush=True)
    sys.exit(code)
"""


@pytest.mark.slow
def test_a_trial_that_kills_its_process_leaves_the_others_alone(tmp_path: Path) -> None:
    """Twice with its companions, then by itself, until it has failed."""
    folder, job = planned(tmp_path, 10, "grid.init=[fixed]", "seeds=3")
    directory, killer = SweepDirectory(folder / "tiny"), job.trials[1]
    (tmp_path / "killer.py").write_text(KILLER)
    run = start(folder, tmp_path, script=str(tmp_path / "killer.py"), KILLER=killer.trial_id)
    said, _ = run.communicate()
    assert run.returncode == 0, said
    assert said.count("\nperiod\n") == 3
    assert said.count(" and 2 more: its process was killed") == 2
    assert said.count(f"{killer.trial_id}: its process was killed; next: ") == 2
    lines = campaign.status(folder)
    assert [line.partition(": ")[2] for line in lines] == ["done", "failed", "done"]
    (row,) = read_part(directory.failure_part(killer.trial_id)).to_pylist()
    assert (row["attempts"], row["message"]) == (4, "tried 4 times: its process was killed")
    others = [trial for trial in job.trials if trial != killer]
    check_as_alone(others, job.settings[0], directory, tmp_path)


def changed(file: Path) -> Callable[[], bool]:
    before = file.stat().st_mtime_ns
    return lambda: file.stat().st_mtime_ns > before


def wait_until(seen: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not seen():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_whole(job: object, directory: SweepDirectory, tmp_path: Path) -> None:
    assert set(load_results(directory.root).trials["status"]) == {"done"}
    assert all(trial_is_done(trial, job.evaluation, directory) for trial in job.trials)
    check_as_alone(job.trials, job.settings[0], directory, tmp_path)


def check_as_alone(
    trials: Sequence[TrialSpec], settings: TrialSettings, directory: SweepDirectory, tmp_path: Path
) -> None:
    alone = SweepDirectory(tmp_path / "alone")
    alone.create()
    for trial in trials:
        splits = load_splits(
            trial.dataset, None, validation_fraction=trial.validation_fraction, split_seed=trial.split_seed
        )
        assert distil_trial(trial, splits, alone, TrialSettings(checkpoint_every=settings.checkpoint_every))
        assert read_distilled(trial, directory).sha256 == read_distilled(trial, alone).sha256


def period(folder: Path, job: object, seconds: float) -> list[str]:
    """What came of each task of one period whose worker is this process."""
    place = of_period(folder, job, seconds)
    PoolDirectory(folder / "pools" / "small").create()
    said = []
    while (tasks := campaign_tasks.missing(place)) and (not said or not place.is_over()):
        said.append(campaign_tasks.work(place, tasks[0]).partition(" after")[0])
    return said


def test_a_pool_comes_first_and_what_was_asked_is_read_back(tmp_path: Path) -> None:
    folder, file = tmp_path / "campaign", tmp_path / "sweeps" / "adapt.yaml"
    (file.parent / "pools").mkdir(parents=True)
    (file.parent / "pools" / "small.yaml").write_text(POOL)
    sweep = SWEEP.format(steps=4).replace("  init: [fixed, random]\nseeds: 2", "  init: [pretrained]")
    text = sweep.replace("base:\n", "base:\n  pool: small\n").replace(
        "evaluate:\n", "evaluate:\n  protocols: [as_distilled, {inner_lr: 0.1}]\n"
    )
    file.write_text(text)
    job = campaign_jobs.plan(folder, file, (), None)
    assert campaign_jobs.read_jobs(folder) == [job], "what JSON gives back is what was planned"
    assert campaign_jobs.plan(folder, file, (), None) == job
    assert len(list((folder / "jobs").iterdir())) == 1, "planned again, at its place"

    directory = SweepDirectory(folder / job.name)
    assert period(folder, job, 0.0) == ["not begun"]
    groups = job.evaluation.networks // job.evaluation.group_size
    whole = ["trained"] * 2 + ["distilled"] + ["evaluated"] * 2 * groups
    assert period(folder, job, 250.0) == whole
    rows = load_results(directory.root).evals
    assert set(rows[rows["source"] == "distilled"]["protocol"]) == {"as_distilled", "inner_lr=0.1"}
    assert campaign.status(folder) == [f"tiny {job.trials[0].trial_id}: done"]


def test_a_pool_of_images_in_a_folder(tmp_path: Path) -> None:
    """Files are looked at when they are planned; what was found there is no part of the recipe."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 4)):
        for label in range(2):
            place = tmp_path / "mine" / part / str(label)
            place.mkdir(parents=True)
            for k in range(count):
                image = Image.fromarray(draw.integers(0, 256, (8, 8), np.uint8))
                image.save(place / f"{k}.png")
    mine = "dataset: {source: folder, path: mine, train: train, test: test}"
    file = tmp_path / "sweeps" / "adapt.yaml"
    (file.parent / "pools").mkdir(parents=True)
    (file.parent / "pools" / "small.yaml").write_text(POOL.replace("dataset: digits", mine))
    sweep = SWEEP.format(steps=4).replace("  init: [fixed, random]\nseeds: 2", "  init: [pretrained]")
    file.write_text(sweep.replace("base:\n", "base:\n  pool: small\n").replace("dataset: digits", mine))
    job = campaign_jobs.plan(tmp_path / "campaign", file, (), tmp_path)
    assert job.pool is not None and job.pool[1].dataset.survey is not None
    (read,) = campaign_jobs.read_jobs(tmp_path / "campaign")
    assert read == job

    place = of_period(tmp_path / "campaign", read, 250.0)
    place = replace(place, data_root=tmp_path)
    (first, *_) = campaign_tasks.missing(place)
    assert campaign_tasks.work(place, first).partition(" after")[0] == "trained"


@pytest.mark.parametrize(
    ("settings", "side_by_side", "together"),
    [
        ((), 1, [3, 3]),
        ((), 3, [2, 1, 2, 1]),  # three workers have something to do
        (("resources.cohort=2",), 1, [2, 1, 2, 1]),
        (("resources.cohort=1",), 1, [1] * 6),
        (("resources.compile=on",), 1, [1] * 6),  # a compiled trial is always alone
    ],
)
def test_trials_of_one_shape_are_one_task(
    tmp_path: Path, settings: Sequence[str], side_by_side: int, together: list[int]
) -> None:
    folder, job = planned(tmp_path, 4, "seeds=3", *settings)
    place = of_period(folder, job, side_by_side=side_by_side)
    tasks = campaign_tasks.missing(place)
    assert [len(task.trials) for task in tasks] == together
    assert [trial for task in tasks for trial in task.trials] == list(job.trials)
    assert [task.cohort for task in tasks] == together


def test_what_fails_or_is_distilled_is_no_companion_any_more(tmp_path: Path) -> None:
    """Those that are left are one task as before, and the sets have the bits that they have alone."""
    settings = ("grid={init: [fixed]}", "points=[{}, {inner_lr: 1e30, on_nonfinite: stop}, {outer_steps: 8}]")
    folder, job = planned(tmp_path, 4, *settings, "seeds=1", "evaluate.networks=2", "evaluate.baselines=none")
    assert len(job.trials) == 3
    place, directory = of_period(folder, job, 250.0), SweepDirectory(folder / "tiny")
    (task,) = campaign_tasks.missing(place)
    assert campaign_tasks.work(place, task).partition(" after")[0] == "1 failed, 2 distilled"
    first, broken, longer = job.trials
    assert directory.failure_part(broken.trial_id).exists()
    check_as_alone([first, longer], job.settings[0], directory, tmp_path)
    left = campaign_tasks.missing(place)
    assert {task.trials for task in left} == {(first,), (longer,)} and all(task.unit for task in left)
    directory.distilled(longer.trial_id).unlink()
    directory.failure_part(broken.trial_id).unlink()
    again = campaign_tasks.missing(place)[-1]
    assert (again.trials, again.cohort) == ((broken, longer), 3)


def test_an_evaluation_that_does_not_fit_is_a_failure_of_its_trial_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on, in this period and the next."""
    folder, job = planned(tmp_path, 4, "grid={init: [fixed]}", "seeds=2", "evaluate.baselines=none")
    place, directory = of_period(folder, job, 250.0), SweepDirectory(folder / "tiny")
    (task,) = campaign_tasks.missing(place)
    campaign_tasks.work(place, task)
    large, other = job.trials
    real, compiled = campaign_tasks.evaluate_unit, set()

    def evaluate_unit(trial: TrialSpec, *rest: object, compile: str) -> Path:
        compiled.add(compile)
        if trial == large:
            raise TooLargeError("it does not fit")
        return real(trial, *rest, compile=compile)

    monkeypatch.setattr(campaign_tasks, "evaluate_unit", evaluate_unit)
    said = [campaign_tasks.work(place, task) for task in campaign_tasks.missing(place)]
    assert "failed: it does not fit" in said and any(text.startswith("evaluated") for text in said)
    assert {trial for task in campaign_tasks.missing(place) for trial in task.trials} <= {other}
    assert compiled == {job.settings[0].compile}
    (row,) = read_part(directory.failure_part(large.trial_id)).to_pylist()
    assert (row["error_class"], row["place"]) == ("TooLargeError", "evaluation")


def test_several_files_and_settings_of_their_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, sweeps = tmp_path / "campaign", ROOT / "sweeps"
    digits = "digits(channels=3,size=32)"
    settings = [f"dataset={digits}", f"pool.dataset={digits}", "pool.train=8", "outer_augment=none"]
    files = [str(sweeps / f"{name}.yaml") for name in ("cifar10_random", "attack_cifar10")]
    assert campaign.main(["plan", str(folder), *files, *settings]) == 0
    assert capsys.readouterr().out == "cifar10_random: 1 trial\nattack_cifar10: 1 trial\n"
    random, attack = campaign_jobs.read_jobs(folder)
    name, recipe = attack.pool
    assert (name, recipe.train, recipe.dataset.name) == ("cifar10_alexcifarnet", 8, digits)
    (pool,) = {trial.pool for trial in attack.trials}
    assert pool == recipe.spec(name), "its trials are those of this pool"
    own = load_pool(PoolDirectory(folder / "pools" / name).pool_file)
    assert (own.train, own.heldout) == (8, 200), "the file from which `keep.py` and `verify.py` know the pool"
    assert random.pool is None and random.trials[0].dataset.name == digits


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*given: str) -> str:
        assert campaign.main(list(given)) == 1
        return capsys.readouterr().err

    folder, _ = planned(tmp_path, 4)
    assert "no campaign: `plan` it first" in fails("run", str(tmp_path / "none"), "--seconds", "1")
    assert "--only: other: the campaign has tiny" in fails(
        "run", str(folder), "--seconds", "1", "--only", "other"
    )
    file = str(tmp_path / "tiny.yaml")
    assert "give a sweep file at least" in fails("plan", str(folder), "outer_steps=3")
    assert "pool.train=3: none of these sweeps has a pool" in fails("plan", str(folder), file, "pool.train=3")
    path = folder / "jobs" / "001-tiny.json"
    older = {name: value for name, value in json.loads(path.read_text()).items() if name != "cohort"}
    for text, told in ((json.dumps(older), "it has no 'cohort'"), ("[", "Expecting value")):
        path.write_text(text)
        said = fails("status", str(folder))
        assert f"{path}: no job that this version has planned ({told}" in said and "`plan` it again" in said


def test_a_folder_in_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, back = tmp_path / "source", tmp_path / "out", tmp_path / "back"
    (source / "deep").mkdir(parents=True)
    (source / "pools").mkdir()
    large = os.urandom(5 * pieces.MIB // 2)
    (source / "deep" / "large").write_bytes(large)
    (source / "pools" / "left").write_bytes(b"x")

    def run(*given: object) -> int:
        return int(pieces.main([str(item) for item in given]))

    assert run("pack", source, out, "--mib", 1, "--leave-out", "pools") == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["piece-000", "piece-001", "piece-002", "pieces.json"]
    assert all(path.stat().st_size <= pieces.MIB for path in out.glob("piece-*"))
    assert run("pack", source, out) == 1, "nothing is written over"
    assert run("unpack", out, back) == 0
    assert [path for path in back.rglob("*") if path.is_file()] == [back / "deep" / "large"]
    assert (back / "deep" / "large").read_bytes() == large

    capsys.readouterr()
    piece = out / "piece-001"
    piece.write_bytes(b"!" + piece.read_bytes()[1:])
    assert run("unpack", out, tmp_path / "damaged") == 1
    assert f"{piece}: damaged" in capsys.readouterr().err
    piece.unlink()
    assert run("unpack", out, tmp_path / "damaged") == 1
    assert "1 of 3 pieces are missing: piece-001" in capsys.readouterr().err
    assert not (tmp_path / "damaged").exists()
