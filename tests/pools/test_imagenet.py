"""AlexNet with weights of ImageNet: torchvision's network, a new last layer, and the whole way on small trees
in the official layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from ddsweep.catalog import DATASETS, NetworkSpec, TrialSpec
from ddsweep.core.distill import initial_state, outer_step
from ddsweep.core.execution import choose_plan
from ddsweep.core.init import draw_network
from ddsweep.core.networks import build_network
from ddsweep.core.task import Task
from ddsweep.data import weights as module
from ddsweep.data.stand_in import stand_in
from ddsweep.errors import DataError
from ddsweep.pools.file import resolve_pool
from ddsweep.pools.imagenet import pool_of, ready_pool
from ddsweep.results.layout import PoolDirectory, SweepDirectory
from ddsweep.trial import training_networks
from tests.conftest import Run
from tests.data.test_official_trees import write_cub, write_voc

ALEXNET = NetworkSpec("alexnet")
SWEEPS = Path(__file__).resolve().parents[2] / "sweeps"


def test_the_network_is_torchvisions() -> None:
    """With the same weights the same logits; names and shapes are those of its weights."""
    from torchvision.models import alexnet

    theirs = alexnet(num_classes=7).eval()
    ours = build_network(ALEXNET, (3, 224, 224), 7)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = functional_call(ours, theirs.state_dict(), (images,))
        assert torch.allclose(logits, theirs(images), atol=1e-5)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of weights whose linear layers are narrow, as far as reading is concerned: 12 MB, not 244."""
    shapes = {k: v for k, v in module.ALEXNET_SHAPES.items() if not k.startswith("classifier")}
    shapes |= {"classifier.1.weight": (8, 9216), "classifier.1.bias": (8,), "classifier.4.weight": (8, 8)}
    shapes |= {"classifier.4.bias": (8,), "classifier.6.weight": (1000, 8), "classifier.6.bias": (1000,)}
    monkeypatch.setattr(module, "ALEXNET_SHAPES", shapes)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path / "weights" / "alexnet-imagenet.safetensors"
    path.parent.mkdir()
    save_file(weights, path)
    return tmp_path


def imagenet(pools: Path, value: Any = "imagenet") -> Any:
    return resolve_pool(value, pools, lambda name: DATASETS[str(name)])


def test_weights_are_copied_once_and_get_a_new_last_layer(narrow: Path, tmp_path: Path) -> None:
    pools = tmp_path / "results" / "pools"
    spec = imagenet(pools)
    ready_pool(spec, pools, narrow)
    before = PoolDirectory(pools / "imagenet").network("train", 0).stat().st_mtime_ns
    ready_pool(spec, pools, None)
    assert PoolDirectory(pools / "imagenet").network("train", 0).stat().st_mtime_ns == before
    birds = TrialSpec(DATASETS["cub200"], network="alexnet", init="fixed", pool=spec)
    pool = pool_of(birds, pools)
    assert pool is not None
    (weights,) = pool.networks("train", [0])
    original = module.read_weights(narrow / "weights" / "alexnet-imagenet.safetensors")
    assert torch.equal(weights["classifier.6.weight"], torch.zeros(200, 8))
    assert torch.equal(weights["classifier.6.bias"], torch.ones(200))
    assert all(torch.equal(weights[name], original[name]) for name in original if "classifier.6" not in name)


def test_a_given_file_is_a_pool_of_its_own(narrow: Path, tmp_path: Path) -> None:
    pools, file = tmp_path / "results" / "pools", narrow / "weights" / "alexnet-imagenet.safetensors"
    spec = imagenet(pools, {"name": "imagenet", "weights": str(file)})
    assert spec.recipe != "imagenet" and spec.name == f"imagenet-{spec.recipe[:8]}"
    ready_pool(spec, pools, None)
    trial = TrialSpec(DATASETS["voc2007"], network="alexnet", init="fixed", pool=spec)
    assert trial.trial_id != replace(trial, pool=imagenet(pools)).trial_id


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("features.3.bias", (191,), r"features.3.bias is \[191\], expected \[192\]"),
        ("classifier.1.bias", None, "classifier.1.bias is missing"),
    ],
)
def test_weights_of_another_shape_are_refused_before_anything_is_kept(
    narrow: Path, tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    file = narrow / "weights" / "alexnet-imagenet.safetensors"
    weights = module.read_weights(file)
    del weights[name]
    if shape is not None:
        weights[name] = torch.zeros(shape)
    save_file(weights, file)
    pools = tmp_path / "results" / "pools"
    with pytest.raises(DataError, match=message):
        ready_pool(imagenet(pools), pools, narrow)
    assert not PoolDirectory(pools / "imagenet").index.exists()


def test_without_weights_the_message_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    pools = tmp_path / "results" / "pools"
    with pytest.raises(DataError, match=r"no weights: .*`ddsweep data fetch alexnet-imagenet"):
        ready_pool(imagenet(pools), pools, tmp_path)


@pytest.mark.slow
def test_an_outer_step_in_recompute_mode_is_that_of_store_mode(tmp_path: Path) -> None:
    """At 224 pixels, one image for each of three classes, E = 3."""
    pools = tmp_path / "results" / "pools"
    spec = imagenet(pools, "imagenet-smoke")
    ready_pool(spec, pools, None)
    data = replace(DATASETS["voc2007"], classes=3, class_names=("a", "b", "c"))
    trial = TrialSpec(
        data, network="alexnet", init="fixed", pool=spec, inner_epochs=3, inner_lr=1e-4, real_batch=6
    )
    splits = stand_in(data)
    network = build_network(ALEXNET, data.shape, 3)
    found = {}
    for mode in ("store", "recompute"):
        plan = replace(choose_plan(torch.device("cpu"), 1, network), memory_mode=mode)
        of_pool = training_networks(trial, SweepDirectory(pools.parent / "x"))
        task = Task.of(trial, plan, splits.train, of_pool)
        state, report = outer_step(task, initial_state(task))
        found[mode] = state.images
        assert report.n_skipped == 0 and report.grad_norm
        assert not torch.equal(state.images, initial_state(task).images)
    assert torch.allclose(found["store"], found["recompute"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["alexnet_voc2007", "alexnet_cub200"])
def test_the_whole_way_on_official_layouts(name: str, tmp_path: Path, ddsweep_process: Run) -> None:
    """Random weights under torchvision's names, and small trees of images: the sweep file as it is, with few
    outer steps."""
    root = tmp_path / "data"
    (root / "weights").mkdir(parents=True)
    drawn = draw_network(build_network(ALEXNET, (3, 224, 224), 1000), "kaiming", 0.0, 0)
    save_file({k: v.half() for k, v in drawn.items()}, root / "weights" / "alexnet-imagenet.safetensors")
    if name.endswith("cub200"):
        write_cub(root, 200, train=2)
    else:
        write_voc(root)
    few = ["outer_steps=1", "inner_epochs=1"] if name.endswith("cub200") else ["outer_steps=2"]
    settings = [*few, "real_batch=16", "evaluate.baselines=none"]
    done = ddsweep_process("run", SWEEPS / f"{name}.yaml", *settings, "--data-root", root, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    (part,) = (tmp_path / "results" / name / "trials").glob("*.parquet")
    row = pd.read_parquet(part).iloc[0]
    assert (row.pool, row.source_dataset, row.test_models) == ("imagenet", "imagenet", 1)
    assert row.dataset_stand_in is False or not row.dataset_stand_in
    assert pd.isna(row.test_accuracy_std) and row.memory_mode == "recompute"
    assert row.peak_memory_bytes > 2**30
