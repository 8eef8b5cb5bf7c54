"""A distilled set under a protocol of its own: other networks, or another recipe.

Images and labels stay those of the set, learned labels included. There are no baselines here: they use best
rates, which would answer another question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ddsweep.catalog import Protocol
from ddsweep.core.recipe import Recipe
from ddsweep.distilled import DistilledSet
from ddsweep.evaluation.group import Group

__all__ = ["changed", "protocol_rows"]

_SETTINGS = {
    **{"order": "order", "inner_optimizer": "optimizer", "inner_lr": "rate", "inner_epochs": "epochs"},
    **{"weight_decay": "weight_decay", "inner_batch": "batch", "inner_schedule": "schedule"},
    **{"inner_decay_epochs": "decay_epochs", "inner_decay_factor": "decay_factor"},
    "inner_augment": "augment",
}
"""What a protocol can change of a recipe; the rest is which networks there are."""


def changed(recipe: Recipe, protocol: Protocol) -> Recipe:
    """``recipe`` with what ``protocol`` changes of it."""
    changes = protocol.changes()
    found = {_SETTINGS[name]: changes[name] for name in changes if name in _SETTINGS}
    if protocol.inner_batch is not None:
        found["order"] = "shuffled"
    return replace(recipe, **found)


def protocol_rows(
    group: Group, protocol: Protocol, distilled: DistilledSet, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of the ``evals`` table (without trial id) of ``distilled`` on the networks of ``group``, which are
    those of ``protocol``, at the inner steps ``steps``."""
    recipe = changed(distilled.recipe, protocol)
    result = group.test_distilled(distilled, recipe, steps)
    return group.rows(result, "distilled", group.unit.protocol, recipe)
