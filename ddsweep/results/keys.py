"""Which parts may be reused: those with a key that matches the question."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ddsweep.errors import ResultsError, UnreadableError
from ddsweep.results.parts import read_whole

__all__ = ["digest", "is_current"]


def digest(*parts: Any) -> str:
    text = json.dumps(parts, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_current(path: Path, key: str) -> bool:
    try:
        return path.exists() and read_whole(path)[1].get("unit") == key
    except (ResultsError, UnreadableError):  # what is kept to be quicker may be away
        return False
