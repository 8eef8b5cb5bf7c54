"""The contract of a network, over all that ship and over toy ones of a user's own.

A network makes ``[N, classes]`` of images; its derivative's derivative is the measured slope; what it holds
beside its weights is carried from step to step, and what it draws comes from seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import NETWORKS, NetworkSpec, measure_of, parse_network
from ddsweep.catalog.measures import TABLE, is_measured
from ddsweep.core.derivatives import Autograd
from ddsweep.core.evaluate import count_right
from ddsweep.core.execution import ExecutionPlan, choose_plan, more_frugal
from ddsweep.core.images import LabelledImages, RealSet
from ddsweep.core.init import draw_networks
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.measure import measure
from ddsweep.core.measure_shipped import layers_text, source_hash
from ddsweep.core.network_check import faults
from ddsweep.core.networks import build_network, forward_networks
from ddsweep.core.own_network import DRAWS, parts, rest_at, traits_of
from ddsweep.core.training import InnerLoop, TrainState, train_networks
from ddsweep.core.unroll import outer_gradient
from ddsweep.errors import UserError
from ddsweep.own_code import load_code, resolve_code
from ddsweep.results.code import write_code
from ddsweep.results.layout import SweepDirectory

CPU = torch.device("cpu")
SHIPPED = [
    ("lenet", (1, 28, 28)),
    ("alexcifarnet", (3, 32, 32)),
    ("convnet(width=8)", (3, 8, 8)),
    ("convnet(depth=1,width=5,norm=none)", (1, 16, 16)),
]
SHAPE = (1, 8, 8)

TOYS = '''
import torch
from torch import nn
from torch.nn import functional as F


class Plain(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3)
        self.head = nn.Linear(4 * 9, classes)

    def forward(self, x):
        return self.head(F.avg_pool2d(F.softplus(self.conv(x)), 2).flatten(1))


class Norm(Plain):
    def __init__(self, channels, classes, momentum=0.1):
        super().__init__(channels, classes)
        self.norm = nn.BatchNorm2d(4, momentum=momentum)

    def forward(self, x):
        return self.head(F.avg_pool2d(F.softplus(self.norm(self.conv(x))), 2).flatten(1))


class Drop(Plain):
    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = F.avg_pool2d(F.softplus(self.conv(x)), 2).flatten(1)
        if self.training:
            x = x * (1 + 0.1 * torch.randn_like(x)) * torch.empty(len(x), 1).bernoulli_(0.9)
        return self.head(F.dropout(self.drop(x), 0.1, self.training))


class Offset(nn.Module):
    """A parameter of its own is drawn before all weights."""

    def __init__(self, channels, classes):
        super().__init__()
        self.offset = nn.Parameter(torch.randn(64))
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(x.flatten(1) + self.offset)


class Attention(nn.Module):
    """Attention with dropout inside, a class token, a frozen random projection, unused weights, tied ones."""

    def __init__(self, shape, num_classes, width=8):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.register_buffer("places", torch.randn(1 + shape[1], width), persistent=False)
        self.into = nn.Linear(shape[2], width)
        self.frozen = nn.Parameter(torch.randn(width, width), requires_grad=False)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.3, batch_first=True)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(width, num_classes)
        self.same = self.head

    def forward(self, x):
        x = self.into(x.flatten(1, 2))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.same(torch.tanh(x[:, 0] @ self.frozen))
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., nn.Module]:
    """Builds a class of `TOYS` as a sweep would."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "toys.py").write_text(TOYS)
    directory = SweepDirectory(folder / "results")

    def build(name: str, **options: object) -> nn.Module:
        ref, _ = resolve_code({"file": str(folder / "toys.py"), "name": name, **options}, "network")
        write_code(directory, [ref])
        load_code(ref, directory.code)
        return build_network(parse_network(str(ref), SHAPE), SHAPE, 10)

    return build


OWN = ["Plain", "Norm", "Drop", "Attention"]


