"""The networks that come with ddsweep. One module each, behind one contract.

``build(spec, shape, classes)`` makes the module for images of ``shape`` (channels, height, width), inside a
context of the meta device: it takes ``[N, c, h, w]`` and gives logits ``[N, classes]``. The name, the options
and the sizes that a network takes are in `ddsweep.catalog.networks`. A module may have ``layers``: the same
network as layers with their derivatives written out (`ddsweep.core.layers`). After a change here, run `make
measures`: `plan` estimates with these numbers. `tests/core/test_network_contract.py` checks all of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ddsweep.catalog import NetworkSpec
from ddsweep.core.nets import alexcifarnet, alexnet, convnet, lenet

__all__ = ["BUILDERS"]

BUILDERS: dict[str, Callable[[NetworkSpec, tuple[int, int, int], int], nn.Module]] = {
    "lenet": lenet.build,
    "alexcifarnet": alexcifarnet.build,
    "alexnet": alexnet.build,
    "convnet": convnet.build,
}
