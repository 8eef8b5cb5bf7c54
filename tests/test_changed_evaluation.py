"""A changed `evaluate:`: right rows stay, also if they are not asked for; missing rows are computed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pandas.testing import assert_frame_equal

from ddsweep.catalog import DATASETS, EvaluationSpec, Protocol, TrialSpec
from ddsweep.data.load import Splits, load_splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import UserError
from ddsweep.evaluation import evaluate_unit, finish, missing_units, settled, trial_is_done
from ddsweep.evaluation.group import Group
from ddsweep.report.status import trial_states
from ddsweep.report.summary import summarise
from ddsweep.results.artifacts import save_tensors
from ddsweep.results.coverage import HOLDS, is_evaluated, old_key
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part, read_whole, write_part_table
from ddsweep.results.schemas import EVALS
from ddsweep.trial import distil_trial, read_distilled, record_failure
from ddsweep.trial_plan import TrialSettings
from tests.tables import read_table

KEYS = ["source", "protocol", "model_seed", "inner_step", "inner_lr"]
SETTINGS: dict[str, Any] = {
    **{"network": "convnet(depth=1,width=4,norm=none)", "images_per_class": 2, "inner_steps": 2},
    **{"inner_lr": 0.1, "outer_steps": 1, "models_per_step": 1, "real_batch": 32, "selection_networks": 1},
}
RANDOM = TrialSpec(DATASETS["digits"], **SETTINGS)
FIXED = TrialSpec(DATASETS["digits"], **SETTINGS, init="fixed", seed=3)
TRIALS = {"random": RANDOM, "fixed": FIXED}

MOST = EvaluationSpec(
    networks=5,
    group_size=2,
    protocols=("as_distilled", "on_random", Protocol(order="shuffled")),
    baselines=("random_real", "class_mean", "knn_random", "knn_kmeans"),
    inner_steps_beyond=(6,),
    epochs=(1,),
)
LESS = {
    "networks": {"networks": 3},
    "networks of whole groups": {"networks": 4},
    "groups": {"group_size": 4},
    "larger groups, fewer networks": {"group_size": 16, "networks": 4},
    "smaller groups": {"group_size": 1},
    "protocols": {"protocols": ("as_distilled",)},
    "baselines": {"baselines": ("class_mean",)},
    "no baselines": {"baselines": ()},
    "no nearest neighbour": {"baselines": ("random_real", "class_mean")},
    "nearest neighbour alone": {"baselines": ("knn_random", "knn_kmeans"), "protocols": ("as_distilled",)},
    "steps beyond T": {"inner_steps_beyond": ()},
    "all of it": {
        **{"networks": 2, "protocols": ("as_distilled",), "baselines": ("knn_random",)},
        **{"inner_steps_beyond": (), "group_size": 3},
    },
}
CASES = [
    *((less, "0.2") for less in LESS),
    *((less, "0.1") for less in ("networks", "groups", "baselines", "steps beyond T", "all of it")),
]


@dataclass
class Sweep:
    directory: SweepDirectory
    splits: Splits

    def complete(self, spec: TrialSpec, evaluation: EvaluationSpec) -> dict[str, Any]:
        """Compute what is missing; the row of the ``trials`` table."""
        for unit in missing_units(spec, evaluation, self.directory):
            evaluate_unit(spec, unit, evaluation, self.splits, self.directory, torch.device("cpu"))
        assert finish(spec, evaluation, self.directory, "a sweep")
        assert trial_is_done(spec, evaluation, self.directory)
        return self.row(spec)

    def row(self, spec: TrialSpec) -> dict[str, Any]:
        return dict(read_part(self.directory.trials_part(spec.trial_id)).to_pylist()[0])

    def rows(self, spec: TrialSpec) -> pd.DataFrame:
        table = read_table(self.directory.parts("evals"), EVALS).to_pandas()
        table = table[table["trial_id"] == spec.trial_id]
        assert not table.duplicated(["source", "protocol", "model_seed", "inner_step"]).any()
        return table.sort_values(KEYS).reset_index(drop=True)

    def files(self, spec: TrialSpec) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory.evals_parts(spec.trial_id)}

    def is_evaluated(self, spec: TrialSpec, evaluation: EvaluationSpec) -> bool:
        paths = self.directory.evals_parts(spec.trial_id)
        return is_evaluated(self.directory, spec, evaluation, KnownParts(), paths)

    def as_of_version_0_1(self, spec: TrialSpec, evaluation: EvaluationSpec) -> None:
        """Give the files of a trial, evaluated by ``evaluation``, the metadata that version 0.1 wrote."""
        sha = read_distilled(spec, self.directory).sha256
        for unit in evaluation.units(spec):
            path = self.directory.evals_part(spec.trial_id, unit.protocol, spec.init_law, unit.group)
            table, _ = read_whole(path)
            steps = evaluation.steps(spec, unit.changes)
            settings = evaluation.baseline_settings()
            key = old_key(sha, spec, unit, steps, evaluation.baselines, settings)
            write_part_table(path, plain(table), self.directory.temporary, {"unit": key})
            assert HOLDS not in read_whole(path)[1]
        path = self.directory.trials_part(spec.trial_id)
        table, metadata = read_whole(path)
        old = table.drop_columns(["gain_mean", "gain_ci95"])
        own = {"evaluation_id": metadata["evaluation_id"]}
        write_part_table(path, plain(old), self.directory.temporary, own)


def plain(table: pa.Table) -> pa.Table:
    """``table`` without what a part of today says of its rows."""
    return table.replace_schema_metadata({"schema_version": "1"})


@pytest.fixture(scope="module")
def most(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Both trials, evaluated by `MOST`. Not to be written to."""
    whole = load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)
    few = slice(0, 60)
    splits = replace(whole, test_images=whole.test_images[few], test_labels=whole.test_labels[few])
    sweep = Sweep(SweepDirectory(tmp_path_factory.mktemp("most")), splits)
    for spec in TRIALS.values():
        assert distil_trial(spec, splits, sweep.directory, TrialSettings())
        sweep.complete(spec, MOST)
    return sweep


