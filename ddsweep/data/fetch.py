"""``ddsweep data fetch NAME``: the only place that downloads."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ddsweep.catalog import DATASETS, parse_dataset
from ddsweep.data.files import presence
from ddsweep.data.layout import NO_ROOT, one_line
from ddsweep.data.sources import source_of
from ddsweep.data.weights import ALEXNET, CACHED, SHA256_START, STORED, read_weights
from ddsweep.errors import DataError, SettingError

__all__ = ["fetch"]


def fetch(name: str, root: Path | None) -> Path:
    """Download the data set ``name`` into the data root and return the folder that holds it; of
    ``alexnet-imagenet``, the weights of a network, the file.

    A data set that is all there is left alone; where a file is damaged, all are fetched again. The download
    goes to a folder of its own, is read once, and is then moved into place, so a broken one leaves nothing
    behind; a file lock lets one process at a time do it. Raises `DataError` for a data set without a download
    (embedded, or from the user), without a data root, and if the network or the disk fails; `SettingError`
    for an unknown name.
    """
    if name == ALEXNET:
        return _fetch_weights(root)
    try:
        spec = parse_dataset(name)
    except SettingError as error:
        raise SettingError(f"{error}, and {ALEXNET}") from None
    spec = DATASETS[spec.base_name]  # the files are the same for every transform
    name, source, status = spec.name, source_of(spec), presence(spec.name, root)
    if status == "embedded":
        raise DataError(f"{name}: nothing to fetch: {source.how_to_get(spec)}")
    if root is None:
        raise DataError(f"{name}: {NO_ROOT}")
    folder = root / spec.path
    if status == "present":
        return folder
    if not source.downloads:
        raise DataError(f"{name}: nothing to fetch: {source.how_to_get(spec)} ({status})")

    from filelock import FileLock

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(str(root / ".fetch.lock")):
            if presence(name, root) != "present":  # another process may have fetched it meanwhile
                source.fetch(spec, root)
    except Exception as error:  # torchvision and urllib have no common error for a failed download
        raise DataError(f"{name}: could not be fetched into {root}: {_reason(error)}") from error
    return folder


def _fetch_weights(root: Path | None) -> Path:
    """torchvision's file, checked by its hash, as safetensors: from then on no pickle is read."""
    if root is None:
        raise DataError(f"{ALEXNET}: {NO_ROOT}")
    target = root / STORED
    if target.is_file():
        return target

    import torch
    from filelock import FileLock
    from safetensors.torch import save_file
    from torchvision.models import AlexNet_Weights

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(str(root / ".fetch.lock")),
            tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as temporary,
        ):
            if not target.is_file():  # another process may have fetched it meanwhile
                downloaded = Path(temporary) / Path(CACHED).name
                torch.hub.download_url_to_file(
                    AlexNet_Weights.IMAGENET1K_V1.url, str(downloaded), SHA256_START, progress=False
                )
                stored = Path(temporary) / target.name
                save_file(read_weights(downloaded), stored)
                os.replace(stored, target)
    except Exception as error:  # torch and urllib have no common error for a failed download
        raise DataError(f"{ALEXNET}: could not be fetched into {root}: {_reason(error)}") from error
    return target


def _reason(error: BaseException) -> str:
    """One line. torchvision lists its mirrors over several lines; the last one says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else one_line(error)
