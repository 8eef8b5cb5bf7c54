"""`run_sweep`: what is missing of a sweep, distilled by Ray Tune and evaluated by the pool meanwhile.

Tune packs, retries and watches; which trials there are and which are done is read off the files. A
trial's function returns as soon as the stop file is there, so draining is the same for all causes.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.trainable.function_trainable import wrap_function

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.cost import choose_memory, estimate
from ddsweep.errors import DiskFullError, DivergedError, ResultsError, UserError
from ddsweep.evaluation import forget_stop, record_stop, settled, take_over_all, trial_is_stopped
from ddsweep.packing import best, measured
from ddsweep.pools.imagenet import ready_pool
from ddsweep.results.files import full_disk_told
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.spec import SweepSpec, is_smoke
from ddsweep.sweep.asha import Asha
from ddsweep.sweep.drain import Drain
from ddsweep.sweep.first_step import leaving_before_the_first_step
from ddsweep.sweep.full_disk import FullDisk
from ddsweep.sweep.halving import Halving
from ddsweep.sweep.join import check_nodes
from ddsweep.sweep.metrics import exported
from ddsweep.sweep.observe import Board
from ddsweep.sweep.placement import check_gpus_seen, check_placement
from ddsweep.sweep.pool import EvalPool, SharedSplits, get_splits, put_splits
from ddsweep.sweep.prepare import eval_gpus, load_all_splits, splits_key, trial_settings
from ddsweep.sweep.retry import SPREAD_S, RetryPolicy, Teller, WorkerError, told_death
from ddsweep.sweep.session import RaySession, ray_session
from ddsweep.sweep.trial_retries import TrialRetries
from ddsweep.trial import Progress, distil_trial, is_distilled, record_failure
from ddsweep.trial_plan import TrialSettings

__all__ = ["Outcome", "run_sweep"]

REUSE_BELOW_S = 120.0
"""Trials shorter than this share worker processes: a fresh one takes seconds to import torch and Ray."""

PROCESS_BYTES = 2**30
"""What a worker takes beside its trial: mostly the libraries of torch and Ray."""

REPORTS_PER_S = 200
"""Outer steps that the driver hears of in a second, of all trials together: one takes it some 2 ms."""

LOOK_EVERY_S = 1.0
"""How often a trial looks for the stop file: not at each outer step, for 4,000 trials ask one file system."""


@dataclass(frozen=True)
class Outcome:
    """How many trials of the plan are done, failed, left for the next run because of a drain, and stopped by
    the scheduler."""

    done: int
    failed: int
    left: int
    stopped: int = 0

    @property
    def exit_code(self) -> int:
        """0 all done or stopped, 2 some failed, 75 drained before the end."""
        if self.left:
            return 75
        return 2 if self.failed else 0


def side_by_side(sweep: SweepSpec, trials: Sequence[TrialSpec], session: RaySession) -> float:
    """How many trials run at a time, at most."""
    by_cpus, by_gpus = 0.0, 0.0
    for cpus, gpus in (sweep.resources.for_trial(trial) for trial in trials):
        by_cpus = max(by_cpus, sum(node.cpus for node in session.nodes) / cpus if cpus else math.inf)
        by_gpus = max(by_gpus, sum(node.gpus for node in session.nodes) / gpus if gpus else math.inf)
    return min(len(trials), sweep.resources.max_concurrent or math.inf, by_cpus, by_gpus)


# ------------------------------------------------------------------------------------- one trial


@dataclass(frozen=True)
class _Trial:
    """One trial for a worker, and its name in the dashboard."""

    spec: TrialSpec
    settings: TrialSettings
    label: str


@dataclass(frozen=True)
class _Work:
    """What a worker process needs to run any trial of the sweep: ``trials`` are references to handfuls of
    them, for a worker fetches what it needs anew for each trial, and there may be 100,000. ``report_every``
    is in seconds: a logged outer step that comes sooner after the last one is not reported unless it has a
    score."""

    sweep: str
    trials: Mapping[str, Any]
    shared: Mapping[str, SharedSplits]
    directory: SweepDirectory
    report_every: float

    def trial(self, trial_id: str) -> _Trial:
        handful: dict[str, _Trial] = ray.get(self.trials[_handful(trial_id)])
        return handful[trial_id]


def _handful(trial_id: str) -> str:
    """The ids are hashes: 256 handfuls of about the same size."""
    return trial_id[:2]


def _put(trials: Sequence[_Trial]) -> dict[str, Any]:
    """``trials`` in Ray's object store, by the handful."""
    handfuls: dict[str, dict[str, _Trial]] = {}
    for trial in trials:
        handfuls.setdefault(_handful(trial.spec.trial_id), {})[trial.spec.trial_id] = trial
    return {key: ray.put(handful) for key, handful in handfuls.items()}


