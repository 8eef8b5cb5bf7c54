"""The errors that a user can cause. Each becomes one message and exit code 1, never a traceback."""

from __future__ import annotations

__all__ = [
    "EXIT_DRAINED",
    "NOT_ON_WINDOWS",
    "CheckpointError",
    "DataError",
    "DiskFullError",
    "DivergedError",
    "ResultsError",
    "SettingError",
    "TooLargeError",
    "UserError",
]

EXIT_DRAINED = 75
"""The exit code of a run that came to rest before its end, and goes on when it is started again."""


NOT_ON_WINDOWS = "runs on Linux and macOS; on Windows, install it inside WSL (`wsl --install`)"
"""Locks and processes are those of POSIX."""


class UserError(Exception):
    """Something that the user can put right. The message names the place and what is allowed."""


class SettingError(UserError):
    """A setting that is unknown, of the wrong type, or impossible together with the others."""


class DataError(UserError):
    """Data that is missing, short, corrupt, or not of the declared shape."""


class ResultsError(UserError):
    """A results folder that cannot be written, is in use by another driver, or holds a torn file."""


class DiskFullError(ResultsError):
    """No space left on a disk, or none left of a quota."""


class CheckpointError(UserError):
    """A checkpoint or distilled set that cannot be read: truncated, altered, or of another trial."""


class TooLargeError(UserError):
    """Work that does not fit the memory it was given, computed in the most frugal way there is."""


class DivergedError(Exception):
    """A trial whose networks are no longer finite, under ``on_nonfinite: stop`` or for good."""
