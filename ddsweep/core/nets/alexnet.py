"""AlexNet for 224 pixels, with the names of the weights that torchvision has."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.catalog import NetworkSpec

__all__ = ["AlexNet", "build"]


class AlexNet(nn.Module):
    """Five convolutions and three linear layers for 224 px, laid out and named as torchvision's, without its
    dropout and its adaptive pooling (at 224 px the feature map is 6x6 already)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        # The places of dropout stay empty, so that names match torchvision's weights.
        linear = {
            "1": nn.Linear(256 * 6 * 6, 4096),
            "4": nn.Linear(4096, 4096),
            "6": nn.Linear(4096, classes),
        }
        self.classifier = nn.ModuleDict(linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        x = F.relu(self.classifier["1"](x))
        logits: Tensor = self.classifier["6"](F.relu(self.classifier["4"](x)))
        return logits


def build(spec: NetworkSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    return AlexNet(shape[0], classes)
