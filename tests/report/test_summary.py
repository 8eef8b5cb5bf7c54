"""Means, spreads and paired differences against numpy-free arithmetic and scipy; and the table."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path

import pytest
from scipy import stats

from ddsweep.report.summary import summarise
from ddsweep.report.summary_table import summary_table
from ddsweep.results.statistics import paired_difference

from .conftest import Folder, spec, text


def test_random_trial(folder: Folder) -> None:
    trial = spec()
    folder.evaluated(trial)
    (summary,) = summarise(folder.directory)
    values = [0.6 + 0.01 * (i + 2) ** 2 for i in range(4)]
    assert summary.trial_id == trial.trial_id
    assert summary.test.mean == pytest.approx(statistics.fmean(values))
    assert summary.test.std == pytest.approx(statistics.stdev(values))
    interval = stats.t.interval(0.95, 3, statistics.fmean(values), stats.sem(values))
    assert summary.test.ci95 == pytest.approx((interval[1] - interval[0]) / 2)
    assert (summary.test.n, summary.n_diverged, summary.on_random) == (4, 0, None)
    assert summary.before is not None
    assert summary.before.mean == pytest.approx(statistics.fmean(0.1 + 0.01 * i**2 for i in range(4)))
    assert summary.wall_seconds == 12.0
    own = summary.baselines["as_distilled"]
    assert own.keys() == {"random_real", "kmeans"}
    assert own["random_real"].mean == pytest.approx(
        statistics.fmean(0.4 + 0.01 * (i + 3) ** 2 for i in range(4))
    )
    tuned = summary.baselines["as_distilled_tuned"]["kmeans"]
    assert tuned.mean == pytest.approx(statistics.fmean(0.65 + 0.01 * (i + 6) ** 2 for i in range(4)))
    neighbours = summary.baselines["nearest_neighbour"]
    assert neighbours["knn_random"].mean == pytest.approx(0.715)
    assert (neighbours["knn_kmeans"].mean, neighbours["knn_kmeans"].std) == (0.9, None)


def test_paired_difference_is_a_paired_t_interval(folder: Folder) -> None:
    folder.evaluated(spec())
    (summary,) = summarise(folder.directory)
    ours = [0.6 + 0.01 * (i + 2) ** 2 for i in range(4)]
    theirs = [0.4 + 0.01 * (i + 3) ** 2 for i in range(4)]
    found = summary.differences["as_distilled"]
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.ci95 is not None
    assert (found.mean - found.ci95, found.mean + found.ci95) == (pytest.approx(low), pytest.approx(high))
    assert found.n == 4


def test_difference_takes_the_networks_that_both_have() -> None:
    ours = [{"model_seed": i, "accuracy": 0.5 + i / 10} for i in range(4)]
    theirs = [{"model_seed": i, "accuracy": 0.5} for i in (3, 1, 9)]
    found = paired_difference(ours, theirs)
    assert found is not None
    assert (found.mean, found.n) == (pytest.approx(0.2), 2)
    assert paired_difference(ours, []) is None
    single = paired_difference(ours[:1], [{"model_seed": 0, "accuracy": 0.2}])
    assert single is not None and (single.mean, single.ci95) == (pytest.approx(0.3), None)


def test_fixed_trial_keeps_its_own_network_apart(folder: Folder) -> None:
    trial = spec(init="fixed", seed=3)
    folder.evaluated(trial)
    (summary,) = summarise(folder.directory)
    assert (summary.test.n, summary.test.std, summary.test.ci95) == (1, None, None)
    assert summary.test.mean == pytest.approx(0.7 + 0.01 * 25)
    assert summary.on_random is not None
    assert (summary.on_random.n, summary.on_random.std is None) == (4, False)
    assert summary.differences["as_distilled"].ci95 is None
    assert summary.differences["on_random"].ci95 is not None
    assert summary.baselines["on_random"]["random_real"].n == 4
    assert summary.baselines["as_distilled"]["random_real"].n == 1


def test_settings_are_those_that_differ_and_four_always(folder: Folder) -> None:
    trials = [spec(inner_lr=0.02), spec(inner_lr=0.1), spec(init="fixed")]
    for trial in trials:
        folder.evaluated(trial)
    found = summarise(folder.directory, [trial.trial_id for trial in trials])
    assert [summary.trial_id for summary in found] == [trial.trial_id for trial in trials]
    names = ["init", "images_per_class", "inner_steps", "inner_epochs", "inner_lr"]
    assert [list(summary.settings) for summary in found] == [names] * 3
    assert [summary.settings["inner_lr"] for summary in found] == [0.02, 0.1, 0.02]


def test_steps_beyond_the_last_do_not_count(folder: Folder) -> None:
    trial = spec()
    folder.trial(trial)
    rows = {("distilled", "as_distilled", step): [(0, step / 10), (1, step / 10)] for step in (0, 2, 4, 8)}
    folder.evals(trial, "as_distilled", 0, rows)
    (summary,) = summarise(folder.directory)
    assert (summary.test.mean, summary.test.n) == (pytest.approx(0.4), 2)


def test_parts_of_an_earlier_evaluation(folder: Folder) -> None:
    """Groups of 1 first, of 2 then: group 2 and 3 of the earlier evaluation are still there."""
    trial = spec()
    folder.trial(trial)
    key = ("distilled", "as_distilled", 4)
    for group in (2, 3):
        old = folder.evals(trial, "as_distilled", group, {key: [(group, 0.1)]})
        os.utime(old, (1, 1))
    folder.evals(trial, "as_distilled", 0, {key: [(0, 0.5), (1, 0.6)]})
    folder.evals(trial, "as_distilled", 1, {key: [(2, 0.7), (3, 0.8)]})
    (every,) = summarise(folder.directory)
    assert (every.test.n, every.test.mean) == (4, pytest.approx(0.65))


def test_a_baseline_tuned_anew_replaces_the_old_row(folder: Folder) -> None:
    trial = spec()
    folder.trial(trial)
    rows = {("kmeans", "as_distilled_tuned", 60): [(0, 0.1)]}
    os.utime(folder.evals(trial, "as_distilled", 5, rows), (1, 1))
    folder.evals(trial, "as_distilled", 0, {("kmeans", "as_distilled_tuned", 100): [(0, 0.2)]})
    (summary,) = summarise(folder.directory)
    assert summary.baselines["as_distilled_tuned"]["kmeans"].mean == pytest.approx(0.2)


def test_networks_of_another_law_are_left_out(folder: Folder) -> None:
    trial = spec()
    folder.evaluated(trial)
    folder.evals(trial, "as_distilled", 7, {("distilled", "as_distilled", 4): [(0, 0.0)]}, init_law="kaiming")
    (summary,) = summarise(folder.directory)
    assert (summary.test.n, summary.test.mean) == (4, pytest.approx(0.6 + 0.01 * (4 + 9 + 16 + 25) / 4))


def test_torn_parts_are_left_out_and_named(folder: Folder) -> None:
    first, second = spec(), spec(seed=1)
    folder.evaluated(first)
    folder.evaluated(second)
    torn_trial = folder.directory.trials_part(second.trial_id)
    torn_evals = folder.directory.evals_part(first.trial_id, "as_distilled", "xavier", 1)
    for path in (torn_trial, torn_evals):
        path.write_bytes(path.read_bytes()[:-40])
    named: list[Path] = []
    (summary,) = summarise(folder.directory, on_torn=named.append)
    assert set(named) == {torn_trial, torn_evals}
    assert (summary.trial_id, summary.test.n) == (first.trial_id, 2)
    with pytest.warns(UserWarning, match="is torn and left out"):
        summarise(folder.directory)


def test_without_evals_the_row_of_the_trial_counts(folder: Folder) -> None:
    folder.trial(spec(), test_accuracy_mean=0.25, test_accuracy_std=0.1, test_models=64, n_diverged=2)
    (summary,) = summarise(folder.directory)
    assert (summary.test.mean, summary.test.std, summary.test.n, summary.n_diverged) == (0.25, 0.1, 64, 2)
    assert summary.before is None and summary.baselines == {} and summary.differences == {}
    assert "25.0 ± 10.0" in text(summary_table([summary]))


def test_empty_folder(folder: Folder) -> None:
    assert summarise(folder.directory) == []
    assert summarise(folder.directory, ["0123456789"]) == []
    assert "No trial is done yet." in text(summary_table([]))


# ------------------------------------------------------------------------------------------ table


def test_table_shows_every_number_in_its_line(folder: Folder) -> None:
    fixed, free = spec(init="fixed"), spec()
    folder.evaluated(fixed)
    folder.evaluated(free)
    shown = text(summary_table(summarise(folder.directory, [fixed.trial_id, free.trial_id])))
    lines = shown.splitlines()
    starts = {line.split()[0]: number for number, line in enumerate(lines) if line.strip()}
    own, tuned, heldout = lines[starts[fixed.trial_id] :][:3]
    assert own.split()[1:7] == ["fixed", "2", "2", "2", "own", "74.0"]
    assert tuned.split()[0] == "tuned"
    assert heldout.split()[:3] == ["4", "random", "63.5"]
    row = lines[starts[free.trial_id]]
    mean = 100 * (0.6 + 0.01 * (4 + 9 + 16 + 25) / 4)
    assert f"{mean:.1f} ± " in row and "90.0" in row and "71.5 ± 1.3" in row
    assert "standard deviation over held-out networks" in shown


@pytest.mark.parametrize("width", [60, 80, 100, 120, 140, 160])
def test_table_fits_and_cuts_nothing(folder: Folder, width: int) -> None:
    trials = [spec(inner_lr=lr, init=init) for lr in (0.02, 0.1) for init in ("fixed", "random")]
    for trial in trials:
        folder.evaluated(trial)
    shown = text(summary_table(summarise(folder.directory), width), width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert all(trial.trial_id in shown for trial in trials)
    assert "distilled" in shown and "90.0" in shown and ("71.5" in shown or width == 60)
    settings = shown.replace("\n", " ")
    assert "0.1" in settings and "0.02" in settings
    of_fixed, of_random = 4, 2  # own and its tuned baselines, the same on random networks
    above = 0 if width >= 140 else len(trials) * (2 if width == 60 else 1)
    lines = shown.splitlines()
    table = lines[: next(place for place, line in enumerate(lines) if line.startswith("Test accuracy"))]
    assert len(table) == 2 + above + 2 * (of_fixed + of_random), "a line is a line"


def test_where_there_is_no_room_for_all_baselines_the_table_says_which_are_left_out(folder: Folder) -> None:
    folder.evaluated(spec())
    folder.evaluated(spec(init="fixed"))
    found = summarise(folder.directory)
    at = {width: " ".join(text(summary_table(found, width), width).split()) for width in (54, 80)}
    assert "Left out" not in at[80] and "90.0" in at[80]
    assert "Left out because the window is too narrow: k-means, k-NN random." in at[54]
    assert "random real" not in at[54].partition("Left out")[2], "with which sets are compared: it stays"


def test_only_columns_that_are_there_are_explained(folder: Folder) -> None:
    """Of a sweep without a pool, with one baseline at the same steps; then with all."""
    trial = spec(init="random")
    folder.trial(trial)
    rows = {("distilled", "as_distilled", 4): [(0, 0.5), (1, 0.6)]}
    folder.evals(trial, "as_distilled", 0, {**rows, ("kmeans", "as_distilled", 4): [(0, 0.4), (1, 0.4)]})
    said = " ".join(text(summary_table(summarise(folder.directory))).split())
    assert "Baselines: as many images and steps, at the best rate. Gain:" in said
    assert not any(word in said for word in ("Before:", "k-NN:", "`own`", "`tuned`", "random real: over"))
    folder.evaluated(spec(init="fixed"))
    said = " ".join(text(summary_table(summarise(folder.directory))).split())
    assert all(word in said for word in ("k-NN:", "`own`", "`tuned`", "of random real: over"))


def test_numbers_of_a_trial_stand_below_its_settings_where_it_is_narrow(folder: Folder) -> None:
    fixed, free = spec(init="fixed"), spec(inner_lr=0.1)
    folder.evaluated(fixed)
    folder.evaluated(free)
    found = summarise(folder.directory, [fixed.trial_id, free.trial_id])
    lines = text(summary_table(found, 80), 80).splitlines()
    place = lines.index(f"{fixed.trial_id} fixed, images/class 2, steps 2, epochs 2, inner lr 0.02, 12 s")
    assert lines[place + 1].split()[:2] == ["own", "74.0"]
    assert [line.split()[0] for line in lines[place + 2 : place + 5]] == ["tuned", "4", "tuned"]
    assert (
        lines[place + 5] == f"{free.trial_id} random, images/class 2, steps 2, epochs 2, inner lr 0.1, 12 s"
    )
    assert lines[place + 6].split()[:2] == ["4", "random"]


def test_a_stopped_trial_has_a_line_that_says_so(folder: Folder) -> None:
    done, stopped = spec(), spec(inner_lr=0.1)
    folder.evaluated(done)
    assert "scheduler" not in text(summary_table(summarise(folder.directory)))
    folder.stopped(stopped)
    found = summarise(folder.directory, [done.trial_id, stopped.trial_id])
    assert (found[1].stopped_at, found[1].test, found[1].n_diverged) == (20, None, 0)
    for width in (160, 100):
        shown = text(summary_table(found, width), width)
        lines = shown.splitlines()
        place = next(i for i, line in enumerate(lines) if line.startswith(stopped.trial_id))
        row = lines[place if width == 160 else place + 1]
        assert "stopped 20" in row and "–" in row and "±" not in row
        assert "stopped N: by the scheduler, after N outer steps" in " ".join(shown.split())


def test_not_measured_is_a_dash(folder: Folder) -> None:
    first, second = spec(), spec(seed=1)
    folder.evaluated(first)
    folder.trial(second)
    folder.evals(second, "as_distilled", 0, {("distilled", "as_distilled", 4): [(0, 0.5), (1, 0.7)]})
    lines = text(summary_table(summarise(folder.directory))).splitlines()
    (row,) = [line for line in lines if line.startswith(second.trial_id)]
    assert row.split().count("–") == 5  # four sources of the other trial, and the gain
    assert f"60.0 ± {100 * math.sqrt(0.02):.1f}" in row
