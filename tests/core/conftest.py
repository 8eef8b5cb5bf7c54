"""What the tests of the engine share: small random problems, and the digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import parse_network
from ddsweep.core.distill import outer_step
from ddsweep.core.images import LabelledImages
from ddsweep.core.init import draw_networks
from ddsweep.core.methods import bptt
from ddsweep.core.networks import Params, build_network
from ddsweep.core.outer import DistillState
from ddsweep.core.task import Task
from ddsweep.core.unroll import OuterGradient, raw_rates

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One outer gradient to compute: all that its arguments but the plan are made of."""

    network: nn.Module
    params: Params
    images: Tensor
    labels: Tensor
    raw: Tensor
    real_images: Tensor
    real_labels: Tensor

    @property
    def count(self) -> int:
        return next(iter(self.params.values())).shape[0]

    @property
    def distilled(self) -> LabelledImages:
        return LabelledImages(self.images, self.labels)

    @property
    def real(self) -> LabelledImages:
        return LabelledImages(self.real_images, self.real_labels)

    @property
    def arguments(self) -> tuple:
        return self.network, self.params, self.distilled, self.raw, self.real

    def take(self, rows: list[int]) -> Case:
        """The same problem with only the networks ``rows``."""
        own = self.real_images.dim() == 5
        return replace(
            self,
            params={name: value[rows] for name, value in self.params.items()},
            real_images=self.real_images[rows] if own else self.real_images,
            real_labels=self.real_labels[rows] if own else self.real_labels,
        )


def _make_case(
    network: str | nn.Module,
    shape: tuple[int, int, int],
    *,
    count: int = 3,
    real: str = "shared",
    inner_steps: int = 2,
    inner_epochs: int = 2,
    batch: int = 3,
    real_batch: int = 9,
    rate: float = 0.1,
    classes: int = 10,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    if isinstance(network, str):
        network = build_network(parse_network(network, shape), shape, classes)
    generator = torch.Generator().manual_seed(seed)
    lead = (count, real_batch) if real == "per_network" else (real_batch,)
    steps = inner_steps * inner_epochs
    # A different rate in every step: a gradient filed under the wrong step would not go unnoticed.
    spread = torch.linspace(-0.5, 0.5, steps, dtype=torch.float64)
    return Case(
        network=network,
        params=draw_networks(
            network, "xavier", 1.0, [seed + 10 + k for k in range(count)], device=CPU, dtype=dtype
        ),
        images=torch.randn(inner_steps, batch, *shape, generator=generator, dtype=torch.float64).to(dtype),
        labels=torch.randint(classes, (inner_steps, batch), generator=generator),
        raw=(raw_rates(rate, steps) + spread).to(dtype),
        real_images=torch.randn(*lead, *shape, generator=generator, dtype=torch.float64).to(dtype),
        real_labels=torch.randint(classes, lead, generator=generator),
    )


class SmoothNet(nn.Module):
    """Convolution, softplus, average pool, linear: no kinks, so finite differences are nearly exact."""

    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.fc1 = nn.Linear(channels * 4 * 4, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.softplus(self.conv(x)), 2)
        return self.fc2(F.softplus(self.fc1(x.flatten(1))))


def smooth_network(channels: int, hidden: int, classes: int) -> nn.Module:
    with torch.device("meta"):
        return SmoothNet(channels, hidden, classes)


# ---------------------------------------------------------------------------------------- outer steps


def run(task: Task, state: DistillState, steps: int) -> DistillState:
    for _ in range(steps):
        state, _ = outer_step(task, state)
    return state


def assert_states_equal(left: DistillState, right: DistillState) -> None:
    assert left.counters() == right.counters()
    assert left.tensors().keys() == right.tensors().keys()
    for name, value in left.tensors().items():
        assert torch.equal(value, right.tensors()[name]), name


def given_lengths(monkeypatch: pytest.MonkeyPatch, task: Task, lengths: Callable[[int], list[float]]) -> None:
    """Replace the gradient of outer step s: network k's is along pixel k, of length ``lengths(s)[k]``."""
    steps = iter(range(10_000))

    def made(*_: Any, **__: Any) -> OuterGradient:
        given = lengths(next(steps))
        images = torch.zeros(len(given), *task.labels.shape, 1, 8, 8, dtype=torch.float64)
        for k, length in enumerate(given):
            images[k, 0, 0, 0, 0, k] = length
        rates = torch.zeros(len(given), task.spec.steps, dtype=torch.float64)
        return OuterGradient(torch.ones(len(given), dtype=torch.float64), images, rates)

    monkeypatch.setattr(bptt, "outer_gradient", made)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return _make_case


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits: uint8 ``[1797, 1, 8, 8]`` and labels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.tensor(bunch.images * (255 / 16)).round().to(torch.uint8)
    return pixels[:, None], torch.tensor(bunch.target, dtype=torch.int64)
