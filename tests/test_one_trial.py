"""`run_trial`: one trial by a call, in the same tables as a sweep, and without Ray."""

from __future__ import annotations

import functools
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ddsweep import load_results, one_trial, run_trial
from ddsweep.errors import DivergedError, ResultsError, SettingError, UserError
from ddsweep.report.status import status
from ddsweep.report.sweep_file import asked_of
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import SweepLock
from ddsweep.sweep.prepare import load_all_splits
from ddsweep.trial import Progress

SETTINGS: dict[str, Any] = {
    **{"dataset": "digits", "network": "convnet(depth=1,width=4)", "image_init": "real", "inner_lr": 1.0},
    **{"outer_steps": 4, "real_batch": 32, "selection_networks": 1, "models_per_step": 1},
}
EVALUATE = {"networks": 3, "group_size": 1, "baselines": ["random_real"], "rates": [0.1, 1.0], "epochs": [1]}


def test_a_trial_is_in_the_tables_and_its_callback_was_called(tmp_path: Path) -> None:
    said: list[Progress] = []
    threads = torch.get_num_threads()
    folder = tmp_path / "results" / "mine"
    done = run_trial(SETTINGS, folder, evaluate=EVALUATE, resources={"log_every": 2}, on_progress=said.append)
    assert [(item.outer_step, item.val_score is None) for item in said] == [(2, True), (4, False)]
    assert torch.get_num_threads() == threads

    results = load_results(folder)
    (row,) = results.trials.to_dict("records")
    assert row["trial_id"] == done.trial_id == done.distilled.spec.trial_id
    assert (row["sweep"], row["status"], row["test_models"]) == ("mine", "done", 3)
    assert results.history["outer_step"].tolist() == [2, 4]
    evals = results.evals.query("source == 'distilled' and inner_step == 1")
    assert evals["model_seed"].tolist() == [0, 1, 2]
    assert (
        evals["accuracy"].mean() == pytest.approx(row["test_accuracy_mean"]) == done.row["test_accuracy_mean"]
    )
    assert set(results.evals["source"]) == {"distilled", "random_real"}
    assert repr(done).startswith(f"FinishedTrial({done.trial_id}: ") and "on 3 held-out networks" in repr(
        done
    )


