"""Arithmetic with masks: the same values and derivatives as written out, whether or not the masks are known to be hard."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from dmscale import axes
from dmscale.axes import Axis
from dmscale.masking import KeptInput, Masks


@st.composite
def dims(draw):
    """A dimension of several axes, products and sums; one that meets itself among them."""
    a, b, c, d = (Axis(draw(st.integers(2, 4))) for _ in range(4))
    total = axes.concat([(b, c), (d,)])
    thrice = axes.concat([(a, b), (a, b), (c,)])
    return draw(st.sampled_from([(a, b), (a, *total), (*total, a), total, (b, a, c), thrice, (*thrice, d), (a, b, a)]))


@st.composite
def masked(draw):
    """(a dimension, random masks of some of its axes, whether they are zeros and ones)."""
    dim = draw(dims())
    own = axes.atoms(dim)
    chosen = draw(st.lists(st.sampled_from(own), min_size=1, unique=True))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    hard = draw(st.booleans())
    widths = {a: torch.rand(a.size, generator=rng, dtype=torch.float64) for a in chosen}
    if hard:
        widths = {a: (m > 0.4).double().index_fill(0, torch.tensor([0]), 1) for a, m in widths.items()}
    return dim, widths, hard


def derivatives(value, masks):
    """First and second derivatives of a function of `value`, by all masks."""
    weight = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view_as(value)
    first = torch.autograd.grad((value * weight).square().sum(), masks, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), masks, allow_unused=True)
    return [*first, *(torch.zeros_like(m) if g is None else g for g, m in zip(second, masks))]


@given(masked())
def test_the_mask_of_a_dimension_is_that_of_its_axes_written_out(drawn):
    dim, widths, hard = drawn
    masks = Masks(widths, {}, trainable=True)
    if hard:
        masks.hard = {a: int(m.sum()) for a, m in widths.items()}
    own = [masks.widths[a] for a in widths]
    for _ in range(2):  # what is remembered is used again
        expected = axes.kept(dim, masks.widths)
        assert torch.allclose(masks(dim), expected, rtol=1e-12)
        got, wanted = derivatives(masks(dim), own), derivatives(expected, own)
        assert all(torch.allclose(g, w, rtol=1e-9, atol=1e-12) for g, w in zip(got, wanted))
        plain = torch.autograd.grad(masks(dim).sum(), own)  # without a graph of its own: factors come from memory
        assert all(
            torch.allclose(g, w) for g, w in zip(plain, torch.autograd.grad(axes.kept(dim, masks.widths).sum(), own))
        )


@given(masked())
def test_a_mask_that_is_computed_again_in_the_backward_has_the_same_gradients(drawn):
    dim, widths, hard = drawn
    masks = Masks(widths, {}, trainable=True)
    if hard:
        masks.hard = {a: int(m.sum()) for a, m in widths.items()}
    own = [masks.widths[a] for a in widths]

    def value():
        return (masks(dim) * masks.share(dim, 0.5)).square().sum()

    expected = torch.autograd.grad(value(), own)
    found = torch.autograd.grad(checkpoint(value, use_reentrant=False), own)
    assert all(torch.equal(f, e) for f, e in zip(found, expected))


@given(masked(), st.sampled_from([0.5, -0.5, 1.0]))
def test_the_share_that_is_kept_is_the_mean_of_the_mask(drawn, power):
    dim, widths, hard = drawn
    masks = Masks(widths, {}, trainable=True)
    if hard:
        masks.hard = {a: int(m.sum()) for a, m in widths.items()}
    own = [masks.widths[a] for a in widths]
    expected = axes.kept(dim, masks.widths).mean() ** power
    assert masks.share(dim, power).item() == pytest.approx(expected.item(), rel=1e-12)
    got, wanted = derivatives(masks.share(dim, power), own), derivatives(expected, own)
    assert all(torch.allclose(g, w, rtol=1e-9, atol=1e-12) for g, w in zip(got, wanted))


@given(masked())
def test_what_is_remembered_under_inference_mode_has_derivatives_outside(drawn):
    dim, widths, hard = drawn
    fresh, visited = (Masks(widths, {}, trainable=True) for _ in range(2))
    for masks in (fresh, visited) if hard else ():
        masks.hard = {a: int(m.sum()) for a, m in widths.items()}
    with torch.inference_mode():
        visited(dim), visited.share(dim, 0.5)
    found, expected = (
        derivatives(torch.stack([*(m(dim) * 2), m.share(dim, 0.5)]), list(m.widths.values())) for m in (visited, fresh)
    )
    assert all(torch.equal(f, e) for f, e in zip(found, expected))


def test_what_is_remembered_of_masks_ends_when_they_change_and_is_not_shared_with_a_copy():
    dim = (Axis(2), Axis(3))
    masks = Masks({a: torch.ones(a.size) for a in dim}, {}, trainable=True)
    masks.hard = {a: a.size for a in dim}
    assert bool((masks(dim) == 1).all()) and masks.share(dim, 0.5).item() == 1
    twin = copy.deepcopy(masks)
    masks.widths[dim[1]].data[0] = 0
    masks.hard = {dim[0]: 2, dim[1]: 2}
    assert masks(dim).tolist() == [0, 1, 1, 0, 1, 1]
    assert masks.share(dim, 1.0).item() == pytest.approx(2 / 3)
    assert masks.double()(dim).dtype == torch.float64  # and when the model moves
    assert bool((twin(tuple(twin.widths)) == 1).all())


@given(masked(), st.sampled_from(["in place", "a state", "of a copy", "the data of a copy"]))
def test_what_is_known_of_masks_ends_when_somebody_changes_them(drawn, how):
    dim, widths, _ = drawn
    masks = Masks({a: torch.ones_like(m) for a, m in widths.items()}, {"stack": torch.ones(2)}, trainable=True)
    masks.hard, masks.decided, masks.settled = {a: a.size for a in widths}, {"stack": [True, True]}, True
    assert not masks.outdated and masks.is_whole(dim) and bool((masks(dim) == 1).all())
    masks, dim = copy.deepcopy((masks, dim)) if "copy" in how else (masks, dim)
    new = [*widths.values(), torch.tensor([0.0, 1.0])]
    with torch.no_grad():
        if how == "a state":
            masks.load_state_dict(dict(zip(masks.state_dict(), new)))
        else:
            for mask, values in zip(masks.parameters(), new):
                (mask.data if "data" in how else mask).copy_(values)
    assert masks.outdated and not masks.hard and not masks.decided and masks.is_in("stack", 0) is None
    assert torch.allclose(masks(dim), axes.kept(dim, masks.widths), rtol=1e-12)
    assert torch.allclose(masks.share(dim, 0.5), axes.kept(dim, masks.widths).mean().sqrt(), rtol=1e-12)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("over_space", [True, False])
@pytest.mark.parametrize("input_kept", [True, False])
def test_the_input_of_a_normalisation_gives_the_statistics_and_gradients_of_what_is_kept(
    centred, over_space, input_kept
):
    """Hard and told, against the same written out of what is kept only, through a normalisation over all."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True) + 3
    x.retain_grad()
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.float64, requires_grad=True)
    over = [1, 2] if over_space else [1]
    weight = torch.rand(4, 4, 5, dtype=torch.float64)

    def normalised(t):
        t = t - t.mean(over, keepdim=True) if centred else t
        return t / (t.square().mean(over, keepdim=True) + 1e-6).sqrt()

    kept = mask.bool().nonzero()[:, 0]
    (normalised(x[:, kept]) * weight).sum().backward()
    expected, x.grad = x.grad, None
    out = normalised(KeptInput.apply(x, mask, 1, centred, over_space, 4, input_kept)) * (4 / 6) ** 0.5
    (out[:, kept] * weight).sum().backward()
    assert torch.allclose(x.grad, expected, atol=1e-10)
    assert float(out[:, ~mask.bool()].abs().max()) < 1e-12 and bool(mask.grad.isfinite().all())
