"""A distilled set with a user's own networks and raw images: any layers, buffers and parameters, and
refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddsweep import DistilledSet, apply
from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.core.recipe import Recipe
from ddsweep.data.load import Splits

GREY = TrialSpec(DATASETS["digits"], network="convnet(width=4)", inner_steps=2, images_per_class=2)
COLOUR = TrialSpec(DATASETS["cifar10"], network="convnet(width=4)")


def made(spec: TrialSpec, **changes: Any) -> DistilledSet:
    """A set of noise, as if distilled for ``spec``."""
    steps, channels = spec.inner_steps, spec.dataset.shape[0]
    generator = torch.Generator().manual_seed(0)
    found = DistilledSet(
        images=torch.randn(steps, 10, *spec.dataset.shape, generator=generator),
        labels=torch.arange(10).repeat(steps, 1),
        rates=torch.full((steps,), 0.05),
        mean=(0.5, 0.25, 0.75)[:channels],
        std=(0.5, 2.0, 0.25)[:channels],
        class_names=tuple(map(str, range(10))),
        spec=spec,
        recipe=Recipe.of(spec),
    )
    return replace(found, **changes)


# ------------------------------------------------------------------------------------ initial weights


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def batch_norm() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.InstanceNorm2d(4, track_running_stats=True)),
        *(nn.Flatten(), nn.Linear(144, 10)),
    )


class Own(nn.Module):
    """Parameters and buffers of its own, a slope, attention, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.bias = nn.Parameter(torch.full((10,), 0.25))
        self.register_buffer("grid", torch.arange(4.0))
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.conv = nn.Conv2d(1, 4, 3)
        self.slope = nn.PReLU()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.head = nn.Linear(4, 10)
        self.same = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.conv(x)).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x)[0].mean(1) + self.grid
        logits: Tensor = self.same(x) * self.scale + self.bias
        return logits


def spectral() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)),
        nn.LayerNorm(8),
        nn.Linear(8, 10),
    )


@pytest.mark.parametrize("network", [plain, batch_norm, Own, spectral])
def test_a_network_of_any_layers_is_drawn_and_trained(network: Callable[[], nn.Module]) -> None:
    found, model = made(GREY), network()
    drawn = found.initial_weights(model, 1)
    model.load_state_dict(drawn)
    apply(found, model)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, drawn[name]) or "in_proj_bias" in name, name


def test_the_law_fills_layers_and_the_rest_is_as_the_network_has_it() -> None:
    found, model = made(GREY), Own()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = found.initial_weights(model)
    assert after.keys() == before.keys()  # no buffer that a state leaves out
    for name in (
        "scale",
        "bias",
        "grid",
        "slope.weight",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
    ):
        assert torch.equal(after[name], before[name]), name
        assert after[name].data_ptr() != model.state_dict()[name].data_ptr()
    assert torch.equal(after["same.weight"], after["head.weight"])
    assert not after["conv.bias"].any() and not after["head.bias"].any()
    for name in ("conv.weight", "head.weight", "attention.out_proj.weight"):
        assert not torch.equal(after[name], before[name]), name
    # What a law does not fill takes nothing from its generator: the first layer is that of a plain network.
    assert torch.equal(after["conv.weight"], found.initial_weights(plain())["0.weight"])


def test_running_statistics_start_anew() -> None:
    found, model = made(GREY), batch_norm()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(8, 1, 8, 8))
    assert not torch.equal(model.state_dict()["1.running_mean"], fresh["1.running_mean"])
    drawn = found.initial_weights(model)
    for name, value in fresh.items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(drawn[name], value) and drawn[name].dtype == value.dtype, name


def test_a_parameter_without_law_needs_a_value() -> None:
    with torch.device("meta"):
        model = Own()
    with pytest.raises(ValueError, match=r"^scale: no law for it, and the network is on the meta device"):
        made(GREY).initial_weights(model)


# ------------------------------------------------------------------------------------------- images


def test_raw_images_become_what_the_set_was_distilled_from() -> None:
    found = made(COLOUR)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(value)[:, None, None] for value in (found.mean, found.std))
    expected = (pixels / 255 - mean) / std
    for raw in (pixels.to(torch.uint8), pixels, pixels / 255, pixels.to(torch.uint8).numpy()):
        assert torch.equal(found.normalise(raw), expected)
    assert torch.equal(found.normalise(pixels[0] / 255), expected[0])
    assert torch.equal(found.normalise(pixels.view(2, 3, 3, 32, 32) / 255), expected.view(2, 3, 3, 32, 32))
    assert found.normalise(pixels / 255.0).dtype == torch.float32
    assert found.normalise(torch.zeros((1, 3, 32, 32), dtype=torch.float64)).dtype == torch.float64
    assert found.normalise(np.zeros((1, 3, 32, 32))).dtype == torch.float32, "numpy is double by itself"
    assert torch.equal(found.normalise(pixels.numpy().astype(np.uint16)), expected)
    assert found.normalise(pixels[:0]).shape == (0, 3, 32, 32)


