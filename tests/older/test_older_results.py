"""What version 0.1.0 left behind is read, evaluated further and gone on with.

``results_0_1_0`` was made by that version, by ``pretrain`` and ``run`` of the sweeps whose resolved files it
holds: `small` is done, `part_done` was drained at steps 700 and 860 of 2000, and ASHA ended two trials of
`stopped`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import ddsweep
from ddsweep import DistilledSet
from ddsweep.catalog import EvaluationSpec, TrialSpec
from ddsweep.core.recipe import Recipe
from ddsweep.data.files import resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.evaluation import evaluate_unit, finish, missing_units, settled, trial_is_done, trial_is_stopped
from ddsweep.pools.file import load_pool, resolve_pool
from ddsweep.pools.store import open_pool
from ddsweep.pools.train import missing_groups
from ddsweep.results.artifacts import load_tensors
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.spec import SweepSpec, expand, load_sweep
from ddsweep.trial import Progress, distil_trial, read_distilled
from ddsweep.trial_plan import TrialSettings

OLDER = Path(__file__).parent / "results_0_1_0"
ENDED_WITH = {"21e7f06410": (0.04656, 1.16382, 1.3054), "2722c43ec6": (0.03802, 1.16538, 1.4425)}
"""Mean and standard deviation of the images, and the rate, with which 0.1.0 itself ended the trials of
`part_done` when it went on with them."""


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLDER, tmp_path / "results"))


def sweep_of(
    older: Path, name: str, *overrides: str
) -> tuple[SweepSpec, tuple[TrialSpec, ...], SweepDirectory]:
    directory = SweepDirectory(older / name)
    sweep = load_sweep(directory.sweep_file, overrides)

    def dataset(value: object) -> ddsweep.catalog.DatasetSpec:
        return resolve_dataset(value, None)

    plan = expand(sweep, dataset, lambda value: resolve_pool(value, directory.pools, dataset))
    directory.create()
    return sweep, plan.trials, directory


def splits_of(trial: TrialSpec) -> Splits:
    return load_splits(
        trial.dataset, None, validation_fraction=trial.validation_fraction, split_seed=trial.split_seed
    )


def evaluate(trial: TrialSpec, evaluation: EvaluationSpec, directory: SweepDirectory) -> int:
    """Compute what is missing; how many units that were."""
    units = missing_units(trial, evaluation, directory)
    for unit in units:
        evaluate_unit(trial, unit, evaluation, splits_of(trial), directory, torch.device("cpu"))
    assert finish(trial, evaluation, directory, directory.root.name)
    return len(units)


def test_nothing_is_left_to_do_and_tables_are_read(older: Path) -> None:
    sweep, trials, directory = sweep_of(older, "small")
    results = ddsweep.load_results(directory.root)
    assert len(trials) == len(results.trials) == 5, "the ids of then are the ids of now"
    assert len(results.evals) == 144
    for trial in trials:
        assert trial_is_done(trial, sweep.evaluate.spec(), directory)
        distilled = read_distilled(trial, directory)
        row = results.trials.set_index("trial_id").loc[trial.trial_id]
        assert distilled.sha256 == row["distilled_sha256"]
        assert distilled.recipe == Recipe.of(trial), "its file has none"
        assert torch.isfinite(ddsweep.apply(distilled, first_network(distilled, older))(images()).sum())


def first_network(distilled: DistilledSet, older: Path) -> torch.nn.Module:
    if distilled.spec.pool is None:
        return distilled.network()
    from safetensors.torch import load_file

    from ddsweep.core.networks import build_network

    spec = distilled.spec
    module = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes).to_empty(device="cpu")
    module.load_state_dict(load_file(older / "pools" / "tiny" / "networks" / "heldout-00000.safetensors"))
    return module


def images() -> torch.Tensor:
    return torch.zeros(2, 1, 8, 8)


def test_its_pool_is_whole_and_trained_no_more(older: Path) -> None:
    directory = PoolDirectory(older / "pools" / "tiny")
    recipe = load_pool(directory.pool_file).recipe(lambda value: resolve_dataset(value, None))
    assert missing_groups(recipe, directory) == []
    pool = open_pool(recipe.spec("tiny"), older / "pools")
    assert len(pool.sums) == recipe.train + recipe.heldout


def test_rows_come_out_as_they_were(older: Path) -> None:
    sweep, trials, directory = sweep_of(older, "small")
    key = ["source", "protocol", "model_seed", "inner_step"]
    for trial in trials:
        before = pd.concat([pd.read_parquet(path) for path in directory.evals_parts(trial.trial_id)])
        for path in directory.evals_parts(trial.trial_id):
            path.unlink()
        evaluate(trial, sweep.evaluate.spec(), directory)
        after = pd.concat([pd.read_parquet(path) for path in directory.evals_parts(trial.trial_id)])
        both = before.merge(after, on=key, suffixes=("", "_after"), how="outer", validate="1:1")
        assert len(both) == len(before) == len(after)
        # Another kind of processor rounds differently; one of 360 test images may then be called otherwise.
        assert (both["accuracy"] - both["accuracy_after"]).abs().max() < 0.01
        pd.testing.assert_series_equal(
            both["loss"], both["loss_after"], check_names=False, rtol=1e-3, atol=1e-5
        )


def test_more_networks_are_added_to_those_there(older: Path) -> None:
    sweep, trials, directory = sweep_of(older, "small")
    more = replace(sweep.evaluate.spec(), networks=6)
    before = ddsweep.load_results(directory.root).evals
    for trial in trials:
        if trial.pool is None:  # its pool has four held-out networks
            assert evaluate(trial, more, directory) == 1, "the third group of two networks"
    after = ddsweep.load_results(directory.root)
    rows = after.evals.merge(before, how="inner")
    assert len(rows) == len(before), "no row of before is gone or changed"
    fresh = after.trials[after.trials["init"] == "random"]
    assert set(fresh["test_models"]) == {6}


def test_less_is_asked_and_all_of_it_stays(older: Path) -> None:
    sweep, trials, directory = sweep_of(older, "small")
    asked = sweep.evaluate.spec()
    less = [
        replace(asked, networks=3),
        replace(asked, baselines=asked.baselines[:1], inner_steps_beyond=()),
        replace(asked, group_size=3, protocols=("as_distilled",), baselines=()),
    ]
    files = {path: path.read_bytes() for path in directory.parts("evals").iterdir()}
    before = ddsweep.load_results(directory.root).trials
    for trial in trials:
        for evaluation in less:
            assert missing_units(trial, evaluation, directory) == []
            assert settled(trial, evaluation, directory, "small")
    assert {path: path.read_bytes() for path in directory.parts("evals").iterdir()} == files
    after = ddsweep.load_results(directory.root).trials
    assert after["gain_mean"].notna().all(), "a column that 0.1.0 did not have"
    same = before.dropna(axis="columns", how="all").columns.drop("evaluation_id")
    pd.testing.assert_frame_equal(after[same], before[same])


@pytest.mark.parametrize(
    "trial_id", [pytest.param("21e7f06410"), pytest.param("2722c43ec6", marks=pytest.mark.slow)]
)
def test_drained_trials_go_on_from_their_checkpoints(older: Path, trial_id: str) -> None:
    sweep, trials, directory = sweep_of(older, "part_done")
    (trial,) = (trial for trial in trials if trial.trial_id == trial_id)
    before, _ = load_tensors(directory.checkpoint(trial_id))
    start = float(before["learned.images"].std())
    seen: list[Progress] = []
    assert distil_trial(trial, splits_of(trial), directory, TrialSettings(), on_progress=seen.append)
    assert seen[0].outer_step > 700, "it went on, and did not begin again"
    distilled = read_distilled(trial, directory)
    found = (float(distilled.images.mean()), float(distilled.images.std()), float(distilled.rates[0]))
    # Loosely: last digits differ between machines, and from 0.2.0 on, and grow over hundreds of steps.
    assert found == pytest.approx(ENDED_WITH[trial_id], abs=0.05)
    ended = ENDED_WITH[trial_id][1]
    assert abs(found[1] - ended) < 0.3 * abs(start - ended), "it went most of the way that was left"
    evaluate(trial, sweep.evaluate.spec(), directory)
    assert list(ddsweep.load_results(directory.root).trials["status"]) == ["done"]


def test_stopped_trials_stay_stopped(older: Path) -> None:
    sweep, trials, directory = sweep_of(older, "stopped")
    evaluation = sweep.evaluate.spec()
    done = [trial for trial in trials if trial_is_done(trial, evaluation, directory)]
    stopped = [trial for trial in trials if trial_is_stopped(trial, directory)]
    assert (len(done), len(stopped), len(trials)) == (2, 2, 4)
    trial = stopped[0]
    assert distil_trial(trial, splits_of(trial), directory, TrialSettings()), "without a scheduler it goes on"
