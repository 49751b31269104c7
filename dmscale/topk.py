"""Differentiable top-k (DMS, ICML 2024, section 3.1): how many elements to keep as one learnable number.

A dimension of N elements has importances c (N,) that are measured, never trained, and one scalar a, the pruned share.

    c'_i = (rank of c_i + 1/2) / N                    importance made uniform on (0, 1)         (eq. 2)
    m_i  = sigmoid(lam * (c'_i - a))                  soft mask: about (1 - a) N elements stay   (eq. 3)

Two departures.  Ranks are mid-ranks: the paper's count strictly smaller elements and the authors' code counts smaller or
equal ones, which biases k by half an element each way.  And near a = 0 the pruned part of the mask is faded in, since
the sigmoid alone would damage a network (masks of 0.62, 0.82 ... at lam = N) that nobody has asked to prune yet:
m = 1 - (1 - sigmoid(...)) * min(1, 2 a N), which is one at a = 0 and the paper's mask from half an element on.

The functions work on several dimensions laid one after another in one flat vector.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mid_ranks(importance: Tensor, segment: Tensor, start: Tensor, size: Tensor) -> Tensor:
    """(rank + 1/2) / N of each element within its segment, (E,); ties keep their order.

    Args:
        importance: (E,) scores, segments one after another.
        segment: (E,) number of each element's segment, ascending.
        start: (S,) first position of each segment.
        size: (S,) elements of each segment.
    """
    order = torch.argsort(importance, stable=True)
    order = order[torch.argsort(segment[order], stable=True)]  # by segment, then by importance
    places = torch.arange(len(importance), device=importance.device) - start[segment]
    ranks = torch.empty_like(importance)
    ranks[order] = (places.to(importance.dtype) + 0.5) / size[segment].to(importance.dtype)
    return ranks


def soft_mask(ranks: Tensor, pruned: Tensor, sharpness: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The mask and its derivative by the pruned share, both (E,).

    Args:
        ranks: (E,) from `mid_ranks`.
        pruned: (E,) the share a of each element's dimension.
        sharpness: (E,) lam; N for widths, 4 N for heads and blocks, of which there are few.
        size: (E,) N.
    """
    gone = torch.sigmoid(sharpness * (pruned - ranks))  # 1 - sigmoid(lam (c' - a))
    ramp = 2 * pruned * size
    fade = ramp.clamp(0, 1)
    slope = -sharpness * gone * (1 - gone) * fade - gone * torch.where(ramp < 1, 2 * size, torch.zeros_like(size))
    return 1 - gone * fade, slope


def hard_mask(ranks: Tensor, pruned: Tensor) -> Tensor:
    """The elements that stay, (E,) of 0 and 1: those with m >= 1/2, round((1 - a) N) of them."""
    return (ranks >= pruned).to(ranks.dtype)
