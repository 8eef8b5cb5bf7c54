"""A trial that runs out of memory continues with a leaner plan, and says so; one that cannot says what it
needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ddsweep.core.evaluate
import ddsweep.core.methods.bptt
import ddsweep.trial.running
from ddsweep.catalog import DATASETS, EvaluationSpec, TrialSpec
from ddsweep.core import graphs
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.memory import end_without_gpu, fitted
from ddsweep.core.methods import distribution_matching
from ddsweep.data.load import Splits
from ddsweep.errors import TooLargeError
from ddsweep.evaluation import evaluate_unit, finish
from ddsweep.results.artifacts import load_tensors, save_tensors
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.results.schemas import TRIALS
from ddsweep.trial import distil_trial, read_distilled, record_failure
from ddsweep.trial_plan import TrialSettings

SPEC = TrialSpec(
    dataset=DATASETS["digits"],
    **{"network": "convnet(depth=1,width=8,norm=none)", "images_per_class": 2, "inner_steps": 2},
    **{"inner_epochs": 3, "inner_lr": 0.1, "outer_steps": 8, "models_per_step": 3, "real_batch": 64},
    **{"selection_networks": 2, "validate_every": 4, "dtype": "float64"},
)
SETTINGS = TrialSettings(checkpoint_every=100, log_every=1)
NOT_MATCHED = {"inner_epochs": 1, "inner_steps": 1}
EVALUATION = EvaluationSpec(networks=4, group_size=4, baselines=())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> SweepDirectory:
    directory = SweepDirectory(tmp_path_factory.mktemp("undisturbed"))
    assert distil_trial(SPEC, splits, directory, SETTINGS)
    return directory


def run_out(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[int, ExecutionPlan], bool], error: Exception
) -> list[ExecutionPlan]:
    """From now on ``error`` is raised inside outer step s (from 0), after its real work, if
    ``when(s, plan)``. Returns the plans of all steps that are tried, as they come."""
    real, tried = ddsweep.core.methods.bptt.outer_gradient, []
    done = [0]

    def outer_gradient(*arguments: Any, **more: Any) -> Any:
        plan = arguments[5]
        tried.append(plan)
        found = real(*arguments, **more)
        if when(done[0], plan):
            raise error
        done[0] += 1
        return found

    monkeypatch.setattr(ddsweep.core.methods.bptt, "outer_gradient", outer_gradient)
    return tried


def checkpoint_of(directory: SweepDirectory) -> dict[str, Any]:
    return load_tensors(directory.checkpoint(SPEC.trial_id))[1]


def assert_same_set(found: SweepDirectory, expected: SweepDirectory, tolerance: float) -> None:
    ours, theirs = (read_distilled(SPEC, directory) for directory in (found, expected))
    assert (ours.images - theirs.images).abs().max() <= tolerance * theirs.images.abs().max()
    assert (ours.rates - theirs.rates).abs().max() <= tolerance * theirs.rates.abs().max()


ERRORS = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_step_that_ran_out_of_memory_is_taken_again_and_nothing_else_changes(
    error, monkeypatch, tmp_path, splits, undisturbed
) -> None:
    directory = SweepDirectory(tmp_path)
    tried = run_out(monkeypatch, lambda step, plan: step >= 3 and plan.memory_mode == "store", error)
    assert distil_trial(SPEC, splits, directory, SETTINGS)
    assert [plan.memory_mode for plan in tried] == ["store"] * 4 + ["recompute"] * 5
    assert_same_set(directory, undisturbed, 1e-9)
    steps = [row["outer_step"] for row in read_part(directory.history_part(SPEC.trial_id)).to_pylist()]
    assert steps == list(range(1, 9)), "no step is logged twice or left out"


def test_the_plan_a_trial_ended_with_is_in_its_row(monkeypatch, tmp_path, splits, undisturbed) -> None:
    directory = SweepDirectory(tmp_path)
    out = torch.OutOfMemoryError("CUDA out of memory")
    run_out(monkeypatch, lambda step, plan: plan.real_chunk > 8 or plan.memory_mode == "store", out)
    assert distil_trial(SPEC, splits, directory, SETTINGS)
    for found, replans, mode, chunk in ((directory, 3, "recompute", 8), (undisturbed, 0, "store", 32)):
        for unit in EVALUATION.units(SPEC):
            evaluate_unit(SPEC, unit, EVALUATION, splits, found, torch.device("cpu"))
        assert finish(SPEC, EVALUATION, found, "a sweep")
        (row,) = read_part(found.trials_part(SPEC.trial_id)).to_pylist()
        plan = ExecutionPlan.from_dict(json.loads(row["execution_plan"]))
        assert (row["n_replans"], row["memory_mode"], plan.memory_mode) == (replans, mode, mode)
        assert (plan.real_chunk, plan.device) == (chunk, "cpu")
    assert {"n_replans", "execution_plan"} <= set(TRIALS.names)
    assert_same_set(directory, undisturbed, 1e-9)


def test_a_new_plan_is_checkpointed_at_once_and_taken_up_again(
    monkeypatch, tmp_path, splits, undisturbed
) -> None:
    """The trial is stopped right after the step that ran out of memory. It goes on with the same plan, and
    ends with the same bits."""
    directory, other = SweepDirectory(tmp_path / "stopped"), SweepDirectory(tmp_path / "whole")
    out = torch.OutOfMemoryError("CUDA out of memory")

    def when(step: int, plan: ExecutionPlan) -> bool:
        return step == 3 and plan.memory_mode == "store"

    class Killed(BaseException):
        pass

    def killed(step: int, plan: ExecutionPlan) -> bool:
        if step == 3 and plan.memory_mode == "recompute":
            raise Killed
        return when(step, plan)

    with monkeypatch.context() as patch:
        run_out(patch, killed, out)
        with pytest.raises(Killed):
            distil_trial(SPEC, splits, directory, SETTINGS)
    header = checkpoint_of(directory)
    assert (header["counters"]["step"], header["n_replans"]) == (3, 1)
    assert header["plan"]["memory_mode"] == "recompute"
    tried = run_out(monkeypatch, lambda step, plan: False, out)
    assert distil_trial(SPEC, splits, directory, SETTINGS)
    assert [plan.memory_mode for plan in tried] == ["recompute"] * 5
    assert read_distilled(SPEC, directory).provenance["n_replans"] == 1
    with monkeypatch.context() as patch:
        run_out(patch, when, out)
        assert distil_trial(SPEC, splits, other, SETTINGS)
    assert_same_set(directory, other, 0.0)


def test_a_checkpoint_from_before_the_count_goes_on(tmp_path, splits, monkeypatch) -> None:
    directory, left = SweepDirectory(tmp_path), iter(range(2))
    assert not distil_trial(SPEC, splits, directory, SETTINGS, should_stop=lambda: next(left, None) is None)
    tensors, header = load_tensors(directory.checkpoint(SPEC.trial_id))
    del header["n_replans"]
    save_tensors(directory.checkpoint(SPEC.trial_id), tensors, header, directory.temporary)
    assert distil_trial(SPEC, splits, directory, SETTINGS)
    assert read_distilled(SPEC, directory).provenance["n_replans"] == 0


def test_distribution_matching_lets_fewer_real_images_through_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, splits: Splits
) -> None:
    """It keeps nothing of inner steps, so no attempt goes to a plan that keeps less of them."""
    spec = TrialSpec(
        dataset=DATASETS["digits"],
        **{"network": "convnet(depth=1,width=8,norm=none)", "method": "distribution_matching"},
        **{"outer_steps": 3, "models_per_step": 2, "real_per_class": 6, "selection_networks": 2},
        dtype="float64",
    )
    real, tried, least = distribution_matching.gradients, [], [15]

    def gradients(task: Any, *more: Any) -> Any:
        tried.append((task.plan.memory_mode, task.plan.real_chunk))
        if task.plan.real_chunk > least[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(task, *more)

    monkeypatch.setattr(distribution_matching, "gradients", gradients)
    directory = SweepDirectory(tmp_path)
    assert distil_trial(spec, splits, directory, SETTINGS)
    assert tried[0][1] > 60 and tried[1:] == [("store", 30)] + [("store", 15)] * 3
    assert read_distilled(spec, directory).provenance["n_replans"] == 2
    least[0] = 0
    tried.clear()
    with pytest.raises(TooLargeError, match="8 real images at a time"):
        distil_trial(spec, splits, SweepDirectory(tmp_path / "none"), SETTINGS)
    assert [chunk for _, chunk in tried][1:] == [30, 15, 8]


def test_a_trial_that_fits_in_no_way_says_what_it_needs_and_what_to_set(
    monkeypatch, tmp_path, splits
) -> None:
    directory = SweepDirectory(tmp_path)
    out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    tried = run_out(monkeypatch, lambda step, plan: step == 2, out)
    with pytest.raises(TooLargeError) as caught:
        distil_trial(SPEC, splits, directory, SETTINGS)
    plans = [(p.memory_mode, p.real_chunk, p.real_block) for p in tried[2:]]
    assert plans == [
        *(("store", 32, 3), ("recompute", 32, 3), ("recompute", 16, 3), ("recompute", 8, 3)),
        ("recompute", 8, 1),
    ]
    words = str(caught.value)
    for part in ("outer step 2 does not fit the memory of cpu", "memory_mode: recompute", "segment: "):
        assert part in words
    for part in ("GB by estimate", "models_per_step", "resources.", "Tried to allocate 2.00 GiB"):
        assert part in words
    record_failure(directory, SPEC, "a sweep", caught.value, "distillation", 1)
    (row,) = read_part(directory.failure_part(SPEC.trial_id)).to_pylist()
    assert (row["error_class"], row["status"], row["message"]) == ("TooLargeError", "failed", words)
    assert checkpoint_of(directory)["counters"]["step"] == 2, "what was done is not lost"


def test_an_error_of_another_kind_is_not_taken_for_want_of_memory(monkeypatch, tmp_path, splits) -> None:
    tried = run_out(monkeypatch, lambda step, plan: True, RuntimeError("expected scalar type Float"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        distil_trial(SPEC, splits, SweepDirectory(tmp_path), SETTINGS)
    assert len(tried) == 1


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial import distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings

spec = TrialSpec(dataset=DATASETS["digits"], network="convnet(depth=1,width=32,norm=none)", outer_steps=1,
                 images_per_class=20, inner_steps=2, inner_epochs=20, inner_lr=0.01, models_per_step=4,
                 real_batch=64, selection_networks=1)
splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
# What torch and its threads take at their first use is there before the limit.
small = TrialSpec(**{**{k: getattr(spec, k) for k in ("dataset", "network", "real_batch", "inner_lr")},
                     "outer_steps": 1, "images_per_class": 2, "inner_steps": 2})
directory = SweepDirectory(Path(sys.argv[1]))
distil_trial(small, splits, directory, TrialSettings())
for name in ("free", "limited"):
    if name == "limited":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 150 * 2**20,) * 2)
    directory = SweepDirectory(Path(sys.argv[1]) / name)
    distil_trial(spec, splits, directory, TrialSettings(memory_mode="store"))
    found = read_distilled(spec, directory)
    print(json.dumps([found.provenance["memory_mode"], found.provenance["n_replans"], found.sha256]))
"""


