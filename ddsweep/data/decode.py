"""Image files to preallocated uint8 arrays, each decoded once, and what one file says about the rest."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from ddsweep.data.layout import one_line
from ddsweep.errors import DataError

__all__ = [
    "Box",
    "decode_files",
    "decode_parquet",
    "decode_resized",
    "file_image_shape",
    "parquet_class_count",
    "parquet_image_shape",
]

Shape = tuple[int, int, int]
_GREY = frozenset({"1", "L", "LA", "La"})
_COLOUR = frozenset({"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"})
_ROWS = 4096
"""Rows of a parquet file that are in memory as encoded bytes at a time."""


# --------------------------------------------------------------------------------------- one image


@contextmanager
def _opened(source: Path | bytes, where: str) -> Iterator[Image.Image]:
    """An 8-bit image; whatever goes wrong while it is read is a `DataError` that begins with ``where``."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.mode not in _GREY | _COLOUR:
                raise DataError(f"{where}: pixel mode {image.mode} is not 8 bits per channel")
            yield image
    except DataError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything: SyntaxError, struct.error
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise DataError(f"{where}: the image cannot be read: {reason}") from error


def _shape(source: Path | bytes, where: str) -> Shape:
    with _opened(source, where) as image:
        return (1 if image.mode in _GREY else 3, image.height, image.width)


def _decode_into(out: npt.NDArray[np.uint8], source: Path | bytes, where: str) -> None:
    """Decode into ``out`` [c, h, w]: as grey if c is 1, as RGB if it is 3."""
    channels, height, width = out.shape
    with _opened(source, where) as image:
        if (image.height, image.width) != (height, width):
            raise DataError(
                f"{where}: the image is {image.height}x{image.width} pixels, not {height}x{width} as declared"
            )
        mode = "L" if channels == 1 else "RGB"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    out[...] = pixels if channels == 1 else pixels.transpose(2, 0, 1)


# ------------------------------------------------------------------------------------ class folders


def file_image_shape(path: Path) -> Shape:
    """(channels, height, width) of an image file, from its header."""
    return _shape(path, str(path))


def decode_files(
    files: Sequence[tuple[int, Path]], shape: Shape
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """(label, file) pairs to images uint8 [N, c, h, w] and labels int64 [N].

    Raises `DataError` naming the file for one that is damaged or of another size than ``shape``.
    """
    images = np.empty((len(files), *shape), np.uint8)
    for i, (_, path) in enumerate(files):
        _decode_into(images[i], path, str(path))
    return images, np.array([label for label, _ in files], np.int64)


# ------------------------------------------------------------------------------------ crops, resized

Box = tuple[int, int, int, int]
"""Left, upper, right, lower, in pixels from 0; right and lower are the first that are outside."""


def decode_resized(out: npt.NDArray[np.uint8], path: Path, boxes: Sequence[Box | None]) -> None:
    """One image, as RGB, into ``out [len(boxes), 3, h, w]``: the part in each box (None: all of it), resized
    by PIL's bicubic filter; height to width is not kept.

    Raises `DataError` naming the file if it is missing or damaged, and for a box that is empty or not inside.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing")
    side = (out.shape[3], out.shape[2])
    with _opened(path, str(path)) as image:
        pixels = image.convert("RGB")
        for target, box in zip(out, boxes, strict=True):
            if box is not None:
                left, upper, right, lower = box
                if not (0 <= left < right <= pixels.width and 0 <= upper < lower <= pixels.height):
                    raise DataError(
                        f"{path}: box x {left + 1} to {right}, y {upper + 1} to {lower} is empty or not "
                        f"inside the image, which is {pixels.width} wide and {pixels.height} high"
                    )
            # Cropped first: resizing with a box would let pixels around it in.
            part = pixels if box is None else pixels.crop(box)
            target[...] = np.asarray(part.resize(side, Image.Resampling.BICUBIC)).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------ parquet


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A file of the Hugging Face image layout; anything unreadable in it is a `DataError` with its path."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for column in ("image", "label"):
                if column not in schema.names:
                    raise DataError(f"{path}: no column {column!r}; columns are {', '.join(schema.names)}")
            image = schema.field("image").type
            if not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
                raise DataError(f"{path}: column 'image' is {image}, not struct<bytes: binary, path: string>")
            if not pa.types.is_integer(schema.field("label").type):
                raise DataError(f"{path}: column 'label' is {schema.field('label').type}, not int64")
            if file.metadata.num_rows == 0:
                raise DataError(f"{path}: the file has no rows")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file (truncated or damaged): {one_line(error)}"
        ) from error


def _labels(path: Path, column: pa.Array, first_row: int, classes: int | None) -> npt.NDArray[np.int64]:
    if column.null_count:
        raise DataError(f"{path}: a label is null in rows {first_row} to {first_row + len(column) - 1}")
    labels: npt.NDArray[np.int64] = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    wrong = labels < 0 if classes is None else (labels < 0) | (labels >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        allowed = "not negative" if classes is None else f"0 to {classes - 1}"
        raise DataError(
            f"{path}: row {first_row + row}: label {labels[row]} is out of range; labels are {allowed}"
        )
    return labels


def parquet_class_count(files: Sequence[Path]) -> int:
    """The largest label plus one; reads the label column only."""
    largest = -1
    for path in files:
        with _parquet(path) as file:
            column = file.read(columns=["label"]).column("label").combine_chunks()
            largest = max(largest, int(_labels(path, column, 0, None).max()))
    return largest + 1


def parquet_image_shape(path: Path) -> Shape:
    """(channels, height, width) of the first image of a parquet file."""
    with _parquet(path) as file:
        batch = next(file.iter_batches(batch_size=1, columns=["image"]))
        encoded = pc.struct_field(batch.column("image"), "bytes")[0].as_py()
    return _shape(_not_null(encoded, f"{path}: row 0"), f"{path}: row 0")


def _not_null(encoded: bytes | None, where: str) -> bytes:
    if not encoded:
        raise DataError(f"{where}: image.bytes is empty; images must lie in the parquet file itself")
    return encoded


def decode_parquet(
    files: Sequence[Path], shape: Shape, classes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Parquet files, in order, to images uint8 [N, c, h, w] and labels int64 [N].

    Raises `DataError` naming file and row for an image that is damaged or of another size than
    ``shape``, and for a label outside 0 to ``classes`` - 1.
    """
    counts = []
    for path in files:
        with _parquet(path) as file:
            counts.append(file.metadata.num_rows)
    images = np.empty((sum(counts), *shape), np.uint8)
    labels = np.empty(sum(counts), np.int64)
    start = 0
    for path, count in zip(files, counts, strict=True):
        row = 0
        with _parquet(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=["image", "label"]):
                at = start + row
                labels[at : at + len(batch)] = _labels(path, batch.column("label"), row, classes)
                for i, encoded in enumerate(pc.struct_field(batch.column("image"), "bytes").to_pylist()):
                    where = f"{path}: row {row + i}"
                    _decode_into(images[at + i], _not_null(encoded, where), where)
                row += len(batch)
        if row != count:
            raise DataError(f"{path}: {row} rows found, but the file says {count}")
        start += count
    return images, labels
