"""Evaluation: which rows a trial gets, and that only the question decides their content."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from pandas.testing import assert_frame_equal
from scipy import stats
from torch import nn

from ddsweep import baselines
from ddsweep.catalog import DATASETS, DEFAULT_BASELINES, EvaluationSpec, EvalUnit, TrialSpec
from ddsweep.core.images import normalise
from ddsweep.core.init import draw_network
from ddsweep.core.recipe import Recipe
from ddsweep.data.load import Splits, load_splits
from ddsweep.distilled import DistilledSet, apply
from ddsweep.errors import CheckpointError, DivergedError, UnreadableError
from ddsweep.evaluation import (
    evaluate_unit,
    finish,
    forget_stop,
    missing_units,
    record_stop,
    trial_is_done,
    trial_is_stopped,
    units,
)
from ddsweep.results.artifacts import save_tensors
from ddsweep.results.coverage import old_key
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.results.reader import load_results
from ddsweep.results.schemas import EVALS
from ddsweep.seeds import derive_seed
from ddsweep.trial import Progress, distil_trial, record_failure
from ddsweep.trial_plan import TrialSettings
from tests.tables import read_table

CPU = torch.device("cpu")
TEST_IMAGES = 120
KEYS = ["trial_id", "source", "protocol", "model_seed", "inner_step"]
TRAINED = ("random_real", "class_mean", "kmeans")
NO_BASELINES = EvaluationSpec(networks=5, group_size=2, baselines=())


def spec_of(**settings: Any) -> TrialSpec:
    defaults = {
        **{"network": "convnet(depth=1,width=4,norm=none)", "images_per_class": 2, "inner_steps": 2},
        **{"inner_epochs": 2, "inner_lr": 0.1, "outer_steps": 3, "models_per_step": 2, "real_batch": 64},
        **{"selection_networks": 1},
    }
    return TrialSpec(dataset=DATASETS["digits"], **(defaults | settings))


RANDOM = spec_of()
OTHER = spec_of(outer_lr=0.1)
FIXED = spec_of(init="fixed", seed=3)
DOUBLE = spec_of(dtype="float64")
LONG = spec_of(inner_epochs=10, outer_steps=1)


@dataclass
class Sweep:
    """A results folder and the data that its trials are judged on."""

    directory: SweepDirectory
    splits: Splits

    def evaluate(
        self, spec: TrialSpec, evaluation: EvaluationSpec, units: Iterable[EvalUnit] | None = None
    ) -> None:
        for unit in missing_units(spec, evaluation, self.directory) if units is None else units:
            evaluate_unit(spec, unit, evaluation, self.splits, self.directory, CPU)

    def complete(self, spec: TrialSpec, evaluation: EvaluationSpec) -> dict[str, Any]:
        """Evaluate in full; the row of the ``trials`` table."""
        self.evaluate(spec, evaluation)
        assert finish(spec, evaluation, self.directory, "a sweep")
        return read_part(self.directory.trials_part(spec.trial_id)).to_pylist()[0]

    def rows(self, spec: TrialSpec | None = None) -> pd.DataFrame:
        """The ``evals`` table in a fixed order, of one trial or of all."""
        table = read_table(self.directory.parts("evals"), EVALS).to_pandas()
        if spec is not None:
            table = table[table["trial_id"] == spec.trial_id]
        return table.sort_values(KEYS).reset_index(drop=True)

    def missing(self, spec: TrialSpec, evaluation: EvaluationSpec) -> list[tuple[str, int]]:
        return [(unit.protocol, unit.group) for unit in missing_units(spec, evaluation, self.directory)]

    def part(self, spec: TrialSpec, unit: EvalUnit) -> Path:
        return self.directory.evals_part(spec.trial_id, unit.protocol, spec.init_law, unit.group)

    def set_rates(self, spec: TrialSpec, rates: torch.Tensor) -> None:
        """Replace the learned rates in the distilled set of ``spec``."""
        path = self.directory.distilled(spec.trial_id)
        changed = replace(DistilledSet.load(path), rates=rates)
        save_tensors(path, changed.tensors(), changed.header(), self.directory.temporary)


@pytest.fixture(scope="module")
def splits() -> Splits:
    """Digits, with fewer test images so that a pass over them is short."""
    whole = load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)
    few = slice(0, TEST_IMAGES)
    return replace(whole, test_images=whole.test_images[few], test_labels=whole.test_labels[few])


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Sweep:
    """The five trials, distilled and not evaluated. Not to be written to."""
    sweep = Sweep(SweepDirectory(tmp_path_factory.mktemp("distilled")), splits)
    for spec in (RANDOM, OTHER, FIXED, DOUBLE, LONG):
        assert distil_trial(spec, splits, sweep.directory, TrialSettings())
    return sweep


@pytest.fixture
def new_sweep(distilled: Sweep, tmp_path: Path) -> Callable[..., Sweep]:
    """``new_sweep()``: a folder with the five distilled trials, not evaluated."""
    count = 0

    def make(data: Splits = distilled.splits) -> Sweep:
        nonlocal count
        count += 1
        root = tmp_path / f"sweep-{count}"
        for folder in ("artifacts", "history"):
            shutil.copytree(distilled.directory.root / folder, root / folder)
        return Sweep(SweepDirectory(root), data)

    return make


EVERYTHING = EvaluationSpec(networks=3, group_size=2, inner_steps_beyond=(10, 3))


@pytest.fixture(scope="module")
def judged(
    distilled: Sweep, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sweep, dict[str, dict[str, Any]]]:
    """A random and a fixed trial with all baselines, and their rows in ``trials``. Not to be written to."""
    root = tmp_path_factory.mktemp("judged")
    for folder in ("artifacts", "history"):
        shutil.copytree(distilled.directory.root / folder, root / folder)
    sweep = Sweep(SweepDirectory(root), distilled.splits)
    return sweep, {spec.trial_id: sweep.complete(spec, EVERYTHING) for spec in (RANDOM, FIXED)}


# ---------------------------------------------------------------------------------------- which rows


def counts(rows: pd.DataFrame) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
    """{(source, protocol): (networks, inner steps)}, after seeing that each pair is there just once."""
    found = {}
    for key, part in rows.groupby(["source", "protocol"]):
        networks, steps = sorted(part["model_seed"].unique()), sorted(part["inner_step"].unique())
        assert len(part) == len(networks) * len(steps), key
        found[key] = ([int(n) for n in networks], [int(s) for s in steps])
    return found


def test_a_random_trial_is_judged_on_held_out_networks_beside_every_baseline(
    judged: tuple[Sweep, dict[str, dict[str, Any]]],
) -> None:
    rows = judged[0].rows(RANDOM)
    found = counts(rows[rows["source"] != "knn_kmeans"])
    tuned = {source: found.pop((source, "as_distilled_tuned")) for source in TRAINED}
    networks = [0, 1, 2]
    assert found == {
        # The inner step 3 lies within T: it is neither an end of an epoch nor beyond.
        ("distilled", "as_distilled"): (networks, [0, 2, 4, 10]),
        **{(source, "as_distilled"): (networks, [4]) for source in TRAINED},
        ("knn_random", "nearest_neighbour"): (networks, [0]),
    }
    grid = baselines.epoch_grid(2, 2)
    for source, (indices, steps) in tuned.items():
        assert indices == networks, source
        assert len(steps) == 1 and steps[0] // 2 in grid, source
    centres = rows[rows["source"] == "knn_kmeans"]
    assert len(centres) == 1
    assert centres["model_seed"].isna().all()


def test_a_fixed_trial_is_judged_on_its_own_network_and_on_random_ones(
    judged: tuple[Sweep, dict[str, dict[str, Any]]],
) -> None:
    rows = judged[0].rows(FIXED)
    found = counts(rows[rows["source"] != "knn_kmeans"])
    for source in TRAINED:
        assert found.pop((source, "as_distilled_tuned"))[0] == [FIXED.seed]
        assert found.pop((source, "on_random_tuned"))[0] == [0, 1, 2]
    assert found == {
        ("distilled", "as_distilled"): ([FIXED.seed], [0, 2, 4, 10]),
        ("distilled", "on_random"): ([0, 1, 2], [0, 2, 4, 10]),
        **{(source, "as_distilled"): ([FIXED.seed], [4]) for source in TRAINED},
        **{(source, "on_random"): ([0, 1, 2], [4]) for source in TRAINED},
        ("knn_random", "nearest_neighbour"): ([0, 1, 2], [0]),
    }
    assert (rows["source"] == "knn_kmeans").sum() == 1


def test_a_fixed_trial_without_random_networks_still_has_every_baseline(
    new_sweep: Callable[..., Sweep],
) -> None:
    sweep = new_sweep()
    evaluation = replace(EVERYTHING, protocols=("as_distilled",), baselines=("knn_random", "knn_kmeans"))
    sweep.complete(FIXED, evaluation)
    rows = sweep.rows(FIXED)
    assert set(rows["protocol"]) == {"as_distilled", "nearest_neighbour"}
    assert sorted(rows.loc[rows["protocol"] == "nearest_neighbour", "source"]) == ["knn_kmeans", "knn_random"]


def test_rows_say_what_was_judged_and_how(judged: tuple[Sweep, dict[str, dict[str, Any]]]) -> None:
    rows = judged[0].rows()
    assert set(rows["source"]) == {"distilled", *DEFAULT_BASELINES}
    assert (rows["split"] == "test").all()
    assert (rows["n_images"] == TEST_IMAGES).all()
    assert rows["pool"].isna().all()
    trained = rows[rows["protocol"] != "nearest_neighbour"]
    assert (trained["network"] == RANDOM.network).all()
    assert (trained["init_law"] == "xavier").all()
    of_baselines = trained[trained["source"] != "distilled"]
    assert set(of_baselines["inner_lr"]) <= set(baselines.RATES)
    assert (of_baselines["inner_step"] == of_baselines["inner_epochs"] * 2).all()
    assert trained.loc[trained["source"] == "distilled", "inner_lr"].isna().all()
    assert (
        rows.loc[rows["protocol"] == "nearest_neighbour", ["network", "init_law", "inner_lr"]]
        .isna()
        .all(axis=None)
    )


def test_accuracies_are_fractions_of_the_test_images(
    judged: tuple[Sweep, dict[str, dict[str, Any]]],
) -> None:
    accuracy = judged[0].rows()["accuracy"]
    assert accuracy.between(0, 1).all()
    right = accuracy * TEST_IMAGES
    assert np.allclose(right, right.round(), atol=1e-9)


def test_a_wrong_epoch_beyond_t_is_left_out_of_the_question() -> None:
    assert replace(NO_BASELINES, inner_steps_beyond=(4, 3, 1)).steps(RANDOM) == (0, 2, 4)


def test_groups_have_one_module_for_a_recording_belongs_to_it(
    new_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each group would be recorded anew otherwise."""
    sweep, asked = new_sweep(), []
    real = units.choose_plan

    def choose_plan(device: torch.device, threads: int, network: nn.Module, **how: Any) -> Any:
        asked.append((network, how))
        return real(device, threads, network, **how)

    monkeypatch.setattr(units, "choose_plan", choose_plan)
    sweep.evaluate(RANDOM, NO_BASELINES, NO_BASELINES.units(RANDOM))
    assert len(asked) > 1 and all(how == {"graph": True, "native": True} for _, how in asked)
    assert all(network is asked[0][0] for network, _ in asked)


