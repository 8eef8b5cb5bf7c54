"""Baselines against numpy and scikit-learn: layout, means, centres, draws, nearest neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from ddsweep import baselines
from ddsweep.baselines import (
    arrange,
    class_means,
    epoch_grid,
    kmeans_centres,
    nearest_classes,
    nearest_neighbour_accuracy,
    random_images,
)
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.images import class_labels, normalise
from ddsweep.data.load import Splits


def data(splits: Splits) -> tuple[Tensor, Tensor, int]:
    return splits.train_images, splits.train_labels, 10


def space(splits: Splits) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return splits.mean, splits.std


def in_numpy(splits: Splits, pixels: Tensor) -> np.ndarray:
    shift, scale = (np.array(v).reshape(-1, 1, 1) for v in space(splits))
    return (pixels.numpy() / 255 - shift) / scale


# -------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize(("inner_steps", "per_step"), [(1, 1), (1, 3), (3, 1), (2, 3)])
def test_arranged_images_have_the_class_that_the_labels_say_in_every_step(
    inner_steps: int, per_step: int
) -> None:
    classes, count = 4, inner_steps * per_step
    per_class = torch.arange(classes)[:, None] * 100 + torch.arange(count)  # class and number in one
    images = arrange(per_class.view(classes, count, 1, 1, 1), inner_steps)
    assert images.shape == (inner_steps, classes * per_step, 1, 1, 1)
    assert torch.equal(images.flatten(1) // 100, class_labels(inner_steps, classes, per_step))
    assert sorted(images.flatten().tolist()) == sorted(per_class.flatten().tolist())
    for step in range(inner_steps):
        first = list(range(step * per_step, (step + 1) * per_step))
        assert (images[step].flatten() % 100).tolist() == first * classes


@pytest.mark.parametrize("inner_steps", [1, 2, 7, 30, 100, 101, 5000])
@pytest.mark.parametrize("inner_epochs", [1, 3, 4, 1000])
def test_the_epochs_that_are_tried_stay_in_bounds_and_hold_the_trials_own(
    inner_steps: int, inner_epochs: int
) -> None:
    grid = epoch_grid(inner_steps, inner_epochs)
    assert list(grid) == sorted(set(grid))
    assert {1, inner_epochs} <= set(grid)
    others = set(grid) - {1, inner_epochs}
    assert others <= set(baselines.EPOCHS)
    assert all(epochs * inner_steps <= baselines.MAX_TUNED_STEPS for epochs in others)


def test_epochs_of_a_users_own_are_tried_whatever_they_cost() -> None:
    assert epoch_grid(10, 3, (20, 1000)) == (3, 20, 1000)
    assert epoch_grid(10, 3, baselines.EPOCHS) == epoch_grid(10, 3)


def test_one_inner_step_tries_all_epochs() -> None:
    assert epoch_grid(1, 1) == baselines.EPOCHS
    assert epoch_grid(10, 3) == (1, 2, 3, 5, 10)


# ------------------------------------------------------------------------------------ means, centres


def test_class_means_are_those_of_numpy(splits: Splits) -> None:
    means = class_means(*data(splits), *space(splits))
    assert (means.shape, means.dtype) == ((10, 1, 8, 8), torch.float32)
    pixels, labels = in_numpy(splits, splits.train_images), splits.train_labels.numpy()
    expected = np.stack([pixels[labels == label].mean(0) for label in range(10)])
    np.testing.assert_allclose(means.numpy(), expected, rtol=0, atol=1e-6)


def test_class_means_do_not_depend_on_how_many_images_go_through_at_a_time(splits: Splits) -> None:
    many = [t.repeat(5, *[1] * (t.dim() - 1)) for t in (splits.train_images, splits.train_labels)]
    assert len(many[1]) > 4096
    torch.testing.assert_close(
        class_means(*many, 10, *space(splits)), class_means(*data(splits), *space(splits)), rtol=0, atol=1e-6
    )


def test_one_centre_of_k_means_is_the_class_mean(splits: Splits) -> None:
    centres = kmeans_centres(*data(splits), 1, *space(splits))
    means = class_means(*data(splits), *space(splits))
    torch.testing.assert_close(centres[:, 0], means, rtol=0, atol=1e-4)


def test_k_means_gives_the_same_centres_every_time_whatever_the_threads(splits: Splits) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    first = kmeans_centres(*data(splits), 3, *space(splits))
    torch.set_num_threads(2)
    second = kmeans_centres(*data(splits), 3, *space(splits))
    torch.set_num_threads(before)
    assert first.shape == (10, 3, 1, 8, 8)
    assert torch.equal(first, second)


def test_centres_of_k_means_are_means_of_their_nearest_images_largest_cluster_first(splits: Splits) -> None:
    centres = kmeans_centres(*data(splits), 3, *space(splits)).flatten(2)
    pixels = normalise(splits.train_images, *space(splits), torch.float32).flatten(1)
    for label in range(10):
        own = pixels[splits.train_labels == label]
        nearest = torch.cdist(own, centres[label]).argmin(1)
        sizes = torch.bincount(nearest, minlength=3)
        assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
        for k in range(3):
            torch.testing.assert_close(own[nearest == k].mean(0), centres[label, k], rtol=0, atol=1e-3)


def test_more_centres_than_images_repeats_images(splits: Splits) -> None:
    chosen = torch.cat([torch.nonzero(splits.train_labels == label).flatten()[:2] for label in range(10)])
    pixels, labels = splits.train_images[chosen], splits.train_labels[chosen]
    centres = kmeans_centres(pixels, labels, 10, 5, *space(splits))
    assert centres.shape == (10, 5, 1, 8, 8)
    real = normalise(pixels, *space(splits), torch.float32)
    for label in range(10):
        distances = torch.cdist(centres[label].flatten(1), real[labels == label].flatten(1))
        assert float(distances.min(1).values.max()) < 1e-4
        assert set(distances.argmin(1).tolist()) == {0, 1}


def test_equal_images_make_equal_centres(splits: Splits) -> None:
    first = [int(torch.nonzero(splits.train_labels == label)[0]) for label in range(10)]
    pixels = splits.train_images[first].repeat_interleave(4, 0)
    labels = torch.arange(10).repeat_interleave(4)
    centres = kmeans_centres(pixels, labels, 10, 3, *space(splits))
    real = normalise(splits.train_images[first], *space(splits), torch.float32)
    torch.testing.assert_close(centres, real[:, None].expand_as(centres), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------- random images


def test_random_images_are_distinct_training_images_of_their_class(splits: Splits) -> None:
    images = random_images(*data(splits), 5, *space(splits), seed=3)
    assert (images.shape, images.dtype) == ((10, 5, 1, 8, 8), torch.float32)
    real = normalise(splits.train_images, *space(splits), torch.float32).flatten(1)
    for label in range(10):
        own = real[splits.train_labels == label]
        same = (images[label].flatten(1)[:, None] == own[None]).all(2)
        assert same.any(1).all()
        assert len({int(row.nonzero()[0]) for row in same}) == 5


def test_a_draw_is_a_function_of_its_seed(splits: Splits) -> None:
    draws = [random_images(*data(splits), 2, *space(splits), seed=seed) for seed in (0, 1, 2, 0)]
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_a_class_with_too_few_images_repeats_them(splits: Splits) -> None:
    chosen = torch.cat([torch.nonzero(splits.train_labels == label).flatten()[:2] for label in range(10)])
    images = random_images(
        splits.train_images[chosen], splits.train_labels[chosen], 10, 5, *space(splits), seed=0
    )
    assert images.shape == (10, 5, 1, 8, 8)
    for own in images:
        assert len(torch.unique(own.flatten(1), dim=0)) == 2


# ----------------------------------------------------------------------------------- nearest neighbour


@pytest.mark.parametrize("source", ["random", "kmeans"])
def test_the_nearest_neighbour_is_that_of_scikit_learn(source: str, splits: Splits) -> None:
    if source == "random":
        images = random_images(*data(splits), 4, *space(splits), seed=1)
    else:
        images = kmeans_centres(*data(splits), 4, *space(splits))
    labels = class_labels(1, 10, 4).flatten()
    found = nearest_neighbour_accuracy(
        images.flatten(0, 1), labels, splits.test_images, splits.test_labels, *space(splits)
    )
    model = KNeighborsClassifier(1).fit(images.flatten(0, 1).flatten(1).numpy(), labels.numpy())
    test = in_numpy(splits, splits.test_images).reshape(len(splits.test_labels), -1).astype(np.float32)
    assert found == pytest.approx(model.score(test, splits.test_labels.numpy()), abs=1e-12)
    assert found > 0.5


def test_nearest_neighbours_are_found_in_batches_of_any_number(splits: Splits) -> None:
    images = random_images(*data(splits), 1, *space(splits), seed=1).flatten(0, 1)
    few = nearest_neighbour_accuracy(
        images, torch.arange(10), splits.test_images, splits.test_labels, *space(splits)
    )
    many = nearest_neighbour_accuracy(
        *(images, torch.arange(10)),
        *(splits.test_images.repeat(4, 1, 1, 1), splits.test_labels.repeat(4)),
        *space(splits),
    )
    assert len(splits.test_labels) * 4 > 1024
    assert few == pytest.approx(many, abs=1e-12)


def test_images_are_their_own_nearest_neighbours(splits: Splits) -> None:
    images = normalise(splits.train_images[:200], *space(splits), torch.float32)
    labels = splits.train_labels[:200]
    assert nearest_neighbour_accuracy(images, labels, splits.train_images[:200], labels, *space(splits)) == 1


@pytest.mark.parametrize("norm", [1, 1.5, 2, 3, np.inf])
@pytest.mark.parametrize("neighbours", [1, 2, 3, 7])
def test_the_majority_of_neighbours_is_that_of_scikit_learn(
    neighbours: int, norm: float, splits: Splits
) -> None:
    known = random_images(*data(splits), 4, *space(splits), seed=1).flatten(0, 1).flatten(1).double()
    labels = class_labels(1, 10, 4).flatten()
    x = normalise(splits.test_images, *space(splits), torch.float64).flatten(1)
    model = KNeighborsClassifier(neighbours, p=norm).fit(known.numpy(), labels.numpy())
    # Where two classes have as many votes, scikit-learn takes the one with the smaller number.
    votes = np.sort(model.predict_proba(x.numpy()), axis=1)
    clear = votes[:, -1] > votes[:, -2]
    # And where the last neighbour and the next are equally near, which of them counts is a matter of taste.
    ordered = torch.cdist(x, known, p=norm).sort(1).values
    clear &= (ordered[:, neighbours] - ordered[:, neighbours - 1] > 1e-9).numpy()
    assert clear.sum() > 50
    found = nearest_classes(x, known, labels, neighbours, norm).numpy()
    np.testing.assert_array_equal(found[clear], model.predict(x.numpy())[clear])


@pytest.mark.parametrize(
    ("neighbours", "expected"), [(1, 2), (2, 2), (3, 2), (4, 2), (5, 0), (6, 0), (7, 1), (8, 1)]
)
def test_of_classes_with_as_many_votes_the_nearest_image_decides(neighbours: int, expected: int) -> None:
    known = torch.arange(1, 9, dtype=torch.float32)[:, None]
    labels = torch.tensor([2, 0, 1, 2, 0, 0, 1, 1])
    if neighbours >= 5:
        labels = torch.tensor([0, 2, 1, 2, 0, 1, 1, 1])  # 5: 2 and 2; 6: 2, 2 and 2; 7: 3 of class 1
    assert nearest_classes(torch.zeros(1, 1), known, labels, neighbours, 2).tolist() == [expected]


def test_of_images_equally_near_the_first_counts() -> None:
    known = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    for neighbours in (1, 2, 4):
        found = nearest_classes(torch.zeros(1, 1), known, torch.tensor([3, 1, 0, 2]), neighbours, 2)
        assert found.tolist() == [3]


def test_more_neighbours_than_images_are_refused(splits: Splits) -> None:
    images = random_images(*data(splits), 1, *space(splits), seed=1).flatten(0, 1)
    with pytest.raises(ValueError, match="neighbours: 11 must lie between 1 and the 10 images"):
        nearest_neighbour_accuracy(
            *(images, torch.arange(10), splits.test_images, splits.test_labels, *space(splits)), 11
        )


def test_labels_of_baselines_are_those_of_the_arranged_images(splits: Splits) -> None:
    spec = TrialSpec(DATASETS["digits"], images_per_class=6, inner_steps=3)
    assert torch.equal(baselines.baseline_labels(spec), class_labels(3, 10, 2))
