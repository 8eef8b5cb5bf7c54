"""The picture of a distilled set: its images by inner step and class, with names around them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddsweep.results.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["grid_png", "image_grid"]

_DPI = 100
_TILE = 48  # least pixels a side: 8x8 digits are legible from here
_GAP = 2
_STEP_GAP = 6  # further pixels between steps of several rows
_COLUMNS = 20
_ROWS = 40
_STEPS, _IMAGES = 20, 100
"""The most inner steps that are shown, and the most images of each."""


@dataclass(frozen=True)
class _Row:
    """A row of tiles: its step, and the places and class names of its images. ``last`` of its step."""

    step: int
    images: tuple[int, ...]
    names: tuple[str, ...]
    last: bool


def image_grid(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    labels: Tensor | Sequence[int],
    path: Path,
    class_names: Sequence[str],
    temporary: Path,
) -> None:
    """Write the picture `grid_png` of a distilled set to ``path``."""
    write_atomic(path, grid_png(images, mean, std, labels, class_names), temporary)


def grid_png(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    labels: Tensor | Sequence[int],
    class_names: Sequence[str],
) -> bytes:
    """A picture of a distilled set as PNG: rows by inner step, columns by class.

    ``images`` [S, n, c, h, w] are in normalised pixel space, ``mean`` and ``std`` have c values, ``labels``
    are [n] or [S, n] classes. Pixels become x * std + mean, clipped to [0, 1] and enlarged without smoothing.
    A step of more than 20 images has several rows. Of more than 20 steps, or 40 rows, it shows evenly spaced
    steps, of more than 100 images in a step the first of each class, and says so.
    """
    steps, count = images.shape[:2]
    rows, notes = _rows(_classes(labels, steps, count), class_names)
    tiles = [_pixels(images[row.step, list(row.images)], mean, std) for row in rows]
    figure = _figure(tiles, rows, "; ".join(notes))
    buffer = io.BytesIO()
    # The file names no version of matplotlib, so the same images give the same bytes for longer.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _classes(labels: Tensor | Sequence[int], steps: int, count: int) -> list[list[int]]:
    import torch

    classes: list[list[int]] = torch.as_tensor(labels).cpu().long().expand(steps, count).tolist()
    return classes


def _pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[..., h, w, 3] in [0, 1] of ``images`` [..., c, h, w], enlarged, with a white gap at the right and
    below."""
    import torch

    channels, height, width = images.shape[-3:]
    shape = (channels, 1, 1)
    pixels = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    pixels = pixels.nan_to_num(0.0).clamp(0, 1)
    scale = max(1, -(-_TILE // min(height, width)))
    pixels = pixels.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    pixels = torch.nn.functional.pad(pixels, (0, _GAP, 0, _GAP), value=1.0).movedim(-3, -1)
    return pixels if channels == 3 else pixels[..., :1].expand(*pixels.shape[:-1], 3)


# ------------------------------------------------------------------------------------------- rows


def _rows(classes: Sequence[Sequence[int]], class_names: Sequence[str]) -> tuple[list[_Row], list[str]]:
    """The rows of a picture, and what is to be said of those that it leaves out."""
    steps, count = len(classes), len(classes[0])
    orders = [_by_class(own, len(class_names)) for own in classes]
    shown = min(map(len, orders))
    orders = [order[:shown] for order in orders]
    cut = [_cut([own[i] for i in order], steps) for own, order in zip(classes, orders, strict=True)]
    kept = _evenly_spaced(steps, max(1, min(_STEPS, _ROWS // max(map(len, cut)))))
    rows = []
    for step in kept:
        for number, places in enumerate(cut[step]):
            images = tuple(orders[step][place] for place in places)
            names = tuple(class_names[classes[step][image]] for image in images)
            rows.append(_Row(step, images, names, number == len(cut[step]) - 1))
    notes = []
    if len(kept) < steps:
        notes.append(f"{len(kept)} of {steps} inner steps, evenly spaced")
    if shown < count:
        notes.append(f"{shown} of {count} images a step, the first of each class")
    return rows, notes


def _evenly_spaced(count: int, most: int) -> list[int]:
    kept = min(count, most)
    return [round(place * (count - 1) / max(1, kept - 1)) for place in range(kept)]


def _by_class(classes: Sequence[int], n_classes: int) -> list[int]:
    """The images of one step sorted by class; of too many, equally many of each class."""
    order = sorted(range(len(classes)), key=lambda image: classes[image])
    if len(order) <= _IMAGES:
        return order
    per_class, seen, kept = max(1, _IMAGES // n_classes), [0] * n_classes, []
    for image in order:
        seen[classes[image]] += 1
        if seen[classes[image]] <= per_class:
            kept.append(image)
    return kept[:_IMAGES]


def _cut(classes: Sequence[int], steps: int) -> list[list[int]]:
    """The places of the sorted ``classes`` of one step in rows of at most 20.

    Where each class has as many images, a class keeps its columns in all rows: as few as leave the picture
    no higher than wide, if there is room. Else one row goes on where the one before ends.
    """
    if len(classes) <= _COLUMNS:
        return [list(range(len(classes)))]
    firsts = [place for place, own in enumerate(classes) if place == 0 or own != classes[place - 1]]
    each = len(classes) // len(firsts)
    if len(firsts) > _COLUMNS or firsts != list(range(0, len(classes), each)):
        count, rows = len(classes), -(-len(classes) // _COLUMNS)
        return [list(range(row * count // rows, (row + 1) * count // rows)) for row in range(rows)]
    widths = range(1, _COLUMNS // len(firsts) + 1)
    width = next((one for one in widths if steps * -(-each // one) <= one * len(firsts)), widths[-1])
    return [
        [first + place for first in firsts for place in range(begin, min(begin + width, each))]
        for begin in range(0, each, width)
    ]


# ---------------------------------------------------------------------------------------- drawing


def _figure(tiles: Sequence[Tensor], rows: Sequence[_Row], note: str) -> Figure:
    """The ``tiles`` [n, h, w, 3] of each row at one pixel per pixel, with the names of steps at the left.
    Class names are above the first row, and above each one with other names than the row before it."""
    from matplotlib.figure import Figure

    side, column_side = tiles[0].shape[1:3]
    blocks = _blocks(rows)
    groups = [_groups(block[0].names) for block in blocks]
    width = max(len(row.names) for row in rows) * column_side
    # Names are upright only if the widest fits over its own columns (6 pixels a letter).
    upright = all(6 * len(name) <= column_side * (end - start) for own in groups for name, start, end in own)
    top = 22 if upright else 10 + 5 * max(len(name) for row in rows for name in row.names)
    # A slanted name reaches beyond the last column.
    left, bottom, right = 56, 22 if note else 6, 6 if upright else top
    left_over = iter(tiles)
    canvases = [_canvas([next(left_over) for _ in block], block) for block in blocks]
    height = sum(canvas.shape[0] for canvas in canvases) + top * len(blocks)
    full_width, full_height = max(left + width + right, 6 * len(note) + left), height + bottom
    figure = Figure(figsize=(full_width / _DPI, full_height / _DPI), dpi=_DPI)
    below = full_height
    for block, canvas, own in zip(blocks, canvases, groups, strict=True):
        high, wide = canvas.shape[:2]
        below -= top + high
        area = (left / full_width, below / full_height, wide / full_width, high / full_height)
        axes = figure.add_axes(area)
        axes.imshow(canvas.numpy(), interpolation="nearest", extent=(0, wide, high, 0), aspect="auto")
        axes.set_axis_off()
        for name, start, end in own:
            middle = (start + end) / 2 * column_side
            slant: dict[str, Any] = {} if upright else {"rotation": 45, "rotation_mode": "anchor"}
            axes.text(
                *(middle, -5, name),
                ha="center" if upright else "left",
                va="bottom",
                fontsize=7,
                parse_math=False,  # names may have dollars
                **slant,
            )
        for step, begin, end in _spans(block, side):
            axes.text(-6, (begin + end) / 2, f"step {step}", ha="right", va="center", fontsize=7)
        if note and block is blocks[-1]:
            axes.text(0, high + 5, note, ha="left", va="top", fontsize=7)
    return figure


def _canvas(tiles: Sequence[Tensor], block: Sequence[_Row]) -> Tensor:
    """The tiles of consecutive rows [H, W, 3], with a gap between steps of several rows."""
    import torch

    parts: list[Tensor] = []
    for own, row in zip(tiles, block, strict=True):
        parts.append(torch.cat([*own], 1))
        if _has_gap(block, row):
            parts.append(torch.ones(_STEP_GAP, *parts[-1].shape[1:]))
    return torch.cat(parts, 0)


def _has_gap(block: Sequence[_Row], row: _Row) -> bool:
    """Whether a gap follows: a step of several rows ends, and another one begins."""
    several = sum(other.step == row.step for other in block) > 1
    return row.last and several and row is not block[-1]


def _spans(block: Sequence[_Row], side: int) -> list[tuple[int, int, int]]:
    """Where each step of a block begins and ends, in pixels from the top: (step, first, after the last)."""
    spans: dict[int, tuple[int, int]] = {}
    at = 0
    for row in block:
        spans[row.step] = spans.get(row.step, (at, at))[0], at + side
        at += side + _STEP_GAP * _has_gap(block, row)
    return [(step, begin, end) for step, (begin, end) in spans.items()]


def _blocks(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Runs of rows with equal class names above their columns."""
    blocks: list[list[_Row]] = []
    for row in rows:
        if blocks and blocks[-1][0].names == row.names:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    return blocks


def _groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of equal names, as (name, first column, column after the last)."""
    groups: list[tuple[str, int, int]] = []
    for column, name in enumerate(names):
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1], column + 1)
        else:
            groups.append((name, column, column + 1))
    return groups
