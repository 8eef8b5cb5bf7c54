"""The measure of one pass of one image through a network: costs, memory and plans follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from ddsweep.catalog.networks import NetworkSpec, forward_flops, layer_shapes, parameter_count
from ddsweep.errors import UserError

__all__ = ["Measure", "is_measured", "measure_of", "remember"]


@dataclass(frozen=True)
class Measure:
    """For one image: ``flops`` of a forward pass (two for a multiply-add of convolutions and matrix
    products), numbers in the ``outputs`` of all layers that have weights; and ``parameters`` of the
    network."""

    flops: int
    outputs: int
    parameters: int


_Key = tuple[NetworkSpec, tuple[int, int, int], int]

_known: dict[_Key, Measure] = {}
"""The measures of users' own networks that this process knows. It holds only facts."""


def remember(network: NetworkSpec, shape: tuple[int, int, int], classes: int, found: Measure) -> None:
    _known[network, shape, classes] = found


def is_measured(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> bool:
    return network.code is None or (network, shape, classes) in _known


def measure_of(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> Measure:
    """Raises `UserError` for a user's own network that was not measured (`ddsweep.measuring`)."""
    if network.code is None:
        outputs = sum(layer[2] * layer[4] ** 2 for layer in layer_shapes(network, shape, classes))
        parameters = parameter_count(network, shape, classes)
        return Measure(forward_flops(network, shape, classes), outputs, parameters)
    found = _known.get((network, shape, classes))
    if found is None:
        raise UserError(f"network: {network}: not measured here; `ddsweep plan` of its sweep does that")
    return found
