"""The images as they are given: nothing is learned, so that the start itself is judged.

It is for sets that others made (`ddsweep import`), and for a start such as cluster centres. One rate and a
number of epochs are chosen on validation images, as for a baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddsweep.catalog import TrialSpec
from ddsweep.core.outer import NetworkGradients
from ddsweep.core.task import Learned, Task, network_seeds, soft_labels

__all__ = ["gradients", "rates", "start"]


def start(task: Task, images: Tensor) -> Learned:
    """``images``; with ``labels: soft`` also the labels ``[S, n, classes]`` of the start set, or the
    classes."""
    labels = soft_labels(task, images)
    return {"images": images} if labels is None else {"images": images, "labels": labels}


def rates(learned: Learned, spec: TrialSpec) -> Tensor | None:
    """None: there are no rates to learn."""
    return None


def gradients(task: Task, learned: Learned, step: int) -> NetworkGradients:
    """A loss of zero and its derivative, for no network needs to be looked at."""
    count = len(network_seeds(task.spec, step))
    by = {name: torch.zeros_like(value).expand(count, *value.shape) for name, value in learned.items()}
    return NetworkGradients(learned["images"].new_zeros(count), by)
