"""What two runs of one sweep have in common, wherever and however they ran: rows and their values."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import ddsweep

# When, where and how fast it ran; the header of a distilled set has the host, too. The checkout may change
# while a test runs.
DIFFERENT = {
    *("started_at", "ended_at", "wall_seconds", "cpu_seconds", "gpu_seconds", "peak_memory_bytes", "seconds"),
    *("host", "n_resumed", "n_torn_checkpoints", "cohort_size", "distilled_bytes"),
    *("git_commit", "git_dirty", "ray_version"),
}
KEYS = {
    "trials": ["trial_id"],
    "history": ["trial_id", "outer_step"],
    "evals": ["trial_id", "source", "protocol", "group", "network", "model_seed", "inner_step"],
}


def science(results: Path) -> dict[str, pd.DataFrame]:
    """The tables in a fixed order, without the columns `DIFFERENT`. No row is there twice."""
    found = ddsweep.load_results(results)
    tables = {}
    for name, key in KEYS.items():
        table = getattr(found, name)
        assert not table.duplicated(key).any(), f"{name}: a row twice"
        table = table.drop(columns=[column for column in table if column in DIFFERENT])
        tables[name] = table.sort_values(key, ignore_index=True)
    return tables


def assert_same_science(results: Path, expected: Path, *, exact: bool = True) -> None:
    """Every row of ``expected``, with the same values, and nothing besides."""
    ours = science(results)
    for name, theirs in science(expected).items():
        pd.testing.assert_frame_equal(ours[name], theirs, check_exact=exact, obj=name)
    assert len(ours["trials"]) and not list(results.glob("failures/*"))
