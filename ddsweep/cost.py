"""The cost of a trial, from its settings alone: operations, CPU time and memory. For ``plan``.

The estimates are good to a factor of two or three. They leave out the validation scores, and reading the
data. That of distilling leaves out the evaluation on held-out networks, which is `evaluation_seconds`.

One outer step unrolls K = ``models_per_step`` networks over T gradient steps on B = m x classes
synthetic images, and takes the loss of each on the real batch. With F operations for one forward pass
of one image, a gradient is about 3F (forward, and backward for inputs and weights), and going back
through a gradient step about 6F more:

    operations = outer_steps x K x (T x B x F x (3 + 6) + real_batch x F x 3)

``recompute`` adds 3F to each gradient step. It runs each step again on its way back. Distribution matching
trains no network: all distilled images go through each network there and back, and so many real ones there:

    operations = outer_steps x K x (S x B x F x 3 + real_per_class x classes x F)

Memory is what `bench/memory.py` measures (docs/performance.md): ``store`` keeps, for each of T steps,
weights, gradient and the outputs of all layers; ``recompute`` with segment k the weights of every k-th
step, and k steps' worth of the former while it goes back through one segment.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ddsweep.catalog import (
    BASELINE_RATES,
    METHODS,
    NEIGHBOUR_BASELINES,
    SELECTION_IMAGES,
    SELECTION_NETWORKS,
    EvaluationSpec,
    EvalUnit,
    Measure,
    Protocol,
    TrialSpec,
    epoch_grid,
    measure_of,
)

__all__ = [
    "CPU_GFLOPS_PER_THREAD",
    "SECONDS_PER_INNER_STEP",
    "STORE_AT_MOST",
    "CostEstimate",
    "choose_memory",
    "estimate",
    "evaluation_seconds",
    "matched_at_a_time",
    "protocol_seconds",
]

CPU_GFLOPS_PER_THREAD = 24.0
"""1e9 operations a second that one CPU thread reaches: LeNet, 8 networks, 30 steps, 256 real images take
1.0 to 1.2 s an outer step on one thread, `bench/meta_step.py` finds 14 to 40 (docs/performance.md)."""

SECONDS_PER_INNER_STEP = 0.003
"""The least cost of one gradient step: the calls that start its kernels, forth and back. Trials that are
distilled together share it. `bench/sweep.py` finds 0.0025 to 0.004 (docs/performance.md)."""

_GRADIENT, _BACK_THROUGH, _AGAIN = 3, 6, 3
"""In forward passes: a gradient, going back through it, and running it again under ``recompute``."""

_SECONDS_PER_STEP_FORTH = SECONDS_PER_INNER_STEP / 3
"""And of one that nothing goes back through."""

_TEST = 0.4
"""And a test, where nothing is kept: its operations take so much of the time of others. By the costs in the
headers of sweeps/mnist_random.yaml, mnist_further.yaml and cifar10_random_short.yaml it is 0.34 to 0.44."""

_COPIES, _COPIES_AUTOGRAD = 2, 5
"""Tensors kept for each output of a layer of an inner step: the output and its derivative; more if autograd
keeps the graph of the graph. Measured by `bench/memory.py` and rounded up."""

IN_CACHE = 2**22
"""Numbers that the layers of a network may give for the real images that it sees at a time, when nothing of
them is kept. More leave the cache of a CPU, which then waits for its memory (docs/performance.md)."""

REAL_AT_ONCE_GPU = 1024
"""Real images that go through a network at a time on a GPU (`ddsweep.core.execution.choose_plan`)."""

_SLOTS = {"gd": 0, "momentum": 1, "adam": 2}

STORE_AT_MOST = 2 * 2**30
"""With ``memory_mode: auto`` a trial keeps so many bytes of its inner steps before it recomputes them."""


@dataclass(frozen=True)
class CostEstimate:
    """The cost of one whole trial: floating-point operations, wall seconds on the CPU, bytes at the peak."""

    flops: float
    seconds_cpu: float
    memory_bytes: int


def choose_memory(trial: TrialSpec, memory_mode: str = "auto", segment: int | None = None) -> tuple[str, int]:
    """(memory mode, segment) of a trial. ``auto``: ``store`` if that takes at most `STORE_AT_MOST`, else
    ``recompute``. The default segment is the one that takes the least memory."""
    if trial.method != "bptt":  # it keeps nothing of steps
        return "store", 1
    steps = trial.window or trial.steps
    if memory_mode == "auto":
        stored = steps * _step_bytes(trial) <= STORE_AT_MOST
        memory_mode = "store" if stored else "recompute"
    if memory_mode == "store":
        return memory_mode, 1
    if segment is None:
        # This k gives the least sum of T/k points and the k steps of one segment, T or those of the window.
        segment = round(math.sqrt(steps * _point_bytes(trial) / _step_bytes(trial)))
    return memory_mode, min(steps, max(1, segment))


def matched_at_a_time(trial: TrialSpec) -> int:
    """The number of real images that go through a network at a time in distribution matching on the CPU."""
    return max(8, IN_CACHE // _measure(trial).outputs)


def estimate(
    trial: TrialSpec,
    threads: float,
    *,
    memory_mode: str = "store",
    segment: int = 1,
    together: int = 1,
    real_at_once: int = 0,
) -> CostEstimate:
    """The cost of distilling ``trial`` on ``threads`` CPU threads in a memory mode (see
    `ddsweep.core.execution.ExecutionPlan`): its share, if so many trials are distilled ``together``. Its
    memory has the outputs of layers for ``real_at_once`` real images, over all networks (on a GPU they are
    many, `real_at_once_gpu`). Raises `ValueError` if ``threads`` is not positive.
    """
    if not threads > 0:
        raise ValueError(f"threads must be positive, not {threads}")
    shape, classes = trial.dataset.shape, trial.dataset.classes
    networks, steps = trial.models_per_step, trial.window or trial.steps
    batch = trial.images_per_class_per_step * classes

    if trial.method == "given":
        return _search_alone(trial, threads)
    if trial.method != "bptt":
        return _matching(trial, threads)
    recompute = memory_mode == "recompute"
    factor = _GRADIENT + _BACK_THROUGH + (_AGAIN if recompute else 0)
    before = (trial.steps if trial.window is None else (trial.steps + trial.window) // 2) - steps
    real = _real_images(trial)
    passes = (steps * factor + before * _GRADIENT) * batch + real * _GRADIENT
    flops = float(trial.outer_steps * networks * passes * _measure(trial).flops)
    overhead = trial.outer_steps * steps * SECONDS_PER_INNER_STEP / together
    seconds = flops / (CPU_GFLOPS_PER_THREAD * 1e9 * threads) + overhead

    if recompute:
        inner = -(-steps // segment) * _point_bytes(trial) + min(segment, steps) * _step_bytes(trial)
    else:
        inner = steps * _step_bytes(trial)
    per_network = networks if trial.real_batch_mode == "per_network" else 1
    # Real images, and three sets of weights: the last weights, their gradient, and the adjoint.
    rest = _item(trial) * per_network * real * math.prod(shape) + 3 * _point_bytes(trial)
    rest += _item(trial) * real_at_once * _measure(trial).outputs * _COPIES
    return CostEstimate(flops, seconds, inner + rest)


def real_at_once_gpu(trial: TrialSpec) -> int:
    """The real images that go through at a time on a GPU, over all networks, as long as memory lasts
    (`ddsweep.core.execution.choose_plan`)."""
    networks = trial.models_per_step if _measure(trial).written_out else 1
    return networks * min(REAL_AT_ONCE_GPU, _real_images(trial)) if trial.method == "bptt" else 0


def protocol_seconds(
    trial: TrialSpec, evaluation: EvaluationSpec, protocol: Protocol, threads: float
) -> float:
    """Seconds on the CPU of training all held-out networks, in whole groups, on the set of ``trial`` under
    ``protocol``, tests left out: every epoch goes through all distilled images, in minibatches or not. 0 if
    it is impossible for the trial."""
    units = [unit for unit in evaluation.units(trial) if unit.changes == protocol]
    if not units:
        return 0.0
    used = protocol.applied_to(trial)
    networks = sum(_computed(unit, used) for unit in units)
    images = used.inner_epochs * trial.images_per_class * trial.dataset.classes
    flops = networks * images * _GRADIENT * _measure(used).flops
    steps = len(units) * evaluation.last_step(trial, protocol)
    return flops / (CPU_GFLOPS_PER_THREAD * 1e9 * threads) + steps * SECONDS_PER_INNER_STEP


def evaluation_seconds(trials: Iterable[TrialSpec], evaluation: EvaluationSpec, threads: float) -> float:
    """Seconds on the CPU of the whole evaluation of ``trials``: their sets and the baselines. Baselines count
    once for trials that share them: with as many images and steps, on the same networks."""
    alike: dict[tuple[Any, str], list[TrialSpec]] = defaultdict(list)
    for trial in trials:
        alike[_what_baselines_take(trial), trial.method].append(trial)
    flops, steps, counted = 0.0, 0, set()
    for (shared, _), some in alike.items():
        trial, new = some[0], shared not in counted
        counted.add(shared)
        search = True
        for unit in evaluation.units(trial):
            used = trial if unit.changes is None else unit.changes.applied_to(trial)
            tested, last = evaluation.steps(trial, unit.changes), evaluation.last_step(trial, unit.changes)
            # `inner_steps_beyond` goes on after the epochs.
            epochs = math.ceil(used.inner_epochs * max(1.0, tested[-1] / last))
            flops += len(some) * _judging(used, _computed(unit, used), epochs, len(tested))
            steps += len(some) * max(last, tested[-1])
            if unit.changes is None and not _learns_rates(trial):  # then it is judged at tuned rates as well
                longest = epoch_grid(trial.inner_steps, trial.inner_epochs)[-1]
                flops += len(some) * _judging(trial, _computed(unit, trial), longest, 1)
                steps += len(some) * longest * trial.inner_steps
            if unit.changes is None and new:
                of_baselines = _baselines(trial, unit, evaluation, search=search)
                flops, steps = flops + of_baselines[0], steps + of_baselines[1]
                search = False
    return flops / (CPU_GFLOPS_PER_THREAD * 1e9 * threads) + steps * _SECONDS_PER_STEP_FORTH


def _learns_rates(trial: TrialSpec) -> bool:
    """Whether the set has rates of its own. Methods of users' own may learn any; they are taken not to."""
    return trial.method in METHODS and "inner_lr_mode" not in trial.lacks


