"""What needs nothing but the digits runs, word for word: the commands of README in their order, and the
snippets of all documents. tests/test_commands.py reads all other commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from torch import nn

from ddsweep import DistilledSet, load_results
from ddsweep.bundled import write_files
from ddsweep.catalog import DATASETS
from ddsweep.data.load import load_splits
from tests.conftest import OneRay, Run
from tests.documents import blocks, commands

ONE_AT_A_TIME = {"\nevaluate:\n": "\nresources: {max_concurrent: 1}\nevaluate:\n"}
"""Each process of a Ray takes seconds to import what it needs."""
NO_SEARCH = ("baselines: [random_real]", "rates: [1]", "epochs: [1]")
TINY = {
    "quickstart": {
        "network: convnet(width=16)": "network: convnet(depth=1,width=2)",
        "outer_steps: 80": "outer_steps: 1",
        "real_batch: 256": "real_batch: 16",
        "init: [fixed, random]": "init: [random]",
        "images_per_class: [1, 4]": "images_per_class: [4]",
        "inner_epochs: [1, 3]": "inner_epochs: [3]",
        "networks: 64": "\n  ".join(["networks: 2", "group_size: 100", "shards: 1", *NO_SEARCH]),
        **ONE_AT_A_TIME,
    },
    "digits_rates": {
        "network: convnet(width=16)": "network: convnet(depth=1,width=2)",
        "outer_steps: 80": "outer_steps: 2",
        "samples: 16": "samples: 2",
        "grace: 20": "grace: 1",
        "images_per_class: [1, 4]": "images_per_class: [4]",
        "networks: 64": "networks: 2\n  shards: 1",
        **ONE_AT_A_TIME,
    },
}
"""What is changed in the files for the commands to take seconds."""
NOT_RUN = ("pretrain", "data fetch", "run sweeps/adapt_usps_mnist.yaml --smoke")
"""Commands of the list in README that need data; tests/test_smoke.py runs the last one."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_files(folder)
    for name, changes in TINY.items():
        path = folder / "sweeps" / f"{name}.yaml"
        text = path.read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, f"{path}: {old}"
            text = text.replace(old, new)
        path.write_text(text)
    return folder


@pytest.mark.ray
@pytest.mark.timeout(900)  # many commands, on a machine that may be busy
def test_the_commands_and_the_snippets_of_the_readme_run(
    tiny: Path,
    ddsweep: Run,
    one_ray: OneRay,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tiny)
    (block,) = (block for block in blocks("console") if "ddsweep plan" in block.text)
    ran = []
    for line in commands(block):
        words = shlex.split(line, comments=True)[1:]
        if " ".join(words).startswith(NOT_RUN):
            continue
        if words[0] == "show":  # an id of the settings that were made tiny
            (words[1],) = load_results("results/quickstart").trials.query("init == 'random'")["trial_id"]
        how = one_ray if words[0] in ("run", "eval") else ddsweep
        done = how(*words, cwd=tiny)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        ran.append(words[0])
    assert ran.count("run") == 3 and ran.count("eval") == 2
    assert load_results("elsewhere/quickstart").trials["outer_steps"].tolist() == [20]
    results = load_results("results/quickstart")
    assert results.trials.query("init == 'random'")["test_models"].tolist() == [200]
    assert {"init_law=kaiming", "inner_epochs=10"} < set(results.evals["protocol"])

    for snippet in blocks("python"):
        if "results/quickstart" in snippet.text and snippet.page.name != "analysis.md":
            exec(snippet.text, {})
    with duckdb.connect() as connection:
        for snippet in blocks("sql"):
            assert connection.execute(f"SELECT count(*) FROM ({snippet.text})").fetchone() == (1,)
    said = capsys.readouterr().out
    assert "test_accuracy_mean" in said and "inner_step" in said

    # A set from these results, and another network.
    (block,) = (block for block in blocks("python") if "apply(distilled, model" in block.text)
    path = next((tiny / "results/quickstart/artifacts").glob("*/distilled.safetensors"))
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    images = load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0).test_images
    names: dict[str, Any] = {"path": path, "model": model, "images": images}
    exec(block.text, names)
    assert isinstance(names["distilled"], DistilledSet)
    assert names["answers"].shape == (360,) and torch.isfinite(model(images / 255)).all()


def test_the_call_for_one_trial_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("python") if "run_trial" in block.text)
    exec(block.text, {})
    assert re.search(r"^40 0\.\d+\nFinishedTrial\(", capsys.readouterr().out, re.M)
    assert load_results("results/by_hand").trials["test_models"].tolist() == [16]
