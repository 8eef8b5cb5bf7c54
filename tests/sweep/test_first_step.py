"""A trial that is told to stop while its first step takes long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ddsweep.sweep.first_step import leaving_before_the_first_step
from tests.conftest import PATIENCE_S

WORKER = """
import pathlib, sys, time
from ddsweep.sweep import first_step
first_step._LOOK_S = 0.05
stop = pathlib.Path(sys.argv[1])
with first_step.leaving_before_the_first_step(stop.exists) as should_stop:
    for step in range(int(sys.argv[2])):
        assert not should_stop()
        print("step", step, flush=True)
    stop.touch()
    time.sleep(float(sys.argv[3]))
    print("stopped", should_stop(), flush=True)
"""


@pytest.mark.parametrize(
    ("steps", "seconds", "printed"),
    [
        pytest.param(1, 600, "step 0\n", id="before its first step is over the process ends"),
        pytest.param(2, 0.5, "step 0\nstep 1\nstopped True\n", id="later it is asked, and can save"),
    ],
)
def test_when_a_stop_ends_the_process(tmp_path: Path, steps: int, seconds: float, printed: str) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path / "STOP"), str(steps), str(seconds)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert (ended.returncode, ended.stdout) == (0, printed), ended.stderr


def test_what_is_told_reaches_the_trial() -> None:
    with leaving_before_the_first_step(lambda: True) as should_stop:
        assert should_stop()
