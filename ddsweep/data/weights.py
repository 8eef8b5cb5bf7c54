"""Weights of networks that ddsweep did not train: torchvision's AlexNet on ImageNet.

The places, in this order: a given file; ``weights/alexnet-imagenet.safetensors`` under the data root, which
``ddsweep data fetch alexnet-imagenet`` writes; torch's own cache. Nothing here downloads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ddsweep.data.layout import one_line
from ddsweep.errors import DataError
from ddsweep.paths import user_path

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALEXNET", "ALEXNET_SHAPES", "STORED", "find_weights", "read_weights"]

ALEXNET = "alexnet-imagenet"
"""Their name for ``ddsweep data fetch``."""

STORED = "weights/alexnet-imagenet.safetensors"
"""Their path, relative to the data root."""

CACHED = "checkpoints/alexnet-owt-7be5be79.pth"
"""torchvision's file ``AlexNet_Weights.IMAGENET1K_V1``, relative to torch's hub folder."""

SHA256_START = "7be5be79"
"""The hash of that file: torchvision has it in the file name."""

ALEXNET_SHAPES: dict[str, tuple[int, ...]] = {
    "features.0.weight": (64, 3, 11, 11),
    "features.0.bias": (64,),
    "features.3.weight": (192, 64, 5, 5),
    "features.3.bias": (192,),
    "features.6.weight": (384, 192, 3, 3),
    "features.6.bias": (384,),
    "features.8.weight": (256, 384, 3, 3),
    "features.8.bias": (256,),
    "features.10.weight": (256, 256, 3, 3),
    "features.10.bias": (256,),
    "classifier.1.weight": (4096, 9216),
    "classifier.1.bias": (4096,),
    "classifier.4.weight": (4096, 4096),
    "classifier.4.bias": (4096,),
    "classifier.6.weight": (1000, 4096),
    "classifier.6.bias": (1000,),
}
"""Names and shapes of ``torchvision.models.alexnet``, in its order."""


def find_weights(file: Path | None, root: Path | None) -> Path:
    """The file that holds the weights: ``file`` if given, else that under the data root, else torch's own.

    Raises `DataError` naming the places if no file is there. No file is opened.
    """
    if file is not None:
        path = user_path(file)
        if not path.is_file():
            raise DataError(f"{ALEXNET}: weights file {path} is missing")
        return path
    import torch

    places = [] if root is None else [root / STORED]
    places.append(Path(torch.hub.get_dir()) / CACHED)
    for place in places:
        if place.is_file():
            return place
    told = "" if root is not None else f"data root not given, and {STORED} lies there; "
    raise DataError(
        f"{ALEXNET}: no weights: neither a file was given, nor is there {' or '.join(map(str, places))}; "
        f"{told}`ddsweep data fetch {ALEXNET} --data-root DIR` downloads them"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """A ``.safetensors`` file, or a ``.pth`` of nothing but tensors, as float32 tensors of `ALEXNET_SHAPES`.

    Half precision is converted. A ``.pth`` goes through torch's loader for weights only, which runs no code
    of the file. A file with torchvision's name must have the published content. Raises `DataError`, naming
    the file, for an unreadable one, and for a tensor that is missing, unknown, of another shape, not floating
    point, or not finite.
    """
    import torch

    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise DataError(f"{ALEXNET}: {path}: weights are a .safetensors or a .pth file")
    if path.name == Path(CACHED).name:
        _check_content(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file, the loaders raise any error of their parsing
        raise DataError(
            f"{ALEXNET}: {path}: not a file of weights, or truncated: {one_line(error)}"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(item, torch.Tensor) for item in found.values()):
        raise DataError(f"{ALEXNET}: {path}: holds no tensors by name, as a state dict of torch does")
    weights: dict[str, Tensor] = {}
    for name, shape in ALEXNET_SHAPES.items():
        if name not in found:
            raise DataError(
                f"{ALEXNET}: {path}: {name} is missing; expected are the names and shapes of "
                "torchvision.models.alexnet"
            )
        tensor = found[name]
        if tuple(tensor.shape) != shape:
            raise DataError(f"{ALEXNET}: {path}: {name} is {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point():
            raise DataError(
                f"{ALEXNET}: {path}: {name} is {_dtype(tensor)}, expected float32 or another floating point"
            )
        weights[name] = tensor.detach().to(torch.float32).contiguous()
        if not torch.isfinite(weights[name]).all():
            raise DataError(f"{ALEXNET}: {path}: {name} has values that are not finite")
    unknown = sorted(set(map(str, found)) - set(ALEXNET_SHAPES))
    if unknown:
        raise DataError(f"{ALEXNET}: {path}: {unknown[0]} is not a weight of torchvision.models.alexnet")
    return weights


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_content(path: Path) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{ALEXNET}: {path} cannot be read: {error.strerror or error}") from error
    if not found.startswith(SHA256_START):
        raise DataError(
            f"{ALEXNET}: {path}: its SHA-256 begins with {found[:8]}, not {SHA256_START}: truncated or "
            "altered; delete it"
        )
