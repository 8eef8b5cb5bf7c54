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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ddsweep' has no attribute {name!r}")
    if sys.platform == "win32":
        raise ImportError(f"ddsweep {NOT_ON_WINDOWS}")
    return getattr(importlib.import_module(_HOMES[name]), name)
