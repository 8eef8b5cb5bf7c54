"""A device that is none, so that what runs on a GPU can be run where there is none.

A tensor "on" it is one on the CPU that says it is elsewhere: every operation is done by the CPU and gives the
CPU's numbers, but one that a GPU would refuse is refused, that is one on tensors of two devices or with the
generator of another. Only copies cross over, and numbers (tensors of no dimension). Indices of the CPU are
refused as well, which a GPU would take, but only after a copy that it waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"
_CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def register() -> torch.device:
    """The device, known to torch from now on. Once a process."""
    # Imported here, because a GPU needs none of it, and torch before 2.15 may not have it.
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    # torch.tensor(numbers, device=...) then makes a tensor on the CPU and copies it, which is seen below.
    torch._C._set_only_lift_cpu_tensors(True)
    return torch.device(NAME)


class PretendedDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on the device that was registered."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Elsewhere(Tensor):
    """``here``, a tensor on the CPU, as one on the pretended device."""

    here: Tensor
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> _Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=torch.device(NAME, 0),
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self) -> Any:
        raise TypeError(f"a tensor on the {NAME} device has no array: .cpu() it first")

    def __repr__(self) -> str:
        return f"{NAME}({self.here!r})"


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = _leaves(args, kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    elsewhere = any(isinstance(tensor, _Elsewhere) for tensor in tensors)
    here = any(tensor.dim() > 0 and not isinstance(tensor, _Elsewhere) for tensor in tensors)
    if elsewhere and here and func not in _CROSSING:
        raise RuntimeError(f"{func}: expected all tensors to be on one device")
    device = kwargs.get("device")
    result_elsewhere = elsewhere if device is None else torch.device(device).type == NAME
    if not elsewhere and not result_elsewhere:
        return func(*args, **kwargs)
    if result_elsewhere and any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"{func}: the generator is of the CPU, the tensor is not")
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = func(*_each(_as_here, args), **{name: _each(_as_here, kwargs[name]) for name in kwargs})
    if func._schema.is_mutable and isinstance(result, Tensor):
        # In place (a name that ends in "_"), or into out=: the tensor that was given is the result.
        return kwargs["out"] if "out" in kwargs else args[0]
    return _each(_as_elsewhere, result) if result_elsewhere else result


def _leaves(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """What an operation is given; its lists hold no lists."""
    given = [*args, *kwargs.values()]
    return [leaf for item in given for leaf in (item if isinstance(item, list | tuple) else [item])]


def _each(convert: Callable[[Any], Any], given: Any) -> Any:
    """``given`` or, of a list or tuple, all that is in it, converted. (torch's own tree_map is made for any
    nesting, and takes longer than the operations themselves.)"""
    if isinstance(given, list | tuple):
        return type(given)([_each(convert, item) for item in given])
    return convert(given)


def _as_here(leaf: Any) -> Any:
    return leaf.here if isinstance(leaf, _Elsewhere) else leaf


def _as_elsewhere(leaf: Any) -> Any:
    return _Elsewhere(leaf) if isinstance(leaf, Tensor) else leaf
