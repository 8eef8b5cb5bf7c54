"""Where the files of each source lie, which of them are train and test, and their content hash.

Neither torch nor numpy here: ``plan`` and ``data list`` look at files without decoding one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddsweep.catalog import DATASETS, DatasetSpec, base_name
from ddsweep.errors import DataError
from ddsweep.paths import user_path

__all__ = [
    "IMAGE_SUFFIXES",
    "NO_ROOT",
    "OFFICIAL",
    "TORCHVISION",
    "OfficialTree",
    "TorchvisionFiles",
    "class_folder_names",
    "content_fingerprint",
    "folder_files",
    "how_to_get",
    "location",
    "need_root",
    "official_folder",
    "one_line",
    "parquet_files",
    "require_files",
    "torchvision_folder",
]

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".pbm", ".tif", ".tiff", ".webp"}
)
NO_ROOT = "data root not given: pass --data-root or set DDSWEEP_DATA to the folder that holds the files"

_IDX_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_IDX_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class TorchvisionFiles:
    """One class of ``torchvision.datasets``: what it is given as root, and the files that it reads.

    ``root`` and ``folder`` are relative to the data root; ``train`` and ``test`` to ``folder``. ``by_split``
    says that the class is asked by ``split="train"`` and not by ``train=True``.
    """

    cls: str
    root: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    extra: tuple[str, ...] = ()
    by_split: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, *self.test, *self.extra)


TORCHVISION: dict[str, TorchvisionFiles] = {
    "mnist": TorchvisionFiles("MNIST", ".", "MNIST/raw", _IDX_TRAIN, _IDX_TEST),
    "fashion_mnist": TorchvisionFiles("FashionMNIST", ".", "FashionMNIST/raw", _IDX_TRAIN, _IDX_TEST),
    "usps": TorchvisionFiles("USPS", "USPS", "USPS", ("usps.bz2",), ("usps.t.bz2",)),
    "cifar10": TorchvisionFiles(
        *("CIFAR10", ".", "cifar-10-batches-py"),
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        extra=("batches.meta",),
    ),
    "svhn": TorchvisionFiles(
        *("SVHN", "SVHN", "SVHN", ("train_32x32.mat",), ("test_32x32.mat",)), by_split=True
    ),
}


@dataclass(frozen=True)
class OfficialTree:
    """A data set that the user unpacks into the data root: its ``folder`` there, the files and folders that
    must be in it, and the archives that it is in, with where these are found."""

    folder: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    archives: str


OFFICIAL: dict[str, OfficialTree] = {
    "voc": OfficialTree(
        "VOCdevkit/VOC2007",
        ("ImageSets/Main/trainval.txt", "ImageSets/Main/test.txt"),
        ("Annotations", "JPEGImages"),
        "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar (from the PASCAL VOC site)",
    ),
    "cub": OfficialTree(
        "CUB_200_2011",
        ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"),
        ("images",),
        "CUB_200_2011.tgz (from Caltech's data repository)",
    ),
}
"""By source."""


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def how_to_get(name: str) -> str:
    """How a user comes by the files of data set ``name``."""
    name = base_name(name)
    if name in TORCHVISION:
        return f"`ddsweep data fetch {name}` downloads it; delete damaged files first"
    source = DATASETS[name].source if name in DATASETS else ""
    if source in OFFICIAL:
        return f"unpack {OFFICIAL[source].archives} into the data root"
    return "put the files there, or point --data-root or DDSWEEP_DATA at the folder that holds them"


def need_root(root: Path | None, name: str) -> Path:
    """``root`` if it is a folder; `DataError` otherwise."""
    if root is None:
        raise DataError(f"dataset {name}: {NO_ROOT}")
    if not root.is_dir():
        raise DataError(
            f"dataset {name}: data root {root} is not a folder; check --data-root or DDSWEEP_DATA"
        )
    return root


def location(spec: DatasetSpec, root: Path | None) -> Path:
    """The folder of a ``parquet`` or ``folder`` source. An absolute ``path`` needs no data root."""
    folder = user_path(spec.path)
    if not folder.is_absolute():
        folder = need_root(root, spec.name) / folder
    if not folder.is_dir():
        raise DataError(f"dataset {spec.name}: folder {folder} is missing; {how_to_get(spec.name)}")
    return folder


def torchvision_folder(spec: DatasetSpec, root: Path | None) -> Path:
    """The data root, if it holds every file that torchvision reads; else `DataError` names the first."""
    layout = TORCHVISION[spec.base_name]
    base = need_root(root, spec.name)
    for file in layout.files:
        if not (base / layout.folder / file).is_file():
            raise DataError(
                f"dataset {spec.name}: {base / layout.folder / file} is missing; {how_to_get(spec.name)}"
            )
    return base


def official_folder(spec: DatasetSpec, root: Path | None) -> Path:
    """The folder of a ``voc`` or ``cub`` source, if its lists and folders are there; else `DataError` names
    the first that is not."""
    tree = OFFICIAL[spec.source]
    folder = need_root(root, spec.name) / tree.folder
    absent = [folder / item for item in tree.files if not (folder / item).is_file()]
    absent += [folder / item for item in tree.folders if not (folder / item).is_dir()]
    if absent:
        raise DataError(f"dataset {spec.name}: {absent[0]} is missing; {how_to_get(spec.name)}")
    return folder


def require_files(spec: DatasetSpec, root: Path | None) -> None:
    """Raises `DataError` for files that are not there, in milliseconds: nothing is opened."""
    if spec.source == "torchvision":
        torchvision_folder(spec, root)
    elif spec.source in OFFICIAL:
        official_folder(spec, root)
    elif spec.source == "parquet":
        parquet_files(spec, root)
    elif spec.source == "folder":
        location(spec, root)


def parquet_files(spec: DatasetSpec, root: Path | None) -> dict[str, tuple[Path, ...]]:
    """The files of a ``parquet`` source by role, ``{"train": (...), "test": (...)}``, in given order.

    A number means a place in the sorted ``*.parquet`` files of the folder. Raises `DataError` for what
    is missing, and for a file named twice: a test image seen in training would make every score void.
    """
    folder = location(spec, root)
    shards = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    chosen: dict[str, tuple[Path, ...]] = {}
    for role, wanted in (("train", spec.train), ("test", spec.test)):
        chosen[role] = tuple(_shard(spec.name, role, item, folder, shards) for item in wanted)
    seen: dict[Path, str] = {}
    for role, paths in chosen.items():
        for path in paths:
            before = seen.get(path.resolve())
            seen[path.resolve()] = role
            if before is not None:
                places = f"twice in {role}" if before == role else "in both train and test"
                raise DataError(f"dataset {spec.name}: {path} is {places}")
    return chosen


def _shard(name: str, role: str, item: str | int, folder: Path, shards: Sequence[Path]) -> Path:
    if isinstance(item, int):
        if 0 <= item < len(shards):
            return shards[item]
        there = f" (0 to {len(shards) - 1})" if shards else ""
        raise DataError(
            f"dataset {name}: {role} asks for shard {item}, "
            f"but {folder} holds {len(shards)} *.parquet files{there}"
        )
    path = folder / item
    if not path.is_file():
        raise DataError(f"dataset {name}: {role} file {path} is missing; {how_to_get(name)}")
    return path


def class_folder_names(spec: DatasetSpec, root: Path | None) -> tuple[str, ...]:
    """The sorted class folders of the train part of a ``folder`` source."""
    parents = _split_folders(spec, root)["train"]
    return tuple(sorted({child.name for parent in parents for child in _visible(parent) if child.is_dir()}))


def folder_files(spec: DatasetSpec, root: Path | None) -> dict[str, list[tuple[int, Path]]]:
    """The images of a ``folder`` source by role, as (label, file), sorted by class, folder, file name.

    ``spec.class_names`` gives the classes and their order, sorted folder names if empty. Raises
    `DataError` for a missing folder, a class without images, and a class folder that is not a class.
    """
    names = spec.class_names or class_folder_names(spec, root)
    found: dict[str, list[tuple[int, Path]]] = {}
    for role, parents in _split_folders(spec, root).items():
        where = " and ".join(map(str, parents))
        extra = sorted({c.name for p in parents for c in _visible(p) if c.is_dir()} - set(names))
        if extra:
            raise DataError(
                f"dataset {spec.name}: {role} has a folder {extra[0]!r} in {where} "
                f"that is no class; classes are {', '.join(names)}"
            )
        files: list[tuple[int, Path]] = []
        for label, name in enumerate(names):
            images = [path for parent in parents for path in _images(parent / name)]
            if not images:
                raise DataError(f"dataset {spec.name}: class {name!r} has no images in {role} ({where})")
            files += [(label, path) for path in images]
        found[role] = files
    return found


def _split_folders(spec: DatasetSpec, root: Path | None) -> dict[str, list[Path]]:
    base = location(spec, root)
    parts = {
        role: [base / str(item) for item in items]
        for role, items in (("train", spec.train), ("test", spec.test))
    }
    for role, folders in parts.items():
        for folder in folders:
            if not folder.is_dir():
                raise DataError(
                    f"dataset {spec.name}: {role} folder {folder} is missing; {how_to_get(spec.name)}"
                )
    everything = [(role, folder.resolve()) for role, folders in parts.items() for folder in folders]
    for i, (role, folder) in enumerate(everything):
        for other, before in everything[:i]:
            if folder == before or folder in before.parents or before in folder.parents:
                places = f"twice in {role}" if role == other else "in both train and test"
                raise DataError(f"dataset {spec.name}: folder {folder} is {places}")
    return parts


def _visible(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in _visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]


def content_fingerprint(spec: DatasetSpec, root: Path | None) -> str:
    """32 hex of a hash over the chosen files of a ``parquet`` or ``folder`` source.

    What enters: the bytes of each file with its role (train or test), in order, and for ``folder`` its
    class name. What does not: paths, file names, the name of the data set. A parquet file whose very
    bytes are in both train and test is a `DataError`.
    """
    entries: list[tuple[str, str, Path]] = []
    if spec.source == "parquet":
        for role, paths in parquet_files(spec, root).items():
            entries += [(role, "", path) for path in paths]
    else:
        names = spec.class_names or class_folder_names(spec, root)
        for role, files in folder_files(spec, root).items():
            entries += [(role, names[label], path) for label, path in files]
    total = hashlib.blake2b(f"ddsweep {spec.source} 1".encode(), digest_size=16)
    roles: dict[bytes, tuple[str, Path]] = {}
    for role, class_name, path in entries:
        digest = _file_digest(spec.name, path)
        before = roles.setdefault(digest, (role, path))
        if spec.source == "parquet" and before[0] != role:
            raise DataError(f"dataset {spec.name}: {path} is in both train and test: it equals {before[1]}")
        label = class_name.encode()
        total.update(f"{role} {len(label)} ".encode() + label + digest)
    return total.hexdigest()


def _file_digest(name: str, path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        raise DataError(f"dataset {name}: {path} cannot be read: {error.strerror or error}") from error
