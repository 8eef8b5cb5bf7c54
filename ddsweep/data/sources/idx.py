"""MNIST and Fashion-MNIST: idx files, in a folder that is called as torchvision's class is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ddsweep.catalog import DatasetSpec
from ddsweep.data.sources.published import Published

__all__ = ["SOURCE"]


class Idx(Published):
    files = (
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    )

    def torchvision(self, spec: DatasetSpec, root: Path, *, train: bool, download: bool) -> Any:
        import torchvision.datasets

        name = Path(spec.path).parts[0]
        return getattr(torchvision.datasets, name)(str(root), train=train, download=download)

    def trouble(self, path: Path, size: int, start: bytes) -> str:
        """The size that the header promises against that of the file: torchvision says only 'shape'."""
        dims = start[3] if start[:3] == b"\0\0\x08" and len(start) > 3 else 0
        header = start[4 : 4 + 4 * dims]
        if dims not in (1, 3) or len(header) < 4 * dims:
            return f"not an idx file of bytes ({size} bytes)"
        counts = [int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(dims)]
        promised = 4 + 4 * dims + math.prod(counts)
        if size == promised:
            return ""
        kind = "truncated" if size < promised else "damaged"
        return f"{kind}: {size} bytes, but its header promises {promised}"


SOURCE = Idx()
