"""The passes that an unroll needs of K networks: logits, the gradient of the loss, and the derivative of that
gradient.

There are two ways with the same mathematics: `Explicit` for networks whose layers have their derivatives
written out (`ddsweep.core.layers`), `Autograd` for any module. Images are ``[n, c, h, w]`` (all networks see
the same) or ``[K, n, c, h, w]``; targets are labels, int64 ``[n]`` or ``[K, n]``, or learned class
probabilities ``[n, classes]`` or ``[K, n, classes]``. `Explicit` also takes ``[G, ...]`` with G a divisor of
K: K/G networks in a row see the same.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.explicit import Explicit, GradientVjp
from ddsweep.core.networks import Params, forward_networks
from ddsweep.core.objective import losses_per_network
from ddsweep.core.own_network import Kind, parts, written_out

__all__ = [
    "Autograd",
    "Derivatives",
    "Functional",
    "derivatives_of",
    "no_bookkeeping",
]


class Derivatives(Protocol):
    """``params`` of a user's own network are all that it holds (`ddsweep.core.own_network`), gradients by its
    weights. `logits` are those of a test pass, `gradient` is of an inner step, `loss_and_gradient` judges."""

    def logits(self, params: Params, images: Tensor) -> Tensor:
        """``[K, n, classes]``."""
        ...

    def gradient(self, params: Params, images: Tensor, targets: Tensor, keep: bool) -> tuple[Params, Any]:
        """g, the gradient of the mean loss of each network by its weights; and, if ``keep``, the values that
        `vjp` needs to go back through it."""
        ...

    def vjp(self, params: Params, kept: Any, v: Params) -> GradientVjp: ...

    def loss_and_gradient(self, params: Params, images: Tensor, targets: Tensor) -> tuple[Tensor, Params]:
        """Mean loss of each network ``[K]``, and its gradient by the weights."""
        ...


def derivatives_of(network: nn.Module, batching: str) -> Derivatives:
    """``batching``: ``explicit``, or autograd under ``vmap`` or in a ``loop`` over networks.

    Raises ``ValueError`` for ``explicit`` and a network whose layers are not written out.
    """
    if batching != "explicit":
        return Autograd(network, batching)
    layers = written_out(network)
    if layers is None:
        raise ValueError(f"batching explicit: {type(network).__name__} has no layers written out")
    return Explicit(layers)


def no_bookkeeping(plan: ExecutionPlan) -> AbstractContextManager[object]:
    """Within it torch records nothing for autograd, if all derivatives of ``plan`` are written out on the
    CPU: recording takes some of the time of every small operation. (A GPU's recordings are written to from
    outside.) Autograd refuses tensors that were made within it, so returned tensors must be copied
    outside."""
    explicit = plan.inner_batching == plan.real_batching == "explicit"
    if explicit and plan.device == "cpu" and not plan.compile:
        return torch.inference_mode()
    return nullcontext()


# --------------------------------------------------------------------------------------- autograd


@dataclass(frozen=True)
class Autograd:
    network: nn.Module
    batching: str

    def logits(self, params: Params, images: Tensor, kind: Kind = "test") -> Tensor:
        return forward_networks(self.network, params, images, self.batching, kind)

    def gradient(self, params: Params, images: Tensor, targets: Tensor, keep: bool) -> tuple[Params, Any]:
        trained, rest = parts(self.network, params)
        names, count = list(trained), next(iter(trained.values())).shape[0]
        weights = [value.detach().requires_grad_() for value in trained.values()]
        if keep:  # leaves for each network, so that derivatives by images and targets stay separate
            images = images.detach().expand(count, *images.shape[-4:]).clone().requires_grad_()
            if targets.is_floating_point():
                targets = targets.detach().expand(count, *targets.shape[-2:]).clone().requires_grad_()
        logits = self.logits({**dict(zip(names, weights, strict=True)), **rest}, images, "train")
        loss = losses_per_network(logits, targets).sum()
        gradient = torch.autograd.grad(loss, weights, create_graph=keep, materialize_grads=True)
        found = dict(zip(names, (g.detach() for g in gradient), strict=True))
        return found, (gradient, images, targets, weights) if keep else None

    def vjp(self, params: Params, kept: Any, v: Params) -> GradientVjp:
        gradient, images, targets, weights = kept
        leaves = [images, *weights, *([targets] if targets.requires_grad else [])]
        # A weight that no pass uses has a gradient of zeros, without a way back.
        along = [(g, a) for g, a in zip(gradient, v.values(), strict=True) if g.requires_grad]
        outputs, directions = zip(*along, strict=True)
        found = torch.autograd.grad(outputs, leaves, directions, materialize_grads=True)
        by_weights = dict(zip(v, found[1:], strict=False))
        return GradientVjp(by_weights, found[0], found[-1] if targets.requires_grad else None)

    def loss_and_gradient(self, params: Params, images: Tensor, targets: Tensor) -> tuple[Tensor, Params]:
        trained, rest = parts(self.network, params)
        leaves = {name: value.detach().requires_grad_() for name, value in trained.items()}
        losses = losses_per_network(self.logits({**leaves, **rest}, images, "judge"), targets)
        gradient = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
        return losses.detach(), dict(zip(leaves, gradient, strict=True))


class Functional(Autograd):
    """The same by ``torch.func``, which ``torch.compile`` can trace from end to end."""

    def _losses(self, params: Params, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = losses_per_network(self.logits(params, images), targets)
        return losses.sum(), losses

    def gradient(self, params: Params, images: Tensor, targets: Tensor, keep: bool) -> tuple[Params, Any]:
        if not keep:
            return grad(self._losses, has_aux=True)(params, images, targets)[0], None
        count = next(iter(params.values())).shape[0]
        images = images.expand(count, *images.shape[-4:])
        soft = (targets.expand(count, *targets.shape[-2:]),) if targets.is_floating_point() else ()

        def by_weights(weights: Params, x: Tensor, *y: Tensor) -> Params:
            found: Params = grad(self._losses, has_aux=True)(weights, x, *(y or (targets,)))[0]
            return found

        found, back = vjp(by_weights, params, images, *soft)[:2]
        return found, back

    def vjp(self, params: Params, kept: Any, v: Params) -> GradientVjp:
        weights, images, *targets = kept(v)
        return GradientVjp(weights, images, targets[0] if targets else None)

    def loss_and_gradient(self, params: Params, images: Tensor, targets: Tensor) -> tuple[Tensor, Params]:
        gradient, losses = grad(self._losses, has_aux=True)(params, images, targets)
        return losses, gradient
