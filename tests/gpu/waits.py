"""Where the host waits for the device: at each read of a value, and at each copy that it does not let go."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu import pretended
from tests.gpu.problems import PRETENDED

_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


def waits_of(work: Callable[[], Any]) -> Counter[str]:
    """How often the host waits in ``work()``, by what for; with ``operations``, all that were started on the
    pretended device (a GPU does not tell)."""
    if PRETENDED:
        with _Counting() as counted, _counted_lists(counted):
            work()
        return counted.found
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter("wait" for one in said if "synchronizing" in str(one.message))


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in args if isinstance(one, Tensor)]
        there = [one for one in given if one.device.type == pretended.NAME]
        self.found["operations"] += bool(there)
        if func in _READS and there:
            self.found[str(func)] += 1
        elif func in _INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1]):
            self.found["boolean mask"] += bool(there)
        elif func is torch.ops.aten._to_copy.default:
            to = torch.device(kwargs.get("device") or args[0].device).type
            if to != args[0].device.type and not (to == pretended.NAME and kwargs.get("non_blocking")):
                self.found[f"copy to {to}"] += 1
        elif func is torch.ops.aten.copy_.default and len({one.device.type for one in given}) == 2:
            self.found["copy_"] += 1
        return func(*args, **kwargs)


class _counted_lists:
    """``tolist`` of the pretended device, which is no operation."""

    def __init__(self, counted: _Counting) -> None:
        self.counted, self.real = counted, pretended._Elsewhere.tolist

    def __enter__(self) -> None:
        def tolist(tensor: Any) -> Any:
            self.counted.found["tolist"] += 1
            return self.real(tensor)

        pretended._Elsewhere.tolist = tolist  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        pretended._Elsewhere.tolist = self.real  # type: ignore[method-assign]
