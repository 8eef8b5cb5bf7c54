"""CIFAR-10 in its batches for Python.

They are pickles. torchvision checks the md5 of each (`_check_integrity`) before it opens one, so a file that
is not the published one is refused, not executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddsweep.catalog import DatasetSpec
from ddsweep.data.sources.published import Published

__all__ = ["SOURCE"]

_LEAST = 10_000 * 3072
"""Bytes of the images in a batch."""


class Cifar(Published):
    files = (tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",))
    others = ("batches.meta",)

    def torchvision(self, spec: DatasetSpec, root: Path, *, train: bool, download: bool) -> Any:
        import torchvision.datasets

        return torchvision.datasets.CIFAR10(str(root), train=train, download=download)

    def trouble(self, path: Path, size: int, start: bytes) -> str:
        if path.name in self.others or size > _LEAST:
            return ""
        return f"damaged or short: {size} bytes, but its images alone have {_LEAST}"


SOURCE = Cifar()
