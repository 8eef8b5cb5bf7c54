"""Trials of a sweep through Ray Tune, which packs, retries and watches them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.cost import choose_memory, estimate
from ddsweep.errors import ResultsError, UserError
from ddsweep.evaluation import record_stop
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.spec import SweepSpec
from ddsweep.sweep.asha import Asha
from ddsweep.sweep.full_disk import FullDisk
from ddsweep.sweep.halving import Halving
from ddsweep.sweep.observe import Board
from ddsweep.sweep.placement import side_by_side
from ddsweep.sweep.prepare import trial_settings
from ddsweep.sweep.retry import RetryPolicy, Teller, WorkerError, told_death
from ddsweep.sweep.session import RaySession
from ddsweep.sweep.shards import EvalShards, SharedSplits
from ddsweep.sweep.trial_retries import TrialRetries
from ddsweep.sweep.worker import TrialOfWorker, WorkerInputs, put_trials, trainable
from ddsweep.trial import record_failure

__all__ = ["Distilling", "Watcher"]

REUSE_BELOW_S = 120.0
"""Trials shorter than this share worker processes: a fresh one takes seconds to import torch and Ray."""

PROCESS_BYTES = 2**30
"""The memory of a worker besides its trial: mostly the libraries of torch and Ray."""

REPORTS_PER_S = 200
"""All trials together report at most so many outer steps a second to the driver: one takes it some 2 ms."""


@dataclass(frozen=True)
class Distilling:
    """What distilling the trials of ``sweep`` needs beside them: the Ray of ``session``, the ``board`` that
    shows how they are, the ``shards`` that evaluate what is distilled, and the files of ``directory``.

    ``seconds`` are estimates, ``labels`` the names of trials in the dashboard. ``draining`` says whether the
    sweep was told to end. Attempts on what dies are spread over ``spread_s`` seconds.
    """

    sweep: SweepSpec
    session: RaySession
    board: Board
    shards: EvalShards
    disk: FullDisk
    directory: SweepDirectory
    shared: Mapping[str, SharedSplits]
    seconds: Mapping[str, float]
    labels: Mapping[str, str]
    draining: Callable[[], bool]
    spread_s: float

    def run(self, trials: Sequence[TrialSpec], all_trials: Sequence[TrialSpec]) -> None:
        """Distil ``trials``, until each is distilled, failed or stopped, or the sweep drains. A scheduler
        compares them with what ``all_trials`` scored in earlier runs."""
        sweep, session, resources = self.sweep, self.session, self.sweep.resources
        by_id = {trial.trial_id: trial for trial in trials}
        asha = _asha(sweep, all_trials, self.directory, self.board) if sweep.scheduler else None
        reuse = max(self.seconds[trial_id] for trial_id in by_id) < REUSE_BELOW_S
        given = [
            TrialOfWorker(trial, trial_settings(sweep, trial), self.labels[trial.trial_id])
            for trial in trials
        ]
        inputs = WorkerInputs(
            sweep.name,
            put_trials(given),
            self.shared,
            self.directory,
            report_every=side_by_side(sweep, trials, session) / REPORTS_PER_S,
        )
        tuner = tune.Tuner(
            trainable(inputs, _requests(sweep, trials, session), f"distil {sweep.name}" if reuse else None),
            param_space={"trial_id": tune.grid_search(list(by_id))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=None if asha else resources.max_concurrent,
                reuse_actors=reuse,
                scheduler=TrialRetries(
                    asha or FIFOScheduler(),
                    RetryPolicy(resources.max_failures, self.spread_s),
                    draining=self.draining,
                ),
                search_alg=asha.queue if asha else None,
                trial_name_creator=lambda trial: trial.config["trial_id"],
                trial_dirname_creator=lambda trial: trial.config["trial_id"],
            ),
            run_config=tune.RunConfig(
                name=sweep.name,
                # Tune's own files say nothing beyond the parts, so they go to .tmp, which is removed.
                storage_path=str((self.directory.temporary / "tune").resolve()),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
                callbacks=[Watcher(by_id, self, asha)],
            ),
        )
        try:
            tuner.fit()
        finally:
            shutil.rmtree(self.directory.temporary / "tune", ignore_errors=True)

    def fail(self, spec: TrialSpec, error: Exception, place: str, attempts: int) -> None:
        """Leave a row in ``failures/``."""
        record_failure(self.directory, spec, self.sweep.name, error, place, attempts)
        self.board.set_state(spec.trial_id, "failed")

    def stop(self, spec: TrialSpec) -> None:
        """Record that the scheduler stopped a trial."""
        try:
            record_stop(spec, self.directory, self.sweep.name)
        except UserError as error:  # a full disk, say
            self.disk.met(error)
            self.fail(spec, error, "distillation", 1)
        else:
            self.board.set_state(spec.trial_id, "stopped")


class Watcher(tune.Callback):
    """Passes Tune's news on trials to the board and the shards. Never blocks on evaluation."""

    def __init__(self, trials: Mapping[str, TrialSpec], distilling: Distilling, asha: Asha | None) -> None:
        self._trials, self._distilling, self._asha = trials, distilling, asha
        self._board, self._disk = distilling.board, distilling.disk
        self._teller = Teller(self._board.say)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks for a restore, which never comes: resuming goes by the files

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._board.set_state(trial.config["trial_id"], "running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        trial_id, state = trial.config["trial_id"], result.get("state")
        if state == "running":
            said = ("outer_step", "steps_taken", "outer_loss", "val_score")
            self._board.progress(trial_id, *(result[name] for name in said))
            if self._asha and self._asha.is_paused(trial_id):
                self._board.set_state(trial_id, "paused")
        elif state == "distilled":
            self._disk.ended()
            self._distilling.shards.submit(self._trials[trial_id])
        elif state in ("failed", "drained"):
            self._board.set_state(trial_id, state)
            if result.get("full_disk"):
                self._disk.met(result["full_disk"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        if self._asha and self._asha.is_stopped(trial_id):
            self._distilling.stop(self._trials[trial_id])
        elif self._board.state_of(trial_id) in ("paused", "running"):  # taken out by a drain
            self._board.set_state(trial_id, "drained")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        self._board.retried(trial_id)
        self._teller.tell(f"{trial_id}: its worker died, and it is tried again: {_death(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        if self._distilling.draining():  # it is tried again, by the next run
            self._board.set_state(trial_id, "drained")
            return
        error = WorkerError(f"tried {counted(trial.num_failures, 'time')}: {_death(trial)}")
        self._distilling.fail(self._trials[trial_id], error, "worker", trial.num_failures)
        if self._asha:
            self._asha.failed(trial_id)


def _death(trial: Any) -> str:
    """Who ended the worker of a Tune trial, by its error file."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    except OSError:
        text = ""
    return told_death(text)


def _asha(sweep: SweepSpec, trials: Sequence[TrialSpec], directory: SweepDirectory, board: Board) -> Asha:
    """The scheduler, with the scores of ``trials`` at its rungs in earlier runs, also of stopped ones."""
    assert sweep.scheduler is not None
    halving = Halving(sweep.scheduler, trials)
    for trial in trials:
        try:
            rows = read_part(directory.history_part(trial.trial_id)).to_pylist()
        except ResultsError:  # not begun yet, or torn
            continue
        scores = {row["outer_step"]: row["val_score"] for row in rows if row["val_score"] is not None}
        reached = rows[-1]["outer_step"] if rows else 0
        stopped = board.state_of(trial.trial_id) == "stopped"
        halving.replay(trial.trial_id, scores, reached, stopped=stopped)
    halving.begin()
    return Asha(halving, most=sweep.resources.max_concurrent)


def _request(sweep: SweepSpec, trial: TrialSpec, session: RaySession) -> dict[str, float]:
    """A trial's request to Ray. Its estimated memory keeps too many large trials from one machine; a trial
    that is larger than the machine is tried alone."""
    resources = sweep.resources
    cpus, gpus = resources.for_trial(trial)
    request = {"CPU": cpus}
    if gpus:
        request["GPU"] = gpus
    most = max(node.memory for node in session.nodes if cpus <= node.cpus and gpus <= node.gpus)
    if resources.memory == "auto" and most:
        mode, segment = choose_memory(trial, resources.memory_mode, resources.segment)
        bytes_ = PROCESS_BYTES + estimate(trial, 1, memory_mode=mode, segment=segment).memory_bytes
        request["memory"] = int(min(bytes_, most))
    elif isinstance(resources.memory, float):
        request["memory"] = int(resources.memory * 1e9)
    return request


def _requests(
    sweep: SweepSpec, trials: Sequence[TrialSpec], session: RaySession
) -> dict[str, dict[str, float]]:
    """The request of each trial. Equal requests are one object, because they travel to every worker
    process."""
    same: dict[str, dict[str, float]] = {}
    requests = ((trial.trial_id, _request(sweep, trial, session)) for trial in trials)
    return {trial_id: same.setdefault(repr(request), request) for trial_id, request in requests}
