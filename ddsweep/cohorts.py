"""Cohorts: trials of one shape, distilled together in one process.

Their networks are side by side in the same operations, which cost less for many networks than one after the
other. The numbers of a trial do not depend on its companions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from ddsweep.catalog import TrialSpec, measure_of
from ddsweep.catalog.methods import DEFAULT_METHOD
from ddsweep.cost import choose_memory, estimate, real_at_once_gpu

__all__ = [
    "FREE",
    "NETWORKS",
    "NETWORKS_GPU",
    "WIDEST",
    "Cohort",
    "Sharing",
    "cohort_key",
    "cohort_sizes",
    "dealt_out",
    "room_beside",
    "split_evenly",
    "why_alone",
    "why_in_turn",
]

NETWORKS = 16
"""The number of networks side by side from which on more of them gain nothing on a CPU core, where that was
not measured (``resources: auto``)."""

NETWORKS_GPU = 128
"""The same for a GPU."""

WIDEST = 512
"""No more networks side by side are tried when the best number is measured."""

MEMORY, MEMORY_GPU = 4e9, 16e9
"""Bytes that a cohort takes at most, by estimate, on the CPU and on a whole GPU."""

FREE = frozenset(
    {
        *("seed", "split_seed", "validation_fraction", "whitening"),
        *("objective", "attack_class", "target_class", "outer_augment", "init_law", "init_param"),
        *("image_init", "image_centre", "image_scale", "inner_lr", "inner_lr_mode", "rate_limit"),
        *("outer_steps", "outer_lr", "outer_lr_rates", "outer_lr_labels", "outer_cutoff", "outer_schedule"),
        *("outer_decay_steps", "outer_decay_factor", "ema", "keep", "max_rollbacks", "on_nonfinite"),
        *("trim", "clip_norm", "clip_median", "clip_running", "selection_networks", "validate_every"),
    }
)
"""The settings in which the trials of a cohort may differ. All others decide the shape of the computation."""


def why_alone(trial: TrialSpec) -> str | None:
    """Why trials like ``trial`` are never distilled together (docs/log/2026-11-29-cohorts.md has what was
    measured); None if they can be. Raises `UserError` for a network that was not measured."""
    if trial.method_code is not None:
        return "a method of your own takes one trial at a time"
    if trial.method != DEFAULT_METHOD:
        return f"{trial.method} takes one trial at a time"
    if measure_of(trial.network_spec, trial.dataset.shape, trial.dataset.classes).written_out:
        return None
    if trial.network_spec.code is not None:
        return "side by side, a network with derivatives by autograd would give other last digits than alone"
    return f"networks as large as {trial.network_spec.kind} are slower side by side"


def cohort_key(trial: TrialSpec) -> Hashable | None:
    """What trials that can be distilled together have in common; None for one that never is (`why_alone`)."""
    if why_alone(trial) is not None:
        return None
    return tuple((item.name, getattr(trial, item.name)) for item in fields(trial) if item.name not in FREE)


def cohort_sizes(
    trials: Sequence[TrialSpec],
    setting: int | str,
    *,
    compile: str = "auto",
    gpus: Sequence[float] = (),
    memory_mode: str = "auto",
    segment: int | None = None,
    networks: int | None = None,
) -> dict[str, int]:
    """For each trial, the most trials in its cohort, itself included: 1 for one that is alone.

    ``setting`` is that of ``resources.cohort``: a number, or ``auto``, which puts so many networks side by
    side that a core, or a GPU, is busy, as far as memory is sure to last. ``networks`` is that number, if it
    was measured. ``gpus`` are those of each trial (empty: none has any), and the rest are settings of
    ``resources``, too. Compiled trials are alone.
    """
    keys: list[Hashable] = []
    own = list(gpus) or [0.0] * len(trials)
    for trial, share in zip(trials, own, strict=True):
        key = None if compile == "on" else cohort_key(trial)
        keys.append(None if key is None else (key, share))
    alike = Counter(keys)
    rooms: dict[Hashable, int] = {}
    sizes = {}
    for trial, key, share in zip(trials, keys, own, strict=True):
        if key is not None and key not in rooms:
            auto = setting == "auto"
            rooms[key] = _room(trial, share, networks, memory_mode, segment) if auto else int(setting)
        sizes[trial.trial_id] = 1 if key is None else min(alike[key], rooms[key])
    return sizes


def why_in_turn(
    trials: Sequence[TrialSpec],
    sizes: Mapping[str, int],
    setting: int | str,
    *,
    compile: str = "auto",
    gpus: Sequence[float] = (),
    memory_mode: str = "auto",
    segment: int | None = None,
    more: bool = False,
) -> dict[str, int]:
    """Why those of ``trials`` that are alone by ``sizes`` (`cohort_sizes`, with the same arguments) are so:
    each reason with the number of its trials. ``cohort: 1`` needs no reason. With ``more`` trials to come,
    one without a companion may still get some."""
    if setting == 1 or len(trials) == 1:
        return {}
    found: Counter[str] = Counter()
    for trial, share in zip(trials, list(gpus) or [0.0] * len(trials), strict=True):
        if sizes[trial.trial_id] > 1:
            continue
        if (reason := why_alone(trial)) is None and compile == "on":
            reason = "compiled code is that of one trial (resources.compile: on)"
        if reason is None and setting == "auto":
            if _fills_a_device(trial, share > 0):
                device = "GPU" if share else "core"
                reason = f"{trial.models_per_step} networks an outer step fill a {device}"
            elif _room(trial, share, None, memory_mode, segment) == 1:
                reason = "two together would take too much memory by estimate"
        if reason is None and not more:
            reason = "no other trial has its shape"
        if reason is not None:
            found[reason] += 1
    return dict(found)


def _fills_a_device(trial: TrialSpec, on_gpu: bool) -> bool:
    """Whether ``trial`` keeps a GPU, or a CPU core, busy by itself, where that was not measured."""
    return trial.models_per_step > (NETWORKS_GPU // 2 if on_gpu else NETWORKS // 4)


def _room(trial: TrialSpec, gpus: float, networks: int | None, memory_mode: str, segment: int | None) -> int:
    """The most trials like ``trial`` that are worth being together, and are likely to fit: in their part of a
    GPU too."""
    on_gpu = gpus > 0
    if networks is None and _fills_a_device(trial, on_gpu):
        return 1
    networks = networks or (NETWORKS_GPU if on_gpu else NETWORKS)
    memory = MEMORY_GPU * min(1.0, gpus) if on_gpu else MEMORY
    mode, segment = choose_memory(trial, memory_mode, segment)
    at_once = real_at_once_gpu(trial) if on_gpu else 0
    needed = estimate(trial, 1, memory_mode=mode, segment=segment, real_at_once=at_once).memory_bytes
    return max(1, min(networks // trial.models_per_step, int(memory / needed)))


class Sharing(Protocol):
    """What dealing out asks of ``resources``."""

    @property
    def cohort(self) -> int | str: ...
    @property
    def compile(self) -> str: ...
    @property
    def max_concurrent(self) -> int | None: ...
    @property
    def memory_mode(self) -> str: ...
    @property
    def segment(self) -> int | None: ...
    def for_trial(self, trial: TrialSpec) -> tuple[float, float]: ...


def room_beside(
    trial: TrialSpec, resources: Sharing, most: int, networks: int | None = None
) -> tuple[Hashable, int]:
    """For a trial whose companions are not known yet: what they have in common with it, and how many there
    may be, itself included; with ``resources.cohort: auto`` at ``most`` so many. ``networks`` as in
    `cohort_sizes`."""
    need = resources.for_trial(trial)
    key = None if resources.compile == "on" else cohort_key(trial)
    if key is None:
        return trial.trial_id, 1
    if resources.cohort == "auto":
        room = _room(trial, need[1], networks, resources.memory_mode, resources.segment)
        return (key, need), max(1, min(most, room))
    return (key, need), int(resources.cohort)


@dataclass(frozen=True)
class Cohort:
    """Trials of one ``shape``, at most ``size`` of which are distilled together."""

    trials: tuple[TrialSpec, ...]
    size: int
    shape: Hashable


def dealt_out(
    trials: Sequence[TrialSpec],
    resources: Sharing,
    places: float,
    networks: int | None = None,
) -> list[Cohort]:
    """``trials`` in cohorts, in the order of the sweep: of one shape, with equal ``resources``, and none so
    large that one of so many ``places`` would have nothing to do. ``networks`` as in `cohort_sizes`."""
    needs = [resources.for_trial(trial) for trial in trials]
    gpus = [gpus for _, gpus in needs]
    sizes = cohort_sizes(
        trials,
        resources.cohort,
        compile=resources.compile,
        gpus=gpus,
        memory_mode=resources.memory_mode,
        segment=resources.segment,
        networks=networks,
    )
    most = min(max(1, -(-len(trials) // max(1, int(places)))), resources.max_concurrent or len(trials))
    alike: dict[Hashable, list[TrialSpec]] = {}
    for trial, need in zip(trials, needs, strict=True):
        alone = sizes[trial.trial_id] == 1
        shape: Hashable = trial.trial_id if alone else (cohort_key(trial), need)
        alike.setdefault(shape, []).append(trial)
    cohorts = []
    for shape, some in alike.items():
        size, first = min(sizes[some[0].trial_id], most), 0
        for count in split_evenly(len(some), size):
            cohorts.append(Cohort(tuple(some[first : first + count]), size, shape))
            first += count
    place = {trial.trial_id: number for number, trial in enumerate(trials)}
    return sorted(cohorts, key=lambda cohort: place[cohort.trials[0].trial_id])


def split_evenly(count: int, size: int) -> list[int]:
    """``count`` trials in as few cohorts of at most ``size`` as possible, of nearly equal numbers."""
    cohorts = -(-count // size)
    return [count // cohorts + (i < count % cohorts) for i in range(cohorts)]
