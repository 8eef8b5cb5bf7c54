"""Initial weights: network i is a pure function of (network, law, i), drawn on the CPU in float32.

Each network is drawn by itself, with its own generator. So it is the same network in every batch, on every
device and in every precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddsweep.catalog import INIT_LAWS
from ddsweep.core.networks import Params, stack_networks
from ddsweep.core.own_network import initial_rest, traits_of

__all__ = ["draw_network", "draw_networks", "draw_state"]


def draw_network(network: nn.Module, law: str, param: float, seed: int) -> Params:
    """Fresh weights ``name -> [...]`` (CPU, float32) for ``network`` under ``law``.

    The laws of Wang et al. 2018, with p = ``param`` (1 there): ``xavier`` normal with gain p,
    ``xavier_uniform``, ``kaiming`` and ``kaiming_out`` normal with fan in or out and negative slope p,
    ``orthogonal`` with gain p, ``normal`` (0, p); biases are 0. ``default`` is torch's own law, biases
    included. Norm layers start as the identity.

    A law holds for the ``weight`` and ``bias`` of layers. Other parameters (a class token, a scale, the slope
    of a PReLU) are copied from ``network``. A parameter that several layers share is drawn once. Raises
    ``ValueError`` for an unknown law, and for a parameter that is to be copied from a network on the meta
    device.
    """
    if law not in INIT_LAWS:
        raise ValueError(f"unknown init law {law!r}; laws are {', '.join(INIT_LAWS)}")
    generator = torch.Generator().manual_seed(seed)
    drawn: Params = {}
    for name, parameter in network.named_parameters():
        home, _, kind = name.rpartition(".")
        layer = network.get_submodule(home)
        weight = getattr(layer, "weight", None)
        if kind not in ("weight", "bias") or weight is None or isinstance(layer, nn.PReLU):
            drawn[name] = _copied(name, parameter)
            continue
        value = torch.zeros(parameter.shape)
        if weight.dim() == 1:  # a norm layer
            value.fill_(0.0 if kind == "bias" else 1.0)
        elif kind == "weight":
            _fill_weight(value, law, param, generator)
        elif law == "default":
            bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
            value.uniform_(-bound, bound, generator=generator)
        drawn[name] = value
    return drawn


def _copied(name: str, parameter: nn.Parameter) -> Tensor:
    if parameter.is_meta:
        raise ValueError(f"{name}: no law for it, and the network is on the meta device: it has no values")
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _fill_weight(weight: Tensor, law: str, param: float, generator: torch.Generator) -> None:
    if law == "xavier":
        nn.init.xavier_normal_(weight, gain=param, generator=generator)
    elif law == "xavier_uniform":
        nn.init.xavier_uniform_(weight, gain=param, generator=generator)
    elif law == "kaiming":
        nn.init.kaiming_normal_(weight, a=param, mode="fan_in", generator=generator)
    elif law == "kaiming_out":
        nn.init.kaiming_normal_(weight, a=param, mode="fan_out", generator=generator)
    elif law == "orthogonal":
        nn.init.orthogonal_(weight, gain=param, generator=generator)
    elif law == "normal":
        nn.init.normal_(weight, 0.0, param, generator=generator)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def draw_state(network: nn.Module, law: str, param: float, seed: int) -> Params:
    """The start of network ``seed``: the weights of `draw_network` and, for a user's own network, its other
    values (`ddsweep.core.own_network`)."""
    traits = traits_of(network)
    if traits is None:
        return draw_network(network, law, param, seed)
    source, rest = initial_rest(network, seed)
    drawn = draw_network(source, law, param, seed)
    return {**{name: drawn[name] for name in traits.trained}, **rest}


def draw_networks(
    network: nn.Module,
    law: str,
    param: float,
    seeds: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Params:
    """K networks ``name -> [K, ...]`` on ``device``, network k from ``seeds[k]`` (`draw_state`)."""
    stacked = stack_networks([draw_state(network, law, param, seed) for seed in seeds])
    return {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        for name, value in stacked.items()
    }
