"""LeNet as in Wang et al. 2018; its derivatives are written out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import NetworkSpec
from ddsweep.core.layers import BiasReLU, Conv, Linear, MaxPool, ReLU

__all__ = ["LeNet", "build"]


class LeNet(nn.Module):
    """Two 5x5 convolutions (6, 16), each with ReLU and 2x2 max-pool, then 120-84-classes."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2 if side == 28 else 0)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        self.layers = (
            *(Conv("conv1", 2 if side == 28 else 0, bias=False), MaxPool(), BiasReLU("conv1")),
            *(Conv("conv2", 0, bias=False), MaxPool(), BiasReLU("conv2")),
            *(Linear("fc1"), ReLU(), Linear("fc2"), ReLU(), Linear("fc3")),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


def build(spec: NetworkSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    return LeNet(shape[0], shape[1], classes)