@pytest.mark.slow
def test_memory_that_really_runs_out_on_the_cpu(tmp_path: Path, environment: dict[str, str]) -> None:
    """150 MiB more lie between what ``store`` (260) and ``recompute`` (20) take of this trial."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        # glibc would keep freed memory in pieces; above this size it returns it.
        env={**environment, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    free, limited = map(json.loads, done.stdout.splitlines()[-2:])
    assert (free[:2], limited[:2]) == (["store", 0], ["recompute", 1])
    assert limited[2] == free[2], "with derivatives written out, the same steps again are the same bits"


# ---------------------------------------------------------------------------------------- evaluation


def run_out_in_tests(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Test passes of more than ``most`` images at a time run out; returns the sizes that were tried."""
    real, tried = ddsweep.core.evaluate._count_right, []

    def count_right(*arguments: Any) -> Any:
        tried.append(arguments[-1].test_chunk)
        if arguments[-1].test_chunk > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*arguments)

    monkeypatch.setattr(ddsweep.core.evaluate, "_count_right", count_right)
    return tried


def test_the_test_pass_halves_its_batch_and_the_rows_stay(monkeypatch, tmp_path, splits, undisturbed) -> None:
    directory = SweepDirectory(tmp_path)
    directory.artifacts(SPEC.trial_id).mkdir(parents=True)
    for path in undisturbed.artifacts(SPEC.trial_id).iterdir():
        directory.artifacts(SPEC.trial_id).joinpath(path.name).write_bytes(path.read_bytes())
    (unit,) = (unit for unit in EVALUATION.units(SPEC) if unit.protocol == "as_distilled")
    arguments = (SPEC, unit, EVALUATION, splits)
    expected = read_part(evaluate_unit(*arguments, undisturbed, torch.device("cpu"))).to_pylist()
    tried = run_out_in_tests(monkeypatch, 8)
    found = read_part(evaluate_unit(*arguments, directory, torch.device("cpu"))).to_pylist()
    assert tried[:3] == [32, 16, 8]
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        assert {k: v for k, v in ours.items() if k != "loss"} == {
            k: v for k, v in theirs.items() if k != "loss"
        }


