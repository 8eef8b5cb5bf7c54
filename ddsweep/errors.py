"""The errors that a user can cause. Each becomes one message and exit code 1, never a traceback."""

from __future__ import annotations

__all__ = [
    "EXIT_DRAINED",
    "EXIT_INTERRUPTED",
    "NOT_ON_WINDOWS",
    "CheckpointError",
    "DataError",
    "DiskFullError",
    "DivergedError",
    "GpuLostError",
    "ResultsError",
    "SettingError",
    "TooLargeError",
    "UnreadableError",
    "UserError",
]

EXIT_DRAINED = 75
"""The exit code of a run that drained before its end. The same command goes on."""

EXIT_INTERRUPTED = 130
"""The exit code of a run that a second signal ended while it drained."""


NOT_ON_WINDOWS = "runs on Linux and macOS; on Windows, install it inside WSL (`wsl --install`)"
"""Windows lacks the locks and processes of POSIX."""


class UserError(Exception):
    """An error that the user can correct. The message names the place and what is allowed."""


class SettingError(UserError):
    """An unknown setting, one of the wrong type, or one that is impossible together with the others."""


class DataError(UserError):
    """Data that is missing, short, corrupt, or not of the declared shape."""


class ResultsError(UserError):
    """A results folder that cannot be written, is in use by another driver, or holds a torn file."""


class DiskFullError(ResultsError):
    """No space left on a disk, or none left of a quota."""


class CheckpointError(UserError):
    """A checkpoint or distilled set that cannot be read: truncated, altered, or of another trial."""


class UnreadableError(UserError):
    """A file that the system cannot read now: no permission, a failing disk, a file server that is away. Its
    content may be whole, so nothing may take its place. That is why it is neither a `ResultsError` nor a
    `CheckpointError`: after those a torn file is made again."""


class TooLargeError(UserError):
    """Work that does not fit its memory even with the leanest plan."""


class GpuLostError(Exception):
    """A GPU that was granted and that torch does not see: the fault of a node, not of what was to run."""


class DivergedError(Exception):
    """The networks of a trial are no longer finite, under ``on_nonfinite: stop`` or for too long."""
