"""One trial as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddsweep.errors import ResultsError, SettingError
from ddsweep.report.curve import sparkline
from ddsweep.report.show import find_trial, show
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part, write_part
from ddsweep.results.schemas import HISTORY

from .conftest import Folder, resolve, spec, text


def test_evaluated_fixed_trial(folder: Folder) -> None:
    folder.asked()
    trial = spec(init="fixed", inner_lr=0.1)
    folder.evaluated(trial)
    folder.directory.grid(trial.trial_id).write_bytes(b"png")
    shown = text(show(folder.directory, trial.trial_id[:4], resolve), 200)
    words = [line.split() for line in shown.splitlines()]
    assert shown.startswith(
        f"trial {trial.trial_id}: done, outer step 60/60, test accuracy 50.0 % on 4 networks"
    )
    assert ["inner_lr", "0.1"] in words and ["init", "fixed"] in words
    assert "as by default: objective classification" in shown and "models_per_step 1" in shown
    assert ["outer", "loss", "█▄▂▂▁▁", "1", "→", "0.1667"] in words
    assert ["val.", "score", "▁▅█", "0.2", "→", "0.6"] in words
    assert ["4", "=", "T", "74.0", "(n", "=", "1)", "63.5", "±", "9.1", "(n", "=", "4)"] in words
    assert ["0,", "untrained"] in [line[:2] for line in words] and ["2,", "epoch", "1"] in [
        w[:3] for w in words
    ]
    assert ["random", "real", "as", "distilled", "4", "0.3", "49.0", "(n", "=", "1)", "+25.0"] in words
    assert ["k-NN", "k-means", "none", "90.0", "(n", "=", "1)"] in words
    paired = [w for w in words if w[:5] == ["random", "real", "on", "random", "networks"]]
    assert len(paired) == 1 and "±" in paired[0][-2:]
    assert ["wall", "12", "s"] in words
    assert ["picture", str(folder.directory.grid(trial.trial_id))] in words
    assert ["distilled", "set", str(folder.directory.distilled(trial.trial_id))] in words


def test_settings_that_the_method_lacks_are_not_shown(folder: Folder) -> None:
    trial = spec(init="fixed", method="distribution_matching")
    folder.asked()
    folder.evaluated(trial)
    shown = text(show(folder.directory, trial.trial_id, resolve))
    assert "real_per_class 256" in shown and "inner_lr" not in shown and "window" not in shown


def test_skipped_networks_are_counted_over_all_steps(folder: Folder) -> None:
    """Not all steps are logged, and a row of the history is of its own step only."""
    trial = spec(init="fixed")
    folder.asked()
    folder.trial(trial, n_skipped=7)
    path = folder.history(trial)
    rows = [{**row, "n_skipped": int(row["outer_step"] == 20)} for row in read_part(path).to_pylist()]
    write_part(path, rows, HISTORY, folder.directory.temporary)
    assert ", 7 networks skipped\n" in text(show(folder.directory, trial.trial_id, resolve))
    folder.directory.trials_part(trial.trial_id).unlink()
    assert ", 1 network skipped at logged steps\n" in text(show(folder.directory, trial.trial_id, resolve))


def test_pending_interrupted_and_failed_trials(folder: Folder) -> None:
    folder.asked()
    pending, stopped, failed = spec(), spec(inner_lr=0.1), spec(init="fixed")
    folder.history(stopped, last=20)
    folder.failure(failed, "8 of 8 networks diverged at outer step 3")
    shown = text(show(folder.directory, pending.trial_id, resolve))
    assert f"trial {pending.trial_id}: pending, outer step 0/60" in shown and "none yet" in shown
    shown = text(show(folder.directory, stopped.trial_id, resolve))
    assert "interrupted, outer step 20/60" in shown and "outer loss" in shown
    early = spec(init="fixed", inner_lr=0.1)
    folder.stopped(early)
    shown = text(show(folder.directory, early.trial_id, resolve))
    assert shown.startswith(f"trial {early.trial_id}: stopped, outer step 20/60\n")
    assert "val. score" in shown and "cost" in shown and "test accuracy" not in shown
    shown = text(show(folder.directory, failed.trial_id, resolve))
    assert "failed" in shown and "DivergedError: 8 of 8 networks diverged at outer step 3" in shown


def test_torn_parts_are_named(folder: Folder) -> None:
    folder.asked()
    trial = spec()
    folder.evaluated(trial)
    path = folder.directory.evals_part(trial.trial_id, "as_distilled", "xavier", 0)
    for torn in (path, folder.directory.history_part(trial.trial_id)):
        torn.write_bytes(torn.read_bytes()[:50])
    shown = text(show(folder.directory, trial.trial_id, resolve), 300)
    assert shown.count("torn part, to be made again by `ddsweep run`") == 2 and str(path) in shown
    assert "(n = 2)" in shown


def test_trial_that_is_no_longer_asked_for(folder: Folder) -> None:
    folder.asked()
    trial = spec(seed=9)
    folder.evaluated(trial)
    shown = text(show(folder.directory, trial.trial_id, resolve))
    assert "no longer in the sweep file" in shown and "seed" in shown


def test_prefixes(folder: Folder) -> None:
    for trial_id in ("abc1", "abd2", "e3"):
        folder.directory.artifacts(trial_id).mkdir(parents=True)
    places = [folder.directory]
    assert find_trial(places, "abc") == (folder.directory, "abc1")
    assert find_trial(places, "e") == (folder.directory, "e3")
    with pytest.raises(ResultsError, match="'ab' is the beginning of 2 trials: abc1, abd2; give more of it"):
        find_trial(places, "ab")
    with pytest.raises(ResultsError, match="no trial begins with 'x'; trials are abc1, abd2, e3"):
        find_trial(places, "x")
    with pytest.raises(ResultsError, match="no trial begins with ''"):
        find_trial(places, "")
    with pytest.raises(ResultsError, match="none yet"):
        find_trial([], "x")
    folder.directory.artifacts("ab").mkdir()
    assert find_trial(places, "ab") == (folder.directory, "ab")
    for number in range(10):
        folder.directory.artifacts(f"f{number}").mkdir()
    with pytest.raises(ResultsError, match="and 4 more"):
        find_trial(places, "x")


def test_an_unreadable_sweep_file_hides_no_trial_of_another_sweep(folder: Folder, tmp_path: Path) -> None:
    other = Folder(SweepDirectory(tmp_path / "other"))
    folder.asked()
    other.asked("name: other\nbase: {gone_setting: 3}\n")
    places, trial = [other.directory, folder.directory], spec()
    assert find_trial(places, trial.trial_id) == (folder.directory, trial.trial_id)
    with pytest.raises(SettingError, match="gone_setting"):
        find_trial(places, "x")


def test_a_trial_is_found_in_the_sweep_where_it_left_files(folder: Folder, tmp_path: Path) -> None:
    other = Folder(SweepDirectory(tmp_path / "other"))
    folder.asked()
    other.asked()
    trial = spec()
    places = [folder.directory, other.directory]
    assert find_trial(places[:1], trial.trial_id) == (folder.directory, trial.trial_id)
    other.evaluated(trial)
    assert find_trial(places, trial.trial_id[:6]) == (other.directory, trial.trial_id)
    # In two of them: neither is picked in silence.
    folder.evaluated(trial)
    where = f"{folder.directory.root}, {other.directory.root}; name one of them"
    for begin in (trial.trial_id, trial.trial_id[:6]):
        with pytest.raises(ResultsError, match=rf"trial {trial.trial_id} is in 2 sweeps: {where}"):
            find_trial(places, begin)
    assert find_trial([other.directory], trial.trial_id) == (other.directory, trial.trial_id)


def test_unknown_prefix_lists_the_trials_of_the_sweep(folder: Folder) -> None:
    folder.asked()
    with pytest.raises(ResultsError, match=spec().trial_id):
        show(folder.directory, "zz", resolve)


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, None, float("nan"), 2.0]) == "▁××█"
    assert sparkline([3.0, 3.0]) == "▄▄"
    assert sparkline([]) == ""
    assert sparkline([None]) == "×"
    assert len(sparkline([float(i) for i in range(1000)], 40)) == 40
    assert sparkline([0.0, 2.0, 5.0, 7.0], 2) == "▁█"