def _distil_in_worker(work: _Work, trial_id: str) -> None:
    """Runs in a Tune worker. Errors that a retry cannot mend are recorded and end the trial at once; any
    other is raised, and Tune tries again."""
    trial = work.trial(trial_id)
    spec = trial.spec

    looked = reported = -math.inf
    taken = 0
    stop = False

    def should_stop() -> bool:
        nonlocal looked, stop
        if not stop and time.monotonic() - looked >= LOOK_EVERY_S:
            stop, looked = work.directory.stop_file.exists(), time.monotonic()
        return stop

    if should_stop():
        tune.report({"state": "drained"})
        return

    def on_progress(progress: Progress) -> None:
        nonlocal reported, taken
        taken += progress.steps_taken
        if progress.val_score is None and time.monotonic() - reported < work.report_every:
            return
        reported = time.monotonic()
        tune.report(
            {
                "state": "running",
                "outer_step": progress.outer_step,
                "steps_taken": taken,
                "outer_loss": progress.outer_loss,
                "val_score": progress.val_score,
            }
        )
        taken = 0

    try:
        with (
            full_disk_told(work.directory.root),
            leaving_before_the_first_step(should_stop) as should_stop_at_step,
        ):
            check_gpus_seen(trial.settings.gpus, f"trial {trial_id}")
            distilled = distil_trial(
                spec,
                get_splits(work.shared[splits_key(spec)]),
                work.directory,
                trial.settings,
                should_stop=should_stop_at_step,
                on_progress=on_progress,
            )
    except (DivergedError, UserError) as error:
        full = isinstance(error, DiskFullError)
        if full and should_stop():  # it goes on from the checkpoint that it has
            tune.report({"state": "drained", "full_disk": str(error)})
            return
        record_failure(work.directory, spec, work.sweep, error, "distillation", 1)
        tune.report({"state": "failed", "full_disk": str(error) if full else None})
        return
    tune.report({"state": "distilled" if distilled else "drained"})


def _trainable(
    work: _Work, requests: Mapping[str, dict[str, float]], name: str | None
) -> type[tune.Trainable]:
    """A Tune trainable whose actors have readable names in the dashboard: that of their trial, or ``name``
    where workers are reused (Ray asks an actor for its name only once). ``requests`` has the CPUs and GPUs of
    each trial."""
    reference = ray.put(work)

    def distil(config: dict[str, Any]) -> None:
        _distil_in_worker(ray.get(reference), config["trial_id"])

    wrapped: type[tune.Trainable] = wrap_function(distil)

    class Distil(wrapped):
        def __repr__(self) -> str:
            return name or f"distil {ray.get(reference).trial(self.config['trial_id']).label}"

        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
            return tune.PlacementGroupFactory([requests[config["trial_id"]]])

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            # How long a trial that was stopped or paused may take to leave; Tune's 2 s fail the next one.
            os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")
            return bool(super().reset_config(new_config))

    Distil.__qualname__ = Distil.__name__  # the dashboard's name of the class, without that of this function
    return Distil


