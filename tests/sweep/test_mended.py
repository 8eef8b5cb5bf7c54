"""A damaged sweep that is run again: it says so, and leaves the same results as before."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import part_metadata, read_part
from ddsweep.results.schemas import TABLES
from ddsweep.spec import expand, load_sweep, resolved_yaml
from tests.conftest import OneRay, Run
from tests.science import DIFFERENT

SWEEP = """\
name: mended
base: {dataset: digits, network: convnet(width=4), outer_steps: 4, real_batch: 32, models_per_step: 1,
       selection_networks: 1}
seeds: 4
evaluate: {networks: 2, shards: 1, baselines: none}
resources: {dashboard: false, checkpoint_every: 2}
"""


@dataclass(frozen=True)
class Mended:
    """A sweep of four trials that was done, was damaged, and was run again.

    Trial 0 was in the middle of its distillation with a truncated checkpoint; trials 1, 2 and 3 were done but
    for a truncated part each: of ``trials``, ``evals`` and ``history``.
    """

    said: subprocess.CompletedProcess[str]
    directory: SweepDirectory
    ids: tuple[str, ...]
    before: dict[str, list[dict[str, object]]]

    def assert_as_before(self, table: str, trial_id: str) -> None:
        expected = [row for row in self.before[table] if row["trial_id"] == trial_id]
        found = rows_of(self.directory, table, trial_id)
        assert len(found) == len(expected)
        for now, then in zip(found, expected, strict=True):
            assert {k: (v, then[k]) for k, v in now.items() if v != then[k]} == {}


def rows_of(directory: SweepDirectory, table: str, trial_id: str = "") -> list[dict[str, object]]:
    """The rows of all parts of a trial, without what differs from run to run."""
    found = []
    for path in sorted(directory.parts(table).glob(f"part-{trial_id}*.parquet")):
        rows = read_part(path).to_pylist()
        found += [{k: v for k, v in row.items() if k not in DIFFERENT} for row in rows]
    return found


def trials_of(file: Path) -> tuple[TrialSpec, ...]:
    return expand(load_sweep(file), lambda name: DATASETS[str(name)]).trials


def truncate(path: Path) -> None:
    """Half of the file, as a full disk or a torn copy leaves it."""
    os.truncate(path, path.stat().st_size // 2)


def run_without_ray(file: Path, root: Path) -> SweepDirectory:
    """What ``ddsweep run`` leaves, made by this process alone."""
    import torch

    from ddsweep.data.load import load_splits
    from ddsweep.evaluation import evaluate_unit, finish
    from ddsweep.trial import distil_trial
    from ddsweep.trial_plan import TrialSettings

    sweep, directory = load_sweep(file), SweepDirectory(root)
    directory.create()
    directory.sweep_file.write_text(resolved_yaml(sweep))
    evaluation, threads = sweep.evaluate.spec(), torch.get_num_threads()
    try:
        for trial in trials_of(file):
            fraction, seed = trial.validation_fraction, trial.split_seed
            splits = load_splits(trial.dataset, None, validation_fraction=fraction, split_seed=seed)
            assert distil_trial(trial, splits, directory, TrialSettings(checkpoint_every=2))
            for unit in evaluation.units(trial):
                evaluate_unit(trial, unit, evaluation, splits, directory, torch.device("cpu"))
            assert finish(trial, evaluation, directory, sweep.name)
    finally:
        torch.set_num_threads(threads)
    return directory


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory, one_ray: OneRay) -> Mended:
    folder = tmp_path_factory.mktemp("mended")
    (folder / "sweep.yaml").write_text(SWEEP)
    directory = run_without_ray(folder / "sweep.yaml", folder / "results" / "mended")
    ids = tuple(trial.trial_id for trial in trials_of(folder / "sweep.yaml"))
    before = {table: rows_of(directory, table) for table in TABLES}
    for table in ("trials", "evals"):
        next(directory.parts(table).glob(f"part-{ids[0]}*.parquet")).unlink()
    directory.distilled(ids[0]).unlink()
    truncate(directory.checkpoint(ids[0]))
    for table, trial_id in zip(("trials", "evals", "history"), ids[1:], strict=True):
        truncate(next(directory.parts(table).glob(f"part-{trial_id}*.parquet")))
    return Mended(one_ray("run", "sweep.yaml", cwd=folder), directory, ids, before)


def test_run_mends_a_damaged_sweep_and_says_so(mended: Mended) -> None:
    said = mended.said.stdout + mended.said.stderr
    assert mended.said.returncode == 0, said
    assert "Traceback" not in said and "4 trials done" in said
    assert list(mended.directory.parts("failures").iterdir()) == []


def test_a_trial_with_a_truncated_checkpoint_starts_again_and_records_it(mended: Mended) -> None:
    trial_id = mended.ids[0]
    aside = [path.name for path in mended.directory.artifacts(trial_id).glob("*.torn-*")]
    assert aside == ["checkpoint.safetensors.torn-1"]
    (row,) = read_part(mended.directory.trials_part(trial_id)).to_pylist()
    assert (row["status"], row["n_torn_checkpoints"]) == ("done", 1)


@pytest.mark.parametrize("table", ["trials", "evals", "history"])
def test_a_trial_that_starts_again_on_ray_gives_the_rows_made_without_ray(table: str, mended: Mended) -> None:
    mended.assert_as_before(table, mended.ids[0])  # the sum over the distilled images is among them


@pytest.mark.parametrize(("table", "number"), [("trials", 1), ("evals", 2), ("history", 3)])
def test_run_makes_a_truncated_part_again(table: str, number: int, mended: Mended) -> None:
    paths = list(mended.directory.parts(table).glob(f"part-{mended.ids[number]}*.parquet"))
    assert [part_metadata(path)["schema_version"] for path in paths] == ["1"]
    mended.assert_as_before(table, mended.ids[number])


def test_a_mended_sweep_can_be_collected(mended: Mended, ddsweep: Run) -> None:
    done = ddsweep("collect", mended.directory.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_part(mended.directory.table("trials")).num_rows == 4
