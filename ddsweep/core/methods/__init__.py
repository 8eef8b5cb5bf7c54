"""Methods make the images. Each is one module behind one contract.

A method gives the start of its learned values, its outer gradient, and the way to apply a learned state.
`ddsweep.core.outer` has what is the same for all: averaging over networks, clipping, the outer optimiser, the
running mean, the best state and rolling back. State in, state out: everything random comes from (trial, role,
step), so a trial goes on bit for bit.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ddsweep.catalog import TrialSpec
from ddsweep.core.methods import bptt, distribution_matching
from ddsweep.core.outer import NetworkGradients
from ddsweep.core.task import Learned, Task

__all__ = ["METHODS", "Method", "labels_of", "method_of"]


class Method(Protocol):
    """The contract. A module fulfils it with functions of these names (`tests/core/test_methods.py`)."""

    def start(self, task: Task, images: Tensor) -> Learned:
        """The learned values at the start, with ``images [S, n, c, h, w]`` as the first images."""
        ...

    def gradients(self, task: Task, learned: Learned, step: int) -> NetworkGradients:
        """The outer loss of each network of outer step ``step``, and its exact derivative by the learned
        values.

        Networks do not mix: one that is not finite does not spoil others. Values that are not in ``by`` do
        not change.
        """
        ...

    def rates(self, learned: Learned, spec: TrialSpec) -> Tensor | None:
        """The learned rates ``[T]``, or None for a method without any. Then one rate for all T steps is
        chosen on validation images, like that of a baseline."""
        ...


METHODS: dict[str, Method] = {"bptt": bptt, "distribution_matching": distribution_matching}


def method_of(spec: TrialSpec) -> Method:
    return METHODS[spec.method]


def labels_of(learned: Learned, task: Task) -> Tensor:
    """Learned probabilities ``[S, n, classes]``, or the classes ``[S, n]``."""
    return learned.get("labels", task.labels)
