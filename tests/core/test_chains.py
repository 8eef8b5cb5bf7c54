"""Networks of a user's own whose layers are written out: which ones, and that they are as those that ship."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ddsweep  # noqa: F401  # before the first product: the math library is told to keep to one order
from ddsweep.catalog import DATASETS, TrialSpec, measure_of, parse_network
from ddsweep.catalog.measures import remember
from ddsweep.cohorts import cohort_key, why_alone
from ddsweep.core.chains import chain_of
from ddsweep.core.derivatives import derivatives_of
from ddsweep.core.distill import gradients_together, initial_state
from ddsweep.core.execution import choose_plan
from ddsweep.core.images import RealSet
from ddsweep.core.init import draw_networks
from ddsweep.core.layers import (
    AvgPool,
    BiasReLU,
    Conv,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    Linear,
    MaxPool,
    ReLU,
)
from ddsweep.core.measure import measure
from ddsweep.core.methods import bptt
from ddsweep.core.networks import build_network
from ddsweep.core.own_network import traits_of, written_out
from ddsweep.core.task import Task
from ddsweep.own_code import load_code, resolve_code
from ddsweep.results.code import write_code
from ddsweep.results.layout import SweepDirectory

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


class Passes(nn.Module):
    """``layers`` as attributes, and ``way`` through them."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.way = way
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def head(width: int = 4) -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(1, 4, 3, padding=1), "fc": nn.Linear(width * 16, 10)}


CHAINS: dict[str, tuple[nn.Module, tuple[Layer, ...]]] = {
    "a sequence": (
        nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding="same", bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 10)),
        ),
        (Conv("0", 1, bias=False), GroupNorm("1", 2), ReLU(), AvgPool(), Linear("5")),
    ),
    "functions, ReLU before the pool": (
        Passes(lambda m, x: m.fc(F.max_pool2d(F.relu(m.conv(x)), 2).flatten(1)), **head()),
        (Conv("conv", 1, bias=False), MaxPool(), BiasReLU("conv"), Linear("fc")),
    ),
    "methods, ReLU after the pool": (
        Passes(
            lambda m, x: m.fc(F.max_pool2d(m.conv(x), kernel_size=2).relu().view(x.size(0), -1)), **head()
        ),
        (Conv("conv", 1, bias=False), MaxPool(), BiasReLU("conv"), Linear("fc")),
    ),
    "a view of the shape": (
        Passes(lambda m, x: m.fc(F.avg_pool2d(m.conv(x), 2, 2).reshape(x.shape[0], -1)), **head()),
        (Conv("conv", 1), AvgPool(), Linear("fc")),
    ),
    "the mean of each channel": (
        nn.Sequential(
            *(nn.Conv2d(1, 5, 3), nn.InstanceNorm2d(5), nn.ReLU(inplace=True), nn.Identity()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10, bias=False)),
        ),
        (Conv("0", 0), GroupNorm("1", affine=False), ReLU(), GlobalAvgPool(), Linear("6", bias=False)),
    ),
    "no convolution": (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 10)),
        (Linear("1"), ReLU(), Linear("3")),
    ),
    "a norm of every channel": (
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(4, 4, eps=0.1), nn.Flatten(1), nn.Linear(256, 10)),
        (Conv("0", 0), GroupNorm("1", None, eps=0.1), Linear("3")),
    ),
}


@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_of_layers_is_read(case: str) -> None:
    module, layers = CHAINS[case]
    assert chain_of(module) == layers


class OtherConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    module[0].register_forward_hook(lambda layer, given, output: 2 * output)
    return module


def tail(*layers: nn.Module, width: int = 64) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 10))


