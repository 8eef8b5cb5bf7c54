"""The artifacts of a trial: tensors with a header (safetensors, no pickle) and a picture."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddsweep.errors import CheckpointError
from ddsweep.paths import user_path
from ddsweep.results.files import write_atomic

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["grid_png", "image_grid", "load_tensors", "save_tensors", "tensor_sha256"]

_KEY = "ddsweep"


# ---------------------------------------------------------------------------------------- tensors


def tensor_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, by sorted name. The device of the tensors does not
    matter."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        described = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(described).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], temporary: Path
) -> None:
    """Write named tensors and a JSON header as one safetensors file, atomically.

    The metadata key ``ddsweep`` holds the JSON ``{"header": ..., "sha256": ...}``, the sum over header and
    tensors. There is one key, because safetensors writes several in an order that differs from run to run;
    the same content should give the same bytes. Raises ``ValueError`` or ``TypeError`` for a header that is
    not JSON (NaN included), and `ResultsError` if the file cannot be written.
    """
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, so each is cloned.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"header": header, "sha256": _sum(own, header)}, sort_keys=True, allow_nan=False)
    write_atomic(path, save(own, metadata={_KEY: text}), temporary)


def _sum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    return hashlib.sha256(f"{tensor_sha256(tensors)}\n{text}".encode()).hexdigest()


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on CPU), sorted by name, and the header of a file of `save_tensors`.

    safetensors gives them in an order that differs from process to process, and sums over the tensors of a
    network depend on it in their last bits.
    Raises `CheckpointError`, naming the file, if it is missing, truncated, altered, or not a file of ddsweep.
    """
    from safetensors.torch import load

    try:
        data = user_path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from error
    try:
        tensors = dict(sorted(load(data).items()))
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except Exception as error:  # safetensors answers damage with half a dozen exception types
        raise CheckpointError(f"{path}: truncated, altered, or not a safetensors file ({error})") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not one of ddsweep (no {_KEY!r} header)")
    try:
        content = json.loads(metadata[_KEY])
        header: dict[str, Any] = content["header"]
        intact = content["sha256"] == _sum(tensors, header)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: altered since it was written: its check sum does not match")
    return tensors, header


# ---------------------------------------------------------------------------------------- picture

_DPI = 100
_TILE = 48  # least pixels a side: 8x8 digits are legible from here
_GAP = 2
_MAX_ROWS, _MAX_COLUMNS = 20, 100


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
    """A picture of a distilled set as PNG: a row per inner step, columns by class.

    ``images`` [S, n, c, h, w] are in normalised pixel space, ``mean`` and ``std`` have c values, ``labels``
    are [n] or [S, n] classes. Pixels become x * std + mean, clipped to [0, 1] and enlarged without smoothing.
    Of more than 20 steps it shows evenly spaced ones, of more than 100 columns the first images of each
    class, and says so.
    """
    import torch

    steps, count, channels, height, width = images.shape
    shape = (channels, 1, 1)
    pixels = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    pixels = pixels.nan_to_num(0.0).clamp(0, 1)
    classes = torch.as_tensor(labels).cpu().long().expand(steps, count)
    rows = torch.linspace(0, steps - 1, min(steps, _MAX_ROWS)).round().long().tolist()
    orders = [_by_class(classes[row], len(class_names)) for row in rows]
    columns = min(len(order) for order in orders)

    scale = max(1, -(-_TILE // min(height, width)))
    tiles = torch.stack([pixels[row, order[:columns]] for row, order in zip(rows, orders, strict=True)])
    tiles = tiles.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    tiles = torch.nn.functional.pad(tiles, (0, _GAP, 0, _GAP), value=1.0)
    canvas = tiles.permute(0, 3, 1, 4, 2).reshape(tiles.shape[0] * tiles.shape[3], -1, channels)
    notes = []
    if len(rows) < steps:
        notes.append(f"{len(rows)} of {steps} inner steps, evenly spaced")
    if columns < count:
        notes.append(f"{columns} of {count} images a step, the first of each class")
    figure = _figure(
        canvas if channels == 3 else canvas[..., :1].expand(-1, -1, 3),
        row_names=[f"step {row}" for row in rows],
        column_names=[class_names[int(classes[rows[0], i])] for i in orders[0][:columns]],
        note="; ".join(notes),
    )
    buffer = io.BytesIO()
    # The file names no version of matplotlib, so the same images give the same bytes for longer.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _by_class(classes: torch.Tensor, n_classes: int) -> list[int]:
    """The images of one step sorted by class; of too many, equally many of each class."""
    order: list[int] = classes.sort(stable=True).indices.tolist()
    if len(order) <= _MAX_COLUMNS:
        return order
    per_class, seen, kept = max(1, _MAX_COLUMNS // n_classes), [0] * n_classes, []
    for index in order:
        label = int(classes[index])
        seen[label] += 1
        if seen[label] <= per_class:
            kept.append(index)
    return kept[:_MAX_COLUMNS]


def _figure(canvas: torch.Tensor, row_names: list[str], column_names: list[str], note: str) -> Figure:
    """The canvas [H, W, 3] at one pixel per pixel, with names around it."""
    from matplotlib.figure import Figure

    height, width = canvas.shape[:2]
    row_side, column_side = height / len(row_names), width / len(column_names)
    groups = _groups(column_names)
    # Names are upright only if the widest fits over its own columns (6 pixels a letter).
    upright = all(6 * len(name) <= column_side * (end - start) for name, start, end in groups)
    top = 22 if upright else 10 + 5 * max(len(name) for name in column_names)
    # A slanted name reaches beyond the last column.
    left, bottom, right = 56, 22 if note else 6, 6 if upright else top
    full_width, full_height = max(left + width + right, 6 * len(note) + left), top + height + bottom
    figure = Figure(figsize=(full_width / _DPI, full_height / _DPI), dpi=_DPI)
    area = (left / full_width, bottom / full_height, width / full_width, height / full_height)
    axes = figure.add_axes(area)
    axes.imshow(canvas.numpy(), interpolation="nearest", extent=(0, width, height, 0), aspect="auto")
    axes.set_axis_off()
    for name, start, end in groups:
        middle = (start + end) / 2 * column_side
        slant: dict[str, Any] = {} if upright else {"rotation": 45, "rotation_mode": "anchor"}
        axes.text(middle, -5, name, ha="center" if upright else "left", va="bottom", fontsize=7, **slant)
    for row, name in enumerate(row_names):
        axes.text(-6, (row + 0.5) * row_side, name, ha="right", va="center", fontsize=7)
    if note:
        axes.text(0, height + 5, note, ha="left", va="top", fontsize=7)
    return figure


def _groups(names: list[str]) -> list[tuple[str, int, int]]:
    """Runs of equal names, as (name, first column, column after the last)."""
    groups: list[tuple[str, int, int]] = []
    for column, name in enumerate(names):
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1], column + 1)
        else:
            groups.append((name, column, column + 1))
    return groups
