"""Both modes of `ddsweep launch` on three nodes with fake GPUs: the same tables as on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

import ddsweep
from tests.cluster.machines import Lab
from tests.cluster.sweeping import ROOT, Launched, run_alone

FILE = ROOT / "sweeps/quickstart.yaml"
SETTINGS = [
    "outer_steps=20",
    "evaluate.networks=8",
    "evaluate.group_size=4",
    "evaluate.baselines=[random_real]",
]
GPUS = [*SETTINGS, "resources.gpus=0.5", "evaluate.shards=3"]


@pytest.fixture(scope="session")
def alone(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_alone(tmp_path_factory.mktemp("alone"), FILE, SETTINGS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["cluster", pytest.param("array", marks=pytest.mark.slow)])
def test_a_launch_over_three_nodes(lab: Lab, shared: Path, alone: Path, mode: str) -> None:
    sweep = Launched(lab, shared, FILE, GPUS)
    done = sweep.launch("--mode", mode, "--wait")
    assert done.returncode == 0, done.stdout + sweep.logs()
    sweep.assert_nothing_runs()
    sweep.assert_complete(alone)
    distilled, evaluated = sweep.hosts()
    assert distilled == evaluated == {"node1", "node2", "node3"}
    again = sweep.launch("--wait")
    assert (again.returncode, "done: all of 8 trials" in again.stdout) == (0, True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cohorts_over_three_nodes(lab: Lab, shared: Path, tmp_path: Path) -> None:
    """Trials that share processes on three nodes are those that had one process each on one machine."""
    trials = ["grid={init: [fixed]}", "seeds=12", "outer_steps=400"]  # long enough for all nodes to come up
    alone = run_alone(tmp_path / "alone", FILE, [*SETTINGS, *trials, "resources.cohort=1"])
    sweep = Launched(lab, shared, FILE, [*GPUS, *trials])
    done = sweep.launch("--mode", "cluster", "--wait")
    assert done.returncode == 0, done.stdout + sweep.logs()
    sweep.assert_complete(alone)
    assert len(sweep.hosts()[0]) > 1
    assert ddsweep.load_results(alone).trials["cohort_size"].max() == 1
    assert ddsweep.load_results(sweep.folder).trials["cohort_size"].max() > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_modes_go_on_where_the_other_was_and_keep_apart(lab: Lab, shared: Path, alone: Path) -> None:
    sweep = Launched(lab, shared, FILE, GPUS)
    assert sweep.launch("--mode", "array").returncode == 0
    refused = sweep.launch("--mode", "cluster")
    assert (refused.returncode, "is still there" in refused.stdout) == (1, True), refused.stdout
    sweep.wait(
        lambda: len(list(sweep.folder.glob("artifacts/*/distilled.safetensors"))) >= 2, "two are distilled"
    )
    cancelled = sweep.run("cancel", sweep.folder, "--grace", 60)
    assert (cancelled.returncode, "cancelled" in cancelled.stdout) == (0, True), cancelled.stdout
    sweep.wait_until_over(60)
    sweep.assert_nothing_runs()
    done = sweep.launch("--mode", "cluster", "--wait")
    assert done.returncode == 0, done.stdout + sweep.logs()
    sweep.assert_complete(alone)
