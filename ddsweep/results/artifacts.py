"""Tensors with a header in one file (safetensors, no pickle): distilled sets and checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddsweep.errors import CheckpointError
from ddsweep.paths import user_path
from ddsweep.results.files import unreadable_error, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load_tensors", "save_tensors", "tensor_sha256"]

_KEY = "ddsweep"


# ---------------------------------------------------------------------------------------- tensors


def tensor_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, by sorted name. The device of the tensors does not
    matter."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        described = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(described).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], temporary: Path
) -> None:
    """Write named tensors and a JSON header as one safetensors file, atomically.

    The metadata key ``ddsweep`` holds the JSON ``{"header": ..., "sha256": ...}``, the sum over header and
    tensors. There is one key, because safetensors writes several in an order that differs from run to run;
    the same content should give the same bytes. Raises ``ValueError`` or ``TypeError`` for a header that is
    not JSON (NaN included), and `ResultsError` if the file cannot be written.
    """
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, so each is cloned.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"header": header, "sha256": _sum(own, header)}, sort_keys=True, allow_nan=False)
    write_atomic(path, save(own, metadata={_KEY: text}), temporary)


def _sum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    return hashlib.sha256(f"{tensor_sha256(tensors)}\n{text}".encode()).hexdigest()


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on CPU), sorted by name, and the header of a file of `save_tensors`.

    safetensors gives them in an order that differs from process to process, and sums over the tensors of a
    network depend on it in their last bits.
    Raises `CheckpointError`, naming the file, if it is missing, truncated, altered, or not a file of ddsweep,
    and `UnreadableError` if it is there and the system cannot read it.
    """
    from safetensors.torch import load

    try:
        data = user_path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
    except OSError as error:
        raise unreadable_error(error, path) from error
    try:
        tensors = dict(sorted(load(data).items()))
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except Exception as error:  # safetensors answers damage with half a dozen exception types
        raise CheckpointError(f"{path}: truncated, altered, or not a safetensors file ({error})") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not one of ddsweep (no {_KEY!r} header)")
    try:
        content = json.loads(metadata[_KEY])
        header: dict[str, Any] = content["header"]
        intact = content["sha256"] == _sum(tensors, header)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: altered since it was written: its check sum does not match")
    return tensors, header
