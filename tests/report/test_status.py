"""The state of a sweep from files alone, with and without a driver at work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ddsweep.catalog import DatasetSpec, EvaluationSpec, TrialSpec
from ddsweep.errors import DataError, ResultsError
from ddsweep.report.status import SweepStatus, trial_states
from ddsweep.report.status import status as status_of
from ddsweep.report.status_table import status_table
from ddsweep.report.sweep_file import Asked, Resolve, asked_of, from_catalog
from ddsweep.results.collect import compact
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import SweepLock, live_holder

from .conftest import EVALUATION, SWEEP, Folder, resolve, spec, text

INITS, RATES = ("fixed", "random"), (0.02, 0.1)


def trials_of_sweep() -> list[TrialSpec]:
    return [spec(init=init, inner_lr=lr) for init in INITS for lr in RATES]


def status(directory: SweepDirectory, resolve: Resolve) -> SweepStatus:
    return status_of(directory, asked_of(directory, resolve))


def states(folder: Folder) -> list[str]:
    return [trial.state for trial in status(folder.directory, resolve).trials]


def test_of_too_many_trials_those_are_listed_in_which_something_happens(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.asked()
    done, distilled, also_done, _ = trials_of_sweep()
    for trial in (done, also_done):
        folder.evaluated(trial)
    folder.distilled(distilled)
    found = status(folder.directory, resolve)
    monkeypatch.setattr("ddsweep.report.status_table.MOST_LISTED", 2)
    shown = text(status_table(found)).splitlines()
    listed = [line.split()[0] for line in shown if line.startswith(tuple(t.trial_id for t in found.trials))]
    assert listed == [done.trial_id, distilled.trial_id]
    assert "and 2 more: 1 done, 1 pending" in shown
    assert "small: 4 trials, 2 done, 1 distilled, 1 pending" in shown


def test_the_states_are_the_same_for_parts_that_are_known(folder: Folder) -> None:
    folder.asked()
    done, stopped, torn, _ = trials = trials_of_sweep()
    folder.evaluated(done)
    folder.stopped(stopped)
    folder.evaluated(torn)
    compact(folder.directory)
    before = states(folder)
    assert before == ["done", "stopped", "done", "pending"]
    shutil.rmtree(folder.directory.cache)
    assert states(folder) == before
    compact(folder.directory)
    part = folder.directory.trials_part(torn.trial_id)
    part.write_bytes(part.read_bytes()[:-9])
    found = status(folder.directory, resolve)
    assert found.torn == (part,) and found.trials[2].state != "done"
    other = replace(EVALUATION, networks=2)
    assert set(trial_states(folder.directory, trials, other).values()) == {"missing", "stopped"}


def test_states_without_a_driver(folder: Folder) -> None:
    folder.asked()
    done, distilled, stopped, pending = trials_of_sweep()
    folder.evaluated(done)
    folder.distilled(distilled)
    folder.history(stopped, last=30)
    found = status(folder.directory, resolve)
    assert [trial.trial_id for trial in found.trials] == [t.trial_id for t in trials_of_sweep()]
    assert [trial.state for trial in found.trials] == ["done", "distilled", "interrupted", "pending"]
    assert found.counts["pending"] == 1 and sum(found.counts.values()) == 4
    assert (found.driver, found.eta_seconds, found.torn, found.note) == (None, None, (), None)
    trial = found.trials[2]
    assert (trial.outer_step, trial.outer_steps, trial.seconds) == (30, 60, 15.0)
    assert (trial.outer_loss, trial.val_score) == (pytest.approx(1 / 3), 0.2)
    assert found.trials[3].trial_id == pending.trial_id
    shown = text(status_table(found), 100)
    assert "small: 4 trials, 1 done, 1 distilled, 1 interrupted, 1 pending" in shown
    assert "no driver at work; `ddsweep run` goes on with the other 3" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith(trial.trial_id)]
    assert line.split() == [
        *(trial.trial_id, "random", "0.02", "interrupted"),
        *("30/60", "0.3333", "20.0", "%", "15", "s"),
    ]


def test_states_with_a_live_driver(folder: Folder) -> None:
    folder.asked()
    _, distilled, running, _ = trials_of_sweep()
    with SweepLock(folder.directory.lock):
        folder.distilled(distilled)
        folder.history(distilled)
        folder.history(running, last=20)
        found = status(folder.directory, resolve)
        assert [t.state for t in found.trials] == ["pending", "evaluating", "running", "pending"]
        assert found.driver is not None and found.driver["pid"] == os.getpid()
        # 30 s a trial: two pending, and 20 of 60 steps done of the one that runs.
        assert found.eta_seconds == pytest.approx(30 + 30 + 20)
        shown = text(status_table(found))
        assert f"pid {os.getpid()}" in shown and "all distilled in about 1 min 20 s" in shown
    assert states(folder) == ["pending", "distilled", "interrupted", "pending"]


def test_no_time_is_left_to_distil_if_all_is_distilled(folder: Folder) -> None:
    folder.asked()
    with SweepLock(folder.directory.lock):
        for trial in trials_of_sweep():
            folder.distilled(trial)
            folder.history(trial)
        found = status(folder.directory, resolve)
        assert {t.state for t in found.trials} == {"evaluating"} and found.eta_seconds is None
        assert "all distilled in" not in text(status_table(found))


def test_seeds_that_wait_for_their_siblings_are_paused(folder: Folder) -> None:
    """Else `status` would say that 24 trials run where there are two places."""
    folder.asked(SWEEP + "seeds: 2\nscheduler: {grace: 20, reduction: 2, strata: []}\n")
    trials = [spec(init=init, inner_lr=lr, seed=s) for init in INITS for lr in RATES for s in (0, 1)]
    with SweepLock(folder.directory.lock):
        for trial, step in zip(trials, (20, 10, 40, 20, 20, 20, 30, 20), strict=True):
            folder.history(trial, last=step)
        assert states(folder) == [
            *("paused", "running"),  # the second is not at the rung yet
            *("paused", "running"),  # the second goes on from the first rung to the second
            *("running", "running"),  # both are there, so they go on
            *("running", "running"),  # the first is not at a rung
        ]
        folder.failure(trials[1])
        assert states(folder)[:2] == ["running", "failed"], "one that failed is not waited for"
    assert set(states(folder)) == {"interrupted", "failed"}


def test_a_stopped_trial_has_come_to_its_end(folder: Folder) -> None:
    folder.asked()
    done, stopped, *others = trials_of_sweep()
    for trial in (done, *others):
        folder.evaluated(trial)
    folder.stopped(stopped)
    found = status(folder.directory, resolve)
    assert [trial.state for trial in found.trials] == ["done", "stopped", "done", "done"]
    assert (found.trials[1].outer_step, found.trials[1].val_score) == (20, 0.2)
    shown = text(status_table(found), 120)
    assert "4 trials, 3 done, 1 stopped" in shown
    assert "nothing is left to do; without `scheduler` the stopped ones go on" in shown
    with SweepLock(folder.directory.lock):
        assert states(folder)[1] == "stopped"
    assert status_of(folder.directory, Asked(None, None)).counts["stopped"] == 1, (
        "also where only files speak"
    )


def test_what_an_earlier_driver_left_does_not_run(folder: Folder) -> None:
    folder.asked()
    trial = trials_of_sweep()[0]
    path = folder.history(trial, last=20)
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    with SweepLock(folder.directory.lock):
        assert states(folder)[0] == "interrupted"


def test_dead_drivers(folder: Folder) -> None:
    folder.asked()
    folder.history(trials_of_sweep()[0], last=20)
    lock = folder.directory.lock
    code = """
