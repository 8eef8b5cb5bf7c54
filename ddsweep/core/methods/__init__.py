"""Methods: what makes the images. One module each, behind one contract.

A method says where what it learns starts, what its outer gradient is, and how a learned state is applied.
Averaging over networks, clipping, the outer optimiser, the running mean, the best state and rolling back are
`ddsweep.core.outer`'s and the same for all. State in, state out: everything random comes from
(trial, role, step), so a trial goes on bit for bit.
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
    """The contract, which a module fulfils with functions of these names (`tests/core/test_methods.py`)."""

    def start(self, task: Task, images: Tensor) -> Learned:
        """What is learned, with ``images [S, n, c, h, w]`` as where the images start."""
        ...

    def gradients(self, task: Task, learned: Learned, step: int) -> NetworkGradients:
        """The outer loss of each network of outer step ``step``, and its exact derivative by what is learned.

        Networks do not mix: one that is not finite spoils no other. What is not in ``by`` stays as it is.
        """
        ...

    def rates(self, learned: Learned, spec: TrialSpec) -> Tensor | None:
        """The learned rates ``[T]``, or None for a method that learns none: then one rate for all T steps is
        chosen on validation images, as that of a baseline is."""
        ...


METHODS: dict[str, Method] = {"bptt": bptt, "distribution_matching": distribution_matching}


def method_of(spec: TrialSpec) -> Method:
    return METHODS[spec.method]


def labels_of(learned: Learned, task: Task) -> Tensor:
    """Learned probabilities ``[S, n, classes]``, or the classes ``[S, n]``."""
    return learned.get("labels", task.labels)
