"""What a recipe says of the training of a network, and that it comes back from a file as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.recipe import Recipe, held_out_loop
from ddsweep.errors import SettingError

SPEC = TrialSpec(
    DATASETS["digits"],
    **{"inner_steps": 3, "images_per_class": 3, "inner_epochs": 2, "inner_optimizer": "momentum"},
    **{"inner_momentum": 0.8, "order": "shuffled", "labels": "soft"},
)


def test_a_trial_says_how_its_set_is_trained_on() -> None:
    found = Recipe.of(SPEC)
    assert found == Recipe(2, None, "momentum", 0.8, "shuffled", "soft")
    assert found.inner_optimizer == InnerOptimizer("momentum", 0.8)
    matching = TrialSpec(DATASETS["digits"], method="distribution_matching", labels="soft")
    assert Recipe.of(matching).labels == "hard", "the method learns none, whatever stands in the settings"


def test_a_recipe_comes_back_from_json_as_it_was() -> None:
    for recipe in (Recipe.of(SPEC), replace(Recipe.of(SPEC), rate=0.1, weight_decay=5e-4)):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert "weight_decay" not in Recipe.of(SPEC).to_dict(), "files stay what they were"
    with pytest.raises(SettingError, match=r"recipe of a newer version of ddsweep: schedule"):
        Recipe.from_dict({"epochs": 1, "schedule": "cosine"})


def test_one_rate_takes_the_place_of_the_learned_ones() -> None:
    learned = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert Recipe.of(SPEC).rates(learned) == learned
    assert replace(Recipe.of(SPEC), rate=0.7).rates(learned) == [0.7] * 6


def test_an_order_is_that_of_set_role_and_network_whatever_else_the_recipe_says() -> None:
    recipe = Recipe.of(SPEC)
    first = held_out_loop(recipe, SPEC, "heldout", range(4), 9).batch_order
    other = replace(recipe, rate=0.1, optimizer="adam", epochs=3, labels="hard")
    again = held_out_loop(other, SPEC, "heldout", [2], 9).batch_order
    assert first is not None and again is not None
    assert torch.equal(again.batches[:, 0], first.batches[:, 2]), "each network has its own"
    for loop in (
        held_out_loop(recipe, SPEC, "selection", range(4), 9),
        held_out_loop(recipe, replace(SPEC, seed=1), "heldout", range(4), 9),
    ):
        assert loop.batch_order is not None and not torch.equal(loop.batch_order.batches, first.batches)
    assert held_out_loop(replace(recipe, order="fixed"), SPEC, "heldout", range(4), 9).batch_order is None