class _Watcher(tune.Callback):
    """Carries what Tune hears from trials to the board and the pool. Never blocks on evaluation."""

    def __init__(
        self,
        trials: Mapping[str, TrialSpec],
        board: Board,
        on_distilled: Callable[[TrialSpec], None],
        on_stopped: Callable[[TrialSpec], None],
        on_broken: Callable[[TrialSpec, str, int], None],
        asha: Asha | None,
        disk: FullDisk,
        draining: Callable[[], bool],
    ) -> None:
        self._trials, self._board, self._asha, self._disk = trials, board, asha, disk
        self._draining = draining
        self._on_distilled, self._on_stopped, self._on_broken = on_distilled, on_stopped, on_broken
        self._teller = Teller(board.say)

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
            self._on_distilled(self._trials[trial_id])
        elif state in ("failed", "drained"):
            self._board.set_state(trial_id, state)
            if result.get("full_disk"):
                self._disk.met(result["full_disk"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        if self._asha and self._asha.is_stopped(trial_id):
            self._on_stopped(self._trials[trial_id])
        elif self._board.state_of(trial_id) in ("paused", "running"):  # taken out by a drain
            self._board.set_state(trial_id, "drained")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        self._board.retried(trial_id)
        self._teller.tell(f"{trial_id}: its worker died, and it is tried again: {_death(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        if self._draining():  # it is tried again, by the next run
            self._board.set_state(trial_id, "drained")
            return
        self._on_broken(self._trials[trial_id], _death(trial), trial.num_failures)
        self._board.set_state(trial_id, "failed")
        if self._asha:
            self._asha.failed(trial_id)


def _death(trial: Any) -> str:
    """Who ended the worker of a trial of Tune's, by the file in which it keeps errors."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    except OSError:
        text = ""
    return told_death(text)


# ------------------------------------------------------------------------------------- the sweep


def run_sweep(
    sweep: SweepSpec,
    trials: Sequence[TrialSpec],
    directory: SweepDirectory,
    board: Board,
    drain: Drain,
    *,
    data_root: Path | None,
    address: str | None = None,
    seconds: Mapping[str, float],
    labels: Mapping[str, str],
    only_evaluate: bool = False,
    on_ready: Callable[[], None] = lambda: None,
    spread_s: float = SPREAD_S,
) -> Outcome:
    """Distil and evaluate what is missing of ``trials``; the caller holds the sweep's lock.

    ``only_evaluate`` leaves alone what is not distilled yet. ``on_ready`` is called once nothing that a
    user asked for is left to refuse. Attempts on what dies are spread over ``spread_s`` seconds.

    ``seconds`` is the estimated time of each trial. Raises `UserError` before any work for data that is
    not there and resources that do not fit, `Drained` if it is told to end before the work begins.
    """
    directory = SweepDirectory(directory.root.resolve())  # workers may run in another folder
    with drain.interruptible():
        missing, known, evals = _missing(sweep, trials, directory, board)
    if not missing:
        on_ready()
        return _outcome(board)
    directory.stop_file.unlink(missing_ok=True)
    for trial in missing:
        directory.failure_part(trial.trial_id).unlink(missing_ok=True)
    with drain.interruptible():
        distilled = [trial for trial in missing if is_distilled(trial, directory)]
        there = {trial.trial_id for trial in distilled}
        to_distil = [] if only_evaluate else [trial for trial in missing if trial.trial_id not in there]
        if not distilled and not to_distil:
            raise UserError(f"{directory.root}: no trial is distilled yet; run the sweep first")
        for own in dict.fromkeys(trial.pool for trial in missing if trial.pool is not None):
            ready_pool(own, directory.pools, data_root)
        splits = load_all_splits(missing, data_root, stand_in=is_smoke(sweep.name))
    for name in dict.fromkeys(found.name for found in splits.values() if found.stand_in):
        board.say(f"{name} is not here: small stand-in data take its place, and the numbers mean nothing")
    evaluation = sweep.evaluate.spec()
    with drain.interruptible():
        prints = {trial.trial_id: splits[splits_key(trial)].fingerprint for trial in to_distil}
        taken = take_over_all(to_distil, prints, directory)
    for name, count in Counter(item.source.root.name for item in taken.values()).items():
        board.say(f"{counted(count, 'trial')} taken over from sweep {name}, which has finished the same")
    evals |= {trial_id: list(item.evals) for trial_id, item in taken.items()}
    for trial in [trial for trial in to_distil if trial.trial_id in taken]:
        to_distil.remove(trial)
        if settled(trial, evaluation, directory, sweep.name, known, evals[trial.trial_id]):
            missing.remove(trial)
            board.found(trial.trial_id, "done")
        else:
            distilled.append(trial)
            there.add(trial.trial_id)
    if not missing:
        known.save(directory)
        on_ready()
        return _outcome(board)
    costs = {trial.trial_id: seconds[trial.trial_id] for trial in to_distil}
    board.expect(costs, there, at_most=sweep.scheduler is not None)
    resources = sweep.resources
    with ray_session(
        drain,
        job=f"{'evaluate' if only_evaluate else 'sweep'} {sweep.name}",
        address=address,
        cpus=resources.total_cpus,
        gpus=resources.total_gpus,
        dashboard=resources.dashboard,
        data_bytes=sum(found.nbytes for found in splits.values()),
    ) as session:
        with drain.interruptible():
            if address is not None:
                check_nodes({node.name: node.host for node in session.nodes}, directory.temporary)
            if sweep.resources.to_be_measured:
                sweep = _with_measured_resources(sweep, to_distil, session, directory, board, seconds)
                resources = sweep.resources
            placement = check_placement(sweep, missing, session)
        on_ready()
        if session.dashboard:
            board.say(_dashboard_line(session))
        draining = threading.Event()

        def begin(cause: str) -> None:
            draining.set()
            directory.stop_file.touch()
            pool.begin_drain()
            board.say(f"{cause}: draining; trials checkpoint and stop (again to stop at once)")

        disk = FullDisk(board.say, lambda: begin("full disk"), side_by_side(sweep, missing, session))
        with drain.interruptible():
            shared = {key: put_splits(value) for key, value in splits.items()}
            pool = EvalPool(
                sweep.name,
                placement.nodes,
                shared,
                evaluation,
                directory,
                device=resources.device,
                gpus=placement.gpus,
                compile=resources.compile,
                on_state=board.set_state,
                on_failure=disk.met,
                earlier={trial.trial_id: evals.get(trial.trial_id, []) for trial in missing},
                known=known,
                say=board.say,
                spread_s=spread_s,
            )
            pool.start()

        try:
            with (
                exported(sweep.name, board, pool.load, directory),
                drain.leftover(lambda: directory.stop_file.unlink(missing_ok=True)),
                drain.at_work(begin, directory.stop_file),
            ):
                for trial in distilled:
                    pool.submit(trial)
                for trial in to_distil:
                    forget_stop(trial, directory)  # there is no scheduler any more: it goes on
                if to_distil:
                    asha = _asha(sweep, trials, directory, board) if sweep.scheduler else None
                    given = [
                        _Trial(trial, trial_settings(sweep, trial), labels[trial.trial_id])
                        for trial in to_distil
                    ]
                    report_every = side_by_side(sweep, to_distil, session) / REPORTS_PER_S
                    work = _Work(sweep.name, _put(given), shared, directory, report_every)
                    _tune(
                        *(sweep, to_distil, work, session, board, pool, asha, disk, draining.is_set),
                        seconds=seconds,
                        spread_s=spread_s,
                    )
                pool.close()
        finally:
            directory.stop_file.unlink(missing_ok=True)
    known.save(directory)
    return _outcome(board)


def _missing(
    sweep: SweepSpec, trials: Sequence[TrialSpec], directory: SweepDirectory, board: Board
) -> tuple[list[TrialSpec], KnownParts, dict[str, list[Path]]]:
    """Those of ``trials`` that are neither done nor stopped for good; what is known of parts, and the evals
    parts of each trial."""
    evaluation = sweep.evaluate.spec()
    missing, known, evals = [], KnownParts.load(directory), directory.evals_by_trial()
    for trial in trials:
        if settled(trial, evaluation, directory, sweep.name, known, evals.get(trial.trial_id, [])):
            board.found(trial.trial_id, "done")
        elif sweep.scheduler and trial_is_stopped(trial, directory, known):
            board.found(trial.trial_id, "stopped")
        else:
            missing.append(trial)
    known.save(directory)
    return missing, known, evals


def _with_measured_resources(
    sweep: SweepSpec,
    trials: Sequence[TrialSpec],
    session: RaySession,
    directory: SweepDirectory,
    board: Board,
    seconds: Mapping[str, float],
) -> SweepSpec:
    """``sweep`` with numbers for ``auto``: those with which most gets done of the trial that costs most by
    estimate, on this machine."""
    resources = sweep.resources
    by_hand = resources.cpus if isinstance(resources.cpus, float) else None
    gpus = 0.0 if resources.gpus != "auto" or resources.device == "cpu" else session.gpus
    if not trials:  # what is left are evaluations, which go where trials would
        return _with_resources(sweep, by_hand or 1.0, min(gpus, 0.5))
    costliest = max(trials, key=lambda trial: seconds[trial.trial_id])
    most = min(len(trials), resources.max_concurrent or len(trials))
    board.say(f"resources: auto: measuring trial {costliest.trial_id} side by side with its like")
    found = measured(
        costliest,
        trial_settings(sweep, costliest),
        int(session.cpus),
        gpus,
        most,
        directory,
        eval_gpus(sweep, gpus),
    )
    chosen = best(found)
    for packed in found:
        board.say(
            f"  {packed.count} at a time, {counted(packed.cpus, 'CPU')} and {counted(packed.gpus, 'GPU')} "
            f"each: {packed.steps_per_second * 3600:,.0f} outer steps an hour"
            f"{' (chosen)' if packed is chosen else ''}"
        )
    return _with_resources(sweep, by_hand or chosen.cpus, chosen.gpus)


def _with_resources(sweep: SweepSpec, cpus: float, gpus: float) -> SweepSpec:
    return sweep.model_copy(
        update={"resources": sweep.resources.model_copy(update={"cpus": cpus, "gpus": gpus})}
    )


def _outcome(board: Board) -> Outcome:
    counts = board.counts()
    done, failed, stopped = counts["done"], counts["failed"], counts["stopped"]
    return Outcome(done, failed, counts.total() - done - failed - stopped, stopped)


def _asha(sweep: SweepSpec, trials: Sequence[TrialSpec], directory: SweepDirectory, board: Board) -> Asha:
    """The scheduler, knowing what ``trials`` scored at its rungs in earlier runs, stopped ones included."""
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
    """What a trial asks Ray for. Its estimated memory keeps too many large trials from one machine; one
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
    """What each trial asks for. Equal requests are one object: they travel to every worker process."""
    same: dict[str, dict[str, float]] = {}
    requests = ((trial.trial_id, _request(sweep, trial, session)) for trial in trials)
    return {trial_id: same.setdefault(repr(request), request) for trial_id, request in requests}


def _dashboard_line(session: RaySession) -> str:
    where = f"Ray dashboard: {session.dashboard}"
    return f"{where} (log in with the token in {session.token})" if session.token else where


def _tune(
    sweep: SweepSpec,
    trials: Sequence[TrialSpec],
    work: _Work,
    session: RaySession,
    board: Board,
    pool: EvalPool,
    asha: Asha | None,
    disk: FullDisk,
    draining: Callable[[], bool],
    *,
    seconds: Mapping[str, float],
    spread_s: float,
) -> None:
    resources, by_id = sweep.resources, {trial.trial_id: trial for trial in trials}
    reuse = max(seconds[trial_id] for trial_id in by_id) < REUSE_BELOW_S
    trainable = _trainable(work, _requests(sweep, trials, session), f"distil {sweep.name}" if reuse else None)

    def broken(spec: TrialSpec, death: str, attempts: int) -> None:
        error = WorkerError(f"tried {counted(attempts, 'time')}: {death}")
        record_failure(work.directory, spec, sweep.name, error, "worker", attempts)

    def stopped(spec: TrialSpec) -> None:
        try:
            record_stop(spec, work.directory, sweep.name)
        except UserError as error:  # a full disk, say
            disk.met(error)
            record_failure(work.directory, spec, sweep.name, error, "distillation", 1)
            board.set_state(spec.trial_id, "failed")
        else:
            board.set_state(spec.trial_id, "stopped")

    tuner = tune.Tuner(
        trainable,
        param_space={"trial_id": tune.grid_search(list(by_id))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=None if asha else resources.max_concurrent,
            reuse_actors=reuse,
            scheduler=TrialRetries(
                asha or FIFOScheduler(),
                RetryPolicy(resources.max_failures, spread_s),
                draining=draining,
            ),
            search_alg=asha.queue if asha else None,
            trial_name_creator=lambda trial: trial.config["trial_id"],
            trial_dirname_creator=lambda trial: trial.config["trial_id"],
        ),
        run_config=tune.RunConfig(
            name=sweep.name,
            # Tune's own files say nothing that the parts do not: out of the way, and removed with .tmp.
            storage_path=str((work.directory.temporary / "tune").resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            callbacks=[_Watcher(by_id, board, pool.submit, stopped, broken, asha, disk, draining)],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(work.directory.temporary / "tune", ignore_errors=True)
