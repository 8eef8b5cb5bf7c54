"""`best` and `compare`: chosen on validation, seeds and networks never pooled, differences paired."""

from __future__ import annotations

import re
import shutil
import statistics
from pathlib import Path

import pandas as pd
import pytest

from ddsweep.cli import main
from ddsweep.report.answers import answers, two_levels
from ddsweep.report.best import best_lines
from ddsweep.report.compare import compare_lines, pairs_of
from ddsweep.report.page.gather import gather
from ddsweep.report.page.write import page
from ddsweep.report.summary import summarise
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.reader import Results, load_results
from ddsweep.results.statistics import mean_std_ci
from tests.conftest import imported_by_command
from tests.report.conftest import SWEEP, Folder, spec
from tests.report.test_report import attacks


def measured(folder: Folder, seed: int, lr: float, score: float, accuracies: list[float]) -> str:
    """A trial with these test accuracies of its networks, and random real images 10 points below them."""
    trial = spec(init="random", inner_lr=lr, seed=seed)
    told = {"test_accuracy_mean": statistics.fmean(accuracies), "test_models": len(accuracies)}
    folder.trial(trial, val_score=score, **told)
    rows = {
        ("distilled", "as_distilled", 0): [(i, 0.1) for i in range(len(accuracies))],
        ("distilled", "as_distilled", 4): list(enumerate(accuracies)),
        ("random_real", "as_distilled", 4): [(i, a - 0.1 - 0.01 * i) for i, a in enumerate(accuracies)],
    }
    folder.evals(trial, "as_distilled", 0, rows)
    return trial.trial_id


@pytest.fixture
def sweep(folder: Folder) -> Folder:
    folder.asked()
    measured(folder, 0, 0.02, 0.9, [0.5, 0.6])
    measured(folder, 1, 0.02, 0.6, [0.6, 0.7])
    # Better on validation by the mean of its seeds, and worse on test.
    measured(folder, 0, 0.1, 0.8, [0.40, 0.44])
    measured(folder, 1, 0.1, 0.8, [0.50, 0.52])
    return folder


def read(folder: Folder) -> Results:
    return load_results(folder.directory.root, all_trials=True)


@pytest.mark.parametrize("by", ["", ",", " , "])
def test_by_nothing_is_refused(sweep: Folder, by: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["best", str(sweep.directory.root), "--by", by])
    assert ended.value.code == 1 and "--by: name a setting at least" in capsys.readouterr().err


def test_chosen_by_validation_over_seeds_and_never_by_test(sweep: Folder) -> None:
    (answer,) = answers(read(sweep))
    assert answer.settings["inner_lr"] == 0.1 and answer.among == 2 and answer.val_score == 0.8
    # Computed again by hand: two levels.
    means = [0.42, 0.51]
    mean, std, ci95 = mean_std_ci(means)
    assert answer.test.mean == pytest.approx(mean) and answer.test.std_seeds == pytest.approx(std)
    assert ci95 is not None
    networks = mean_std_ci([0.45, 0.48])[2]  # of both seeds
    assert networks is not None
    assert answer.test.ci95 == pytest.approx((ci95**2 + networks**2) ** 0.5)
    spreads = [statistics.stdev([0.40, 0.44]), statistics.stdev([0.50, 0.52])]
    assert answer.test.std_networks == pytest.approx((sum(s * s for s in spreads) / 2) ** 0.5)
    assert (answer.test.seeds, answer.test.networks) == (2, 2)
    gain = answer.gains["random_real", "as_distilled"]
    # It is the same for both seeds, and 10 and 11 points on the two networks.
    assert gain.mean == pytest.approx(0.105)
    assert gain.ci95 == pytest.approx(mean_std_ci([0.10, 0.11])[2])


def test_one_seed_has_its_interval_over_networks(folder: Folder) -> None:
    folder.asked()
    measured(folder, 0, 0.02, 0.5, [0.5, 0.6, 0.9])
    (answer,) = answers(read(folder))
    assert answer.test.ci95 == pytest.approx(mean_std_ci([0.5, 0.6, 0.9])[2])
    assert answer.test.std_seeds is None and answer.among == 1


