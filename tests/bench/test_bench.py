"""The benchmarks run, agree with the engine, and report what they promise; not how fast anything is."""

from __future__ import annotations

import importlib
import json
import os
import queue
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial import distil_trial
from ddsweep.trial_plan import TrialSettings

ROOT = Path(__file__).resolve().parents[2]
Bench = Callable[..., str]
NOT_NEEDED = ("ray", "pydantic", "typer")
BOTH = {
    *("ratio", "ratio_min", "ratio_max", "networks", "device", "repeats", "seconds_per_network"),
    *(
        "baseline_seconds_per_network",
        "threads",
        "baseline_threads",
        "torch",
        "dataset",
        "real_data",
        "gflops",
    ),
}


def in_own_process(tmp_path: Path, script: str, *options: str) -> dict[str, Any]:
    """The report of a benchmark without data, where ray and the like announce themselves and cannot be
    imported."""
    for name in NOT_NEEDED:
        text = f"import sys\nprint('imported {name}', file=sys.stderr)\nraise ImportError('{name}')\n"
        (tmp_path / f"{name}.py").write_text(text)
    environment = {key: value for key, value in os.environ.items() if key != "DDSWEEP_DATA"}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, str(Path("bench", script)), "--device", "cpu", *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert "imported" not in done.stderr
    return report(done.returncode, done.stdout, done.stderr)