def test_a_group_that_fits_in_no_way_names_its_settings(monkeypatch, tmp_path, splits, undisturbed) -> None:
    tried = run_out_in_tests(monkeypatch, 0)
    evaluation = EvaluationSpec(networks=8, group_size=8, baselines=())
    (unit,) = (unit for unit in evaluation.units(SPEC) if unit.protocol == "as_distilled")
    with pytest.raises(TooLargeError) as caught:
        evaluate_unit(SPEC, unit, evaluation, splits, undisturbed, torch.device("cpu"))
    assert tried == [32, 16, 8, 8, 8, 8], "then half the networks at a time, down to one"
    for part in (SPEC.trial_id, "as_distilled", "8 networks", "evaluate.group_size", "2.00 GiB"):
        assert part in str(caught.value)


# ---------------------------------------------------------------------- memory that recordings hold


@pytest.fixture
def held() -> Iterator[None]:
    """A recording of other work, as on a GPU."""
    graphs._recordings["other work"] = object()
    yield
    graphs.forget_recordings()


def test_a_step_has_the_memory_of_recordings_before_it_has_another_plan(
    held, monkeypatch, tmp_path, splits, undisturbed
) -> None:
    directory, out = SweepDirectory(tmp_path), torch.OutOfMemoryError("CUDA out of memory")
    tried = run_out(monkeypatch, lambda step, plan: step == 3 and graphs.has_recordings(), out)
    # keep_to_share forgets at the start of a trial: those of a validation come later
    monkeypatch.setattr(ddsweep.trial.running, "keep_to_share", lambda *_: None)
    assert distil_trial(SPEC, splits, directory, SETTINGS)
    assert [plan.memory_mode for plan in tried] == ["store"] * 9 and not graphs.has_recordings()
    assert checkpoint_of(directory)["n_replans"] == 0
    assert_same_set(directory, undisturbed, 0)


