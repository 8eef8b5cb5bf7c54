"""Methods make the images. Each is one module behind one contract.

A method gives the start of its learned values, its outer gradient, and the way to apply a learned state.
`ddsweep.core.outer` has what is the same for all: averaging over networks, clipping, the outer optimiser, the
running mean, the best state and rolling back. State in, state out: everything random comes from (trial, role,
step), so a trial goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

from torch import Tensor

from ddsweep.catalog import CodeRef, TrialSpec
from ddsweep.core.methods import bptt, distribution_matching, given
from ddsweep.core.outer import NetworkGradients
from ddsweep.core.task import Learned, Task
from ddsweep.errors import UserError
from ddsweep.own_code import loaded_code

__all__ = ["METHODS", "Method", "Together", "labels_of", "method_of"]


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


@runtime_checkable
class Together(Method, Protocol):
    """A method that computes trials of one shape together (`ddsweep.cohorts`): optional, a matter of
    speed."""

    def together(
        self, tasks: Sequence[Task], learned: Sequence[Learned], steps: Sequence[int]
    ) -> list[NetworkGradients]:
        """`gradients` of each trial, with the same bits whatever trials are beside it. Steps may differ."""
        ...


METHODS: dict[str, Method] = {"bptt": bptt, "distribution_matching": distribution_matching, "given": given}


def method_of(spec: TrialSpec) -> Method:
    """The method of a trial. Raises `UserError` for a user's own whose code was not loaded, or makes none."""
    code = spec.method_code
    return METHODS[spec.method] if code is None else _own_method(code)


@lru_cache(maxsize=8)
def _own_method(ref: CodeRef) -> Method:
    """The object that the code makes with its options; one for all in a process."""
    factory = loaded_code(ref)
    try:
        made = factory(**ref.arguments)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"method: {ref}: calling it failed: {said}") from error
    lacking = [name for name in ("start", "gradients", "rates") if not callable(getattr(made, name, None))]
    if lacking:
        raise UserError(f"method: {ref}: what it gives has no {' and no '.join(lacking)} (docs/methods.md)")
    return made  # type: ignore[no-any-return]


def labels_of(learned: Learned, task: Task) -> Tensor:
    """Learned probabilities ``[S, n, classes]``, or the classes ``[S, n]``."""
    return learned.get("labels", task.labels)