def test_calls_share_a_folder_and_compute_only_what_is_missing(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    first = run_trial(SETTINGS, str(folder), evaluate=EVALUATE)
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*/part-*.parquet")}
    second = run_trial(SETTINGS | {"init": "fixed"}, folder)  # judged as the first one
    assert "on its network" in repr(second)
    again = run_trial(SETTINGS, folder, on_progress=lambda progress: pytest.fail("distilled twice"))
    assert again.row["test_accuracy_mean"] == first.row["test_accuracy_mean"]
    wider = run_trial(SETTINGS, folder, evaluate=EVALUATE | {"networks": 4})
    assert wider.row["test_models"] == 4
    assert wider.distilled.sha256 == first.distilled.sha256
    kept = [path for path in files if path.parent.name in ("evals", "history")]
    assert {path: path.stat().st_mtime_ns for path in kept} == {path: files[path] for path in kept}

    found = load_results(folder)
    assert set(found.trials["trial_id"]) == {first.trial_id, second.trial_id}
    asked = asked_of(SweepDirectory(folder))
    assert asked.trials is not None and len(asked.trials) == 2
    assert status(SweepDirectory(folder), asked).counts["done"] == 1
    run_trial(SETTINGS | {"init": "fixed"}, folder)  # on the fourth random network too
    assert status(SweepDirectory(folder), asked).counts["done"] == 2


def test_what_a_callback_raises_ends_the_call_and_the_same_call_goes_on(tmp_path: Path) -> None:
    class Pruned(Exception):
        pass

    def prune(progress: Progress) -> None:
        if progress.outer_step == 2:
            raise Pruned

    how: dict[str, Any] = {"evaluate": EVALUATE, "resources": {"log_every": 1, "checkpoint_every": 1}}
    with pytest.raises(Pruned):
        run_trial(SETTINGS, tmp_path / "a" / "cut", on_progress=prune, **how)
    assert load_results(tmp_path / "a" / "cut").trials.empty
    steps: list[int] = []
    cut = run_trial(SETTINGS, tmp_path / "a" / "cut", on_progress=lambda p: steps.append(p.outer_step), **how)
    assert steps == [3, 4]
    assert cut.row["n_resumed"] == 1
    whole = run_trial(SETTINGS, tmp_path / "b" / "whole", **how)
    assert cut.distilled.sha256 == whole.distilled.sha256
    evals = [load_results(tmp_path / name).evals for name in ("a/cut", "b/whole")]
    pd.testing.assert_frame_equal(*evals)

    # In a folder beside it nothing is left to compute.
    taken = run_trial(SETTINGS, tmp_path / "b" / "same", on_progress=lambda p: pytest.fail("again"), **how)
    assert taken.row["ended_at"] == whole.row["ended_at"] and taken.row["sweep"] == "same"


def test_evaluation_tells_how_far_it_is_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """A unit is a group under a protocol, here of one network; its baselines go with it."""

    class Enough(Exception):
        pass

    said: list[tuple[int, int]] = []

    def two(done: int, of: int) -> None:
        said.append((done, of))
        if done == 2:
            raise Enough

    protocols = ["as_distilled", {"inner_epochs": 2}]
    how: dict[str, Any] = {"evaluate": {**EVALUATE, "networks": 2, "protocols": protocols}}
    with pytest.raises(Enough):
        run_trial(SETTINGS, tmp_path / "mine", on_evaluated=two, **how)
    run_trial(SETTINGS, tmp_path / "mine", on_evaluated=lambda *now: said.append(now), **how)
    assert said == [(1, 4), (2, 4), (1, 2), (2, 2)]
    run_trial(SETTINGS, tmp_path / "mine", on_evaluated=lambda *now: pytest.fail("nothing is left"), **how)


def test_a_diverged_trial_is_in_the_failures(tmp_path: Path) -> None:
    wrong = SETTINGS | {"inner_lr": 1e30, "inner_epochs": 4, "on_nonfinite": "stop"}
    with pytest.raises(DivergedError):
        run_trial(wrong, tmp_path / "mine", evaluate=EVALUATE)
    results = load_results(tmp_path / "mine")
    assert results.trials.empty and results.failures["status"].tolist() == ["diverged"]


def test_numpys_numbers_are_numbers(tmp_path: Path) -> None:
    """As they come from np.arange; the id is that of the plain number."""
    plain = SETTINGS | {"outer_steps": 2, "inner_lr": 0.25, "seed": 3}
    first = run_trial(plain, tmp_path / "mine", evaluate=EVALUATE)
    given = {"outer_steps": np.int64(2), "inner_lr": np.float32(0.25), "seed": np.uint8(3)}
    again = run_trial(
        SETTINGS | given,
        tmp_path / "mine",
        evaluate=EVALUATE | {"networks": np.int32(EVALUATE["networks"])},
        resources={"cpus": np.float64(1)},
    )
    assert again.trial_id == first.trial_id and again.distilled.sha256 == first.distilled.sha256


@pytest.mark.parametrize(("folder", "name"), [("By Hand", "by-hand"), ("_ü_", "trials")])
def test_any_folder_will_do(folder: str, name: str, tmp_path: Path) -> None:
    made = run_trial(SETTINGS, tmp_path / folder, evaluate=EVALUATE)
    assert (made.directory, made.row["sweep"]) == (tmp_path / folder, name)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "setting": ({"outer_step": 3}, {}, r"^run_trial: base\.outer_step: .*did you mean outer_steps\?"),
    "value": ({"outer_steps": 0}, {}, r"outer_steps"),
    "numpy's truth": ({"outer_steps": np.bool_(True)}, {}, "True.* is not a whole number"),
    "list": ({"outer_steps": [1, 2]}, {}, r"^run_trial: base\.outer_steps: "),
    "no data set": ({"dataset": None}, {}, r"base\.dataset"),
    "evaluate": (
        {},
        {"evaluate": {"network": 3}},
        r"^run_trial: evaluate\.network: .*mean networks\?",
    ),
    "resources": ({}, {"resources": {"device": "tpu"}}, r"^run_trial: resources\.device: "),
    "measured": ({}, {"resources": {"gpus": "auto", "cpus": "auto"}}, "auto is measured for the trials of a"),
    "no mapping": ({}, {"resources": "auto"}, r"^run_trial: resources: 'auto' is no mapping"),
    "data": ({"dataset": "mnist", "network": "lenet"}, {"data_root": "/nowhere"}, r"mnist"),
    "network": ({"network": "lenet"}, {}, "lenet takes images of 28 or 32 pixels"),
}