def test_the_setting_compile_decides_over_the_test_pass(
    new_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, asked, real = new_sweep(), [], units.choose_plan

    def choose_plan(device: torch.device, threads: int, network: nn.Module, **how: Any) -> Any:
        asked.append(how["native"])
        return real(device, threads, network, **how)

    monkeypatch.setattr(units, "choose_plan", choose_plan)
    unit = NO_BASELINES.units(RANDOM)[0]
    for setting, expected in (("off", False), ("auto", True), ("on", True)):
        arguments = (RANDOM, unit, NO_BASELINES, sweep.splits, sweep.directory, CPU)
        path = evaluate_unit(*arguments, compile=setting)
        assert asked.pop() is expected
        found = pq.read_metadata(path).metadata[b"native"]
        assert found == b"false", "of a network that there is no such code for"
        path.unlink()


# ------------------------------------------------------------------------------------ the trials row


def test_the_trials_row_sums_up_the_rows_of_the_evals_table(
    judged: tuple[Sweep, dict[str, dict[str, Any]]],
) -> None:
    sweep, trials = judged
    for spec in (RANDOM, FIXED):
        row, rows = trials[spec.trial_id], sweep.rows(spec)
        own = rows[(rows["source"] == "distilled") & (rows["protocol"] == "as_distilled")]
        after = own.loc[own["inner_step"] == spec.steps, "accuracy"]
        assert row["test_models"] == len(after)
        assert row["test_accuracy_mean"] == pytest.approx(after.mean(), abs=1e-12)
        assert row["test_accuracy_before_mean"] == pytest.approx(
            own.loc[own["inner_step"] == 0, "accuracy"].mean(), abs=1e-12
        )
        assert row["n_diverged"] == 0
    after = sweep.rows(RANDOM).query("source == 'distilled' and inner_step == 4")["accuracy"]
    row = trials[RANDOM.trial_id]
    assert row["test_accuracy_std"] == pytest.approx(after.std(ddof=1), abs=1e-12)
    low, high = stats.t.interval(0.95, len(after) - 1, after.mean(), stats.sem(after))
    assert row["test_accuracy_ci95"] == pytest.approx((high - low) / 2, abs=1e-12)


def test_a_fixed_trial_has_one_test_model_and_no_spread(
    judged: tuple[Sweep, dict[str, dict[str, Any]]],
) -> None:
    sweep, trials = judged
    row = trials[FIXED.trial_id]
    assert row["test_models"] == 1
    assert row["test_accuracy_std"] is None
    assert row["test_accuracy_ci95"] is None
    rows = sweep.rows(FIXED).query("source == 'distilled' and inner_step == 4")
    own = rows.loc[rows["protocol"] == "as_distilled", "accuracy"]
    assert row["test_accuracy_mean"] == pytest.approx(own.item(), abs=1e-12)


def test_what_random_networks_do_with_a_fixed_set_never_enters_its_test_accuracy(
    new_sweep: Callable[..., Sweep],
) -> None:
    with_random, without = new_sweep(), new_sweep()
    first = with_random.complete(FIXED, NO_BASELINES)
    second = without.complete(FIXED, replace(NO_BASELINES, protocols=("as_distilled",)))
    names = [name for name in first if name.startswith("test_") or name == "n_diverged"]
    assert len(names) == 14
    assert {name: first[name] for name in names} == {name: second[name] for name in names}


def test_the_trials_row_carries_settings_cost_and_provenance(
    judged: tuple[Sweep, dict[str, dict[str, Any]]],
) -> None:
    sweep, trials = judged
    row, path = trials[FIXED.trial_id], sweep.directory.distilled(FIXED.trial_id)
    settings = {name: value for name, value in FIXED.to_dict().items() if name != "dataset"}
    settings |= dict.fromkeys(FIXED.lacks)  # they mean nothing to its method
    assert {name: row[name] for name in settings} == settings
    assert (row["sweep"], row["dataset"], row["status"]) == ("a sweep", "digits", "done")
    assert row["images_per_class_per_step"] == 1
    assert row["distilled_bytes"] == path.stat().st_size
    assert row["distilled_sha256"] == DistilledSet.load(path).sha256
    assert row["dataset_fingerprint"] == sweep.splits.fingerprint
    assert row["started_at"] < row["ended_at"]
    assert row["wall_seconds"] > 0
    assert row["evaluation_id"] == EVERYTHING.evaluation_id(FIXED)
    null = {name for name, value in row.items() if value is None}
    assert null <= {
        *(
            "pool",
            "pool_networks",
            "network_version",
            "clip_norm",
            "clip_median",
            "clip_running",
            "window",
            "ema",
        ),
        *("outer_lr_rates", "outer_lr_labels", "outer_cutoff"),
        *("source_dataset", "pool_recipe", "pool_train", "attack_class", "target_class"),
        *("test_accuracy_std", "test_accuracy_ci95", "test_accuracy_before_std", "gain_ci95"),
        *(f"test_attack_success_{what}" for what in ("mean", "std", "ci95", "before_mean")),
        *(f"test_accuracy_other_{what}" for what in ("mean", "std", "before_mean")),
        *("peak_memory_bytes", "git_commit", "git_dirty", "ray_version"),
        *FIXED.lacks,
    }


def test_finish_waits_for_the_last_unit_and_may_be_called_again(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    directory, units = sweep.directory, NO_BASELINES.units(RANDOM)
    record_failure(directory, RANDOM, "a sweep", DivergedError("earlier"), "distillation", 1)
    for unit in units:
        assert not finish(RANDOM, NO_BASELINES, directory, "a sweep")
        assert not directory.trials_part(RANDOM.trial_id).exists()
        assert not trial_is_done(RANDOM, NO_BASELINES, directory)
        sweep.evaluate(RANDOM, NO_BASELINES, [unit])
    assert directory.failure_part(RANDOM.trial_id).exists()
    assert finish(RANDOM, NO_BASELINES, directory, "a sweep")
    assert trial_is_done(RANDOM, NO_BASELINES, directory)
    assert not directory.failure_part(RANDOM.trial_id).exists()
    first = directory.trials_part(RANDOM.trial_id).read_bytes()
    assert finish(RANDOM, NO_BASELINES, directory, "a sweep")
    assert directory.trials_part(RANDOM.trial_id).read_bytes() == first
    assert read_part(directory.trials_part(RANDOM.trial_id))["test_models"].to_pylist() == [5]


def test_a_stopped_trial_has_a_row_without_anything_of_the_test_set(tmp_path: Path, splits: Splits) -> None:
    directory, settings = SweepDirectory(tmp_path), TrialSettings(rungs=(2,))

    def stop_at_rung(progress: Progress) -> None:
        if progress.outer_step == 2:
            raise SystemExit

    with pytest.raises(SystemExit):
        distil_trial(RANDOM, splits, directory, settings, on_progress=stop_at_rung)
    assert not trial_is_stopped(RANDOM, directory), "nobody has said so yet"
    record_stop(RANDOM, directory, "a sweep")
    assert trial_is_stopped(RANDOM, directory)
    assert not trial_is_done(RANDOM, NO_BASELINES, directory)
    (row,) = read_part(directory.trials_part(RANDOM.trial_id)).to_pylist()
    (last,) = read_part(directory.history_part(RANDOM.trial_id)).to_pylist()[-1:]
    said = {"trial_id": RANDOM.trial_id, "sweep": "a sweep", "status": "stopped", "outer_steps_done": 2}
    settled = {"outer_steps": 3, "images_per_class": 2, "images_per_class_per_step": 1, "dataset": "digits"}
    assert {name: row[name] for name in said | settled} == said | settled
    assert row["val_score"] == last["val_score"] is not None
    assert row["wall_seconds"] > 0 and row["torch_version"] == torch.__version__ and row["ended_at"]
    of_the_end = [name for name in row if name.startswith(("test_", "distilled_"))]
    assert [row[name] for name in [*of_the_end, "n_diverged", "evaluation_id"]] == [None] * 17
    assert load_results(tmp_path).trials["status"].tolist() == ["stopped"]

    # A torn row or history is no stop: the trial goes on from its checkpoint.
    part = directory.trials_part(RANDOM.trial_id)
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    assert not trial_is_stopped(RANDOM, directory)
    part.write_bytes(whole)

    forget_stop(RANDOM, directory)
    assert not part.exists()
    assert distil_trial(RANDOM, splits, directory, TrialSettings())
    sweep = Sweep(directory, splits)
    done = sweep.complete(RANDOM, NO_BASELINES)
    assert (done["status"], done["outer_steps_done"], done["n_resumed"]) == ("done", 3, 1)
    forget_stop(RANDOM, directory)
    assert trial_is_done(RANDOM, NO_BASELINES, directory), "only the row of a stopped trial is forgotten"


def test_a_trial_that_is_not_distilled_cannot_be_judged(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    sweep.directory.distilled(RANDOM.trial_id).unlink()
    with pytest.raises(CheckpointError, match=r"distilled\.safetensors"):
        sweep.evaluate(RANDOM, NO_BASELINES)
    assert not sweep.directory.evals_parts(RANDOM.trial_id)


# ------------------------------------------------------------------------------------------ diverged


def test_a_diverged_network_counts_as_wrong_and_never_as_nan(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    sweep.set_rates(RANDOM, torch.full((4,), 1e30))
    row = sweep.complete(RANDOM, replace(NO_BASELINES, inner_steps_beyond=(6,)))
    rows = sweep.rows(RANDOM)
    assert rows["accuracy"].notna().all()
    assert rows["diverged"].tolist() == rows["loss"].isna().tolist()
    after = rows[rows["inner_step"] > 0]
    assert after["diverged"].all()
    assert (after["accuracy"] == 0).all()
    assert not rows.loc[rows["inner_step"] == 0, "diverged"].any()
    assert (row["test_accuracy_mean"], row["n_diverged"], row["test_models"]) == (0, 5, 5)
    # Null in the files, not NaN: other readers tell the two apart.
    losses = read_table(sweep.directory.parts("evals"), EVALS)["loss"]
    assert losses.null_count == len(after)
    assert not any(np.isnan(value) for value in losses.drop_null().to_pylist())


def test_networks_that_hold_are_averaged_with_those_that_diverge(new_sweep: Callable[..., Sweep]) -> None:
    sweep, evaluation = new_sweep(), EvaluationSpec(networks=16, group_size=16, baselines=())
    for rate in (20.0, 25.0, 30.0, 35.0, 40.0, 50.0, 70.0):
        sweep.set_rates(LONG, torch.full((LONG.steps,), rate))
        row = sweep.complete(LONG, evaluation)
        after = sweep.rows(LONG).query("inner_step == 20")
        if 0 < row["n_diverged"] < 16:
            break
    assert 0 < row["n_diverged"] < 16
    assert after["accuracy"].notna().all()
    assert after["diverged"].tolist() == after["loss"].isna().tolist()
    assert row["n_diverged"] == after["diverged"].sum()
    assert row["test_models"] == 16
    assert row["test_accuracy_mean"] == pytest.approx(after["accuracy"].mean(), abs=1e-12)
    assert row["test_accuracy_mean"] != pytest.approx(after.loc[~after["diverged"], "accuracy"].mean())


# --------------------------------------------------------------------------- whoever computes it

CHILD = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from ddsweep.catalog import EvaluationSpec, TrialSpec
from ddsweep.data.load import load_splits
from ddsweep.evaluation import evaluate_unit
from ddsweep.results.layout import SweepDirectory

spec, few = TrialSpec.from_dict(json.loads(sys.argv[1])), int(sys.argv[3])
evaluation = EvaluationSpec(networks=5, group_size=2, baselines=("class_mean", "knn_random"))
splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
splits = replace(splits, test_images=splits.test_images[:few], test_labels=splits.test_labels[:few])
units = evaluation.units(spec)
for place in map(int, sys.argv[4:]):
    evaluate_unit(
        spec, units[place], evaluation, splits, SweepDirectory(Path(sys.argv[2])), torch.device("cpu")
    )
"""


def test_any_order_and_any_number_of_processes_give_equal_rows(new_sweep: Callable[..., Sweep]) -> None:
    alone, shards = new_sweep(), new_sweep()
    evaluation = EvaluationSpec(networks=5, group_size=2, baselines=("class_mean", "knn_random"))
    command = [sys.executable, "-c", CHILD, json.dumps(RANDOM.to_dict()), str(shards.directory.root)]
    # The second computes a unit that the first has as well, as happens when a shard seems dead and is not.
    children = [
        subprocess.Popen([*command, str(TEST_IMAGES), *places], stderr=subprocess.PIPE, text=True)
        for places in (("2", "1"), ("0", "2"))
    ]
    units = evaluation.units(RANDOM)
    assert len(units) == 3
    alone.evaluate(RANDOM, evaluation, units)
    for child in children:
        errors = child.communicate()[1]
        assert child.returncode == 0, errors
    assert finish(RANDOM, evaluation, shards.directory, "a sweep")
    assert_frame_equal(alone.rows(), shards.rows(), check_exact=True)
    assert not list(shards.directory.temporary.iterdir())


def test_a_unit_that_is_there_is_not_computed_again(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    sweep.evaluate(RANDOM, NO_BASELINES)
    before = {path: path.stat().st_mtime_ns for path in sweep.directory.parts("evals").iterdir()}
    assert len(before) == 3
    sweep.evaluate(RANDOM, NO_BASELINES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_group_sizes_agree_in_double_precision(new_sweep: Callable[..., Sweep]) -> None:
    evaluation = EvaluationSpec(networks=5, group_size=16, baselines=("random_real", "knn_random"))
    together, alone = new_sweep(), new_sweep()
    together.evaluate(DOUBLE, evaluation)
    alone.evaluate(DOUBLE, replace(evaluation, group_size=1))
    left, right = together.rows(), alone.rows()
    assert sorted(left["group"].unique()) == [0]
    assert sorted(right["group"].unique()) == [0, 1, 2, 3, 4]
    exact = [name for name in left.columns if name not in ("group", "loss")]
    assert_frame_equal(left[exact], right[exact], check_exact=True)
    np.testing.assert_allclose(left["loss"], right["loss"], rtol=0, atol=1e-10)


def test_held_out_networks_are_the_same_for_every_trial(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    for spec in (RANDOM, OTHER, FIXED):
        sweep.evaluate(spec, NO_BASELINES)
    rows = sweep.rows().query("inner_step == 0")
    start = {
        spec.trial_id: rows[(rows["trial_id"] == spec.trial_id) & (rows["protocol"] == protocol)]
        .set_index("model_seed")[["accuracy", "loss"]]
        .sort_index()
        for spec, protocol in ((RANDOM, "as_distilled"), (OTHER, "as_distilled"), (FIXED, "on_random"))
    }
    assert_frame_equal(start[RANDOM.trial_id], start[OTHER.trial_id], check_exact=True)
    assert_frame_equal(start[RANDOM.trial_id], start[FIXED.trial_id], check_exact=True)
    assert start[RANDOM.trial_id]["loss"].nunique() == 5


# -------------------------------------------------------------------------------- another question


def test_more_networks_leave_the_first_ones_as_they_were(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    few = EvaluationSpec(networks=40, baselines=())
    many = replace(few, networks=64)
    sweep.complete(RANDOM, few)
    before = sweep.rows(RANDOM)
    assert sweep.missing(RANDOM, many) == [("as_distilled", 2), ("as_distilled", 3)]
    assert not trial_is_done(RANDOM, many, sweep.directory)
    row = sweep.complete(RANDOM, many)
    after = sweep.rows(RANDOM)
    assert row["test_models"] == 64
    assert sorted(after["model_seed"].unique()) == list(range(64))
    first = after[after["model_seed"] < 40].reset_index(drop=True)
    assert_frame_equal(before, first, check_exact=True)


def test_a_changed_evaluation_never_distils(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    artifacts = [path for path in (sweep.directory.root / "artifacts").rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in artifacts}
    knn = replace(NO_BASELINES, baselines=("knn_random",))
    for evaluation, missing in (
        (NO_BASELINES, 4),
        (knn, 3),  # beside the held-out networks, not the known one
        (replace(knn, inner_steps_beyond=(9,)), 4),
        (NO_BASELINES, 0),
    ):
        assert len(sweep.missing(FIXED, evaluation)) == missing
        sweep.complete(FIXED, evaluation)
        assert trial_is_done(FIXED, evaluation, sweep.directory)
        assert not sweep.rows(FIXED).duplicated(KEYS).any()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before


def test_the_order_of_baselines_and_steps_is_no_other_question(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    asked = replace(NO_BASELINES, baselines=("knn_random", "knn_kmeans"), inner_steps_beyond=(8, 6))
    sweep.complete(RANDOM, asked)
    same = replace(asked, baselines=("knn_kmeans", "knn_random"), inner_steps_beyond=(6, 8))
    assert trial_is_done(RANDOM, same, sweep.directory)
    assert not sweep.missing(RANDOM, same)


BEYOND = EvaluationSpec(networks=5, group_size=2, baselines=("knn_random",), inner_steps_beyond=(50, 2))


@pytest.mark.parametrize(
    ("settings", "evaluation", "key"),
    [
        ({}, EvaluationSpec(), "c1afa59ece8fe8f1"),
        ({}, BEYOND, "32de8dc21f2971d5"),
        ({"init": "fixed", "seed": 3}, EvaluationSpec(), "d30cdc0fb1cc7ffe"),
        ({"init": "fixed", "seed": 3}, BEYOND, "c49fe1881865bbb1"),
    ],
)
def test_golden_keys_of_the_parts_of_version_0_1(
    settings: dict[str, Any], evaluation: EvaluationSpec, key: str
) -> None:
    """With another key no part of version 0.1 would be recognised."""
    spec = TrialSpec(DATASETS["digits"], **settings)
    unit, steps = evaluation.units(spec)[-1], evaluation.steps(spec)
    assert old_key("00ff", spec, unit, steps, evaluation.baselines, evaluation.baseline_settings()) == key


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (4, 3)])
def test_another_group_size_leaves_no_row_twice(
    before: int, after: int, new_sweep: Callable[..., Sweep]
) -> None:
    sweep = new_sweep()
    evaluation = EvaluationSpec(networks=4, group_size=before, baselines=("knn_random",))
    sweep.complete(RANDOM, evaluation)
    row = sweep.complete(RANDOM, replace(evaluation, group_size=after))
    rows = load_results(sweep.directory.root).evals
    assert row["test_models"] == 4
    assert not rows.duplicated(KEYS).any()
    assert sorted(rows["model_seed"].unique()) == [0, 1, 2, 3]


def test_another_distilled_set_is_judged_anew(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    sweep.evaluate(RANDOM, NO_BASELINES)
    assert not sweep.missing(RANDOM, NO_BASELINES)
    sweep.set_rates(RANDOM, torch.full((4,), 0.5))
    assert len(sweep.missing(RANDOM, NO_BASELINES)) == 3


# ---------------------------------------------------------------------------------------- torn parts


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def alter(data: bytes) -> bytes:
    """One byte of the first page is another; the footer is whole."""
    return data[:40] + bytes([data[40] ^ 0xFF]) + data[41:]


@pytest.mark.parametrize("damage", [truncate, alter, lambda data: b""], ids=["half", "altered", "empty"])
def test_a_torn_evals_part_is_missing_and_made_again(
    damage: Callable[[bytes], bytes], new_sweep: Callable[..., Sweep]
) -> None:
    sweep, unit = new_sweep(), NO_BASELINES.units(RANDOM)[1]
    sweep.evaluate(RANDOM, NO_BASELINES)
    whole, part = sweep.rows(RANDOM), sweep.part(RANDOM, unit)
    part.write_bytes(damage(part.read_bytes()))
    assert sweep.missing(RANDOM, NO_BASELINES) == [("as_distilled", 1)]
    assert not finish(RANDOM, NO_BASELINES, sweep.directory, "a sweep")
    sweep.evaluate(RANDOM, NO_BASELINES)
    assert_frame_equal(sweep.rows(RANDOM), whole, check_exact=True)


def test_a_part_that_the_system_cannot_read_now_is_neither_made_again_nor_removed(
    new_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has rows that nobody asks for now, and would be gone with them."""
    sweep, more = new_sweep(), replace(NO_BASELINES, baselines=("class_mean",))
    sweep.complete(RANDOM, more)
    units = NO_BASELINES.units(RANDOM)
    part, whole, read = sweep.part(RANDOM, units[1]), sweep.rows(RANDOM), Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == part:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return read(path)

    for attempt in (
        lambda: finish(RANDOM, NO_BASELINES, sweep.directory, "a sweep"),
        lambda: sweep.evaluate(RANDOM, replace(more, baselines=("kmeans",)), units),
        lambda: trial_is_done(RANDOM, NO_BASELINES, sweep.directory),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", failing)
            with pytest.raises(UnreadableError, match="Too many open files"):
                attempt()
    rows = sweep.rows(RANDOM)
    old = rows[rows["source"] != "kmeans"].reset_index(drop=True)
    assert_frame_equal(old, whole, check_exact=True)


@pytest.mark.parametrize("damage", [truncate, alter], ids=["half", "altered"])
@pytest.mark.parametrize("table", ["trials", "evals"])
def test_a_trial_with_a_torn_part_is_not_done(
    table: str, damage: Callable[[bytes], bytes], new_sweep: Callable[..., Sweep]
) -> None:
    sweep = new_sweep()
    sweep.complete(RANDOM, NO_BASELINES)
    known = KnownParts()
    assert trial_is_done(RANDOM, NO_BASELINES, sweep.directory, known)
    assert not trial_is_done(RANDOM, replace(NO_BASELINES, networks=6), sweep.directory, known)
    part = sorted(sweep.directory.parts(table).iterdir())[0]
    part.write_bytes(damage(part.read_bytes()))
    assert not trial_is_done(RANDOM, NO_BASELINES, sweep.directory)
    assert not trial_is_done(RANDOM, NO_BASELINES, sweep.directory, known)
    sweep.complete(RANDOM, NO_BASELINES)
    assert trial_is_done(RANDOM, NO_BASELINES, sweep.directory)


# ----------------------------------------------------------------------------------------- baselines


def test_rates_and_epochs_of_baselines_are_chosen_without_the_test_set(
    new_sweep: Callable[..., Sweep], splits: Splits
) -> None:
    evaluation = EvaluationSpec(networks=2, group_size=2, baselines=("random_real", "class_mean"))
    noise = torch.randint(256, splits.test_images.shape, dtype=torch.uint8)
    wrong = replace(splits, test_images=noise, test_labels=(splits.test_labels + 3) % 10)
    honest, spoilt = new_sweep(), new_sweep(wrong)
    tables = []
    for sweep in (honest, spoilt):
        sweep.evaluate(RANDOM, evaluation)
        tables.append(sweep.rows().query("source != 'distilled'"))
    chosen = [*KEYS, "inner_lr", "inner_epochs"]
    assert_frame_equal(tables[0][chosen], tables[1][chosen], check_exact=True)
    assert not tables[0]["accuracy"].equals(tables[1]["accuracy"])


def baseline_set(
    spec: TrialSpec, splits: Splits, source: str, index: int, lr: float, epochs: int
) -> DistilledSet:
    """A baseline written as a distilled set, so that `apply` can train on it."""
    data, space = (splits.train_images, splits.train_labels, 10), (splits.mean, splits.std)
    if source == "class_mean":
        images = baselines.class_means(*data, *space)[:, None].expand(-1, 2, -1, -1, -1)
    else:
        seed = derive_seed("baseline", "random_real", splits.fingerprint, index)
        images = baselines.random_images(*data, spec.images_per_class, *space, seed)
    return DistilledSet(
        images=baselines.arrange(images, spec.inner_steps),
        labels=torch.arange(10).repeat(spec.inner_steps, 1),
        rates=torch.full((spec.inner_steps * epochs,), lr, dtype=torch.float64),
        **{"mean": splits.mean, "std": splits.std, "class_names": splits.class_names, "spec": spec},
        recipe=replace(Recipe.of(spec), epochs=epochs),
    )


def test_a_baseline_is_what_its_row_says(new_sweep: Callable[..., Sweep]) -> None:
    sweep, data = new_sweep(), new_sweep().splits
    evaluation = EvaluationSpec(networks=2, group_size=2, baselines=("random_real", "class_mean"))
    sweep.evaluate(DOUBLE, evaluation)
    rows = sweep.rows().query("source != 'distilled'")
    assert len(rows) == 8
    pixels = normalise(data.test_images, data.mean, data.std, torch.float64)
    for row in rows.itertuples():
        found = baseline_set(DOUBLE, data, row.source, row.model_seed, row.inner_lr, int(row.inner_epochs))
        model = apply(found, found.network(row.model_seed).double())
        with torch.no_grad():
            right = (model(pixels).argmax(1) == data.test_labels).double().mean()
        assert float(right) == pytest.approx(row.accuracy, abs=1e-12), row


def test_baselines_are_computed_once_and_carry_the_id_of_each_trial(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    evaluation = EvaluationSpec(networks=3, group_size=2, baselines=("class_mean", "knn_random"))

    def cache() -> dict[Path, int]:
        files = [path for path in sweep.directory.cache.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.suffix != ".lock"}

    sweep.evaluate(RANDOM, evaluation)
    first = cache()
    assert first
    sweep.evaluate(OTHER, evaluation)
    assert cache() == first
    left, right = sweep.rows(RANDOM), sweep.rows(OTHER)
    assert len(left) == len(right)
    left, right = (rows.query("source != 'distilled'").drop(columns="trial_id") for rows in (left, right))
    assert len(left) > 0
    assert_frame_equal(left, right, check_exact=True)


@pytest.mark.parametrize("damage", [truncate, lambda data: b""], ids=["half", "empty"])
def test_a_torn_cache_is_made_again(
    damage: Callable[[bytes], bytes], new_sweep: Callable[..., Sweep]
) -> None:
    sweep = new_sweep()
    evaluation = EvaluationSpec(networks=2, group_size=2, baselines=("kmeans", "knn_kmeans"))
    sweep.evaluate(RANDOM, evaluation)
    rows = sweep.rows(RANDOM)
    for path in sweep.directory.cache.rglob("*"):
        if path.is_file() and path.suffix != ".lock":
            path.write_bytes(damage(path.read_bytes()))
    for part in sweep.directory.evals_parts(RANDOM.trial_id):
        part.unlink()
    sweep.evaluate(RANDOM, evaluation)
    assert_frame_equal(sweep.rows(RANDOM), rows, check_exact=True)


def optimised_rows(sweep: Sweep, spec: TrialSpec, evaluation: EvaluationSpec) -> pd.DataFrame:
    sweep.evaluate(spec, evaluation)
    return sweep.rows(spec).query("source == 'optimized_random'").reset_index(drop=True)


OPTIMISED = EvaluationSpec(networks=2, group_size=2, baselines=("optimized_random",), candidates=3)


def candidate(spec: TrialSpec, splits: Splits, index: int, lr: float, epochs: int) -> DistilledSet:
    """Candidate set ``index`` written as a distilled set, so that `apply` can train on it."""
    found = baseline_set(spec, splits, "random_real", 0, lr, epochs)
    seed = derive_seed("baseline_candidate", "random_real", splits.fingerprint, index)
    data, space = (splits.train_images, splits.train_labels, 10), (splits.mean, splits.std)
    images = baselines.random_images(*data, spec.images_per_class, *space, seed)
    return replace(found, images=baselines.arrange(images, spec.inner_steps))


def accuracy_of(found: DistilledSet, seed: int, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """After training the network drawn from ``seed`` on a set, in float64."""
    model = found.network().double()
    drawn = draw_network(model, found.spec.init_law, found.spec.init_param, seed)
    model.load_state_dict({name: value.double() for name, value in drawn.items()})
    with torch.no_grad():
        x = normalise(pixels, found.mean, found.std, torch.float64)
        return float((apply(found, model)(x).argmax(1) == labels).double().mean())


def test_optimised_random_images_are_the_best_candidate_on_validation_images(
    new_sweep: Callable[..., Sweep], splits: Splits
) -> None:
    rows = optimised_rows(new_sweep(), DOUBLE, OPTIMISED)
    assert sorted(rows["protocol"]) == ["as_distilled"] * 2 + ["as_distilled_tuned"] * 2
    law = (DOUBLE.network, DOUBLE.init_law, DOUBLE.init_param)
    stride = -(-len(splits.validation_labels) // baselines.SELECTION_IMAGES)
    validation = (splits.validation_images[::stride], splits.validation_labels[::stride])
    test = (splits.test_images, splits.test_labels)
    for (lr, epochs), own in rows.groupby(["inner_lr", "inner_epochs"]):
        sets = [candidate(DOUBLE, splits, i, lr, int(epochs)) for i in range(3)]
        scores = [
            np.mean([accuracy_of(s, derive_seed("selection", *law, k), *validation) for k in range(4)])
            for s in sets
        ]
        best = sets[int(np.argmax(scores))]
        for row in own.itertuples():
            expected = accuracy_of(best, derive_seed("heldout", *law, row.model_seed), *test)
            assert row.accuracy == pytest.approx(expected, abs=1e-12)


def test_candidates_are_compared_once_at_the_rates_of_random_images_and_without_the_test_set(
    new_sweep: Callable[..., Sweep], splits: Splits
) -> None:
    noise = torch.randint(256, splits.test_images.shape, dtype=torch.uint8)
    wrong = replace(splits, test_images=noise, test_labels=(splits.test_labels + 3) % 10)
    both = replace(OPTIMISED, baselines=("random_real", "optimized_random"))
    honest, spoilt = new_sweep(), new_sweep(wrong)
    scores = []
    for sweep in (honest, spoilt):
        rows = optimised_rows(sweep, RANDOM, both)
        random = sweep.rows(RANDOM).query("source == 'random_real'").reset_index(drop=True)
        columns = ["protocol", "model_seed", "inner_lr", "inner_epochs", "inner_step"]
        assert_frame_equal(rows[columns], random[columns])
        assert not rows["accuracy"].equals(random["accuracy"])
        files = sorted((sweep.directory.cache / "candidates").glob("*.json"))
        scores.append([(path.name, path.read_bytes()) for path in files])
        assert len(list((sweep.directory.cache / "rates").glob("*.json"))) == 1
    assert scores[0] == scores[1] and len(scores[0]) in (1, 2)
    before = {path: path.stat().st_mtime_ns for path in honest.directory.cache.rglob("*.json")}
    optimised_rows(honest, OTHER, both)
    assert {path: path.stat().st_mtime_ns for path in honest.directory.cache.rglob("*.json")} == before


def test_more_candidates_keep_the_scores_of_the_first(new_sweep: Callable[..., Sweep]) -> None:
    sweep = new_sweep()
    optimised_rows(sweep, RANDOM, replace(OPTIMISED, candidates=2))
    few = {tuple(json.loads(p.read_text())) for p in (sweep.directory.cache / "candidates").glob("*.json")}
    optimised_rows(sweep, RANDOM, replace(OPTIMISED, candidates=4))
    every = {tuple(json.loads(p.read_text())) for p in (sweep.directory.cache / "candidates").glob("*.json")}
    assert {scores[:2] for scores in every if len(scores) == 4} == few


def test_a_fixed_trial_has_candidates_for_its_own_network_and_for_random_ones(
    new_sweep: Callable[..., Sweep],
) -> None:
    rows = optimised_rows(new_sweep(), FIXED, OPTIMISED)
    assert counts(rows).keys() == {
        ("optimized_random", f"{protocol}{end}")
        for protocol in ("as_distilled", "on_random")
        for end in ("", "_tuned")
    }
    assert set(rows.query("protocol == 'as_distilled'")["model_seed"]) == {FIXED.seed}


def test_how_baselines_are_computed_is_another_question_only_where_it_matters(
    new_sweep: Callable[..., Sweep],
) -> None:
    sweep = new_sweep()
    knn = EvaluationSpec(networks=2, group_size=2, baselines=("knn_random", "knn_kmeans"))
    sweep.complete(RANDOM, knn)
    one = sweep.rows(RANDOM).query("protocol == 'nearest_neighbour'")["accuracy"].tolist()
    same = replace(knn, candidates=7, rates=(0.5,), epochs=(3,))
    assert not sweep.missing(RANDOM, same) and trial_is_done(RANDOM, same, sweep.directory)
    for other in (replace(knn, neighbours=3), replace(knn, neighbour_norm=1.0)):
        assert sweep.missing(RANDOM, other) and not trial_is_done(RANDOM, other, sweep.directory)
        sweep.complete(RANDOM, other)
        assert sweep.rows(RANDOM).query("protocol == 'nearest_neighbour'")["accuracy"].tolist() != one
    sweep.complete(RANDOM, knn)
    assert sweep.rows(RANDOM).query("protocol == 'nearest_neighbour'")["accuracy"].tolist() == one


def test_rates_and_epochs_are_taken_from_the_grids_that_are_asked_for(
    new_sweep: Callable[..., Sweep],
) -> None:
    sweep = new_sweep()
    plain = EvaluationSpec(networks=2, group_size=2, baselines=("class_mean",))
    sweep.complete(RANDOM, plain)
    asked = replace(plain, rates=(0.02, 0.2), epochs=(3, 60))
    assert sweep.missing(RANDOM, asked)
    sweep.complete(RANDOM, asked)
    rows = sweep.rows(RANDOM).query("source == 'class_mean'")
    assert set(rows["inner_lr"]) <= {0.02, 0.2}
    assert set(rows.query("protocol == 'as_distilled'")["inner_epochs"]) == {2}
    assert set(rows.query("protocol == 'as_distilled_tuned'")["inner_epochs"]) <= {2, 3, 60}
