"""ConvNet as in Zhao et al. 2021; its derivatives are written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import NetworkSpec
from ddsweep.core.layers import AvgPool, Conv, GroupNorm, Layer, Linear, ReLU

__all__ = ["ConvNet", "InstanceNorm2d", "build"]


class InstanceNorm2d(nn.Module):
    """Per image and channel: subtract the mean, divide by the deviation, scale and shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((-2, -1), keepdim=True)
        variance = (centred * centred).mean((-2, -1), keepdim=True)
        return centred * (variance + 1e-5).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]


class ConvNet(nn.Module):
    """``depth`` blocks of 3x3 convolution, norm, ReLU and 2x2 average pool, then one linear layer."""

    def __init__(self, spec: NetworkSpec, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(spec.depth):
            self.convs.append(nn.Conv2d(channels, spec.width, 3, padding=1))
            self.norms.append(InstanceNorm2d(spec.width) if spec.norm == "instance" else nn.Identity())
            channels, side = spec.width, side // 2
        self.fc = nn.Linear(channels * side * side, classes)
        layers: list[Layer] = []
        for i in range(spec.depth):
            norm = [GroupNorm(f"norms.{i}")] if spec.norm == "instance" else []
            layers += [Conv(f"convs.{i}", 1), *norm, ReLU(), AvgPool()]
        self.layers = (*layers, Linear("fc"))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.avg_pool2d(F.relu(norm(conv(x))), 2)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def build(spec: NetworkSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    return ConvNet(spec, shape[0], shape[1], classes)
