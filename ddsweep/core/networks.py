"""Networks by name, and how K of them are computed at once.

A network is a module without state of its own plus a mapping of parameter names to tensors. A batch
of K networks is the same mapping with a leading axis K (``params[name]`` is ``[K, ...]``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ddsweep.catalog import NetworkSpec
from ddsweep.core.layers import Params
from ddsweep.core.nets import BUILDERS
from ddsweep.core.own_network import Kind, forward_own, own_network, traits_of

__all__ = ["Params", "build_network", "forward_networks", "stack_networks"]


def build_network(spec: NetworkSpec, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The module for images of ``shape`` (c, h, w), on the meta device: it holds no weights.

    `ddsweep.core.init.draw_network` draws weights for it. A user's own is on the CPU, as it was made.
    """
    if spec.code is not None:
        return own_network(spec.code, shape, classes)
    with torch.device("meta"):
        return BUILDERS[spec.kind](spec, shape, classes)


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
