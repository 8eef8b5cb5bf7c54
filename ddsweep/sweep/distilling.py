"""Trials of a sweep through Ray Tune, which packs, retries and watches the places where they are
distilled."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from ddsweep.catalog import TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.cohorts import dealt_out
from ddsweep.cost import choose_memory, estimate
from ddsweep.errors import ResultsError, UserError
from ddsweep.evaluation import record_stop
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import read_part
from ddsweep.spec import SweepSpec
from ddsweep.sweep.full_disk import FullDisk
from ddsweep.sweep.guide import Guide
from ddsweep.sweep.halving import Halving
from ddsweep.sweep.mailbox import Mailbox
from ddsweep.sweep.observe import Board
from ddsweep.sweep.placement import Placement, largest_request, room_for, side_by_side
from ddsweep.sweep.places import Places, place_of
from ddsweep.sweep.prepare import splits_key, trial_settings
from ddsweep.sweep.proposing import Proposing
from ddsweep.sweep.queue import Lost, PlannedPlace, TrialQueue
from ddsweep.sweep.retry import RetryPolicy, Teller, WorkerError, told_death
from ddsweep.sweep.session import RaySession, nodes_alive
from ddsweep.sweep.shards import EvalShards, SharedSplits
from ddsweep.sweep.worker import TrialOfWorker, WorkerInputs, put_trials, trainable
from ddsweep.trial import record_failure, saved_steps

__all__ = ["Distilling", "Watcher", "plan_places"]

REUSE_BELOW_S = 120.0
"""Trials shorter than this share worker processes: a fresh one takes seconds to import torch and Ray."""

PROCESS_BYTES = 2**30
"""The memory of a worker besides its trial: mostly the libraries of torch and Ray."""

PROCESS_BYTES_GPU = 4 * 2**30
"""The memory of a worker on a GPU: with the libraries of CUDA, and what is drawn before it goes there."""

SPARE = 256
"""So many more places a guided search can have than its nodes hold at the start, if others join."""

LOOK_EVERY_S = 5.0
"""How often it looks which nodes there are."""

REPORTS_PER_S = 200
"""All trials together report at most so many outer steps a second to the driver: one takes it some 2 ms."""


@dataclass(frozen=True)
class Distilling:
    """What distilling the trials of ``sweep`` needs beside them: the Ray of ``session``, the ``board`` that
    shows how they are, the ``shards`` that evaluate what is distilled, and the files of ``directory``.

    ``seconds`` are estimates, ``labels`` the names of trials in the dashboard. ``draining`` says whether the
    sweep was told to end. Attempts on what dies are spread over ``spread_s`` seconds. ``networks`` is the
    measured number of networks side by side that keep a process busy. A ``guide`` proposes further trials,
    and ``make_ready`` says which of them are to be distilled.
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
    networks: int | None = None
    guide: Guide | None = None
    make_ready: Callable[[Sequence[TrialSpec]], Sequence[TrialSpec]] = lambda trials: trials

    def run(self, trials: Sequence[TrialSpec], all_trials: Sequence[TrialSpec]) -> UserError | None:
        """Distil ``trials``, and what the guide proposes, until each is distilled, failed or stopped, or the
        sweep drains. A scheduler compares them with what ``all_trials`` scored in earlier runs. Returns the
        error after which nothing more was proposed."""
        sweep, session, resources = self.sweep, self.session, self.sweep.resources
        by_id = {trial.trial_id: trial for trial in trials}
        halving = _halving(sweep, all_trials, self.directory, self.board) if sweep.scheduler else None
        late = _Late(self, by_id, halving)
        proposing: Proposing | None = None
        room: _Room | None = None
        if self.guide is None:
            slots = side_by_side(sweep, trials, session)
            planned = plan_places(sweep, trials, slots, self.networks)
            sizes = {trial_id: place.size for place in planned for trial_id in place.trials}
            requests = _requests(sweep, planned, by_id, session)
        else:
            most = len(trials) + self.guide.to_propose
            coming = tuple(dict.fromkeys((*trials, *self.guide.open_trials)))
            room = _Room(sweep, coming, session, self.shards.placement)
            slots = min(room(), most)
            proposing = Proposing(
                *(self.guide, self.make_ready, late.proposed, self.draining),
                *(resources, max(1, self.guide.drawn // slots), self.networks),
            )
            planned = proposing.places(trials, slots, min(SPARE, most - slots))
            sizes = {trial_id: proposing.companions(trial_id)[1] for trial_id in by_id}
            asked = [_request(sweep, trial, proposing.room(trial)[1], session) for trial in coming]
            dear = _request_for_each(sweep, coming, asked, session)
            requests = dict.fromkeys((place.name for place in planned), dear)
        reuse = max(self.seconds[trial_id] for trial_id in by_id) < REUSE_BELOW_S
        given = [_of_worker(sweep, trial, sizes[trial.trial_id]) for trial in trials]
        queue = TrialQueue(
            planned,
            RetryPolicy(resources.max_failures, self.spread_s),
            halving=halving,
            most=resources.max_concurrent,
            source=proposing,
            room=room,
            saved=lambda trial_id: saved_steps(self.directory, trial_id),
        )
        mailbox = ray.remote(Mailbox).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        inputs = WorkerInputs(
            sweep.name,
            put_trials(given),
            self.shared,
            self.directory,
            mailbox,
            report_every=slots * max(place.size for place in planned) / REPORTS_PER_S,
            device=resources.device,
        )
        watcher = Watcher(by_id, self, queue, late.references)
        tuner = tune.Tuner(
            trainable(inputs, requests),
            param_space={
                "place": tune.grid_search(
                    [
                        {"name": place.name, "size": place.size, "title": self._title(place, reuse)}
                        for place in planned
                    ]
                )
            },
            tune_config=tune.TuneConfig(
                max_concurrent_trials=resources.max_concurrent,
                reuse_actors=reuse,
                scheduler=Places(
                    queue,
                    mailbox,
                    draining=self.draining,
                    on_given=watcher.given,
                    on_lost=watcher.lost,
                ),
                trial_name_creator=place_of,
                trial_dirname_creator=place_of,
            ),
            run_config=tune.RunConfig(
                name=sweep.name,
                # Tune's own files say nothing beyond the parts, so they go to .tmp, which is removed.
                storage_path=str((self.directory.temporary / "tune").resolve()),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=-1),  # the queue decides
                callbacks=[watcher],
            ),
        )
        try:
            tuner.fit()
        finally:
            watcher.close()
            shutil.rmtree(self.directory.temporary / "tune", ignore_errors=True)
        return None if proposing is None else proposing.error

    def _title(self, place: PlannedPlace, reuse: bool) -> str:
        """The name of a place in the dashboard: that of its trial, of its first one and how many others there
        are, or, where processes are used again, of the sweep, for Ray asks for a name only once. So it is in
        a guided search."""
        if reuse or self.guide is not None:
            return f"distil {self.sweep.name}"
        others = len(place.trials) - 1
        return f"distil {self.labels[place.trials[0]]}" + (f" and {others} more" if others else "")

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
    """Passes news on trials to the board and the shards. Never blocks on evaluation."""

    def __init__(
        self,
        trials: Mapping[str, TrialSpec],
        distilling: Distilling,
        queue: TrialQueue,
        references: Mapping[str, Any],
    ) -> None:
        self._trials, self._distilling, self._queue = trials, distilling, queue
        self._references = references
        self._board, self._disk = distilling.board, distilling.disk
        self._teller = Teller(self._board.say)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles callbacks for a restore, which never comes: resuming goes by the files

    def given(self, trials: Sequence[str]) -> dict[str, Any]:
        """Trials have come to a place. Returns the references to those that its process does not have."""
        for trial_id in trials:
            self._board.set_state(trial_id, "running")
        return {trial_id: self._references[trial_id] for trial_id in trials if trial_id in self._references}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "trial" in result:
            self._told(result["trial"], result["state"], result)
        self._carry_out()

    def _told(self, trial_id: str, state: str, result: dict[str, Any]) -> None:
        if state == "running":
            said = ("outer_step", "steps_taken", "outer_loss", "val_score")
            self._board.progress(trial_id, *(result[name] for name in said))
            if self._queue.is_paused(trial_id):
                self._board.set_state(trial_id, "paused")
        elif state == "distilled":
            self._disk.ended()
            self._distilling.shards.submit(self._trials[trial_id])
        elif state in ("failed", "drained"):
            self._board.set_state(trial_id, "failed" if state == "failed" else "drained")
            if result.get("full_disk"):
                self._disk.met(result["full_disk"])

    def lost(self, place: Any, lost: Lost) -> None:
        """The process of a place has died."""
        death = _death(place)
        for trial_id in lost.again:
            self._board.retried(trial_id)
            if self._distilling.draining():  # it is tried again, by the next run
                self._board.set_state(trial_id, "drained")
        if lost.again:
            who, others = lost.again[0], len(lost.again) - 1
            beside = f" (and {counted(others, 'trial')} beside it)" if others else ""
            self._teller.tell(f"{who}{beside}: its worker died, and it is tried again: {death}")
        for trial_id, attempts in lost.failed:
            self._fail(trial_id, WorkerError(f"tried {counted(attempts, 'time')}: {death}"), attempts)
        self._carry_out()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A place could not be started."""
        for trial_id in self._queue.given_up(place_of(trial)):
            self._fail(trial_id, WorkerError(f"tried once: {_death(trial)}"), 1)
        self._carry_out()

    def _fail(self, trial_id: str, error: Exception, attempts: int) -> None:
        if self._distilling.draining():  # it is tried again, by the next run
            self._board.set_state(trial_id, "drained")
        else:
            self._distilling.fail(self._trials[trial_id], error, "worker", attempts)

    def _carry_out(self) -> None:
        for trial_id in self._queue.newly_stopped():
            self._distilling.stop(self._trials[trial_id])

    def close(self) -> None:
        """What still runs or is paused was taken out by a drain."""
        self._carry_out()
        for trial_id in self._trials:
            if self._board.state_of(trial_id) in ("paused", "running"):
                self._board.set_state(trial_id, "drained")


@dataclass
class _Room:
    """How many places the nodes hold that are there now, if each has the dearest of ``trials``."""

    sweep: SweepSpec
    trials: Sequence[TrialSpec]
    session: RaySession
    shards: Placement
    _looked: float = 0.0
    _found: int = 0

    def __call__(self) -> int:
        if not self._found or time.monotonic() - self._looked >= LOOK_EVERY_S:
            if self._found:
                self.session = replace(self.session, nodes=nodes_alive())
            self._looked = time.monotonic()
            self._found = room_for(self.sweep, self.trials, self.session, self.shards)
        return self._found


@dataclass
class _Late:
    """Trials that come while others run: ``by_id`` gets them, and ``references`` what their workers need."""

    distilling: Distilling
    by_id: dict[str, TrialSpec]
    halving: Halving | None
    references: dict[str, Any] = field(default_factory=dict)

    def proposed(self, trials: Sequence[TrialSpec], sizes: Mapping[str, int]) -> None:
        """All seeds of a sample. Those with a size are to be distilled, with so many together at most."""
        distilling = self.distilling
        if self.halving is not None:
            self.halving.add(trials)
            for trial in [trial for trial in trials if trial.trial_id not in sizes]:
                _replay(self.halving, trial, distilling.directory, distilling.board)
        for trial in trials:
            if size := sizes.get(trial.trial_id):
                self.by_id[trial.trial_id] = trial
                shared = distilling.shared[splits_key(trial)]
                given = replace(_of_worker(distilling.sweep, trial, size), shared=shared)
                self.references[trial.trial_id] = ray.put(given)


def _of_worker(sweep: SweepSpec, trial: TrialSpec, size: int) -> TrialOfWorker:
    return TrialOfWorker(trial, replace(trial_settings(sweep, trial), cohort=size))


def _death(trial: Any) -> str:
    """Who ended the worker of a Tune trial, by its error file."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
    except OSError:
        text = ""
    return told_death(text)


def plan_places(
    sweep: SweepSpec, trials: Sequence[TrialSpec], slots: float, networks: int | None = None
) -> list[PlannedPlace]:
    """The places that distil ``trials``, ``slots`` of them at a time; ``networks`` as in `cohort_sizes`."""
    places = []
    for cohort in dealt_out(trials, sweep.resources, slots, networks):
        names = tuple(trial.trial_id for trial in cohort.trials)
        places.append(PlannedPlace(names[0], names, cohort.size, cohort.shape))
    return places


def _halving(
    sweep: SweepSpec, trials: Sequence[TrialSpec], directory: SweepDirectory, board: Board
) -> Halving:
    """The decisions of the scheduler, with the scores of ``trials`` at its rungs in earlier runs, also of
    stopped ones."""
    assert sweep.scheduler is not None
    halving = Halving(sweep.scheduler, trials)
    for trial in trials:
        _replay(halving, trial, directory, board)
    halving.begin()
    return halving


def _replay(halving: Halving, trial: TrialSpec, directory: SweepDirectory, board: Board) -> None:
    try:
        rows = read_part(directory.history_part(trial.trial_id)).to_pylist()
    except ResultsError:  # not begun yet, or torn
        return
    scores = {row["outer_step"]: row["val_score"] for row in rows if row["val_score"] is not None}
    reached = rows[-1]["outer_step"] if rows else 0
    stopped = board.state_of(trial.trial_id) == "stopped"
    halving.replay(trial.trial_id, scores, reached, stopped=stopped)


def _request(sweep: SweepSpec, trial: TrialSpec, size: int, session: RaySession) -> dict[str, float]:
    """The request to Ray of a place with ``size`` trials like ``trial``. The estimated memory keeps too many
    large ones from one machine; one that is larger than the machine is tried alone. What lies on a GPU takes
    little of the machine's."""
    resources = sweep.resources
    cpus, gpus = resources.for_trial(trial)
    request = {"CPU": cpus}
    if gpus:
        request["GPU"] = gpus
    most = max(node.memory for node in session.nodes if cpus <= node.cpus and gpus <= node.gpus)
    if resources.memory == "auto" and most:
        mode, segment = choose_memory(trial, resources.memory_mode, resources.segment)
        of_trial = estimate(trial, 1, memory_mode=mode, segment=segment).memory_bytes
        needed = PROCESS_BYTES + size * of_trial
        if gpus:
            needed = min(needed, PROCESS_BYTES_GPU)
        request["memory"] = int(min(needed, most))
    elif isinstance(resources.memory, float):
        request["memory"] = int(resources.memory * 1e9)
    return request


def _requests(
    sweep: SweepSpec, planned: Sequence[PlannedPlace], by_id: Mapping[str, TrialSpec], session: RaySession
) -> dict[str, dict[str, float]]:
    """The request of each place. Equal requests are one object, because they travel to every worker
    process."""
    same: dict[str, dict[str, float]] = {}
    count: Counter[Any] = Counter()
    for place in planned:
        count[place.shape] += len(place.trials)
    requests = (
        # Places of one shape take over trials from each other: each may hold as many as fit.
        (place.name, _request(sweep, by_id[place.trials[0]], min(place.size, count[place.shape]), session))
        for place in planned
    )
    return {name: same.setdefault(repr(request), request) for name, request in requests}


def _request_for_each(
    sweep: SweepSpec,
    trials: Sequence[TrialSpec],
    requests: Sequence[dict[str, float]],
    session: RaySession,
) -> dict[str, float]:
    """A request that is enough for each of the ``requests`` of ``trials``."""
    keys = dict.fromkeys(key for request in requests for key in request)
    found = {key: max(request.get(key, 0) for request in requests) for key in keys}
    cpus, gpus = largest_request(sweep, trials, session)
    memory = [node.memory for node in session.nodes if cpus <= node.cpus and gpus <= node.gpus]
    if "memory" in found and max(memory):
        found["memory"] = min(found["memory"], max(memory))
    return found