def test_recordings_that_the_work_makes_itself_are_given_up_once_for_each_size() -> None:
    tried: list[int] = []
    size = 4

    def work() -> str:
        tried.append(size)
        graphs._recordings["of this work"] = object()
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    def shrink(error: Exception) -> bool:
        nonlocal size
        size //= 2
        return True

    assert fitted(work, shrink) == "done"
    assert tried == [4, 4, 2, 2, 1]
    graphs.forget_recordings()
    size = 4
    with pytest.raises(torch.OutOfMemoryError):
        fitted(work, lambda error: False)
    graphs.forget_recordings()


def test_work_that_cannot_be_recorded_holds_no_memory() -> None:
    graphs._recordings["some work"] = None
    assert not graphs.has_recordings()
    graphs.forget_recordings()


@pytest.mark.parametrize("method", ["bptt", "distribution_matching"])
def test_validation_and_the_search_for_rates_train_fewer_networks_at_once(
    method, monkeypatch, tmp_path, splits
) -> None:
    """Without the trial noticing: all derivatives are written out, so the bits stay."""
    spec = replace(SPEC, method=method, image_init="real", **NOT_MATCHED if method != "bptt" else {})
    expected, found = SweepDirectory(tmp_path / "expected"), SweepDirectory(tmp_path / "found")
    assert distil_trial(spec, splits, expected, SETTINGS)
    real, most = ddsweep.core.evaluate.train_networks, []

    def train_networks(network: Any, state: Any, *rest: Any, **more: Any) -> Any:
        count = len(next(iter(state.params.values())))
        most.append(count)
        if count > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(network, state, *rest, **more)

    monkeypatch.setattr(ddsweep.core.evaluate, "train_networks", train_networks)
    assert distil_trial(spec, splits, found, SETTINGS)
    assert {1, 2} <= set(most)
    assert read_distilled(spec, found).sha256 == read_distilled(spec, expected).sha256


