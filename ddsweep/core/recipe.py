"""How networks are trained on a distilled set, by the settings of the trial that made it."""

from __future__ import annotations

from collections.abc import Sequence

from ddsweep.catalog import TrialSpec
from ddsweep.core.inner import InnerOptimizer
from ddsweep.core.order import BatchOrder, draw_batch_order
from ddsweep.core.unroll import InnerLoop
from ddsweep.seeds import derive_seed

__all__ = ["batch_order", "evaluation_loop"]


def evaluation_loop(spec: TrialSpec, role: str, indices: Sequence[int], total: int) -> InnerLoop:
    """How networks ``indices`` of a role (``heldout``, ``selection``) are trained on the finished set for
    ``total`` steps: as in distillation, each in an order of its own, without augmentation."""
    optimizer = InnerOptimizer(spec.inner_optimizer, spec.inner_momentum)
    if spec.order == "fixed":
        return InnerLoop(optimizer)
    seeds = [derive_seed("heldout_order", spec.trial_id, role, i) for i in indices]
    return InnerLoop(optimizer, batch_order(spec, seeds, total))


def batch_order(spec: TrialSpec, seeds: Sequence[int], total: int) -> BatchOrder:
    """In which order networks with these ``seeds`` go through the batches of a set, for ``total`` steps."""
    sizes = (spec.inner_steps, spec.dataset.classes, spec.images_per_class_per_step, spec.steps)
    return draw_batch_order(spec.order, *sizes, seeds, total)