import os, sys, pathlib
from ddsweep.results.lock import SweepLock
SweepLock(pathlib.Path(sys.argv[1])).__enter__()
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code, str(lock)], check=False)
    assert lock.exists()
    assert live_holder(folder.directory.lock) is None
    assert states(folder)[0] == "interrupted"


@pytest.mark.parametrize(("age", "alive"), [(10, True), (1000, False)])
def test_driver_of_another_host(folder: Folder, age: float, alive: bool) -> None:
    beat = datetime.fromtimestamp(time.time() - age, UTC).isoformat()
    folder.directory.lock.write_text(
        json.dumps({"host": "elsewhere", "pid": 1, "heartbeat": beat, "job": "77"})
    )
    folder.asked()
    found = status(folder.directory, resolve)
    assert (found.driver is not None) == alive
    assert ("Slurm job 77" in text(status_table(found))) == alive


def test_failed_until_it_is_tried_again(folder: Folder) -> None:
    folder.asked()
    trial = trials_of_sweep()[3]
    past = time.time() - 60
    os.utime(folder.history(trial, last=20), (past, past))
    folder.failure(trial)
    found = status(folder.directory, resolve)
    assert found.trials[3].state == "failed"
    assert found.trials[3].message == "DivergedError: all networks diverged"
    assert f"failed {trial.trial_id}: DivergedError: all networks diverged" in text(status_table(found))
    with SweepLock(folder.directory.lock):
        assert states(folder)[3] == "failed"
        later = time.time() + 1
        os.utime(folder.history(trial, last=30), (later, later))
        assert states(folder)[3] == "running"


