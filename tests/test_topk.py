"""Differentiable top-k: how many stay follows one scalar, and the mask at no pruning is one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmscale import topk

SIZES = [1, 2, 3, 8, 17, 64, 300]


def segments(sizes):
    """(segment, start, size) of dimensions laid one after another."""
    size = torch.tensor(sizes)
    segment = torch.repeat_interleave(torch.arange(len(sizes)), size)
    return segment, torch.cumsum(size, 0) - size, size


def ranks_of(importance, sizes):
    return topk.mid_ranks(importance, *segments(sizes))


def even(n):
    """The mid-ranks of n elements, of importance in order."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def soft(n, a, factor=1.0):
    size = torch.full((n,), float(n), dtype=torch.float64)
    return topk.soft_mask(even(n), torch.full((n,), a, dtype=torch.float64), factor * size, size)


# -- ranks ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=6))
def test_mid_ranks_are_a_permutation_in_each_segment_and_ties_are_stable(values):
    """Few distinct values, so that ties abound."""
    sizes = [len(v) for v in values]
    found = ranks_of(torch.tensor([float(x) for v in values for x in v]), sizes).split(sizes)
    for v, ranks in zip(values, found):
        n = len(v)
        order = sorted(range(n), key=lambda i: v[i])  # Python's sort is stable
        expected = torch.empty(n)
        expected[order] = (torch.arange(n) + 0.5) / n
        torch.testing.assert_close(ranks, expected)


def test_ranks_do_not_depend_on_scale():
    importance = torch.rand(50)
    assert torch.equal(ranks_of(importance, [20, 30]), ranks_of(importance * 1e-12, [20, 30]))


def test_mid_ranks_are_unbiased():
    """The mean of c' is 1/2 for any N: no half element either way, as in the paper's ranks and those of its code."""
    for n in SIZES:
        assert float(ranks_of(torch.rand(n), [n]).mean()) == pytest.approx(0.5, abs=1e-6)


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("n", SIZES)
def test_masks_are_exactly_one_where_nothing_is_pruned(n, factor):
    mask, slope = soft(n, 0.0, factor)
    assert torch.equal(mask, torch.ones(n, dtype=torch.float64))
    assert bool(slope.isfinite().all()) and bool((slope <= 0).all())
    assert float(slope.sum()) < 0  # and yet the scalar hears the loss
    assert torch.equal(topk.hard_mask(even(n), torch.zeros(n, dtype=torch.float64)), torch.ones(n, dtype=torch.float64))


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("n", [17, 64, 300])
def test_the_sum_of_the_soft_mask_follows_the_scalar(n, factor):
    """Away from the ends, where the sigmoid is cut off; a steep one ripples by a fiftieth of an element between ranks."""
    tolerance = 0.01 if factor == 1 else 0.025
    for a in torch.linspace(0, 1, 101).tolist():
        if 8 / n <= a <= 1 - 8 / n:
            assert float(soft(n, a, factor)[0].sum()) == pytest.approx((1 - a) * n, abs=tolerance)


@pytest.mark.parametrize("n", SIZES)
def test_the_hard_mask_keeps_the_rounded_count(n):
    for a in torch.linspace(0, 1, 997).tolist():
        exact = (1 - a) * n
        if abs(exact % 1 - 0.5) < 1e-6:
            continue  # a tie: either neighbour is right
        mask = topk.hard_mask(even(n), torch.full((n,), a, dtype=torch.float64))
        assert int(mask.sum()) == round(exact)
        assert bool((mask == (torch.arange(n) >= n - round(exact))).all())  # the most important ones


@pytest.mark.parametrize("n", [3, 8, 64])
def test_hard_masks_are_the_rounded_soft_ones(n):
    for a in torch.linspace(1 / n, 1, 50).tolist():  # past the ramp
        mask, _ = soft(n, a)
        near = (mask - 0.5).abs() < 1e-9
        hard = topk.hard_mask(even(n), torch.full((n,), a, dtype=torch.float64)).bool()
        assert torch.equal(hard[~near], (mask > 0.5)[~near])


@pytest.mark.parametrize("factor", [1.0, 4.0])
@pytest.mark.parametrize("n", [2, 3, 8, 64])
def test_the_derivative_is_that_of_finite_differences(n, factor):
    h = 1e-6
    for a in torch.linspace(0.003, 0.997, 60).tolist():
        if abs(2 * a * n - 1) < 1e-3:
            continue  # the kink where the ramp ends
        numeric = (soft(n, a + h, factor)[0] - soft(n, a - h, factor)[0]) / (2 * h)
        torch.testing.assert_close(soft(n, a, factor)[1], numeric, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_masks_are_monotone(n, a, b):
    """More important, or less pruned: never a smaller mask; always between 0 and 1."""
    low, high = sorted((a, b))
    less, more = soft(n, low)[0], soft(n, high)[0]
    assert bool((more <= less + 1e-12).all())
    assert bool((less.diff() >= 0).all()) and float(less.min()) >= 0 and float(less.max()) <= 1
    hard = [topk.hard_mask(even(n), torch.full((n,), x, dtype=torch.float64)) for x in (low, high)]
    assert bool((hard[1] <= hard[0]).all())


def test_segments_do_not_mix():
    """Several dimensions in one flat vector give what each gives alone."""
    sizes, shares = [5, 1, 12], [0.3, 0.0, 0.7]
    importance = torch.rand(18)
    segment, start, size = segments(sizes)
    ranks = topk.mid_ranks(importance, segment, start, size)
    element_size, pruned = size[segment].float(), torch.tensor(shares)[segment]
    mask, slope = topk.soft_mask(ranks, pruned, element_size, element_size)
    for part, m, s, n, a in zip(importance.split(sizes), mask.split(sizes), slope.split(sizes), sizes, shares):
        alone = topk.soft_mask(
            ranks_of(part, [n]), torch.full((n,), a), torch.full((n,), float(n)), torch.full((n,), float(n))
        )
        # not to the bit: where an element stands in a vector decides whether its exponential is vectorised
        torch.testing.assert_close((m, s), alone, rtol=1e-6, atol=1e-6)
