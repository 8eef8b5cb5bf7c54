"""Distribution matching (Zhao and Bilen 2023, equation 6).

It moves the mean feature of each class's distilled images to that of its real ones, in networks that are not
trained:

    L_k = sum over classes c of | mean_i f_k(A(real_ci)) - mean_j f_k(A(distilled_cj)) |^2

f_k is network k without its last linear layer, and A one augmentation for all images of a step (siamese).
No network is trained, so no rates are learned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from ddsweep.catalog import TrialSpec, augmentation_parts
from ddsweep.core.ahead import pinned, sent
from ddsweep.core.augment import Augmentation, draw_augmentation
from ddsweep.core.images import sample_per_class
from ddsweep.core.networks import Params
from ddsweep.core.outer import NetworkGradients
from ddsweep.core.own_network import one_pass, traits_of
from ddsweep.core.task import Learned, Task
from ddsweep.errors import UserError
from ddsweep.seeds import derive_seed

__all__ = ["gradients", "rates", "start"]


def start(task: Task, images: Tensor) -> Learned:
    """``images`` alone."""
    return {"images": images}


def rates(learned: Learned, spec: TrialSpec) -> Tensor | None:
    """None: there are no rates to learn."""
    return None


def gradients(task: Task, learned: Learned, step: int) -> NetworkGradients:
    """The loss of each network and its derivative by the images."""
    spec = task.spec
    real_images, real_labels = _real_batch(task, step)
    augment = _augmentation(spec, step)
    classes = spec.dataset.classes
    real, distilled = (_class_means(labels, classes, task.dtype) for labels in (real_labels, task.labels))
    embedding, inputs = _embedding(task.network), augment(real_images)

    def distance(images: Tensor, weights: Params) -> Tensor:
        ours = _features(embedding, weights, augment(images.flatten(0, 1)))
        with torch.no_grad():  # few at a time, so that they stay in the cache
            pieces = torch.split(inputs, task.plan.real_chunk)
            theirs = torch.cat([_features(embedding, weights, piece) for piece in pieces])
        loss: Tensor = (real @ theirs - distilled @ ours).square().sum()
        return loss

    networks = task.outer_networks(step)
    held = (*embedding.named_parameters(), *embedding.named_buffers())
    kept = {name: networks[name] for name, _ in held}
    one = grad_and_value(distance) if traits_of(embedding) is None else _by_autograd(distance)
    if task.plan.real_batching == "vmap":
        by, losses = vmap(one, (None, 0))(learned["images"], kept)
        return NetworkGradients(losses, {"images": by})
    found = [
        one(learned["images"], {name: value[k] for name, value in kept.items()})
        for k in range(len(next(iter(kept.values()))))
    ]
    by, losses = (torch.stack(part) for part in zip(*found, strict=True))
    return NetworkGradients(losses, {"images": by})


def _features(embedding: nn.Module, weights: Params, images: Tensor) -> Tensor:
    """``[N, features]`` of one network, a user's own in a pass that judges (`ddsweep.core.own_network`)."""
    traits = traits_of(embedding)
    if traits is None:
        return functional_call(embedding, weights, (images,))  # type: ignore[no-any-return]
    return one_pass(embedding, weights, [name for name in traits.rest if name in weights], images, "judge")[0]


def _by_autograd(distance: Callable[[Tensor, Params], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """As ``grad_and_value``, within which a module may not write to its buffers."""

    def one(images: Tensor, weights: Params) -> tuple[Tensor, Tensor]:
        leaf = images.detach().requires_grad_()
        loss = distance(leaf, weights)
        return torch.autograd.grad(loss, leaf)[0], loss.detach()

    return one


@lru_cache(maxsize=8)
def _embedding(network: nn.Module) -> nn.Module:
    """``network`` without its last linear layer: its output is the input of that layer. Raises `UserError`
    for a user's own network whose logits do not come from a linear layer."""
    last = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]
    if traits := traits_of(network):
        last = [] if traits.head is None else [traits.head]
    if not last or not last[0]:
        raise UserError("method: distribution_matching: no linear layer (torch.nn.Linear) gives the logits")
    embedding = copy.deepcopy(network)
    parent, _, own = last[0].rpartition(".")
    setattr(embedding.get_submodule(parent), own, nn.Identity())
    return embedding


def _class_means(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """``[classes, N]``: times values of N images, their mean over each class."""
    belongs = F.one_hot(labels.flatten(), classes).T.to(dtype)
    return belongs / belongs.sum(1, keepdim=True)


def _augmentation(spec: TrialSpec, step: int) -> Augmentation:
    """One draw of ``outer_augment`` for all images of a step, real and distilled."""
    parts = augmentation_parts("outer_augment", spec.outer_augment, spec.dataset.name)
    generator = torch.Generator().manual_seed(derive_seed("augment", spec.trial_id, "outer", step))
    return draw_augmentation(parts, 1, spec.dataset.shape[1], generator)


def _real_batch(task: Task, step: int) -> tuple[Tensor, Tensor]:
    """``real_per_class`` real images of each class, ``[N, c, h, w]``, and their classes ``[N]``."""
    device = task.real.pixels.device
    batch = task.real.take(sent(task.drawn("real_batch", step, _draw_real), device))
    return batch.normalised(task.dtype), batch.labels


def _draw_real(task: Task, step: int) -> Tensor:
    spec = task.spec
    generator = torch.Generator().manual_seed(derive_seed("real_batch", spec.trial_id, step))
    picks = sample_per_class(task.real_labels, spec.dataset.classes, spec.real_per_class, generator)
    return pinned(picks.flatten(), task.real.pixels.device)
