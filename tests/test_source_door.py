"""Data of a user's own function from a sweep file to the tables: run only where that is asked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddsweep import load_results, run_trial
from ddsweep.errors import UserError
from ddsweep.results.layout import SweepDirectory

from .conftest import Run

DATA = """
import os
import numpy as np
import helper

def load(data_root, classes=3):
    with open(os.environ.get("RUNS", os.devnull), "a") as file:
        file.write("run\\n")
    def part(seed, count):
        images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        return images, np.arange(count) % classes
    return {"train": part(1, 10 * classes), "test": part(helper.TWO, 4 * classes)}
"""
SWEEP = """
name: mine
base:
  dataset: {file: my_data.py, name: load, classes: 2}
  network: convnet(depth=1,width=4)
  outer_steps: 2
  models_per_step: 1
  selection_networks: 1
evaluate: {networks: 1, shards: 1}
"""
TRIAL = {
    "network": "convnet(depth=1,width=4)",
    "outer_steps": 2,
    "models_per_step": 1,
    "selection_networks": 1,
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user works. ``runs`` holds a line for each call of the function."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_data.py").write_text(DATA)
    (tmp_path / "helper.py").write_text("TWO = 2\n")
    (tmp_path / "mine.yaml").write_text(SWEEP)
    return tmp_path


@pytest.fixture
def command(ddsweep: Run, home: Path) -> Run:
    """A command line where the user works; ``cache`` is another one than theirs."""

    def run(*words: str, cache: str = "cache") -> subprocess.CompletedProcess[str]:
        return ddsweep(*words, cwd=home, RUNS=str(home / "runs"), XDG_CACHE_HOME=str(home / cache))

    return run


def runs(home: Path) -> int:
    return (home / "runs").read_text().count("run") if (home / "runs").exists() else 0


def trial(home: Path, **more: Any) -> Any:
    data = {"file": "my_data.py", "name": "load", **more}
    return run_trial({**TRIAL, "dataset": data}, home / "results/one", evaluate={"networks": 1})


def in_another_process(home: Path, cache: str = "cache") -> subprocess.CompletedProcess[str]:
    """Data by the ``sweep.yaml`` of results and the copies beside it."""
    code = """
