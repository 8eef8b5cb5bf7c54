"""Python for processes of ddsweep's own, which never import from the folder that a user happens to be in: a
``secrets.py`` there would take the place of the standard library's."""

from __future__ import annotations

import sys

__all__ = ["SAFE_PATH", "python_module"]

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""The same for what others start: the variable in the environment of their processes."""


def python_module(name: str, *words: str) -> list[str]:
    """The command that runs the module ``name`` with this Python."""
    return [sys.executable, "-P", "-m", name, *words]
