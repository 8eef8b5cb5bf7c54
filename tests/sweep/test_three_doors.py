"""A method, a network and a data source of a user's own, in one grid with those that ship; killed once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import ddsweep
from tests.conftest import OneRay
from tests.sweep.driver import Driver
from tests.test_method_door import METHODS

NETS = """
from torch import nn


def small(channels, side, classes, width=3):
    conv, head = nn.Conv2d(channels, width, 3, padding=1), nn.Linear(width * (side // 2) ** 2, classes)
    return nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), head)
"""
DATA = """
from sklearn.datasets import load_digits


def load(offset=0):
    found = load_digits()
    images, labels = (found.images * 15).astype("uint8"), found.target
    return {"train": (images[300:], labels[300:]), "test": (images[:300], labels[:300])}
"""
SWEEP = """
name: small
base:
  dataset: {file: data.py, name: load}
  images_per_class: 1
  outer_steps: 30
  models_per_step: 2
  real_batch: 64
  real_per_class: 8
  selection_networks: 2
  validate_every: 10
grid:
  method: [bptt, distribution_matching, {file: methods.py, name: GradientMatching, real_per_class: 8}]
  network: ["convnet(width=4)", {file: nets.py, name: small}]
evaluate: {networks: 4, group_size: 2, shards: 1, baselines: [random_real]}
resources: {checkpoint_every: 2, log_every: 2, dashboard: false}
"""


@pytest.mark.slow
def test_a_grid_over_all_three_that_is_killed_once(
    tmp_path: Path, environment: dict[str, str], one_ray: OneRay
) -> None:
    for name, text in (("nets.py", NETS), ("data.py", DATA), ("methods.py", METHODS)):
        (tmp_path / name).write_text(text)
    own = {**environment, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    driver = Driver(tmp_path, own, cwd=tmp_path, one_ray=one_ray)
    driver.file.write_text(SWEEP)
    try:
        driver.start()
        driver.until(driver.checkpoint_of_a_running_trial, "a checkpoint")
        driver.signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        assert driver.run() == 0, driver.log.read_text()
    finally:
        driver.kill_everything()
    found = ddsweep.load_results(driver.results)
    trials = found.trials
    assert len(trials) == 6 and set(trials["status"]) == {"done"} and (trials["n_resumed"] > 0).any()
    assert {text.partition("@")[0].partition("(")[0] for text in trials["method"]} == {
        *("bptt", "distribution_matching", "methods.py:GradientMatching"),
    }
    assert {text.partition("@")[0] for text in trials["network"]} == {
        *("convnet(depth=2,width=4,norm=instance)", "nets.py:small"),
    }
    assert trials["dataset"].str.startswith("data.py:load").all()
    assert set(trials["test_models"]) == {4} and not trials["n_diverged"].any()
    of_bptt = trials["method"] == "bptt"
    assert trials["inner_lr"].notna().eq(of_bptt).all(), "a setting that a method lacks is null"
    counts = found.evals.groupby(["trial_id", "source", "protocol"])["model_seed"].nunique()
    assert (counts == 4).all() and counts.index.get_level_values("trial_id").nunique() == 6