def test_a_changed_evaluation_is_not_done(folder: Folder) -> None:
    folder.asked()
    trial = trials_of_sweep()[2]
    folder.distilled(trial)
    folder.trial(trial, EvaluationSpec(networks=2, group_size=2))
    assert states(folder)[2] == "distilled"
    folder.trial(trial)
    assert states(folder)[2] == "done"


def test_torn_parts_are_named(folder: Folder) -> None:
    folder.asked()
    whole = trials_of_sweep()
    for trial in whole:
        folder.evaluated(trial)
    folder.failure(whole[3])
    directory = folder.directory
    torn = [
        directory.trials_part(whole[0].trial_id),
        directory.history_part(whole[1].trial_id),
        directory.evals_part(whole[2].trial_id, "as_distilled", "xavier", 0),
        directory.failure_part(whole[3].trial_id),
    ]
    directory.trials_part(whole[3].trial_id).unlink()
    for path in torn:
        path.write_bytes(path.read_bytes()[:-30])
    torn[0].write_bytes(b"")
    found = status(directory, resolve)
    assert sorted(found.torn) == sorted(torn)
    assert [trial.state for trial in found.trials] == ["distilled", "done", "done", "failed"]
    assert found.trials[3].message == "failed; the part that says why is torn"
    shown = text(status_table(found), 400)
    assert all(f"torn part, to be made again by `ddsweep run`: {path}" in shown for path in torn)


def test_altered_history_is_named_too(folder: Folder) -> None:
    folder.asked()
    path = folder.history(trials_of_sweep()[0])
    content = bytearray(path.read_bytes())
    content[10:60] = bytes(50)
    path.write_bytes(bytes(content))
    assert status(folder.directory, resolve).torn == (path,)


def test_empty_folder_and_no_folder(tmp_path: Path, folder: Folder) -> None:
    with pytest.raises(ResultsError, match="not the results of one sweep; it holds no results"):
        status(folder.directory, resolve)
    folder.asked()
    assert set(states(folder)) == {"pending"}
    with pytest.raises(ResultsError, match="give one of the sweeps in it: small"):
        status(SweepDirectory(tmp_path), resolve)
    with pytest.raises(ResultsError, match="no such results folder"):
        status(SweepDirectory(tmp_path / "nothing"), resolve)


