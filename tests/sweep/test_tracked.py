"""`run --track`: a tracker beside a real sweep has in the end what the tables have."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddsweep.results.reader import load_results
from tests.conftest import OneRay
from tests.trackers.readers import read_tensorboard

SWEEP = """\
name: small
base: {dataset: digits, network: convnet(width=4), outer_steps: 4}
seeds: 2
evaluate: {networks: 2, shards: 1, baselines: none}
resources: {cpus: 0.5}
"""


@pytest.mark.slow
def test_a_tracker_has_what_the_tables_have(tmp_path: Path, one_ray: OneRay) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    (tmp_path / "small.yaml").write_text(SWEEP)
    done = one_ray("run", "small.yaml", "--track", "tensorboard", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results" / "small"
    tables, found = load_results(results), read_tensorboard(results / "tracking" / "tensorboard", "small")
    assert sorted(found) == sorted(tables.trials["trial_id"]) and len(found) == 2
    for row in tables.trials.to_dict("records"):
        one = found[row["trial_id"]]
        assert one.final["test_accuracy_mean"] == pytest.approx(row["test_accuracy_mean"])
        assert one.settings["seed"] == row["seed"] and len(one.pictures) == 1
        history = tables.history[tables.history["trial_id"] == row["trial_id"]]
        assert [step for step, _ in one.curve("outer_loss")] == list(history["outer_step"])
