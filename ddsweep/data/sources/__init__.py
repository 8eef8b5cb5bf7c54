"""Data sources: files to images and labels. One module each, behind one contract.

A source says whether its files are there and whole, cheaply; reads them; and, where the data are a user's
own, looks at all of them once and gives the hash that stands for them in ids. Checking labels, splitting,
measuring and transforming are `ddsweep.data.load`'s and the same for all. Modules are imported when they are
asked for, and import numpy and what decodes images when they read.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddsweep.catalog import SOURCES, DatasetSpec, Survey
from ddsweep.data.layout import PUT_THERE
from ddsweep.errors import DataError, SettingError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Looking", "Part", "Raw", "Say", "Source", "source_of"]

Say = Callable[[str], None]


class Part(NamedTuple):
    """Train or test before the split: images uint8 [N, c, h, w], labels int64 [N], and its files."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    where: str


class Raw(NamedTuple):
    """A data set as it was read, and the names of its classes."""

    train: Part
    test: Part
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Looking:
    """How the user's own data are looked at. ``sized``: images are resized anyway, so they may have different
    sizes. ``say`` is called if it takes a while. ``may_run``: the user's own code may be run for it, in a
    separate process."""

    sized: bool = False
    say: Say | None = None
    may_run: bool = False


class Source(ABC):
    """The contract (`tests/data/test_contract.py`). ``SOURCE`` of a module of that name is one of these.

    ``root`` is the data root, or None. Every failure is a `DataError` that names data set, file and remedy.
    """

    @abstractmethod
    def check(self, spec: DatasetSpec, root: Path | None) -> None:
        """Raise `MissingError` for missing files, `DataError` for files that cannot be right. Looks at names,
        sizes and first bytes only, so it takes milliseconds for any size."""

    @abstractmethod
    def read(self, spec: DatasetSpec, root: Path | None) -> Raw:
        """All images, of ``spec.read_shape``, and labels from 0 on, the same at every call; both in the order
        of the files. The files have passed `check`."""

    # ---------------------------------------------------------------- where a source has more to say

    present = "present"
    """The status in a list if `check` finds nothing wrong."""

    def how_to_get(self, spec: DatasetSpec) -> str:
        """How a user comes by the files: the end of a message."""
        return PUT_THERE

    downloads = False
    """Whether there is a `fetch`."""

    def fetch(self, spec: DatasetSpec, root: Path) -> None:
        """Download the files into ``root``, all or none. Only of a source that ``downloads``."""
        raise DataError(f"dataset {spec.name}: {self.how_to_get(spec)}")

    # ------------------------------------------------------------------------- of data of one's own

    def described(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `DatasetSpec` that only this source reads from the mapping in a sweep file. Opens no
        file. Raises `SettingError` for wrong values."""
        return {}

    def recognises(self, folder: Path) -> bool:
        """Whether ``folder`` is laid out as this source reads it by default."""
        return False

    def survey(self, spec: DatasetSpec, root: Path | None, how: Looking) -> Survey | None:
        """The findings after a check of every image, with the fingerprint for ids; None if the name stands in
        ids."""
        return None

    def content(self, spec: DatasetSpec, root: Path | None) -> str:
        """``survey(...).content`` as the files are now, without looking at an image."""
        return ""


def source_of(spec: DatasetSpec) -> Source:
    """The source that reads ``spec``. Raises `SettingError` for an unknown source."""
    if spec.source not in SOURCES:
        raise SettingError(
            f"dataset {spec.name}: unknown source {spec.source!r}; known are {', '.join(SOURCES)}"
        )
    found: Source = importlib.import_module(f"ddsweep.data.sources.{spec.source}").SOURCE
    return found
