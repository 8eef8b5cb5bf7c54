"""A file of tensors, read without torch: its header, and the hash over its tensors.

Such a file is one of safetensors (no pickle) whose metadata key ``ddsweep`` holds the JSON ``{"header": ...,
"sha256": ...}``, the sum over header and tensors. `ddsweep.results.artifacts` writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["KEY", "content_sum", "read_header", "tensor_sum"]

KEY = "ddsweep"

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
}
"""torch's names of safetensors' types."""


def tensor_sum(tensors: Iterable[tuple[str, str, list[int], bytes | memoryview]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of ``tensors``, which are sorted by name."""
    digest = hashlib.sha256()
    for name, dtype, shape, content in tensors:
        digest.update(json.dumps([name, dtype, shape]).encode() + b"\n")
        digest.update(content)
    return digest.hexdigest()


def content_sum(tensors: str, header: Mapping[str, Any]) -> str:
    """The sum over a header and tensors with the sum ``tensors``."""
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    return hashlib.sha256(f"{tensors}\n{text}".encode()).hexdigest()


def read_header(data: bytes) -> tuple[dict[str, Any], str]:
    """The header, and the sum over the tensors (`tensor_sum`), of a file with the bytes ``data``. Raises
    ``ValueError`` for other files, and for one that was cut or altered since it was written."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        entries = json.loads(data[8:start])
        metadata = entries.pop("__metadata__", {})
        held = memoryview(data)[start:]
        tensors = [
            (name, _DTYPES[entry["dtype"]], entry["shape"], held[slice(*entry["data_offsets"])])
            for name, entry in sorted(entries.items())
        ]
        whole = max((entry["data_offsets"][1] for entry in entries.values()), default=0) == len(held)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        whole, metadata = False, {}
    if not whole:
        raise ValueError("truncated, altered, or not a safetensors file")
    if KEY not in metadata:
        raise ValueError(f"a safetensors file, but not one of ddsweep (no {KEY!r} header)")
    try:
        content = json.loads(metadata[KEY])
        header: dict[str, Any] = content["header"]
        found = tensor_sum(tensors)
        intact = content["sha256"] == content_sum(found, header)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError("altered since it was written: its check sum does not match")
    return header, found