NO_CHAINS: dict[str, nn.Module] = {
    "stride": tail(nn.Conv2d(1, 4, 3, stride=2)),
    "dilation": tail(nn.Conv2d(1, 4, 3, dilation=2)),
    "groups": tail(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2)),
    "reflection": tail(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")),
    "unequal sides": tail(nn.Conv2d(1, 4, (3, 1))),
    "another pool": tail(nn.Conv2d(1, 4, 3), nn.MaxPool2d(3)),
    "a pool that overlaps": tail(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2, stride=1)),
    "a padded pool": tail(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2, padding=1)),
    "a pool that rounds up": tail(nn.Conv2d(1, 4, 4), nn.MaxPool2d(2, ceil_mode=True)),
    "batch norm": tail(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
    "running statistics": tail(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)),
    "another activation": tail(nn.Conv2d(1, 4, 3), nn.GELU()),
    "dropout": tail(nn.Conv2d(1, 4, 3), nn.Dropout(0.1)),
    "a norm first": tail(nn.InstanceNorm2d(1), nn.Conv2d(1, 4, 3)),
    "no linear layer last": nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()),
    "a linear layer on rows": nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(64, 10)),
    "a subclass": tail(OtherConv(1, 4, 3)),
    "a hook": hooked(),
    "a branch": Passes(lambda m, x: m.fc(F.avg_pool2d(m.conv(x) + x, 2).flatten(1)), **head()),
    "a number": Passes(lambda m, x: m.fc(F.avg_pool2d(2 * m.conv(x), 2).flatten(1)), **head()),
    "a layer twice": Passes(lambda m, x: m.fc(m.fc(x.flatten(1))), fc=nn.Linear(64, 64)),
    "a choice by value": Passes(lambda m, x: m.fc(x.flatten(1)) if x.sum() > 0 else x, fc=nn.Linear(64, 10)),
}


@pytest.mark.parametrize("case", NO_CHAINS)
def test_nothing_else_is(case: str) -> None:
    assert chain_of(NO_CHAINS[case]) is None


# ---------------------------------------------------------------------------- as those that ship

OWN = """
import torch
from torch import nn
from torch.nn import functional as F


class Le(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc3(F.relu(self.fc2(x)))


class Con(nn.Module):
    def __init__(self, channels, side, classes, width=8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2),
        )
        self.fc = nn.Linear(width * (side // 4) ** 2, classes)

    def forward(self, x):
        return self.fc(self.layers(x).flatten(1))


class Group(Con):
    def __init__(self, channels, side, classes, width=8):
        super().__init__(channels, side, classes, width)
        self.layers[1], self.layers[5] = nn.GroupNorm(2, width), nn.InstanceNorm2d(width)


class Tied(Con):
    def __init__(self, channels, side, classes):
        super().__init__(channels, side, classes, channels)
        self.layers[4].weight = self.layers[0].weight


class Unused(Con):
    def __init__(self, channels, side, classes):
        super().__init__(channels, side, classes)
        self.other = nn.Linear(3, 3)


class Frozen(Con):
    def __init__(self, channels, side, classes):
        super().__init__(channels, side, classes)
        self.fc.weight.requires_grad_(False)


class Transposed(Con):
    def forward(self, x):
        x = self.layers(x)
        return self.fc(x.reshape(-1, self.fc.in_features) if self.training else x.mT.flatten(1))
"""


