"""Statistics over the images of a data set, added up one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ddsweep.catalog import MOST_EXAMPLES, DatasetSpec, Remark
from ddsweep.data.decode import Look, Shape
from ddsweep.data.labels import ROLES, Label, Place, listed, place_text

__all__ = ["Tally"]

_GREY = "grey images, read as colour"
_COLOUR = "colour images, read as grey because shape says so"
_TRANSPARENT = "images with transparent parts, laid on white"
_ANIMATED = "images of several frames, of which the first is read"
_TURNED = "photographs to be turned by their EXIF data, read as they are stored"
_SHARED = "test images that are in train too"
_AGAIN = "training images that are there again"
_OTHERWISE = "training images that are there again with another label"


@dataclass
class _Noted:
    """The count of a finding, and its first places."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append(example)

    def remark(self, what: str, total: int = 0) -> Remark:
        return Remark(what, self.count, tuple(self.examples), total)


@dataclass
class Tally:
    """Labels, places and digests of the pixels of all images by role; over both roles the kinds and sizes,
    and the reasons why some images cannot be used."""

    labels: dict[str, list[Label]] = field(default_factory=lambda: {role: [] for role in ROLES})
    places: dict[str, list[Place]] = field(default_factory=lambda: {role: [] for role in ROLES})
    pixels: dict[str, list[bytes]] = field(default_factory=lambda: {role: [] for role in ROLES})
    sizes: dict[tuple[int, int], _Noted] = field(default_factory=dict)
    channels: dict[int, _Noted] = field(default_factory=lambda: {1: _Noted(), 3: _Noted()})
    kinds: dict[str, _Noted] = field(default_factory=dict)
    troubles: _Noted = field(default_factory=_Noted)

    def add(self, role: str, label: Label, place: Place, seen: Look) -> None:
        self.labels[role].append(label)
        self.places[role].append(place)
        self.pixels[role].append(seen.pixels)
        where = place_text(place)
        if seen.trouble:
            self.troubles.add(f"{where}: {seen.trouble}")
            return
        channels, height, width = seen.shape
        self.channels[channels].add(where)
        self.sizes.setdefault((height, width), _Noted()).add(where)
        kinds = {_TRANSPARENT: seen.transparent, _ANIMATED: seen.animated, _TURNED: seen.turned}
        for what in (kind for kind, is_so in kinds.items() if is_so):
            self.kinds.setdefault(what, _Noted()).add(where)

    @property
    def transparent(self) -> bool:
        """Whether reading changes the images of the files."""
        return _TRANSPARENT in self.kinds

    def shape(self, spec: DatasetSpec) -> Shape:
        """(channels, height, width) by ``spec``. Values that it leaves out are those of the files: 3 channels
        if any image has colour, 0 for height and width if there are several sizes."""
        channels, height, width = spec.native_shape
        if not height and len(self.sizes) == 1:
            ((height, width),) = self.sizes
        return (channels or (3 if self.channels[3].count else 1), height, width)

    def remarks(self, shape: Shape) -> list[Remark]:
        """Remarks on images that are read as ``shape``."""
        other = self.channels[4 - shape[0]]
        out = [other.remark(_GREY if shape[0] == 3 else _COLOUR)] if other.count else []
        if not shape[1] and self.sizes:
            (small, _), (large, _) = min(self.sizes.items()), max(self.sizes.items())
            sizes = f"sizes of images, from {small[0]}x{small[1]} to {large[0]}x{large[1]}, all resized"
            out.append(Remark(sizes, len(self.sizes)))
        return out + [noted.remark(what) for what, noted in self.kinds.items()]

    def problems(self, shape: Shape, sized: bool) -> list[str]:
        """The reasons why images cannot be read as ``shape``; ``sized``: all are resized anyway."""
        out = []
        if self.troubles.count:
            out.append(listed("images cannot be used", self.troubles.examples, self.troubles.count))
        if shape[1]:
            wrong = _Noted()
            for (height, width), noted in self.sizes.items():
                if (height, width) != shape[1:]:
                    pixels = f"{height}x{width} pixels, not {shape[1]}x{shape[2]} as declared"
                    for where in noted.examples:
                        wrong.add(f"{where}: the image is {pixels}")
                    wrong.count += noted.count - len(noted.examples)
            if wrong.count:
                told = listed("images have another size", wrong.examples, wrong.count)
                out.append(f"{told}; leave shape out and give size: N to resize all of them")
        elif len(self.sizes) > 1 and not sized:
            (small, first), (large, last) = min(self.sizes.items()), max(self.sizes.items())
            out.append(
                f"images have {len(self.sizes):,} sizes, from {small[0]}x{small[1]} ({first.examples[0]}) to "
                f"{large[0]}x{large[1]} ({last.examples[0]}) pixels; give size: N to resize all to N x N"
            )
        return out

    def doubles(self, classes: Mapping[str, list[int]]) -> tuple[int, list[Remark], list[str]]:
        """The number of test images in train, pixel by pixel; remarks on duplicate images, with their class
        by ``classes``; and the problem if no test image is new."""
        first: dict[bytes, int] = {}
        again, otherwise, shared = _Noted(), _Noted(), _Noted()
        for i, pixels in enumerate(self.pixels["train"]):
            before = first.setdefault(pixels, i)
            if pixels and before != i:
                same = classes["train"][before] == classes["train"][i]
                (again if same else otherwise).add(self._pair("train", i, before))
        for i, pixels in enumerate(self.pixels["test"]):
            if pixels and pixels in first:
                shared.add(self._pair("test", i, first[pixels]))
        there = sum(map(bool, self.pixels["test"]))
        remarks = [
            noted.remark(what, total)
            for what, noted, total in (
                (_SHARED, shared, there),
                (_AGAIN, again, len(self.pixels["train"])),
                (_OTHERWISE, otherwise, len(self.pixels["train"])),
            )
            if noted.count
        ]
        problems = []
        if there and shared.count == there:
            problems.append(
                f"all {there:,} test images are in train too, so a test would say nothing: "
                f"{'; '.join(shared.examples[:3])}; give test images that are not in train"
            )
        return shared.count, remarks, problems

    def _pair(self, role: str, i: int, before: int) -> str:
        return f"{place_text(self.places[role][i])} equals {place_text(self.places['train'][before])}"
