"""Places that Tune has begun to start, or that wait for each other, on a real Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize(("what", "count"), [("requests", 3), ("seeds", 4)])
def test_every_trial_is_distilled(what: str, count: int, environment: dict[str, str]) -> None:
    """``requests``: a place that was begun and is not needed keeps no room from those of another request.
    ``seeds``: one that waits does not count among those that may be at work; else its sibling would not
    come."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sweep.places_on_ray", what],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("distilled: ")]
    assert len(set(told)) == len(told) == count, done.stdout
