"""Transforms by name: one spelling, one id, and pixels as PIL makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddsweep.catalog import DATASETS, DatasetSpec, TrialSpec, parse_dataset, transformed
from ddsweep.data.files import presence, resolve_dataset
from ddsweep.data.load import Splits, load_splits
from ddsweep.data.transforms import transform_images
from ddsweep.errors import DataError, SettingError
from ddsweep.report.settings import changed
from ddsweep.report.sweep_file import from_catalog
from ddsweep.spec import expand, load_sweep

from .conftest import pictures, write_idx

FOLDER = {"source": "folder", "path": "pets"}


def load(value: Any, root: Path | None) -> Splits:
    return load_splits(resolve_dataset(value, root), root, validation_fraction=0.1, split_seed=0)


def bicubic(image: np.ndarray[Any, np.dtype[np.uint8]], side: int) -> np.ndarray[Any, Any]:
    """One image [c, h, w] by PIL."""
    planes = [
        np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)) for plane in image
    ]
    return np.stack(planes)


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name", "shape", "native"),
    [
        ("usps(size=28)", "usps(size=28)", (1, 28, 28), (1, 16, 16)),
        (" mnist ( size = 32 , channels = 3 ) ", "mnist(channels=3,size=32)", (3, 32, 32), (1, 28, 28)),
        ("mnist(channels=3)", "mnist(channels=3)", (3, 28, 28), (1, 28, 28)),
        ("mnist(channels=3,size=28)", "mnist(channels=3)", (3, 28, 28), (1, 28, 28)),
        ("cifar10-exact(channels=3,size=16)", "cifar10-exact(size=16)", (3, 16, 16), (3, 32, 32)),
        # These two have no size of their own: 64 is what every image is resized to.
        ("cub200(size=64)", "cub200(size=64)", (3, 64, 64), ()),
        ("voc2007(size=96)", "voc2007(size=96)", (3, 96, 96), ()),
    ],
)
def test_a_name_has_one_spelling(text: str, name: str, shape: Any, native: Any) -> None:
    spec = parse_dataset(text)
    assert (spec.name, spec.shape, spec.native) == (name, shape, native)
    assert spec.base_name == name.partition("(")[0]
    assert parse_dataset(spec.name) == spec


@pytest.mark.parametrize(
    "text", ["mnist()", "mnist(size=28)", "mnist(channels=1)", "mnist(size=28,channels=1)"]
)
def test_what_the_images_have_already_is_no_transform(text: str) -> None:
    assert parse_dataset(text) is DATASETS["mnist"]
    assert TrialSpec(parse_dataset(text)).trial_id == TrialSpec(DATASETS["mnist"]).trial_id


def test_every_data_set_of_the_catalog_can_be_transformed() -> None:
    for name, spec in DATASETS.items():
        other = parse_dataset(f"{name}(channels=3,size=20)")
        assert other.shape == (3, 20, 20)
        assert len(other.mean) == len(other.std) == (3 if spec.mean else 0)
        assert TrialSpec.from_dict(TrialSpec(other).to_dict()) == TrialSpec(other)
        assert presence(other.name, None) == presence(name, None)


def test_constants_of_a_paper_are_repeated_with_the_channel() -> None:
    spec = parse_dataset("mnist(channels=3,size=32)")
    assert (spec.mean, spec.std) == ((0.1307,) * 3, (0.3081,) * 3)
    assert parse_dataset("cifar10(size=28)").mean == DATASETS["cifar10"].mean
    assert parse_dataset("usps(size=28)").mean == ()


def test_every_transform_is_another_trial() -> None:
    names = [
        "usps",
        "usps(size=28)",
        "usps(size=32)",
        "usps(channels=3,size=28)",
        "mnist",
        "mnist(channels=3)",
    ]
    assert len({TrialSpec(parse_dataset(name)).trial_id for name in names}) == len(names)
    # Grey files made RGB are not the files read as RGB, although the images have one shape.
    files = DatasetSpec("f", "folder", (1, 6, 6), 2, fingerprint="00ff")
    grey, colour = (
        transformed(files, channels=3),
        DatasetSpec("f", "folder", (3, 6, 6), 2, fingerprint="00ff"),
    )
    assert grey.shape == colour.shape
    assert len({TrialSpec(spec, network="convnet(depth=1)").trial_id for spec in (files, grey, colour)}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mnits(size=32)", r"unknown data set 'mnits' \(did you mean mnist\?\); known are digits, mnist"),
        ("mnist(sise=32)", r"unknown transform 'sise' \(did you mean size\?\); there are channels, size"),
        ("mnist(rotate=3)", r"unknown transform 'rotate'; there are channels, size"),
        ("mnist(32)", "unknown transform '32'"),
        ("mnist(size)", "size must be a whole number, not ''"),
        ("mnist(size=-4)", "size must be a whole number, not '-4'"),
        ("mnist(size=2.5)", "size must be a whole number, not '2.5'"),
        ("mnist(size=3)", "mnist: size is a whole number from 4 to 512, not 3"),
        ("mnist(size=513)", "from 4 to 512, not 513"),
        ("mnist(size=32,size=28)", "size is given twice"),
        ("mnist(channels=2)", "mnist: channels is 1 or 3, not 2"),
        ("svhn(channels=1)", "svhn: channels=1: its images are RGB, and there is no one conversion to grey"),
        ("mnist(size=32", "transforms are written as mnist.*inside .* of YAML it needs quotes"),
        (
            "mnist(size=32)(channels=3)",
            "transforms are written as mnist.channels=3,size=32., either or both$",
        ),
        ("mnits(size=32", "did you mean mnist"),
        ("", "unknown data set ''"),
    ],
)
def test_wrong_names_say_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        resolve_dataset(text, None)
    assert "\n" not in str(caught.value)


def test_a_transformed_data_set_is_not_transformed_again() -> None:
    with pytest.raises(SettingError, match=r"usps\(size=28\) is transformed already"):
        transformed(parse_dataset("usps(size=28)"), channels=3)


@pytest.mark.parametrize("name", ["svhn", "svhn(size=28)", "mnist(channels=3,size=32)", "usps(size=28)"])
def test_digits_of_any_size_and_colour_are_not_flipped(name: str) -> None:
    with pytest.raises(SettingError, match="is not the same in a mirror; leave flip out"):
        TrialSpec(parse_dataset(name), outer_augment="flip")
    assert TrialSpec(parse_dataset("cifar10(size=28)"), outer_augment="flip").outer_augment == "flip"


# ------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("side", [28, 11])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_pil(channels: int, side: int) -> None:
    images = pictures(5, (channels, 16, 16), seed=3)[0]
    out = transform_images(images, (channels, side, side))
    assert out.dtype == np.uint8
    assert np.array_equal(out, np.stack([bicubic(image, side) for image in images]))


def test_bicubic_in_numbers() -> None:
    """An edge overshoots on both sides, alike: the filter is not bilinear, and pixels are not shifted."""
    edge = np.full((1, 1, 4, 4), 50, np.uint8)
    edge[..., 2:] = 200
    rows = transform_images(edge, (1, 8, 8))[0, 0]
    assert rows.tolist() == [[50, 47, 40, 80, 170, 210, 203, 200]] * 8


def test_grey_is_repeated_and_resized_alike() -> None:
    grey = pictures(3, (1, 16, 16))[0]
    for shape in ((3, 16, 16), (3, 28, 28)):
        out = transform_images(grey, shape)
        assert np.array_equal(out, np.repeat(transform_images(grey, (1, *shape[1:])), 3, axis=1))
    assert transform_images(grey, (1, 16, 16)) is grey


def test_usps_at_28_pixels(data_root: Path) -> None:
    native, large = load("usps", data_root), load("usps(size=28)", data_root)
    assert large.name == "usps(size=28)" and large.train_images.shape[1:] == (1, 28, 28)
    # The same images are validation and in the same order: the split is that of the files.
    for part in ("train", "validation", "test"):
        before, after = getattr(native, f"{part}_images").numpy(), getattr(large, f"{part}_images").numpy()
        assert np.array_equal(getattr(native, f"{part}_labels"), getattr(large, f"{part}_labels"))
        for i in range(0, len(before), max(1, len(before) // 7)):
            assert np.array_equal(after[i], bicubic(before[i], 28))
    assert large.fingerprint != native.fingerprint
    # Measured after the transform: no paper names constants of this one.
    pixels = large.train_images.double() / 255
    assert large.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-12)
    assert large.std[0] == pytest.approx(pixels.std(unbiased=False).item(), abs=1e-9)


def test_grey_mnist_in_three_channels(tiny: Path) -> None:
    native, colour = load("mnist", tiny), load("mnist(channels=3)", tiny)
    assert torch.equal(colour.train_images, native.train_images.expand(-1, 3, -1, -1))
    assert torch.equal(colour.validation_images, native.validation_images.expand(-1, 3, -1, -1))
    assert (colour.mean, colour.std) == ((0.1307,) * 3, (0.3081,) * 3)
    assert colour.train_images.is_contiguous() and colour.class_names == native.class_names


def test_files_are_checked_as_they_are(tiny: Path) -> None:
    write_idx(tiny / "MNIST/raw/t10k-images-idx3-ubyte", pictures(20, (32, 32))[0])
    with pytest.raises(DataError, match=r"mnist\(size=32\): .*test images are 1x32x32, not 1x28x28"):
        load("mnist(size=32)", tiny)
    (tiny / "USPS/usps.bz2").unlink()
    with pytest.raises(DataError, match=r"usps.bz2 is missing; `ddsweep data fetch usps` downloads it"):
        load("usps(size=28)", tiny)


def test_parquet_by_name_and_inline(tiny: Path) -> None:
    native, small = load("cifar10-exact", tiny), load("cifar10-exact(size=16)", tiny)
    assert np.array_equal(small.test_images[0].numpy(), bicubic(native.test_images[0].numpy(), 16))
    assert small.mean == DATASETS["cifar10"].mean
    value = {"source": "parquet", "path": "cifar10", "train": [0, 1, 2, 3], "test": [4], "size": 16}
    inline = load(value, tiny)
    assert inline.name == "parquet-cifar10(size=16)"
    assert torch.equal(inline.validation_images, small.validation_images)


def test_folders_with_size_and_channels(make_folder: Callable[..., Path]) -> None:
    root = make_folder(shape=(6, 5))
    native = load(FOLDER, root)
    assert native.train_images.shape[1:] == (1, 6, 5)
    spec = resolve_dataset(
        {**FOLDER, "name": "pets", "size": 8, "channels": 3, "mean": [0.5], "std": [0.2]}, root
    )
    assert (spec.name, spec.native, spec.mean) == ("pets(channels=3,size=8)", (1, 6, 5), (0.5,) * 3)
    splits = load_splits(spec, root, validation_fraction=0.1, split_seed=0)
    assert np.array_equal(splits.test_images[0, 2].numpy(), bicubic(native.test_images[0].numpy(), 8)[0])
    given = {**FOLDER, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    assert resolve_dataset(given, root).mean == (0.1, 0.2, 0.3)
    plain = resolve_dataset(FOLDER, root)
    assert resolve_dataset({**FOLDER, "channels": 1}, root) == plain and plain.native == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "large"}, "dataset: size must be a whole number, not 'large'"),
        ({"channels": True}, "dataset: channels must be a whole number, not True"),
        ({"size": 2}, "size is a whole number from 4 to 512, not 2"),
        ({"channels": 1}, "channels=1: its images are RGB"),
        ({"sizes": 2}, r"unknown key 'sizes' \(did you mean size\?\)"),
        ({"name": "mine(size=28)"}, "ends as that of a transformed data set; size and channels are keys"),
        ({"size": 8, "mean": [0.5], "std": [1]}, "mean and std have 1 values, but images have 3 channels"),
    ],
)
def test_wrong_inline_transforms(make_folder: Callable[..., Path], changes: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        resolve_dataset({**FOLDER, **changes}, make_folder())


# --------------------------------------------------------------------------------------- sweep files

SWEEP = """
name: sizes
base: {dataset: usps(size=28), network: lenet}
points: [{seed: 1}, {dataset: "mnist( size=32, channels=3)"}, {dataset: mnist(size=28), seed: 2}]
resources: {cpus: {by: dataset, "mnist(channels=3,size=32)": 2, "usps(size= 28)": 3, default: 1}}
"""


def test_a_sweep_over_transformed_data_sets(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    sweep = load_sweep(tmp_path / "sweep.yaml")
    trials = expand(sweep, lambda value: resolve_dataset(value, None)).trials
    assert [trial.dataset.name for trial in trials] == ["usps(size=28)", "mnist(channels=3,size=32)", "mnist"]
    assert [sweep.resources.for_trial(trial)[0] for trial in trials] == [3, 2, 1]
    assert expand(sweep, from_catalog).trials == trials
    over = load_sweep(tmp_path / "sweep.yaml", ["dataset=usps(size=32)"])
    assert {trial.dataset.name for trial in expand(over, from_catalog).trials} == {"usps(size=32)"}


def test_the_default_network_of_a_transformed_set_is_by_its_size() -> None:
    trial = TrialSpec(parse_dataset("usps(size=28)"))
    assert trial.network_spec.depth == 3
    assert changed({"dataset": trial.dataset.name, "network": trial.network}) == ["dataset"]


def test_one_spelling_only_makes_one_trial(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("name: twice\nbase: {}\ngrid: {dataset: [mnist, mnist(size=28)]}\n")
    with pytest.raises(SettingError, match="twice"):
        expand(load_sweep(tmp_path / "sweep.yaml"), from_catalog)
