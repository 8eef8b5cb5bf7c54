"""Distilling one trial: from its first outer step, or its last checkpoint, to the set on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddsweep import baselines
from ddsweep.catalog import TrialSpec
from ddsweep.compilation import prepare_compilation
from ddsweep.core.distill import StepReport, initial_state
from ddsweep.core.execution import ExecutionPlan, runnable
from ddsweep.core.memory import keep_to_share, release_memory
from ddsweep.core.methods import labels_of
from ddsweep.core.networks import build_network
from ddsweep.core.outer import DistillState, final, rolled_back, scored
from ddsweep.core.task import Learned, Task
from ddsweep.data.splits import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import DivergedError, UserError
from ddsweep.provenance import Meter, utc_now
from ddsweep.results.artifacts import image_grid, save_tensors
from ddsweep.results.files import patiently
from ddsweep.results.layout import SweepDirectory
from ddsweep.trial.files import is_distilled, move_aside_if_torn
from ddsweep.trial.run_state import RunState, TrialJob, load_run, provenance, save_run, write_history
from ddsweep.trial.step import step_in_memory
from ddsweep.trial.validation import chosen_recipes, training_networks, validate
from ddsweep.trial_plan import TrialSettings, first_plan, ready_network

__all__ = ["Progress", "distil_trial"]


@dataclass(frozen=True)
class Progress:
    """The report of a running trial at each logged outer step. ``steps_taken`` counts since the last report,
    with steps that are taken again after a rollback."""

    outer_step: int
    steps_taken: int
    outer_loss: float | None
    val_score: float | None
    seconds: float


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
    that runs out of memory is taken again with a leaner plan, which is kept. Raises `DivergedError` when the
    trial cannot go on, `TooLargeError` when there is no such plan left, and `UserError` for a missing device.
    """
    try:
        return _distil(TrialJob(spec, splits, directory, settings), should_stop, on_progress)
    finally:
        release_memory()  # the process may live on, idle or with the next trial, beside others on the GPU


def _distil(job: TrialJob, should_stop: Callable[[], bool], on_progress: Callable[[Progress], None]) -> bool:
    spec, splits, directory, settings = job.spec, job.splits, job.directory, job.settings
    if is_distilled(spec, directory):
        return True
    if (spec.whitening == "none") != (splits.whitening is None):
        raise ValueError(f"whitening: the trial's is {spec.whitening}, the images were not loaded so")
    move_aside_if_torn(directory.distilled(spec.trial_id), spec, "distilled")
    ready_network(spec, directory.code)
    run = load_run(job)
    if run is not None and directory.distilled(spec.trial_id).exists():  # only its history was not whole
        write_history(run, spec, directory)
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
    task = Task.of(spec, plan, splits.train, training_networks(spec, directory))
    if run is None:
        run = RunState(initial_state(task, _start_images(spec, splits)), [], plan, utc_now().isoformat())
    run.state = _to_device(run.state, plan.device)
    meter = Meter(plan.device, run.wall, run.cpu, run.peak)

    def save() -> None:
        patiently(lambda: save_run(run, job, meter), should_stop)

    if run.state.step in settings.rungs and (told := _told_at(run)) is not None:
        on_progress(told)  # once more: the receiver may have died, or the trial was sent to wait here
    taken = 0
    while run.state.step < spec.outer_steps:
        if should_stop():
            save()
            return False
        try:
            task, report = step_in_memory(run, task, settings.gpus, save)
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
        # A rung of a scheduler must not decide which state is kept.
        if score is not None and (step == spec.outer_steps or step % spec.validate_every == 0):
            run.state = scored(run.state, spec, score)
        if logged:
            run.history.append(_history_row(run.state, report, score, meter))
        if decisive or step % settings.checkpoint_every == 0:
            save()
        if logged:  # last, because a stopped trial never returns from it
            on_progress(Progress(step, taken, report.loss, score, meter.wall_seconds()))
            taken = 0
    patiently(lambda: _finish_distillation(run, task, job, meter), should_stop)
    return True


def _start_images(spec: TrialSpec, splits: Splits) -> Tensor | None:
    """The images at the start, ``[S, n, c, h, w]``, if that takes more than a generator."""
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


def _told_at(run: RunState) -> Progress | None:
    """The report at the present step of ``run``, if it was validated there."""
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


def _to_device(state: DistillState, device: str) -> DistillState:
    return DistillState.of({k: v.to(device) for k, v in state.tensors().items()}, state.counters())


def _check_device(plan: ExecutionPlan, spec: TrialSpec, directory: SweepDirectory) -> None:
    """A trial goes on with the device where it began: another one would give other bits."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"trial {spec.trial_id} began on a GPU and none is to be seen here: run it where there is one, "
            f"or remove {directory.checkpoint(spec.trial_id)} to start it again on the CPU"
        )


def _stored_labels(learned: Learned, task: Task) -> Tensor:
    """Class probabilities float32 ``[S, n, classes]`` if they were learned, else classes int64 ``[S, n]``."""
    labels = labels_of(learned, task).cpu()
    return labels.float() if labels.is_floating_point() else labels


def _finish_distillation(run: RunState, task: Task, job: TrialJob, meter: Meter) -> None:
    """History and picture first, distilled set last: its file marks the trial as distilled."""
    spec, splits, directory = job.spec, job.splits, job.directory
    learned = final(run.state)
    rates, recipe, tuned = chosen_recipes(task, learned, splits)
    distilled = DistilledSet(
        images=learned["images"].float().cpu(),
        labels=_stored_labels(learned, task),
        rates=rates.float().cpu(),
        mean=splits.mean,
        std=splits.std,
        class_names=splits.class_names,
        spec=spec,
        recipe=recipe,
        tuned=tuned,
        provenance=provenance(run, job, meter),
    )
    write_history(run, spec, directory)
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
