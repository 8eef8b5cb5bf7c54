"""One trial by a call from Python: distilled, evaluated, and written to the same tables as a sweep. No
Ray."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddsweep.catalog import PoolSpec, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.data.files import data_root as find_data
from ddsweep.data.files import resolve_dataset
from ddsweep.distilled import DistilledSet
from ddsweep.errors import DivergedError, ResultsError, SettingError, UserError
from ddsweep.evaluation import evaluate_unit, finish, forget_stop, missing_units, take_over
from ddsweep.measuring import codes_of, measure_networks
from ddsweep.pools.file import resolve_pool
from ddsweep.pools.imagenet import ready_pool
from ddsweep.results.code import check_start_if_needed, write_code, write_sets
from ddsweep.results.current import write_sweep_file
from ddsweep.results.elsewhere import other_sweeps
from ddsweep.results.files import remove_leftovers
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.lock import LOST, SweepLock
from ddsweep.results.parts import read_part
from ddsweep.spec import Plan, SweepSpec, expand, load_sweep, resolved_yaml, sweep_of
from ddsweep.sweep.prepare import load_all_splits, splits_key, trial_settings
from ddsweep.trial import Progress, distil_trial, is_distilled, read_distilled, record_failure
from ddsweep.trial_plan import TrialSettings, pick_device

__all__ = ["FinishedTrial", "Progress", "run_trial"]


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that is distilled and evaluated. ``row`` is its row of the table ``trials``."""

    trial_id: str
    directory: Path
    distilled: DistilledSet
    row: Mapping[str, Any]

    def __repr__(self) -> str:
        mean, std = self.row["test_accuracy_mean"], self.row["test_accuracy_std"]
        spread = "" if std is None else f" ± {100 * std:.1f}"
        known = self.row["init"] == "fixed"
        networks = "its network" if known else counted(self.row["test_models"], "held-out network")
        return f"FinishedTrial({self.trial_id}: {100 * mean:.1f}{spread} % on {networks}, {self.directory})"


def run_trial(
    settings: Mapping[str, Any],
    directory: str | Path,
    *,
    evaluate: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_evaluated: Callable[[int, int], None] = lambda done, of: None,
) -> FinishedTrial:
    """Distil and evaluate one trial in this process, and return it once it is in the tables.

    ``settings``, ``evaluate`` and ``resources`` are the sections ``base``, ``evaluate`` and ``resources`` of
    a sweep file (docs/settings.md). ``directory`` is the folder of results; calls with other settings add
    their trials to it, so that `load_results` reads them together; ``evaluate`` then holds for all of them.
    ``data_root`` is the folder of the data (else ``DDSWEEP_DATA``).

    ``on_progress`` is called with a `Progress` every ``resources["log_every"]`` outer steps and at each
    validation; ``on_evaluated(done, of)`` after each of the ``of`` units that are left to evaluate: a group
    of held-out networks under a protocol, with its baselines. An error in either ends the call. After any end
    of a call, the same call goes on from the last checkpoint, and computes no finished row again. A trial
    that a sweep beside the folder has finished is taken over.

    Raises `UserError` for unusable settings, data or folders, and `DivergedError` for a trial that cannot go
    on; the table ``failures`` then says so.
    """
    found, root = SweepDirectory(Path(directory).expanduser().resolve()), find_data(data_root)
    sections = {"evaluate": evaluate, "resources": resources}
    asked = {"name": _name(found.root), "base": dict(settings)}
    for name, section in sections.items():
        if section is not None and not isinstance(section, Mapping):
            raise SettingError(f"run_trial: {name}: {section!r} is no mapping")
        asked |= {} if section is None else {name: dict(section)}
    sweep = sweep_of(asked, "run_trial")
    if sweep.resources.to_be_measured:
        raise SettingError(
            "run_trial: resources: auto is measured for the trials of a sweep; give numbers: {'gpus': 1}"
        )
    trials = _plan(sweep, found, root).trials
    measure_networks(trials, sweep.evaluate.spec(), found.code, lambda text: None)

    def joined() -> SweepSpec:
        return _joined(sweep, trials[0], found, root, new_evaluation=evaluate is not None)

    joined()  # before the data are read; once more when no other call can change the folder
    if sweep.resources.idle_gpus(trials, torch.cuda.device_count()):
        said = "a GPU is here, and the trial is computed on the CPU: resources={'gpus': 1} uses it"
        warnings.warn(said, stacklevel=2)
    return _run(joined, trials[0], trial_settings(sweep, trials[0]), found, root, on_progress, on_evaluated)