import sys
from pathlib import Path
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import load_splits
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import load_sweep
directory = SweepDirectory(Path(sys.argv[1]))
(value,) = load_sweep(directory.sweep_file).datasets()
spec = resolve_dataset(value, None, may_run=True, code=directory.code)
print(value, load_splits(spec, None, validation_fraction=0.1, split_seed=0).fingerprint)
"""
    words = [sys.executable, "-c", code, str(home / "results/one")]
    env = {"RUNS": str(home / "runs"), "XDG_CACHE_HOME": str(home / cache), "HOME": str(home)}
    return subprocess.run(words, capture_output=True, text=True, cwd=home.parent, env=env, check=False)


def test_plan_calls_the_function_once_and_says_so(home: Path, command: Run) -> None:
    said = command("plan", "mine.yaml")
    assert said.returncode == 0, said.stderr
    name = r"my_data\.py:load\(classes=2\)@[0-9a-f]{12}"
    assert re.fullmatch(rf"dataset {name}: run once, in a process of its own, .*\n", said.stderr)
    assert re.match(
        rf"data: {name}: images 1x8x8, 2 classes; train 20 \(0 10, 1 10\); test 8",
        said.stdout[said.stdout.index("data: ") :],
    )
    assert runs(home) == 1
    again = command("plan", "mine.yaml")
    assert (again.stdout, again.stderr, runs(home)) == (said.stdout, "", 1)


def test_from_the_function_to_whole_tables(home: Path, command: Run) -> None:
    done = trial(home, classes=2)
    assert runs(home) == 2
    results = load_results(home / "results/one")
    (row,) = results.trials.to_dict("records")
    assert re.fullmatch(r"my_data\.py:load\(classes=2\)@[0-9a-f]{12}", row["dataset"])
    assert (row["status"], row["dataset_shape"], row["dataset_stand_in"]) == ("done", "1x8x8", False)
    assert set(results.evals["source"]) >= {"distilled", "random_real", "kmeans", "knn_kmeans"}
    assert results.history["outer_step"].max() == 2
    directory = SweepDirectory(home / "results/one")
    digest = row["dataset"].rpartition("@")[2]
    assert sorted(path.name for path in (directory.code / digest).iterdir()) == ["helper.py", "my_data.py"]
    assert trial(home, classes=2).row["distilled_sha256"] == row["distilled_sha256"]
    trial(home)
    assert len(load_results(home / "results/one").trials) == 2
    # Readers run nothing, and need no file of the user's.
    (home / "my_data.py").unlink()
    before = runs(home)
    for words in (
        ("status", "results/one"),
        ("show", done.trial_id, "results/one"),
        ("best", "results/one"),
        ("prune", "results/one"),
        ("compare", "results/one", "results/one"),
    ):
        said = command(*words)
        assert said.returncode == 0, said.stderr
    said = command("status", "results/one")
    assert "only trials that left files" not in said.stdout
    assert runs(home) == before


@pytest.mark.slow
def test_another_process_runs_the_copy_beside_the_results(home: Path) -> None:
    done = trial(home, classes=2)
    for name in ("my_data.py", "helper.py"):
        (home / name).unlink()
    known = in_another_process(home)
    unknown = in_another_process(home, cache="another")
    assert known.returncode == unknown.returncode == 0, known.stderr + unknown.stderr
    assert known.stdout == unknown.stdout
    name, fingerprint = known.stdout.split()
    assert (name, fingerprint) == (done.row["dataset"], done.row["dataset_fingerprint"])
    copy = SweepDirectory(home / "results/one").code / name.rpartition("@")[2] / "helper.py"
    copy.write_text("TWO = 3\n")
    before = runs(home)
    said = in_another_process(home)
    assert said.returncode == 1 and "changed since my_data.py:load(classes=2)@" in said.stderr
    assert runs(home) == before


def test_status_elsewhere_says_what_is_not_known(home: Path, command: Run) -> None:
    trial(home, classes=2)
    before = runs(home)
    said = command("status", "results/one", cache="another")
    assert said.returncode == 0 and runs(home) == before
    assert "its images are not known here, and its code is not run for that" in " ".join(said.stdout.split())


def test_a_function_that_fails_leaves_no_results(home: Path, command: Run) -> None:
    (home / "helper.py").write_text("TWO = None / 2\n")
    said = command("run", "mine.yaml")
    assert said.returncode == 1 and "TypeError: unsupported operand" in said.stderr
    assert not (home / "results").exists()
    with pytest.raises(UserError, match="TypeError"):
        trial(home)
    assert not (home / "results").exists()


@pytest.mark.slow
def test_a_sweep_with_ray_and_more_networks_when_the_file_is_gone(home: Path, one_ray: Any) -> None:
    (home / "mine.yaml").write_text(SWEEP.replace("classes: 2}", "classes: 2, size: 16}"))
    done = one_ray("run", "mine.yaml", cwd=home)
    assert done.returncode == 0, done.stderr
    (home / "my_data.py").unlink()
    more = one_ray("eval", "results/mine", "evaluate.networks=2", cwd=home)
    assert more.returncode == 0, more.stderr
    results = load_results(home / "results/mine")
    assert results.trials["status"].tolist() == ["done"]
    assert results.trials["test_models"].tolist() == [2]
    assert results.trials["dataset"].str.endswith("(size=16)").all()


def test_doctor_and_data_list_run_nothing(home: Path, command: Run) -> None:
    told = "its images are not known here, and its code is not run for that"
    said = command("doctor", "mine.yaml")
    assert said.returncode == 1 and told in said.stdout.splitlines()[-1]
    said = command("data", "list", "mine.yaml")
    assert said.returncode == 0 and told in " ".join(said.stdout.split())
    assert runs(home) == 0
    command("plan", "mine.yaml")
    said = command("doctor", "mine.yaml")
    assert said.stdout.splitlines()[-1] == "ok   data: mine needs no files of data"
    said = command("data", "list", "mine.yaml")
    assert "1x8x8" in said.stdout and "present" in said.stdout
    assert runs(home) == 1
