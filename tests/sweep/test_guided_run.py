"""Guided search on a real Ray, with early stopping: a run proposes until all samples are there."""

from __future__ import annotations

from pathlib import Path

from ddsweep import load_results
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.proposals import read_proposals
from tests.conftest import OneRay

SWEEP = """\
name: guided
base: {dataset: digits, network: convnet(width=4), images_per_class: 1, outer_steps: 12, real_batch: 32}
search:
  kind: tpe
  samples: 5
  startup: 3
  space: {inner_lr: {log_uniform: [0.01, 1]}}
scheduler: {grace: 4, reduction: 2}
evaluate: {networks: 2, group_size: 2, shards: 1, baselines: none}
"""


def test_a_run_proposes_until_all_samples_are_there(one_ray: OneRay, tmp_path: Path) -> None:
    file, root = tmp_path / "guided.yaml", tmp_path / "results" / "guided"
    file.write_text(SWEEP)
    said = one_ray("run", file, cwd=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    first = load_results(root).trials
    ((_, samples),) = read_proposals(SweepDirectory(root)).items()
    assert sorted(first["inner_lr"]) == sorted(sample["inner_lr"] for sample in samples)
    assert len(first) == 5 and set(first["status"]) <= {"done", "stopped"}
    assert first["in_sweep"].all()

    said = one_ray("run", file, "search.samples=6", cwd=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    more = load_results(root).trials
    assert set(first["trial_id"]) < set(more["trial_id"]) and len(more) == 6
    kept = more[more["trial_id"].isin(first["trial_id"])]
    assert kept["distilled_sha256"].tolist() == first["distilled_sha256"].tolist(), "nothing is done again"
