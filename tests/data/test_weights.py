"""ImageNet weights: the places where they are looked for, and wrong files.

A whole AlexNet is 244 MB. The names are torchvision's, and so are the shapes in one test; elsewhere each
dimension is cut down, in the files and in what is expected of them alike.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddsweep.data import weights as module
from ddsweep.data.fetch import fetch
from ddsweep.data.weights import ALEXNET_SHAPES, find_weights, read_weights
from ddsweep.errors import DataError, SettingError

SMALL = {name: tuple(-(-size // 64) for size in shape) for name, shape in ALEXNET_SHAPES.items()}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "ALEXNET_SHAPES", SMALL)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SMALL.items()}


def found_weights(file: Path | None, root: Path | None) -> dict[str, Tensor]:
    return read_weights(find_weights(file, root))


def are_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def fails(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=f"alexnet-imagenet: .*{message}") as caught:
        found_weights(path, None)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Tensor]) -> Path:
    path = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    start = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(module, "SHA256_START", start)
    return path


def test_names_and_shapes_are_those_of_torchvision() -> None:
    from torchvision.models import AlexNet_Weights, alexnet

    with torch.device("meta"):
        state = alexnet().state_dict()
    assert [(name, tuple(tensor.shape)) for name, tensor in state.items()] == list(ALEXNET_SHAPES.items())
    url = AlexNet_Weights.IMAGENET1K_V1.url
    assert Path(url).name == Path(module.CACHED).name and f"-{module.SHA256_START}." in url


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_given_file(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    given = {name: tensor.to(dtype) for name, tensor in random_weights().items()}
    path = tmp_path / f"mine{suffix}"
    save_file(given, path) if suffix == ".safetensors" else torch.save(given, path)
    found = found_weights(path, None)
    assert list(found) == list(SMALL)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, given[name].float())


def test_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    with pytest.raises(
        DataError, match=r"data/weights/alexnet-imagenet.safetensors or .*7be5be79.pth; `ddsweep"
    ):
        found_weights(None, root)
    with pytest.raises(
        DataError, match=r"data root not given, .*`ddsweep data fetch alexnet-imagenet --data-root"
    ):
        found_weights(None, None)
    theirs, stored, mine = (random_weights(seed) for seed in range(3))
    path = cached(tmp_path, monkeypatch, theirs)
    assert find_weights(None, root) == find_weights(None, None) == path
    assert are_equal(found_weights(None, root), theirs)
    (root / "weights").mkdir(parents=True)
    save_file(stored, root / module.STORED)
    assert are_equal(found_weights(None, root), stored)
    save_file(mine, tmp_path / "mine.safetensors")
    found = found_weights(tmp_path / "mine.safetensors", root)
    assert are_equal(found, mine)
    fails(tmp_path / "gone.pth", "weights file .*gone.pth is missing")


def test_torch_s_own_file_must_be_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cached(tmp_path, monkeypatch, random_weights())
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(
        DataError, match=r"7be5be79.pth: its SHA-256 begins with .*, not .*: truncated or altered"
    ):
        found_weights(None, None)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_that_are_not_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    save_file(random_weights(), path) if suffix == ".safetensors" else torch.save(random_weights(), path)
    content = path.read_bytes()
    for damaged in (b"", b"<html>" * 50, content[: len(content) // 2], content[:-20]):
        path.write_bytes(damaged)
        fails(path, "not a file of weights, or truncated: .")
    path.unlink()
    path.mkdir()
    fails(path, "is missing")


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "opened",))

    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    fails(tmp_path / "trap.pth", "not a file of weights, or truncated: Weights only load failed")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap()))
    fails(tmp_path / "trap.pth", "not a file of weights, or truncated: ")
    assert not (tmp_path / "opened").exists()


def test_other_weights(tmp_path: Path) -> None:
    good = random_weights()
    path = tmp_path / "mine.safetensors"

    def with_(**changes: Tensor | None) -> Path:
        named = {**good, **{key.replace("_", "."): value for key, value in changes.items()}}
        save_file({key: value for key, value in named.items() if value is not None}, path)
        return path

    fails(
        with_(features_3_bias=None), r"mine.safetensors: features.3.bias is missing; expected are the names"
    )
    fails(
        with_(classifier_6_weight=torch.zeros(20, 64)),
        r"classifier.6.weight is \[20, 64\], expected \[16, 64\]",
    )
    fails(
        with_(features_0_bias=torch.zeros(1, dtype=torch.int64)), "features.0.bias is int64, expected float32"
    )
    fails(
        with_(features_0_bias=torch.full((1,), torch.nan)), "features.0.bias has values that are not finite"
    )
    fails(
        with_(features_1_weight=torch.zeros(3)),
        "features.1.weight is not a weight of torchvision.models.alexnet",
    )
    torch.save([1, 2], tmp_path / "list.pth")
    fails(tmp_path / "list.pth", "holds no tensors by name")
    torch.save({"state_dict": good}, tmp_path / "nested.pth")
    fails(tmp_path / "nested.pth", "holds no tensors by name")
    (tmp_path / "weights.bin").write_bytes(b"")
    fails(tmp_path / "weights.bin", "weights are a .safetensors or a .pth file")


def test_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    weights = random_weights()

    def download(url: str, dst: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        torch.save(weights, dst)
        monkeypatch.setattr(module, "SHA256_START", hashlib.sha256(Path(dst).read_bytes()).hexdigest()[:8])

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    root = tmp_path / "new"
    path = fetch("alexnet-imagenet", root)
    assert path == root / "weights/alexnet-imagenet.safetensors"
    assert asked == [("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79")]
    assert are_equal(found_weights(None, root), weights)
    assert fetch("alexnet-imagenet", root) == path and len(asked) == 1
    assert not list(root.glob(".fetch-*"))


def test_a_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(DataError, match=r"alexnet-imagenet: could not be fetched into .*Name or service"):
        fetch("alexnet-imagenet", tmp_path)
    assert not list(tmp_path.glob(".fetch-*")) and not list((tmp_path / "weights").iterdir())
    with pytest.raises(DataError, match="alexnet-imagenet: data root not given"):
        fetch("alexnet-imagenet", None)
    with pytest.raises(SettingError, match=r"unknown data set 'alexnet'.*, and alexnet-imagenet"):
        fetch("alexnet", tmp_path)
