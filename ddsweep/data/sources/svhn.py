"""SVHN: two .mat files, ``X [32, 32, 3, N]`` uint8 and ``y [N, 1]`` 1 to 10, where 10 means the digit 0."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ddsweep.catalog import DatasetSpec
from ddsweep.data.layout import one_line
from ddsweep.data.sources import Part
from ddsweep.data.sources.published import Published
from ddsweep.errors import DataError

__all__ = ["SOURCE"]

_MATRIX, _COMPRESSED = 14, 15
"""The types of the parts that such a file is made of."""


class Svhn(Published):
    files = (("train_32x32.mat",), ("test_32x32.mat",))

    def torchvision(self, spec: DatasetSpec, root: Path, *, train: bool, download: bool) -> Any:
        import torchvision.datasets

        split = "train" if train else "test"
        return torchvision.datasets.SVHN(str(root / spec.path), split=split, download=download)

    def trouble(self, path: Path, size: int, start: bytes) -> str:
        """Its parts say how long they are, and must end where the file does."""
        if len(start) < 128 or not start.startswith(b"MATLAB 5.0"):
            return "truncated or not a .mat file"
        if start[126:128] != b"IM":
            return ""  # of a machine that writes numbers the other way round: read as a whole, or not
        with path.open("rb") as file:
            end = 128
            while end < size:
                file.seek(end)
                tag = file.read(8)
                kind, length = (int.from_bytes(tag[i : i + 4], "little") for i in (0, 4))
                if kind not in (_MATRIX, _COMPRESSED):
                    break
                end += 8 + length
        return "" if end == size else f"truncated or damaged: {size} bytes, but its parts end at {end}"

    def part(self, spec: DatasetSpec, root: Path, train: bool) -> Part:
        """Read with scipy, as torchvision does, and not through its class: that compares the md5 of the file
        with the published one and says only "not found or corrupted", for a truncated file and for a subset
        in the same layout alike. A .mat file holds arrays and is no pickle, so nothing is lost in safety.
        """
        import numpy as np
        from scipy.io import loadmat

        path = root / spec.path / self.files[0 if train else 1][0]

        def refused(reason: str) -> DataError:
            return DataError(f"dataset {spec.name}: {path}: {reason}; {self.how_to_get(spec)}")

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what scipy only warns about shows in the arrays
                content = loadmat(path, variable_names=("X", "y"))
        except Exception as error:  # for a damaged file, scipy raises any error of its parsing
            raise refused(f"truncated or not a .mat file: {one_line(error)}") from error
        for key, what in (("X", "images"), ("y", "labels")):
            if key not in content:
                raise refused(f"truncated or of another layout: there is no variable {key} ({what})")
        images, labels = content["X"], content["y"]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise refused(f"X is {images.dtype} {list(images.shape)}, not uint8 [32, 32, 3, N]")
        if labels.dtype.kind not in "ui" or labels.size != max(labels.shape, default=0):
            raise refused(f"y is {labels.dtype} {list(labels.shape)}, not whole numbers [N, 1]")
        digits = labels.reshape(-1).astype(np.int64)
        digits[digits == 10] = 0
        return Part(np.ascontiguousarray(images.transpose(3, 2, 0, 1)), digits, str(path))


SOURCE = Svhn()
