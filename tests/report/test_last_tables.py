"""What a run ends with: all of few trials, the best of each kind of many, and how to see the rest."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ddsweep.catalog import TrialSpec
from ddsweep.report.last_tables import FEW, best_of_each_kind, print_last_tables

from .conftest import EVALUATION, Folder, spec


def shown(folder: Folder, trials: list[TrialSpec], width: int = 80, *, everything: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_last_tables(console, folder.directory, trials, EVALUATION, everything=everything)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def many(folder: Folder) -> list[TrialSpec]:
    """Two kinds of trials, eight rates each; their scores rise with the rate, but for the last one."""
    trials = [spec(init=init, inner_lr=rate / 100) for init in ("fixed", "random") for rate in range(1, 9)]
    for place, trial in enumerate(trials):
        folder.evaluated(trial)
        folder.trial(trial, val_score=0.0 if place % 8 == 7 else 0.1 * (place % 8))
    return trials


def test_of_many_trials_the_best_of_each_kind_are_shown(folder: Folder, many: list[TrialSpec]) -> None:
    best = [many[6], many[14]]
    text = shown(folder, many)
    assert text.count("inner lr 0.07") == 2, "what the best have in common and the others have not"
    listed = [trial for trial in many if trial.trial_id in text]
    assert listed == best
    assert (
        f"16 trials came to an end; shown: best by val_score for each init. All of them: ddsweep eval "
        f"{folder.directory.root} --all\n"
    ) in text
    assert best_of_each_kind(folder.directory, many, lambda path: None) == (best, ["init"])


def test_the_best_of_many_trials_is_shown_with_all_that_varies(folder: Folder) -> None:
    """Eleven trials that each change a setting of their own: the only line is that of the best."""
    changes: list[dict[str, Any]] = [
        *({}, {"trim": 0.25}, {"ema": 0.9}, {"labels": "soft"}, {"clip_median": 2.0}, {"outer_lr": 0.03}),
        *({"outer_steps": 9}, {"inner_lr": 0.5}, {"inner_optimizer": "momentum"}, {"real_batch": 32}),
        {"models_per_step": 2},
    ]
    trials = [spec(**own) for own in changes]
    for place, trial in enumerate(trials):
        folder.evaluated(trial)
        folder.trial(trial, val_score=0.9 if place == 7 else 0.1)
    said = " ".join(shown(folder, trials).split())
    assert trials[7].trial_id in said and "inner lr 0.5" in said and "labels hard" in said


def test_seeds_are_not_chosen_among(folder: Folder) -> None:
    """The setting by the mean over its seeds, if they are all done; of these the first."""
    scores = {
        0.1: (0.4, 0.9),
        0.2: (0.7, 0.7),
        0.3: (0.1, 0.2),
        0.4: (0.3, 0.3),
        0.5: (0.2, 0.2),
        0.6: (0.8,),
    }
    trials = [spec(inner_lr=rate, seed=seed) for rate in scores for seed in (0, 1)]
    for trial in trials:
        of_seeds = scores[trial.inner_lr]
        if trial.seed < len(of_seeds):
            folder.evaluated(trial)
            folder.trial(trial, val_score=of_seeds[trial.seed])
    folder.failure(trials[-1])
    text = shown(folder, trials, 200)
    assert [trial for trial in trials if trial.trial_id in text] == [trials[2]]
    assert "11 trials came to an end; shown: best by val_score (mean over seeds), its first seed. " in text
    assert text.endswith(f" Over all seeds: ddsweep best {folder.directory.root}\n")


@pytest.mark.parametrize(("width", "most"), [(80, 40), (160, 30)])
def test_forty_trials_fit_a_screen(folder: Folder, width: int, most: int) -> None:
    trials = [spec(init=init, seed=seed) for init in ("fixed", "random") for seed in range(20)]
    for trial in trials:
        folder.evaluated(trial)
    assert len(shown(folder, trials, width).splitlines()) <= most
    assert len(shown(folder, trials, width, everything=True).splitlines()) > 100


def test_all_are_shown_on_demand_and_where_they_are_few(folder: Folder, many: list[TrialSpec]) -> None:
    text = shown(folder, many, everything=True)
    assert all(trial.trial_id in text for trial in many) and "came to an end" not in text
    few = many[:FEW]
    text = shown(folder, few)
    assert all(trial.trial_id in text for trial in few) and "came to an end" not in text


def test_what_is_not_done_is_never_the_best(folder: Folder, many: list[TrialSpec]) -> None:
    """A stopped trial was never evaluated; one without a score is behind all that have one."""
    stopped = spec(inner_lr=0.5)
    folder.stopped(stopped, step=99)
    alone = spec(images_per_class=4, inner_lr=0.5)
    folder.evaluated(alone)
    unscored = spec(images_per_class=4, inner_lr=0.6)
    folder.trial(unscored, val_score=None)
    found, names = best_of_each_kind(folder.directory, [*many, stopped, alone, unscored], lambda path: None)
    assert found == [many[6], many[14], alone]
    assert names == ["init", "images_per_class"]


def test_a_torn_row_is_named_once_and_left_out(folder: Folder, many: list[TrialSpec]) -> None:
    path = folder.directory.trials_part(many[6].trial_id)
    path.write_bytes(path.read_bytes()[:100])
    text = shown(folder, many)
    assert text.count("torn, left out; run the sweep again to redo it") == 1
    assert many[6].trial_id not in text.replace(str(path), "") and many[5].trial_id in text


def test_nothing_is_shown_where_nothing_came_to_an_end(folder: Folder) -> None:
    assert shown(folder, [spec()]) == ""


def test_the_folder_is_named_as_it_was_given(folder: Folder, many: list[TrialSpec]) -> None:
    assert f"ddsweep eval {Path(folder.directory.root)} --all" in shown(folder, many, 40)


def test_trials_over_different_numbers_of_networks_are_told_of(folder: Folder, many: list[TrialSpec]) -> None:
    """Also where it is not among those that are listed."""
    assert "different numbers" not in shown(folder, many)
    folder.trial(many[9], test_models=6, val_score=0.0)
    said = (
        "Test accuracies are over different numbers of held-out networks: 4 (7 trials), 6 (1 trial); with "
        "evaluate.networks=6 `ddsweep eval` brings all to 6.\n"
    )
    assert said in shown(folder, many) and said in shown(folder, many, everything=True)
