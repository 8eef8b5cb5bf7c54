"""One trial from its settings to its distilled set: resumable, without Ray.

A Tune worker, an array task, a benchmark and a test all call `distil_trial`. It checkpoints into the
trial's folder and can be killed at any moment: a call with the same settings goes on from the last
checkpoint and, on the same kind of machine, ends with the same bits.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddsweep import baselines
from ddsweep.catalog import TrialSpec
from ddsweep.compilation import prepare_compilation
from ddsweep.core.distill import StepReport, initial_state, outer_step
from ddsweep.core.evaluate import evaluate_networks
from ddsweep.core.execution import ExecutionPlan, more_frugal, runnable
from ddsweep.core.graphs import has_recordings
from ddsweep.core.memory import is_out_of_memory, keep_to_share, release_memory
from ddsweep.core.methods import labels_of, method_of
from ddsweep.core.networks import build_network
from ddsweep.core.outer import DistillState, averaged, final, rolled_back, scored
from ddsweep.core.recipe import evaluation_loop
from ddsweep.core.steps import is_compile_error
from ddsweep.core.task import Learned, Pool, Task, selection_seeds
from ddsweep.core.tuning import best_of, score_rates
from ddsweep.cost import choose_memory, estimate
from ddsweep.data.sources import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import (
    CheckpointError,
    DiskFullError,
    DivergedError,
    SettingError,
    TooLargeError,
    UserError,
)
from ddsweep.own_code import version_of
from ddsweep.pools.imagenet import pool_of
from ddsweep.provenance import Meter, device_name, environment, utc_now
from ddsweep.results.artifacts import image_grid, load_tensors, save_tensors
from ddsweep.results.files import patiently
from ddsweep.results.layout import SweepDirectory
from ddsweep.results.parts import is_whole, write_part
from ddsweep.results.schemas import FAILURES, HISTORY
from ddsweep.trial_plan import TrialSettings, first_plan, ready_network

__all__ = [
    "Progress",
    "checkpoint_provenance",
    "distil_trial",
    "is_distilled",
    "read_distilled",
    "record_failure",
]

_log = logging.getLogger(__name__)

_HISTORY_COLUMNS = tuple(name for name in HISTORY.names if name != "trial_id")


@dataclass(frozen=True)
class Progress:
    """What a running trial says of itself at each logged outer step. ``steps_taken`` counts since it last
    said something, steps that are taken again after a rollback included."""

    outer_step: int
    steps_taken: int
    outer_loss: float | None
    val_score: float | None
    seconds: float


@dataclass
class _Run:
    """The course of a trial that a checkpoint carries: state, logged rows, and how it came here."""

    state: DistillState
    history: list[dict[str, Any]]
    plan: ExecutionPlan
    started_at: str
    wall: float = 0.0
    cpu: float = 0.0
    n_skipped: int = 0
    peak: int | None = None
    n_resumed: int = 0
    n_replans: int = 0


def distil_trial(
    spec: TrialSpec,
    splits: Splits,
    directory: SweepDirectory,
    settings: TrialSettings,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> bool:
    """Distil ``spec``, or go on with it, until its distilled set is on disk.

    Returns True when it is, False if ``should_stop`` asked to drain (then a checkpoint is). An outer step
    that runs out of memory is taken again by a more frugal plan, which is kept. Raises `DivergedError` when
    the trial cannot go on, `TooLargeError` when there is no such plan left, and `UserError` for a device
    that is not there.
    """
    try:
        return _distil(spec, splits, directory, settings, should_stop, on_progress)
    finally:
        release_memory()  # the process may live on, idle or with the next trial, beside others on the GPU


def _distil(
    spec: TrialSpec,
    splits: Splits,
    directory: SweepDirectory,
    settings: TrialSettings,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
) -> bool:
    if is_distilled(spec, directory):
        return True
    if (spec.whitening == "none") != (splits.whitening is None):
        raise ValueError(f"whitening: the trial's is {spec.whitening}, the images were not loaded so")
    _move_aside_if_torn(directory.distilled(spec.trial_id), spec, "distilled")
    ready_network(spec, directory.code)
    run = _load_run(spec, splits, directory)
    if run is not None and directory.distilled(spec.trial_id).exists():  # only its history was not whole
        _write_history(run, spec, directory)
        return True
    if run is None:
        plan = first_plan(spec, settings)
    else:
        _check_device(run.plan, spec, directory)
        network = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes)
        plan = runnable(run.plan, network)
        if plan != run.plan:
            run.plan, run.n_replans = plan, run.n_replans + 1
    if plan.compile:
        prepare_compilation()
    torch.set_num_threads(plan.threads)
    keep_to_share(plan.device, settings.gpus)
    data = (splits.train_images, splits.train_labels, splits.mean, splits.std)
    task = Task.of(spec, plan, *data, training_networks(spec, directory))
    if run is None:
        run = _Run(initial_state(task, _start_images(spec, splits)), [], plan, utc_now().isoformat())
    run.state = _to_device(run.state, plan.device)
    meter = Meter(plan.device, run.wall, run.cpu, run.peak)

    def save() -> None:
        patiently(lambda: _save_run(run, spec, splits, directory, settings, meter), should_stop)

    if run.state.step in settings.rungs and (told := _told_at(run)) is not None:
        on_progress(told)  # once more: whoever was told may have died of it, or sent the trial to wait here
    taken = 0
    while run.state.step < spec.outer_steps:
        if should_stop():
            save()
            return False
        try:
            task, report = _step_in_memory(run, task, settings, save)
        except DivergedError:
            if (healthy := rolled_back(run.state, spec)) is None:
                raise
            run.state = healthy
            run.history = [row for row in run.history if row["outer_step"] <= healthy.step]
            continue
        run.n_skipped += report.n_skipped
        taken += 1
        step = run.state.step
        decisive = step == spec.outer_steps or step in settings.rungs
        validated = decisive or step % spec.validate_every == 0
        logged = validated or step % settings.log_every == 0
        score = validate(task, run.state, splits) if validated else None
        # A rung that a scheduler asks for must not decide what is kept.
        if score is not None and (step == spec.outer_steps or step % spec.validate_every == 0):
            run.state = scored(run.state, spec, score)
        if logged:
            run.history.append(_history_row(run.state, report, score, meter))
        if decisive or step % settings.checkpoint_every == 0:
            save()
        if logged:  # last, for a trial that is stopped never comes back from it
            on_progress(Progress(step, taken, report.loss, score, meter.wall_seconds()))
            taken = 0
    patiently(lambda: _finish_distillation(run, task, splits, directory, settings, meter), should_stop)
    return True


def _step_in_memory(
    run: _Run, task: Task, settings: TrialSettings, save: Callable[[], None]
) -> tuple[Task, StepReport]:
    """One outer step of ``run``, taken again from the same state by ever more frugal plans where memory runs
    out, and without compiling where that fails; each is checkpointed at once, so that a kill does not bring
    the old one back. Returns the task with the plan that did it."""
    while True:
        try:
            run.state, report = outer_step(task, run.state)
            return task, report
        except Exception as error:
            spec, plan = task.spec, run.plan
            if plan.compile and is_compile_error(error):
                _log.warning("trial %s is not compiled, for torch could not: %s", spec.trial_id, _said(error))
                frugal = replace(plan, compile=False)
            elif not is_out_of_memory(error):
                raise
            elif has_recordings():  # those of validation, say; without them there may be room
                frugal = plan
            else:
                _, segment = choose_memory(spec, "recompute")
                smaller = more_frugal(plan, segment, spec.models_per_step, spec.real_batch)
                if smaller is None:
                    raise TooLargeError(_too_large(run, spec, settings, error)) from error
                frugal = smaller
        release_memory()  # not before: the error held what the step had allocated
        if frugal == plan:
            continue
        run.plan, run.n_replans = frugal, run.n_replans + 1
        task = replace(task, plan=frugal)
        save()


def _too_large(run: _Run, spec: TrialSpec, settings: TrialSettings, error: Exception) -> str:
    plan = run.plan
    needed = estimate(spec, 1, memory_mode=plan.memory_mode, segment=plan.segment).memory_bytes
    on_gpu = plan.device == "cuda"
    where = f"{settings.gpus:g} of a GPU" if on_gpu and 0 < settings.gpus < 1 else plan.device
    more = "a larger resources.gpus" if on_gpu else "a smaller resources.max_concurrent"
    return (
        f"outer step {run.state.step} does not fit the memory of {where}, not even with memory_mode: "
        f"{plan.memory_mode}, segment: {plan.segment} and {plan.real_chunk} real images at a time, where the "
        f"trial needs about {needed / 1e9:.2g} GB by estimate; set {more}, or fewer models_per_step, "
        f"inner_steps or images_per_class ({_said(error)})"
    )


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def training_networks(spec: TrialSpec, directory: SweepDirectory) -> Pool | None:
    """How the outer loop gets networks of the trial's pool: training ones only. Raises `DataError` for a pool
    that is not there or not whole."""
    pool = pool_of(spec, directory.pools)
    return None if pool is None else lambda indices: pool.networks("train", indices)


def validate(task: Task, state: DistillState, splits: Splits) -> float:
    """``val_score``: mean accuracy on the validation split after T steps, over ``selection`` networks (the
    known network of a ``fixed`` trial); of an attack, how often it succeeds. Neither the test set nor a
    held-out network is looked at."""
    spec, device = task.spec, state.images.device
    seeds = selection_seeds(spec)
    learned = averaged(state)
    found = evaluate_networks(
        task.network,
        task.networks(seeds),
        learned["images"],
        labels_of(learned, task),
        rates_of(task, learned, splits).tolist(),
        [spec.steps],
        splits.validation_images.to(device),
        splits.validation_labels.to(device),
        splits.mean,
        splits.std,
        task.plan,
        loop=evaluation_loop(spec, "selection", range(len(seeds)), spec.steps),
    )
    if spec.attack_class is not None and spec.target_class is not None:
        return float(found.called(spec.attack_class, spec.target_class).mean())
    return float(found.accuracy.mean())


def rates_of(task: Task, learned: Learned, splits: Splits) -> Tensor:
    """The rates ``[T]``: learned, or, of a method that learns none, one for all steps. That is chosen as the
    rate of a baseline is, by the accuracy of ``selection`` networks on validation images after T steps."""
    spec = task.spec
    learned_rates = method_of(spec).rates(learned, spec)
    if learned_rates is not None:
        return learned_rates
    seeds, epochs = selection_seeds(spec), [spec.inner_epochs]
    stride = -(-len(splits.validation_labels) // baselines.SELECTION_IMAGES)
    scores = score_rates(
        task.network,
        task.networks(seeds),
        learned["images"],
        labels_of(learned, task),
        baselines.RATES,
        epochs,
        splits.validation_images[::stride].to(task.plan.device),
        splits.validation_labels[::stride].to(task.plan.device),
        splits.mean,
        splits.std,
        task.plan,
        evaluation_loop(spec, "selection", range(len(seeds)), spec.steps),
    )
    best, _ = best_of(scores, baselines.RATES, epochs)
    return torch.full((spec.steps,), best)


def _start_images(spec: TrialSpec, splits: Splits) -> Tensor | None:
    """Where the images start, ``[S, n, c, h, w]``, if that takes more than a generator."""
    if spec.image_init != "kmeans":
        return None
    centres = baselines.kmeans_centres(
        splits.train_images,
        splits.train_labels,
        spec.dataset.classes,
        spec.images_per_class,
        splits.mean,
        splits.std,
    )
    return baselines.arrange(centres, spec.inner_steps)


def _told_at(run: _Run) -> Progress | None:
    """What was said at the step at which ``run`` is, if it was validated there."""
    row = run.history[-1] if run.history else {}
    if row.get("outer_step") != run.state.step or row["val_score"] is None:
        return None
    return Progress(run.state.step, 0, row["outer_loss"], row["val_score"], row["seconds"])


def _history_row(
    state: DistillState, report: StepReport, score: float | None, meter: Meter
) -> dict[str, Any]:
    return {
        "outer_step": state.step,
        "outer_loss": report.loss,
        "val_score": score,
        "grad_norm": report.grad_norm,
        "inner_lr_mean": report.inner_lr_mean,
        "n_skipped": report.n_skipped,
        "n_rollbacks": state.rollbacks,
        "seconds": meter.wall_seconds(),
    }


def record_failure(
    directory: SweepDirectory, spec: TrialSpec, sweep: str, error: Exception, place: str, attempts: int
) -> None:
    """Leave a row in ``failures/``; it goes away when the trial succeeds. Where the disk is full none is
    left: nobody who tells of a failure may fail himself."""
    row = {
        "trial_id": spec.trial_id,
        "sweep": sweep,
        "status": "diverged" if isinstance(error, DivergedError) else "failed",
        "error_class": type(error).__name__,
        "message": str(error),
        "place": place,
        "host": environment()["host"],
        "attempts": attempts,
        "failed_at": utc_now(),
    }
    with suppress(DiskFullError):
        write_part(directory.failure_part(spec.trial_id), [row], FAILURES, directory.temporary)


# ------------------------------------------------------------------------------------ checkpoints


def _to_device(state: DistillState, device: str) -> DistillState:
    return DistillState.of({k: v.to(device) for k, v in state.tensors().items()}, state.counters())


def _history_to_tensor(history: list[dict[str, Any]]) -> Tensor:
    """Logged rows as float64 ``[rows, columns]``, null as NaN: a number in a history is never NaN."""
    rows = [[math.nan if row[c] is None else float(row[c]) for c in _HISTORY_COLUMNS] for row in history]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(_HISTORY_COLUMNS))


def _history_from_tensor(rows: Tensor) -> list[dict[str, Any]]:
    whole = {"outer_step", "n_skipped", "n_rollbacks"}
    return [
        {
            name: None if math.isnan(value) else int(value) if name in whole else value
            for name, value in zip(_HISTORY_COLUMNS, row, strict=True)
        }
        for row in rows.tolist()
    ]


def _save_run(
    run: _Run,
    spec: TrialSpec,
    splits: Splits,
    directory: SweepDirectory,
    settings: TrialSettings,
    meter: Meter,
) -> None:
    """The checkpoint, and the history part that goes with it (readers may look at any time)."""
    header = {
        "kind": "checkpoint",
        "trial_id": spec.trial_id,
        "data": splits.fingerprint,
        "plan": run.plan.to_dict(),
        "counters": run.state.counters(),
        "started_at": run.started_at,
        "wall": meter.wall_seconds(),
        "cpu": meter.cpu_seconds(),
        "n_skipped": run.n_skipped,
        "n_resumed": run.n_resumed,
        "n_replans": run.n_replans,
        "peak": meter.peak_memory_bytes(),
        "provenance": _provenance(run, spec, splits, directory, settings, meter),
    }
    tensors = {**run.state.tensors(), "history": _history_to_tensor(run.history)}
    save_tensors(directory.checkpoint(spec.trial_id), tensors, header, directory.temporary)
    _write_history(run, spec, directory)


def _write_history(run: _Run, spec: TrialSpec, directory: SweepDirectory) -> None:
    rows = [{"trial_id": spec.trial_id, **row} for row in run.history]
    write_part(directory.history_part(spec.trial_id), rows, HISTORY, directory.temporary)


def _load_run(spec: TrialSpec, splits: Splits, directory: SweepDirectory) -> _Run | None:
    """The checkpointed run, if there is one. A torn checkpoint is moved aside."""
    path = directory.checkpoint(spec.trial_id)
    _move_aside_if_torn(path, spec, "checkpoint")
    if not path.exists():
        return None
    tensors, header = load_tensors(path)
    if header["data"] != splits.fingerprint:
        raise UserError(
            f"{path}: made from other images than {splits.name!r} holds now; put the data back, or remove "
            f"{path.parent} to start trial {spec.trial_id} again"
        )
    history = _history_from_tensor(tensors.pop("history"))
    return _Run(
        state=DistillState.of(tensors, header["counters"]),
        history=history,
        plan=ExecutionPlan.from_dict(header["plan"]),
        started_at=header["started_at"],
        wall=header["wall"],
        cpu=header["cpu"],
        n_skipped=header["n_skipped"],
        peak=header["peak"],
        n_resumed=header["n_resumed"] + 1,
        n_replans=header.get("n_replans", 0),  # checkpoints of before have none
    )


def checkpoint_provenance(spec: TrialSpec, directory: SweepDirectory) -> tuple[int, dict[str, Any]]:
    """Outer steps done at the checkpoint of ``spec``, and its columns of the ``trials`` table: what it has
    cost so far, where it was made, its last loss and score. Raises `CheckpointError` if it cannot be read."""
    _, header = load_tensors(directory.checkpoint(spec.trial_id))
    return header["counters"]["step"], header["provenance"]


def _move_aside_if_torn(path: Path, spec: TrialSpec, kind: str) -> None:
    """Rename a file that is damaged, of another trial, or of a run by a plan that this version cannot follow.
    One that cannot be read for another reason (want of permission, a failing disk) is left alone, and the
    `CheckpointError` raised."""
    if not path.exists():
        return
    try:
        _, header = load_tensors(path)
        if (header.get("trial_id"), header.get("kind")) != (spec.trial_id, kind):
            raise CheckpointError(f"{path}: not the {kind} of trial {spec.trial_id}")
        if kind == "checkpoint":
            ExecutionPlan.from_dict(header["plan"])
    except (CheckpointError, SettingError) as error:
        if isinstance(error.__cause__, OSError):
            raise
        number = 1
        while (aside := path.with_name(f"{path.name}.torn-{number}")).exists():
            number += 1
        path.rename(aside)
        _log.warning("trial %s starts again, %s is moved aside: %s", spec.trial_id, path.name, error)


def _check_device(plan: ExecutionPlan, spec: TrialSpec, directory: SweepDirectory) -> None:
    """A trial goes on where it began: another device would give other bits."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"trial {spec.trial_id} began on a GPU and none is to be seen here: run it where there is one, "
            f"or remove {directory.checkpoint(spec.trial_id)} to start it again on the CPU"
        )


