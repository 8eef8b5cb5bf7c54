"""The trackers by name, each behind its extra."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from ddsweep.errors import UserError
from ddsweep.trackers.contract import Tracker

__all__ = ["KINDS", "make_tracker", "require_trackers"]

_NEEDS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "wandb": ("wandb",),
}
_CLASSES = {
    "tensorboard": ("to_tensorboard", "TensorBoard"),
    "mlflow": ("to_mlflow", "MLflow"),
    "wandb": ("to_wandb", "Wandb"),
}
KINDS = tuple(_NEEDS)


def require_trackers(kinds: Sequence[str]) -> None:
    """Raises `UserError` for an unknown tracker, and for one whose extra is not installed."""
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"{kind!r}: no such tracker; choose from {', '.join(KINDS)}")
        if any(find_spec(name) is None for name in _NEEDS[kind]):
            raise UserError(
                f"the tracker {kind} is not installed; it comes with the extra: pip install 'ddsweep[{kind}]'"
            )


def make_tracker(kind: str, folder: Path, sweep: str) -> Tracker:
    """The tracker of this name for one sweep; its files go into ``<folder>/<kind>``."""
    module, name = _CLASSES[kind]
    made: Tracker = getattr(import_module(f"ddsweep.trackers.{module}"), name)(folder / kind, sweep)
    return made
