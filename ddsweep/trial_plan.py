"""How a trial runs: settings that do not enter its id, and its execution plan."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ddsweep.catalog import TrialSpec, augmentation_parts
from ddsweep.catalog.measures import is_measured, remember
from ddsweep.compilation import compiles
from ddsweep.core.execution import ExecutionPlan, choose_plan
from ddsweep.core.measure import measure
from ddsweep.core.networks import build_network
from ddsweep.cost import choose_memory, matched_at_a_time
from ddsweep.errors import GpuLostError, UserError
from ddsweep.results.code import load_code_of

__all__ = ["TrialSettings", "first_plan", "pick_device", "ready_network"]


@dataclass(frozen=True)
class TrialSettings:
    """How a trial runs; no field enters its id. ``gpus`` is the granted fraction of a GPU.

    After each of the outer steps ``rungs`` the trial is validated and checkpointed before it reports: it may
    be stopped there for good.
    """

    device: str = "auto"
    threads: int = 1
    gpus: float = 0.0
    memory_mode: str = "auto"
    segment: int | None = None
    compile: str = "auto"
    checkpoint_every: int = 50
    log_every: int = 10
    rungs: tuple[int, ...] = ()
    cohort: int = 1
    """the most trials that are distilled together with this one, itself included"""


def pick_device(setting: str, gpus: float) -> torch.device:
    """``auto`` is CUDA if and only if a GPU was granted; one that torch does not see is an error."""
    if setting == "cpu" or (setting == "auto" and gpus == 0):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        asked = "device: cuda" if setting == "cuda" else f"gpus: {gpus:g}"
        raise UserError(
            f"resources: {asked}, but torch {torch.__version__} sees no GPU here; set device: cpu and "
            "gpus: 0, or use a machine with a CUDA driver"
        )
    return torch.device("cuda")


def check_gpu_seen(setting: str, granted: float, who: str) -> None:
    """Raises `GpuLostError` if torch sees no GPU where one was granted: it is dead, or its driver is, and
    others take the work. (A torch that was built without GPUs is another fault: see `pick_device`.)"""
    if not granted or setting == "cpu" or torch.cuda.is_available():
        return
    if torch.version.cuda is not None or torch.version.hip is not None:
        raise GpuLostError(
            f"{who} was granted a GPU of {socket.gethostname()}, and torch {torch.__version__} sees none "
            "there: see what nvidia-smi says on that node; if it has no GPU, set device: cpu and gpus: 0"
        )


def ready_network(spec: TrialSpec, code: Path) -> None:
    """Run the code of a user's own network from its copy in ``code``, and measure it, as every process that
    runs trials must. For other networks it does nothing. Raises `UserError` for a copy that does not match
    the id."""
    load_code_of([spec], code)
    problem = (spec.network_spec, spec.dataset.shape, spec.dataset.classes)
    if not is_measured(*problem):
        remember(*problem, measure(build_network(*problem), spec.dataset.shape))


def first_plan(spec: TrialSpec, settings: TrialSettings) -> ExecutionPlan:
    """The plan that a trial begins with. Raises `UserError` for a missing device or compiler."""
    device = pick_device(settings.device, settings.gpus)
    network = build_network(spec.network_spec, spec.dataset.shape, spec.dataset.classes)
    mode, segment = choose_memory(spec, settings.memory_mode, settings.segment)
    plan = choose_plan(
        device,
        settings.threads,
        network,
        networks=spec.models_per_step,
        # Compiled code is that of one trial: trials together gain more than it.
        compile=(settings.cohort == 1 or settings.compile == "on")
        and compiles(settings.compile, device, spec),
        graph=_records_a_graph(spec),
        native=settings.compile != "off",
    )
    if settings.cohort > 1 and device.type != "cpu":
        plan = replace(plan, width=settings.cohort)
    if spec.method == "distribution_matching" and device.type == "cpu" and not plan.whole_batches:
        plan = replace(plan, real_chunk=matched_at_a_time(spec))
    # Real images go through trial by trial also in a cohort: the sums have the same order.
    block = min(plan.real_block, spec.models_per_step)
    return replace(plan, memory_mode=mode, segment=segment, real_block=block)


def _records_a_graph(spec: TrialSpec) -> bool:
    """Whether all outer steps of ``spec`` are the same work on other numbers. Windows and augmentations
    differ from step to step."""
    return spec.window is None and not augmentation_parts(
        "inner_augment", spec.inner_augment, spec.dataset.name
    )
