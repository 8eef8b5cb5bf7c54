"""Small results folders, written with the real schemas."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from ddsweep.catalog import DATASETS, DatasetSpec, EvaluationSpec, TrialSpec
from ddsweep.report.settings import settings_of
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import write_part
from ddsweep.results.schemas import EVALS, FAILURES, HISTORY, TRIALS

SWEEP = """\
name: small
base: {dataset: digits, network: convnet(width=8), images_per_class: 2, inner_steps: 2, inner_epochs: 2,
       outer_steps: 60}
grid: {init: [fixed, random], inner_lr: [0.02, 0.1]}
evaluate: {networks: 4, group_size: 2}
"""


EVALUATION = EvaluationSpec(networks=4, group_size=2)


def resolve(value: Any) -> DatasetSpec:
    return DATASETS[value]


def text(item: RenderableType, width: int = 160) -> str:
    """What a user sees, without the blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(item)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def spec(**settings: Any) -> TrialSpec:
    base: dict[str, Any] = {"images_per_class": 2, "inner_steps": 2, "inner_epochs": 2, "outer_steps": 60}
    return TrialSpec(DATASETS["digits"], network="convnet(width=8)", **{**base, **settings})


@dataclass(frozen=True)
class Folder:
    """Writes parts of one sweep as a run would."""

    directory: SweepDirectory
    evaluation: EvaluationSpec = EVALUATION

    def asked(self, content: str = SWEEP) -> None:
        self.directory.root.mkdir(parents=True, exist_ok=True)
        self.directory.sweep_file.write_text(content)

    def trial(self, trial: TrialSpec, evaluation: EvaluationSpec | None = None, **columns: Any) -> None:
        settings = settings_of(trial)
        row = {
            **settings,
            **{"trial_id": trial.trial_id, "sweep": "small", "status": "done", "wall_seconds": 12.0},
            **{"test_accuracy_mean": 0.5, "test_models": 4, "n_diverged": 0, **columns},
        }
        used = evaluation or self.evaluation
        metadata = {"evaluation_id": used.evaluation_id(trial)}
        write_part(
            self.directory.trials_part(trial.trial_id), [row], TRIALS, self.directory.temporary, metadata
        )

    def stopped(self, trial: TrialSpec, step: int = 20) -> None:
        """As a scheduler leaves a trial."""
        settings = settings_of(trial)
        self.history(trial, last=step)
        row = {
            **settings,
            **{"trial_id": trial.trial_id, "sweep": "small", "status": "stopped", "wall_seconds": 4.0},
            **{"outer_steps_done": step, "val_score": step / 100},
        }
        path = self.directory.trials_part(trial.trial_id)
        write_part(path, [row], TRIALS, self.directory.temporary, {"status": "stopped"})

    def evals(
        self,
        trial: TrialSpec,
        protocol: str,
        group: int,
        measured: Mapping[tuple[str, str, int], Sequence[tuple[int | None, float]]],
        **columns: Any,
    ) -> Path:
        """``measured[source, protocol of the row, inner step]`` are pairs (network, accuracy)."""
        rows = [
            {
                **{"trial_id": trial.trial_id, "source": source, "protocol": kind, "inner_step": step},
                **{"model_seed": index, "accuracy": accuracy, "diverged": False, "split": "test"},
                **{"group": group, "network": trial.network, "init_law": trial.init_law, "inner_lr": 0.3},
                **columns,
            }
            for (source, kind, step), values in measured.items()
            for index, accuracy in values
        ]
        path = self.directory.evals_part(trial.trial_id, protocol, trial.init_law, group)
        write_part(path, rows, EVALS, self.directory.temporary)
        return path

    def history(self, trial: TrialSpec, last: int = 60) -> Path:
        rows = [
            {
                **{"trial_id": trial.trial_id, "outer_step": step, "outer_loss": 10 / step},
                **{"val_score": step / 100 if step % 20 == 0 else None, "n_skipped": 0, "seconds": step / 2},
            }
            for step in range(10, last + 1, 10)
        ]
        path = self.directory.history_part(trial.trial_id)
        write_part(path, rows, HISTORY, self.directory.temporary)
        return path

    def distilled(self, trial: TrialSpec) -> None:
        path = self.directory.distilled(trial.trial_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"any")

    def failure(self, trial: TrialSpec, message: str = "all networks diverged") -> None:
        row = {"trial_id": trial.trial_id, "error_class": "DivergedError", "message": message}
        path = self.directory.failure_part(trial.trial_id)
        write_part(path, [row], FAILURES, self.directory.temporary)

    def evaluated(self, trial: TrialSpec) -> None:
        """A whole trial, with every kind of row."""
        self.trial(trial)
        self.history(trial)
        self.distilled(trial)
        fixed = trial.init == "fixed"
        if fixed:
            self.evals(trial, "as_distilled", 0, _rows("as_distilled", [trial.seed], 0.2))
        for group in (0, 1):
            protocol = "on_random" if fixed else "as_distilled"
            indices = [2 * group, 2 * group + 1]
            rows = _rows(protocol, indices, 0.0 if fixed else 0.1)
            rows["knn_random", "nearest_neighbour", 0] = [(i, 0.7 + 0.01 * i) for i in indices]
            if group == 0:
                rows["knn_kmeans", "nearest_neighbour", 0] = [(None, 0.9)]
            self.evals(trial, protocol, group, rows)


def _rows(
    protocol: str, indices: Sequence[int], plus: float
) -> dict[tuple[str, str, int], list[tuple[int | None, float]]]:
    at = {
        ("distilled", protocol, 0): 0.1,
        ("distilled", protocol, 2): 0.3,
        ("distilled", protocol, 4): 0.5 + plus,
        ("random_real", protocol, 4): 0.4,
        ("random_real", f"{protocol}_tuned", 60): 0.6,
        ("kmeans", protocol, 4): 0.45,
        ("kmeans", f"{protocol}_tuned", 100): 0.65,
    }
    # Network i is off by a little that differs from source to source, as measurements are.
    return {
        key: [(i, value + 0.01 * (i + n) ** 2) for i in indices] for n, (key, value) in enumerate(at.items())
    }


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    directory = SweepDirectory(tmp_path / "small")
    directory.create()
    return Folder(directory)
