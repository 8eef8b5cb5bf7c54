"""What an element of a job array does with its part of a sweep: it is stopped after some steps and goes on.

``python -m tests.trackers.element FOLDER NUMBER OF``; it goes on once it reads a line.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import torch

from ddsweep.evaluation import evaluate_unit, missing_units, settled
from ddsweep.report.sweep_file import asked_of
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import load_sweep
from ddsweep.sweep.prepare import load_all_splits, splits_key, trial_settings
from ddsweep.trial import distil_trial


def main(root: Path, number: int, of: int) -> None:
    directory = SweepDirectory(root)
    sweep, trials = load_sweep(directory.sweep_file), (asked_of(directory).trials or ())[number::of]
    splits, evaluation = load_all_splits(trials, None, stand_in=False), sweep.evaluate.spec()

    def distil(steps: int) -> list[bool]:
        whole = []
        for trial in trials:
            taken = count()
            data, settings = splits[splits_key(trial)], trial_settings(sweep, trial)
            stop = lambda taken=taken: next(taken) >= steps  # noqa: E731
            whole.append(distil_trial(trial, data, directory, settings, should_stop=stop))
        return whole

    assert not any(distil(4))
    print("stopped", flush=True)
    sys.stdin.readline()
    assert all(distil(1000))
    for trial in trials:
        for unit in missing_units(trial, evaluation, directory):
            evaluate_unit(trial, unit, evaluation, splits[splits_key(trial)], directory, torch.device("cpu"))
        assert settled(trial, evaluation, directory, sweep.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
