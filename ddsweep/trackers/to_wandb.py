"""Weights & Biases, offline: files that ``wandb sync`` uploads later. Nothing goes over the network."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported

import wandb

from ddsweep.trackers.contract import Final, Point, Told

__all__ = ["Wandb"]


class Wandb:
    """The sweep is a project, and a trial a run whose id is that of the trial. Each session of a run is a
    folder ``<folder>/wandb/offline-run-*``; ``wandb sync --append`` joins those of one id."""

    live = False

    def __init__(self, folder: Path, sweep: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._sweep = folder, sweep

    def open(self, told: Told, sent: int) -> _Run:
        # W&B names a session by its second, and would write over one of the same.
        while any(self._folder.glob(f"wandb/offline-run-{datetime.now():%Y%m%d_%H%M%S}-{told.trial_id}")):
            time.sleep(0.05)
        quiet = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_stats=True,
        )
        return _Run(
            wandb.init(
                project=self._sweep,
                id=told.trial_id,
                name=told.name,
                config=dict(told.settings),
                dir=str(self._folder),
                mode="offline",
                reinit="create_new",
                settings=quiet,
            )
        )


class _Run:
    def __init__(self, run: wandb.Run) -> None:
        self._run = run

    def points(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(dict(point.values), step=point.step)

    def picture(self, path: Path, step: int) -> None:
        self._run.log({"distilled images": wandb.Image(str(path))}, step=step)

    def final(self, final: Final) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in final.values.items()})
        self._run.summary.update({f"final/{name}": value for name, value in final.words.items()})

    def flush(self) -> None:
        pass  # a session is on disk once it is closed

    def close(self) -> None:
        self._run.finish()
