"""Networks by name: their options, the sizes they take, and the laws of their first weights."""

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
    "parse_network",
    "weights_key",
]


INIT_LAWS = ("xavier", "xavier_uniform", "kaiming", "kaiming_out", "orthogonal", "normal", "default")
NETWORKS = ("lenet", "alexcifarnet", "convnet", "alexnet")
NORMS = ("none", "instance")
_SIDES = {"lenet": (28, 32), "alexcifarnet": (32,), "alexnet": (224,)}
"""The sizes of images that a network takes, where it does not take many."""


@dataclass(frozen=True)
class NetworkSpec:
    """One architecture. ``depth``, ``width`` and ``norm`` are parameters of ``convnet`` only; ``code`` is the
    reference of a user's own network."""

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
            "(convnet also as convnet(depth=3,width=128,norm=instance)); one of your own is "
            "{file: my_nets.py, name: SmallNet}"
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


_WIDEST = 4096


def _network_parameters(text: str, kind: str, inside: str | None) -> dict[str, str | int]:
    given: dict[str, str | int] = {}
    for item in filter(None, (part.strip() for part in (inside or "").split(","))):
        key, _, value = (piece.strip() for piece in item.partition("="))
        if kind != "convnet" or key not in ("depth", "width", "norm"):
            allowed = "depth, width, norm" if kind == "convnet" else "no parameters"
            raise SettingError(f"network: {text!r}: unknown parameter {key!r}; {kind} takes {allowed}")
        if key in given:
            raise SettingError(f"network: {text!r}: {key} is given twice")
        if key == "norm":
            if value not in NORMS:
                raise SettingError(f"network: {text!r}: norm is one of {', '.join(NORMS)}")
            given[key] = value
        elif value.isdecimal() and 1 <= int(value) <= _WIDEST:
            given[key] = int(value)
        else:
            raise SettingError(f"network: {text!r}: {key} must be a whole number of 1 to {_WIDEST}")
    return given


def _check_size(spec: NetworkSpec, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    here = f"images of {channels}x{height}x{width}"
    if height != width:
        raise SettingError(
            f"network: {spec} takes square images, not {here}; `size: N` of a data set of your own makes "
            "them N x N, and a network of your own (docs/networks.md) may take them as they are"
        )
    sides = _SIDES.get(spec.kind, (height,))
    if height not in sides:
        takes = " or ".join(map(str, sides))
        raise SettingError(f"network: {spec.kind} takes images of {takes} pixels, not {here}")
    if spec.kind == "convnet":
        last = height >> (spec.depth - 1)
        smallest = 2 if spec.norm == "instance" else 1
        if last < smallest or height >> spec.depth < 1:
            raise SettingError(f"network: {spec} halves the image {spec.depth} times, too often for {here}")


def weights_key(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> tuple[object, ...]:
    """Equal where the weights of two networks that ship can be exchanged."""
    last = shape[1] >> network.depth if network.kind == "convnet" else 0
    return network, shape[0], last, classes
