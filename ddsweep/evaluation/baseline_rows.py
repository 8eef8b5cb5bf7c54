"""Baselines beside every distilled set: on the same networks, computed once and kept in ``.cache/``.

`ddsweep.baselines` says which images; here they are applied, with rates chosen on validation data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from ddsweep import baselines
from ddsweep.catalog import SPEC_VERSION, EvaluationSpec, TrialSpec
from ddsweep.core.images import LabelledImages, RealSet
from ddsweep.core.objective import rewritten
from ddsweep.core.recipe import Recipe
from ddsweep.core.training import InnerLoop
from ddsweep.core.tuning import best_of, score_rates
from ddsweep.data.splits import Splits
from ddsweep.errors import CheckpointError, UnreadableError
from ddsweep.evaluation.group import Group
from ddsweep.own_code import version_of
from ddsweep.results.artifacts import load_tensors, save_tensors
from ddsweep.results.files import patiently, write_atomic
from ddsweep.results.keys import digest, is_current
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part, write_part
from ddsweep.results.schemas import EVALS
from ddsweep.seeds import derive_seed

__all__ = ["baseline_rows"]


def baseline_rows(
    group: Group, source: str, evaluation: EvaluationSpec, directory: SweepDirectory
) -> list[dict[str, Any]]:
    """The rows of one baseline for one group."""
    if not source.startswith("knn_"):
        return _trained_rows(group, source, evaluation, directory)
    alone = group.spec.pool is not None and group.spec.pool.known
    if group.known and "on_random" in evaluation.protocols and not alone:
        return []  # the held-out groups of this trial have more draws of the same images
    counted = (evaluation.neighbours, evaluation.neighbour_norm)
    what = [source, *([] if counted == (1, 2) else counted), *_attack(group.spec)]
    return _cached_rows(group, what, directory, lambda: _neighbour_rows(group, source, *counted, directory))


def _cached_rows(
    group: Group, what: Sequence[Any], directory: SweepDirectory, compute: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The key of rows that trials with the same data, images per class and group of networks share."""
    spec, splits, unit = group.spec, group.splits, group.unit
    key = digest(
        [*what, unit.group, unit.size, unit.indices, spec.seed if group.known else None],
        [splits.fingerprint, spec.split_seed, spec.validation_fraction, splits.mean, splits.std],
        [spec.images_per_class, spec.inner_steps, spec.dtype, group.plan.device, SPEC_VERSION],
        *_whitening(spec),
    )
    path = directory.cache / "baselines" / f"part-{what[0]}-{key}.parquet"
    with _computed_once(path):
        if not is_current(path, key):
            found = compute()
            patiently(lambda: write_part(path, found, EVALS, directory.temporary, {"unit": key}))
        rows: list[dict[str, Any]] = read_part(path).to_pylist()
    return rows


