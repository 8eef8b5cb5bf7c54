"""Starting Python for ddsweep's own processes. They never import from the current folder: a ``secrets.py``
there would replace the standard library's."""

from __future__ import annotations

import sys

__all__ = ["SAFE_PATH", "python_module"]

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""The same for processes that others start: a variable in their environment."""


def python_module(name: str, *words: str) -> list[str]:
    """The command that runs the module ``name`` with this Python."""
    return [sys.executable, "-P", "-m", name, *words]
