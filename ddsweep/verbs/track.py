"""The verb `track`: the curves and rows of a sweep for TensorBoard, MLflow or W&B."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddsweep.errors import UserError
from ddsweep.verbs.arguments import DataRoot, ResultsDir, Watch, trackers
from ddsweep.verbs.inputs import aside, asked_of_folder, existing

if TYPE_CHECKING:
    from ddsweep.catalog import TrialSpec
    from ddsweep.trackers.contract import Told

__all__ = ["told_of", "track"]


def track(
    directory: ResultsDir,
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="TRACKER",
            callback=trackers,
            help="tensorboard, mlflow or wandb (offline); may be repeated.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write into (default: DIR/tracking).")
    ] = None,
    watch: Watch = None,
    data_root: DataRoot = None,
) -> None:
    """Send what is new of a sweep to trackers, from its files alone: while it runs, or after it."""
    from ddsweep.catalog.numbers import counted
    from ddsweep.results.files import full_disk_told
    from ddsweep.results.lock import live_holder
    from ddsweep.trackers.sync import Sync

    found = existing(directory)
    asked = asked_of_folder(found, data_root)
    if asked.trials is None and asked.note:
        aside(asked.note)
    folder, told = out or tracking_folder(found.root), told_of(asked.trials or ())
    with full_disk_told(folder), ExitStack() as stack:
        syncs: dict[str, Sync] = {}
        for kind in to:
            with _of_tracker(kind, folder):
                syncs[kind] = stack.enter_context(Sync(kind, found, told, folder))
        while True:
            goes_on = watch is not None and live_holder(found.lock) is not None
            for kind, sync in syncs.items():
                with _of_tracker(kind, folder):
                    sent = sync(last=not goes_on)
                typer.echo(f"{folder / kind}: news of {counted(sent, 'trial')} sent")
            if not goes_on or watch is None:
                return
            time.sleep(watch)


@contextmanager
def _of_tracker(kind: str, folder: Path) -> Iterator[None]:
    """An error of the tracker's own library inside becomes a `UserError`; a full disk stays what it is."""
    from ddsweep.results.files import full_disk

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if full_disk(error, folder):
            raise
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"tracker {kind}: {said}; to send everything again, remove {folder / kind} and "
            f"{folder}/{kind}-*.json"
        ) from error


def tracking_folder(root: Path) -> Path:
    return root / "tracking"


def told_of(trials: Sequence[TrialSpec]) -> dict[str, Told]:
    """The trials as trackers show them, by id."""
    from ddsweep.report.labels import trial_labels
    from ddsweep.report.settings import settings_of
    from ddsweep.trackers.contract import Told

    names = trial_labels(trials)
    return {
        trial.trial_id: Told(
            trial.trial_id,
            names[trial.trial_id],
            {name: value for name, value in settings_of(trial).items() if value is not None},
        )
        for trial in trials
    }
