"""EvalShards: named Ray actors (the shards), and one queue that feeds them groups of held-out networks.

A free shard takes the next group. A shard that dies is started again after a while, and another one does its
work meanwhile: rows do not depend on who computes them. `EvalShards` restarts shards itself, because Ray
does not say why an actor that it restarts has died.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddsweep.catalog import EvaluationSpec, EvalUnit, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.core.memory import end_without_gpu, keep_to_share
from ddsweep.data.load import Splits
from ddsweep.errors import DivergedError, GpuLostError, UnreadableError, UserError
from ddsweep.evaluation import evaluate_unit, finish, missing_units
from ddsweep.results.files import full_disk_told
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.spec import SweepSpec
from ddsweep.sweep.observe import State
from ddsweep.sweep.placement import Placement, check_gpus_seen
from ddsweep.sweep.prepare import splits_key
from ddsweep.sweep.retry import SPREAD_S, RetryPolicy, Teller, WorkerError, told_death
from ddsweep.sweep.work import QueuedUnit, Work
from ddsweep.trial import record_failure
from ddsweep.trial_plan import check_gpu_seen, pick_device

__all__ = ["EvalShards", "Load", "SharedSplits", "get_splits", "put_splits"]

RETRIES = 4
"""Attempts at a unit whose shards die, before its trial counts as failed."""

PATIENCE_S = 5.0
"""A drain waits so long for units in progress."""

_LOOK_S = 0.5
_ASK_IDLE_S = 5.0

_TENSORS = tuple(
    f"{part}_{kind}" for part in ("train", "validation", "test") for kind in ("images", "labels")
)


# ------------------------------------------------------------------------------- data, once per node


@dataclass(frozen=True)
class SharedSplits:
    """`Splits` in Ray's object store: a reference to its arrays, and what is small."""

    arrays: Any
    rest: Splits


def put_splits(splits: Splits) -> SharedSplits:
    """Put the tensors into the object store as numpy arrays. All processes of a node read them in place."""
    arrays = {name: getattr(splits, name).numpy() for name in _TENSORS}
    nothing: dict[str, Any] = dict.fromkeys(_TENSORS, torch.empty(0))
    return SharedSplits(ray.put(arrays), replace(splits, **nothing))


_got: WeakValueDictionary[str, Splits] = WeakValueDictionary()


def get_splits(shared: SharedSplits) -> Splits:
    """The splits back, without a copy; in one process the same object as long as anybody holds it, so that
    its trials share what they put on a GPU (`ddsweep.core.images.RealSet.shared_on`)."""
    name = f"{shared.arrays} {shared.rest.fingerprint}"
    if (found := _got.get(name)) is not None:
        return found
    arrays: Mapping[str, np.ndarray[Any, Any]] = ray.get(shared.arrays)
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns of such arrays; nothing here writes to data.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    found = _got[name] = replace(shared.rest, **tensors)
    return found


# ------------------------------------------------------------------------------------------ the actors


class EvalShard:
    """One actor. Networks are functions of their index, so a shard keeps no state."""

    def __init__(
        self,
        label: str,
        evaluation: EvaluationSpec,
        directory: SweepDirectory,
        device: str,
        gpus: float,
        compile: str,
    ) -> None:
        self._label = label
        self._splits: dict[str, Splits] = {}
        self._evaluation = evaluation
        self._directory = directory
        self._asked = device, gpus
        self._compile = compile
        self._device: torch.device | None = None

    def __repr__(self) -> str:  # its name in the dashboard and the logs
        return self._label

    def ready(self) -> str:
        """Raises `GpuLostError`, or `UserError`, without the GPU that was asked for. (If the constructor
        raised, its caller would only learn that the actor died.)"""
        self._on_device()
        return self._label

    def _on_device(self) -> torch.device:
        if self._device is None:
            setting, gpus = self._asked
            check_gpus_seen(gpus, self._label)
            check_gpu_seen(setting, gpus, self._label)
            device = pick_device(setting, gpus)
            keep_to_share(device.type, gpus)
            self._device = device
        return self._device

    def evaluate(self, spec: TrialSpec, unit: EvalUnit, shared: SharedSplits) -> Path:
        # The data comes with each call: arguments of a constructor may be gone when Ray restarts an actor.
        device, key = self._on_device(), splits_key(spec)
        if key not in self._splits:
            self._splits[key] = get_splits(shared)
        splits, directory = self._splits[key], self._directory
        try:
            with full_disk_told(directory.root):
                return evaluate_unit(
                    spec, unit, self._evaluation, splits, directory, device, compile=self._compile
                )
        except Exception as error:
            end_without_gpu(error)
            raise


@dataclass(frozen=True)
class Load:
    """Waiting units, units with an actor, held-out networks evaluated so far, and the number of retries after
    an actor died."""

    waiting: int
    in_flight: int
    networks: int
    retries: int


@dataclass(frozen=True)
class Listener:
    """What `EvalShards` calls from its own thread: ``on_state(trial_id, state)`` with ``evaluating``,
    ``done`` or ``failed``, ``on_failure`` with errors, and ``say`` with messages for the user."""

    on_state: Callable[[str, State], None]
    on_failure: Callable[[Exception], None] = lambda error: None
    say: Callable[[str], None] = lambda text: None


