"""Applying a distilled set to a group of networks, and counting right answers on real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddsweep.core.derivatives import derivatives_of, no_bookkeeping
from ddsweep.core.execution import ExecutionPlan, smaller_test
from ddsweep.core.images import LabelledImages, RealSet
from ddsweep.core.inner import Rate
from ddsweep.core.layers import Params
from ddsweep.core.measure import measure
from ddsweep.core.memory import fitted
from ddsweep.core.native import native_logits
from ddsweep.core.own_network import traits_of
from ddsweep.core.precision import products
from ddsweep.core.teams import in_teams
from ddsweep.core.training import InnerLoop, TrainState, rate_at, train_networks

__all__ = ["Evaluation", "count_right", "evaluate_networks"]

TRAINED_AT_ONCE_BYTES = 2 * 2**30
"""The most that a training step of networks side by side may keep on the CPU, but for a single one."""

_KEPT = 4
"""What a step keeps of an image, in outputs of all layers with weights: a ConvNet of width 128 was found to
keep 4.2."""


@dataclass(frozen=True)
class Evaluation:
    """For each chosen inner step and network: ``accuracy``, ``loss`` and ``diverged``, all ``[steps, K]``,
    and ``confusion [steps, K, classes, classes + 1]``, the counts of answers for each class. Accuracies are
    fractions and never NaN: an image with a logit that is not finite is answered wrongly (the last column).
    Its network is marked as diverged, and has a loss of NaN."""

    steps: tuple[int, ...]
    accuracy: Tensor
    loss: Tensor
    diverged: Tensor
    confusion: Tensor

    def called(self, actual: int, predicted: int) -> Tensor:
        """The fraction ``[steps, K]`` of the images of class ``actual`` that were called ``predicted``."""
        row = self.confusion[:, :, actual].double()
        return row[..., predicted] / row.sum(-1)

    def accuracy_without(self, left_out: int) -> Tensor:
        """Accuracy ``[steps, K]`` on the images of all classes but ``left_out``."""
        kept = [c for c in range(self.confusion.shape[2]) if c != left_out]
        rows = self.confusion[:, :, kept].double()
        right = torch.stack([rows[:, :, i, c] for i, c in enumerate(kept)]).sum(0)
        return right / rows.sum((2, 3))


def count_right(
    network: nn.Module, params: Params, test: RealSet, plan: ExecutionPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(accuracy, mean loss, diverged, confusion) on the CPU, of K networks on all the images: ``[K]`` each,
    and ``[K, classes, classes + 1]``.

    ``test`` is on the device of ``params``; its N images are normalised and passed on in batches of
    ``plan.test_chunk``, to ``plan.test_block`` networks at a time; fewer if memory runs out although no
    recording holds any. Counts are exact, and logits are equal up to rounding for any batch. So an answer
    could only change if two logits are that close.
    """
    count = len(next(iter(params.values())))

    def work() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with products(plan.device):
            return _count_right(network, params, test, plan)

    def shrink(error: Exception) -> bool:
        nonlocal plan
        smaller = smaller_test(plan, count, len(test))
        plan = smaller or plan
        return smaller is not None

    return fitted(work, shrink)