NAMES = {
    f"layers.{place}.{kind}": f"{shipped}.{kind}"
    for place, shipped in ((0, "convs.0"), (1, "norms.0"), (4, "convs.1"), (5, "norms.1"))
    for kind in ("weight", "bias")
}
"""The names that `Con` gives to the weights of ``convnet``."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The name of a class of `OWN` in a `TrialSpec`; its code is loaded."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    directory = SweepDirectory(folder / "results")

    def load(name: str, **options: object) -> str:
        ref, _ = resolve_code({"file": str(folder / "own.py"), "name": name, **options}, "network")
        write_code(directory, [ref])
        load_code(ref, directory.code)
        return str(ref)

    return load


def task_of(
    network: str, dataset: str = "digits", seed: int = 0, dtype: str = "float32", **settings: Any
) -> Task:
    data = DATASETS[dataset]
    settings = {"models_per_step": 2, "inner_epochs": 2, "real_batch": 65} | settings
    spec = TrialSpec(data, network=network, seed=seed, dtype=dtype, outer_lr=0.01 * (1 + seed), **settings)
    problem = (spec.network_spec, data.shape, data.classes)
    module = build_network(*problem)
    if problem[0].code is not None:
        remember(*problem, measure(module, data.shape))
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (100, *data.shape), generator=generator, dtype=torch.uint8)
    real = RealSet(pixels, torch.arange(100) % data.classes, (0.5,), (0.25,))
    plan = choose_plan(CPU, 1, module, networks=spec.models_per_step)
    return Task.of(spec, replace(plan, real_block=min(plan.real_block, spec.models_per_step)), real)


@pytest.mark.parametrize(
    ("name", "shipped", "dataset"), [("Le", "lenet", "mnist"), ("Con", "convnet(width=8)", "digits")]
)
def test_a_copy_of_a_network_that_ships_has_its_bits(
    own: Callable[..., str], name: str, shipped: str, dataset: str
) -> None:
    """Outer gradient, plan and measure: nothing is slower or different for being one's own."""
    mine, its = task_of(own(name), dataset), task_of(shipped, dataset)
    assert mine.plan == its.plan and mine.plan.inner_batching == "explicit"
    assert why_alone(mine.spec) is None
    problem = (mine.spec.dataset.shape, mine.spec.dataset.classes)
    assert measure_of(mine.spec.network_spec, *problem) == measure_of(its.spec.network_spec, *problem)
    networks = [5, 6]
    drawn = [
        draw_networks(task.network, "xavier", 1.0, networks, device=CPU, dtype=torch.float32)
        for task in (mine, its)
    ]
    images = torch.randn(2, *problem[0], generator=torch.Generator().manual_seed(4))
    targets = torch.tensor([3, 1])
    found = []
    for task, params in zip((mine, its), drawn, strict=True):
        math = derivatives_of(task.network, task.plan.inner_batching)
        gradient, kept = math.gradient(params, images, targets, True)
        pulled = math.vjp(params, kept, gradient)
        found.append([params, gradient, pulled.weights, {"images": pulled.images}])
    for ours, theirs in zip(*found, strict=True):
        assert len(ours) == len(theirs)
        assert all(torch.equal(value, theirs[NAMES.get(name, name)]) for name, value in ours.items())


@pytest.mark.parametrize("name", ["Le", "Con", "Group"])
def test_written_out_and_by_autograd_it_is_the_same(own: Callable[..., str], name: str) -> None:
    task = task_of(own(name), "mnist" if name == "Le" else "digits", dtype="float64")
    plan = replace(task.plan, inner_batching="loop", real_batching="loop")
    written, by_autograd = (
        bptt.gradients(replace(task, plan=one), initial_state(task).learned, 0) for one in (task.plan, plan)
    )
    torch.testing.assert_close(written.losses, by_autograd.losses, rtol=1e-10, atol=0)
    for key, value in written.by.items():
        assert value.any()
        torch.testing.assert_close(value, by_autograd.by[key], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["Tied", "Unused", "Frozen", "Transposed"])
def test_a_network_that_is_not_what_it_looks_like_stays_with_autograd(
    own: Callable[..., str], name: str
) -> None:
    """Its weights are not those of its layers, or it computes something else than they do."""
    shape = (3, 8, 8) if name == "Tied" else SHAPE
    module = build_network(parse_network(own(name), shape), shape, 10)
    assert traits_of(module) is not None and written_out(module) is None
    assert choose_plan(CPU, 1, module).inner_batching == "loop"


def test_a_large_one_stays_with_autograd_which_is_faster_then(own: Callable[..., str]) -> None:
    shape = (3, 32, 32)
    for width, small in ((8, True), (32, False)):
        module = build_network(parse_network(own("Con", width=width), shape), shape, 10)
        assert (written_out(module) is not None) == small


@pytest.mark.parametrize("name", ["Con", "Group"])
def test_trials_side_by_side_have_the_bits_that_they_have_alone(own: Callable[..., str], name: str) -> None:
    for networks in (1, 3):
        tasks = [task_of(own(name), seed=seed, models_per_step=networks) for seed in range(5)]
        assert len({cohort_key(task.spec) for task in tasks}) == 1
        alone = [bptt.gradients(task, initial_state(task).learned, 0) for task in tasks]
        for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1], [2]):
            some = [tasks[i] for i in order]
            together = gradients_together(some, [initial_state(task) for task in some])
            for i, found in zip(order, together, strict=True):
                assert torch.equal(found.losses, alone[i].losses)
                assert all(torch.equal(value, alone[i].by[key]) for key, value in found.by.items())


def test_autograd_is_why_others_go_in_turn(own: Callable[..., str]) -> None:
    assert "by autograd" in (why_alone(task_of(own("Unused")).spec) or "")
