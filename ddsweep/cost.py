"""What a trial will cost, from its settings alone: operations, CPU time and memory. For ``plan``.

An estimate to choose settings by, good to a factor of two or three. Left out: the validation scores,
the evaluation on held-out networks, and reading the data.

One outer step unrolls K = ``models_per_step`` networks over T gradient steps on B = m x classes
synthetic images, and takes the loss of each on the real batch. With F operations for one forward pass
of one image, a gradient is about 3F (forward, and backward for inputs and weights), and going back
through a gradient step about 6F more:

    operations = outer_steps x K x (T x B x F x (3 + 6) + real_batch x F x 3)

``recompute`` adds 3F to each gradient step. It runs each step again on its way back.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddsweep.catalog import TrialSpec, forward_flops, layer_shapes, parameter_count

__all__ = ["CPU_GFLOPS_PER_THREAD", "SECONDS_PER_INNER_STEP", "CostEstimate", "estimate"]

CPU_GFLOPS_PER_THREAD = 8.0
"""1e9 operations a second that one CPU thread reaches on these small convolutions: as `bench/meta_step.py`
measures for LeNet on a Xeon of 2.5 GHz (docs/performance.md)."""

SECONDS_PER_INNER_STEP = 0.010
"""What one gradient step costs however small its work: the calls that start its kernels, there and back.
Measured on the same machine: 12 steps of two small ConvNets on digits take 0.19 s an outer step, 10 steps
of one LeNet on MNIST 0.23 s, of which this is more than half."""

_GRADIENT, _BACK_THROUGH, _AGAIN = 3, 6, 3
"""In forward passes: a gradient; going back through it; running it again under ``recompute``."""

_COPIES = 3
"""Tensors kept for each output of a layer: before and after the nonlinearity, and the derivative."""


@dataclass(frozen=True)
class CostEstimate:
    """Of one whole trial: floating-point operations, wall seconds on the CPU, bytes at the peak."""

    flops: float
    seconds_cpu: float
    memory_bytes: int


def estimate(trial: TrialSpec, threads: float, *, recompute: bool = False) -> CostEstimate:
    """The cost of distilling ``trial`` on ``threads`` CPU threads.

    ``recompute`` is the memory mode in which only the parameters are kept for each gradient step.
    Raises `ValueError` if ``threads`` is not positive.
    """
    if not threads > 0:
        raise ValueError(f"threads must be positive, not {threads}")
    shape, classes, network = trial.dataset.shape, trial.dataset.classes, trial.network_spec
    networks, steps = trial.models_per_step, trial.steps
    batch = trial.images_per_class_per_step * classes

    factor = _GRADIENT + _BACK_THROUGH + (_AGAIN if recompute else 0)
    passes = steps * batch * factor + trial.real_batch * _GRADIENT
    flops = float(trial.outer_steps * networks * passes * forward_flops(network, shape, classes))
    overhead = trial.outer_steps * steps * SECONDS_PER_INNER_STEP
    seconds = flops / (CPU_GFLOPS_PER_THREAD * 1e9 * threads) + overhead

    item = 8 if trial.dtype == "float64" else 4
    # The parameters after every step, their gradient, and the adjoint that runs backwards.
    parameters = networks * (steps + 2) * parameter_count(network, shape, classes)
    outputs = sum(layer[2] * layer[4] ** 2 for layer in layer_shapes(network, shape, classes))
    # The real batch is done with before the way back begins; `store` holds all its steps meanwhile.
    images = max(trial.real_batch, batch) if recompute else trial.real_batch + batch * steps
    return CostEstimate(flops, seconds, item * (parameters + networks * images * outputs * _COPIES))
