"""A job array: elements that know nothing of each other; a tracker has one run for each trial."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ddsweep.errors import UserError
from ddsweep.results.reader import load_results
from ddsweep.trackers import kinds
from tests.conftest import ROOT, Run
from tests.trackers.readers import read_mlflow, read_tensorboard, read_wandb

READERS = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}
SWEEP = """\
name: small
base: {dataset: digits, network: convnet(width=4), outer_steps: 12, real_batch: 32, validate_every: 6}
seeds: 4
evaluate: {networks: 2, group_size: 2, baselines: none}
resources: {checkpoint_every: 2, log_every: 2, compile: off}
"""


@pytest.mark.slow
def test_elements_of_an_array_leave_one_run_for_each_trial(tmp_path: Path, ddsweep: Run) -> None:
    """Also if all of them were stopped in between, and the first half was sent."""
    try:
        kinds.require_trackers(kinds.KINDS)
    except UserError as error:
        pytest.skip(str(error))
    root = tmp_path / "small"
    root.mkdir()
    (root / "sweep.yaml").write_text(SWEEP)
    words = [word for kind in kinds.KINDS for word in ("--to", kind)]

    def sent() -> list[str]:
        done = ddsweep("track", root, *words)
        assert done.returncode == 0, done.stderr
        return [line.partition(": ")[2] for line in done.stdout.splitlines()]

    elements = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trackers.element", str(root), str(number), "2"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    try:
        assert [element.stdout.readline() for element in elements if element.stdout] == ["stopped\n"] * 2
        assert sent() == ["news of 4 trials sent"] * 3
        for element in elements:
            element.communicate("go on\n")
            assert element.returncode == 0
    finally:
        for element in elements:
            element.kill()
            element.wait()
    assert sent() == ["news of 4 trials sent"] * 3
    assert sent() == ["news of 0 trials sent"] * 3

    tables = load_results(root)
    assert len(tables.trials) == 4 and (tables.trials["n_resumed"] == 1).all()
    for kind, read in READERS.items():
        found = read(root / "tracking" / kind, "small")
        assert sorted(found) == sorted(tables.trials["trial_id"]), kind
        for row in tables.trials.to_dict("records"):
            one, history = (
                found[row["trial_id"]],
                tables.history[tables.history["trial_id"] == row["trial_id"]],
            )
            steps = [
                (step, pytest.approx(loss))
                for step, loss in zip(history["outer_step"], history["outer_loss"], strict=True)
            ]
            assert one.curve("outer_loss") == steps and len(steps) == 6, kind
            assert one.final["test_accuracy_mean"] == pytest.approx(row["test_accuracy_mean"]), kind
            assert float(one.settings["seed"]) == row["seed"] and len(one.pictures) == 1, kind