def report(code: int, said: str, complained: str = "") -> dict[str, Any]:
    assert code == 0, said + complained
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    """``bench(script, *options)``: what a benchmark prints without data, in this process."""

    def run(script: str, *options: str) -> str:
        path = ROOT / "bench" / script
        monkeypatch.setattr(sys, "argv", [str(path), "--device", "cpu", *options, "--json"])
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.delenv("DDSWEEP_DATA", raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


def check_ratio(found: dict[str, Any], name: str) -> None:
    assert 0 < found[f"{name}_min"] <= found[name] <= found[f"{name}_max"]


def test_meta_step(tmp_path: Path) -> None:
    found = in_own_process(tmp_path, "meta_step.py", "--quick")
    assert set(found) >= BOTH | {"modes", "memory_mode"}
    check_ratio(found, "ratio")
    assert set(found["modes"]) == {"store", "recompute"}
    assert found["difference_float64"] < 1e-8
    assert (found["device"], found["dataset"], found["real_data"]) == ("cpu", "mnist", False)
    assert (found["networks"], found["repeats"]) == (2, 1)


@pytest.mark.slow
def test_pages(tmp_path: Path) -> None:
    found = in_own_process(tmp_path, "pages.py", "--quick")
    check_ratio(found, "ratio")
    assert found["seconds_small"] > 0 and found["seconds_huge"] > 0


@pytest.mark.slow
def test_sweep() -> None:
    """Cohorts and single trials end with equal bits, or it says so and ends with 1."""
    command = [sys.executable, "bench/sweep.py", "--quick", "digits_fixed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    _, row, last = done.stdout.splitlines()
    found = json.loads(row)
    assert (found["case"], found["trials"], found["cohort"], last) == ("digits_fixed", 4, 2, "equal bits")


@pytest.mark.parametrize("cohort", [1, "auto"])
def test_sweep_of_a_search(cohort: int | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of its processes, here: every trial of the queue ends, or is stopped at the first outer step."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    sweep = importlib.import_module("sweep")
    asked = (2, 4, cohort, "cpu")
    spec, trials = sweep.searched(*asked)
    shared, out = sweep.Shared(1, *asked), queue.Queue[tuple[float, int]]()
    size = max(one.size for one in sweep.dealt_out(trials, spec.resources, 1))
    assert size == (1 if cohort == 1 else 2)
    given = {"device": "cpu", "gpus": 0.0, "cohort": size}
    values, rungs = [trial.to_dict() for trial in trials], [spec.scheduler.rungs(trial) for trial in trials]
    sweep.search(values, rungs, str(tmp_path), shared, given, threading.Barrier(1), out)
    seconds, failed = out.get_nowait()
    distilled = len(list(tmp_path.glob("artifacts/*/distilled.safetensors")))
    assert seconds > 0 and failed == 0 and shared.place() is None
    assert distilled >= 2 and shared.taken() == 4 + distilled, "the first of each shape goes on"


def test_evaluate(bench: Bench) -> None:
    found = report(0, bench("evaluate.py", "--quick"))
    assert set(found) >= BOTH | {"ratio_best_batch", "best_batch"}
    check_ratio(found, "ratio")
    check_ratio(found, "ratio_best_batch")
    assert found["accuracy_difference"] < 0.01
    assert found["repeats"] == 2, "one for each group of two networks"
    assert found["networks"] == 4


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    found = in_own_process(tmp_path, "memory.py", "--quick", "--epochs", "40")
    by_kind = {(row["memory_mode"], row["segment"]): row["bytes"] for row in found["rows"]}
    assert set(by_kind) == {("store", 1), ("recompute", 1), ("recompute", 10), ("recompute", 30)}
    assert 0 < by_kind["recompute", 10] < by_kind["store", 1]


@pytest.mark.slow
def test_packing(tmp_path: Path) -> None:
    found = in_own_process(tmp_path, "packing.py", "--quick", "--packed", "1", "2", "--together", "1", "2")
    assert [(row["count"], row["together"]) for row in found["rows"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in found["rows"]:
        assert row["trials_per_hour"] == pytest.approx(row["steps_per_second"] * 3.6)
        assert row["steps_per_second"] > 0


def test_precision(bench: Bench) -> None:
    options = ("--network", "convnet(depth=1,width=4)", "--dataset", "digits")
    rows = report(0, bench("precision.py", "--quick", *options))["rows"]
    apart = {row["what"]: row["relative"] for row in rows}
    assert max(apart["float32"], apart["float32, autograd"]) < 1e-4 < apart["products of TF32"]
    assert apart["products of TF32"] < apart["products of bfloat16"] < 0.5


def test_options(bench: Bench) -> None:
    options = ("--network", "convnet(depth=2,width=4)", "--dataset", "usps", "--dtype", "float64")
    said = bench("meta_step.py", "--quick", "--memory-mode", "recompute", "--networks", "3", *options)
    found = report(0, said)
    assert found["network"] == "convnet(depth=2,width=4,norm=instance)"
    assert (found["memory_mode"], found["dtype"], found["networks"]) == ("recompute", "float64", 3)
    assert "RANDOM images" in said


REFUSED = {
    "a size that the network cannot take": (
        "evaluate.py --device cpu --quick --network lenet --dataset usps",
        "error: network: lenet takes images of 28 or 32 pixels",
    ),
    "a file that is not there": ("noise.py --device cpu none.safetensors", "none.safetensors"),
    "a number of trials that is no sweep": (
        "driver.py --trials 15",
        "error: --trials: 15 is not a multiple of ten",
    ),
}


@pytest.mark.parametrize(("line", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_message(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: `sys.exit` prints a text and ends with 1."""
    script, *options = line.split()
    path = ROOT / "bench" / script
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    code, said = ended.value.code, capsys.readouterr().err
    assert message in (code if isinstance(code, str) else said) and code


def test_noise(tmp_path: Path, bench: Bench) -> None:
    """The bands of frequency add up to the whole, because the transform is orthonormal."""
    spec = TrialSpec(DATASETS["digits"], network="convnet(width=4)", outer_steps=1, real_batch=20)
    splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    directory = SweepDirectory(tmp_path / "results")
    assert distil_trial(spec, splits, directory, TrialSettings())
    path = str(directory.distilled(spec.trial_id))
    found = report(0, bench("noise.py", path, "--networks", "32", "--real-batch", "8"))
    rates, images, *bands = found["rows"]
    assert (rates["values"], images["values"], found["networks"]) == (1, 10 * 64, 32)
    assert sum(band["values"] for band in bands) == images["values"]
    for key in ("common", "noise"):
        assert sum(band[key] for band in bands) == pytest.approx(images[key], rel=1e-4)
    assert images["noise"] > 0


def test_noise_is_that_of_random_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = TrialSpec(
        DATASETS["digits"], network="convnet(width=4)", init="fixed", outer_steps=1, real_batch=20
    )
    splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    directory = SweepDirectory(tmp_path / "results")
    assert distil_trial(spec, splits, directory, TrialSettings())
    line = f"noise.py --device cpu {directory.distilled(spec.trial_id)}"
    test_what_cannot_be_is_one_message(line, "made for random networks", monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("options", [("--seconds", "0.5"), ("--steps", "20")], ids=" ".join)
def test_nodes(options: tuple[str, ...]) -> None:
    command = [sys.executable, "bench/nodes.py", "--slots", "2", "--trials", "4", "--reports", "2", *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    found = report(result.returncode, result.stdout, result.stderr)
    assert (found["nodes"], found["slots"], found["trials"]) == (1, 2, 4)
    assert 0 < found["efficiency"] == pytest.approx(found["ideal_s"] / found["wall_s"], abs=0.02)
    if "--seconds" in options:
        assert found["ideal_s"] == 1.0 < found["wall_s"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_driver(tmp_path: Path) -> None:
    command = [sys.executable, "bench/driver.py", "--trials", "20", "--in-ray", "10", "--json"]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "DDSWEEP_"))
    }
    result = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=1100,
        check=False,
    )
    rows = report(result.returncode, result.stdout, result.stderr)["rows"]
    found = {(row["trials"], row["stage"], row.get("state")): row for row in rows}
    assert [found[20, "resume", state]["done"] for state in ("nothing", "half", "all")] == [0, 10, 20]
    assert found[20, "expand", "half"]["done"] == 10
    for stage in ("load", "load again"):
        assert found[20, stage, "all"]["rows"] == {"trials": 20, "evals": 20 * 145}
    folders = found[20, "files", None]["by_folder"]
    assert [folders[name]["files"] for name in ("trials", "evals", "history", "artifacts")] == [
        20,
        20,
        20,
        60,
    ]
    timed = {stage for _, stage, _ in found} - {"files"}
    assert timed >= {"write", "plan", "status", "collect", "summary", "board", "finish", "tune", "reports"}
    assert all(row["seconds"] > 0 for row in rows if row["stage"] in timed)
    assert found[10, "tune", "nothing"]["cpu_per_trial"] > 0
    assert found[10, "reports", "nothing"]["reports"] == 10 * 400
