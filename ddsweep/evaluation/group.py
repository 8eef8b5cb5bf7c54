"""A group of networks that is trained and tested together, and its rows in the ``evals`` table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddsweep.baselines import baseline_labels
from ddsweep.catalog import EvalUnit, TrialSpec
from ddsweep.core.evaluate import Evaluation, evaluate_networks
from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.images import LabelledImages, RealSet
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import Params, stack_networks
from ddsweep.core.precision import stored_dtype
from ddsweep.core.recipe import Recipe, held_out_loop
from ddsweep.core.task import known_seed
from ddsweep.core.training import InnerLoop
from ddsweep.data.splits import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.pools.store import TrainedPool
from ddsweep.seeds import derive_seed

__all__ = ["Group"]


def _schedule(recipe: Recipe) -> dict[str, Any]:
    """The columns of rows whose rate changes from epoch to epoch."""
    if recipe.schedule == "constant":
        return {}
    found = {"inner_schedule": recipe.schedule}
    if recipe.schedule == "cosine":
        return found
    return found | {"inner_decay_epochs": recipe.decay_every, "inner_decay_factor": recipe.decay_factor}


@dataclass(frozen=True)
class Group:
    """The networks of one unit, all ``size`` of them, and their test data."""

    spec: TrialSpec
    unit: EvalUnit
    splits: Splits
    plan: ExecutionPlan
    network: nn.Module
    pool: TrainedPool | None = None

    @property
    def known(self) -> bool:
        """Whether this is the one known network of a ``fixed`` trial."""
        return self.spec.init == "fixed" and self.unit.protocol != "on_random"

    @property
    def indices(self) -> tuple[int, ...]:
        """All networks that are computed, wanted or not."""
        if self.known:
            return self.unit.indices
        first = self.unit.group * self.unit.size
        last = first + self.unit.size
        if self.spec.pool is not None:
            last = min(last, self.spec.pool.heldout)
        return tuple(range(first, last))

    @property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.spec.dtype)

    def networks(self, role: str, indices: Sequence[int]) -> Params:
        """Networks ``[K, ...]`` for a role: ``heldout``, or ``selection``; a pool uses its training networks
        for selection."""
        spec = self.spec
        if self.pool is not None and spec.pool is not None:
            own = "heldout" if role == "heldout" and not self.known else "train"
            numbers = [spec.seed for _ in indices] if self.known else indices
            if own == "train":
                numbers = [number % spec.pool.train for number in numbers]  # a small pool repeats them
            stacked = stack_networks(self.pool.networks(own, numbers))
            return {name: value.to(self.plan.device, self.dtype) for name, value in stacked.items()}
        law = (spec.network, spec.init_law, spec.init_param)
        seeds = [known_seed(spec) if self.known else derive_seed(role, *law, i) for i in indices]
        return draw_networks(
            self.network,
            spec.init_law,
            spec.init_param,
            seeds,
            device=torch.device(self.plan.device),
            dtype=self.dtype,
        )

    def test_distilled(self, distilled: DistilledSet, recipe: Recipe, steps: Sequence[int]) -> Evaluation:
        """The held-out networks, trained on ``distilled`` by ``recipe`` and tested after ``steps``."""
        loop = held_out_loop(recipe, distilled.spec, "heldout", self.indices, max(steps))
        networks, rates = self.networks("heldout", self.indices), recipe.rates(distilled.rates.tolist())
        return self._run(networks, distilled.batches(recipe), rates, steps, self.splits.test, loop)

    def test_baseline(self, images: Tensor, recipe: Recipe) -> Evaluation:
        """The held-out networks, trained on ``images`` by ``recipe`` and tested at its end."""
        return self.try_baseline(self.networks("heldout", self.indices), images, recipe, self.splits.test)

    def try_baseline(self, networks: Params, images: Tensor, recipe: Recipe, real: RealSet) -> Evaluation:
        """``networks``, trained on ``images [S, n, c, h, w]`` (or ``[K, S, ...]``) by ``recipe``, tested on
        ``real`` at its end."""
        steps = self.spec.inner_steps * recipe.epochs
        trained_on, loop = (
            LabelledImages(images, baseline_labels(self.spec)),
            InnerLoop(recipe.inner_optimizer),
        )
        return self._run(networks, trained_on, [recipe.one_rate] * steps, [steps], real, loop)

    def _run(
        self,
        networks: Params,
        trained_on: LabelledImages,
        rates: Sequence[float],
        steps: Sequence[int],
        real: RealSet,
        loop: InnerLoop,
    ) -> Evaluation:
        device, labels = self.plan.device, trained_on.labels
        if labels.is_floating_point():
            labels = labels.to(self.dtype)
        trained_on = LabelledImages(trained_on.images.to(device, self.dtype), labels.to(device))
        real = real.to(device)
        return evaluate_networks(self.network, networks, trained_on, rates, steps, real, self.plan, loop=loop)

    def rows(self, result: Evaluation, source: str, protocol: str, recipe: Recipe) -> list[dict[str, Any]]:
        """Rows of the ``evals`` table (without trial id), one for each step and wanted network."""
        rows = []
        for s, step in enumerate(result.steps):
            for k, index in enumerate(self.indices):
                if index not in self.unit.indices:
                    continue
                diverged = bool(result.diverged[s, k])
                rows.append(
                    {
                        **self._common(source, protocol),
                        "model_seed": index,
                        "inner_step": step,
                        "inner_epochs": recipe.epochs,
                        "inner_lr": recipe.rate,
                        "order": recipe.order,
                        "inner_optimizer": recipe.optimizer,
                        "weight_decay": recipe.weight_decay or None,
                        "inner_batch": recipe.batch,
                        **_schedule(recipe),
                        "inner_augment": None if recipe.augment == "none" else recipe.augment,
                        "accuracy": float(result.accuracy[s, k]),
                        **self._attack(result, s, k),
                        "loss": None if diverged else float(result.loss[s, k]),
                        "diverged": diverged,
                    }
                )
        return rows

    def _attack(self, result: Evaluation, s: int, k: int) -> dict[str, float]:
        """The columns that only rows of an attack have."""
        attacked, target = self.spec.attack_class, self.spec.target_class
        if attacked is None or target is None:
            return {}
        return {
            "accuracy_other": float(result.accuracy_without(attacked)[s, k]),
            "attack_success": float(result.called(attacked, target)[s, k]),
        }

    def _common(self, source: str, protocol: str) -> dict[str, Any]:
        return {
            "source": source,
            "protocol": protocol,
            "network": self.spec.network,
            "init_law": self.spec.init_law if self.spec.pool is None else None,
            "pool": self.spec.pool.name if self.spec.pool else None,
            "split": "test",
            "dataset_stand_in": self.splits.stand_in or (self.pool is not None and self.pool.stand_in),
            "n_images": len(self.splits.test_labels),
            "group": self.unit.group,
        }

    def neighbour_row(self, source: str, index: int | None, accuracy: float) -> dict[str, Any]:
        """A row of k-NN: no network, no steps; ``index`` numbers the draw of images."""
        return {
            **self._common(source, "nearest_neighbour"),
            "network": None,
            "init_law": None,
            "pool": None,
            "model_seed": index,
            "inner_step": 0,
            "accuracy": accuracy,
            "diverged": False,
        }
