"""Parquet files of images: their columns, and the meaning of labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ddsweep.data.decode import Shape, decode_into
from ddsweep.data.labels import Label
from ddsweep.data.layout import one_line
from ddsweep.errors import DataError

__all__ = ["IMAGE", "LABEL", "Columns", "decode_parquet", "find_columns", "read_rows"]

IMAGE, LABEL = "image", "label"
"""The default names of the columns."""
_ROWS = 512
"""So many rows of a Parquet file are in memory as encoded bytes at a time."""
_USUAL_LABELS = ("labels", "fine_label", "class", "category", "target", "y")


@dataclass(frozen=True)
class Columns:
    """The columns of a Parquet file that matter: ``image``, encoded images as bytes or as struct<bytes,
    path>; ``label``, whole numbers or (``text``) names of classes. ``names`` are the classes in Hugging
    Face's metadata, if it has them."""

    image: str
    label: str
    text: bool
    names: tuple[str, ...]


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Turns any reading error into a `DataError` with the path."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a readable parquet file (truncated or damaged): {one_line(error)}"
        ) from error


def find_columns(path: Path, image: str = "", label: str = "") -> Columns:
    """The columns of images and labels of a Parquet file; ``image`` and ``label`` name them.

    By default they are ``image`` and ``label`` if these exist, then the Image and the ClassLabel of Hugging
    Face's metadata, then the only columns of a fitting type. Raises `DataError`, naming the columns and the
    setting that helps, for a missing column, one of another type, and several candidates.
    """
    with _parquet(path) as file:
        if file.metadata.num_rows == 0:
            raise DataError(f"{path}: the file has no rows")
        schema = file.schema_arrow
    features = _features(schema)
    images = [field.name for field in schema if _holds_images(field.type)]
    labels = [field.name for field in schema if _holds_labels(field.type)]
    of_kind = {
        kind: [name for name, item in features.items() if item.get("_type") == kind and name in schema.names]
        for kind in ("Image", "ClassLabel")
    }
    found = _choose(path, schema, "image", image, (of_kind["Image"], images), images)
    usual = [name for name in _USUAL_LABELS if name in labels]
    chosen = _choose(path, schema, "label", label, (of_kind["ClassLabel"], usual, labels), labels)
    for name in (found, chosen):
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: several columns are called {name!r}; rename one")
    names = features.get(chosen, {}).get("names") or ()
    text = _is_text(schema.field(chosen).type)
    return Columns(found, chosen, text, () if text else tuple(map(str, names)))


def _choose(
    path: Path, schema: pa.Schema, what: str, given: str, candidates: Sequence[list[str]], usable: list[str]
) -> str:
    """The column for ``what``: the given one, one of that name, or the only one of the first non-empty
    candidates."""
    wanted = given or (what if what in schema.names else "")
    types = {
        "image": "bytes of encoded images, or struct<bytes: binary, path: string>",
        "label": "whole numbers or text",
    }
    if wanted and wanted in usable:
        return wanted
    if wanted and wanted in schema.names:
        kind = next(field.type for field in schema if field.name == wanted)
        raise DataError(f"{path}: column {wanted!r} is {kind}, not {types[what]}")
    if not wanted:
        for names in candidates:
            fitting = [name for name in names if name in usable]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                raise DataError(
                    f"{path}: several columns may be the {what}: {', '.join(fitting)}; say which one, with "
                    f"{what}_column: {fitting[0]}"
                )
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    missing = f"no column {wanted!r}" if wanted else f"no column of {what}s ({types[what]})"
    raise DataError(f"{path}: {missing}; columns are {there}; {what}_column names the one to read")


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Hugging Face's metadata on each column; empty without any."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        found = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {str(name): item for name, item in found.items() if isinstance(item, dict)}
    return {}


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_bytes(kind.field(at).type)
    return _is_bytes(kind)


def _holds_labels(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_integer(_plain(kind)) or pa.types.is_boolean(kind)


def read_rows(path: Path, image: str, label: str) -> Iterator[tuple[list[bytes | None], list[Label]]]:
    """Encoded images and labels of a Parquet file as they are, some hundred rows at a time."""
    with _parquet(path) as file:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[image, label]):
            images = batch.column(image)
            if pa.types.is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            yield (
                images.to_pylist(),
                [int(item) if isinstance(item, bool) else item for item in batch.column(label).to_pylist()],
            )


def decode_parquet(
    files: Sequence[Path],
    columns: tuple[str, str],
    numbers: Mapping[Label, int],
    shape: Shape,
    *,
    resize: bool,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Parquet files, in order, to images uint8 [N, c, h, w] and labels int64 [N].

    ``columns`` are those of images and of labels, ``numbers`` the class of each label. Raises `DataError`
    naming file and row for a damaged image, for one of another size than ``shape`` without ``resize``, and
    for a label without a class.
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
        for contents, found in read_rows(path, *columns):
            for content, label in zip(contents, found, strict=True):
                where = f"{path}: row {row}"
                if row >= count:
                    break
                if label not in numbers:
                    raise DataError(f"{where}: label {label!r} is not a class")
                if not content:
                    raise DataError(f"{where}: there are no bytes of an image")
                labels[start + row] = numbers[label]
                decode_into(images[start + row], content, where, resize=resize)
                row += 1
        if row != count:
            raise DataError(f"{path}: other rows than the {count} that the file promises")
        start += count
    return images, labels