# ---------------------------------------------------------------------------------- distilled set


def read_distilled(spec: TrialSpec, directory: SweepDirectory) -> DistilledSet:
    """The distilled set of ``spec``. Raises `CheckpointError` if it is missing, torn, or of another trial."""
    path = directory.distilled(spec.trial_id)
    distilled = DistilledSet.load(path)
    if distilled.spec.trial_id != spec.trial_id:
        raise CheckpointError(f"{path}: the distilled set of trial {distilled.spec.trial_id}")
    return distilled


def is_distilled(spec: TrialSpec, directory: SweepDirectory) -> bool:
    """Whether nothing is left to distil: the distilled set and its history are there and whole.

    A history alone that is torn is written again from the last checkpoint.
    """
    try:
        read_distilled(spec, directory)
    except CheckpointError:
        return False
    return is_whole(directory.history_part(spec.trial_id))


def _stored_labels(learned: Learned, task: Task) -> Tensor:
    """Class probabilities float32 ``[S, n, classes]`` if they were learned, else classes int64 ``[S, n]``."""
    labels = labels_of(learned, task).cpu()
    return labels.float() if labels.is_floating_point() else labels


def _finish_distillation(
    run: _Run,
    task: Task,
    splits: Splits,
    directory: SweepDirectory,
    settings: TrialSettings,
    meter: Meter,
) -> None:
    """History and picture first, distilled set last: its file says that the trial is distilled."""
    spec, learned = task.spec, final(run.state)
    rates = rates_of(task, learned, splits)
    distilled = DistilledSet(
        images=learned["images"].float().cpu(),
        labels=_stored_labels(learned, task),
        rates=rates.float().cpu(),
        mean=splits.mean,
        std=splits.std,
        class_names=splits.class_names,
        spec=spec,
        provenance=_provenance(run, spec, splits, directory, settings, meter),
    )
    _write_history(run, spec, directory)
    images = distilled.images
    image_grid(
        images if splits.whitening is None else splits.whitening.normalised(images),
        distilled.mean,
        distilled.std,
        task.labels,
        directory.grid(spec.trial_id),
        distilled.class_names,
        directory.temporary,
    )
    save_tensors(
        directory.distilled(spec.trial_id), distilled.tensors(), distilled.header(), directory.temporary
    )


