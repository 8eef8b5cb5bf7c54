"""Gradient descent on the distilled batches, and the exact derivative of what comes out of it.

Equations (2) and (4) of Wang et al. 2018, with epochs: for t = 0 .. T-1, T = S*E and s = t mod S,

    w[t+1] = w[t] - lr[t] * g[t],        g[t] = d/dw loss(w[t]; images[s], labels[s]).

The outer loss L is a function of w[T]. With v = dL/dw[T], and from t = T-1 down to 0,

    dL/dlr[t]       = -<v, g[t]>
    dL/dimages[s]  += -lr[t] * (dg[t]/dimages[s])^T v
    v              +=  -lr[t] * (dg[t]/dw[t])^T v

which is reverse accumulation done step by step: the graph of one step is alive at a time in memory
mode ``recompute`` (only w[t] is kept), those of all T steps in ``store``. Rates are softplus(raw).

Axes: K networks, S inner steps, n images a step, T = S*E. Every gradient has a leading K: networks do
not mix, so one that diverges spoils no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.core.execution import ExecutionPlan
from ddsweep.core.networks import Params, forward_networks
from ddsweep.core.objective import losses_per_network

__all__ = ["OuterGradient", "outer_gradient", "raw_rates", "train_networks"]


@dataclass(frozen=True)
class OuterGradient:
    """Of each network: outer loss ``[K]``, its derivative by images ``[K, S, n, c, h, w]`` and by raw
    rates ``[K, T]``, and the norm of both together ``[K]`` (float64: squares overflow float32 early)."""

    losses: Tensor
    images: Tensor
    raw_rates: Tensor

    @property
    def norms(self) -> Tensor:
        images, raw_rates = self.images.flatten(1).double(), self.raw_rates.double()
        return (images.square().sum(1) + raw_rates.square().sum(1)).sqrt()


@dataclass
class _Step:
    """What the backward pass needs of one inner step; ``gradient`` is None in memory mode recompute."""

    weights: list[Tensor]
    images: Tensor | None = None
    gradient: tuple[Tensor, ...] | None = None


def raw_rates(rate: float, steps: int) -> Tensor:
    """Raw rates ``[T]`` (float64) with softplus(raw) = ``rate``."""
    value = torch.tensor(rate, dtype=torch.float64)
    return (value + torch.log(-torch.expm1(-value))).repeat(steps)


def _inner_gradient(
    network: nn.Module,
    names: list[str],
    weights: list[Tensor],
    images: Tensor,
    labels: Tensor,
    batching: str,
    create_graph: bool,
) -> tuple[Tensor, ...]:
    """g[t] of every network, ``[K, ...]`` for each parameter: the sum over K keeps networks apart."""
    logits = forward_networks(network, dict(zip(names, weights, strict=True)), images, batching)
    return torch.autograd.grad(losses_per_network(logits, labels).sum(), weights, create_graph=create_graph)


def train_networks(
    network: nn.Module,
    params: Params,
    images: Tensor,
    labels: Tensor,
    rates: Sequence[float | Tensor],
    batching: str,
    start: int = 0,
) -> Params:
    """``params [K, ...]`` after one gradient step per entry of ``rates``; nothing is kept for a derivative.

    A rate is a number, or a tensor ``[K]`` with a rate for each network.

    ``images [S, n, c, h, w]`` (or ``[K, S, n, c, h, w]``), ``labels [S, n]``; step t, counted from
    ``start``, uses batch t mod S.
    """
    names, own = list(params), images.dim() == 6
    weights = [params[name] for name in names]
    for t, rate in enumerate(rates, start):
        s = t % labels.shape[0]
        leaves = [weight.detach().requires_grad_() for weight in weights]
        batch = images[:, s] if own else images[s]
        gradient = _inner_gradient(network, names, leaves, batch, labels[s], batching, False)
        weights = [leaf.detach() - _times(rate, g) for leaf, g in zip(leaves, gradient, strict=True)]
    return dict(zip(names, weights, strict=True))


def _times(rate: float | Tensor, gradient: Tensor) -> Tensor:
    """``gradient [K, ...]`` times a number, or times ``[K]`` numbers."""
    if isinstance(rate, Tensor):
        rate = rate.view(-1, *[1] * (gradient.dim() - 1))
    return rate * gradient


def _loss_and_gradient(
    network: nn.Module,
    names: list[str],
    weights: list[Tensor],
    images: Tensor,
    labels: Tensor,
    plan: ExecutionPlan,
) -> tuple[Tensor, list[Tensor]]:
    """Outer loss ``[K]`` on real images ``[N, ...]`` or ``[K, N, ...]`` and its gradient by the weights.

    The images go through in chunks whose gradients are summed, and under ``loop`` one network at a
    time, so that memory does not grow with N or K.
    """
    count, total = weights[0].shape[0], labels.shape[-1]
    groups = [slice(k, k + 1) for k in range(count)] if plan.real_batching == "loop" else [slice(0, count)]
    losses, gradients = [], []
    for group in groups:
        leaves = [weight[group].detach().requires_grad_() for weight in weights]
        loss = torch.zeros(leaves[0].shape[0], dtype=weights[0].dtype, device=weights[0].device)
        gradient = [torch.zeros_like(leaf) for leaf in leaves]
        for start in range(0, total, plan.real_chunk):
            x = images[..., start : start + plan.real_chunk, :, :, :]
            y = labels[..., start : start + plan.real_chunk]
            if x.dim() == 5:
                x, y = x[group], y[group]
            logits = forward_networks(network, dict(zip(names, leaves, strict=True)), x, plan.real_batching)
            part = losses_per_network(logits, y) * (y.shape[-1] / total)
            pieces = torch.autograd.grad(part.sum(), leaves)
            gradient = [a + b for a, b in zip(gradient, pieces, strict=True)]
            loss += part.detach()
        losses.append(loss)
        gradients.append(gradient)
    return torch.cat(losses), [torch.cat(parts) for parts in zip(*gradients, strict=True)]


def outer_gradient(
    network: nn.Module,
    params: Params,
    images: Tensor,
    labels: Tensor,
    raw: Tensor,
    real_images: Tensor,
    real_labels: Tensor,
    plan: ExecutionPlan,
) -> OuterGradient:
    """The outer loss of K networks and its exact derivative w.r.t. images and raw rates.

    ``params``: initial weights ``[K, ...]``, left untouched. ``images [S, n, c, h, w]``, ``labels [S, n]``
    int64, ``raw [T]`` with T a multiple of S. ``real_images [N, c, h, w]`` with ``real_labels [N]`` for
    all networks, or ``[K, N, ...]`` and ``[K, N]`` with a real batch for each. Raises ``ValueError`` if T
    is not a multiple of S.
    """
    inner_steps, total = labels.shape[0], raw.shape[0]
    if total % inner_steps:
        raise ValueError(f"{total} rates do not go into {inner_steps} inner steps")
    names, count = list(params), next(iter(params.values())).shape[0]
    rates = F.softplus(raw).tolist()
    store = plan.memory_mode == "store"

    def leaf_images(s: int) -> Tensor:
        return images[s].detach().expand(count, *images[s].shape).clone().requires_grad_()

    def step_gradient(step: _Step, s: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = leaf_images(s)
        return x, _inner_gradient(network, names, step.weights, x, labels[s], plan.inner_batching, True)

    tape: list[_Step] = []
    weights = [params[name] for name in names]
    for t in range(total):
        step = _Step([weight.detach().requires_grad_() for weight in weights])
        if store:
            step.images, step.gradient = step_gradient(step, t % inner_steps)
            gradient = step.gradient
        else:
            s = t % inner_steps
            gradient = _inner_gradient(
                network, names, step.weights, images[s].detach(), labels[s], plan.inner_batching, False
            )
        weights = [w.detach() - rates[t] * g.detach() for w, g in zip(step.weights, gradient, strict=True)]
        tape.append(step)

    losses, v = _loss_and_gradient(network, names, weights, real_images, real_labels, plan)

    grad_images = torch.zeros((count, *images.shape), dtype=images.dtype, device=images.device)
    grad_rates = torch.zeros((count, total), dtype=images.dtype, device=images.device)
    for t in reversed(range(total)):
        s, step = t % inner_steps, tape.pop()
        if step.images is None or step.gradient is None:
            step.images, step.gradient = step_gradient(step, s)
        grad_rates[:, t] = -sum(
            (a * g.detach()).flatten(1).sum(1) for a, g in zip(v, step.gradient, strict=True)
        )
        pulled = torch.autograd.grad(
            step.gradient, [step.images, *step.weights], [-rates[t] * a for a in v], materialize_grads=True
        )
        grad_images[:, s] += pulled[0]
        v = [a + b for a, b in zip(v, pulled[1:], strict=True)]
    return OuterGradient(losses, grad_images, grad_rates * torch.sigmoid(raw))
