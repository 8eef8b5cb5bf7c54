"""The common part of data sets that torchvision downloads and reads."""

from __future__ import annotations

import os
import tempfile
from abc import abstractmethod
from pathlib import Path
from typing import Any

from ddsweep.catalog import DatasetSpec
from ddsweep.data.layout import need_all, one_line
from ddsweep.data.sources import Part, Raw, Source
from ddsweep.errors import DataError

__all__ = ["Published"]


class Published(Source):
    """``files`` are those of train and of test, and others that torchvision wants, in ``spec.path``."""

    files: tuple[tuple[str, ...], tuple[str, ...]]
    others: tuple[str, ...] = ()
    downloads = True

    @abstractmethod
    def torchvision(self, spec: DatasetSpec, root: Path, *, train: bool, download: bool) -> Any:
        """The data set as torchvision's class has it."""

    def trouble(self, path: Path, size: int, start: bytes) -> str:
        """Why a file of ``size`` bytes that begins with ``start`` (128) cannot be right; else nothing."""
        return ""

    def check(self, spec: DatasetSpec, root: Path | None) -> None:
        names = (*self.files[0], *self.files[1], *self.others)
        folder = need_all(spec, root, names, self.how_to_get(spec))
        for path in (folder / name for name in names):
            try:
                with path.open("rb") as file:
                    start = file.read(128)
                trouble = self.trouble(path, path.stat().st_size, start)
            except OSError as error:
                trouble = f"cannot be read: {error.strerror or error}"
            if trouble:
                raise DataError(f"dataset {spec.name}: {path}: {trouble}; {self.how_to_get(spec)}")

    def read(self, spec: DatasetSpec, root: Path | None) -> Raw:
        assert root is not None  # it has passed `check`
        return Raw(self.part(spec, root, True), self.part(spec, root, False), spec.class_names)

    def part(self, spec: DatasetSpec, root: Path, train: bool) -> Part:
        """Train or test, by way of torchvision's class. It never downloads here."""
        import numpy as np

        paths = [root / spec.path / file for file in self.files[0 if train else 1]]
        where = " and ".join(map(str, paths)) if len(paths) < 3 else str(root / spec.path)
        try:
            data = self.torchvision(spec, root, train=train, download=False)
            images, labels = np.asarray(data.data), np.asarray(data.targets, dtype=np.int64)
        except Exception as error:  # for a damaged file, torchvision raises any error of its parsing
            reason = one_line(error).removesuffix(". You can use download=True to download it")
            raise DataError(
                f"dataset {spec.name}: {where}: damaged or short: {reason}; {self.how_to_get(spec)}"
            ) from error
        stacked = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return Part(np.ascontiguousarray(stacked, dtype=np.uint8), labels, where)

    def how_to_get(self, spec: DatasetSpec) -> str:
        return f"`ddsweep data fetch {spec.base_name}` downloads it; delete damaged files first"

    def fetch(self, spec: DatasetSpec, root: Path) -> None:
        # Inside the root, so that the move is a rename on one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary:
            for train in (True, False):
                self.torchvision(spec, Path(temporary), train=train, download=True)
            target = root / spec.path
            target.mkdir(parents=True, exist_ok=True)
            for name in (*self.files[0], *self.files[1], *self.others):
                os.replace(Path(temporary) / spec.path / name, target / name)
