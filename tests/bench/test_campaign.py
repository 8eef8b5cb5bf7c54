"""A campaign goes on period after period, killed or not, and ends with the sets of an undisturbed trial."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ddsweep.data.load import load_splits
from ddsweep.evaluation import trial_is_done
from ddsweep.pools.file import load_pool
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.results.reader import load_results
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings

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


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


campaign, pieces = script("campaign"), script("pieces")


def start(folder: Path, blocked: Path, *options: str) -> subprocess.Popen[str]:
    """A period as a process of its own group, where ray and pydantic cannot be imported."""
    for name in ("ray", "pydantic", "typer"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name}')\n")
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    command = [sys.executable, "bench/campaign.py", "run", str(folder), "--device", "cpu", *options]
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


def planned(tmp_path: Path, steps: int) -> tuple[Path, object]:
    folder, file = tmp_path / "campaign", tmp_path / "tiny.yaml"
    file.write_text(SWEEP.format(steps=steps))
    return folder, campaign.plan(folder, file, (), None)


@pytest.mark.slow
def test_killed_stopped_and_gone_on_with(tmp_path: Path) -> None:
    folder, job = planned(tmp_path, 400)
    directory = SweepDirectory(folder / "tiny")
    first = job.trials[0]

    killed = start(folder, tmp_path, "--seconds", "600")
    checkpoint = directory.checkpoint(first.trial_id)
    wait_until(checkpoint.exists, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not directory.distilled(first.trial_id).exists()

    stopped = start(folder, tmp_path, "--seconds", "600")
    before = checkpoint.stat().st_mtime_ns
    wait_until(lambda: checkpoint.stat().st_mtime_ns > before, stopped)
    os.killpg(stopped.pid, signal.SIGTERM)
    said, _ = stopped.communicate()
    assert stopped.returncode == 75, said

    last = start(folder, tmp_path, "--seconds", "600", "--side-by-side", "2")
    said, _ = last.communicate()
    assert last.returncode == 0, said
    check_whole(job, directory, tmp_path)


def wait_until(seen: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not seen():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def check_whole(job: object, directory: SweepDirectory, tmp_path: Path) -> None:
    assert set(load_results(directory.root).trials["status"]) == {"done"}
    for trial, settings in zip(job.trials, job.settings, strict=True):
        assert trial_is_done(trial, job.evaluation, directory)
        alone = SweepDirectory(tmp_path / "alone")
        alone.create()
        splits = load_splits(
            trial.dataset, None, validation_fraction=trial.validation_fraction, split_seed=trial.split_seed
        )
        assert distil_trial(trial, splits, alone, TrialSettings(checkpoint_every=settings.checkpoint_every))
        assert read_distilled(trial, directory).sha256 == read_distilled(trial, alone).sha256


def period(folder: Path, job: object, seconds: float) -> list[str]:
    """What came of each task of one period whose worker is this process."""
    place = campaign.Place(folder, (job,), None, "cpu", 0.0, 1, time.time() + seconds)
    place.directory(job).create()
    PoolDirectory(folder / "pools" / "small").create()
    said = []
    while (tasks := campaign.missing(place)) and (not said or not place.is_over()):
        said.append(campaign.work(place, tasks[0]).partition(" after")[0])
    return said


def test_a_pool_comes_first_and_what_was_asked_is_read_back(tmp_path: Path) -> None:
    folder, file = tmp_path / "campaign", tmp_path / "sweeps" / "adapt.yaml"
    (file.parent / "pools").mkdir(parents=True)
    (file.parent / "pools" / "small.yaml").write_text(POOL)
    sweep = SWEEP.format(steps=4).replace("  init: [fixed, random]", "  init: [pretrained]")
    text = sweep.replace("base:\n", "base:\n  pool: small\n").replace(
        "evaluate:\n", "evaluate:\n  protocols: [as_distilled, {inner_lr: 0.1}]\n"
    )
    file.write_text(text)
    job = campaign.plan(folder, file, (), None)
    assert campaign.read_jobs(folder) == [job], "what JSON gives back is what was planned"
    assert campaign.plan(folder, file, (), None) == job
    assert len(list((folder / "jobs").iterdir())) == 1, "planned again, at its place"

    directory = SweepDirectory(folder / job.name)
    assert period(folder, job, 0.0) == ["not begun"]
    groups = job.evaluation.networks // job.evaluation.group_size
    whole = ["trained"] * 2 + ["distilled"] + ["evaluated"] * 2 * groups
    assert period(folder, job, 250.0) == whole
    rows = load_results(directory.root).evals
    assert set(rows[rows["source"] == "distilled"]["protocol"]) == {"as_distilled", "inner_lr=0.1"}
    assert campaign.status(folder) == [f"tiny {job.trials[0].trial_id}: done"]


def test_several_files_and_settings_of_their_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, sweeps = tmp_path / "campaign", ROOT / "sweeps"
    digits = "digits(channels=3,size=32)"
    settings = [f"dataset={digits}", f"pool.dataset={digits}", "pool.train=8", "outer_augment=none"]
    files = [str(sweeps / f"{name}.yaml") for name in ("cifar10_random", "attack_cifar10")]
    assert campaign.main(["plan", str(folder), *files, *settings]) == 0
    assert capsys.readouterr().out == "cifar10_random: 1 trial\nattack_cifar10: 1 trial\n"
    random, attack = campaign.read_jobs(folder)
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
    (folder / "jobs" / "001-tiny.json").write_text("{}")
    assert "001-tiny.json: no job of a campaign" in fails("status", str(folder))


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
