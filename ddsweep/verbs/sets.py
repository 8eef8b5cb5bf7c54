"""The verbs ``import`` and ``export``: sets of others become ours, and ours become files for others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ddsweep import completions
from ddsweep.verbs.arguments import DataRoot
from ddsweep.verbs.inputs import data_folder

__all__ = ["export", "import_set"]


def import_set(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A published set: .pt, .npz or .safetensors.")],
    dataset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The data set that it was made for, as a sweep file names it.",
            autocompletion=completions.data_sets,
        ),
    ],
    space: Annotated[
        str,
        typer.Option(
            metavar="SPACE",
            help="Its numbers: `pixels` from 0 to 1 (or 0 to 255), `normalised` by --mean and --std, or of "
            "whitened images: `zca` or `zca_pixels`.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The distilled set to write, a .safetensors file.")
    ],
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where its labels are, if in another file.")
    ] = None,
    experiment: Annotated[int, typer.Option(metavar="N", help="Which of several sets in FILE, from 0.")] = 0,
    mean: Annotated[
        str,
        typer.Option(
            metavar="A,B,C", help="The mean of each channel in `normalised`, of pixels from 0 to 1."
        ),
    ] = "",
    std: Annotated[str, typer.Option(metavar="A,B,C", help="And the standard deviation.")] = "",
    data_root: DataRoot = None,
) -> None:
    """Import a set that others published, so that a sweep can judge it, or go on from it."""
    import torch

    from ddsweep.catalog import TrialSpec
    from ddsweep.catalog.numbers import counted
    from ddsweep.core.images import renormalised
    from ddsweep.data.files import resolve_dataset
    from ddsweep.data.load import load_splits
    from ddsweep.errors import SettingError
    from ddsweep.imported import Source, imported_set
    from ddsweep.paths import user_path
    from ddsweep.spec.yaml_text import parse_yaml, yaml_of

    def numbers(option: str, text: str) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise SettingError(f"{option}: {text!r}: give numbers joined by commas") from None

    if out.suffix != ".safetensors":
        raise SettingError(f"--out: {out}: a distilled set is a file that ends in .safetensors")
    if out.resolve() in {given.resolve() for given in (file, labels) if given is not None}:
        raise SettingError(f"--out: {out} is what is to be read")
    root = data_folder(data_root)
    asked = {"mean": numbers("--mean", mean), "std": numbers("--std", std)}
    source = Source(user_path(file), space, labels and user_path(labels), experiment, **asked)
    value = parse_yaml(dataset, "--dataset")
    spec = resolve_dataset(value, root)
    TrialSpec(spec, whitening=source.whitening)  # before the work: its images may be too large for a matrix
    splits = load_splits(spec, root, validation_fraction=0.1, split_seed=0, whitening=source.whitening)
    found = imported_set(source, splits, spec)
    found.save(out)
    of, none = found.spec, ([0.0] * len(found.mean), [1.0] * len(found.mean))
    images = found.images if splits.whitening is None else splits.whitening.normalised(found.images)
    pixels = renormalised(images, (found.mean, found.std), none)
    low, high = (round(float(value), 2) + 0.0 for value in torch.aminmax(pixels))  # no -0.00
    typer.echo(
        f"{out}: {counted(of.images_per_class, 'image')} per class of {of.dataset.name}, {of.labels} labels, "
        f"pixels from {low:.2f} to {high:.2f} (real ones: 0 to 1)"
    )
    if of.labels == "soft":
        sums = found.labels.sum(-1)
        low, high = (round(float(value), 2) + 0.0 for value in torch.aminmax(sums))
        if not 0.99 <= low <= high <= 1.01:
            typer.echo(
                f"Its labels add up to {low:.2f} to {high:.2f} an image, probabilities to 1: if they are "
                "logits, import their softmax"
            )
    typer.echo("To judge it:")
    base: dict[str, Any] = {"dataset": value, "method": "given", "image_init": {"set": str(out)}}
    base |= {"images_per_class": of.images_per_class, "inner_steps": 1, "outer_steps": 1}
    base |= {"labels": "soft"} if of.labels == "soft" else {}
    base |= {} if of.whitening == "none" else {"whitening": of.whitening}
    for line in yaml_of({"base": base}).splitlines():
        typer.echo(f"  {line}")


def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A distilled set, a .safetensors file.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="A .pt or .npz file, or a new folder for pictures (PNG).")
    ],
    space: Annotated[
        str | None,
        typer.Option(
            metavar="SPACE",
            help="The numbers in a file: `normalised` as networks see them (the default), or `pixels`.",
        ),
    ] = None,
) -> None:
    """Export a distilled set for other programs: as .pt, as .npz, or as a folder of pictures."""
    from ddsweep.distilled import DistilledSet
    from ddsweep.errors import SettingError
    from ddsweep.exported import export_set
    from ddsweep.paths import user_path

    if os.path.realpath(out) == os.path.realpath(file):
        raise SettingError(f"--out: {out} is what is to be read")
    typer.echo(export_set(DistilledSet.load(user_path(file)), user_path(out), space))
