"""The networks as plain modules, and computing K of them at once.

A network is a module without state of its own plus a mapping of parameter names to tensors. A batch
of K networks is the same mapping with a leading axis K (``params[name]`` is ``[K, ...]``). A module may
have ``layers``: the same network as layers with their derivatives written out (`ddsweep.core.layers`).

Layers and parameter counts follow Wang et al. 2018 (LeNet, AlexCifarNet) and Zhao et al. 2021 (ConvNet).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from ddsweep.catalog import NetworkSpec
from ddsweep.core.layers import Params, convnet_layers, lenet_layers
from ddsweep.core.own_network import Kind, forward_own, own_network, traits_of

__all__ = ["Params", "build_network", "forward_networks", "stack_networks"]


class LeNet(nn.Module):
    """Two 5x5 convolutions (6, 16), each with ReLU and 2x2 max-pool, then 120-84-classes."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2 if side == 28 else 0)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        self.layers = lenet_layers(side)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


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


class InstanceNorm(nn.Module):
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
            self.norms.append(InstanceNorm(spec.width) if spec.norm == "instance" else nn.Identity())
            channels, side = spec.width, side // 2
        self.fc = nn.Linear(channels * side * side, classes)
        self.layers = convnet_layers(spec.depth, spec.norm)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.avg_pool2d(F.relu(norm(conv(x))), 2)
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def build_network(spec: NetworkSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The module for images of ``shape`` (c, h, w), on the meta device: it holds no weights.

    `ddsweep.core.init.draw_network` draws weights for it. A user's own is on the CPU, as it was made.
    """
    if spec.code is not None:
        return own_network(spec.code, shape, classes)
    channels, side, _ = shape
    with torch.device("meta"):
        if spec.kind == "lenet":
            return LeNet(channels, side, classes)
        if spec.kind == "alexcifarnet":
            return AlexCifarNet(channels, classes)
        if spec.kind == "alexnet":
            return AlexNet(channels, classes)
        return ConvNet(spec, channels, side, classes)


def stack_networks(networks: Sequence[Mapping[str, Tensor]]) -> Params:
    """K mappings ``name -> [...]`` as one ``name -> [K, ...]``."""
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def forward_networks(
    network: nn.Module, params: Params, images: Tensor, batching: str, kind: Kind = "test"
) -> Tensor:
    """Logits ``[K, N, classes]`` of K networks.

    ``images`` is ``[N, c, h, w]`` (all networks see the same) or ``[K, N, c, h, w]``. ``batching`` is
    ``vmap`` (one computation; convolutions become grouped) or ``loop`` (one network after another).
    Both are the same mathematics; which is faster depends on the device and on N. Networks of a user's own go
    one after another, and ``kind`` is that of their pass (`ddsweep.core.own_network`).
    """
    if traits_of(network) is not None:
        return forward_own(network, params, images, kind)[0]
    own = images.dim() == 5
    if batching == "vmap":

        def one(weights: Params, x: Tensor) -> Tensor:
            return functional_call(network, weights, (x,))  # type: ignore[no-any-return]

        return vmap(one, in_dims=(0, 0 if own else None))(params, images)
    count = next(iter(params.values())).shape[0]
    unbound = {name: value.unbind(0) for name, value in params.items()}
    return torch.stack(
        [
            functional_call(
                network,
                {name: values[k] for name, values in unbound.items()},
                (images[k] if own else images,),
            )
            for k in range(count)
        ]
    )