@pytest.mark.parametrize(("text", "shape"), SHIPPED)
def test_a_network_that_ships_keeps_the_contract(text: str, shape: tuple[int, int, int]) -> None:
    spec = parse_network(text, shape)
    network = build_network(spec, shape, 7)
    assert list(faults(network, shape, 7)) == []
    assert measure(network, shape) == measure_of(spec, shape, 7)


@pytest.mark.parametrize("name", OWN)
def test_an_own_network_keeps_the_contract(own: Callable[..., nn.Module], name: str) -> None:
    network = own(name)
    assert list(faults(network, SHAPE, 10)) == []
    params = draw_networks(network, "xavier", 1.0, [1, 2, 3], device=CPU, dtype=torch.float64)
    images = torch.randn(5, *SHAPE, dtype=torch.float64)
    assert forward_networks(network, params, images, "loop").shape == (3, 5, 10)


def test_what_a_network_is_was_seen_when_it_was_built(own: Callable[..., nn.Module]) -> None:
    seen = {name: traits_of(own(name)) for name in OWN}
    assert {name: (t.moves, t.draws, t.mixes, t.differs, t.head) for name, t in seen.items() if t} == {
        "Plain": (False, False, False, False, "head"),
        "Norm": (True, False, True, False, "head"),
        "Drop": (False, True, False, False, "head"),
        "Attention": (False, True, False, True, "head"),
    }


def test_network_i_is_a_function_of_its_seed_with_all_that_it_holds(own: Callable[..., nn.Module]) -> None:
    network = own("Attention")
    torch.manual_seed(3)
    first = draw_networks(network, "xavier", 1.0, [4, 5], device=CPU, dtype=torch.float32)
    torch.manual_seed(9)
    again = draw_networks(network, "xavier", 1.0, [5, 4], device=CPU, dtype=torch.float32)
    assert first.keys() == again.keys() >= {"token", "places", "frozen", "into.weight", DRAWS}
    for name, value in first.items():
        assert torch.equal(value, again[name].flip(0)), name
    for name in ("token", "places", "frozen", "into.weight"):
        assert not torch.equal(first[name][0], first[name][1]), name
    weights, rest = parts(network, first)
    assert rest.keys() == {"places", "frozen", DRAWS} and "attention.in_proj_weight" in weights


def test_what_a_network_draws_itself_does_not_repeat_its_weights(own: Callable[..., nn.Module]) -> None:
    drawn = draw_networks(own("Offset"), "xavier", 1.0, [11, 12, 13], device=CPU, dtype=torch.float32)
    for offset, weights in zip(drawn["offset"], drawn["head.weight"], strict=True):
        both = torch.stack([offset, weights.flatten()[:64]])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.6


# ------------------------------------------------------------------------------ trained as by torch


def trained_by_torch(
    network: nn.Module, params: dict[str, Tensor], k: int, images: Tensor, labels: Tensor, rates: list[float]
) -> nn.Module:
    """Network k, trained in place as anybody would."""
    traits = traits_of(network)
    assert traits is not None
    module = traits.make(0).double()
    own = {name: value[k] for name, value in params.items() if name != DRAWS}
    module.load_state_dict(own, strict=False)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    module.train()
    for t, rate in enumerate(rates):
        optimizer.zero_grad()
        F.cross_entropy(module(images[t % 2]), labels[t % 2]).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return module.eval()


