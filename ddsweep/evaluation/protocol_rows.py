"""A distilled set under a protocol of its own: other networks, order, optimiser, rates or epochs.

Images and labels stay those of the set, learned labels included. There are no baselines here: they use best
rates, which would answer another question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ddsweep.catalog import Protocol, TrialSpec
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.order import draw_batch_order
from ddsweep.core.unroll import InnerLoop
from ddsweep.distilled import DistilledSet
from ddsweep.evaluation.group import Group
from ddsweep.seeds import derive_seed

__all__ = ["protocol_rows"]


def protocol_rows(
    group: Group, protocol: Protocol, distilled: DistilledSet, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of the ``evals`` table (without trial id) of ``distilled`` on the networks of ``group``, at the
    inner steps ``steps``. The ``spec`` of ``group`` is that of the set with ``protocol`` applied to it."""
    rates = distilled.rates.tolist()
    if protocol.inner_lr is not None:
        rates = [protocol.inner_lr] * len(rates)
    loop = _loop(distilled.spec, group.spec, group.indices, max(steps))
    result = group.test(distilled.images, rates, steps, distilled.labels, loop)
    return group.rows(result, "distilled", group.unit.protocol, inner_lr=protocol.inner_lr)


def _loop(made: TrialSpec, used: TrialSpec, indices: Sequence[int], total: int) -> InnerLoop:
    """How held-out networks ``indices`` are trained for ``total`` steps: by the optimiser and in the order of
    ``used``, on a set with the rates of ``made``.

    Random orders are those that the networks have under ``as_distilled``: functions of the trial that made
    the set, and of the number of the network.
    """
    optimizer = InnerOptimizer(used.inner_optimizer, used.inner_momentum)
    if used.order == "fixed":
        return InnerLoop(optimizer)
    seeds = [derive_seed("heldout_order", made.trial_id, "heldout", index) for index in indices]
    sizes = (made.inner_steps, made.dataset.classes, made.images_per_class_per_step, made.steps)
    return InnerLoop(optimizer, draw_batch_order(used.order, *sizes, seeds, total))
