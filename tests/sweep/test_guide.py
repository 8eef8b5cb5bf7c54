"""Guided searches over files: what is written down, and what `plan`, `status` and `prune` make of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from ddsweep.catalog import TrialSpec
from ddsweep.errors import ResultsError, UserError
from ddsweep.report.page.gather import gather
from ddsweep.report.sweep_file import asked_of
from ddsweep.results.current import current_ids, write_sweep_file
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import write_part
from ddsweep.results.proposals import read_proposals, write_proposals
from ddsweep.results.reader import load_results
from ddsweep.results.schemas import HISTORY
from ddsweep.spec import Plan, Proposed, SweepSpec, expand, load_sweep, resolved_yaml
from ddsweep.sweep.guide import Guide
from tests.conftest import Run
from tests.report.conftest import Folder, resolve

SWEEP = """\
name: small
base: {dataset: digits, network: convnet(width=8), images_per_class: 2, outer_steps: 60}
search:
  kind: tpe
  samples: 6
  startup: 3
  space: {inner_lr: {log_uniform: [0.001, 1]}, image_init: {choice: [noise, real]}}
evaluate: {networks: 4, group_size: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    directory = SweepDirectory(tmp_path / "results" / "small")
    directory.create()
    return Folder(directory)


def sweep_of(folder: Folder, text: str, *overrides: str) -> SweepSpec:
    file = folder.directory.root.parents[1] / "small.yaml"
    file.write_text(text)
    return load_sweep(file, overrides)


def guide_of(folder: Folder, text: str = SWEEP, *overrides: str) -> Guide:
    """As a run begins."""
    sweep = sweep_of(folder, text, *overrides)

    def expanded(proposed: Proposed) -> Plan:
        return expand(sweep, resolve, proposed=proposed)

    guide = Guide(sweep, folder.directory, expanded)
    ids = [trial.trial_id for trial in guide.plan.trials]
    write_sweep_file(folder.directory, resolved_yaml(sweep).encode(), ids)
    return guide


def ended(
    folder: Folder, trials: Sequence[TrialSpec], *scores: float, steps: Sequence[int] = (20, 40, 60)
) -> None:
    """As distilling leaves trials, with their ``scores`` along the way."""
    for trial in trials:
        rows = [
            {"trial_id": trial.trial_id, "outer_step": step, "outer_loss": 1.0, "val_score": score}
            for step, score in zip(steps, scores or [0.5], strict=False)
        ]
        path = folder.directory.history_part(trial.trial_id)
        write_part(path, rows, HISTORY, folder.directory.temporary)
        folder.distilled(trial)


def rates(trials: Sequence[TrialSpec]) -> list[float]:
    return [trial.inner_lr for trial in trials]


def test_a_run_begins_with_the_draws_of_random_search(folder: Folder) -> None:
    """Each is written down, and more samples and other kinds keep them."""
    guide = guide_of(folder)
    random = expand(sweep_of(folder, SWEEP, "search.kind=random", "search.startup=null"), resolve)
    assert list(guide.plan.trials) == list(random.trials[:3])
    assert (guide.plan.to_propose, guide.left) == (3, True)
    ((_, samples),) = read_proposals(folder.directory).items()
    assert [sample["inner_lr"] for sample in samples] == rates(random.trials[:3])


def test_a_proposal_is_written_down_before_its_trials_are_handed_out(folder: Folder) -> None:
    guide = guide_of(folder)
    ended(folder, guide.plan.trials)
    (trial,) = guide.propose()
    ((key, samples),) = read_proposals(folder.directory).items()
    assert samples[3] == {"inner_lr": trial.inner_lr, "image_init": trial.image_init}
    assert trial in guide.plan.trials
    asked = asked_of(folder.directory, resolve)
    assert asked.trials == guide.plan.trials and asked.to_propose == 2, "`status` and `prune` know it"
    assert current_ids(folder.directory) == {trial.trial_id for trial in guide.plan.trials}
    text = (folder.directory.proposals / f"{key}.json").read_text()
    assert json.loads(text)["settings"]["outer_steps"] == 60
    assert len(text.splitlines()) == 7, "a line for each sample, for people"


def test_a_search_goes_on_where_it_was(folder: Folder) -> None:
    """After a kill, and on another machine: from the files alone, to the same proposal."""
    guide = guide_of(folder)
    ended(folder, guide.plan.trials)
    first = guide.propose()
    ended(folder, first, 0.7)
    at_once, after_a_kill = guide.propose(), None
    proposals = next(folder.directory.proposals.iterdir())
    lines = json.loads(proposals.read_text())
    write_proposals(folder.directory, proposals.stem, lines["settings"], lines["samples"][:-1])  # not yet
    later = guide_of(folder)
    assert list(later.plan.trials) == [*guide.plan.trials[:4]]
    after_a_kill = later.propose()
    assert after_a_kill == at_once


def test_it_ends_with_the_last_sample_and_goes_on_when_some_are_added(folder: Folder) -> None:
    guide = guide_of(folder)
    while trials := guide.propose():
        ended(folder, trials)
    assert len(guide.plan.trials) == 6 and not guide.left and not guide.plan.to_propose
    more = guide_of(folder, SWEEP, "search.samples=8")
    assert list(more.plan.trials) == list(guide.plan.trials) and more.plan.to_propose == 2
    assert len(more.propose()) == 1
    fewer = guide_of(folder, SWEEP, "search.samples=4")
    assert list(fewer.plan.trials) == list(guide.plan.trials[:4]) and not fewer.left


def test_the_scores_guide(folder: Folder) -> None:
    """The best rates are those around 0.01: half of the proposals, and not a third, are in that decade."""
    guide = guide_of(folder, SWEEP, "search.samples=30", "search.startup=10")

    def end(trials: Sequence[TrialSpec]) -> None:
        for trial in trials:
            ended(folder, [trial], 0.9 if 0.003 < trial.inner_lr < 0.03 else 0.1)

    end(guide.plan.trials)
    proposed = []
    while trials := guide.propose():
        end(trials)
        proposed += rates(trials)
    assert len(proposed) == 20 and sum(0.003 < rate < 0.03 for rate in proposed) >= 10


def test_the_score_of_a_sample_is_the_mean_over_its_seeds(folder: Folder) -> None:
    guide = guide_of(folder, SWEEP + "seeds: 2\n")
    assert (len(guide.plan.trials), guide.plan.to_propose) == (6, 6)
    (search,) = guide.plan.searches
    first, second, _ = search.samples
    one, two = guide.plan.trials[:2]
    ended(folder, [one], 0.4)
    assert guide.tried(first).score is None, "one seed still runs"
    ended(folder, [two], 0.8)
    assert guide.tried(first).score == pytest.approx(0.6)
    ended(folder, [guide.plan.trials[2]], 0.8)
    folder.failure(guide.plan.trials[3])
    assert guide.tried(second).score == pytest.approx(0.4), "a failed seed counts 0"
    assert len(guide.propose()) == 2, "a proposal runs with every seed"
    (search,) = guide.plan.searches
    for trial in guide.plan.trials[4:6]:
        folder.failure(trial)
    tried = guide.tried(search.samples[2])
    assert (tried.score, tried.stopped_at) == (0, 0), "all failed: worse than any that a scheduler stopped"
    (search,) = guide.plan.searches
    ended(folder, guide.plan.trials[6:8], 0.0)
    tried = guide.tried(search.samples[3])
    assert (tried.score, tried.stopped_at) == (0, None), "bad, but it came to its end"


@pytest.mark.parametrize(("keep", "score"), [("last", 0.3), ("best", 0.6)])
def test_the_score_of_a_trial_is_that_of_the_set_which_it_keeps(
    folder: Folder, keep: str, score: float
) -> None:
    guide = guide_of(folder, SWEEP, f"keep={keep}", "outer_steps=60", "validate_every=20")
    ended(folder, guide.plan.trials[:1], 0.2, 0.9, 0.6, 0.3, steps=(20, 30, 40, 60))  # at 30 it met a rung
    (search,) = guide.plan.searches
    assert guide.tried(search.samples[0]).score == pytest.approx(score)


def test_a_stopped_sample_counts_with_its_score_at_that_step(folder: Folder) -> None:
    scheduled = SWEEP + "scheduler: {grace: 20}\n"
    guide = guide_of(folder, scheduled)
    (search,) = guide.plan.searches
    folder.stopped(guide.plan.trials[0], step=20)
    tried = guide.tried(search.samples[0])
    assert (tried.score, tried.stopped_at) == (pytest.approx(0.2), 20)
    folder.stopped(guide.plan.trials[1], step=20)
    assert guide_of(folder).tried(search.samples[1]).score is None, "without a scheduler it goes on"


def test_each_combination_of_points_and_grid_has_a_search_of_its_own(folder: Folder) -> None:
    text = SWEEP.replace(
        "search:", "grid: {images_per_class: [1, 2]}\npoints: [{init: fixed}, {init: random}]\nsearch:"
    )
    guide = guide_of(folder, text)
    assert len(guide.plan.searches) == 4 and guide.plan.to_propose == 12
    while trials := guide.propose():
        ended(folder, trials, 0.1 * trials[0].images_per_class)
    counts = [len(search.samples) for search in guide.plan.searches]
    assert counts == [6, 6, 6, 6]
    assert len({samples[-1]["inner_lr"] for samples in read_proposals(folder.directory).values()}) == 4


def test_another_base_is_another_search_and_comes_back(folder: Folder) -> None:
    guide = guide_of(folder)
    ended(folder, guide.plan.trials)
    guide.propose()
    other = guide_of(folder, SWEEP, "outer_steps=40")
    assert len(other.plan.trials) == 3 and len(read_proposals(folder.directory)) == 2
    assert guide_of(folder).plan.trials == guide.plan.trials


def test_a_seed_of_its_own_is_another_search(folder: Folder) -> None:
    """A sample of it has one trial, also where the seed is the default."""
    keys = {guide_of(folder, SWEEP, *more).plan.searches[0].key for more in ((), ("seed=0",), ("seed=1",))}
    assert len(keys) == 3


def test_a_default_that_is_written_down_changes_no_search(folder: Folder) -> None:
    guide = guide_of(folder)
    ended(folder, guide.plan.trials)
    guide.propose()
    written = guide_of(folder, SWEEP, "keep=last", "outer_lr_rates=null")
    assert written.plan.trials == guide.plan.trials


def test_a_search_of_an_earlier_version_is_found_again(folder: Folder) -> None:
    """Its key was made of all settings that the file gives."""
    settings = {**sweep_of(folder, SWEEP, "keep=last").base}
    text = json.dumps(settings, sort_keys=True, default=list)
    key = hashlib.sha256(text.encode()).hexdigest()[:10]
    values, elsewhere = ({"inner_lr": lr, "image_init": "real"} for lr in (0.5, 7.0))
    write_proposals(folder.directory, key, settings, [values, elsewhere])
    guide = guide_of(folder, SWEEP, "keep=last")
    (search,) = guide.plan.searches
    assert search.key != key and search.samples[0].values == values
    assert read_proposals(folder.directory)[search.key][:2] == [values, elsewhere], "also outside the space"


def test_a_wider_space_keeps_what_lies_in_it(folder: Folder) -> None:
    guide = guide_of(folder)
    ended(folder, guide.plan.trials)
    guide.propose()
    wider = guide_of(folder, SWEEP.replace("[0.001, 1]", "[0.0001, 1]"))
    assert wider.plan.trials == guide.plan.trials
    narrow = guide_of(folder, SWEEP.replace("[0.001, 1]", "[0.0001, 0.0002]"))
    assert not set(rates(narrow.plan.trials)) & set(rates(guide.plan.trials))
    assert guide_of(folder).plan.trials == guide.plan.trials, "the file keeps the others"


def test_impossible_samples_are_not_proposed(folder: Folder) -> None:
    """The draws at the start are refused as those of random search are."""
    text = SWEEP.replace("images_per_class: 2", "images_per_class: 6").replace(
        "{log_uniform: [0.001, 1]}", "{log_uniform: [0.001, 1]}, inner_steps: {integer: [1, 4]}"
    )
    guide = guide_of(folder, text + "skip_invalid: true\n", "search.samples=14", "search.startup=4")
    drawn = len(guide.plan.trials)
    assert drawn < 4 and guide.plan.dropped
    while guide.propose():
        pass
    assert len(guide.plan.trials) == drawn + 10


def test_that_no_sample_is_left_is_written_down_for_all_verbs(folder: Folder, ddsweep: Run) -> None:
    """Six numbers of steps are possible. It holds as long as space and number of samples do."""
    text = SWEEP.replace("images_per_class: 2", "images_per_class: 12").replace(
        "space: {inner_lr: {log_uniform: [0.001, 1]}, image_init: {choice: [noise, real]}}",
        "space: {inner_steps: {integer: [1, 30]}}",
    )
    settings = ("search.samples=20", "search.startup=10", "skip_invalid=true")
    guide = guide_of(folder, text, *settings)
    while guide.propose():
        pass
    assert sorted(trial.inner_steps for trial in guide.plan.trials) == [1, 2, 3, 4, 6, 12]
    assert guide.to_propose == 0 and not guide.left
    assert "1 search ended with" in guide.ended_early and "of 20 samples" in guide.ended_early
    sweep = sweep_of(folder, text, *settings)
    assert expand(sweep, resolve, proposed=read_proposals(folder.directory)).to_propose == 0
    for trial in guide.plan.trials:
        folder.evaluated(trial)
    assert "nothing is left to do" in ddsweep("status", folder.directory.root).stdout
    longer = sweep_of(folder, text, "search.samples=21", *settings[1:])
    assert expand(longer, resolve, proposed=read_proposals(folder.directory)).to_propose > 0
    again = guide_of(folder, text, *settings)
    assert again.left, "the next run looks again, for what was in the way may be gone"
    assert again.propose() == () and not again.left


def test_a_fault_that_passes_does_not_end_a_search_for_ever(folder: Folder) -> None:
    sweep = sweep_of(folder, SWEEP)
    broken = False

    def expanded(proposed: Proposed) -> Plan:
        known = sum(len(samples) for samples in proposed.values())
        if broken and known > 3 and sweep.search.no_more_marker not in next(iter(proposed.values())):
            raise UserError("models.py: it is being edited")
        return expand(sweep, resolve, proposed=proposed)

    guide = Guide(sweep, folder.directory, expanded)
    broken = True
    assert guide.propose() == () and guide.ended_early
    broken = False
    again = Guide(sweep, folder.directory, expanded)
    assert len(again.propose()) == 1 and again.left


def test_what_is_no_file_of_proposals_is_named(folder: Folder) -> None:
    guide_of(folder)
    (file,) = folder.directory.proposals.iterdir()
    for content in ("", "{", "[]", '{"samples": 3}', '{"samples": [3]}'):
        file.write_text(content)
        with pytest.raises(ResultsError, match="not a file of proposals"):
            read_proposals(folder.directory)
        asked = asked_of(folder.directory, resolve)
        assert asked.trials is None and str(file) in (asked.note or "")


def test_the_verbs_know_the_proposals(folder: Folder, ddsweep: Run) -> None:
    guide = guide_of(folder)
    ended(folder, guide.plan.trials)
    (trial,) = guide.propose()
    folder.history(trial)
    root = folder.directory.root
    file, results = root.parents[1] / "small.yaml", root.parent
    sweep_of(folder, SWEEP)

    said = ddsweep("plan", file, "--results", results).stdout
    assert trial.trial_id in said and "4 trials" in said and "3 to evaluate" in said
    assert "up to 2 more trials to be proposed by the search, under 1 CPU-minute" in said

    said = ddsweep("status", root).stdout
    assert "small: 4 trials, 3 distilled, 1 interrupted; up to 2 more to be proposed" in said

    assert "up to 2 more trials to be proposed by the search" in gather([root], resolve).sweeps[0].notes

    assert "nothing to remove" in ddsweep("prune", root).stdout
    assert trial.trial_id in set(load_results(root).history["trial_id"])
    fewer = guide_of(folder, SWEEP, "search.samples=3")
    assert trial not in fewer.plan.trials
    assert trial.trial_id in ddsweep("prune", root).stdout
    assert trial.trial_id not in set(load_results(root).history["trial_id"])


def test_a_finished_search_has_nothing_left_to_do(folder: Folder, ddsweep: Run) -> None:
    guide = guide_of(folder)
    while guide.propose():
        pass
    for trial in guide.plan.trials:
        folder.evaluated(trial)
    assert "nothing is left to do" in ddsweep("status", folder.directory.root).stdout
    guide_of(folder, SWEEP, "search.samples=7")
    assert "`ddsweep run` proposes the next trials" in ddsweep("status", folder.directory.root).stdout