def _name(folder: Path) -> str:
    """The name of the sweep in ``folder``: that of the folder, in the letters that names of sweeps have."""
    return re.sub("[^a-z0-9_-]+", "-", folder.name.lower()).strip("-_")[:100] or "trials"


def _plan(sweep: SweepSpec, directory: SweepDirectory, root: Path | None) -> Plan:
    def dataset(value: Any) -> Any:
        return resolve_dataset(value, root, may_run=True, code=directory.code)

    def pool(value: Any) -> PoolSpec:
        return resolve_pool(value, directory.pools, dataset)

    return expand(sweep, dataset, pool, suits=lambda trial: check_start_if_needed(trial, directory))


def _check_own(directory: SweepDirectory) -> None:
    """Raises `ResultsError` for a folder that holds sweeps beside each other."""
    if directory.sweep_file.is_file() or not directory.root.is_dir():
        return
    others = sorted(path.parent.name for path in directory.root.glob("*/sweep.yaml"))
    if others:
        raise ResultsError(
            f"{directory.root}: holds {others[0]}, which is a sweep; give run_trial a folder of "
            f"its own, such as {directory.root / 'my_trial'}"
        )


def _joined(
    sweep: SweepSpec, trial: TrialSpec, directory: SweepDirectory, root: Path | None, *, new_evaluation: bool
) -> SweepSpec:
    """The sweep of the folder with ``trial`` of ``sweep`` in it: each trial is one of its ``points``."""
    points: tuple[dict[str, Any], ...] = ()
    _check_own(directory)
    if directory.sweep_file.is_file():
        before = load_sweep(directory.sweep_file)
        if before.base or before.grid or before.search or before.scheduler or before.seeds != (0,):
            raise ResultsError(
                f"{directory.root}: holds a sweep of many trials; give run_trial a folder of its own"
            )
        if not new_evaluation:
            sweep = sweep.model_copy(update={"evaluate": before.evaluate})
        points = before.points
        known = {item.trial_id for item in _plan(before, directory, root).trials}
        if trial.trial_id in known:
            return sweep.model_copy(update={"base": {}, "points": points})
    return sweep.model_copy(update={"base": {}, "points": (*points, sweep.base)})


def _run(
    joined: Callable[[], SweepSpec],
    trial: TrialSpec,
    settings: TrialSettings,
    directory: SweepDirectory,
    root: Path | None,
    on_progress: Callable[[Progress], None],
    on_evaluated: Callable[[int, int], None],
) -> FinishedTrial:
    if trial.pool is not None:
        ready_pool(trial.pool, directory.pools, root)
    device = pick_device(settings.device, settings.gpus)
    splits = load_all_splits([trial], root, stand_in=False)[splits_key(trial)]
    fresh, held = not directory.root.exists(), False
    threads = torch.get_num_threads()
    try:
        directory.create()
        with SweepLock(directory.lock) as lock:
            held = True
            sweep = joined()
            evaluation = sweep.evaluate.spec()
            remove_leftovers(directory.temporary)
            write_code(directory, codes_of([trial], evaluation))
            write_sets(directory, sweep.start_sets())
            ids = [item.trial_id for item in _plan(sweep, directory, root).trials]
            write_sweep_file(directory, resolved_yaml(sweep).encode(), ids)
            directory.failure_part(trial.trial_id).unlink(missing_ok=True)
            forget_stop(trial, directory)
            place = "distillation"
            try:
                if not is_distilled(trial, directory):
                    take_over(trial, splits.fingerprint, directory, other_sweeps(directory))
                whole = distil_trial(
                    *(trial, splits, directory, settings),
                    should_stop=lambda: lock.lost,
                    on_progress=on_progress,
                )
                place = "evaluation"
                units = missing_units(trial, evaluation, directory) if whole else []
                for done, unit in enumerate(units, 1):
                    if lock.lost:
                        break
                    evaluate_unit(
                        trial, unit, evaluation, splits, directory, device, compile=settings.compile
                    )
                    on_evaluated(done, len(units))
                if lock.lost:
                    raise ResultsError(f"{directory.root}: {LOST}; the same call goes on where this one was")
                finish(trial, evaluation, directory, sweep.name)
            except (DivergedError, UserError) as error:
                if not lock.lost:
                    record_failure(directory, trial, sweep.name, error, place, 1)
                raise
            (row,) = read_part(directory.trials_part(trial.trial_id)).to_pylist()
            return FinishedTrial(trial.trial_id, directory.root, read_distilled(trial, directory), row)
    except UserError:
        if fresh and held and not directory.sweep_file.exists():
            shutil.rmtree(directory.root, ignore_errors=True)  # refused before it began
        raise
    finally:
        torch.set_num_threads(threads)
