"""ZCA whitening: uncorrelated training pixels, the way back, and splits that come whitened."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ddsweep import baselines
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.catalog.groups import WHITENINGS
from ddsweep.core.images import normalise
from ddsweep.data.load import Splits, load_splits
from ddsweep.data.whitening import EPSILON, Whitening, measure_whitening
from ddsweep.errors import SettingError
from ddsweep.seeds import derive_seed


@pytest.fixture(scope="module")
def plain() -> Splits:
    return load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0)


@pytest.fixture(scope="module", params=WHITENINGS)
def white(request: pytest.FixtureRequest) -> Splits:
    kind = request.param
    return load_splits(DATASETS["digits"], None, validation_fraction=0.1, split_seed=0, whitening=kind)


def correlated(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    return (torch.randn(count, 12, generator=generator) @ mixing + 3).view(count, 3, 2, 2)


def zca(images: torch.Tensor) -> Whitening:
    return measure_whitening(images, "zca", [0.25] * images.shape[1])


def test_whitened_images_are_uncorrelated_up_to_epsilon() -> None:
    images = correlated(20_000)
    flat = zca(images).whitened(images).flatten(1).double()
    assert float(flat.mean(0).abs().max()) < 1e-4
    values = torch.linalg.eigvalsh(torch.cov(images.flatten(1).double().t(), correction=0))
    expected = (values / (values + EPSILON)).sort().values
    found = torch.linalg.eigvalsh(torch.cov(flat.t(), correction=0)).sort().values
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_matrix_is_symmetric_and_the_way_back_is_its_inverse() -> None:
    """Symmetric is what makes it ZCA: no other whitening changes the images less."""
    images = correlated(500)
    whitening = zca(images)
    torch.testing.assert_close(whitening.forth, whitening.forth.t(), rtol=1e-5, atol=1e-6)
    some = images[:60].view(5, 12, 3, 2, 2)
    for either in (whitening, measure_whitening(images, "zca_pixels", [0.1, 0.2, 0.4])):
        back = either.normalised(either.whitened(some))
        torch.testing.assert_close(back, some, rtol=1e-3, atol=1e-3)


def test_of_pixels_it_is_what_the_code_of_mtt_does() -> None:
    """The same numbers as from pixels that were never normalised: by their mean image, and the eigenvalues of
    their covariance plus a tenth."""
    mean, std = (0.5, 0.4, 0.45), (0.1, 0.2, 0.4)
    images = correlated(500)
    by_channel = [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std)]
    pixels = (images.double() * by_channel[1] + by_channel[0]).flatten(1)
    left, values, _ = torch.linalg.svd(torch.cov(pixels.t(), correction=0))
    expected = (pixels - pixels.mean(0)) @ (left @ torch.diag((values + 0.1) ** -0.5) @ left.t())
    found = measure_whitening(images, "zca_pixels", std).whitened(images)
    torch.testing.assert_close(found.flatten(1).double(), expected, rtol=1e-4, atol=1e-5)


def test_many_images_at_once_are_whitened_as_few_are() -> None:
    images = correlated(9000)
    whitening = zca(images)
    assert torch.allclose(whitening.whitened(images)[8990:], whitening.whitened(images[8990:]), atol=1e-5)


def test_splits_come_whitened_by_their_training_part_alone(plain: Splits, white: Splits) -> None:
    assert white.train_images.dtype == torch.float32 and white.train_images.shape == plain.train_images.shape
    assert white.fingerprint == plain.fingerprint
    normal = normalise(plain.train_images, plain.mean, plain.std, torch.float32)
    assert white.whitening is not None
    whitening = measure_whitening(normal, white.whitening.kind, plain.std)
    for part in ("train", "validation", "test"):
        pixels = getattr(plain, f"{part}_images")
        expected = whitening.whitened(normalise(pixels, plain.mean, plain.std, torch.float32))
        torch.testing.assert_close(getattr(white, f"{part}_images"), expected, rtol=0, atol=1e-5)
        assert torch.equal(getattr(white, f"{part}_labels"), getattr(plain, f"{part}_labels"))


def test_baselines_are_made_in_the_whitened_space(plain: Splits, white: Splits) -> None:
    """Class means of whitened images are whitened class means; a random image is a whitened one."""
    space = (white.mean, white.std)
    assert white.whitening is not None
    means = baselines.class_means(white.train_images, white.train_labels, 10, *space)
    of_plain = baselines.class_means(plain.train_images, plain.train_labels, 10, *space)
    torch.testing.assert_close(means, white.whitening.whitened(of_plain), rtol=1e-3, atol=1e-3)
    seed = derive_seed("baseline", "random_real", "x", 0)
    drawn = baselines.random_images(white.train_images, white.train_labels, 10, 1, *space, seed)
    same = baselines.random_images(plain.train_images, plain.train_labels, 10, 1, *space, seed)
    torch.testing.assert_close(drawn, white.whitening.whitened(same), rtol=1e-3, atol=1e-3)


def test_images_too_large_for_the_matrix_are_refused() -> None:
    large = replace(DATASETS["cifar10"], shape=(3, 64, 64))
    with pytest.raises(SettingError, match=r"whitening: zca of 12288 values .* at most 4096"):
        TrialSpec(large, whitening="zca")
    assert TrialSpec(DATASETS["cifar10"], whitening="zca").whitening == "zca"