@pytest.fixture
def sweep(most: Sweep, tmp_path: Path) -> Sweep:
    """A copy of `most`."""
    shutil.copytree(most.directory.root, tmp_path / "copy")
    return Sweep(SweepDirectory(tmp_path / "copy"), most.splits)


@pytest.fixture
def bare(sweep: Sweep) -> Sweep:
    """The distilled trials, not evaluated."""
    for table in ("evals", "trials"):
        shutil.rmtree(sweep.directory.parts(table))
    return sweep


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """(protocol, networks) of every time that networks are trained on a distilled set."""
    found: list[tuple[str, tuple[int, ...]]] = []
    test = Group.test_distilled

    def test_distilled(self: Group, *arguments: Any) -> Any:
        found.append((self.unit.protocol, self.unit.indices))
        return test(self, *arguments)

    monkeypatch.setattr(Group, "test_distilled", test_distilled)
    return found


# ------------------------------------------------------------------------------ more than was asked for


@pytest.mark.parametrize(("less", "version"), CASES)
@pytest.mark.parametrize("trial", TRIALS)
def test_more_than_is_asked_counts_as_done_and_stays(
    trial: str, less: str, version: str, sweep: Sweep, computed: list[Any]
) -> None:
    spec, asked = TRIALS[trial], replace(MOST, **LESS[less])
    if version == "0.1":
        sweep.as_of_version_0_1(spec, MOST)
    files, row = sweep.files(spec), sweep.row(spec)
    assert not missing_units(spec, asked, sweep.directory)
    assert trial_is_done(spec, asked, sweep.directory)
    assert sweep.is_evaluated(spec, asked)
    assert settled(spec, asked, sweep.directory, "a sweep") and finish(
        spec, asked, sweep.directory, "a sweep"
    )
    assert sweep.files(spec) == files
    after = sweep.row(spec)
    kept = [name for name in row if name != "evaluation_id"]
    assert {name: after[name] for name in kept} == {name: row[name] for name in kept}
    assert after["test_models"] == (5 if trial == "random" else 1)
    assert after["gain_mean"] is not None
    assert sweep.complete(spec, MOST)["evaluation_id"] == MOST.evaluation_id(spec)
    assert not computed and sweep.files(spec) == files


@pytest.mark.parametrize(("less", "version"), CASES)
@pytest.mark.parametrize("trial", TRIALS)
def test_what_is_missing_is_added_and_what_is_there_stays_as_it_is(
    trial: str, less: str, version: str, bare: Sweep, most: Sweep
) -> None:
    spec, first = TRIALS[trial], replace(MOST, **LESS[less])
    bare.complete(spec, first)
    before = bare.rows(spec)
    if version == "0.1":
        bare.as_of_version_0_1(spec, first)
    assert trial_is_done(spec, first, bare.directory)
    row = bare.complete(spec, MOST)
    after, whole = bare.rows(spec), most.rows(spec)
    # Nearest neighbour of a fixed trial moves from its known network to the held-out ones.
    kept = [name for name in after if name != "group"]
    assert len(after[kept].merge(before[kept], how="inner")) == len(before), "equal in all columns"
    measured = [name for name in after if name not in ("group", "loss", "accuracy")]
    assert_frame_equal(after[measured], whole[measured])
    # Groups of another size: the same networks, computed with others beside them.
    assert (after["accuracy"] - whole["accuracy"]).abs().max() <= 2 / 60 + 1e-9
    assert row["test_models"] == (5 if trial == "random" else 1)
    assert trial_is_done(spec, first, bare.directory)


