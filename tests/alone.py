"""What a sweep comes to in one process, without Ray: what others of its runs are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ddsweep.catalog import DATASETS, TrialSpec
from ddsweep.data.sources import load_splits
from ddsweep.evaluation import evaluate_unit, finish
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import expand, load_sweep, resolved_yaml
from ddsweep.sweep.prepare import trial_settings
from ddsweep.trial import distil_trial


def trials_of(file: Path, settings: Sequence[str] = ()) -> tuple[TrialSpec, ...]:
    return expand(load_sweep(file, settings), lambda name: DATASETS[str(name)]).trials


def run_without_ray(file: Path, root: Path, settings: Sequence[str] = ()) -> SweepDirectory:
    """What ``ddsweep run`` leaves in ``root``, of a sweep of an embedded data set."""
    sweep, directory = load_sweep(file, settings), SweepDirectory(root)
    directory.create()
    directory.sweep_file.write_text(resolved_yaml(sweep))
    evaluation, threads = sweep.evaluate.spec(), torch.get_num_threads()
    try:
        for trial in trials_of(file, settings):
            fraction, seed = trial.validation_fraction, trial.split_seed
            splits = load_splits(trial.dataset, None, validation_fraction=fraction, split_seed=seed)
            assert distil_trial(trial, splits, directory, trial_settings(sweep, trial))
            for unit in evaluation.units(trial):
                evaluate_unit(trial, unit, evaluation, splits, directory, torch.device("cpu"))
            assert finish(trial, evaluation, directory, sweep.name)
    finally:
        torch.set_num_threads(threads)
    return directory
