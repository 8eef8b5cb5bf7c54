"""Tensors with a header in one file (safetensors, no pickle): distilled sets and checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddsweep.errors import CheckpointError
from ddsweep.paths import user_path
from ddsweep.results.files import unreadable_error, write_atomic
from ddsweep.tensor_file import KEY, content_sum, read_header, tensor_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load_tensors", "save_tensors", "tensor_sha256"]


def tensor_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, by sorted name. The device of the tensors does not
    matter."""
    import torch

    def parts() -> Iterator[tuple[str, str, list[int], bytes]]:
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            yield name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), content

    return tensor_sum(parts())


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], temporary: Path
) -> None:
    """Write named tensors and a JSON header as one safetensors file, atomically.

    The metadata (`ddsweep.tensor_file`) has one key, because safetensors writes several in an order that
    differs from run to run; the same content should give the same bytes. Raises ``ValueError`` or
    ``TypeError`` for a header that is not JSON (NaN included), and `ResultsError` if the file cannot be
    written.
    """
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, so each is cloned.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    total = content_sum(tensor_sha256(own), header)
    text = json.dumps({"header": header, "sha256": total}, sort_keys=True, allow_nan=False)
    write_atomic(path, save(own, metadata={KEY: text}), temporary)


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
    except Exception as error:  # safetensors answers damage with half a dozen exception types
        raise CheckpointError(f"{path}: truncated, altered, or not a safetensors file ({error})") from error
    try:
        header, _ = read_header(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return tensors, header
