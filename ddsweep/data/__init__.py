"""Data: from a name or an inline mapping to uint8 tensors, a validation split and a fingerprint.

``files`` resolves the data set of a sweep file and has the user's own data checked by ``survey`` (no torch:
``plan`` uses both), ``sources`` has a module for each kind of files, ``load`` makes `Splits` of what they
read, ``stand_in`` makes small data for missing files, ``weights`` reads weights of networks that ddsweep did
not train, and ``fetch`` is the only place that downloads. Importing this package imports none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddsweep.data.files import DatasetStatus, data_root, list_datasets, presence, resolve_dataset
    from ddsweep.data.load import Splits, load_splits

__all__ = [
    "DatasetStatus",
    "Splits",
    "data_root",
    "list_datasets",
    "load_splits",
    "presence",
    "resolve_dataset",
]

_HOMES = {
    "DatasetStatus": "files",
    "Splits": "load",
    "data_root": "files",
    "list_datasets": "files",
    "load_splits": "load",
    "presence": "files",
    "resolve_dataset": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ddsweep.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ddsweep.data.{_HOMES[name]}"), name)