def _judging(trial: TrialSpec, networks: int, epochs: int, tests: int, on: int | None = None) -> float:
    """Operations of training so many networks on all images of a set for so many epochs, with tests ``on`` so
    many images (by default the test images)."""
    images = epochs * trial.images_per_class * trial.dataset.classes
    on = _test_images(trial) if on is None else on
    return float(networks * (images * _GRADIENT + tests * on * _TEST) * _measure(trial).flops)


def _baselines(
    trial: TrialSpec, unit: EvalUnit, evaluation: EvaluationSpec, *, search: bool
) -> tuple[float, int]:
    """Operations and inner steps of the baselines of one group; with the ``search`` for their rates."""
    networks, pixels = _computed(unit, trial), math.prod(trial.dataset.shape)
    epochs = epoch_grid(trial.inner_steps, trial.inner_epochs, evaluation.epochs)
    flops, steps = 0.0, 0
    for source in evaluation.baselines:
        if source in NEIGHBOUR_BASELINES:
            draws = len(unit.indices) if source == "knn_random" else int(search)
            images = trial.images_per_class * trial.dataset.classes
            flops += 2.0 * draws * _test_images(trial) * images * pixels
            continue
        for longest in (trial.inner_epochs, epochs[-1]):
            flops += _judging(trial, networks, longest, 1)
            steps += longest * trial.inner_steps
            if source == "optimized_random" and search:
                flops += evaluation.candidates * _judging(
                    trial, SELECTION_NETWORKS, longest, 1, SELECTION_IMAGES
                )
                steps += evaluation.candidates * longest * trial.inner_steps
        if search:
            of_one = _judging(trial, SELECTION_NETWORKS, epochs[-1], len(epochs), SELECTION_IMAGES)
            flops += len(evaluation.rates) * of_one
            steps += len(evaluation.rates) * epochs[-1] * trial.inner_steps
    return flops, steps


