"""The findings in the files of a data set: facts to show, and reasons to refuse it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_EXAMPLES", "Remark", "Survey"]

MOST_EXAMPLES = 10
"""A remark names at most so many examples."""


@dataclass(frozen=True)
class Remark:
    """Something that was found ``count`` times (0: it has no count), out of ``total`` if that is known;
    ``examples`` are the first `MOST_EXAMPLES`."""

    what: str
    count: int
    examples: tuple[str, ...] = ()
    total: int = 0

    def __str__(self) -> str:
        number = f": {self.count:,}" if self.count else ""
        of = f" of {self.total:,}" if self.total else ""
        more = self.count - len(self.examples)
        listed = ", ".join(self.examples) + (f", and {more:,} more" if more > 0 else "")
        return self.what + number + of + (f" ({listed})" if self.examples else "")


@dataclass(frozen=True)
class Survey:
    """The findings in a ``parquet`` or ``folder`` data set. Every image was checked once.

    ``content`` is 32 hex of a hash over the files. ``fingerprint`` adds the settings of reading; without any
    it is the same. ``train`` and ``test`` are the numbers of images by class. ``shape`` is that of the files:
    3 channels if any image has colour; height and width are 0 if there are several sizes. ``test_in_train``
    is the number of test images whose pixels are those of a training image. A Parquet file is read by its
    columns (empty: ``image`` and ``label``) and the number of its class 0. ``remarks`` are for the user;
    ``problems`` are the reasons why the data cannot be used.
    """

    content: str
    fingerprint: str
    class_names: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    shape: tuple[int, int, int]
    test_in_train: int = 0
    image_column: str = ""
    label_column: str = ""
    first_label: int = 0
    remarks: tuple[Remark, ...] = ()
    problems: tuple[str, ...] = ()
