"""The plan as a table, the settings that it shows, and numbers as text."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddsweep.catalog import EvaluationSpec, Protocol
from ddsweep.cost import CostEstimate
from ddsweep.report.console import report_console
from ddsweep.report.formats import duration, percent, plain, size
from ddsweep.report.plan_table import evaluation_line, plan_table, protocol_lines
from ddsweep.report.settings import NAMES, changed, setting_headings, settings_of, telling, varying
from ddsweep.spec import AshaSpec, Plan

from .conftest import Folder, spec, text

HOUR = CostEstimate(1e12, 3600.0, 2_500_000)


def test_states_costs_and_totals() -> None:
    trials = (spec(), spec(seed=1), spec(seed=2))
    dropped = (("inner_steps=3", "images_per_class: 2 does not divide"),)
    shown = text(
        plan_table(
            Plan(trials, dropped),
            {trials[0].trial_id: "done", trials[1].trial_id: "missing"},
            {trial.trial_id: HOUR for trial in trials},
            threads=2,
        )
    )
    words = [line.split() for line in shown.splitlines()]
    assert words[0] == ["trial", "seed", "state", "about", "memory"]
    assert words[1] == [trials[0].trial_id, "0", "done", "1", "h", "00", "min", "2.5", "MB"]
    assert words[3][:3] == [trials[2].trial_id, "2", "missing"]
    flat = " ".join(shown.split())
    assert "3 trials, 1 done; the other 2 take about 4.0 CPU-hours" in flat
    assert "1 dropped as impossible (skip_invalid): inner_steps=3: images_per_class" in flat


def test_what_is_only_to_be_evaluated_costs_no_distillation() -> None:
    trials = (spec(), spec(seed=1), spec(seed=2))
    costs = {trial.trial_id: HOUR for trial in trials}
    states = {trials[0].trial_id: "done", trials[1].trial_id: "to evaluate", trials[2].trial_id: "missing"}
    lines = text(plan_table(Plan(trials), states, costs)).splitlines()
    assert lines[2].split()[2:] == ["to", "evaluate", "–", "2.5", "MB"]
    assert lines[4] == ("3 trials, 1 done, 1 to evaluate; the other one takes about 1.0 CPU-hours to distil")
    states = dict.fromkeys(costs, "to evaluate")
    assert text(plan_table(Plan(trials), states, costs)).endswith("\n3 trials, 0 done, 3 to evaluate")
    alone = text(plan_table(Plan(trials[:1], assumed=("inner_steps: 1, for ...",)), {}, costs))
    assert "1 trial, 0 done; it takes about" in alone and alone.endswith("\ninner_steps: 1, for ...")


def test_the_evaluation_of_what_is_left_has_its_line() -> None:
    trials, asked = (spec(), spec(seed=1)), EvaluationSpec(networks=2, baselines=())
    states = {trials[0].trial_id: "done"}
    assert evaluation_line(trials, asked, states) == "evaluation of 1 trial: under 1 CPU-minute"
    line = evaluation_line(trials, EvaluationSpec(networks=100_000), {}, AshaSpec())
    assert line is not None
    assert re.fullmatch(r"evaluation of 2 trials: at most about [\d.]+ CPU-minutes, baselines included", line)
    assert evaluation_line(trials, asked, dict.fromkeys((t.trial_id for t in trials), "stopped")) is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.9, "it takes under 1 CPU-minute to"),
        (70, "it takes about 1 CPU-minute to"),
        (600, "it takes about 10 CPU-minutes to"),
    ],
)
def test_totals_below_a_minute_are_not_called_one(seconds: float, said: str) -> None:
    trial = spec()
    cost = replace(HOUR, seconds_cpu=seconds)
    assert said in text(plan_table(Plan((trial,)), {}, {trial.trial_id: cost}))


def test_of_too_many_trials_the_first_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddsweep.report.plan_table.MOST_LISTED", 2)
    trials = tuple(spec(seed=seed) for seed in range(5))
    lines = text(plan_table(Plan(trials), {}, {trial.trial_id: HOUR for trial in trials})).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["trial", trials[0].trial_id, trials[1].trial_id, "and"]
    assert lines[3] == "and 3 more"
    assert lines[4].startswith("5 trials, 0 done; the other 5 take about 5.0 CPU-hours")


@pytest.mark.parametrize(("width", "shown"), [(160, 3), (60, 2), (50, 1), (44, 0)])
def test_settings_give_way_where_it_is_narrow_and_no_number_is_broken(width: int, shown: int) -> None:
    trials = tuple(spec(init=init, inner_lr=0.123456, outer_lr=0.654321) for init in ("fixed", "random"))
    trials += (spec(init="fixed"),)
    table = plan_table(Plan(trials), {}, {trial.trial_id: HOUR for trial in trials})
    lines = text(table, width).splitlines()
    rows = [line.split() for line in lines if line.startswith(trials[0].trial_id)]
    settings = ["fixed", "0.123456", "0.654321"][:shown]
    assert rows == [[trials[0].trial_id, *settings, *["missing", "1", "h", "00", "min", "2.5", "MB"]]]
    assert ("…" in lines[0] + lines[1]) == (shown < 3)
    assert all(len(line) <= width for line in lines)


def test_nothing_left_and_unknown_costs() -> None:
    trial = spec()
    assert "nothing is left to do" in " ".join(
        text(plan_table(Plan((trial,)), {trial.trial_id: "done"}, {})).split()
    )
    shown = text(plan_table(Plan((trial,)), {}, {}))
    assert "missing" in shown and "CPU" not in shown


def test_a_scheduler_says_where_it_stops_and_what_it_compares() -> None:
    """Nobody should learn only at the end that a compared setting has no data."""
    trials = tuple(spec(inner_lr=lr, init=init) for init in ("fixed", "random") for lr in (0.1, 0.2))
    states = {trials[0].trial_id: "stopped", trials[1].trial_id: "done"}
    costs = {trial.trial_id: HOUR for trial in trials}
    shown = text(
        plan_table(Plan(trials), states, costs, scheduler=AshaSpec(grace=20, reduction=2, strata=("init",)))
    )
    assert "4 trials, 1 done, 1 stopped; the other 2 take at most about 2.0 CPU-hours" in shown
    assert (
        "asha: after outer steps 20, 40 settings may be stopped, by their val_score\n"
        "  compared (each combination keeps its best): init\n"
        "  thinned out: inner_lr\n"
        "  2 settings in each of 2 strata, 1 seed each"
    ) in shown
    (line,) = [line for line in shown.splitlines() if line.startswith(trials[0].trial_id)]
    assert "stopped" in line
    trials = (*trials, *(spec(inner_lr=lr, seed=1) for lr in (0.1, 0.2)))
    every = text(plan_table(Plan(trials), {}, costs, scheduler=AshaSpec(grace=20, strata=())))
    assert "keeps its best): –\n  thinned out: init, inner_lr\n" in every
    assert (
        "4 settings in 1 stratum, 1 to 2 seeds each; the seeds of a setting go on or stop together" in every
    )


def test_samples_that_repeat_are_counted_and_named() -> None:
    trial = spec()
    shown = text(plan_table(Plan((trial,), (), ("outer_steps=3", "outer_steps=3")), {}, {}))
    assert "2 left out: an earlier sample is the same trial:\n  outer_steps=3" in shown
    many = tuple(f"outer_steps={i}" for i in range(5))
    shown = text(plan_table(Plan((trial,), (), many), {}, {}))
    assert "5 left out: an earlier sample is the same trial, among them:" in shown
    assert "outer_steps=2" in shown and "outer_steps=3" not in shown


def test_evaluations_that_are_left_out_are_counted_and_named() -> None:
    trial = spec()
    one = ("order=shuffled of images_per_class=1", "order: shuffled needs inner_steps of at least 2")
    shown = text(plan_table(Plan((trial,), unjudged=(one,)), {}, {}))
    assert "1 evaluation left out as impossible (skip_invalid):\n" in shown
    assert f"  {one[0]}: {one[1]}" in shown
    shown = text(plan_table(Plan((trial,), unjudged=(one,) * 9), {}, {}))
    assert "9 evaluations left out as impossible (skip_invalid), among them:" in shown
    assert shown.count(one[0]) == 3


def test_models_per_step_varies_only_of_its_own_accord() -> None:
    fixed, free, other = (settings_of(t) for t in (spec(init="fixed"), spec(), spec(models_per_step=2)))
    assert varying([fixed, free]) == ["init"]
    assert varying([free, other]) == ["models_per_step"]
    assert varying([fixed, free, other]) == ["init", "models_per_step"]
    assert varying([free], always=("init",)) == ["init"]
    assert varying([]) == []


def test_a_setting_varies_among_the_trials_whose_method_has_it() -> None:
    one, other = (settings_of(spec(inner_lr=lr)) for lr in (0.02, 0.1))
    matched = settings_of(spec(method="distribution_matching"))
    assert varying([one, matched]) == ["method"]
    assert varying([one, other, matched]) == ["method", "inner_lr"]
    told = telling([one, matched], ["method", "inner_lr", "real_per_class"])
    assert told == [["method", "inner_lr"], ["method", "real_per_class"]]
    assert set(changed(matched)) == {*changed(one), "method"}


def test_changed_settings() -> None:
    assert changed(settings_of(spec(init="fixed", seed=4)))[:3] == ["dataset", "network", "init"]
    assert "models_per_step" not in changed(settings_of(spec(init="fixed")))
    whole = settings_of(spec())
    # The default network is written in full by a trial, as it is for this size of image.
    assert "network" not in changed({**whole, "network": "convnet(depth=2,width=128,norm=instance)"})


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (4.24, "4.2 s"),
        (37.4, "37 s"),
        (125, "2 min 05 s"),
        (11220, "3 h 07 min"),
        (187300, "2 d 04 h"),
    ],
)
def test_duration(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_formats() -> None:
    assert (percent(0.541, 0.066), percent(1.0), percent(None)) == ("54.1 ± 6.6", "100.0", "–")
    assert (percent(0.25, sign=True), percent(-0.25, 0.01, sign=True)) == ("+25.0", "-25.0 ± 1.0")
    assert (plain(1e-3), plain(None), plain(True), plain("a"), plain(3)) == ("0.001", "–", "yes", "a", "3")
    assert (size(12), size(7800), size(2.5e9), size(3e15), size(None)) == (
        *("12 B", "7.8 kB", "2.5 GB"),
        *("3000.0 TB", "–"),
    )


def test_a_pipe_gets_wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert report_console(io.StringIO()).width == 160
    monkeypatch.setenv("COLUMNS", "120")
    assert report_console(io.StringIO()).width == 120


def test_reports_import_nothing_heavy(folder: Folder, tmp_path: Path) -> None:
    folder.asked()
    folder.evaluated(spec())
    folder.evaluated(spec(init="fixed"))
    code = f"""