def _what_baselines_take(trial: TrialSpec) -> tuple[Any, ...]:
    """Trials that agree in these share their baselines. With one method their sets cost the same, too."""
    known = trial.seed if trial.init == "fixed" else None
    sizes = (trial.images_per_class, trial.inner_steps, trial.inner_epochs)
    networks = (trial.network, trial.init_law, trial.init_param, trial.pool and trial.pool.name, known)
    return (trial.dataset.name, *sizes, *networks, trial.inner_optimizer, trial.attack_class)


_TRAINING_IMAGES = {
    **{"digits": 1437, "mnist": 60_000, "fashion_mnist": 60_000, "usps": 7291, "cifar10": 50_000},
    **{"cifar10-exact": 40_000, "svhn": 73_257, "voc2007": 15_662, "cub200": 5994},
}
"""Of the catalog. Of users' own data their survey says it."""

_UNKNOWN = 10**9
"""Of data that were not looked at: then all that a trial asks for is taken."""

_TEST_IMAGES = {"digits": 360, "usps": 2007, "svhn": 26_032, "cub200": 5794}
"""Where it is not `_MOST_HAVE`. Of users' own data their survey says it."""

_MOST_HAVE = 10_000


def _test_images(trial: TrialSpec) -> int:
    if trial.dataset.survey is not None:
        return sum(trial.dataset.survey.test)
    return _TEST_IMAGES.get(trial.dataset.base_name, _MOST_HAVE)


