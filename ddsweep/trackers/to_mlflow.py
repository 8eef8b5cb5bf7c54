"""MLflow: a run for each trial in an SQLite store, without a server. A run is found again by its tag."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

for _name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):  # MLflow reads them when it is imported
    os.environ.setdefault(_name, "true")

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param, RunTag  # noqa: E402

from ddsweep.errors import UserError  # noqa: E402
from ddsweep.trackers.contract import Final, Point, Told  # noqa: E402

__all__ = ["TAG", "MLflow"]

TAG = "ddsweep.trial_id"
_AT_ONCE = 1000
"""So many metrics MLflow takes in one call; 100 settings and tags."""
_LONGEST = 500
"""Characters of a value that every version of MLflow takes."""


class MLflow:
    """The sweep is an experiment in ``<folder>/mlflow.db``; pictures are below ``<folder>/artifacts``."""

    live = True

    def __init__(self, folder: Path, sweep: str) -> None:
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # how it makes its tables
        self._client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
        found = self._client.get_experiment_by_name(sweep)
        if found is not None and found.lifecycle_stage != "active":
            raise UserError(
                f"{folder}/mlflow.db: the experiment {sweep} was deleted there; restore it (`mlflow "
                f"experiments restore --experiment-id {found.experiment_id}`), or remove it for good "
                "(`mlflow gc`)"
            )
        self._experiment: str = (
            found.experiment_id
            if found is not None
            else self._client.create_experiment(
                sweep, artifact_location=(folder / "artifacts" / sweep).as_uri()
            )
        )

    def open(self, told: Told, sent: int) -> _Run:
        runs = self._client.search_runs([self._experiment], f"tags.`{TAG}` = '{told.trial_id}'")
        if runs:
            run = runs[0]
            if run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(
                self._experiment, run_name=told.name, tags={TAG: told.trial_id, "mlflow.user": ""}
            )
        return _Run(self._client, run.info.run_id, run.info.start_time, told)


class _Run:
    def __init__(self, client: MlflowClient, run_id: str, started_ms: int, told: Told) -> None:
        self._client, self._run_id, self._started_ms = client, run_id, started_ms
        pairs = [
            Param(name, str(value)[:_LONGEST]) for name, value in told.settings.items() if value is not None
        ]
        for at in range(0, len(pairs), 100):
            client.log_batch(run_id, params=pairs[at : at + 100])

    def points(self, points: Sequence[Point]) -> None:
        self._log([metric for point in points for metric in self._metrics(point.values, point)])

    def picture(self, path: Path, step: int) -> None:
        self._client.log_artifact(self._run_id, str(path))

    def final(self, final: Final) -> None:
        values = {f"final/{name}": value for name, value in final.values.items()}
        self._log(self._metrics(values, final))
        tags = [RunTag(f"ddsweep.{name}", value[:_LONGEST]) for name, value in final.words.items()]
        self._client.log_batch(self._run_id, tags=tags)
        self._client.set_terminated(self._run_id, status="FINISHED")

    def flush(self) -> None:
        pass  # each call is a transaction

    def close(self) -> None:
        pass

    def _metrics(self, values: Mapping[str, float], at: Point | Final) -> list[Metric]:
        # The same time whenever it is sent: the store takes a metric of one time, step and value once.
        time_ms = self._started_ms + round(1000 * at.seconds)
        return [Metric(name, value, time_ms, at.step) for name, value in values.items()]

    def _log(self, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _AT_ONCE])
