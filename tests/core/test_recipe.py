"""What a recipe says of the training of a network, and that it comes back from a file as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.recipe import Recipe, held_out_loop
from ddsweep.errors import SettingError

SPEC = TrialSpec(
    DATASETS["digits"],
    **{"inner_steps": 3, "images_per_class": 3, "inner_epochs": 2, "inner_optimizer": "momentum"},
    **{"inner_momentum": 0.8, "order": "shuffled", "labels": "soft"},
)

FIELD = Recipe(5, 0.05, "momentum", order="shuffled", batch=8, schedule="step", decay_epochs=3)


def test_a_trial_says_how_its_set_is_trained_on() -> None:
    found = Recipe.of(SPEC)
    assert found == Recipe(2, None, "momentum", 0.8, "shuffled", "soft")
    assert found.inner_optimizer == InnerOptimizer("momentum", 0.8)
    matching = TrialSpec(DATASETS["digits"], method="distribution_matching", labels="soft")
    assert Recipe.of(matching).labels == "hard", "the method learns none, whatever stands in the settings"


def test_a_recipe_comes_back_from_json_as_it_was() -> None:
    full = replace(FIELD, weight_decay=5e-4, augment="dsa")
    for recipe in (Recipe.of(SPEC), replace(Recipe.of(SPEC), rate=0.1, weight_decay=5e-4), full):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    first = ["epochs", "rate", "optimizer", "momentum", "order", "labels"]
    assert list(Recipe.of(SPEC).to_dict()) == first, "files stay what they were"
    with pytest.raises(SettingError, match=r"recipe of a newer version of ddsweep: warm_up"):
        Recipe.from_dict({"epochs": 1, "warm_up": 3})
    with pytest.raises(SettingError, match=r"newer version of ddsweep: .*'nesterov' is not one of"):
        Recipe.from_dict({"epochs": 1, "optimizer": "nesterov"})


def test_one_rate_takes_the_place_of_the_learned_ones() -> None:
    learned = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert Recipe.of(SPEC).rates(learned) == learned
    assert replace(Recipe.of(SPEC), rate=0.7).rates(learned) == [0.7] * 6
    for changes in ({"batch": 4}, {"schedule": "step"}):
        recipe = replace(Recipe.of(SPEC), **changes)
        assert recipe.rates([0.1] * 6) == [0.1] * 6
        with pytest.raises(ValueError, match="take one rate for all steps"):
            recipe.rates(learned)


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


def test_every_epoch_of_minibatches_has_each_image_once_in_an_order_of_the_network_alone() -> None:
    loop = held_out_loop(FIELD, SPEC, "heldout", range(3), 20)
    assert loop.minibatches is not None and loop.batch_order is None and not loop.recordable
    assert FIELD.steps_per_epoch(SPEC) == loop.minibatches.steps_per_epoch == 4
    drawn = loop.minibatches.drawn(torch.device("cpu"))
    steps = [drawn[t] for t in range(8)]
    assert [step.shape[1] for step in steps] == [8, 8, 8, 6] * 2
    epochs = [torch.cat(steps[first : first + 4], 1) for first in (0, 4)]
    for epoch in epochs:
        assert epoch.sort(1).values.tolist() == [list(range(30))] * 3
    orders = {tuple(row) for epoch in epochs for row in epoch.tolist()}
    assert len(orders) == 6, "each network and each epoch has its own"
    alone = held_out_loop(replace(FIELD, rate=0.1), SPEC, "heldout", [2], 20).minibatches
    assert alone is not None
    again = alone.drawn(torch.device("cpu"))
    assert torch.equal(again[5], steps[5][2:]), "also when asked for that step first"
    assert loop.of(slice(2, 3)).minibatches == alone


def test_a_set_that_is_no_larger_than_a_minibatch_is_one() -> None:
    for size in (30, 256):
        loop = held_out_loop(replace(FIELD, batch=size), SPEC, "heldout", range(3), 5)
        assert loop.batch_order is not None and loop.minibatches is None and loop.recordable
        assert loop.batch_order.batches.tolist() == [[list(range(30))]] * 5
        assert replace(FIELD, batch=size).steps_per_epoch(SPEC) == 1


@pytest.mark.parametrize("epochs", [1, 2, 5, 301])
def test_schedules_are_those_of_torch_epoch_by_epoch(epochs: int) -> None:
    def of_torch(make: Any) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler, found = make(optimizer), []
        for _ in range(epochs):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    cosine = replace(FIELD, epochs=epochs, schedule="cosine")
    expected = of_torch(lambda optimizer: CosineAnnealingLR(optimizer, epochs))
    assert [cosine.rate_factor(e) for e in range(epochs)] == pytest.approx(expected, abs=1e-10)
    half = replace(FIELD, epochs=epochs, decay_epochs=None)
    expected = of_torch(lambda optimizer: MultiStepLR(optimizer, [-(-epochs // 2)], 0.1))
    assert [half.rate_factor(e) for e in range(epochs)] == pytest.approx(expected, rel=1e-12)
    often = replace(FIELD, epochs=epochs, decay_epochs=100, decay_factor=0.5)
    expected = of_torch(lambda optimizer: MultiStepLR(optimizer, [100, 200, 300], 0.5))
    assert [often.rate_factor(e) for e in range(epochs)] == pytest.approx(expected, rel=1e-12)
    for recipe in (cosine, half, often):
        assert recipe.rate_factor(epochs + 7) == recipe.rate_factor(epochs - 1), "beyond, as in the last"


def test_an_augmentation_is_that_of_network_and_step() -> None:
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    recipe = replace(FIELD, augment="shift+rotate")
    three = held_out_loop(recipe, SPEC, "heldout", range(3), 20).augments
    alone = held_out_loop(recipe, SPEC, "heldout", [2], 20).augments
    made = [augment(images, 4) for augment in three]
    assert torch.equal(alone[0](images, 4), made[2])
    assert not torch.equal(made[0], made[1]) and not torch.equal(alone[0](images, 5), made[2])
    assert held_out_loop(FIELD, SPEC, "heldout", range(3), 20).augments == ()