def test_only_networks_that_are_not_there_are_computed(bare: Sweep, computed: list[Any]) -> None:
    few = EvaluationSpec(networks=3, group_size=2, baselines=())
    bare.complete(RANDOM, few)
    computed.clear()
    bare.complete(RANDOM, replace(few, networks=6, group_size=4))
    assert computed == [("as_distilled", (3,)), ("as_distilled", (4, 5))]
    assert sorted(bare.files(RANDOM)) == [
        f"part-{RANDOM.trial_id}-as_distilled-xavier-{name}.parquet"
        for name in ("g000", "g000of4", "g001", "g001of4")
    ]
    assert sorted(bare.rows(RANDOM)["model_seed"].unique()) == list(range(6))


@pytest.mark.parametrize("loss", ["torn", "gone"])
def test_lost_rows_are_missing_for_a_plan(loss: str, sweep: Sweep) -> None:
    """Also for `launch`, which would otherwise have nothing to do."""

    def states() -> list[str]:
        return list(trial_states(sweep.directory, [RANDOM, FIXED], MOST).values())

    assert states() == ["done", "done"]
    path = sweep.directory.evals_parts(RANDOM.trial_id)[0]
    if loss == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40])
    assert states() == ["missing", "done"]
    sweep.complete(RANDOM, MOST)
    assert states() == ["done", "done"]


def test_the_row_of_a_failure_goes_with_what_failed(sweep: Sweep) -> None:
    """More was asked once, and failed; it is not asked any more."""
    record_failure(sweep.directory, RANDOM, "a sweep", UserError("too large"), "evaluation", 1)
    path = sweep.directory.failure_part(RANDOM.trial_id)
    assert path.exists() and settled(RANDOM, MOST, sweep.directory, "a sweep") and not path.exists()


# ------------------------------------------------------------------------------- what a change makes wrong


@pytest.mark.parametrize("version", ["0.2", "0.1"])
def test_other_rates_replace_the_rows_of_baselines_that_have_any_and_no_others(
    version: str, sweep: Sweep, computed: list[Any]
) -> None:
    if version == "0.1":
        sweep.as_of_version_0_1(RANDOM, MOST)
    before = sweep.rows(RANDOM)
    asked = replace(MOST, networks=2, rates=(0.02,), baselines=("class_mean", "knn_random"))
    assert not trial_is_done(RANDOM, asked, sweep.directory) and not sweep.is_evaluated(RANDOM, asked)
    sweep.complete(RANDOM, asked)
    assert not computed
    after = sweep.rows(RANDOM)
    of_mean = after["source"] == "class_mean"
    assert set(after.loc[of_mean, "inner_lr"]) == {0.02}
    assert sorted(after.loc[of_mean, "model_seed"].unique()) == list(range(5)), "those beyond 2 as well"
    others = [table[table["source"] != "class_mean"].reset_index(drop=True) for table in (before, after)]
    assert_frame_equal(*others)
    sweep.complete(RANDOM, MOST)
    assert_frame_equal(sweep.rows(RANDOM), before)


def test_what_a_name_of_a_protocol_stands_for_may_change(sweep: Sweep) -> None:
    wide = replace(MOST, protocols=("as_distilled", Protocol(name="x", order="shuffled")))
    sweep.complete(RANDOM, wide)
    other = replace(wide, protocols=("as_distilled", Protocol(name="x", order="sampled")), networks=2)
    assert {unit.protocol for unit in missing_units(RANDOM, other, sweep.directory)} == {"x"}
    sweep.complete(RANDOM, other)
    named = sweep.rows(RANDOM).query("protocol == 'x'")
    assert set(named["order"]) == {"sampled"}
    assert sorted(named["model_seed"].unique()) == [0, 1], "no row of what the name stood for before"
    assert len(sweep.rows(RANDOM).query("protocol == 'order=shuffled'")["model_seed"].unique()) == 5


@pytest.mark.parametrize("version", ["0.2", "0.1"])
def test_rows_of_a_set_that_was_distilled_anew_are_all_replaced(version: str, sweep: Sweep) -> None:
    if version == "0.1":
        sweep.as_of_version_0_1(RANDOM, MOST)
    path = sweep.directory.distilled(RANDOM.trial_id)
    new = replace(DistilledSet.load(path), rates=torch.tensor([0.5, 0.5]))
    save_tensors(path, new.tensors(), new.header(), sweep.directory.temporary)
    few = replace(MOST, networks=2, protocols=("as_distilled",))
    assert len(missing_units(RANDOM, few, sweep.directory)) == 1
    row = sweep.complete(RANDOM, few)
    own = sweep.rows(RANDOM).query("protocol == 'as_distilled' and source == 'distilled'")
    assert (row["test_models"], row["distilled_sha256"]) == (2, new.sha256)
    assert sorted(own["model_seed"].unique()) == [0, 1]