class EvalShards:
    """Evaluates distilled trials of ``sweep`` while other trials still run, on one actor for each node of
    ``placement``. If its node is lost, the actor starts on another.

    ``submit`` returns at once. Actors ask for no CPU, so they fit beside any trial, and for the placement's
    part of a GPU each. ``earlier`` are the existing evals parts of each trial; their rows are not computed
    again. ``known`` learns the parts of the trials that end. Retries are spread over ``spread_s`` seconds.
    """

    def __init__(
        self,
        sweep: SweepSpec,
        placement: Placement,
        shared: Mapping[str, SharedSplits],
        directory: SweepDirectory,
        listener: Listener,
        *,
        earlier: Mapping[str, Sequence[Path]],
        known: KnownParts,
        spread_s: float = SPREAD_S,
    ) -> None:
        self._parts = {trial_id: set(paths) for trial_id, paths in earlier.items()}
        self._known = known
        self._sweep, self._evaluation, self._directory = sweep.name, sweep.evaluate.spec(), directory
        self._shared, self.placement = shared, placement
        self._on_state, self._on_failure = listener.on_state, listener.on_failure
        self._teller = Teller(listener.say)
        self._how = sweep.resources.device, placement.gpus, sweep.resources.compile
        self._work = Work(len(placement.nodes), RetryPolicy(RETRIES, spread_s))
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, tuple[int, QueuedUnit]] = {}
        self._asked: dict[Any, int] = {}  # whether they are up
        self._asked_at = 0.0
        self._left: dict[str, int] = {}
        self._networks = 0
        self._death = ""
        self._lock = threading.Condition()
        self._closing = False
        self._drained_at: float | None = None
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="eval-shards", daemon=True)

    def start(self, timeout_s: float = 300.0) -> None:
        """Wait until every actor answers. Raises `UserError` if they cannot be placed in time."""
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        with self._lock:
            try:
                while not self._work.all_up():
                    self._lock.wait(_LOOK_S)  # in pieces, as in `close`
                    if self._broken is not None:
                        raise self._broken
                    if time.monotonic() > deadline:
                        why = self._death or "ask for fewer shards or a smaller evaluate.gpus"
                        shards = counted(len(self.placement.nodes), "shard")
                        raise UserError(
                            f"evaluate: {shards} could not be placed within {timeout_s:.0f} s; {why}"
                        )
            except BaseException:
                self._closing = True
                raise

    def expect(self, earlier: Mapping[str, Sequence[Path]]) -> None:
        """Further trials with the evals parts that they have."""
        with self._lock:
            self._parts |= {trial_id: set(paths) for trial_id, paths in earlier.items()}

    def submit(self, spec: TrialSpec) -> None:
        """Queue the missing evaluation of a distilled trial."""
        there = sorted(self._parts.get(spec.trial_id, ()))
        self._on_state(spec.trial_id, "evaluating")
        try:
            units = missing_units(spec, self._evaluation, self._directory, there)
        except UserError as error:  # a file of this trial cannot be read; the sweep goes on
            self._failed(spec, error)
            return
        waiting = [QueuedUnit(spec, unit) for unit in units]
        if not waiting:
            self._finish(spec)
            return
        with self._lock:
            if self._drained_at is not None:
                return
            self._left[spec.trial_id] = len(waiting)
            self._work.add(waiting)
            self._lock.notify_all()

    def close(self) -> None:
        """Wait for all submitted units. In a drain, wait only for `PATIENCE_S` and for units in progress; the
        next run repeats a unit that takes longer."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        while self._thread.is_alive() and not self._is_late():
            self._thread.join(0.5)  # in pieces: a join without limit would block signals
        for actor in list(self._actors.values()):
            ray.kill(actor)
        self._thread.join(PATIENCE_S)
        if self._broken is not None:
            raise self._broken

    def _is_late(self) -> bool:
        return self._drained_at is not None and time.monotonic() - self._drained_at > PATIENCE_S

    def begin_drain(self) -> None:
        """Give out no more work; safe to call at any time."""
        with self._lock:
            self._drained_at = self._drained_at or time.monotonic()
            self._work.drain()

    def load(self) -> Load:
        with self._lock:
            return Load(len(self._work.waiting), len(self._running), self._networks, self._work.retries)

    # ----------------------------------------------------------------------------- its own thread

    def _run(self) -> None:
        try:
            while not (self._closing and not self._running and not self._work.waiting):
                self._round(time.monotonic())
        except Exception as error:  # an error in this module, or in Ray: `close` tells the caller
            self._broken = error

    def _round(self, now: float) -> None:
        with self._lock:
            for shard in self._work.to_start(now):
                self._start(shard)
            for shard, queued in self._work.give(now):
                shared = self._shared[splits_key(queued.spec)]
                reference = self._actors[shard].evaluate.remote(queued.spec, queued.unit, shared)
                self._running[reference] = (shard, queued)
            if now - self._asked_at > _ASK_IDLE_S:  # no call reports the death of an idle shard
                self._asked_at = now
                for shard in self._work.idle():
                    self._asked[self._actors[shard].ready.remote()] = shard
            given_up = self._work.stranded(now, distilling=not self._closing)
            references = [*self._running, *self._asked]
            if not references:
                self._lock.wait(_LOOK_S)
        for queued in given_up:
            self._fail(queued, WorkerError(f"for 15 min no evaluation shard came up: {self._death}"))
        if not references:
            return
        finished, _ = ray.wait(references, num_returns=1, timeout=_LOOK_S)
        if finished:  # and all others that ended: each round looks at everything in progress
            finished, _ = ray.wait(references, num_returns=len(references), timeout=0)
        outcomes = [(reference, *_outcome_of(reference)) for reference in finished]
        for outcome in sorted(outcomes, key=lambda outcome: outcome[2] is not None):  # results before errors
            self._collect(*outcome)

    def _start(self, shard: int) -> None:
        device, gpus, compile = self._how
        label = f"eval shard {shard} of {self._sweep}"
        actor = ray.remote(EvalShard).options(
            name=f"eval-{self._sweep}-{shard}",
            num_cpus=0,
            num_gpus=gpus,
            memory=1,  # a byte, because Ray ignores the strategy of an actor that asks for nothing
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(self.placement.nodes[shard], soft=True),
        )
        try:
            self._actors[shard] = actor.remote(
                label, self._evaluation, self._directory, device, gpus, compile
            )
        except ValueError:  # Ray still has its name for the one that died
            self._work.died(shard, time.monotonic())
        else:
            self._asked[self._actors[shard].ready.remote()] = shard

    def _collect(self, reference: Any, value: Any, error: Exception | None) -> None:
        if reference in self._asked:
            self._came_up(self._asked.pop(reference), error)
        elif reference in self._running:  # else its shard died, and another unit has reported it
            self._ended(reference, value, error)

    def _came_up(self, shard: int, error: Exception | None) -> None:
        if error is not None:
            self._died(shard, error)
            return
        with self._lock:
            self._work.started(shard)
            self._lock.notify_all()

    def _ended(self, reference: Any, part: Path | None, error: Exception | None) -> None:
        shard, queued = self._running[reference]
        if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
            self._died(shard, error)
            return
        with self._lock:
            del self._running[reference]
            if error is None:
                self._work.finished(shard, queued)
                self._networks += len(queued.unit.indices)
                if part is not None:
                    self._parts.setdefault(queued.spec.trial_id, set()).add(part)
                left = self._left.get(queued.spec.trial_id)
                if left is None:
                    return  # another unit of this trial failed
                self._left[queued.spec.trial_id] = left - 1
            else:
                cause = getattr(error, "cause", None) or error
                passes = isinstance(cause, UnreadableError)
                final = isinstance(cause, UserError | DivergedError) and not passes  # a retry would not help
                if self._work.broke(shard, queued, time.monotonic(), final=final):
                    return
        if error is None:
            if left == 1:
                self._finish(queued.spec)
        else:
            self._fail(queued, cause if isinstance(cause, Exception) else error)

    def _died(self, shard: int, error: Exception) -> None:
        """The actor died, or cannot be reached, or did not start."""
        if isinstance(cause := getattr(error, "cause", None), UserError):
            raise cause  # of `ready`
        with self._lock:
            self._death = str(cause) if isinstance(cause, GpuLostError) else told_death(str(error))
            given_up = self._work.died(shard, time.monotonic())
            self._running = {ref: item for ref, item in self._running.items() if item[0] != shard}
            self._asked = {ref: other for ref, other in self._asked.items() if other != shard}
            with suppress(Exception):  # it is dead, mostly
                ray.kill(self._actors.pop(shard))
        if self._drained_at is None:
            self._teller.tell(f"evaluation: a shard died and is started again: {self._death}")
        for queued in given_up:
            self._fail(queued, WorkerError(f"tried {queued.failures} times: {self._death}"))

    def _finish(self, spec: TrialSpec) -> None:
        try:
            paths = sorted(self._parts.pop(spec.trial_id, ()))
            complete = finish(spec, self._evaluation, self._directory, self._sweep, paths, self._known)
        except Exception as error:  # a full disk, for example: this trial failed, the sweep goes on
            self._failed(spec, error)
            return
        self._on_state(spec.trial_id, "done" if complete else "failed")

    def _failed(self, spec: TrialSpec, error: Exception, attempts: int = 1) -> None:
        self._on_failure(error)
        record_failure(self._directory, spec, self._sweep, error, "evaluation", attempts)
        self._on_state(spec.trial_id, "failed")

    def _fail(self, queued: QueuedUnit, error: Exception) -> None:
        spec = queued.spec
        with self._lock:
            self._left.pop(spec.trial_id, None)
            self._work.drop(spec.trial_id)
        self._failed(spec, error, queued.failures)


def _outcome_of(reference: Any) -> tuple[Any, Exception | None]:
    """The result of a call, or the Ray error in its place."""
    try:
        return ray.get(reference), None
    except ray.exceptions.RayError as error:
        return None, error