@pytest.mark.parametrize(("settings", "how", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_before_anything_is_made(
    settings: dict[str, Any], how: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        run_trial(SETTINGS | settings, tmp_path / "mine", **({"evaluate": EVALUATE} | how))
    assert not (tmp_path / "mine").exists()


def test_the_folder_of_a_sweep_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("name: s\nbase: {dataset: digits}\ngrid: {init: [fixed, random]}\n")
    with pytest.raises(ResultsError, match="a sweep of many trials; give run_trial a folder of its own"):
        run_trial(SETTINGS, tmp_path)
    with pytest.raises(SettingError, match="name: "):
        run_trial(SETTINGS, tmp_path / "pools")


def test_a_folder_of_sweeps_is_left_alone(tmp_path: Path) -> None:
    """It would become a sweep itself."""
    (tmp_path / "results" / "mine").mkdir(parents=True)
    (tmp_path / "results" / "mine" / "sweep.yaml").write_text("name: mine\nbase: {dataset: digits}\n")
    with pytest.raises(ResultsError, match=r"holds mine, which is a sweep; give .*my_trial"):
        run_trial(SETTINGS, tmp_path / "results")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["mine"]
    (tmp_path / "begun" / "trials").mkdir(parents=True)  # killed before it had written its sweep
    (tmp_path / "begun" / ".tmp").mkdir()
    assert run_trial(SETTINGS, tmp_path / "begun", evaluate=EVALUATE).row["status"] == "done"


def test_a_gpu_that_the_trial_does_not_ask_for_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.warns(UserWarning, match=r"on the CPU: resources=\{'gpus': 1\} uses it"):
        run_trial(SETTINGS, tmp_path / "mine", evaluate=EVALUATE)


def another(directory: SweepDirectory) -> None:
    """Another host takes the folder."""
    now = datetime.now(UTC).isoformat()
    holder = {"host": "another-node", "pid": 1, "process_start": "1", "since": now, "heartbeat": now}
    directory.lock.unlink(missing_ok=True)
    directory.lock.write_text(json.dumps(holder))


def test_of_two_that_start_at_once_the_loser_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = SweepDirectory.create

    def created_by_another(directory: SweepDirectory) -> None:
        create(directory)
        another(directory)

    monkeypatch.setattr(SweepDirectory, "create", created_by_another)
    with pytest.raises(ResultsError, match="another driver is at work"):
        run_trial(SETTINGS, tmp_path / "mine", evaluate=EVALUATE)
    assert SweepDirectory(tmp_path / "mine").lock.is_file()


def test_a_call_that_ends_while_another_one_begins_keeps_its_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[str] = []

    def load(*arguments: Any, **options: Any) -> Any:
        if not first:
            first.append("began")
            first[0] = run_trial(SETTINGS | {"seed": 1}, tmp_path / "mine", evaluate=EVALUATE).trial_id
        return load_all_splits(*arguments, **options)

    monkeypatch.setattr(one_trial, "load_all_splits", load)
    second = run_trial(SETTINGS, tmp_path / "mine", evaluate=EVALUATE)
    assert set(load_results(tmp_path / "mine").trials["trial_id"]) == {*first, second.trial_id}


def test_a_call_that_lost_its_lock_ends_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = SweepDirectory(tmp_path / "mine")
    monkeypatch.setattr(one_trial, "SweepLock", functools.partial(SweepLock, heartbeat_s=0.02))

    def lose(progress: Progress) -> None:
        another(directory)
        time.sleep(0.5)

    how: dict[str, Any] = {"evaluate": EVALUATE, "resources": {"log_every": 1}}
    with pytest.raises(ResultsError, match="another driver took the sweep's lock over"):
        run_trial(SETTINGS, directory.root, on_progress=lose, **how)
    assert load_results(directory.root).failures.empty and directory.lock.is_file()
    directory.lock.unlink()
    steps: list[int] = []
    run_trial(SETTINGS, directory.root, on_progress=lambda progress: steps.append(progress.outer_step), **how)
    assert steps == [2, 3, 4]
