"""A distilled set as other programs read it: ``.pt``, ``.npz``, or a folder of pictures.

The ``.pt`` has the layout of DC, DSA and DM (``data``: a list of experiments, here one, of images and
labels), with what else is needed to apply the set beside it. All of it is tensors, numbers and text, so it is
read without running code.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddsweep.catalog.numbers import counted
from ddsweep.core.images import renormalised
from ddsweep.core.order import rate_index
from ddsweep.distilled import DistilledSet
from ddsweep.errors import SettingError, UserError
from ddsweep.results.files import partial_path, write_atomic, writing

__all__ = ["FILES", "export_set"]

FILES = (".pt", ".npz")
SPACES = ("normalised", "pixels")

_LONGEST_NAME = 50
"""Letters of a class in the name of its folder: a name has 255 bytes at most."""


def export_set(found: DistilledSet, out: Path, space: str | None = None) -> str:
    """Write the set ``found`` to ``out``, and return a line that says what was written.

    A name that ends in ``.pt`` or ``.npz`` is a file with these contents; an old one is replaced.

    - images float32 ``[N, c, h, w]`` (N = S * n, batch after batch) and labels, int64 ``[N]`` or, if learned,
      numbers float32 ``[N, classes]``: under ``data`` in a ``.pt``, ``images`` and ``labels`` in a ``.npz``;
    - ``batches [N]``: the batch of each image, from 0;
    - ``rates``: one for each step of the set's recipe, T of them in a set as it was distilled; left out if it
      has none (imported, and judged by no trial);
    - ``space``: ``normalised``, ``(x - mean) / std`` by the ``mean`` and ``std`` of the file; or ``pixels``,
      x itself: 0 to 1 in real images, often far beyond in learned ones;
    - ``class_names``, and ``order`` and ``optimizer``: in words, how networks are trained on it;
    - ``trial_id``, and as JSON ``made_for``, the settings of its trial, ``recipe``, and where there are any
      ``tuned``, the recipe with the best number of epochs, and ``imported``, which file it is from.

    A name without an ending is that of a folder, which must not be there: ``3_cat/batch000_image003.png`` is
    the fourth image of the first batch, eight bits a channel, as `torchvision.datasets.ImageFolder` reads
    it. What is beyond black and white is cut off.

    Raises `SettingError` for another space, one that a folder cannot have, and another ending; and
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
    is_file = out.suffix in FILES
    if not is_file and (out.suffix[1:2].isalpha() or out.name in FILES):
        raise SettingError(f"--out: {out}: give a file in {' or '.join(FILES)}, or a folder for pictures")
    if not is_file and space == "normalised":
        raise SettingError(f"--space: {out} is to be a folder of pictures, which hold pixels")
    if not is_file:
        return _pictures(found, out)
    content = _content(found, space or "normalised")
    with writing(out):
        write_atomic(out, (_pt if out.suffix == ".pt" else _npz)(content), out.parent)
    mean, std = (",".join(f"{value:.6g}" for value in values) for values in (found.mean, found.std))
    numbers = (
        "pixels (real ones: 0 to 1)" if space == "pixels" else f"normalised by mean {mean} and std {std}"
    )
    learned = "learned" if found.labels.is_floating_point() else "hard"
    return f"{out}: {counted(len(content['batches']), 'image')}, {learned} labels, {numbers}"


def _pixels(found: DistilledSet) -> Tensor:
    """``[N, c, h, w]``, of which real ones go from 0 to 1."""
    channels = len(found.mean)
    nothing = [0.0] * channels, [1.0] * channels
    return renormalised(found.images.flatten(0, 1), (found.mean, found.std), nothing)


def _content(found: DistilledSet, space: str) -> dict[str, Any]:
    header, recipe, batches = found.header(), found.recipe, found.batches(found.recipe)
    steps, size = batches.labels.shape[:2]
    more = [f"weight decay {recipe.weight_decay:g}"] if recipe.weight_decay else []
    more += [f"minibatches of {recipe.batch} images in random order"] if recipe.batch else []
    more += [f"images changed in every step by {recipe.augment}"] if recipe.augment != "none" else []
    content: dict[str, Any] = {
        "images": _pixels(found) if space == "pixels" else found.images.flatten(0, 1).clone(),
        "labels": batches.labels.flatten(0, 1).clone(),
        "batches": torch.arange(steps).repeat_interleave(size),
        "space": space,
        "mean": torch.tensor(found.mean),
        "std": torch.tensor(found.std),
        "class_names": list(found.class_names),
        "order": header["order"],
        "optimizer": ", ".join([header["optimizer"], *more]),
        "recipe": json.dumps(header["recipe"]),
        "made_for": json.dumps(header["spec"]),
        "trial_id": header["trial_id"],
    }
    content |= {name: json.dumps(header[name]) for name in ("tuned", "imported") if header.get(name)}
    if found.spec.method != "given" or recipe.rate is not None:
        content["rates"] = torch.tensor(_rates(found))
    return content


def _rates(found: DistilledSet) -> list[float]:
    """One for each step of the recipe, as `ddsweep.distilled.apply` takes them."""
    recipe, own = found.recipe, found.recipe.rates(found.rates.tolist())
    each, inner_steps = recipe.steps_per_epoch(found.spec), found.labels.shape[0]
    return [
        own[rate_index(t, inner_steps, len(own))] * recipe.rate_factor(t // each)
        for t in range(each * recipe.epochs)
    ]


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


def _pictures(found: DistilledSet, out: Path) -> str:
    channels = len(found.mean)
    if found.labels.is_floating_point():
        raise UserError(f"{out}: a folder of pictures cannot hold learned labels; a .pt or .npz can")
    if channels not in (1, 3):
        raise UserError(f"{out}: images of {channels} channels are no pictures; a .pt or .npz can hold them")
    levels = (_pixels(found) * 255).round()
    with writing(out):
        if os.path.lexists(out):
            raise UserError(f"{out}: is there already; give a folder that is not")
        partial = partial_path(out, out.parent)
        try:
            _write_pictures(found, levels.clamp(0, 255).byte(), partial)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    beyond = float(((levels < 0) | (levels > 255)).double().mean())
    return (
        f"{out}: {counted(len(levels), 'picture')} in {counted(len(found.class_names), 'folder')}; "
        f"{100 * beyond:.1f} % of the numbers were beyond black and white and are cut off"
    )


def _write_pictures(found: DistilledSet, levels: Tensor, folder: Path) -> None:
    from PIL import Image

    def numbered(word: str, number: int, of: int, least: int) -> str:
        return f"{word}{number:0{max(least, len(str(of - 1)))}d}"

    batches, size = found.labels.shape
    names = [
        numbered("", number, len(found.class_names), 1) + "_" + re.sub(r"[^\w.-]+", "-", name)[:_LONGEST_NAME]
        for number, name in enumerate(found.class_names)
    ]
    for name in names:
        (folder / name).mkdir(parents=True)
    for place, (image, label) in enumerate(zip(levels, found.labels.flatten().tolist(), strict=True)):
        batch, number = numbered("batch", place // size, batches, 3), numbered("image", place % size, size, 3)
        picture = Image.fromarray(image.movedim(0, -1).squeeze(-1).contiguous().numpy())
        picture.save(folder / names[label] / f"{batch}_{number}.png")
