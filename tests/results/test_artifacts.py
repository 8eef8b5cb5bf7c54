from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ddsweep.errors import CheckpointError
from ddsweep.results.artifacts import load_tensors, save_tensors, tensor_sha256

HEADER: dict[str, Any] = {"kind": "checkpoint", "step": 3, "rates": [0.1, 0.2], "name": "ä"}


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 5, generator=generator)
    return {
        "images": torch.randn(2, 3, 1, 4, 4, generator=generator),
        "labels": torch.arange(3),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2),
        "flags": torch.tensor([True, False]),
        "row": shared[0],
        "transposed": shared.T,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "ab" / "checkpoint.safetensors"
    save_tensors(path, some_tensors(), HEADER, tmp_path / ".tmp")
    return path


def test_round_trip(saved: Path) -> None:
    tensors, header = load_tensors(saved)
    assert header == HEADER
    assert set(tensors) == set(some_tensors())
    for name, tensor in some_tensors().items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    assert tensor_sha256(tensors) == tensor_sha256(some_tensors())


def test_the_same_content_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    save_tensors(again, dict(reversed(some_tensors().items())), dict(reversed(HEADER.items())), tmp_path)
    assert again.read_bytes() == saved.read_bytes()


def test_tensors_come_in_one_order_in_every_process(saved: Path) -> None:
    """The bits of a trial with a pool depend on it."""
    assert list(load_tensors(saved)[0]) == sorted(some_tensors())


def test_the_sum_sees_names_types_shapes_and_bytes() -> None:
    base = torch.zeros(2, 3)
    variants = [
        {"a": base},
        {"b": base},
        {"a": base.int()},
        {"a": base.reshape(3, 2)},
        {"a": base + 1},
        {"a": base, "b": base},
    ]
    assert len({tensor_sha256(variant) for variant in variants}) == len(variants)
    assert tensor_sha256({"a": base.T}) == tensor_sha256({"a": base.T.contiguous()})


def test_any_truncation_is_seen(saved: Path) -> None:
    data = saved.read_bytes()
    for keep in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        saved.write_bytes(data[:keep])
        with pytest.raises(CheckpointError) as caught:
            load_tensors(saved)
        assert str(saved) in str(caught.value)
    saved.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError):
        load_tensors(saved)


def test_an_altered_byte_is_seen_wherever_it_lies(saved: Path) -> None:
    data = saved.read_bytes()
    for position in [*range(0, len(data), 7), len(data) - 1]:
        altered = bytearray(data)
        altered[position] ^= 0x01
        saved.write_bytes(altered)
        with pytest.raises(CheckpointError) as caught:
            load_tensors(saved)
        assert str(saved) in str(caught.value)


def test_files_of_others_and_missing_ones(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not one of ddsweep"):
        load_tensors(foreign)
    foreign.write_text("hello")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_tensors(foreign)
    with pytest.raises(CheckpointError, match="cannot read"):
        load_tensors(tmp_path / "nowhere")


def test_a_header_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_tensors(tmp_path / "x", {}, {"loss": float("nan")}, tmp_path / ".tmp")
    assert not (tmp_path / "x").exists()
