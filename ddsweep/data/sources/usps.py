"""USPS: two bzip2 files of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddsweep.catalog import DatasetSpec
from ddsweep.data.sources.published import Published

__all__ = ["SOURCE"]

_LEAST = 14
"""Bytes of a bzip2 file of nothing."""


class Usps(Published):
    files = (("usps.bz2",), ("usps.t.bz2",))

    def torchvision(self, spec: DatasetSpec, root: Path, *, train: bool, download: bool) -> Any:
        import torchvision.datasets

        return torchvision.datasets.USPS(str(root / spec.path), train=train, download=download)

    def trouble(self, path: Path, size: int, start: bytes) -> str:
        whole = start.startswith(b"BZh") and size >= _LEAST
        return "" if whole else "damaged or short: Invalid data stream, not bzip2"


SOURCE = Usps()