def test_a_torn_part_beyond_what_is_asked_goes_and_the_row_follows(sweep: Sweep) -> None:
    part = sorted(sweep.directory.evals_parts(RANDOM.trial_id))[2]
    assert part.name.endswith("as_distilled-xavier-g002.parquet")
    part.write_bytes(part.read_bytes()[:-9])
    asked = replace(MOST, networks=4)
    assert not trial_is_done(RANDOM, asked, sweep.directory)
    assert settled(RANDOM, asked, sweep.directory, "a sweep")
    assert not part.exists() and sweep.row(RANDOM)["test_models"] == 4


# --------------------------------------------------------------------------------------- the row


def test_the_row_is_over_all_networks_that_were_judged(sweep: Sweep) -> None:
    """Also where an evaluation of more networks was cut off before it summed up."""
    asked = replace(MOST, networks=9)
    unit = [u for u in missing_units(RANDOM, asked, sweep.directory) if u.protocol == "as_distilled"][-1]
    evaluate_unit(RANDOM, unit, asked, sweep.splits, sweep.directory, torch.device("cpu"))
    assert trial_is_done(RANDOM, MOST, sweep.directory) and sweep.row(RANDOM)["test_models"] == 5
    assert settled(RANDOM, MOST, sweep.directory, "a sweep")
    row, rows = sweep.row(RANDOM), sweep.rows(RANDOM).query("source == 'distilled' and inner_step == 2")
    own = rows.query("protocol == 'as_distilled'")
    assert row["test_models"] == len(own) == 6
    assert row["test_accuracy_mean"] == pytest.approx(own["accuracy"].mean(), abs=1e-12)
    (summary,) = summarise(sweep.directory, [RANDOM.trial_id])
    assert (summary.test.n, summary.test.mean) == (6, pytest.approx(row["test_accuracy_mean"]))
    assert json.loads(
        pq.read_metadata(sweep.directory.trials_part(RANDOM.trial_id)).metadata[b"networks"]
    ) == {
        "as_distilled": 6,
        "on_random": 0,
    }


@pytest.mark.parametrize("trial", TRIALS)
def test_the_gain_is_that_of_the_last_table(trial: str, sweep: Sweep) -> None:
    spec = TRIALS[trial]
    row, (summary,) = sweep.row(spec), summarise(sweep.directory, [spec.trial_id])
    gain = summary.differences["as_distilled"]
    assert (row["gain_mean"], row["gain_ci95"]) == (pytest.approx(gain.mean), pytest.approx(gain.ci95))
    assert (row["gain_ci95"] is None) == (trial == "fixed")
    rows = (
        sweep.rows(spec)
        .query("protocol == 'as_distilled' and inner_step == 2")
        .pivot(index="model_seed", columns="source", values="accuracy")
    )
    paired = rows["distilled"] - rows["random_real"]
    assert row["gain_mean"] == pytest.approx(paired.mean(), abs=1e-12)


def test_without_random_real_there_is_no_gain(bare: Sweep) -> None:
    row = bare.complete(RANDOM, EvaluationSpec(networks=2, baselines=("class_mean",), epochs=(1,)))
    assert (row["gain_mean"], row["gain_ci95"]) == (None, None)


def test_a_row_is_written_again_only_where_it_does_not_sum_up_what_is_there(sweep: Sweep) -> None:
    part = sweep.directory.trials_part(RANDOM.trial_id)
    before = part.stat().st_mtime_ns
    assert settled(RANDOM, MOST, sweep.directory, "a sweep")
    assert part.stat().st_mtime_ns == before
    assert settled(RANDOM, MOST, sweep.directory, "another name")
    assert sweep.row(RANDOM)["sweep"] == "another name"


def test_a_row_stays_where_its_set_was_removed(sweep: Sweep) -> None:
    """Sets may be put away to save space: the trial is done all the same."""
    shutil.rmtree(sweep.directory.artifacts(RANDOM.trial_id))
    before = sweep.row(RANDOM)
    assert settled(RANDOM, MOST, sweep.directory, "another name")
    assert sweep.row(RANDOM) == before


def test_parts_are_read_once(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of version 0.1 too, whose rows have to be looked at."""
    sweep.as_of_version_0_1(RANDOM, MOST)
    known, asked = KnownParts(), replace(MOST, networks=2)
    paths = sweep.directory.evals_parts(RANDOM.trial_id)
    assert is_evaluated(sweep.directory, RANDOM, asked, known, paths)
    known.save(sweep.directory)
    again = KnownParts.load(sweep.directory)
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: pytest.fail(f"{path} was read") if path in paths else read(path)
    )
    assert is_evaluated(sweep.directory, RANDOM, asked, again, paths)
    assert HOLDS in again.footer(paths[0])
