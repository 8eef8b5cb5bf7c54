"""The order of the distilled images: the batch and the rate of every inner step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ddsweep.seeds import derive_seed

__all__ = [
    "BatchOrder",
    "DrawnMinibatches",
    "Minibatches",
    "draw_batch_order",
    "fixed_batch_order",
    "joined_orders",
    "minibatches",
    "rate_index",
]


@dataclass(frozen=True)
class BatchOrder:
    """For each inner step t: ``batches [T, R, n]``, the indices of the used images among the S*n, and ``rates
    [T, R]``, the index of the rate. R is 1 if all of K networks have the same order, K if each has its own,
    or G if K/G networks in a row share one. On the CPU, except inside a GPU's recording."""

    batches: Tensor
    rates: Tensor

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def shared(self) -> bool:
        return self.batches.shape[1] == 1

    def of(self, share: slice | Sequence[int]) -> BatchOrder:
        """The order of some of the networks, each of which has a row."""
        return self if self.shared else BatchOrder(self.batches[:, share], self.rates[:, share])

    def between(self, spans: Sequence[tuple[int, int]]) -> BatchOrder:
        """The steps ``start <= t < stop`` of each span, all of one length: step 0 is the first of each. There
        are as many spans as sets of networks; a shared order gets a row for each set."""
        each = max(1, self.batches.shape[1] // len(spans))
        rows = [slice(None) if self.shared else slice(g * each, (g + 1) * each) for g in range(len(spans))]
        batches, rates = (
            torch.cat([of[start:stop, row] for (start, stop), row in zip(spans, rows, strict=True)], 1)
            for of in (self.batches, self.rates)
        )
        return BatchOrder(batches, rates)

    def repeated(self, times: int) -> BatchOrder:
        """The order of the K networks, repeated ``times``: network k has the order of network k mod K."""
        if self.shared:
            return self
        return BatchOrder(self.batches.repeat(1, times, 1), self.rates.repeat(1, times))


@dataclass(frozen=True)
class Minibatches:
    """In every epoch all ``images`` of a set, ``size`` at a time and the rest in the last step. Network k
    sees those of an epoch in a random order, a function of ``seeds[k]`` and the epoch."""

    images: int
    size: int
    seeds: tuple[int, ...]

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // self.size)

    def of(self, share: slice) -> Minibatches:
        """Those of some of the networks."""
        return replace(self, seeds=self.seeds[share])

    def drawn(self, device: torch.device) -> DrawnMinibatches:
        """To be asked for one step after the other."""
        return DrawnMinibatches(self, device)


class DrawnMinibatches:
    """The images ``[K, n]`` of a step, as if it were an entry of `BatchOrder.batches`. Only one epoch is in
    memory: there may be many thousands of steps."""

    def __init__(self, minibatches: Minibatches, device: torch.device) -> None:
        self._of, self._device, self._epoch = minibatches, device, -1
        self._order = torch.empty(0)

    def __getitem__(self, t: int) -> Tensor:
        epoch, place = divmod(t, self._of.steps_per_epoch)
        if epoch != self._epoch:
            seeds = (derive_seed("heldout_order", seed, epoch) for seed in self._of.seeds)
            generators = (torch.Generator().manual_seed(seed) for seed in seeds)
            orders = [torch.randperm(self._of.images, generator=generator) for generator in generators]
            self._epoch, self._order = epoch, torch.stack(orders).to(self._device)
        return self._order[:, place * self._of.size : (place + 1) * self._of.size]


def minibatches(images: int, size: int, seeds: Sequence[int], total: int) -> BatchOrder | Minibatches:
    """The minibatches of ``size`` of all ``images`` for networks with these ``seeds``, for ``total`` steps. A
    set that is no larger than ``size`` is one batch, and then no order matters."""
    if size < images:
        return Minibatches(images, size, tuple(seeds))
    return BatchOrder(torch.arange(images).expand(total, 1, images), torch.zeros(total, 1, dtype=torch.int64))


def joined_orders(orders: Sequence[BatchOrder | None]) -> BatchOrder | None:
    """The order of the networks of several trials in a row; None if none of them has one."""
    known = [order for order in orders if order is not None]
    if not known:
        return None
    return BatchOrder(
        torch.cat([order.batches for order in known], 1), torch.cat([order.rates for order in known], 1)
    )


def rate_index(t: int, inner_steps: int, steps: int) -> int:
    """The index of the rate of step ``t`` among T = ``steps``: beyond T those of the last epoch repeat."""
    return t if t < steps else steps - inner_steps + t % inner_steps


@lru_cache(maxsize=64)
def fixed_batch_order(inner_steps: int, batch: int, steps: int, total: int | None = None) -> BatchOrder:
    """Step t uses batch t mod S and rate t; ``total`` steps, by default T = ``steps``."""
    with torch.inference_mode(False):  # kept, whoever asks first
        t = torch.arange(steps if total is None else total)
        batches = (t % inner_steps * batch)[:, None, None] + torch.arange(batch)
        rates = [rate_index(int(i), inner_steps, steps) for i in t]
        return BatchOrder(batches, torch.tensor(rates, dtype=torch.int64)[:, None])


def draw_batch_order(
    order: str,
    inner_steps: int,
    classes: int,
    per_class: int,
    steps: int,
    seeds: Sequence[int],
    total: int | None = None,
) -> BatchOrder:
    """The order of K networks, network k's drawn from ``seeds[k]``.

    ``fixed``: as `fixed_batch_order`. ``shuffled``: in every epoch the S batches, each with its rate of that
    epoch, in an order of their own. ``sampled``: in every step ``per_class`` of each class's images at
    random, without regard to batches; rates go by step. Raises ``ValueError`` for another order.
    """
    total = steps if total is None else total
    batch = classes * per_class
    if order == "fixed":
        return fixed_batch_order(inner_steps, batch, steps, total)
    if order not in ("shuffled", "sampled"):
        raise ValueError(f"unknown order {order!r}; orders are fixed, shuffled, sampled")
    batches, rates = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        if order == "shuffled":
            epochs = max(1, -(-total // inner_steps))
            which = torch.cat([torch.randperm(inner_steps, generator=generator) for _ in range(epochs)])
            which = which[:total]
            epoch = torch.arange(total) // inner_steps
            batches.append(which[:, None] * batch + torch.arange(batch))
            rates.append([rate_index(int(t), inner_steps, steps) for t in epoch * inner_steps + which])
        else:
            batches.append(_sample(inner_steps, classes, per_class, total, generator))
            rates.append([rate_index(t, inner_steps, steps) for t in range(total)])
    return BatchOrder(torch.stack(batches, 1), torch.tensor(rates, dtype=torch.int64).t().contiguous())


def _sample(inner_steps: int, classes: int, per_class: int, total: int, generator: torch.Generator) -> Tensor:
    """``[total, classes * per_class]``, sorted by class like a batch."""
    keys = torch.rand(total, classes, inner_steps * per_class, generator=generator)
    chosen = keys.argsort(-1)[..., :per_class]
    step, place = chosen // per_class, chosen % per_class
    first = torch.arange(classes)[:, None] * per_class
    return (step * classes * per_class + first + place).flatten(1)
