"""From scores of elements to sizes of dimensions: a common share, or one threshold over all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..space import Dimension, SearchSpace
from ..structure import Structure
from .base import Task

_FAR = 0.9
"""Where less of the budget is used a fit scales all widths alike: from what is there, not from minimums that differ in share."""

Values = dict[str, np.ndarray]
"""Dimension -> the value of its best, second best ... element with all that is linked to it, (size,), falling."""


def values_of(space: SearchSpace, scores: Mapping[str, Any]) -> Values:
    """The values of all dimensions: an element of a linked dimension is worth the sum over its members."""
    out = {}
    for name, d in space.dimensions.items():
        total = np.zeros(d.size)
        for member, count in space._members(d):
            ordered = np.sort(np.asarray(scores[member], dtype=np.float64))[::-1]
            upto = np.concatenate([[0.0], np.cumsum(ordered)])
            total += np.diff(upto[[d.count(count, k) for k in range(d.size + 1)]])
        out[name] = np.minimum.accumulate(total)  # an element comes only after all better ones
    return out


def relative(values: Values) -> Values:
    """Values as multiples of the mean of their dimension: what makes layers of different scale comparable."""
    return {n: v / max(float(v.mean()), 1e-30) for n, v in values.items()}


def by_threshold(task: Task, scores: Mapping[str, Any], values: Values, depth: bool = False) -> Structure:
    """Keep every element above one threshold, the lowest that meets the budget, then fit exactly.

    Of equals, such as the scales of a normalisation that has not been trained, the fit takes the same share everywhere.

    Args:
        scores: member -> score an element, which say what goes first within a dimension.
        values: from `values_of`, which say what goes first among dimensions.
        depth: whether stacks of blocks compete too; they stay whole otherwise.
    """
    chosen = {n: d for n, d in task.space.dimensions.items() if depth or d.kind != "depth"}
    levels = np.unique(np.concatenate([values[n] for n in chosen] or [np.zeros(1)]))

    def sizes(level: float) -> dict[str, float]:
        return {n: _count(d, values[n], level) for n, d in chosen.items()}

    low, high = 0, len(levels)  # the first level that fits; beyond the last everything is at its minimum
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if task.fits(sizes(levels[middle])) else (middle + 1, high)
    chosen_sizes = sizes(levels[low] if low < len(levels) else np.inf)
    if low > 0 and task.load(chosen_sizes) < _FAR:  # many elements share the level before, and not all of them need go
        chosen_sizes = sizes(levels[low - 1])
    return task.fit(chosen_sizes, scores)


def _count(d: Dimension, values: np.ndarray, level: float) -> float:
    return max(int((values >= level).sum()), d.lowest)


def by_share(task: Task, scores: Mapping[str, Any], depth_power: float | None = None) -> Structure:
    """The same share of every width and of the heads, then fit exactly.

    Args:
        scores: member -> score an element.
        depth_power: the share of blocks is that of widths to this power; without it all blocks stay.
    """

    def sizes(share: float) -> dict[str, float]:
        kept = {n: share * d.size for n, d in task.space.dimensions.items() if d.kind != "depth"}
        if depth_power is not None:
            kept |= {n: share**depth_power * d.size for n, d in task.space.dimensions.items() if d.kind == "depth"}
        return kept

    low, high = 1e-9, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if task.fits(sizes(middle)) else (low, middle)
    return task.fit(sizes(low), scores)
