"""Starting Python for ddsweep's own processes. They never import from the current folder: a ``secrets.py``
there would replace the standard library's."""

from __future__ import annotations

import os
import sys
from typing import TextIO

__all__ = ["SAFE_PATH", "answers", "python_module"]

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""The same for processes that others start: a variable in their environment."""


def python_module(name: str, *words: str) -> list[str]:
    """The command that runs the module ``name`` with this Python."""
    return [sys.executable, "-P", "-m", name, *words]


def answers() -> TextIO:
    """The standard output of a process that answers on it, for the answers alone: from now on all else that
    is written there, as by a user's code, goes to standard error."""
    found = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr  # one buffer, so that the last words of the process come last
    return found
