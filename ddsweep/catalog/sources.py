"""Kinds of data sources by name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SOURCES", "SourceSpec"]


@dataclass(frozen=True)
class SourceSpec:
    """One kind of source. `ddsweep.data.sources.<name>` reads it.

    ``own``: its data are described by a mapping in a sweep file, and their content stands for them in ids.
    ``any_size``: each image is resized as it is read, for its files have no one size.
    """

    name: str
    own: bool = False
    any_size: bool = False


SOURCES: dict[str, SourceSpec] = {
    spec.name: spec
    for spec in (
        SourceSpec("digits"),
        SourceSpec("idx"),
        SourceSpec("usps"),
        SourceSpec("cifar"),
        SourceSpec("svhn"),
        SourceSpec("voc", any_size=True),
        SourceSpec("cub", any_size=True),
        SourceSpec("parquet", own=True),
        SourceSpec("folder", own=True),
    )
}
