"""Sets that others published, as distilled sets: read without pickle, in the pixel space of a data set.

Their files are those of DC, DSA and DM (one ``.pt`` with a list of experiments), of MTT and its successors (a
tensor of images, one of labels), and ``.npz`` and ``.safetensors`` files with ``images`` and ``labels``.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.groups import WHITENINGS
from ddsweep.catalog.numbers import counted
from ddsweep.core.images import class_labels, renormalised
from ddsweep.core.recipe import Recipe
from ddsweep.data.splits import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import SettingError, UserError
from ddsweep.provenance import environment

__all__ = ["SPACES", "Source", "imported_set"]

SPACES = ("pixels", "normalised", *WHITENINGS)

MOST = 2**31
"""More numbers than that are no distilled set."""


@dataclass(frozen=True)
class Source:
    """Where a set is from: its ``file``, that of its ``labels`` if it is another one, and which
    ``experiment`` of several in one file.

    ``space`` says what the numbers of the images are: ``pixels``, floats from 0 to 1 or whole numbers from 0
    to 255; ``normalised``, ``(x - mean) / std`` per channel of floats x from 0 to 1, with the ``mean`` and
    ``std`` of the authors; or a whitening (`ddsweep.data.whitening`), whose numbers stay as they are.
    """

    file: Path
    space: str
    labels: Path | None = None
    experiment: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def whitening(self) -> str:
        """The setting ``whitening`` of trials that begin in the set."""
        return self.space if self.space in WHITENINGS else "none"


def imported_set(source: Source, splits: Splits, dataset: Any) -> DistilledSet:
    """The set of ``source`` for the ``dataset`` with these ``splits``, whitened as its space is, in one batch
    of all images.

    Raises `UserError` for a file that cannot be read or holds something else, for images of another shape or
    outside their space, and for labels that are not the classes of the data set in equal numbers.
    """
    if source.space not in SPACES:
        raise SettingError(f"--space: {source.space!r} is not one of {', '.join(SPACES)}")
    if source.space != "normalised" and (source.mean or source.std):
        raise SettingError("--mean, --std: they are for --space normalised")
    images, labels = _read(source)
    images = _in_space(_shaped(images, dataset.shape, source), source, splits)
    count, classes = len(images), dataset.classes
    where = source.labels or source.file
    if len(labels) != count:
        raise UserError(f"{where}: {len(labels)} labels for {count} images")
    if count % classes:
        raise UserError(
            f"{source.file}: {count} images; {dataset.name} has {classes} classes, of equal numbers"
        )
    images, labels, is_sorted = _sorted(images, labels, classes, where)
    spec = TrialSpec(
        dataset,
        method="given",
        images_per_class=count // classes,
        labels="soft" if labels.is_floating_point() else "hard",
        whitening=source.whitening,
    )
    told: dict[str, Any] = {"file": source.file.name, "sha256": _digest(source.file), "space": source.space}
    if source.space == "normalised":
        told |= {"mean": list(source.mean), "std": list(source.std)}
    if not is_sorted:
        told["order"] = "file"
    made = environment()
    return DistilledSet(
        images=images[None],
        labels=labels[None],
        rates=torch.full((spec.steps,), _ANY_RATE),
        mean=splits.mean,
        std=splits.std,
        class_names=splits.class_names,
        spec=spec,
        recipe=Recipe.of(spec),
        provenance={
            "ddsweep_version": made["ddsweep_version"],
            "dataset_fingerprint": splits.fingerprint,
        },
        imported=told,
    )


_ANY_RATE = 0.01
"""Published sets come without a rate, or with one for a recipe of their own. Evaluation chooses one."""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------ reading


def _read(source: Source) -> tuple[Tensor, Tensor]:
    """Images and labels, as they are in the files."""
    found = _content(source.file)
    several = isinstance(found, Mapping) and isinstance(found.get("data"), Sequence)
    if source.experiment and (source.labels is not None or not several):
        raise SettingError(f"--experiment: {source.file} holds one set")
    if source.labels is not None:
        return _tensor(found, "images", source.file), _tensor(
            _content(source.labels), "labels", source.labels
        )
    if several:
        runs = found["data"]
        if not 0 <= source.experiment < len(runs):
            raise UserError(
                f"--experiment {source.experiment}: {source.file} has {len(runs)} of them, from 0 to "
                f"{len(runs) - 1}"
            )
        if not isinstance(runs[source.experiment], Sequence) or len(runs[source.experiment]) != 2:
            raise UserError(f"{source.file}: `data` holds other things than pairs of images and labels")
        found = dict(zip(("images", "labels"), runs[source.experiment], strict=True))
    if isinstance(found, Mapping) and {"images", "labels"} <= set(found):
        return _tensor(found["images"], "images", source.file), _tensor(
            found["labels"], "labels", source.file
        )
    kind = (
        f"a mapping with {', '.join(map(str, found))}"
        if isinstance(found, Mapping)
        else f"a {type(found).__name__}"
    )
    raise UserError(
        f"{source.file}: holds {kind}; a set is a file with `images` and `labels`, one with `data` "
        "(experiments of both), or a tensor of images with the file of its labels as --labels"
    )


def _tensor(value: Any, what: str, path: Path) -> Tensor:
    if isinstance(value, Mapping) and what in value:
        value = value[what]
    if not isinstance(value, Tensor):
        raise UserError(f"{path}: {what} are a {type(value).__name__}, and no tensor")
    found: Tensor = value.detach()
    if (
        found.layout != torch.strided
        or found.device.type != "cpu"
        or not 0 < found.numel() < MOST
        or not found.ndim
    ):
        raise UserError(f"{path}: {what} of shape {list(found.shape)} are no plain tensor of a set")
    if found.is_complex() or found.is_quantized:
        raise UserError(f"{path}: {what} are {found.dtype}; a set has whole numbers or fractions")
    if found.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch can do little with these
        if found.dtype == torch.uint64 and bool((found.view(torch.int64) < 0).any()):
            raise UserError(f"{path}: {what} go beyond 2^63")
        return found.to(torch.int64)
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise UserError(f"{path}: {what} are not all finite")
    return found


def _content(path: Path) -> Any:
    """What a file of tensors holds. Nothing in it is run: no pickle but torch's own weights."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(path.read_bytes())
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as arrays:
                ours = {"images", "labels"} & set(arrays.files)
                return {name: torch.from_numpy(arrays[name]) for name in ours} or dict.fromkeys(arrays.files)
        with torch.serialization.safe_globals(_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError:  # torch's own words tell how to run it nevertheless
        raise UserError(
            f"{path}: not a file of torch, or one that holds more than tensors, numbers, lists and mappings; "
            "what else is in it would have to be run, which ddsweep does not do"
        ) from None
    except Exception as error:  # each library answers damage in half a dozen ways
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not a file of tensors that can be read without running code (.pt, .npz, .safetensors)"
            + (f": {said}" if " " in said else "")
        ) from None