def problem(network: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor, list[float]]:
    params = draw_networks(network, "xavier", 1.0, [1, 2], device=CPU, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 6, *SHAPE, generator=generator, dtype=torch.float64)
    return params, images, torch.randint(10, (2, 6), generator=generator), [0.1, 0.2, 0.05, 0.1]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_is_trained_and_tested_as_in_torch(
    own: Callable[..., nn.Module], momentum: float | None
) -> None:
    network = own("Norm", momentum=momentum)
    params, images, labels, rates = problem(network)
    before = {name: value.clone() for name, value in params.items()}
    loop, distilled = InnerLoop(), LabelledImages(images, labels)
    start = TrainState.start(network, params, loop.optimizer)
    trained = train_networks(network, start, distilled, rates, "loop", loop).params
    assert all(torch.equal(params[name], before[name]) for name in params)
    test = torch.randn(9, *SHAPE, dtype=torch.float64)
    found = forward_networks(network, trained, test, "loop")
    for k in range(2):
        module = trained_by_torch(network, params, k, images, labels, rates)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(trained[name][k], value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[k], module(test), rtol=1e-9, atol=1e-10)
    alone = forward_networks(network, trained, test[:1], "loop")  # in a test images do not mix
    torch.testing.assert_close(alone, found[:, :1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OWN)
def test_training_in_two_halves_is_training_in_one(own: Callable[..., nn.Module], name: str) -> None:
    network = own(name)
    params, images, labels, rates = problem(network)
    loop = InnerLoop(InnerOptimizer("momentum", 0.9))
    start, distilled = TrainState.start(network, params, loop.optimizer), LabelledImages(images, labels)
    whole = train_networks(network, start, distilled, rates, "loop", loop).params
    torch.rand(3)
    half = train_networks(network, start, distilled, rates[:2], "loop", loop)
    rest = train_networks(network, half, distilled, rates[2:], "loop", loop).params
    assert whole.keys() == rest.keys() == params.keys()
    assert all(torch.equal(whole[key], rest[key]) for key in whole)


def test_draws_are_those_of_seed_and_step(own: Callable[..., nn.Module]) -> None:
    network = own("Drop")
    params, images, labels, _ = problem(network)
    math, rest = Autograd(network, "loop"), parts(network, params)[1]

    def gradient(step: int, seeds: list[int]) -> Tensor:
        here = rest_at({**rest, DRAWS: torch.tensor(seeds)}, step)
        return math.gradient({**params, **here}, images[0], labels[0], False)[0]["head.weight"]

    first = gradient(0, [1, 2])
    assert torch.equal(first, gradient(0, [1, 2]))
    assert torch.equal(first[1], gradient(0, [7, 2])[1]) and not torch.equal(first[0], gradient(0, [7, 2])[0])
    assert not torch.equal(first, gradient(1, [1, 2]))
    quiet = forward_networks(network, params, images[0], "loop")
    assert torch.equal(quiet, forward_networks(network, params, images[0], "loop"))


# ---------------------------------------------------------------------------------- outer gradient


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("mode", ["store", "recompute"])
def test_the_outer_gradient_is_the_measured_slope(
    own: Callable[..., nn.Module], name: str, mode: str
) -> None:
    """Of the loss of a `judge` pass after T `train` steps, with norms, dropout and attention; in float64."""
    network = own(name)
    params, images, labels, _ = problem(network)
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(4, generator=generator, dtype=torch.float64) - 2
    pixels = torch.randn(12, *SHAPE, generator=generator, dtype=torch.float64)
    real = LabelledImages(pixels, torch.arange(12) % 10)
    plan = ExecutionPlan(memory_mode=mode, inner_batching="loop", segment=3, real_chunk=2**31)
    found = outer_gradient(network, params, LabelledImages(images, labels), raw, real, plan)
    along = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    by_rates = torch.randn(raw.shape, generator=generator, dtype=torch.float64)

    def losses(step: float) -> Tensor:
        moved = LabelledImages(images + step * along, labels)
        return outer_gradient(network, params, moved, raw + step * by_rates, real, plan).losses

    measured = (losses(1e-6) - losses(-1e-6)) / 2e-6
    computed = (found.images * along).flatten(1).sum(1) + (found.raw_rates * by_rates).sum(1)
    torch.testing.assert_close(computed, measured, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("name", OWN)
def test_networks_side_by_side_do_not_mix(own: Callable[..., nn.Module], name: str) -> None:
    network = own(name)
    params, images, labels, _ = problem(network)
    raw, real = torch.full((4,), -2.0, dtype=torch.float64), LabelledImages(images[0], labels[0])
    plan, distilled = ExecutionPlan(inner_batching="loop"), LabelledImages(images, labels)
    both = outer_gradient(network, params, distilled, raw, real, plan)
    teams = outer_gradient(network, params, distilled, raw, real, replace(plan, teams=2, threads=2))
    for k in range(2):
        alone = {key: value[[k]] for key, value in params.items()}
        found = outer_gradient(network, alone, distilled, raw, real, plan)
        assert torch.equal(found.images[0], both.images[k]) and torch.equal(found.losses[0], both.losses[k])
        torch.testing.assert_close(teams.images[k], both.images[k], rtol=1e-9, atol=1e-12)


def test_a_plan_never_divides_a_batch_that_a_network_mixes(own: Callable[..., nn.Module]) -> None:
    mixed, plain = (choose_plan(CPU, 1, own(name)) for name in ("Norm", "Plain"))
    assert mixed.real_chunk > 10**6 and mixed.whole_batches and plain.real_chunk == 128
    plan: ExecutionPlan | None = mixed
    while plan is not None:
        assert plan.real_chunk == mixed.real_chunk
        plan = more_frugal(plan, 2, 4, 1024)
    smaller = more_frugal(more_frugal(plain, 2, 4, 1024) or plain, 2, 4, 1024)
    assert smaller is not None and smaller.real_chunk == 64


def test_a_test_pass_gives_the_same_in_pieces(own: Callable[..., nn.Module]) -> None:
    network = own("Norm")
    params = draw_networks(network, "xavier", 1.0, [1, 2], device=CPU, dtype=torch.float64)
    pixels = torch.randint(256, (20, *SHAPE), dtype=torch.uint8)
    test = RealSet(pixels, torch.arange(20) % 10, (0.5,), (0.5,))
    found = [
        count_right(network, params, test, plan)[1]
        for plan in (choose_plan(CPU, 1, network), ExecutionPlan(real_batching="loop", test_chunk=7))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------- measuring


def test_what_is_stored_of_networks_that_ship_is_what_their_modules_take() -> None:
    table = json.loads(TABLE.read_text())
    assert table["source"] == source_hash(), "the networks have changed: `make measures`"
    assert table["layers"] == {kind: layers_text(kind) for kind in NETWORKS}
    for text, shape, classes in (
        *(("lenet", (3, 32, 32), 7), ("alexcifarnet", (1, 32, 32), 3), ("alexnet", (3, 224, 224), 20)),
        *(
            ("convnet(depth=1,width=5)", (1, 9, 9), 4),
            ("convnet(depth=5,norm=none)", (3, 64, 64), 10),
        ),
        *(("convnet", (3, 96, 96), 200), ("convnet(width=128)", (1, 28, 28), 10)),
    ):
        spec = parse_network(text, shape)
        assert is_measured(spec, shape, classes)
        assert measure_of(spec, shape, classes) == measure(build_network(spec, shape, classes), shape), text


def test_a_networks_measure_is_that_of_the_module(own: Callable[..., nn.Module]) -> None:
    found = measure(own("Norm"), SHAPE)
    assert found.flops == 2 * 36 * 4 * 9 + 2 * 36 * 10
    assert found.outputs == 2 * 4 * 36 + 10
    assert found.parameters == 4 * 9 + 4 + 8 + 36 * 10 + 10
    attention = own("Attention")
    assert measure(attention, SHAPE).parameters == sum(
        value.numel() for value in attention.parameters() if value.requires_grad
    )


def test_a_network_that_was_not_loaded_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "toys.py").write_text(TOYS + "\n# another\n")
    ref, _ = resolve_code({"file": str(tmp_path / "toys.py"), "name": "Plain"}, "network")
    with pytest.raises(UserError, match="it does not run here"):
        build_network(NetworkSpec("own", code=ref), SHAPE, 10)
