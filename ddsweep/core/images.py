"""Images between storage and use: uint8 pixels in, normalised floats out, on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "LabelledImages",
    "RealSet",
    "class_labels",
    "cosine_basis",
    "normalise",
    "renormalised",
    "sample_per_class",
]


@dataclass(frozen=True)
class LabelledImages:
    """Images ready for a network, ``[..., c, h, w]``, and their classes, int64 ``[...]``, or class
    probabilities ``[..., classes]``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class RealSet:
    """Real images as they are stored, ``pixels [N, c, h, w]`` uint8 (or float, normalised already), their
    classes ``labels [N]`` int64, and what normalises them, ``mean`` and ``std`` per channel."""

    pixels: Tensor
    labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> RealSet:
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def shared_on(self, device: torch.device) -> RealSet:
        """These images on ``device``: one copy there for all that ask, as long as one of them holds it."""
        if self.pixels.device == device:
            return self
        if self.pixels not in _COPIES:
            _COPIES[self.pixels] = {}
        copies = _COPIES[self.pixels]
        labels, kept = copies.get(device, (None, None))
        found = None if kept is None else kept()
        if found is None or labels is not self.labels or (found.mean, found.std) != (self.mean, self.std):
            found = self.to(device)
            copies[device] = self.labels, ref(found)
        return found

    def take(self, which: Tensor | slice) -> RealSet:
        """Some of them, by index ``[...]``: pixels ``[..., c, h, w]`` and labels ``[...]``."""
        return replace(self, pixels=self.pixels[which], labels=self.labels[which])

    def normalised(self, dtype: torch.dtype) -> Tensor:
        """The images ``[..., c, h, w]`` in the space that networks see (`normalise`)."""
        return normalise(self.pixels, self.mean, self.std, dtype)


_COPIES = WeakTensorKeyDictionary()
"""By pixels: a mapping from devices to (labels, weak reference to the copy)."""


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 ``[..., c, h, w]`` to (pixels/255 - mean) / std per channel, on the device of ``pixels``; floats
    are normalised (and whitened) already, and only change their type."""
    if pixels.is_floating_point():
        return pixels.to(dtype)
    scale, shift = (_by_channel(tuple(values), dtype, pixels.device) for values in (std, mean))
    return (pixels.to(dtype) / 255 - shift) / scale


Constants = tuple[Sequence[float], Sequence[float]]
"""(mean, std) per channel."""


def renormalised(images: Tensor, before: Constants, after: Constants) -> Tensor:
    """``[..., c, h, w]`` float32 that were normalised by ``before``, by ``after``."""
    (shift, scale), (now, by) = (
        (torch.tensor(list(values), dtype=torch.float64)[:, None, None] for values in pair)
        for pair in (before, after)
    )
    return ((images.double() * scale + shift - now) / by).float()


@lru_cache(maxsize=64)
def _by_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[c, 1, 1]``. Kept: a GPU would be waited for at each copy."""
    with torch.inference_mode(False):  # whoever asks first
        return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def cosine_basis(side: int) -> Tensor:
    """The orthonormal cosine transform of ``side`` values (DCT-II), float64 ``[side, side]``: row k has k
    half-waves. ``basis @ x`` transforms, ``basis.T @ x`` brings back."""
    k = torch.arange(side, dtype=torch.float64)
    basis = torch.cos(math.pi / side * (k + 0.5) * k[:, None]) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return basis


def class_labels(inner_steps: int, classes: int, per_class: int) -> Tensor:
    """Hard labels ``[S, classes * per_class]`` int64 of the distilled batches, sorted by class."""
    return torch.arange(classes).repeat_interleave(per_class).repeat(inner_steps, 1)


def sample_per_class(labels: Tensor, classes: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Indices ``[classes, per_class]`` of images drawn without replacement from each class.

    A class with fewer images than ``per_class`` repeats them in the drawn order. ``labels [N]`` on CPU.
    """
    rows = []
    for label in range(classes):
        members = torch.nonzero(labels == label).flatten()
        order = members[torch.randperm(len(members), generator=generator)]
        rows.append(order.repeat(-(-per_class // len(order)))[:per_class])
    return torch.stack(rows)
