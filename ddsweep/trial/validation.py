"""Choices on validation images: the score of a state, and the recipe of a set without learned rates.

They never use the test set or held-out networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ddsweep import baselines
from ddsweep.baselines import RATES
from ddsweep.catalog import TrialSpec
from ddsweep.core.evaluate import evaluate_networks
from ddsweep.core.images import LabelledImages
from ddsweep.core.methods import labels_of, method_of
from ddsweep.core.outer import DistillState, averaged
from ddsweep.core.recipe import Recipe, held_out_loop
from ddsweep.core.task import Learned, PoolNetworks, Task, selection_seeds
from ddsweep.core.tuning import best_of, score_rates
from ddsweep.data.splits import Splits
from ddsweep.pools.imagenet import pool_of
from ddsweep.results.layout import SweepDirectory

__all__ = ["chosen_recipes", "training_networks", "validate"]


def training_networks(spec: TrialSpec, directory: SweepDirectory) -> PoolNetworks | None:
    """Gives the outer loop networks of the trial's pool: training ones only. Raises `DataError` for a missing
    or damaged pool."""
    pool = pool_of(spec, directory.pools)
    return None if pool is None else lambda indices: pool.networks("train", indices)


def validate(task: Task, state: DistillState, splits: Splits) -> float:
    """``val_score``: mean accuracy on the validation split after T steps, over ``selection`` networks (the
    known network of a ``fixed`` trial); for an attack, its success."""
    spec, learned = task.spec, averaged(state)
    rates = method_of(spec).rates(learned, spec)
    if rates is None:
        rate, _ = best_of(_scores(task, learned, splits, (spec.inner_epochs,)), RATES, (spec.inner_epochs,))
        rates = torch.full((spec.steps,), rate)
    seeds = selection_seeds(spec)
    found = evaluate_networks(
        task.network,
        task.networks(seeds),
        LabelledImages(learned["images"], labels_of(learned, task)),
        rates.tolist(),
        [spec.steps],
        splits.validation.to(state.images.device),
        task.plan,
        loop=held_out_loop(Recipe.of(spec), spec, "selection", range(len(seeds)), spec.steps),
        fewer_at_once=True,
    )
    if spec.attack_class is not None and spec.target_class is not None:
        return float(found.called(spec.attack_class, spec.target_class).mean())
    return float(found.accuracy.mean())


def chosen_recipes(task: Task, learned: Learned, splits: Splits) -> tuple[Tensor, Recipe, Recipe | None]:
    """The rates ``[T]`` of a finished set, its recipe and, of a method that learns no rates, its tuned one.

    Without learned rates it is as with baselines, on the same number of validation images: the best rate for
    the epochs of the trial; and, tuned, the best rate and number of epochs.
    """
    spec = task.spec
    recipe, rates = Recipe.of(spec), method_of(spec).rates(learned, spec)
    if rates is not None:
        return rates, recipe, None
    epochs = baselines.epoch_grid(spec.inner_steps, spec.inner_epochs)
    scores = _scores(task, learned, splits, epochs)
    own = epochs.index(spec.inner_epochs)
    rate, _ = best_of([[row[own]] for row in scores], RATES, (spec.inner_epochs,))
    best, longest = best_of(scores, RATES, epochs)
    rates = torch.full((spec.steps,), rate)
    return rates, replace(recipe, rate=rate), replace(recipe, rate=best, epochs=longest)


def _scores(task: Task, learned: Learned, splits: Splits, epochs: Sequence[int]) -> list[list[float]]:
    """Accuracy ``[rates][epochs]`` of ``selection`` networks on validation images."""
    spec, seeds = task.spec, selection_seeds(task.spec)
    stride = -(-len(splits.validation) // baselines.SELECTION_IMAGES)
    return score_rates(
        task.network,
        task.networks(seeds),
        LabelledImages(learned["images"], labels_of(learned, task)),
        RATES,
        epochs,
        splits.validation.take(slice(None, None, stride)).to(task.plan.device),
        task.plan,
        held_out_loop(Recipe.of(spec), spec, "selection", range(len(seeds)), spec.inner_steps * max(epochs)),
    )
