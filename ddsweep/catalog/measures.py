"""The measure of one pass of one image through a network: costs, memory and plans follow from it.

Of the networks that ship it was measured on the modules, and is kept in ``measures.json`` (`make measures`
writes it). `ddsweep.measuring` adds the measures of users' own networks, and of sizes that are not in that
file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ddsweep.catalog.networks import NetworkSpec
from ddsweep.errors import UserError

__all__ = ["MONOMIALS", "TABLE", "Measure", "is_measured", "layers_of", "measure_of", "monomials", "remember"]

TABLE = Path(__file__).with_name("measures.json")

MONOMIALS = ("1", "c", "n", "cn", "w", "cw", "wn", "ww")
"""Of channels c, classes n and width w."""


@dataclass(frozen=True)
class Measure:
    """For one image: ``flops`` of a forward pass (two for a multiply-add of convolutions and matrix
    products), numbers in the ``outputs`` of all layers that have weights; and ``parameters`` of the
    network. ``written_out``: its derivatives are (`ddsweep.core.layers`), and not autograd's."""

    flops: int
    outputs: int
    parameters: int
    written_out: bool


_Key = tuple[NetworkSpec, tuple[int, int, int], int]

_known: dict[_Key, Measure] = {}
"""The measures that this process was told. It holds only facts."""


def monomials(channels: int, width: int, classes: int) -> list[int]:
    c, w, n = channels, width, classes
    return [1, c, n, c * n, w, c * w, w * n, w * w]


def row_of(network: NetworkSpec, side: int) -> str:
    """The row of a network that ships, whatever its width, for images of ``side`` pixels."""
    structure = f"/{network.depth}/{network.norm}" if network.kind == "convnet" else ""
    return f"{network.kind}{structure}/{side}"


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return found


def layers_of(kind: str) -> str:
    """The layers of a network that ships, in words."""
    return str(_table()["layers"][kind])


def remember(network: NetworkSpec, shape: tuple[int, int, int], classes: int, found: Measure) -> None:
    _known[network, shape, classes] = found


def is_measured(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> bool:
    return (network, shape, classes) in _known or row_of(network, shape[1]) in _table()["measures"]


def measure_of(network: NetworkSpec, shape: tuple[int, int, int], classes: int) -> Measure:
    """Raises `UserError` for a network, or a size, that was not measured."""
    if (found := _known.get((network, shape, classes))) is not None:
        return found
    row = _table()["measures"].get(row_of(network, shape[1]))
    if row is None:
        raise UserError(f"network: {network}: not measured here; `ddsweep plan` of its sweep does that")
    values = dict(zip(MONOMIALS, monomials(shape[0], network.width, classes), strict=True))
    terms = {name: sum(values[key] * factor for key, factor in row[name].items()) for name in row}
    return Measure(**terms | {"written_out": bool(terms["written_out"])})
