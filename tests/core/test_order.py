"""Orders of batches: which batch is used when; a seed alone decides them."""

from __future__ import annotations

import pytest
import torch

from ddsweep.core.order import BatchOrder, draw_batch_order, fixed_batch_order, rate_index

S, CLASSES, M, EPOCHS = 4, 3, 2, 3
T, BATCH = S * EPOCHS, CLASSES * M
SEEDS = (1, 2, 3, 4)


def batch_order_of(order: str, total: int | None = None, seeds: tuple[int, ...] = SEEDS) -> BatchOrder:
    return draw_batch_order(order, S, CLASSES, M, T, seeds, total)


def test_the_fixed_order_is_batch_t_mod_s_at_rate_t() -> None:
    for batch_order in (batch_order_of("fixed"), fixed_batch_order(S, BATCH, T)):
        assert batch_order.shared and len(batch_order) == T
        for t in range(T):
            assert batch_order.batches[t, 0].tolist() == [t % S * BATCH + i for i in range(BATCH)]
            assert batch_order.rates[t].tolist() == [t]


def test_every_epoch_of_a_shuffled_order_is_a_permutation_with_its_own_rates() -> None:
    batch_order = batch_order_of("shuffled")
    assert batch_order.batches.shape == (T, len(SEEDS), BATCH) and batch_order.rates.shape == (T, len(SEEDS))
    seen = set()
    for k in range(len(SEEDS)):
        for epoch in range(EPOCHS):
            rows = range(epoch * S, (epoch + 1) * S)
            slots = [int(batch_order.batches[t, k, 0]) // BATCH for t in rows]
            seen.add(tuple(slots))
            assert sorted(slots) == list(range(S))
            for t, slot in zip(rows, slots, strict=True):
                assert batch_order.batches[t, k].tolist() == [slot * BATCH + i for i in range(BATCH)]
                assert int(batch_order.rates[t, k]) == epoch * S + slot
    assert len(seen) > 6  # of 12 draws from 24


def test_a_sampled_step_has_m_of_each_class_none_twice() -> None:
    batch_order = draw_batch_order("sampled", S, CLASSES, M, 200, SEEDS)
    used = torch.zeros(S * BATCH)
    for k in range(len(SEEDS)):
        for t in range(200):
            picks = batch_order.batches[t, k]
            assert len(set(picks.tolist())) == BATCH
            # Images of a batch are sorted by class, m of each; so are those of a step.
            assert (picks % BATCH // M).tolist() == [c for c in range(CLASSES) for _ in range(M)]
            used[picks] += 1
            assert int(batch_order.rates[t, k]) == t
    # Each image is taken with probability 1/S: 200 times of 800, deviation 12.
    assert float((used - 200).abs().max()) < 60


@pytest.mark.parametrize("order", ["shuffled", "sampled"])
def test_a_course_is_a_function_of_its_seed_alone(order: str) -> None:
    one, again = batch_order_of(order), batch_order_of(order)
    torch.manual_seed(7)
    assert torch.equal(one.batches, again.batches) and torch.equal(one.rates, again.rates)
    for k, seed in enumerate(SEEDS):
        alone = batch_order_of(order, seeds=(seed,))
        assert torch.equal(alone.batches[:, 0], one.batches[:, k])
        assert torch.equal(alone.rates[:, 0], one.rates[:, k])
    assert not torch.equal(one.batches[:, 0], one.batches[:, 1])


@pytest.mark.parametrize("order", ["fixed", "shuffled", "sampled"])
def test_a_shorter_course_is_the_beginning_of_a_longer_one(order: str) -> None:
    """So what a network has learned by step t does not depend on how far one looks."""
    longest = batch_order_of(order, 3 * T)
    for total in (0, 1, S + 1, T, T + 1):
        batch_order = batch_order_of(order, total)
        assert len(batch_order) == total
        assert torch.equal(batch_order.batches, longest.batches[:total])
        assert torch.equal(batch_order.rates, longest.rates[:total])


def test_beyond_t_the_rates_of_the_last_epoch_repeat() -> None:
    assert [rate_index(t, S, T) for t in range(T + 6)] == [*range(T), 8, 9, 10, 11, 8, 9]
    for order in ("fixed", "sampled"):
        rates = batch_order_of(order, T + 6).rates
        assert rates[:, 0].tolist() == [*range(T), 8, 9, 10, 11, 8, 9]
    batch_order = batch_order_of("shuffled", T + 2 * S)
    for k in range(len(SEEDS)):
        for t in range(T, T + 2 * S):
            assert int(batch_order.rates[t, k]) == T - S + int(batch_order.batches[t, k, 0]) // BATCH


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown order 'sorted'; orders are fixed, shuffled, sampled"):
        batch_order_of("sorted")
