"""One trial between two outer steps: it begins from nothing or from its checkpoint, takes gradients, and ends
as a distilled set."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddsweep import baselines
from ddsweep.catalog import TrialSpec
from ddsweep.compilation import prepare_compilation
from ddsweep.core.distill import StepReport, initial_state
from ddsweep.core.execution import ExecutionPlan, runnable
from ddsweep.core.images import renormalised
from ddsweep.core.memory import keep_to_share
from ddsweep.core.methods import labels_of
from ddsweep.core.networks import build_network
from ddsweep.core.outer import DistillState, final, rolled_back, scored
from ddsweep.core.task import Learned, StartSet, Task
from ddsweep.data.splits import Splits
from ddsweep.distilled import DistilledSet
from ddsweep.errors import UserError
from ddsweep.provenance import Meter, utc_now
from ddsweep.results.artifacts import save_tensors
from ddsweep.results.files import patiently
from ddsweep.results.grid import image_grid
from ddsweep.results.layout import SweepDirectory
from ddsweep.start_set import check_start, set_digest, set_file
from ddsweep.tensor_file import read_header
from ddsweep.trial.files import is_distilled, move_aside_if_torn
from ddsweep.trial.run_state import RunState, TrialJob, load_run, provenance, save_run, write_history
from ddsweep.trial.validation import chosen_recipes, training_networks, validate
from ddsweep.trial_plan import first_plan, ready_network

__all__ = ["Progress", "RunningTrial"]


@dataclass(frozen=True)
class Progress:
    """The report of a running trial at each logged outer step. ``steps_taken`` counts since the last report,
    with steps that are taken again after a rollback. At a ``rung`` it asks whether it may go on."""

    outer_step: int
    steps_taken: int
    outer_loss: float | None
    val_score: float | None
    seconds: float
    rung: bool = False


class RunningTrial:
    """A trial of this process. ``should_stop`` ends the wait for space on a full disk. ``clocks`` are those
    of wall and CPU time at its start."""

    def __init__(
        self,
        job: TrialJob,
        run: RunState,
        task: Task,
        should_stop: Callable[[], bool],
        clocks: tuple[float, float],
    ) -> None:
        self.job, self.run, self.task = job, run, task
        self.meter = Meter(
            *(run.plan.device, run.wall, run.cpu, run.peak, run.seconds_of_others),
            _wall_start=clocks[0],
            _cpu_start=clocks[1],
        )
        self._should_stop, self._taken = should_stop, 0

    @classmethod
    def begin(cls, job: TrialJob, should_stop: Callable[[], bool]) -> RunningTrial | None:
        """The trial at its first outer step or its last checkpoint; None if it is distilled already. Raises
        `UserError` for a missing device."""
        clocks, started_at = (time.monotonic(), time.process_time()), utc_now().isoformat()
        spec, splits, directory, settings = job.spec, job.splits, job.directory, job.settings
        if is_distilled(spec, directory):
            return None
        if spec.whitening != ("none" if splits.whitening is None else splits.whitening.kind):
            raise ValueError(f"whitening: the trial's is {spec.whitening}, the images were not loaded so")
        move_aside_if_torn(directory.distilled(spec.trial_id), spec, "distilled")
        ready_network(spec, directory.code)
        run = load_run(job)
        if run is not None and directory.distilled(spec.trial_id).exists():  # only its history was not whole
            write_history(run, spec, directory)
            return None
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
            found = None if spec.start_set is None else _start_set(spec, splits, directory)
            state = initial_state(replace(task, start_set=found), _start_images(spec, splits))
            if found is not None and spec.keep == "best":  # it is not to end below its start set
                state = scored(state, spec, validate(task, state, splits))
            run = RunState(state, [], plan, started_at)
        run.state = _to_device(run.state, plan.device)
        return cls(job, run, task, should_stop, clocks)

    @property
    def spec(self) -> TrialSpec:
        return self.job.spec

    @property
    def steps_left(self) -> bool:
        return self.run.state.step < self.spec.outer_steps

    def save(self) -> None:
        """Write a checkpoint; a disk that is full is waited for."""
        patiently(lambda: save_run(self.run, self.job, self.meter), self._should_stop)

    def told_again(self) -> Progress | None:
        """The report at the rung where a trial begins: the receiver may have died, or the trial was sent to
        wait there."""
        run = self.run
        if run.state.step not in self.job.settings.rungs:
            return None
        row = run.history[-1] if run.history else {}
        if row.get("outer_step") != run.state.step or row["val_score"] is None:
            return None
        return Progress(run.state.step, 0, row["outer_loss"], row["val_score"], row["seconds"], rung=True)

    def roll_back(self) -> bool:
        """Back to the last healthy state; False if there is none left to go back to."""
        if (healthy := rolled_back(self.run.state, self.spec)) is None:
            return False
        self.run.state = healthy
        self.run.history = [row for row in self.run.history if row["outer_step"] <= healthy.step]
        return True

    def stepped(self, report: StepReport) -> Progress | None:
        """What follows an outer step: a score, a logged row, a checkpoint, as far as they are due. Returns
        the report, if there is one."""
        run, spec, settings = self.run, self.spec, self.job.settings
        run.n_skipped += report.n_skipped
        self._taken += 1
        step = run.state.step
        rung = step in settings.rungs
        decisive = step == spec.outer_steps or rung
        validated = decisive or step % spec.validate_every == 0
        logged = validated or step % settings.log_every == 0
        score = validate(self.task, run.state, self.job.splits) if validated else None
        # A rung of a scheduler must not decide which state is kept.
        if score is not None and (step == spec.outer_steps or step % spec.validate_every == 0):
            run.state = scored(run.state, spec, score)
        if logged:
            run.history.append(_history_row(run.state, report, score, self.meter))
        if decisive or step % settings.checkpoint_every == 0:
            self.save()
        if not logged:
            return None
        taken, self._taken = self._taken, 0
        return Progress(step, taken, report.loss, score, self.meter.wall_seconds(), rung=rung)

    def finish(self) -> None:
        """Write the distilled set."""
        patiently(self._finish, self._should_stop)

    def _finish(self) -> None:
        """History and picture first, distilled set last: its file marks the trial as distilled."""
        run, task, splits, directory = self.run, self.task, self.job.splits, self.job.directory
        spec, learned = self.spec, final(run.state)
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
            provenance=provenance(run, self.job, self.meter),
            imported=_origin(spec, directory),
        )
        write_history(run, spec, directory)
        images = distilled.images
        image_grid(
            images if splits.whitening is None else splits.whitening.normalised(images),
            distilled.mean,
            distilled.std,
            distilled.classes,
            directory.grid(spec.trial_id),
            distilled.class_names,
            directory.temporary,
        )
        save_tensors(
            directory.distilled(spec.trial_id), distilled.tensors(), distilled.header(), directory.temporary
        )


def _start_set(spec: TrialSpec, splits: Splits, directory: SweepDirectory) -> StartSet:
    """The set in which ``spec`` begins, from its copy. Raises `UserError` for a missing or altered copy, and
    for a set of other data: it may have seen images that the trial is judged by."""
    assert spec.start_set is not None
    check_start(spec, directory.sets)
    found = DistilledSet.load(set_file(directory.sets, spec.start_set))
    if set_digest(found.sha256) != spec.start_set:
        raise UserError(f"{set_file(directory.sets, spec.start_set)}: holds another set than its name says")
    if found.provenance.get("dataset_fingerprint", splits.fingerprint) != splits.fingerprint:
        raise UserError(
            f"image_init: {spec.image_init} was made on other files of {spec.dataset.name} than those that "
            "are here (or on stand-in data); a set is a start on its own data alone"
        )
    images, rates = found.images, None if found.spec.method == "given" else found.rates
    before, now = (found.mean, found.std), (splits.mean, splits.std)
    if before != now and spec.whitening == "none":  # measured on another training part: that of an import
        images = renormalised(images, before, now)
    return StartSet(images, found.labels, rates)


def _origin(spec: TrialSpec, directory: SweepDirectory) -> Mapping[str, Any] | None:
    """What the set in which ``spec`` begins says of the file that it was imported from: its images go on in
    the distilled set."""
    if spec.start_set is None:
        return None
    with suppress(OSError, ValueError):  # a trial that goes on needs its copy no more
        header, _ = read_header(set_file(directory.sets, spec.start_set).read_bytes())
        found: Mapping[str, Any] | None = header.get("imported")
        return found
    return None


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
