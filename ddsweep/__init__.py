"""ddsweep: a distributed sweep toolkit for dataset distillation. Importing it costs nothing."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from ddsweep.errors import NOT_ON_WINDOWS

if TYPE_CHECKING:
    from ddsweep.distilled import DistilledSet, apply
    from ddsweep.one_trial import run_trial
    from ddsweep.results.reader import load_results

__all__ = ["DistilledSet", "__version__", "apply", "load_results", "run_trial"]
__version__ = "0.1.0"

_HOMES = {
    "DistilledSet": "ddsweep.distilled",
    "apply": "ddsweep.distilled",
    "load_results": "ddsweep.results.reader",
    "run_trial": "ddsweep.one_trial",
}


# Products of the math library have the same bits wherever in memory their matrices lie: the numbers of a
# trial must not depend on the trials beside it. The library reads this at its first product.
os.environ.setdefault("MKL_CBWR", "AUTO")

# Processes that this one starts, Ray's workers among them, ask Linux for huge pages of memory: steps on the
# CPU spend much of their time in looking up small ones (docs/performance.md). The C library reads this as a
# process starts.
_HUGE_PAGES = "glibc.malloc.hugetlb"
if _HUGE_PAGES not in (_given := os.environ.get("GLIBC_TUNABLES", "")):
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [_given, f"{_HUGE_PAGES}=1"]))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ddsweep' has no attribute {name!r}")
    if sys.platform == "win32":
        raise ImportError(f"ddsweep {NOT_ON_WINDOWS}")
    return getattr(importlib.import_module(_HOMES[name]), name)
