"""EvalPool: named Ray actors, the shards, and the one queue that feeds them groups of held-out networks.

Whichever shard is free takes the next group. An actor that dies is restarted by Ray, and its work goes to
another one meanwhile; rows do not depend on who computes them.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ddsweep.catalog import EvaluationSpec, EvalUnit, TrialSpec
from ddsweep.catalog.numbers import counted
from ddsweep.core.memory import keep_to_share
from ddsweep.data.sources import Splits
from ddsweep.errors import UserError
from ddsweep.evaluation import evaluate_unit, finish, missing_units
from ddsweep.results.known import KnownParts
from ddsweep.results.layout import SweepDirectory
from ddsweep.sweep.observe import State
from ddsweep.sweep.placement import check_gpus_seen
from ddsweep.sweep.prepare import splits_key
from ddsweep.trial import record_failure
from ddsweep.trial_plan import pick_device

__all__ = ["EvalPool", "Load", "SharedSplits", "get_splits", "put_splits"]

MAX_ATTEMPTS = 5
"""Times that one unit is tried on actors that die under it before its trial is said to have failed."""

IN_FLIGHT = 2
"""Units given to one actor at a time: the next one waits there, the others here, where a drain sees them."""

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
    """Put the tensors into the object store as numpy arrays, which all processes of a node read in place."""
    arrays = {name: getattr(splits, name).numpy() for name in _TENSORS}
    nothing: dict[str, Any] = dict.fromkeys(_TENSORS, torch.empty(0))
    return SharedSplits(ray.put(arrays), replace(splits, **nothing))


def get_splits(shared: SharedSplits) -> Splits:
    """The splits back, without a copy."""
    arrays: Mapping[str, np.ndarray[Any, Any]] = ray.get(shared.arrays)
    with warnings.catch_warnings():
        # torch knows no read-only tensors and warns of such arrays; nothing here writes to data.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return replace(shared.rest, **tensors)


# ------------------------------------------------------------------------------------------ the actors


class EvalShard:
    """One actor of the pool. Networks are functions of their index, so its shard needs no memory."""

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

    def __repr__(self) -> str:  # what the dashboard and the logs call it
        return self._label

    def ready(self) -> str:
        """Raises `UserError` without the GPU that was asked for. (A constructor that did would leave its
        caller with the news that the actor died.)"""
        self._on_device()
        return self._label

    def _on_device(self) -> torch.device:
        if self._device is None:
            setting, gpus = self._asked
            check_gpus_seen(gpus, self._label)
            device = pick_device(setting, gpus)
            keep_to_share(device.type, gpus)
            self._device = device
        return self._device

    def evaluate(self, spec: TrialSpec, unit: EvalUnit, shared: SharedSplits) -> Path:
        # The data comes with each call: what a constructor was given may be gone when Ray restarts an actor.
        device, key = self._on_device(), splits_key(spec)
        if key not in self._splits:
            self._splits[key] = get_splits(shared)
        splits, directory = self._splits[key], self._directory
        return evaluate_unit(spec, unit, self._evaluation, splits, directory, device, compile=self._compile)


@dataclass
class _Task:
    spec: TrialSpec
    unit: EvalUnit
    attempts: int = 0
    died_on: int | None = None


@dataclass(frozen=True)
class Load:
    """Units that wait here, units that actors have; held-out networks evaluated so far, and how often a unit
    was tried again after its actor died."""

    waiting: int
    in_flight: int
    networks: int
    retries: int


class EvalPool:
    """Evaluates distilled trials while other trials still run, on one actor for each entry of ``nodes``: the
    node that it lives on. Where that is lost, Ray restarts the actor on another.

    ``submit`` returns at once. ``on_state(trial_id, state)`` is called from the pool's own thread with
    ``evaluating``, ``done`` or ``failed``. Actors ask for no CPU, so they fit beside any trial, and for
    ``gpus`` of a GPU each. ``earlier`` are the evals parts of each trial that are there already; rows that
    they hold are not computed again. ``known`` learns the parts of the trials that end.
    """

    def __init__(
        self,
        sweep: str,
        nodes: Sequence[str],
        shared: dict[str, SharedSplits],
        evaluation: EvaluationSpec,
        directory: SweepDirectory,
        *,
        device: str,
        gpus: float,
        compile: str,
        on_state: Callable[[str, State], None],
        earlier: Mapping[str, Sequence[Path]],
        known: KnownParts,
    ) -> None:
        self._parts = {trial_id: set(paths) for trial_id, paths in earlier.items()}
        self._known = known
        self._sweep, self._evaluation, self._directory = sweep, evaluation, directory
        self._shared = shared
        self._on_state = on_state
        self._actors = [
            ray.remote(EvalShard)
            .options(
                name=f"eval-{sweep}-{shard}",
                num_cpus=0,
                num_gpus=gpus,
                memory=1,  # byte: Ray would not look at the strategy of an actor that asks for nothing
                max_restarts=-1,
                max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
            )
            .remote(f"eval shard {shard} of {sweep}", evaluation, directory, device, gpus, compile)
            for shard, node in enumerate(nodes)
        ]
        self._waiting: deque[_Task] = deque()
        self._running: dict[Any, tuple[int, _Task]] = {}
        self._left: dict[str, int] = {}
        self._networks = self._retries = 0
        self._lock = threading.Condition()
        self._closing = self._draining = False
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="eval-pool", daemon=True)

    def start(self, timeout_s: float = 300.0) -> None:
        """Wait until every actor answers. Raises `UserError` if they cannot be placed in time."""
        try:
            ray.get([actor.ready.remote() for actor in self._actors], timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise UserError(
                f"evaluate: {counted(len(self._actors), 'shard')} could not be placed within "
                f"{timeout_s:.0f} s; ask for fewer shards or a smaller evaluate.gpus"
            ) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        self._thread.start()

    def submit(self, spec: TrialSpec) -> None:
        """Queue what is missing of the evaluation of a distilled trial."""
        there = sorted(self._parts.get(spec.trial_id, ()))
        units = missing_units(spec, self._evaluation, self._directory, there)
        tasks = [_Task(spec, unit) for unit in units]
        self._on_state(spec.trial_id, "evaluating")
        if not tasks:
            self._finish(spec)
            return
        with self._lock:
            self._left[spec.trial_id] = len(tasks)
            self._waiting.extend(tasks)
            self._lock.notify()

    def close(self, *, drain: bool) -> None:
        """Wait for what was submitted; with ``drain`` only for what the actors already have."""
        with self._lock:
            self._closing, self._draining = True, drain
            if drain:
                self._waiting.clear()
            self._lock.notify()
        while self._thread.is_alive():
            self._thread.join(0.5)  # in pieces: a join without limit would hold back signals
        for actor in self._actors:
            ray.kill(actor)
        if self._broken is not None:
            raise self._broken

    def begin_drain(self) -> None:
        """Give out no more work; safe to call at any time."""
        with self._lock:
            self._draining = True
            self._waiting.clear()

    def load(self) -> Load:
        with self._lock:
            return Load(len(self._waiting), len(self._running), self._networks, self._retries)

    # ------------------------------------------------------------------------ the pool's own thread

    def _work(self) -> None:
        try:
            self._feed_and_collect()
        except Exception as error:  # a defect of this module, or of Ray: `close` tells the caller
            self._broken = error

    def _feed_and_collect(self) -> None:
        while True:
            with self._lock:
                self._give_out()
                if not self._running:
                    if self._closing:
                        return
                    self._lock.wait(1.0)
                    continue
                references = list(self._running)
            finished, _ = ray.wait(references, num_returns=1, timeout=0.5)
            if finished:  # and whatever else has: each round goes over all that is running
                finished, _ = ray.wait(references, num_returns=len(references), timeout=0)
            for reference in finished:
                self._collect(reference)

    def _give_out(self) -> None:
        busy = Counter(shard for shard, _ in self._running.values())
        for place in range(IN_FLIGHT):  # one for each before a second for any
            for shard in range(len(self._actors)):
                if busy[shard] > place or (task := self._next_for(shard)) is None:
                    continue
                shared = self._shared[splits_key(task.spec)]
                reference = self._actors[shard].evaluate.remote(task.spec, task.unit, shared)
                self._running[reference] = (shard, task)
                busy[shard] += 1

    def _next_for(self, shard: int) -> _Task | None:
        """The first that waits, but for those under which this very shard died: it may not be back yet."""
        for place, task in enumerate(self._waiting):
            if task.died_on != shard or len(self._actors) == 1:
                del self._waiting[place]
                return task
        return None

    def _collect(self, reference: Any) -> None:
        with self._lock:
            shard, task = self._running.pop(reference)
        try:
            path = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # the evaluation itself failed: again would not help
            self._fail(task, error.cause if isinstance(error.cause, Exception) else error)
            return
        except ray.exceptions.RayError as error:  # the actor died, or the data on its node is lost
            self._try_elsewhere(shard, task, error)
            return
        with self._lock:
            self._networks += len(task.unit.indices)
            self._parts.setdefault(task.spec.trial_id, set()).add(path)
            left = self._left.get(task.spec.trial_id)
            if left is None:
                return  # another unit of this trial failed
            self._left[task.spec.trial_id] = left - 1
        if left == 1:
            self._finish(task.spec)

    def _try_elsewhere(self, shard: int, task: _Task, error: Exception) -> None:
        task.attempts += 1
        if task.attempts >= MAX_ATTEMPTS:
            self._fail(task, error)
            return
        with self._lock:
            if not self._draining:
                self._retries += 1
                task.died_on = shard
                self._waiting.appendleft(task)

    def _finish(self, spec: TrialSpec) -> None:
        try:
            paths = sorted(self._parts.pop(spec.trial_id, ()))
            complete = finish(spec, self._evaluation, self._directory, self._sweep, paths, self._known)
        except Exception as error:  # a full disk, say: this trial failed, the sweep goes on
            record_failure(self._directory, spec, self._sweep, error, "evaluation", 1)
            complete = False
        self._on_state(spec.trial_id, "done" if complete else "failed")

    def _fail(self, task: _Task, error: Exception) -> None:
        spec = task.spec
        with self._lock:
            self._left.pop(spec.trial_id, None)
            others = [other for other in self._waiting if other.spec.trial_id != spec.trial_id]
            self._waiting = deque(others)
        record_failure(self._directory, spec, self._sweep, error, "evaluation", task.attempts + 1)
        self._on_state(spec.trial_id, "failed")
