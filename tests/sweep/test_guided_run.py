"""Guided search on a real Ray, with early stopping: a run proposes until all samples are there."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from ddsweep import load_results
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.proposals import read_proposals
from tests.conftest import OneRay
from tests.sweep.driver import Driver, descendants, until_ended

SWEEP = """\
name: guided
base: {dataset: digits, network: convnet(width=4), images_per_class: 1, outer_steps: 12, real_batch: 32}
search:
  kind: tpe
  samples: 5
  startup: 3
  space: {inner_lr: {log_uniform: [0.01, 1]}, split_seed: {choice: [0, 1, 2]}}
scheduler: {grace: 4, reduction: 2}
resources: {cohort: 2, cpus: 2}
evaluate: {networks: 2, group_size: 2, shards: 1, baselines: none}
"""


@pytest.mark.ray
def test_a_run_proposes_until_all_samples_are_there(one_ray: OneRay, tmp_path: Path) -> None:
    """Also samples whose data no trial before them has had: each split is another one."""
    file, root = tmp_path / "guided.yaml", tmp_path / "results" / "guided"
    file.write_text(SWEEP)
    said = one_ray("run", file, cwd=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    first = load_results(root).trials
    ((_, samples),) = read_proposals(SweepDirectory(root)).items()
    assert sorted(first["inner_lr"]) == sorted(sample["inner_lr"] for sample in samples)
    assert len(first) == 5 and set(first["status"]) <= {"done", "stopped"}
    assert first["in_sweep"].all()
    assert first["cohort_size"].max() == 2, "one place, which takes the next proposal beside a running trial"

    said = one_ray("run", file, "search.samples=6", cwd=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    more = load_results(root).trials
    assert set(first["trial_id"]) < set(more["trial_id"]) and len(more) == 6
    kept = more[more["trial_id"].isin(first["trial_id"])]
    assert kept["distilled_sha256"].tolist() == first["distilled_sha256"].tolist(), "nothing is done again"


@pytest.mark.slow
def test_after_a_kill_the_same_command_goes_on(
    one_ray: OneRay, environment: dict[str, str], tmp_path: Path
) -> None:
    """What was proposed before the kill stays, whether it had begun or not."""
    driver = Driver(tmp_path, environment, one_ray=one_ray)
    driver.file.write_text(SWEEP.replace("name: guided", "name: small"))

    def proposed() -> list[dict[str, Any]]:
        found = list(read_proposals(SweepDirectory(driver.results)).values())
        return found[0] if found and len(found[0]) > 3 else []

    driver.start()
    try:
        before = driver.until(proposed, "a proposal")
        below = descendants(driver.process.pid) if driver.process else []
        driver.signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        until_ended(below, "ray::Distil", "ray::EvalShard")
        assert driver.run_here() == 0, driver.log.read_text()
    finally:
        driver.kill_everything()
    ((_, samples),) = read_proposals(SweepDirectory(driver.results)).items()
    assert samples[: len(before)] == before and len(samples) == 5
    trials = load_results(driver.results).trials
    assert sorted(trials["inner_lr"]) == sorted(sample["inner_lr"] for sample in samples)
    assert trials["in_sweep"].all() and set(trials["status"]) <= {"done", "stopped"}