@contextmanager
def _computed_once(path: Path) -> Iterator[None]:
    """A second process waits, and finds the result. The lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        yield


def _images(
    group: Group, source: str, role: str, indices: Sequence[int], directory: SweepDirectory
) -> Tensor:
    """Baseline images ``[S, n, c, h, w]``; for ``random_real`` one draw a network, ``[K, S, n, c, h, w]``."""
    spec, splits = group.spec, group.splits
    data = (splits.train_images, splits.train_labels, spec.dataset.classes)
    space = (splits.mean, splits.std)
    if source == "random":
        return torch.stack(
            [
                baselines.arrange(
                    baselines.random_images(
                        *data, spec.images_per_class, *space, _draw_seed(role, splits, index)
                    ),
                    spec.inner_steps,
                )
                for index in indices
            ]
        )
    if source == "class_mean":
        means = baselines.class_means(*data, *space)
        return baselines.arrange(
            means[:, None].expand(-1, spec.images_per_class, -1, -1, -1), spec.inner_steps
        )
    path = directory.cache / "kmeans" / f"{_kmeans_key(spec, splits)}.safetensors"
    with _computed_once(path):
        try:
            centres = load_tensors(path)[0]["centres"]
        except (CheckpointError, UnreadableError):  # missing or torn; it is only kept to be quicker
            centres = baselines.kmeans_centres(*data, spec.images_per_class, *space)
            kept = {"centres": centres}
            patiently(lambda: save_tensors(path, kept, {"kind": "kmeans"}, directory.temporary))
    return baselines.arrange(centres, spec.inner_steps)


def _draw_seed(role: str, splits: Splits, index: int) -> int:
    return derive_seed(role, "random_real", splits.fingerprint, index)


def _kmeans_key(spec: TrialSpec, splits: Splits) -> str:
    return digest(
        splits.fingerprint,
        spec.split_seed,
        spec.validation_fraction,
        splits.mean,
        splits.std,
        spec.images_per_class,
        *_whitening(spec),
    )


def _whitening(spec: TrialSpec) -> list[str]:
    return [] if spec.whitening == "none" else [spec.whitening]


def _trained_rows(
    group: Group, source: str, evaluation: EvaluationSpec, directory: SweepDirectory
) -> list[dict[str, Any]]:
    """A baseline on the group's networks, at its best rates: with the trial's own T, and with tuned
    epochs."""
    spec = group.spec
    optimised = source == "optimized_random"
    kind = "random" if source == "random_real" else source
    rows = []
    # Candidates are random images too, and are compared at the best rate of random images.
    searched = ("random_real", "random") if optimised else (source, kind)
    own, tuned = _search_rates(group, *searched, evaluation.rates, evaluation.epochs, directory)
    for protocol, (lr, epochs) in ((group.unit.protocol, own), (f"{group.unit.protocol}_tuned", tuned)):
        best = _best_candidate(group, lr, epochs, evaluation.candidates, directory) if optimised else None

        def compute(lr: float = lr, epochs: int = epochs, best: int | None = best) -> list[dict[str, Any]]:
            if best is None:
                images = _images(group, kind, "baseline", group.indices, directory)
            else:
                images = _images(group, "random", "baseline_candidate", [best], directory)[0]
            recipe = baselines.baseline_recipe(spec, lr, epochs)
            return group.rows(group.test_baseline(images, recipe), source, "", recipe)

        what = [source, *_training(spec), lr, epochs, *([] if best is None else [best])]
        rows += [{**row, "protocol": protocol} for row in _cached_rows(group, what, directory, compute)]
    return rows


def _training(spec: TrialSpec) -> list[Any]:
    """The settings that decide how a network is trained on given images, except rates and epochs."""
    momentum = spec.inner_momentum if spec.inner_optimizer == "momentum" else None
    common = [spec.network, spec.init_law, spec.init_param, spec.inner_optimizer, momentum]
    # The last group of held-out networks may be smaller.
    pool = [] if spec.pool is None else [["pool", *spec.pool.identity(), spec.pool.heldout]]
    code = spec.network_spec.code
    version = None if code is None else version_of(code)  # of a module: a file has its hash in its name
    return [*common, *pool, *_attack(spec), *([] if version is None else [["version", version]])]


def _attack(spec: TrialSpec) -> list[Any]:
    """The settings that decide the labels of baseline images, besides their classes."""
    return [] if spec.attack_class is None else [["attack", spec.attack_class, spec.target_class]]


def _search_rates(
    group: Group,
    source: str,
    kind: str,
    rates: Sequence[float],
    tried: Sequence[int],
    directory: SweepDirectory,
) -> tuple[tuple[float, int], tuple[float, int]]:
    """((best rate, E) at the trial's own E, (best rate, best epochs)): by mean accuracy on validation images
    over selection networks (the known network, if the group is that), each with a draw of its own."""
    spec = group.spec
    epochs = baselines.epoch_grid(spec.inner_steps, spec.inner_epochs, tried)
    key = _selection_key(group, source, epochs, [] if tuple(rates) == baselines.RATES else [list(rates)])
    path = directory.cache / "rates" / f"{source}-{key}.json"
    scores = _computed_json(path, directory, lambda: _score_rates(group, kind, rates, epochs, directory))
    own = epochs.index(spec.inner_epochs)
    at_own = best_of([[row[own]] for row in scores], rates, [spec.inner_epochs])
    return at_own, best_of(scores, rates, epochs)


def _selection_key(group: Group, source: str, epochs: Sequence[int], more: Sequence[Any]) -> str:
    """The key of choices on validation images, for any trial with the same data and the same training."""
    spec, splits = group.spec, group.splits
    return digest(
        [source, splits.fingerprint, spec.split_seed, spec.validation_fraction, splits.mean, splits.std],
        [*_training(spec), spec.images_per_class, spec.inner_steps, spec.dtype],
        [epochs, spec.seed if group.known else None, group.plan.device, SPEC_VERSION],
        *_whitening(spec),
        *more,
    )


def _computed_json(path: Path, directory: SweepDirectory, compute: Callable[[], Any]) -> Any:
    with _computed_once(path):
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError):  # missing or torn
            found = compute()
            patiently(lambda: write_atomic(path, json.dumps(found).encode(), directory.temporary))
            return found


def _validation_set(group: Group) -> RealSet:
    """The images that rates and candidates are chosen on, with their classes; of an attack, with what they
    are to be called."""
    stride = -(-len(group.splits.validation) // baselines.SELECTION_IMAGES)
    found = group.splits.validation.take(slice(None, None, stride))
    return replace(found, labels=rewritten(found.labels, group.spec.attack_class, group.spec.target_class))


def _score_rates(
    group: Group, kind: str, tried: Sequence[float], epochs: Sequence[int], directory: SweepDirectory
) -> list[list[float]]:
    """Validation accuracy ``[rates][epochs]``, mean over selection networks."""
    spec = group.spec
    chosen = range(baselines.SELECTION_NETWORKS)
    networks = group.networks("selection", chosen)
    images = _images(group, kind, "baseline_selection", chosen, directory)
    device = group.plan.device
    return score_rates(
        group.network,
        networks,
        LabelledImages(images.to(device, group.dtype), baselines.baseline_labels(spec).to(device)),
        tried,
        epochs,
        _validation_set(group).to(device),
        group.plan,
        InnerLoop(Recipe.of(spec).inner_optimizer),
    )


def _best_candidate(group: Group, lr: float, epochs: int, candidates: int, directory: SweepDirectory) -> int:
    """The best of so many sets of random images on validation images after ``epochs`` at rate ``lr``: by mean
    accuracy over selection networks (the known network, if the group is that); the first of equal ones."""
    source = "optimized_random"
    key = _selection_key(group, source, [epochs], [lr, candidates])
    path = directory.cache / "candidates" / f"{source}-{key}.json"
    scores: list[float] = _computed_json(
        path, directory, lambda: _score_candidates(group, lr, epochs, candidates, directory)
    )
    return max(range(len(scores)), key=lambda i: scores[i])


def _score_candidates(
    group: Group, lr: float, epochs: int, candidates: int, directory: SweepDirectory
) -> list[float]:
    """Validation accuracy of each candidate. One at a time, so that a score does not depend on the number of
    candidates."""
    networks = group.networks("selection", range(1 if group.known else baselines.SELECTION_NETWORKS))
    recipe, scores = baselines.baseline_recipe(group.spec, lr, epochs), []
    for index in range(candidates):
        images = _images(group, "random", "baseline_candidate", [index], directory)[0]
        result = group.try_baseline(networks, images, recipe, _validation_set(group))
        scores.append(float(result.accuracy.mean()))
    return scores


def _neighbour_rows(
    group: Group, source: str, neighbours: int, norm: float, directory: SweepDirectory
) -> list[dict[str, Any]]:
    """k-NN: on one draw of random images per held-out network, or once on the k-means centres."""
    spec, splits, unit = group.spec, group.splits, group.unit
    labels = baselines.baseline_labels(spec).flatten()

    def accuracy(images: Tensor) -> float:
        return baselines.nearest_neighbour_accuracy(
            *(images.flatten(0, 1), labels, splits.test_images, splits.test_labels),
            *(splits.mean, splits.std, neighbours, norm),
        )

    if source == "knn_kmeans":  # the same for every network: once, beside the known one or number 0
        if not group.known and 0 not in unit.indices:
            return []
        return [
            group.neighbour_row(source, None, accuracy(_images(group, "kmeans", "baseline", (), directory)))
        ]
    draws = _images(group, "random", "baseline", unit.indices, directory)
    return [
        group.neighbour_row(source, index, accuracy(images))
        for index, images in zip(unit.indices, draws, strict=True)
    ]
