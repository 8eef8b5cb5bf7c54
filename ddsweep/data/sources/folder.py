"""Images in folders, one folder a class, of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddsweep.catalog import DatasetSpec, Survey
from ddsweep.data.content import combined_digest, file_digest
from ddsweep.data.folders import Listing, list_folder, split_folders
from ddsweep.data.inline import described_items
from ddsweep.data.layout import location
from ddsweep.data.sources import Looking, Part, Raw, Source
from ddsweep.errors import SettingError

__all__ = ["SOURCE"]

_ROLES = ("train", "test")


class Folder(Source):
    """``spec.train`` and ``spec.test`` are folders of class folders, in ``spec.path``."""

    def described(self, value: Mapping[str, Any]) -> dict[str, Any]:
        for key in ("image_column", "label_column"):
            if key in value:
                raise SettingError(
                    f"dataset: {key} is for source: parquet; classes of a folder are its folders"
                )
        return described_items(value, "{}", numbers=False)

    def recognises(self, folder: Path) -> bool:
        return (folder / "train").is_dir() and (folder / "test").is_dir()

    def check(self, spec: DatasetSpec, root: Path | None) -> None:
        split_folders(spec, root)

    def survey(self, spec: DatasetSpec, root: Path | None, how: Looking) -> Survey | None:
        from ddsweep.data.survey import survey_once

        listing = list_folder(spec, root)
        return survey_once(
            spec,
            location(spec, root),
            [(role, path) for role in _ROLES for _, path in listing.files[role]],
            lambda: _look(spec, listing, how.sized),
            how,
            seen=(listing.names, listing.remarks, listing.broken),
        )

    def content(self, spec: DatasetSpec, root: Path | None) -> str:
        listing = list_folder(spec, root)
        return combined_digest(
            "folder",
            (
                (role, listing.names[label], file_digest(spec.name, path))
                for role in _ROLES
                for label, path in listing.files[role]
            ),
        )

    def read(self, spec: DatasetSpec, root: Path | None) -> Raw:
        from ddsweep.data.decode import decode_files

        files = list_folder(spec, root).files

        def part(role: str, folders: tuple[str | int, ...]) -> Part:
            images, labels = decode_files(files[role], spec.read_shape, resize=0 in spec.native)
            return Part(images, labels, f"{spec.path}: {', '.join(map(str, folders))}")

        return Raw(part("train", spec.train), part("test", spec.test), spec.class_names)


def _look(spec: DatasetSpec, listing: Listing, sized: bool) -> Survey:
    from ddsweep.data.labels import label_folder
    from ddsweep.data.survey import Item, looked_at, summed_up
    from ddsweep.data.tally import Tally

    tally, entries = Tally(), []
    items = (Item(role, label, (path, None), path) for role in _ROLES for label, path in listing.files[role])
    for item, digest, seen in looked_at(items):
        entries.append((item.role, listing.names[int(item.label or 0)], digest))
        tally.add(item.role, item.label, item.place, seen)
    for path, reason in listing.broken:
        tally.troubles.add(f"{path}: {reason}")
    content = combined_digest("folder", entries)
    found = summed_up(spec, sized, tally, label_folder(spec, listing), content, {})
    return replace(found, remarks=(*listing.remarks, *found.remarks))


SOURCE = Folder()