def test_a_setting_of_which_a_seed_was_stopped_is_not_chosen(sweep: Folder) -> None:
    measured(sweep, 0, 0.5, 0.99, [0.9, 0.9])
    sweep.stopped(spec(init="random", inner_lr=0.5, seed=1))
    (answer,) = answers(read(sweep))
    assert answer.settings["inner_lr"] == 0.1 and answer.unfinished == 1


def test_a_setting_of_which_a_seed_failed_is_not_chosen(
    sweep: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed trial has no row in `trials`: the sweep file tells its setting."""
    sweep.asked(SWEEP.replace("init: [fixed, random]", "init: [random]") + "seeds: 2\n")
    lucky = spec(init="random", inner_lr=0.1, seed=1)
    sweep.directory.trials_part(lucky.trial_id).unlink()
    sweep.failure(lucky)
    with pytest.raises(SystemExit):
        main(["best", str(sweep.directory.root)])
    said = capsys.readouterr().out
    assert "inner lr 0.02" in said and "1 setting left out: a seed stopped, failed or not done" in said


def running(folder: Folder, *done: tuple[int, float, float]) -> list[str]:
    """What `best` says of two rates with two seeds each, of which these (seed, rate, score) are done."""
    trials = [spec(init="random", inner_lr=lr, seed=seed) for lr in (0.02, 0.1) for seed in (0, 1)]
    for seed, lr, score in done:
        measured(folder, seed, lr, score, [0.5, 0.6])
    return best_lines(read(folder), asked=trials)


def test_a_setting_of_which_a_seed_is_still_to_come_is_not_chosen(folder: Folder) -> None:
    """Its one seed may be a lucky one."""
    said = "\n".join(running(folder, (0, 0.02, 0.5), (1, 0.02, 0.5), (0, 0.1, 0.9)))
    assert "inner lr 0.02" in said and "2 seeds x 2 networks" in said
    assert "1 setting left out: a seed stopped, failed or not done" in said


def test_what_has_not_begun_is_not_counted(folder: Folder) -> None:
    said = "\n".join(running(folder, (0, 0.02, 0.5), (1, 0.02, 0.5)))
    assert "the only setting" in said and "left out" not in said


def test_where_no_setting_is_done_the_best_so_far_is_shown_as_such(folder: Folder) -> None:
    said = "\n".join(running(folder, (0, 0.02, 0.5), (1, 0.1, 0.9)))
    assert "best of 2 settings, validation 90.0: inner lr 0.1" in said
    assert "no setting is done for all of its seeds" in said and "left out" not in said


def test_where_no_setting_is_done_more_seeds_come_first(folder: Folder) -> None:
    for seed in (0, 1):
        measured(folder, seed, 0.02, 0.5, [0.5, 0.6])
    lucky = measured(folder, 0, 0.1, 0.9, [0.5, 0.6])
    trials = [spec(init="random", inner_lr=lr, seed=seed) for lr in (0.02, 0.1) for seed in (0, 1, 2)]
    (answer,) = answers(read(folder), asked=trials)
    assert lucky not in answer.trials and not answer.whole and answer.unfinished == 1


@pytest.mark.parametrize("rates", [[0.02, 0.1], [0.1, 0.02]])
def test_of_equal_scores_the_first_of_the_sweep_is_chosen(
    folder: Folder, rates: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    content = SWEEP.replace("[fixed, random]", "[random]").replace("[0.02, 0.1]", str(rates))
    folder.asked(content + "seeds: 2\n")
    # The same mean, added up in another order.
    for lr, scores in ((0.02, (0.1, 0.7)), (0.1, (0.7, 0.1))):
        for seed, score in enumerate(scores):
            measured(folder, seed, lr, score, [0.5, 0.6])
    with pytest.raises(SystemExit):
        main(["best", str(folder.directory.root)])
    said = capsys.readouterr().out
    assert f": inner lr {rates[0]}\n" in said
    assert "as good on validation images: 1 other setting" in said


def test_without_the_sweep_file_the_first_id_is_chosen_of_equal_scores(folder: Folder) -> None:
    ids = [measured(folder, 0, lr, 0.5, [0.5, 0.6]) for lr in (0.02, 0.1, 0.3, 0.5)]
    (answer,) = answers(read(folder))
    assert answer.trials == (min(ids),) and answer.equals == 3


def test_settings_that_the_best_method_lacks_are_not_told(folder: Folder) -> None:
    for lr in (0.02, 0.1):
        measured(folder, 0, lr, 0.5, [0.5, 0.6])
    matched = spec(init="random", method="distribution_matching")
    folder.evaluated(matched)
    folder.trial(matched, val_score=0.9)
    folder.asked()
    said = "\n".join(best_lines(read(folder)))
    assert "best of 3 settings, validation 90.0: distribution_matching\n" in said
    card = page(gather([folder.directory.root])).split('class="card"')[1].split("</article>")[0]
    assert "the best of 3 settings: method distribution_matching<" in card


def test_by_other_settings(sweep: Folder) -> None:
    found = answers(read(sweep), ["inner_lr"])
    assert [answer.kind for answer in found] == [{"inner_lr": 0.02}, {"inner_lr": 0.1}]


def test_two_levels_of_one_network_each() -> None:
    found = two_levels([{3: 0.5}, {4: 0.7}])  # known networks, of each seed its own
    assert found.std_networks is None and found.mean == pytest.approx(0.6)
    assert found.ci95 == pytest.approx(mean_std_ci([0.5, 0.7])[2])
    assert two_levels([{3: 0.5}]).ci95 is None


def test_more_seeds_make_no_surer_of_other_networks() -> None:
    """Networks differ and seeds do not."""
    values = {index: 0.5 + 0.1 * index for index in range(4)}
    assert two_levels([values] * 9).ci95 == pytest.approx(mean_std_ci(values.values())[2])


def test_a_known_network_is_compared_with_all_draws_of_its_nearest_neighbours(folder: Folder) -> None:
    """Which of them has the number of its seed means nothing."""
    folder.asked()
    for seed in (0, 7):
        trial = spec(init="fixed", seed=seed)
        folder.trial(trial, val_score=0.5)
        rows = {
            ("distilled", "as_distilled", 4): [(seed, 0.9)],
            ("knn_random", "nearest_neighbour", 0): [(0, 0.6), (1, 0.7), (2, 0.8)],
            ("knn_kmeans", "nearest_neighbour", 0): [(None, 0.75)],
        }
        folder.evals(trial, "as_distilled", 0, rows)
    (answer,) = answers(read(folder))
    assert answer.gains["knn_random", "nearest_neighbour"].mean == pytest.approx(0.2)
    assert answer.gains["knn_kmeans", "nearest_neighbour"].mean == pytest.approx(0.15)


def test_the_command_says_it_in_words(sweep: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["best", str(sweep.directory.root)])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "46.5 ± 2.2 [± 60.3], 2 seeds x 2 networks" in said
    assert "best of 2 settings, validation 80.0: inner lr 0.1" in said
    assert "+10.5 [± 6.4] over random real" in said
    assert "mind: two seeds" in said and "2 networks are few" in said
    for arguments, message in (
        (["best", str(sweep.directory.root), "--by", "inner_lrr"], "--by: inner_lrr: no such setting"),
        (["best", str(sweep.directory.root.parent)], "no results of a sweep"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1 and message in capsys.readouterr().err


def test_nothing_done_yet(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.asked()
    with pytest.raises(SystemExit) as ended:
        main(["best", str(folder.directory.root)])
    assert ended.value.code == 1 and "no trial is done and evaluated yet" in capsys.readouterr().err


def other(tmp_path: Path, name: str) -> Folder:
    directory = SweepDirectory(tmp_path / name)
    directory.create()
    made = Folder(directory)
    made.asked()
    return made


def test_networks_that_diverged_as_tuned_are_told(folder: Folder) -> None:
    folder.asked()
    trial = spec(init="random", inner_lr=0.02)
    folder.trial(trial, val_score=0.5)
    folder.evals(trial, "as_distilled", 0, {("distilled", "as_distilled", 4): [(0, 0.2), (1, 0.3)]})
    tuned = {("distilled", "as_distilled_tuned", 20): [(0, 0.6), (1, 0.1)]}
    folder.evals(trial, "as_distilled", 1, tuned, diverged=True)
    (answer,) = answers(read(folder))
    assert answer.tuned is not None and answer.n_diverged == 2


def test_sweeps_are_compared_on_the_same_networks(tmp_path: Path) -> None:
    first, second = other(tmp_path, "a"), other(tmp_path, "b")
    for seed in (0, 1):
        measured(first, seed, 0.02, 0.5, [0.5, 0.6, 0.7])
        measured(second, seed, 0.1, 0.5, [0.55, 0.67, 0.73, 0.9])
    apart, pairs = pairs_of(read(first), read(second))
    assert apart == ["inner_lr"] and len(pairs) == 2
    for pair in pairs:
        assert pair.first["seed"] == pair.second["seed"]
        assert pair.moved is not None and pair.moved.n == 3
        mean, _, ci95 = mean_std_ci([0.05, 0.07, 0.03])
        assert pair.moved.mean == pytest.approx(mean) and pair.moved.ci95 == pytest.approx(ci95)
    said = "\n".join(compare_lines(("a", "b"), read(first), read(second)))
    assert "inner_lr: 0.02 -> 0.1" in said and "+5.0 ± 5.0 on the same 3 networks" in said
    assert "60.0 on 3 networks -> 71.2 on 4 networks, +5.0" in said
    # Both pairs have the same three networks, which are no other networks for there being two pairs.
    assert "all pairs: +5.0 ± 5.0 (95 % interval, for other pairs and other networks; 2 pairs)" in said


def test_pairs_on_networks_of_their_own_say_nothing_of_other_networks(tmp_path: Path) -> None:
    first, second = other(tmp_path, "a"), other(tmp_path, "b")
    for place, init in enumerate(("fixed", "random")):
        for folder, lr, gained in ((first, 0.02, 0.0), (second, 0.1, 0.1 + 0.1 * place)):
            trial = spec(init=init, inner_lr=lr)
            folder.trial(trial, val_score=0.5)
            rows = {("distilled", "as_distilled", 4): [(network, 0.5 + gained) for network in range(2)]}
            folder.evals(trial, "as_distilled", 0, rows)
    said = "\n".join(compare_lines(("a", "b"), read(first), read(second)))
    assert "all pairs: +15.0 ± 63.5 (95 % interval, for other pairs; 2 pairs)" in said


def test_settings_that_differ_in_every_trial_are_told_and_why_nothing_is_paired(
    tmp_path: Path,
) -> None:
    first, second = other(tmp_path, "a"), other(tmp_path, "b")
    measured(first, 0, 0.02, 0.5, [0.5, 0.6])
    for lr in (0.1, 0.2):
        measured(second, 0, lr, 0.5, [0.55, 0.67])
    said = "\n".join(compare_lines(("a", "b"), read(first), read(second)))
    assert re.search(r"  inner_lr: 0\.02 -> (0\.1, 0\.2|0\.2, 0\.1)\n", said)
    assert "0 pairs of 1 and 2 trials:" in said
    assert said.endswith("a pair is one trial of each that are alike in all other settings")


def test_of_many_values_of_a_setting_a_few_are_told(tmp_path: Path) -> None:
    first, second = other(tmp_path, "a"), other(tmp_path, "b")
    for n in range(20):
        measured(first, 0, 0.01 + n / 1e4, 0.5, [0.5, 0.6])
        measured(second, 0, 0.1 + n / 1e4, 0.5, [0.5, 0.6])
    (line,) = [line for line in compare_lines(("a", "b"), read(first), read(second)) if "inner_lr" in line]
    assert len(line) < 120 and line.count("(20)") == 2


def test_attacks_are_compared_by_the_fraction_fooled(tmp_path: Path) -> None:
    first, second = other(tmp_path, "a"), other(tmp_path, "b")
    for folder, lr, success in ((first, 0.02, [0.2, 0.3]), (second, 0.1, [0.7, 0.9])):
        trial = spec(init="random", objective="attack", attack_class=0, target_class=1, inner_lr=lr)
        told = {
            "test_attack_success_mean": sum(success) / 2,
            "test_attack_success_std": 0.1,
            "test_models": 2,
        }
        folder.trial(trial, val_score=0.5, **told)
        for network, value in enumerate(success):
            rows = {("distilled", "as_distilled", 4): [(network, 0.9 - value)]}
            folder.evals(trial, "as_distilled", network, rows, attack_success=value)
    said = "\n".join(compare_lines(("a", "b"), read(first), read(second)))
    assert "fooled in %, 1 pair" in said and "25.0 ± 10.0 -> 80.0 ± 10.0, +55.0" in said


def test_the_best_attack_tells_what_is_left_of_other_classes(folder: Folder) -> None:
    attacks(folder)
    said = "\n".join(best_lines(read(folder)))
    assert "\n  accuracy on the other classes: 78.0 ± 2.0 [± 5.0], 1 seed x 3 networks\n" in said
    assert (
        "baselines have the rate that is best for accuracy on the rewritten labels, not for fooling" in said
    )


def test_a_measurement_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    first, second = other(tmp_path, "a"), other(tmp_path, "b")
    measured(first, 0, 0.02, 0.5, [0.5, 0.6, 0.7])
    measured(second, 0, 0.1, 0.5, [0.55, 0.67, 0.73])
    _, (once,) = pairs_of(read(first), read(second))
    for path in list(second.directory.parts("evals").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace(".parquet", "-copy.parquet")))
    _, (twice,) = pairs_of(read(first), read(second))
    assert twice.moved is not None and twice.moved.n == 3 and twice.moved == once.moved


def test_other_networks_are_not_paired(tmp_path: Path) -> None:
    first, second = other(tmp_path, "a"), other(tmp_path, "b")
    measured(first, 0, 0.02, 0.5, [0.5, 0.6])
    trial = spec(init="random", inner_lr=0.02, init_law="kaiming")
    second.trial(trial, val_score=0.5)
    second.evals(trial, "as_distilled", 0, {("distilled", "as_distilled", 4): [(0, 0.7), (1, 0.8)]})
    apart, (pair,) = pairs_of(read(first), read(second))
    assert apart == ["init_law"] and pair.moved is None


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"dataset_fingerprint": ("a", "b")}, "(other data: not paired)"),
        ({"dataset_fingerprint": ("a", None)}, "on the same 2 networks"),
        ({"pool_networks": ("a", "b"), "pool_train": (4, 4)}, "(other networks: not paired)"),
        # As many of the same pool as were asked for: the held-out ones are the same.
        ({"pool_networks": ("a", "b"), "pool_train": (4, 8)}, "on the same 2 networks"),
    ],
)
def test_what_has_the_same_name_and_another_content_is_not_paired(
    tmp_path: Path, columns: dict[str, tuple[object, object]], said: str
) -> None:
    folders = other(tmp_path, "a"), other(tmp_path, "b")
    for side, folder in enumerate(folders):
        trial = spec(init="random", inner_lr=0.02)
        folder.trial(trial, val_score=0.5, **{name: both[side] for name, both in columns.items()})
        folder.evals(trial, "as_distilled", 0, {("distilled", "as_distilled", 4): [(0, 0.7), (1, 0.8)]})
    assert said in "\n".join(compare_lines(("a", "b"), *map(read, folders)))


@pytest.mark.parametrize("differs", ["init", "pool"])
def test_known_networks_and_those_of_another_recipe_are_others(tmp_path: Path, differs: str) -> None:
    first, second = other(tmp_path, "a"), other(tmp_path, "b")
    for folder, here in ((first, False), (second, True)):
        trial = spec(init="fixed" if differs == "init" and here else "random", inner_lr=0.02)
        pool = {"pool": "p", "pool_recipe": "later" if here else "earlier"} if differs == "pool" else {}
        folder.trial(trial, val_score=0.5, **pool)
        rows = {("distilled", "as_distilled", 4): [(0, 0.7), (1, 0.8)]}
        folder.evals(trial, "as_distilled", 0, rows, pool=pool.get("pool"))
    _, (pair,) = pairs_of(read(first), read(second))
    assert pair.moved is None


def test_a_set_without_learned_rates_is_compared_with_baselines_as_it_was_tuned(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.asked()
    trial = spec(init="random", inner_lr=0.02)
    folder.trial(trial, val_score=0.5)
    rows = {
        ("distilled", "as_distilled", 4): [(0, 0.2), (1, 0.3)],
        ("distilled", "as_distilled_tuned", 20): [(0, 0.6), (1, 0.8)],
        ("random_real", "as_distilled", 4): [(0, 0.1), (1, 0.1)],
        ("random_real", "as_distilled_tuned", 100): [(0, 0.5), (1, 0.6)],
    }
    folder.evals(trial, "as_distilled", 0, rows)
    (answer,) = answers(read(folder))
    assert answer.test.mean == pytest.approx(0.25)
    assert answer.tuned is not None and answer.tuned.mean == pytest.approx(0.7)
    assert answer.gains["random_real", "as_distilled"].mean == pytest.approx(0.15)
    assert answer.gains["random_real", "as_distilled_tuned"].mean == pytest.approx(0.15)
    card = page(gather([folder.directory.root])).split('class="card"')[1].split("</article>")[0]
    assert "70.0 ± 14.1 % at its best rate and number of steps, 95 % interval" in card
    assert "with steps tuned: 70.0 ± 14.1 [± 127.1], 1 seed x 2 networks, +15.0" in "\n".join(
        best_lines(read(folder))
    )
    (summary,) = summarise(folder.directory)
    assert summary.tuned["as_distilled"].mean == pytest.approx(0.7)
    assert summary.differences["as_distilled_tuned"].mean == pytest.approx(0.15)
    with pytest.raises(SystemExit):
        main(["show", trial.trial_id, str(folder.directory.root)])
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["20,", "tuned", "70.0", "±", "14.1", "(n", "=", "2)"] in said
    (tuned,) = (line for line in said if line[:3] == ["random", "real", "tuned"])
    assert "+15.0" in tuned


def test_without_the_sweep_file_a_setting_with_fewer_seeds_is_not_chosen(
    sweep: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed trial has no row, so that its setting is not known."""
    lucky = spec(init="random", inner_lr=0.1, seed=1)
    sweep.directory.trials_part(lucky.trial_id).unlink()
    sweep.failure(lucky)
    sweep.asked(SWEEP.replace("dataset: digits", "dataset: {source: folder, path: gone}"))
    with pytest.raises(SystemExit):
        main(["best", str(sweep.directory.root)])
    said = capsys.readouterr()
    assert "trials that failed, or are not there yet, are not known: only trials with files" in said.err
    assert "inner lr 0.02" in said.out and "1 setting left out" in said.out


def test_a_trial_whose_evaluation_is_lost_is_not_chosen(sweep: Folder) -> None:
    for seed in (0, 1):
        lost = spec(init="random", inner_lr=0.1, seed=seed).trial_id
        for path in sweep.directory.evals_parts(lost):
            path.unlink()
    (answer,) = answers(read(sweep))
    assert answer.settings["inner_lr"] == 0.02 and answer.unfinished == 1


def test_neither_torch_nor_ray(sweep: Folder) -> None:
    root = sweep.directory.root
    for arguments in (["best", root], ["compare", root, root]):
        assert imported_by_command(*arguments, slow=("torch", "ray")) == []


def test_torn_parts_are_left_out_and_named(sweep: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    path = sweep.directory.trials_part(spec(init="random", inner_lr=0.1, seed=0).trial_id)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SystemExit) as ended:
        main(["best", str(sweep.directory.root)])
    said = capsys.readouterr()
    assert ended.value.code == 0 and f"{path}: torn, left out" in said.err
    assert "the only setting" in said.out and "1 setting left out" in said.out


def test_frames_stay_as_they_were(sweep: Folder) -> None:
    results = read(sweep)
    before = results.trials.copy()
    answers(results)
    pd.testing.assert_frame_equal(results.trials, before)