def test_without_sweep_file_or_data_the_files_speak(folder: Folder) -> None:
    done, stopped = trials_of_sweep()[:2]
    folder.evaluated(done)
    folder.history(stopped, last=20)
    expected = {done.trial_id: "done", stopped.trial_id: "interrupted"}

    def no_data(value: Any) -> DatasetSpec:
        raise DataError("digits: not here")

    found = status(folder.directory, resolve)
    assert {trial.trial_id: trial.state for trial in found.trials} == expected
    assert found.note is not None and "no sweep.yaml here" in found.note
    folder.asked()
    found = status(folder.directory, no_data)
    assert {trial.trial_id: trial.state for trial in found.trials} == expected
    assert found.note is not None and "digits: not here" in text(status_table(found))


def test_what_the_catalog_alone_describes() -> None:
    assert from_catalog("digits").name == "digits"
    for value in ("cifar10-exact", {"source": "folder", "path": "mine"}):
        with pytest.raises(DataError, match="enters the trial ids"):
            from_catalog(value)


def test_states_for_a_plan(folder: Folder, tmp_path: Path) -> None:
    """What is done, and what was lost since, is in tests/test_changed_evaluation.py."""
    row_alone, torn, changed, missing = trials_of_sweep()
    folder.trial(row_alone)
    folder.trial(torn)
    path = folder.directory.trials_part(torn.trial_id)
    path.write_bytes(path.read_bytes()[:-9])
    folder.trial(changed, EvaluationSpec(networks=2, group_size=2))
    trials = [row_alone, torn, changed, missing]
    found = trial_states(folder.directory, trials, folder.evaluation)
    assert list(found.items()) == [(trial.trial_id, "missing") for trial in trials]
    folder.stopped(missing)
    assert trial_states(folder.directory, trials, folder.evaluation)[missing.trial_id] == "stopped"
    on = trial_states(folder.directory, trials, folder.evaluation, stopped_stay=False)
    assert on[missing.trial_id] == "missing", "without a scheduler a run goes on with it"
    nowhere = trial_states(SweepDirectory(tmp_path / "nowhere"), trials, folder.evaluation)
    assert set(nowhere.values()) == {"missing"}


def test_status_of_a_folder_alone(folder: Folder) -> None:
    folder.evaluated(trials_of_sweep()[0])
    (trial,) = status_of(folder.directory, Asked(None, None)).trials
    assert (trial.state, trial.settings, trial.outer_steps) == ("done", {}, None)


def test_trials_over_different_numbers_of_networks_are_told_apart(folder: Folder) -> None:
    folder.asked()
    trials = asked_of(folder.directory, resolve).trials or ()
    assert [trial.init for trial in trials] == ["fixed", "fixed", "random", "random"]
    folder.trial(trials[0], test_models=1)  # its one known network is no other number
    folder.trial(trials[2], test_models=4)
    assert "different numbers" not in flat(folder)
    folder.trial(trials[3], test_models=6)
    assert (
        "different numbers of held-out networks: 4 (1 trial), 6 (1 trial); with evaluate.networks=6 "
        "`ddsweep eval` brings all to 6." in flat(folder)
    )


def flat(folder: Folder) -> str:
    return " ".join(text(status_table(status(folder.directory, resolve))).split())


@pytest.mark.parametrize("width", [60, 66, 80, 160])
def test_settings_give_way_where_it_is_narrow(folder: Folder, width: int) -> None:
    folder.asked()
    for trial in trials_of_sweep():
        folder.history(trial)
    lines = text(status_table(status(folder.directory, resolve)), width).splitlines()
    rows = [line.split() for line in lines if "60/60" in line]
    settings = {160: 2, 80: 2, 66: 1, 60: 0}[width]
    assert [row[1 : 1 + settings] for row in rows] == [
        ["fixed", "0.02"][:settings],
        ["fixed", "0.1"][:settings],
        ["random", "0.02"][:settings],
        ["random", "0.1"][:settings],
    ]
    assert {tuple(row[1 + settings : 3 + settings]) for row in rows} == {("interrupted", "60/60")}
    assert all(len(line) <= width for line in lines if line[:1].isalnum())
