"""Reads a network that is a chain of common layers as layers whose derivatives are written out.

torch.fx follows an image through the module's own code. If every step of it is one of `ddsweep.core.layers`,
each on the result of the one before, the network is computed by these; for any other network there is nothing
to read, and autograd takes its derivatives. Nothing is assumed of what was read: `ddsweep.core.own_network`
compares values and gradients with the module's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ddsweep.core.layers import (
    AvgPool,
    BiasReLU,
    Conv,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    Linear,
    MaxPool,
    ReLU,
)

__all__ = ["chain_of"]


class _Flatten:
    """A step after which an image is a vector. It needs no layer: `Linear` takes what is before it."""


_Step = Layer | _Flatten | None
"""None is a step that does nothing."""


class _NoChainError(Exception):
    """Something is no step of a chain."""


def chain_of(module: nn.Module) -> tuple[Layer, ...] | None:
    """The layers of ``module``, from images ``[N, c, h, w]`` to logits ``[N, classes]``; None if it is no
    chain of layers that are written out."""
    try:
        traced = fx.symbolic_trace(copy.deepcopy(module))
        return tuple(_merged(list(_checked(_steps(traced)))))
    except Exception:  # a user's code may fail in any way on what torch.fx passes it
        return None


def _steps(traced: fx.GraphModule) -> Iterator[_Step]:
    """The steps of the one way from the images to the logits."""
    (node,) = (node for node in traced.graph.nodes if node.op == "placeholder")
    calls: dict[str, int] = {}
    while True:
        (user,) = (user for user in node.users if not _is_size(user))  # sizes are asked for to flatten it
        if user.op == "output":
            return
        if not user.args or user.args[0] is not node or _others(user, node):
            raise _NoChainError
        node = user
        if node.op == "call_module":
            name = str(node.target)
            calls[name] = calls.get(name, 0) + 1
            if calls[name] > 1 or node.kwargs:
                raise _NoChainError
            yield _of_module(name, traced.get_submodule(name))
        elif node.op in ("call_function", "call_method"):
            yield _of_call(node)
        else:
            raise _NoChainError


def _is_size(node: fx.Node) -> bool:
    asked = node.op == "call_method" and node.target in ("size", "dim")
    return asked or (node.target is getattr and node.args[1:] == ("shape",))


def _others(node: fx.Node, before: fx.Node) -> bool:
    """Whether ``node`` takes values of the network other than ``before``; sizes are none."""

    def is_size(other: fx.Node) -> bool:  # also an entry of a shape
        return _is_size(other) or any(map(_is_size, other.all_input_nodes))

    return not all(map(is_size, set(node.all_input_nodes) - {before}))


def _checked(steps: Iterator[_Step]) -> Iterator[Layer]:
    """The layers of a chain: the first one has weights, only ReLU and linear layers come after the images are
    flat, and the last one is linear."""
    first, flat, last = True, False, None
    for step in steps:
        if step is None:
            continue
        if isinstance(step, _Flatten):
            flat = True
            continue
        if first and not isinstance(step, Conv | Linear):
            raise _NoChainError
        if flat != isinstance(step, Linear) and not isinstance(step, ReLU):
            raise _NoChainError
        first, last = False, step
        yield step
    if not isinstance(last, Linear):
        raise _NoChainError


def _merged(layers: list[Layer]) -> Iterator[Layer]:
    """``layers``, with bias and ReLU of a convolution after its max-pool: they commute, and are a quarter of
    the work there."""
    while layers:
        match layers[:3]:
            case [Conv(bias=True) as conv, MaxPool(), ReLU()] | [Conv(bias=True) as conv, ReLU(), MaxPool()]:
                yield from (Conv(conv.name, conv.padding, bias=False), MaxPool(), BiasReLU(conv.name))
                layers = layers[3:]
            case _:
                yield layers.pop(0)


# ---------------------------------------------------------------------------------------- one step


def _of_module(name: str, layer: nn.Module) -> _Step:
    """The step of a layer of torch; a subclass may do anything."""
    reader = _MODULES.get(type(layer))
    if reader is None or layer._forward_hooks or layer._forward_pre_hooks:
        raise _NoChainError
    return reader(name, layer)


def _need(*conditions: bool) -> None:
    if not all(conditions):
        raise _NoChainError


def _both(value: Any) -> Any:
    """One number for height and width."""
    if isinstance(value, list | tuple):
        _need(len(set(value)) == 1)
        return value[0]
    return value


def _conv(name: str, layer: Any) -> Layer:
    size, padding = _both(layer.kernel_size), layer.padding
    _need(_both(layer.stride) == 1, _both(layer.dilation) == 1, layer.groups == 1)
    _need(layer.padding_mode == "zeros")
    if isinstance(padding, str):
        _need(padding == "valid" or size % 2 == 1)
        padding = size // 2 if padding == "same" else 0
    return Conv(name, _both(padding), bias=layer.bias is not None)


def _instance_norm(name: str, layer: Any) -> Layer:
    _need(not layer.track_running_stats)
    return GroupNorm(name, None, layer.affine, layer.eps)


def _group_norm(name: str, layer: Any) -> Layer:
    groups = None if layer.num_groups == layer.num_channels else layer.num_groups
    return GroupNorm(name, groups, layer.affine, layer.eps)


def _pool(kind: Callable[[], Layer], given: Mapping[str, Any]) -> Layer:
    """A 2x2 pool with these arguments; others than those named here change it."""
    plain = {
        "padding": 0,
        "dilation": 1,
        "ceil_mode": False,
        "return_indices": False,
        "divisor_override": None,
    }
    _need(_both(given["kernel_size"]) == 2, _both(given.get("stride") or 2) == 2)
    _need(*(_both(given.get(key, value)) == value for key, value in plain.items()))
    return kind()


def _global_pool(size: Any) -> Layer:
    _need(_both(size) == 1)
    return GlobalAvgPool()


def _flatten(start: int, end: int) -> _Step:
    _need(start == 1, end == -1)
    return _Flatten()


_MODULES: dict[type[nn.Module], Callable[[str, Any], _Step]] = {
    nn.Conv2d: _conv,
    nn.Linear: lambda name, layer: Linear(name, layer.bias is not None),
    nn.ReLU: lambda name, layer: ReLU(),
    nn.MaxPool2d: lambda name, layer: _pool(MaxPool, vars(layer)),
    nn.AvgPool2d: lambda name, layer: _pool(AvgPool, vars(layer)),
    nn.AdaptiveAvgPool2d: lambda name, layer: _global_pool(layer.output_size),
    nn.InstanceNorm2d: _instance_norm,
    nn.GroupNorm: _group_norm,
    nn.Flatten: lambda name, layer: _flatten(layer.start_dim, layer.end_dim),
    nn.Identity: lambda name, layer: None,
}


def _of_call(node: fx.Node) -> _Step:
    """The step of a function, or of a method of a tensor."""
    if node.target in (F.relu, torch.relu, "relu"):
        return ReLU()
    if node.target in (torch.flatten, "flatten"):
        given = _named("input start_dim end_dim", node)
        return _flatten(given.get("start_dim", 0), given.get("end_dim", -1))
    if node.target in ("view", "reshape"):
        _need(len(node.args) == 3)  # that it keeps the images apart shows when values are compared
        return _Flatten()
    if node.target is F.adaptive_avg_pool2d:
        return _global_pool(_named("input output_size", node)["output_size"])
    if node.target is F.max_pool2d:
        names = "input kernel_size stride padding dilation ceil_mode return_indices"
        return _pool(MaxPool, _named(names, node))
    if node.target is F.avg_pool2d:
        names = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
        return _pool(AvgPool, _named(names, node))
    raise _NoChainError


def _named(names: str, node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name; ``names`` are those by place."""
    return {**dict(zip(names.split(), node.args, strict=False)), **node.kwargs}
