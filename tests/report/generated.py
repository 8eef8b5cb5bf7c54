"""A large sweep as its collected tables: made up, with the real schemas, in a few seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddsweep.results.schemas import TABLES

STEPS = (0, 3, 6, 9, 12)
"""Inner steps at which networks are judged; the last is T."""

_ROWS = (
    *(("distilled", "as_distilled", step, 0.4 * (step / 12 - 1)) for step in STEPS),
    ("random_real", "as_distilled", 12, -0.15),
    ("random_real", "as_distilled_tuned", 100, -0.05),
    ("kmeans", "as_distilled", 12, -0.1),
    ("kmeans", "as_distilled_tuned", 100, -0.02),
)


def generate(root: Path, trials: int, networks: int) -> None:
    """``trials`` trials, two seeds a setting, each judged on ``networks`` networks; every tenth setting is
    stopped."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    evals: list[tuple[int, str, str, int, np.ndarray]] = []
    for number in range(trials):
        setting = number // 2
        drawn = np.random.default_rng(setting)
        stopped = setting % 10 == 9
        inner, outer = 10 ** drawn.uniform(-1.5, 0.5), 10 ** drawn.uniform(-2.5, -0.5)
        images = int(drawn.choice([1, 4, 10]))
        base = 0.55 + 0.1 * np.log10(images) - 0.12 * (np.log10(inner) + 0.3) ** 2 + rng.normal(0, 0.01)
        rows.append(
            {
                **{"trial_id": f"{number:010x}", "sweep": "large", "in_sweep": True, "dataset": "mnist"},
                **{"network": "lenet", "objective": "classification", "init": "random", "method": "bptt"},
                **{"init_law": "xavier", "images_per_class": images, "inner_steps": 4, "inner_epochs": 3},
                **{"seed": number % 2, "inner_lr": inner, "outer_lr": outer, "outer_steps": 500},
                **{"inner_augment": str(drawn.choice(["none", "flip"])), "val_score": base + 0.01},
                **{"status": "stopped" if stopped else "done", "outer_steps_done": 100 if stopped else 500},
                **{"wall_seconds": 100.0 * images + rng.uniform(0, 50), "peak_memory_bytes": 10**9},
            }
        )
        for step in range(10, 101 if stopped else 501, 10):
            score = base * (1 - np.exp(-step / 80)) if step % 50 == 0 else None
            loss = 2.3 * np.exp(-step / 200) + 0.3
            row = {"trial_id": f"{number:010x}", "outer_step": step, "outer_loss": loss, "val_score": score}
            history.append(row)
        if not stopped:
            for source, protocol, step, above in _ROWS:
                values = np.round(np.clip(base + above + rng.normal(0, 0.03, networks), 0, 1), 4)
                evals.append((number, source, protocol, step, values))
    (root / "tables").mkdir(parents=True)
    _write(root, "trials", _columns(rows))
    _write(root, "history", _columns(history))
    _write(root, "failures", {})
    repeated = [[row[place] for row in evals for _ in range(networks)] for place in range(4)]
    count = len(evals) * networks
    columns: dict[str, Any] = {
        **{"trial_id": [f"{number:010x}" for number in repeated[0]], "source": repeated[1]},
        **{"protocol": repeated[2], "inner_step": repeated[3], "inner_epochs": [3] * count},
        **{"network": ["lenet"] * count, "init_law": ["xavier"] * count, "split": ["test"] * count},
        "model_seed": np.tile(np.arange(networks), len(evals)),
        "accuracy": np.concatenate([row[4] for row in evals]),
        "diverged": [False] * count,
    }
    _write(root, "evals", columns)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _write(root: Path, name: str, columns: dict[str, Any]) -> None:
    schema = TABLES[name]
    count = len(next(iter(columns.values()), []))
    arrays = [
        pa.array(columns[field.name]).cast(field.type)
        if field.name in columns
        else pa.nulls(count, field.type)
        for field in schema
    ]
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), root / "tables" / f"{name}.parquet")