def _computed(unit: EvalUnit, used: TrialSpec) -> int:
    """The networks of ``unit`` that are trained: a group is whole, whatever is wanted of it."""
    first = unit.group * unit.size
    if used.init == "fixed":
        return len(unit.indices)
    return unit.size if used.pool is None else min(unit.size, used.pool.heldout - first)


def _real_images(trial: TrialSpec) -> int:
    """The real images of an outer step: ``real_batch``, or all training images where there are fewer
    (`ddsweep.data.splits` says how many of each class go to validation)."""
    return min(trial.real_batch, sum(_kept(trial)))


def _kept(trial: TrialSpec) -> list[int]:
    """The training images of each class without those for validation."""
    if trial.dataset.survey is not None:
        counts: Sequence[int] = trial.dataset.survey.train
    else:
        classes = trial.dataset.classes
        counts = [_TRAINING_IMAGES.get(trial.dataset.base_name, _UNKNOWN) // classes] * classes
    return [max(1, n - min(max(1, round(trial.validation_fraction * n)), n - 1)) for n in counts]


def _measure(trial: TrialSpec) -> Measure:
    return measure_of(trial.network_spec, trial.dataset.shape, trial.dataset.classes)


def _matching(trial: TrialSpec, threads: float) -> CostEstimate:
    shape, classes, found = trial.dataset.shape, trial.dataset.classes, _measure(trial)
    distilled = trial.images_per_class * classes
    real = sum(min(trial.real_per_class, count) for count in _kept(trial))
    each = trial.models_per_step * (distilled * _GRADIENT + real) * found.flops
    flops = float(trial.outer_steps * each)
    seconds = flops / (CPU_GFLOPS_PER_THREAD * 1e9 * threads) + trial.outer_steps * SECONDS_PER_INNER_STEP
    outputs = (distilled + min(real, matched_at_a_time(trial))) * found.outputs * _COPIES
    images = _item(trial) * (outputs + (distilled + real) * math.prod(shape))
    return CostEstimate(flops, seconds, images + _point_bytes(trial))


def _search_alone(trial: TrialSpec, threads: float) -> CostEstimate:
    """Of a trial that learns nothing: the search for a rate and a number of epochs, after its outer steps."""
    epochs = epoch_grid(trial.inner_steps, trial.inner_epochs)
    networks = 1 if trial.init == "fixed" else trial.selection_networks
    flops = len(BASELINE_RATES) * _judging(trial, networks, epochs[-1], len(epochs), SELECTION_IMAGES)
    seconds = flops / (CPU_GFLOPS_PER_THREAD * 1e9 * threads)
    seconds += epochs[-1] * trial.inner_steps * _SECONDS_PER_STEP_FORTH
    return CostEstimate(flops, seconds, networks * (_step_bytes(trial) // trial.models_per_step))


def _item(trial: TrialSpec) -> int:
    return 8 if trial.dtype == "float64" else 4


def _point_bytes(trial: TrialSpec) -> int:
    """Weights of all networks, with the state of the inner optimiser."""
    parameters = _measure(trial).parameters
    return _item(trial) * trial.models_per_step * parameters * (1 + _SLOTS[trial.inner_optimizer])


def _step_bytes(trial: TrialSpec) -> int:
    """The values that ``store`` keeps of one inner step: a point, the gradient, and outputs of layers."""
    found = _measure(trial)
    copies = _COPIES if found.written_out else _COPIES_AUTOGRAD
    batch = trial.images_per_class_per_step * trial.dataset.classes
    kept = found.parameters + batch * found.outputs * copies
    return _point_bytes(trial) + _item(trial) * trial.models_per_step * kept
