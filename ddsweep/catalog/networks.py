"""Networks by name: the sizes they take, their layers, and the laws of their first weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ddsweep.catalog.own_code import CodeRef, is_code, parse_code
from ddsweep.errors import SettingError

__all__ = [
    "INIT_LAWS",
    "NETWORKS",
    "NORMS",
    "NetworkSpec",
    "forward_flops",
    "layer_shapes",
    "parameter_count",
    "parameter_shapes",
    "parse_network",
]


INIT_LAWS = ("xavier", "xavier_uniform", "kaiming", "kaiming_out", "orthogonal", "normal", "default")
NETWORKS = ("lenet", "alexcifarnet", "convnet", "alexnet")
NORMS = ("none", "instance")


@dataclass(frozen=True)
class NetworkSpec:
    """One architecture. ``depth``, ``width`` and ``norm`` are parameters of ``convnet`` only; ``code`` is
    what a network of a user's ``own`` has."""

    kind: str
    depth: int = 0
    width: int = 0
    norm: str = ""
    code: CodeRef | None = None

    def __str__(self) -> str:
        if self.code is not None:
            return str(self.code)
        if self.kind != "convnet":
            return self.kind
        return f"convnet(depth={self.depth},width={self.width},norm={self.norm})"


_NETWORK = re.compile(r"^\s*([a-z0-9_]+)\s*(?:\(([^()]*)\))?\s*$")


def parse_network(text: str, shape: tuple[int, int, int]) -> NetworkSpec:
    """The `NetworkSpec` named by ``text`` for images of ``shape`` (channels, height, width).

    ``lenet``, ``alexcifarnet``, ``alexnet``, ``convnet`` or ``convnet(depth=3,width=128,norm=instance)``. A
    convnet's defaults are depth 2 up to 16 pixels and 3 beyond, width 128, instance norm (Zhao et al. 2021).
    Raises `SettingError` for an unknown name or parameter, and for a size that the network cannot take. Text
    of a user's own code (`CodeRef`) is a network whose sizes show when it is built.
    """
    if is_code(text):
        return NetworkSpec("own", code=parse_code(text, "network"))
    match = _NETWORK.match(text)
    kind = match.group(1) if match else text
    if match is None or kind not in NETWORKS:
        raise SettingError(
            f"network: unknown network {text!r}; known are {', '.join(NETWORKS)} "
            "(convnet also as convnet(depth=3,width=128,norm=instance))"
        )
    height = shape[1]
    given = _network_parameters(text, kind, match.group(2))
    if kind == "convnet":
        spec = NetworkSpec(
            "convnet",
            depth=int(given.get("depth", 2 if height <= 16 else 3)),
            width=int(given.get("width", 128)),
            norm=str(given.get("norm", "instance")),
        )
    else:
        spec = NetworkSpec(kind)
    _check_size(spec, shape)
    return spec


def _network_parameters(text: str, kind: str, inside: str | None) -> dict[str, str | int]:
    given: dict[str, str | int] = {}
    for item in filter(None, (part.strip() for part in (inside or "").split(","))):
        key, _, value = (piece.strip() for piece in item.partition("="))
        if kind != "convnet" or key not in ("depth", "width", "norm"):
            allowed = "depth, width, norm" if kind == "convnet" else "no parameters"
            raise SettingError(f"network: {text!r}: unknown parameter {key!r}; {kind} takes {allowed}")
        if key == "norm":
            if value not in NORMS:
                raise SettingError(f"network: {text!r}: norm is one of {', '.join(NORMS)}")
            given[key] = value
        elif value.isdecimal() and 1 <= int(value) <= 4096:
            given[key] = int(value)
        else:
            raise SettingError(f"network: {text!r}: {key} must be a whole number of at least 1")
    return given


def _check_size(spec: NetworkSpec, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    here = f"images of {channels}x{height}x{width}"
    if height != width:
        raise SettingError(f"network: {spec} takes square images, not {here}")
    if spec.kind == "lenet" and height not in (28, 32):
        raise SettingError(f"network: lenet takes images of 28 or 32 pixels, not {here}")
    if spec.kind == "alexcifarnet" and height != 32:
        raise SettingError(f"network: alexcifarnet takes images of 32 pixels, not {here}")
    if spec.kind == "alexnet" and height != 224:
        raise SettingError(f"network: alexnet takes images of 224 pixels, not {here}")
    if spec.kind == "convnet":
        last = height >> (spec.depth - 1)
        smallest = 2 if spec.norm == "instance" else 1
        if last < smallest or height >> spec.depth < 1:
            raise SettingError(f"network: {spec} halves the image {spec.depth} times, too often for {here}")


def layer_shapes(
    network: NetworkSpec, shape: tuple[int, int, int], classes: int
) -> list[tuple[str, int, int, int, int]]:
    """The layers with weights, as (kind, inputs, outputs, kernel, output side); side 1 for linear."""
    channels, side, _ = shape
    if network.kind == "lenet":
        first = side if side == 28 else side - 4
        second = first // 2 - 4
        return [
            ("conv", channels, 6, 5, first),
            ("conv", 6, 16, 5, second),
            ("linear", 16 * (second // 2) ** 2, 120, 1, 1),
            ("linear", 120, 84, 1, 1),
            ("linear", 84, classes, 1, 1),
        ]
    if network.kind == "alexcifarnet":
        return [
            ("conv", channels, 64, 5, 32),
            ("conv", 64, 64, 5, 16),
            ("linear", 64 * 8 * 8, 384, 1, 1),
            ("linear", 384, 192, 1, 1),
            ("linear", 192, classes, 1, 1),
        ]
    if network.kind == "alexnet":
        return [
            ("conv", channels, 64, 11, 55),
            ("conv", 64, 192, 5, 27),
            ("conv", 192, 384, 3, 13),
            ("conv", 384, 256, 3, 13),
            ("conv", 256, 256, 3, 13),
            ("linear", 256 * 6 * 6, 4096, 1, 1),
            ("linear", 4096, 4096, 1, 1),
            ("linear", 4096, classes, 1, 1),
        ]
    layers: list[tuple[str, int, int, int, int]] = []
    inputs = channels
    for _ in range(network.depth):
        layers.append(("conv", inputs, network.width, 3, side))
        if network.norm == "instance":
            layers.append(("norm", network.width, network.width, 1, side))
        inputs, side = network.width, side // 2
    layers.append(("linear", inputs * side * side, classes, 1, 1))
    return layers


def parameter_shapes(
    network: NetworkSpec, shape: tuple[int, int, int], classes: int
) -> list[tuple[str, int, int, int]]:
    """The layers with weights without the size of their images: they are equal if weights can be
    exchanged."""
    return [layer[:4] for layer in layer_shapes(network, shape, classes)]


def parameter_count(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> int:
    """Number of trainable parameters (weights and biases)."""
    total = 0
    for kind, inputs, outputs, kernel, _ in layer_shapes(network, shape, classes):
        total += 2 * outputs if kind == "norm" else outputs * inputs * kernel**2 + outputs
    return total


def forward_flops(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> int:
    """FLOPs of one forward pass of one image: two per multiply-add of convolutions and linear layers."""
    return sum(
        2 * inputs * outputs * kernel**2 * side**2
        for kind, inputs, outputs, kernel, side in layer_shapes(network, shape, classes)
        if kind != "norm"
    )
