"""Kinds of data sources by name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SOURCES", "SourceSpec"]


@dataclass(frozen=True)
class SourceSpec:
    """One kind of source. `ddsweep.data.sources.<name>` reads it.

    ``by``: the key of a mapping in a sweep file with the place of its data; ids then depend on their content.
    Without it, data sets of the catalog alone have this source. ``any_size``: each image is resized as it is
    read, because its files have several sizes.
    """

    name: str
    by: str = ""
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
        SourceSpec("parquet", by="path"),
        SourceSpec("folder", by="path"),
        SourceSpec("code", by="file"),
    )
}
