"""The lines that the README shows for applying a distilled set, run word for word."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.sources import load_splits
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial import distil_trial
from ddsweep.trial_plan import TrialSettings

ROOT = Path(__file__).resolve().parents[1]


def test_the_three_lines_train_a_users_own_network(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"```python\n(from ddsweep import DistilledSet.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    spec = TrialSpec(
        DATASETS["digits"],
        network="convnet(depth=1,width=4,norm=none)",
        image_init="real",
        inner_epochs=5,
        inner_lr=0.3,
        outer_steps=2,
        real_batch=32,
        selection_networks=1,
    )
    directory = SweepDirectory(tmp_path)
    directory.create()
    splits = load_splits(spec.dataset, None, validation_fraction=0.1, split_seed=0)
    assert distil_trial(spec, splits, directory, TrialSettings())
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    )
    names = {"path": directory.distilled(spec.trial_id), "model": model, "images": splits.test_images}
    exec(block, names)
    x = (splits.test_images.float() / 255 - splits.mean[0]) / splits.std[0]
    with torch.no_grad():
        answers = model(x).argmax(1)
    assert torch.equal(names["answers"], answers)
    accuracy = (answers == splits.test_labels).double().mean()
    assert accuracy > 0.2