WRONG_IMAGES: dict[str, tuple[Any, str]] = {
    "normalised already": (
        torch.linspace(-2, 2, 3072).view(1, 3, 32, 32),
        "go from -2 to 2; give floats from 0",
    ),
    "bytes as floats": (
        torch.linspace(0, 255, 3072).view(1, 3, 32, 32),
        "go from 0 to 255; give floats from 0",
    ),
    "16 bits": (torch.full((1, 3, 32, 32), 4095), "4095; .* or whole numbers from 0 to 255"),
    "not finite": (torch.full((1, 3, 32, 32), torch.nan), "go from nan to nan"),
    "channels last": (
        torch.zeros(5, 32, 32, 3),
        r"shape \[5, 32, 32, 3\]; the set takes \[..., 3, 32, 32\]; .*movedim",
    ),
    "grey": (torch.zeros(5, 1, 32, 32), "they have 1 channels, and the set has 3"),
    "another size": (torch.zeros(5, 3, 28, 28), r"shape \[5, 3, 28, 28\]; the set takes \[..., 3, 32, 32\]$"),
}


@pytest.mark.parametrize(("images", "said"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_images_of_another_kind_are_refused(images: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(COLOUR).normalise(images)


def test_grey_images_without_an_axis_of_channels_are_told_so() -> None:
    with pytest.raises(ValueError, match=re.escape("lack the axis of channels: images[..., None, :, :]")):
        made(GREY).normalise(torch.zeros(5, 8, 8))
    with pytest.raises(ValueError, match=r"they have 3 channels, and the set has 1$"):
        made(GREY).normalise(torch.zeros(5, 3, 8, 8))


class Beside(nn.Module):
    """A layer that is not used; with ``two`` it gives a pair."""

    def __init__(self, two: bool) -> None:
        super().__init__()
        self.two, self.head, self.unused = two, nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        logits = self.head(x.flatten(1))
        return (logits, x) if self.two else logits


def test_a_parameter_that_is_not_used_stays_as_it_is() -> None:
    """As in distilling and evaluation."""
    model = Beside(two=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply(made(GREY), model)
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"unused.weight", "unused.bias"}


def test_a_model_that_gives_more_than_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the model gives a tuple, and no logits \[N, classes\]$"):
        apply(made(GREY), Beside(two=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "sgd"}, "recipe: optimizer='sgd' is not one of gd, momentum, adam"),
        ({"order": "random"}, "recipe: order='random' is not one of fixed, shuffled, sampled"),
        ({"schedule": "linear"}, "recipe: schedule='linear' is not one of constant, step, cosine"),
        ({"labels": "none"}, "recipe: labels='none' is not one of hard, soft"),
        ({"epochs": 0}, "recipe: epochs=0 must be at least 1"),
        ({"batch": 0}, "recipe: batch=0 must be at least 1"),
        ({"rate": -5.0}, "recipe: rate=-5.0 must be a number from 0 on"),
        ({"rate": float("nan")}, "recipe: rate=nan must be a number"),
        ({"rate": "0.1"}, "recipe: rate='0.1' must be a number"),
        ({"weight_decay": -1}, "recipe: weight_decay=-1 must be a number"),
        ({"decay_factor": float("inf")}, "recipe: decay_factor=inf must be a number"),
        ({"rate": True}, "recipe: rate=True must be a number"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        replace(made(GREY).recipe, **change)


def test_numbers_of_numpy_are_numbers() -> None:
    for rate in (np.float32(0.5), np.float64(0.5), np.int64(1), 1):
        assert replace(made(GREY).recipe, rate=rate).rates([0.1]) == [float(rate)]


def test_steps_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="steps=-1 must be 0 or more"):
        apply(made(GREY), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), steps=-1)


def test_whitened_sets_need_the_data_set() -> None:
    with pytest.raises(ValueError, match="whitening: zca"):
        made(replace(GREY, whitening="zca")).normalise(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), r"\[1, 8, 8\] each: .*3 channels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), r"\[1, 8, 8\] each: .*mat1 and mat2"),
    ],
)
def test_a_model_for_other_images_is_told_which_they_are(model: nn.Module, said: str) -> None:
    first = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=f"^the model does not take the set's images, {said}"):
        apply(made(GREY), model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), first, strict=True))


# ------------------------------------------------------------------------------------- in a notebook


def test_reprs_are_one_short_line() -> None:
    assert repr(GREY) == (
        f"TrialSpec({GREY.trial_id}: dataset='digits', network='convnet(depth=2,width=4,norm=instance)', "
        "images_per_class=2, inner_steps=2)"
    )
    assert repr(made(GREY)) == (
        f"DistilledSet({GREY.trial_id}: digits, 10 classes, images_per_class=2, inner_steps=2, "
        "inner_epochs=1, init=random, network=convnet(depth=2,width=4,norm=instance))"
    )


def test_data_say_how_many_images_they_have(splits: Splits) -> None:
    assert repr(splits) == (
        "Splits(digits: 1295 train, 142 validation, 360 test images of 1x8x8, 10 classes)"
    )


def test_a_notebook_shows_the_images() -> None:
    soft = made(GREY, labels=torch.eye(10).repeat(2, 1, 1), class_names=("<b>", *map(str, range(1, 10))))
    for found in (made(GREY), soft):
        shown = found._repr_html_()
        assert shown.startswith("<div>DistilledSet(") and 'src="data:image/png;base64,iVBOR' in shown
    assert "<img" not in made(replace(GREY, whitening="zca"))._repr_html_()
