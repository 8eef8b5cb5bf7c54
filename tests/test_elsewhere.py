"""A trial that another sweep in the same folder has finished is taken over, where that is safe."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pandas.testing import assert_frame_equal
from rich.console import Console

from ddsweep import load_results
from ddsweep.catalog import DATASETS, EvaluationSpec, TrialSpec
from ddsweep.data.load import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.evaluation import evaluate_unit, finish, missing_units, record_stop, settled, take_over
from ddsweep.results.artifacts import save_tensors
from ddsweep.results.elsewhere import other_sweeps
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_whole, write_part_table
from ddsweep.spec import SweepSpec
from ddsweep.sweep import runner
from ddsweep.sweep.drain import Drain
from ddsweep.sweep.observe import Board
from ddsweep.trial import distil_trial, is_distilled
from ddsweep.trial_plan import TrialSettings

BASE: dict[str, Any] = {
    **{"network": "convnet(depth=1,width=4,norm=none)", "images_per_class": 1, "inner_steps": 1},
    **{"outer_steps": 1, "models_per_step": 1, "real_batch": 32, "selection_networks": 1},
}
SPEC = TrialSpec(DATASETS["digits"], **BASE)
EVALUATION = EvaluationSpec(networks=2, group_size=2, baselines=())
SWEEP = SweepSpec(
    name="new",
    base={"dataset": "digits", **BASE},
    evaluate={"networks": 2, "group_size": 2, "baselines": []},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """A folder of results with one sweep, ``old``, whose only trial is done. Not to be written to."""
    root = tmp_path_factory.mktemp("finished") / "results"
    old = SweepDirectory(root / "old")
    old.create()
    old.sweep_file.write_text("name: old\n")
    assert distil_trial(SPEC, splits, old, TrialSettings())
    evaluate(old, splits, EVALUATION)
    return root


def evaluate(directory: SweepDirectory, splits: Splits, evaluation: EvaluationSpec) -> None:
    for unit in missing_units(SPEC, evaluation, directory):
        evaluate_unit(SPEC, unit, evaluation, splits, directory, torch.device("cpu"))
    assert finish(SPEC, evaluation, directory, directory.root.name)


@pytest.fixture
def old(finished: Path, tmp_path: Path) -> SweepDirectory:
    return SweepDirectory(shutil.copytree(finished, tmp_path / "results") / "old")


@pytest.fixture
def new(old: SweepDirectory) -> SweepDirectory:
    directory = SweepDirectory(old.root.parent / "new")
    directory.create()
    return directory


def rows(directory: SweepDirectory) -> list[Any]:
    found = load_results(directory.root)
    return [found.trials.drop(columns="sweep"), found.evals, found.history]


def test_a_finished_trial_is_taken_over_with_all_its_rows(
    old: SweepDirectory, new: SweepDirectory, splits: Splits
) -> None:
    before = {path: path.read_bytes() for path in old.root.rglob("*") if path.is_file()}
    taken = take_over(SPEC, splits.fingerprint, new, other_sweeps(new))
    assert taken is not None and taken.source.root == old.root
    assert is_distilled(SPEC, new) and new.grid(SPEC.trial_id).exists()
    assert settled(SPEC, EVALUATION, new, "new", paths=taken.evals), "nothing is left to compute"
    for mine, theirs in zip(rows(new), rows(old), strict=True):
        assert_frame_equal(mine, theirs)
    assert load_results(new.root).trials["sweep"].tolist() == ["new"]
    assert {path: path.read_bytes() for path in old.root.rglob("*") if path.is_file()} == before


def test_what_is_asked_beyond_is_computed_and_the_rest_is_not(
    old: SweepDirectory, new: SweepDirectory, splits: Splits
) -> None:
    more = replace(EVALUATION, networks=3)
    assert take_over(SPEC, splits.fingerprint, new, other_sweeps(new))
    assert [unit.indices for unit in missing_units(SPEC, more, new)] == [(2,)]
    evaluate(new, splits, more)
    assert load_results(new.root).trials["test_models"].tolist() == [3]


def without_row(old: SweepDirectory) -> None:
    old.trials_part(SPEC.trial_id).unlink()


def without_set(old: SweepDirectory) -> None:
    old.distilled(SPEC.trial_id).unlink()


def torn_set(old: SweepDirectory) -> None:
    path = old.distilled(SPEC.trial_id)
    path.write_bytes(path.read_bytes()[:-5])


def torn_row(old: SweepDirectory) -> None:
    path = old.trials_part(SPEC.trial_id)
    path.write_bytes(path.read_bytes()[:-5])


def torn_history(old: SweepDirectory) -> None:
    path = old.history_part(SPEC.trial_id)
    path.write_bytes(path.read_bytes()[:-5])


def another_set(old: SweepDirectory) -> None:
    path = old.distilled(SPEC.trial_id)
    new = replace(DistilledSet.load(path), rates=torch.tensor([0.5]))
    save_tensors(path, new.tensors(), new.header(), old.temporary)


def set_of_another_trial(old: SweepDirectory) -> None:
    path = old.distilled(SPEC.trial_id)
    new = replace(DistilledSet.load(path), spec=replace(SPEC, seed=7))
    save_tensors(path, new.tensors(), new.header(), old.temporary)


def stopped(old: SweepDirectory) -> None:
    record_stop(SPEC, old, "old")


def older_meaning_of_settings(old: SweepDirectory) -> None:
    path = old.trials_part(SPEC.trial_id)
    table, metadata = read_whole(path)
    (row,) = table.to_pylist()
    changed = pa.Table.from_pylist([{**row, "spec_version": row["spec_version"] - 1}], schema=table.schema)
    write_part_table(path, changed, old.temporary, metadata)


@pytest.mark.parametrize(
    "change",
    [
        without_row,
        without_set,
        torn_set,
        torn_row,
        torn_history,
        another_set,
        set_of_another_trial,
        stopped,
        older_meaning_of_settings,
    ],
)
def test_what_is_not_whole_or_not_the_same_is_left_alone(
    change: Callable[[SweepDirectory], None], old: SweepDirectory, new: SweepDirectory, splits: Splits
) -> None:
    change(old)
    assert take_over(SPEC, splits.fingerprint, new, other_sweeps(new)) is None
    assert not new.distilled(SPEC.trial_id).exists()


def test_other_data_are_another_trial(old: SweepDirectory, new: SweepDirectory) -> None:
    assert take_over(SPEC, "of other images", new, other_sweeps(new)) is None


def test_a_torn_part_is_not_taken_and_one_that_is_there_stays(
    old: SweepDirectory, new: SweepDirectory, splits: Splits
) -> None:
    """As if a run was killed in the middle, and its set removed: its evaluation went further."""
    more = replace(EVALUATION, networks=4)
    shutil.copytree(old.root, new.root, dirs_exist_ok=True)
    evaluate(new, splits, more)
    new.distilled(SPEC.trial_id).unlink()
    new.trials_part(SPEC.trial_id).unlink()
    before = {path.name: path.read_bytes() for path in new.evals_parts(SPEC.trial_id)}
    assert len(before) == 2
    assert take_over(SPEC, splits.fingerprint, new, other_sweeps(new))
    assert {path.name: path.read_bytes() for path in new.evals_parts(SPEC.trial_id)} == before
    evals = old.evals_parts(SPEC.trial_id)[0]
    evals.write_bytes(evals.read_bytes()[:-5])
    for path in new.evals_parts(SPEC.trial_id):
        path.unlink()
    new.distilled(SPEC.trial_id).unlink()
    taken = take_over(SPEC, splits.fingerprint, new, other_sweeps(new))
    assert taken is not None and taken.evals == ()


def test_a_network_that_was_judged_here_in_another_group_counts_once(
    old: SweepDirectory, new: SweepDirectory, splits: Splits
) -> None:
    """The set here is torn, and its evaluation was in groups of one: the groups of the other sweep have the
    same networks."""
    shutil.copytree(old.root, new.root, dirs_exist_ok=True)
    for path in new.evals_parts(SPEC.trial_id):
        path.unlink()
    new.trials_part(SPEC.trial_id).unlink()
    evaluate(new, splits, replace(EVALUATION, group_size=1))
    before = {path.name: path.read_bytes() for path in new.evals_parts(SPEC.trial_id)}
    assert len(before) == 2
    new.distilled(SPEC.trial_id).unlink()
    taken = take_over(SPEC, splits.fingerprint, new, other_sweeps(new))
    assert taken is not None and sorted(path.name for path in taken.evals) == sorted(before)
    assert settled(SPEC, EVALUATION, new, "new", paths=taken.evals)
    found = load_results(new.root)
    assert found.trials["test_models"].tolist() == [2]
    assert not found.evals.duplicated(["source", "protocol", "model_seed", "inner_step"]).any()


def test_rows_that_are_there_twice_count_once(
    old: SweepDirectory, new: SweepDirectory, splits: Splits
) -> None:
    """As an earlier version left them."""
    alone = SweepDirectory(new.root.parent / "alone")
    shutil.copytree(old.root, alone.root)
    for path in alone.evals_parts(SPEC.trial_id):
        path.unlink()
    evaluate(alone, splits, replace(EVALUATION, group_size=1))
    shutil.copytree(old.root, new.root, dirs_exist_ok=True)
    for path in alone.evals_parts(SPEC.trial_id):
        shutil.copy(path, new.parts("evals") / f"{path.stem}of1.parquet")
    assert finish(SPEC, EVALUATION, new, "new")
    ours, theirs = (load_results(sweep.root).trials for sweep in (new, old))
    columns = ["test_models", "test_accuracy_mean", "test_accuracy_std", "test_accuracy_ci95"]
    assert_frame_equal(ours[columns], theirs[columns])


def test_a_sweep_of_finished_trials_needs_no_ray(
    old: SweepDirectory, new: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a renamed one gets its name into the rows."""
    monkeypatch.setattr(runner, "ray_session", lambda *drain, **how: pytest.fail("a Ray was started"))
    said = io.StringIO()

    def run(sweep: SweepSpec, directory: SweepDirectory) -> int:
        board = Board(Console(file=said, width=200), {SPEC.trial_id: "it"}, [SPEC])
        request = runner.SweepRequest(sweep, [SPEC], directory, None, {SPEC.trial_id: 1.0}, {})
        with Drain() as drain:
            return runner.run_sweep(request, board, drain).done

    assert run(SWEEP, new) == 1
    assert "1 trial taken over from sweep old, which has finished the same" in said.getvalue()
    assert load_results(new.root).trials["sweep"].tolist() == ["new"]
    moved = SweepDirectory(old.root.rename(old.root.parent / "renamed"))
    assert run(SWEEP.model_copy(update={"name": "renamed"}), moved) == 1
    assert load_results(moved.root).trials["sweep"].tolist() == ["renamed"]