def _provenance(
    run: _Run,
    spec: TrialSpec,
    splits: Splits,
    directory: SweepDirectory,
    settings: TrialSettings,
    meter: Meter,
) -> dict[str, Any]:
    """Columns of the ``trials`` table that are known where the trial is distilled."""
    wall, pool = meter.wall_seconds(), pool_of(spec, directory.pools)
    scores = [row["val_score"] for row in run.history if row["val_score"] is not None]
    if run.state.best_score is not None:
        scores.append(run.state.best_score)
    return {
        **environment(),
        "dataset_fingerprint": splits.fingerprint,
        "dataset_stand_in": splits.stand_in or (pool is not None and pool.stand_in),
        "network_version": None if (own := spec.network_spec.code) is None else version_of(own),
        "dataset_shape": "x".join(map(str, spec.dataset.shape)),
        "n_test_in_train": splits.test_in_train,
        "val_score": scores[-1] if scores else None,
        "outer_loss": run.history[-1]["outer_loss"] if run.history else None,
        "wall_seconds": wall,
        "cpu_seconds": meter.cpu_seconds(),
        "gpu_seconds": settings.gpus * wall,
        "peak_memory_bytes": meter.peak_memory_bytes(),
        "n_skipped": run.n_skipped,
        "n_rollbacks": run.state.rollbacks,
        "n_resumed": run.n_resumed,
        "n_torn_checkpoints": len(list(directory.artifacts(spec.trial_id).glob("*.torn-*"))),
        "device": run.plan.device,
        "device_name": device_name(run.plan.device),
        "threads": run.plan.threads,
        "memory_mode": run.plan.memory_mode,
        "execution_plan": json.dumps(run.plan.to_dict()),
        "n_replans": run.n_replans,
        "started_at": run.started_at,
        "ended_at": utc_now().isoformat(),
    }
