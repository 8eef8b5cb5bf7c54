"""The baselines of a distilled set at the same number of images: real images, class means, k-means, k-NN.

A baseline is applied like a distilled set with hard labels: S batches in order, one constant rate. Two
variants of each are reported: the same T = S*E steps at the best rate of ``RATES``, and the best rate
and number of epochs of ``EPOCHS``; both are chosen on the validation split with ``selection`` networks,
never on the test set or on held-out networks. k-NN (by default 1-NN) uses no network at all.

Every held-out network gets a draw of real images of its own, so the spread of ``random_real`` mixes
that of the draw with that of the network. ``optimized_random`` is one draw for all, the best of several
on the same validation images and networks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ddsweep.catalog import (
    BASELINE_EPOCHS,
    BASELINE_RATES,
    MAX_TUNED_STEPS,
    SELECTION_IMAGES,
    SELECTION_NETWORKS,
    TrialSpec,
    epoch_grid,
)
from ddsweep.core.images import class_labels, normalise, sample_per_class
from ddsweep.core.objective import rewritten
from ddsweep.core.recipe import Recipe
from ddsweep.seeds import derive_seed

__all__ = [
    "EPOCHS",
    "MAX_TUNED_STEPS",
    "RATES",
    "SELECTION_IMAGES",
    "SELECTION_NETWORKS",
    "arrange",
    "baseline_labels",
    "baseline_recipe",
    "class_means",
    "epoch_grid",
    "kmeans_centres",
    "nearest_classes",
    "nearest_neighbour_accuracy",
    "random_images",
]

RATES, EPOCHS = BASELINE_RATES, BASELINE_EPOCHS


def baseline_labels(spec: TrialSpec) -> Tensor:
    """The classes ``[S, n]`` int64 of baseline images in the place of the distilled ones of ``spec``, as
    `arrange` sorts them; for an attack, the rewritten labels."""
    labels = class_labels(spec.inner_steps, spec.dataset.classes, spec.images_per_class_per_step)
    return rewritten(labels, spec.attack_class, spec.target_class)


def baseline_recipe(spec: TrialSpec, rate: float, epochs: int) -> Recipe:
    """How networks are trained on baseline images in the place of the distilled ones of ``spec``."""
    return replace(Recipe.of(spec), rate=rate, epochs=epochs, order="fixed", labels="hard")


def arrange(per_class: Tensor, inner_steps: int) -> Tensor:
    """``[classes, images_per_class, ...]`` as S batches sorted by class, ``[S, classes * m, ...]``."""
    classes, count = per_class.shape[:2]
    split = per_class.view(classes, inner_steps, count // inner_steps, *per_class.shape[2:])
    return split.transpose(0, 1).reshape(inner_steps, -1, *per_class.shape[2:])


def random_images(
    pixels: Tensor,
    labels: Tensor,
    classes: int,
    images_per_class: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> Tensor:
    """Real training images ``[classes, images_per_class, c, h, w]``, normalised float32, one draw."""
    generator = torch.Generator().manual_seed(seed)
    return normalise(
        pixels[sample_per_class(labels, classes, images_per_class, generator)], mean, std, torch.float32
    )


def class_means(
    pixels: Tensor, labels: Tensor, classes: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The mean training image of each class, ``[classes, c, h, w]``, normalised float32."""
    sums = torch.zeros((classes, *pixels.shape[1:]), dtype=torch.float64)
    size = max(1, min(4096, 2**27 // pixels[0].numel()))
    for start in range(0, len(labels), size):
        batch = slice(start, start + size)
        sums.index_add_(0, labels[batch], pixels[batch].double())
    counts = torch.bincount(labels, minlength=classes).double()
    means = sums / counts.view(-1, 1, 1, 1)
    if pixels.is_floating_point():
        return means.float()
    shift, scale = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
    return ((means / 255 - shift) / scale).float()


def kmeans_centres(
    pixels: Tensor,
    labels: Tensor,
    classes: int,
    images_per_class: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """k-means centres of each class, k = ``images_per_class``: ``[classes, k, c, h, w]``, normalised float32.

    scikit-learn's Lloyd algorithm from k-means++ on normalised pixels, one start with a fixed seed; largest
    cluster first. A class with fewer distinct images than k repeats its centres.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    centres = []
    for label in range(classes):
        x = normalise(pixels[labels == label], mean, std, torch.float32)
        flat = x.flatten(1).numpy()
        seed = derive_seed("baseline", "kmeans", label) % 2**32
        model = KMeans(min(images_per_class, len(flat)), n_init=1, random_state=seed)
        # One thread, because with several the order of the sums, and so the centres, changes from run to run.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than k
            model.fit(flat)
        sizes = torch.bincount(torch.from_numpy(model.labels_).long(), minlength=len(model.cluster_centers_))
        order = torch.argsort(sizes, descending=True, stable=True)
        found = torch.from_numpy(model.cluster_centers_).float()[order].view(-1, *x.shape[1:])
        centres.append(found.repeat(-(-images_per_class // len(found)), 1, 1, 1)[:images_per_class])
    return torch.stack(centres)


def nearest_classes(x: Tensor, known: Tensor, labels: Tensor, neighbours: int, norm: float) -> Tensor:
    """The classes ``[N]`` of ``x [N, d]`` by the majority of the ``neighbours`` nearest of ``known [n, d]``
    in the p-norm ``norm``; among classes with as many votes that of the nearest image.

    Of images equally near the first counts. Raises ``ValueError`` for more neighbours than images.
    """
    if not 1 <= neighbours <= len(known):
        raise ValueError(f"neighbours: {neighbours} must lie between 1 and the {len(known)} images")
    distances = torch.cdist(x, known, p=norm)
    if neighbours == 1:
        return labels[distances.argmin(1)]
    nearest = labels[distances.sort(dim=1, stable=True).indices[:, :neighbours]]
    votes = F.one_hot(nearest).sum(1).gather(1, nearest)  # of each neighbour's class, nearest first
    first = (votes == votes.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    return nearest.gather(1, first).squeeze(1)


def nearest_neighbour_accuracy(
    images: Tensor,
    labels: Tensor,
    pixels: Tensor,
    targets: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    neighbours: int = 1,
    norm: float = 2.0,
) -> float:
    """Fraction of the real images ``pixels [N, ...]`` to which `nearest_classes` gives their label, from
    ``images [n, ...]`` with ``labels [n]`` in normalised pixels."""
    right, known = 0, images.flatten(1)
    for start in range(0, len(targets), 1024):
        batch = slice(start, start + 1024)
        x = normalise(pixels[batch], mean, std, known.dtype).flatten(1)
        right += int((nearest_classes(x, known, labels, neighbours, norm) == targets[batch]).sum())
    return right / len(targets)
