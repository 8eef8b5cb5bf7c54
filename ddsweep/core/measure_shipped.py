"""Measures the networks that ship, and writes ``catalog/measures.json`` (`make measures`).

For a network, its structure and a side of its images, each quantity is a polynomial in channels, width and
classes, which a few measurements determine; others check it.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddsweep.catalog import NORMS, NetworkSpec, parse_network
from ddsweep.catalog.measures import MONOMIALS, TABLE, monomials, row_of
from ddsweep.core import nets
from ddsweep.core.measure import measure
from ddsweep.core.networks import build_network
from ddsweep.errors import SettingError

__all__ = ["layers_text", "rows", "source_hash"]

SIDES = (*range(4, 65), *range(72, 257, 8))
DEPTHS = range(1, 6)
_POINTS = [(c, w, n) for c, w, n in itertools.product((1, 3), (2, 3, 7), (2, 5))]
_CHECKS = [(3, 12, 11)]


def source_hash() -> str:
    """Over the code of the networks, without comments and docstrings: another hash asks for another table."""
    found = hashlib.sha256()
    for path in sorted(Path(nets.__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:]
        found.update(ast.dump(tree).encode())
    return found.hexdigest()[:16]


def specs() -> Iterator[tuple[NetworkSpec, int]]:
    """Every structure that ships, with each side that it takes."""
    texts = ["lenet", "alexcifarnet", "alexnet"]
    texts += [f"convnet(depth={depth},width=1,norm={norm})" for depth in DEPTHS for norm in NORMS]
    for text, side in itertools.product(texts, SIDES):
        with suppress(SettingError):
            yield parse_network(text, (1, side, side)), side


def fitted(spec: NetworkSpec, side: int) -> dict[str, dict[str, int]]:
    """The coefficients of `Measure` of ``spec`` for images of ``side`` pixels, by quantity and monomial.
    Raises ``ValueError`` for a network that is no such polynomial."""
    points = [*_POINTS, *_CHECKS]
    if not spec.width:
        points = list(dict.fromkeys((c, 0, n) for c, _, n in points))
    found = [vars(_measured(spec, side, *point)) for point in points]
    matrix = torch.tensor([monomials(*point) for point in points], dtype=torch.float64)
    out = {}
    for name in found[0]:
        wanted = torch.tensor([row[name] for row in found], dtype=torch.float64)
        solved = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0].round()
        if not torch.equal(matrix @ solved, wanted):
            raise ValueError(f"{spec} at {side} pixels: {name} is no polynomial of {', '.join(MONOMIALS)}")
        out[name] = {key: int(value) for key, value in zip(MONOMIALS, solved.tolist(), strict=True) if value}
    return out


def _measured(spec: NetworkSpec, side: int, channels: int, width: int, classes: int) -> Any:
    own = NetworkSpec(spec.kind, spec.depth, width, spec.norm) if spec.width else spec
    shape = (channels, side, side)
    return measure(build_network(own, shape, classes), shape)


def layers_text(kind: str) -> str:
    """The layers of a network with its usual options, for ten classes: ``conv 6 (5x5), linear 120``."""
    side = next(side for spec, side in specs() if spec.kind == kind and side in (32, 224))
    shape = (3, side, side)
    words = []
    for layer in build_network(parse_network(kind, shape), shape, 10).modules():
        if isinstance(layer, nn.Conv2d):
            words.append(f"conv {layer.out_channels} ({'x'.join(map(str, layer.kernel_size))})")
        elif isinstance(layer, nn.Linear):
            words.append(f"linear {layer.out_features}")
    return ", ".join(words)


def rows() -> dict[str, Any]:
    """What the file holds."""
    kinds = dict.fromkeys(spec.kind for spec, _ in specs())
    return {
        "source": source_hash(),
        "layers": {kind: layers_text(kind) for kind in kinds},
        "measures": {row_of(spec, side): fitted(spec, side) for spec, side in specs()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = rows()
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.pop("measures").items()]
    head = json.dumps(parts, indent=1).removesuffix("\n}")
    TABLE.write_text(head + ',\n "measures": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    print(f"{TABLE}: {len(lines)} rows")
