"""A distilled set as other programs read it: ``.pt``, ``.npz``, or a folder of pictures.

The ``.pt`` has the layout of DC, DSA and DM (``data``: a list of experiments, here one, of images and
labels), with what else is needed to apply the set beside it. All of it is tensors, numbers and text, so it is
read without running code.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddsweep.catalog.numbers import counted
from ddsweep.core.images import renormalised
from ddsweep.distilled import DistilledSet
from ddsweep.errors import SettingError, UserError
from ddsweep.results.files import partial_path, results_error, write_atomic

__all__ = ["FILES", "export_set"]

FILES = (".pt", ".npz")
SPACES = ("normalised", "pixels")


def export_set(found: DistilledSet, out: Path, space: str | None = None) -> str:
    """Write the set ``found`` to ``out``, and return a line that says what was written.

    A name that ends in ``.pt`` or ``.npz`` is a file with these contents; an old one is replaced.

    - images float32 ``[N, c, h, w]`` (N = S * n, batch after batch) and labels, int64 ``[N]`` or, if learned,
      numbers float32 ``[N, classes]``: under ``data`` in a ``.pt``, ``images`` and ``labels`` in a ``.npz``;
    - ``batches [N]``: the batch of each image, from 0; ``rates [T]``, unless the set has none;
    - ``space``: ``normalised``, ``(x - mean) / std`` by the ``mean`` and ``std`` of the file; or ``pixels``,
      x itself: 0 to 1 in real images, and a little beyond in learned ones;
    - ``class_names``, and ``order`` and ``optimizer``: in words, how networks are trained on it;
    - ``made_for``: the settings of its trial, and ``recipe``, JSON.

    Another name is that of a folder, which must not be there: ``3_cat/batch000_image002.png``, eight bits a
    channel, as `torchvision.datasets.ImageFolder` reads it. What is beyond 0 and 1 is cut off.

    Raises `SettingError` for another space, one that a folder cannot have, and another kind of file; and
    `UserError` for a set of whitened images (only its data set tells how they are whitened), for pictures of
    learned labels or of other than one or three channels, and if it cannot be written.
    """
    if found.spec.whitening != "none":
        raise UserError(
            f"the set was made for whitened images (whitening: {found.spec.whitening}): other programs could "
            "not make theirs like that, for only its data set tells how"
        )
    if space not in (None, *SPACES):
        raise SettingError(f"--space: {space!r} is not one of {', '.join(SPACES)}")
    if out.suffix[1:].isalpha() and out.suffix not in FILES:
        raise SettingError(f"--out: {out}: give a file in {' or '.join(FILES)}, or a folder for pictures")
    count = found.labels.shape[0] * found.labels.shape[1]
    if out.suffix not in FILES:
        if space == "normalised":
            raise SettingError(f"--space: {out} is to be a folder of pictures, which hold pixels")
        return _pictures(found, out, count)
    space = space or "normalised"
    content = _content(found, space)
    write_atomic(out, (_pt if out.suffix == ".pt" else _npz)(content), out.parent)
    return f"{out}: {counted(count, 'image')}, {found.spec.labels} labels, {_said(found, space)}"


def _said(found: DistilledSet, space: str) -> str:
    if space == "pixels":
        return "pixels (real ones: 0 to 1)"
    mean, std = (",".join(f"{value:.6g}" for value in values) for values in (found.mean, found.std))
    return f"normalised by mean {mean} and std {std}"


def _has_rates(found: DistilledSet) -> bool:
    """An imported set has none until a trial has chosen one."""
    return found.spec.method != "given" or found.recipe.rate is not None


def _pixels(found: DistilledSet) -> Tensor:
    """``[N, c, h, w]``, of which real ones go from 0 to 1."""
    channels = len(found.mean)
    nothing = [0.0] * channels, [1.0] * channels
    return renormalised(found.images.flatten(0, 1), (found.mean, found.std), nothing)


def _content(found: DistilledSet, space: str) -> dict[str, Any]:
    header, (batches, size) = found.header(), found.labels.shape[:2]
    content: dict[str, Any] = {
        "images": _pixels(found) if space == "pixels" else found.images.flatten(0, 1).clone(),
        "labels": found.labels.flatten(0, 1).clone(),
        "batches": torch.arange(batches).repeat_interleave(size),
        "space": space,
        "mean": torch.tensor(found.mean),
        "std": torch.tensor(found.std),
        "class_names": list(found.class_names),
        "order": header["order"],
        "optimizer": header["optimizer"],
        "recipe": json.dumps(header["recipe"]),
        "made_for": json.dumps(header["spec"]),
    }
    if _has_rates(found):
        content["rates"] = found.rates.clone()
    return content


def _pt(content: dict[str, Any]) -> bytes:
    pair = [content.pop("images"), content.pop("labels")]
    buffer = io.BytesIO()
    torch.save({"data": [pair], **content}, buffer)
    return buffer.getvalue()


def _npz(content: dict[str, Any]) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in content.items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _pictures(found: DistilledSet, out: Path, count: int) -> str:
    channels = len(found.mean)
    if found.labels.is_floating_point():
        raise UserError(f"{out}: a folder of pictures cannot hold learned labels; a .pt or .npz can")
    if channels not in (1, 3):
        raise UserError(f"{out}: images of {channels} channels are no pictures; a .pt or .npz can hold them")
    if out.exists():
        raise UserError(f"{out}: is there already; give a folder that is not")
    pixels = _pixels(found)
    beyond = float(((pixels < 0) | (pixels > 1)).double().mean())
    partial_folder = partial_path(out, out.parent)
    try:
        _write_pictures(found, (pixels.clamp(0, 1) * 255).round().byte(), partial_folder)
        partial_folder.rename(out)
    except OSError as error:
        raise results_error(error, out) from error
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return (
        f"{out}: {counted(count, 'picture')} in {counted(len(found.class_names), 'folder')}; "
        f"{100 * beyond:.1f} % of the numbers were beyond 0 and 1 and are cut off"
    )


def _write_pictures(found: DistilledSet, pixels: Tensor, folder: Path) -> None:
    from PIL import Image

    size, classes = found.labels.shape[1], found.labels.flatten().tolist()
    digits = len(str(len(found.class_names) - 1))
    names = [
        f"{number:0{digits}d}_{re.sub('[^A-Za-z0-9.-]+', '-', name)}"
        for number, name in enumerate(found.class_names)
    ]
    for name in names:
        (folder / name).mkdir(parents=True)
    for place, (image, number) in enumerate(zip(pixels, classes, strict=True)):
        file = folder / names[number] / f"batch{place // size:03d}_image{place % size:03d}.png"
        Image.fromarray(image.movedim(0, -1).squeeze(-1).contiguous().numpy()).save(file)