import sys
from pathlib import Path
from typing import Any
from ddsweep.catalog import DATASETS
from ddsweep.cost import estimate
from ddsweep.report.console import report_console
from ddsweep.report.plan_table import plan_table
from ddsweep.spec import expand, load_sweep
from ddsweep.results.layout import SweepDirectory
directory = SweepDirectory(Path({str(folder.directory.root)!r}))
console, resolve = report_console(sys.stderr), DATASETS.__getitem__
plan = expand(load_sweep(directory.sweep_file), resolve)
console.print(plan_table(plan, {{}}, {{t.trial_id: estimate(t, 1) for t in plan.trials}}))
assert 'pyarrow' not in sys.modules
from ddsweep.report.status import status
from ddsweep.report.status_table import status_table
from ddsweep.report.sweep_file import asked_of
console.print(status_table(status(directory, asked_of(directory, resolve))))
assert 'scipy' not in sys.modules
from ddsweep.report.show import show
from ddsweep.report.summary import summarise
from ddsweep.report.summary_table import summary_table
console.print(summary_table(summarise(directory)))
console.print(show(directory, {spec().trial_id!r}, resolve))
print(*sorted({{'torch', 'ray', 'pandas', 'matplotlib', 'sklearn'}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
    assert "distilled" in done.stderr


def test_trials_that_each_change_a_setting_of_their_own_get_one_column() -> None:
    """Nine varying settings: each trial shows the values that most do not have."""
    own: list[dict[str, Any]] = [
        {},
        {"trim": 0.25},
        {"ema": 0.9},
        {"labels": "soft"},
        {"clip_median": 2.0},
        {"outer_lr": 0.03},
        {"outer_steps": 9},
        {"inner_lr": 0.5, "inner_optimizer": "momentum"},
        {"real_batch": 32},
    ]
    trials = tuple(spec(**changes) for changes in own)
    settings = [settings_of(trial) for trial in trials]
    names = varying(settings)
    assert sorted(names) == sorted(name for changes in own for name in changes)
    assert telling(settings, names) == [[n for n in NAMES if n in changes] for changes in own]
    shown = text(plan_table(Plan(trials), {}, {})).splitlines()
    assert shown[0].split() == ["trial", "settings", "unlike", "most", "state", "about", "memory"]
    assert shown[1].split()[1] == "–"
    assert "labels soft" in shown[4] and "inner lr 0.5, inner optimizer momentum" in shown[8]
    few = varying(settings[:3])
    assert telling(settings[:3], few) == [["trim", "ema"]] * 3
    # Of a few trials no value is usual: all are told.
    assert telling(settings[:2], names) == [names] * 2
    assert setting_headings(settings[:2], names) == ["settings"]


def test_a_protocol_of_ones_own_is_told_with_its_steps_and_its_cost() -> None:
    field = Protocol(name="field", inner_lr=0.01, inner_epochs=301, inner_batch=16)
    asked = EvaluationSpec(networks=8, protocols=("as_distilled", field, Protocol(network="lenet")))
    trials = (spec(), spec(images_per_class=4), spec(seed=1))
    lines = protocol_lines(trials, asked, {trials[2].trial_id: "done"})
    assert lines == [
        "field: 602 to 903 steps of training and 2 tests for each held-out network; for 2 trials under 1 "
        "CPU-minute, tests not counted"
    ], "the other one is impossible for them"
    assert protocol_lines(trials, asked, dict.fromkeys([t.trial_id for t in trials], "done")) == []
