"""What the tests of the engine share: small random problems, and the digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from ddsweep.catalog import parse_network
from ddsweep.core.images import LabelledImages
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import Params, build_network
from ddsweep.core.unroll import raw_rates

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