@pytest.mark.parametrize("where", ["training", "test pass"])
def test_an_evaluation_has_the_memory_of_recordings_before_it_gives_up(
    where, held, monkeypatch, tmp_path, splits, undisturbed
) -> None:
    name = "train_networks" if where == "training" else "_count_right"
    real, tried = getattr(ddsweep.core.evaluate, name), []

    def full(*arguments: Any, **more: Any) -> Any:
        tried.append(graphs.has_recordings())
        if tried[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if where == "test pass":
            assert arguments[-1].test_chunk == 32, "as many images at a time as before"
        return real(*arguments, **more)

    monkeypatch.setattr(ddsweep.core.evaluate, name, full)
    directory = SweepDirectory(tmp_path / "copy")
    shutil.copytree(undisturbed.root, directory.root)
    shutil.rmtree(directory.parts("evals"), ignore_errors=True)
    (unit, *_) = EVALUATION.units(SPEC)
    evaluate_unit(SPEC, unit, EVALUATION, splits, directory, torch.device("cpu"))
    assert tried.count(True) == 1 and tried.count(False) >= 1


# ------------------------------------------------------------------------- a GPU that answers no more


def broken_gpu(monkeypatch: pytest.MonkeyPatch, said: Exception | None) -> list[int]:
    """A process with CUDA, whose calls raise ``said``; and the codes with which it has ended."""
    ends: list[int] = []

    def ones(*args: Any, **more: Any) -> Any:
        if said is not None:
            raise said
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(os, "_exit", ends.append)
    return ends


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), [1]),
        (torch.OutOfMemoryError("CUDA out of memory"), []),
        (None, []),
    ],
)
def test_a_process_whose_gpu_answers_no_more_makes_room_for_another(
    said: Exception | None,
    code: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CUDA stays broken in a process. A fault of the work alone, or a lack of memory, ends nothing."""
    ends = broken_gpu(monkeypatch, said)
    end_without_gpu(ValueError("what the work said"))
    assert ends == code
    assert ("what the work said" in capsys.readouterr().err) == bool(code)


def test_without_a_gpu_nothing_ends() -> None:
    end_without_gpu(ValueError("of the work"))
