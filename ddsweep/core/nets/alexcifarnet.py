"""AlexCifarNet as in Wang et al. 2018, for 32 pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import NetworkSpec

__all__ = ["AlexCifarNet", "build", "local_response_norm"]


def local_response_norm(x: Tensor) -> Tensor:
    """LRN over channels with size 4, alpha .001/9, beta .75, k 1, as ``F.local_response_norm``.

    ``x [..., C, H, W]``. Written as a sum of four shifted slices: then it costs the same under vmap and in
    its second derivative.
    """
    size, alpha, beta, k = 4, 0.001 / 9.0, 0.75, 1.0
    channels = x.shape[-3]
    padded = F.pad(x * x, (0, 0, 0, 0, size // 2, (size - 1) // 2))
    total = padded.narrow(-3, 0, channels)
    for shift in range(1, size):
        total = total + padded.narrow(-3, shift, channels)
    return x / (k + alpha * total / size) ** beta


class AlexCifarNet(nn.Module):
    """Two 5x5 convolutions (64, 64) with ReLU, 3x3/2 max-pool and LRN, then 384-192-classes; 32 px."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * 8 * 8, 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = local_response_norm(F.max_pool2d(F.relu(self.conv1(x)), 3, 2, 1))
        x = F.max_pool2d(local_response_norm(F.relu(self.conv2(x))), 3, 2, 1)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


def build(spec: NetworkSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    return AlexCifarNet(shape[0], classes)