def _scalars() -> list[Any]:
    """The numbers of numpy, in which DC and DM keep the accuracies beside their sets: torch reads them only
    if it is told that they are harmless."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    of_types = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32)]
    return [np.dtype, *of_types, scalar, (scalar, "numpy.core.multiarray.scalar")]


# --------------------------------------------------------------------------------- into our own form


def _shaped(images: Tensor, shape: tuple[int, int, int], source: Source) -> Tensor:
    c, h, w = shape
    if images.ndim == 4 and tuple(images.shape[1:]) == (h, w, c) != shape:
        images = images.movedim(-1, 1)  # channels last, as in numpy files
    if images.ndim != 4 or tuple(images.shape[1:]) != shape:
        raise UserError(
            f"{source.file}: images of shape {list(images.shape)}; the data set has [N, {c}, {h}, {w}]"
        )
    return images


def _in_space(images: Tensor, source: Source, splits: Splits) -> Tensor:
    """In the normalised pixel space of the data set, or in its whitened one, float32."""
    now, channels = (splits.mean, splits.std), images.shape[1]
    if source.space == "pixels":
        wide = images.double() / (1 if images.is_floating_point() else 255)
        low, high = float(wide.min()), float(wide.max())
        if not -0.5 <= low <= high <= 1.5:
            raise UserError(
                f"{source.file}: images go from {low:.3g} to {high:.3g}, and --space pixels is from 0 to 1 "
                "(learned ones a little beyond); are they normalised? Bytes as floats: divide by 255"
            )
        if not images.is_floating_point() and int(images.max()) <= 1:
            raise UserError(
                f"{source.file}: images of the whole numbers 0 and 1: are they floats? Bytes go to 255"
            )
        return renormalised(wide, ([0.0] * channels, [1.0] * channels), now)
    if not images.is_floating_point():
        raise UserError(
            f"{source.file}: images of whole numbers are no {source.space} ones; give --space pixels"
        )
    if source.whitening != "none":
        return images.float()
    for name in ("mean", "std"):
        values = getattr(source, name)
        if len(values) != channels or not all(map(math.isfinite, values)):
            raise SettingError(
                f"--{name}: give {counted(channels, 'number')} joined by commas, of the set's authors"
            )
    if not all(value > 0 for value in source.std):
        raise SettingError(f"--std: {list(source.std)}: every number must be positive")
    for name in ("mean", "std"):
        if any(not 0 <= value <= 1 for value in getattr(source, name)):
            raise SettingError(
                f"--{name}: {list(getattr(source, name))}: give those of pixels from 0 to 1; if they are of "
                "bytes, divide by 255"
            )
    return renormalised(images, (source.mean, source.std), now)


def _sorted(images: Tensor, labels: Tensor, classes: int, where: Path) -> tuple[Tensor, Tensor, bool]:
    """Images sorted by class, with classes ``[N]`` int64 or the numbers ``[N, classes]`` of soft labels; and
    whether they could be sorted. Soft labels may lead elsewhere than where an image began."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        if labels.shape[1] != classes:
            raise UserError(
                f"{where}: labels of shape {list(labels.shape)}; the data set has {classes} classes"
            )
        order = _order(labels.argmax(1), classes)
        if order is None:
            return images, labels.float(), False
        return images[order], labels[order].float(), True
    whole = labels.flatten().long()
    if len(whole) != len(labels) or not bool((labels.flatten() == whole).all()):
        raise UserError(
            f"{where}: labels of shape {list(labels.shape)}; give classes [N], or numbers [N, {classes}]"
        )
    order = _order(whole, classes)
    if order is None:
        low, high = int(whole.min()), int(whole.max())
        counts = f"{torch.bincount(whole).tolist()[:20]}, " if 0 <= low <= high < classes else ""
        raise UserError(
            f"{where}: labels are not the classes 0 to {classes - 1} in equal numbers: {counts}from {low} to "
            f"{high}"
        )
    return images[order], whole[order], True


def _order(labels: Tensor, classes: int) -> Tensor | None:
    """Places in which labels are those of a set, sorted by class; None if their numbers are not equal."""
    order = labels.argsort(stable=True)
    expected = class_labels(1, classes, len(labels) // classes)[0]
    return order if torch.equal(labels[order], expected) else None