def _count_right(
    network: nn.Module, params: Params, test: RealSet, plan: ExecutionPlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`count_right` by the plan, with any memory that it takes."""
    weight = next(iter(params.values()))
    native = native_logits(network) if plan.native and weight.dtype == torch.float32 else None
    logits_of = (native or derivatives_of(network, plan.real_batching)).logits
    # On the CPU, torch's max-pool takes ten times as long if the channels do not lie innermost. A user's own
    # network may count on where they lie.
    channels_last = plan.device == "cpu" and plan.real_batching == "loop" and traits_of(network) is None
    count = len(weight)
    blocks = [slice(first, first + plan.test_block) for first in range(0, count, plan.test_block)]
    confusion: Tensor | None = None
    loss = torch.zeros(count, dtype=torch.float64, device=weight.device)
    finite = torch.ones(count, dtype=torch.bool, device=weight.device)
    with torch.no_grad():
        for start in range(0, len(test), plan.test_chunk):
            batch = test.take(slice(start, start + plan.test_chunk))
            x = batch.normalised(weight.dtype)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            logits = torch.cat(
                [logits_of({name: value[block] for name, value in params.items()}, x) for block in blocks]
            )
            y = batch.labels.expand(count, -1)
            usable = torch.isfinite(logits).all(-1)
            answers = torch.where(usable, logits.argmax(-1), logits.shape[-1])
            counts = _counts(y, answers, logits.shape[-1])
            confusion = counts if confusion is None else confusion + counts
            finite &= usable.all(1)
            # In float64: large but finite logits of a network that is about to diverge overflow float32.
            each = F.cross_entropy(logits.flatten(0, 1).double(), y.reshape(-1), reduction="none")
            loss += each.view(y.shape).sum(1)
    assert confusion is not None
    confusion, loss, finite = confusion.cpu(), loss.cpu(), finite.cpu()
    right = confusion.diagonal(dim1=1, dim2=2).sum(1)
    # Divided on the CPU: a GPU multiplies by the inverse, and the last bit would differ.
    loss = torch.where(finite, loss / len(test), torch.nan)
    return right.double() / len(test), loss, ~finite, confusion


def _counts(labels: Tensor, answers: Tensor, classes: int) -> Tensor:
    """The counts of ``answers [K, N]`` (``classes`` means no answer) for ``labels [K, N]``: int64 ``[K,
    classes, classes + 1]``."""
    networks = torch.arange(len(labels), device=labels.device)[:, None]
    cells = (networks * classes + labels) * (classes + 1) + answers
    size = len(labels) * classes * (classes + 1)
    # Not bincount: on a GPU it has no deterministic version.
    counts = torch.zeros(size, dtype=torch.int64, device=labels.device)
    ones = torch.ones((), dtype=torch.int64, device=labels.device).expand(cells.numel())
    return counts.index_add_(0, cells.flatten(), ones).view(len(labels), classes, classes + 1)


def evaluate_networks(
    network: nn.Module,
    params: Params,
    distilled: LabelledImages,
    rates: Sequence[Rate],
    steps: Sequence[int],
    test: RealSet,
    plan: ExecutionPlan,
    *,
    loop: InnerLoop | None = None,
    fewer_at_once: bool = False,
) -> Evaluation:
    """Train K networks on the distilled batches and count right answers at the inner steps ``steps``.

    ``params [K, ...]`` initial weights, untouched; ``distilled``: images ``[S, n, c, h, w]`` (or ``[K, S,
    ...]``, a set for each network) with labels ``[S, n]``; ``rates`` of length T (numbers, or ``[K]`` each);
    ``steps`` ascending, 0 is before training, and beyond T the rates of the last epoch repeat; ``test`` as in
    `count_right`. With ``fewer_at_once``, if memory runs out, half as many networks are trained side by side,
    and so on; their last digits depend on how many.
    """
    loop = InnerLoop() if loop is None else loop
    own, count = distilled.images.dim() == 6, len(next(iter(params.values())))
    at_once = min(count, _trained_at_once(network, distilled, loop, plan))

    def of(module: nn.Module, share: slice) -> list[Evaluation]:
        with no_bookkeeping(plan):
            return [
                _evaluate(
                    module,
                    {name: value[some] for name, value in params.items()},
                    replace(distilled, images=distilled.images[some]) if own else distilled,
                    [rate[some] if isinstance(rate, Tensor) else rate for rate in rates],
                    steps,
                    lambda weights: count_right(module, weights, test, plan),
                    plan,
                    loop.of(some),
                )
                for first in range(share.start, share.stop, at_once)
                for some in [slice(first, min(first + at_once, share.stop))]
            ]

    def work() -> list[list[Evaluation]]:
        with products(plan.device):
            return in_teams(plan, network, count, of)

    def shrink(error: Exception) -> bool:
        nonlocal at_once
        if at_once == 1:
            return False
        at_once //= 2
        return True

    parts = [part for team in (fitted(work, shrink) if fewer_at_once else work()) for part in team]
    columns = [(part.accuracy, part.loss, part.diverged, part.confusion) for part in parts]
    return Evaluation(tuple(steps), *(torch.cat(column, 1) for column in zip(*columns, strict=True)))


def _trained_at_once(
    network: nn.Module, distilled: LabelledImages, loop: InnerLoop, plan: ExecutionPlan
) -> int:
    """How many networks a team trains side by side. On the CPU it is limited by what a step keeps of all of
    them: a system without memory ends the process. A GPU says so."""
    if plan.device != "cpu":
        return 2**31
    inner_steps, batch, *shape = distilled.images.shape[-5:]
    if loop.minibatches:
        batch = min(loop.minibatches.size, inner_steps * batch)
    each = distilled.images.element_size() * batch * _outputs(network, tuple(shape))
    return max(1, TRAINED_AT_ONCE_BYTES // (_KEPT * each * plan.teams))


@lru_cache(maxsize=8)
def _outputs(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Of all layers with weights, for one image."""
    c, h, w = shape
    return max(1, measure(network, (c, h, w)).outputs)


def _evaluate(
    network: nn.Module,
    params: Params,
    distilled: LabelledImages,
    rates: Sequence[Rate],
    steps: Sequence[int],
    count: Callable[[Params], tuple[Tensor, Tensor, Tensor, Tensor]],
    plan: ExecutionPlan,
    loop: InnerLoop,
) -> Evaluation:
    """`evaluate_networks`, for the networks of one team."""
    weight, inner_steps = next(iter(params.values())), distilled.labels.shape[0]
    state, found = TrainState.start(network, params, loop.optimizer), []
    for step in steps:
        if step > state.step:
            todo = [rate_at(rates, inner_steps, t, loop, weight) for t in range(state.step, step)]
            graph = plan.graph and loop.recordable
            state = train_networks(network, state, distilled, todo, plan.inner_batching, loop, graph=graph)
        found.append(count(state.params))
    return Evaluation(tuple(steps), *(torch.stack(part) for part in zip(*found, strict=True)))
