"""What the tests of this folder run on, and the small problems that they solve on it and on the CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ddsweep.catalog import parse_network
from ddsweep.core.images import LabelledImages
from ddsweep.core.init import draw_networks
from ddsweep.core.networks import build_network
from ddsweep.core.unroll import raw_rates
from tests.gpu import pretended

CPU = torch.device("cpu")
PRETENDED = os.environ.get("DDSWEEP_TEST_DEVICE") == pretended.NAME
DEVICE = pretended.register() if PRETENDED else torch.device("cuda")
NETWORKS = [
    ("lenet", (1, 28, 28), 0.1),
    ("alexcifarnet", (3, 32, 32), 0.02),
    ("convnet(width=16)", (1, 8, 8), 0.1),
]


def problem(
    text: str,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    rate: float = 0.1,
    count: int = 3,
    inner_steps: int = 2,
    inner_epochs: int = 2,
    batch: int = 10,
    real_batch: int = 50,
    real: str = "shared",
    dtype: torch.dtype = torch.float64,
) -> tuple:
    """The arguments of ``outer_gradient`` but the plan, drawn on the CPU and moved to ``device``."""
    network = build_network(parse_network(text, shape), shape, 10)
    params = draw_networks(network, "xavier", 1.0, list(range(count)), device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    lead = (count, real_batch) if real == "per_network" else (real_batch,)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, *shape, generator=generator, dtype=torch.float64).to(device, dtype)

    images, real_images = normal(inner_steps, batch), normal(*lead)
    labels = torch.randint(10, (inner_steps, batch), generator=generator).to(device)
    real_labels = torch.randint(10, lead, generator=generator).to(device)
    raw = raw_rates(rate, inner_steps * inner_epochs).to(device, dtype)
    return network, params, LabelledImages(images, labels), raw, LabelledImages(real_images, real_labels)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected).norm() / expected.norm())
