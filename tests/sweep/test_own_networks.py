"""A sweep over networks that ship and a user's own, on a Ray; then judged again where the file is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddsweep import load_results
from tests.conftest import OneRay

NETS = """
import torch
from torch import nn

from more import block


class Small(nn.Module):
    def __init__(self, channels, classes, width=4):
        super().__init__()
        self.block = block(channels, width)
        self.scale = nn.Parameter(torch.rand(width, 1, 1))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16 * width, classes)

    def forward(self, x):
        return self.head(self.drop((self.block(x) * self.scale).flatten(1)))
"""
MORE = """
from torch import nn


def block(channels, width):
    first = nn.Conv2d(channels, width, 3, padding=1)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AvgPool2d(2))
"""
SWEEP = """
name: own
base: {dataset: digits, images_per_class: 1, outer_steps: 4, models_per_step: 2, real_batch: 64,
       selection_networks: 2, validate_every: 4}
grid:
  method: [bptt, distribution_matching]
  network: ["convnet(width=4)", {file: nets.py, name: Small, width: 3}]
evaluate:
  networks: 4
  group_size: 2
  shards: 1
  baselines: [random_real]
  protocols: [as_distilled, {name: small, network: {file: nets.py, name: Small, width: 2}}]
resources: {cpus: 0.5}
"""


@pytest.mark.slow
def test_a_grid_over_methods_and_networks_of_ones_own(tmp_path: Path, one_ray: OneRay) -> None:
    for name, text in (("nets.py", NETS), ("more.py", MORE), ("own.yaml", SWEEP)):
        (tmp_path / name).write_text(text)
    done = one_ray("run", "own.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "nets.py").unlink()
    (tmp_path / "more.py").unlink()
    results = tmp_path / "results" / "own"
    done = one_ray("eval", results, "evaluate.networks=6", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = load_results(results)
    assert len(found.trials) == 4 and set(found.trials["status"]) == {"done"}
    assert set(found.trials["test_models"]) == {6} and not found.trials["n_diverged"].any()
    own = found.trials[found.trials["network"].str.startswith("nets.py:Small(width=3)@")]
    assert sorted(own["method"]) == ["bptt", "distribution_matching"]
    rows = found.evals[found.evals["protocol"] == "small"]
    assert rows["network"].str.startswith("nets.py:Small(width=2)@").all() and set(rows["model_seed"]) == {
        *range(6)
    }
    assert len(list((results / "code").iterdir())) == 1
