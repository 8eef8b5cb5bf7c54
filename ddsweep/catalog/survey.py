"""What was found when the files of a data set were looked at: facts to be shown, and reasons to refuse it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_EXAMPLES", "Remark", "Survey"]

MOST_EXAMPLES = 10
"""How many examples a remark names, of however many there are."""


@dataclass(frozen=True)
class Remark:
    """Something that was found ``count`` times (0: once and for all), of ``total`` where that says more;
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
    """A ``parquet`` or ``folder`` data set, every image of which was looked at once.

    ``content`` is 32 hex of a hash over the files, ``fingerprint`` the same where nothing else decides what
    is read from them. ``train`` and ``test`` are the numbers of images by class. ``shape`` is that of the
    files: 3 channels if any image has colour; height and width are 0 where there are several sizes.
    ``test_in_train`` is the number of test images whose pixels are those of a training image. The columns of
    a Parquet file (empty: ``image`` and ``label``) and the number of its class 0 say how it is read.
    ``remarks`` are to be shown; ``problems`` are the reasons why the data cannot be used.
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
