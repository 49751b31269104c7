"""Rankings by weights alone.

Global ones compare elements of all layers, by their norm as a multiple of the layer's mean (raw norms grow with the number
of weights at an element, so the layer with small filters would go first); local ones keep the same share everywhere.
Blocks have no comparable norm and stay.
"""

from __future__ import annotations

import numpy as np

from ..errors import DmscaleError
from .base import Found, Task, strategy
from .ranking import by_share, by_threshold, relative, values_of
from .scores import norm_scales, weight_norms


@strategy("magnitude-l1", "global ranking by L1 norm over the layer's mean (Li et al., 2017)")
def magnitude_l1(task: Task) -> Found:
    return _global(task, 1)


@strategy("magnitude-l2", "global ranking by L2 norm over the layer's mean")
def magnitude_l2(task: Task) -> Found:
    return _global(task, 2)


def _global(task: Task, power: int) -> Found:
    scores = weight_norms(task.space, power)
    return Found(by_threshold(task, scores, relative(values_of(task.space, scores))))


@strategy("magnitude-l1-local", "the same share everywhere, strongest L1 norms stay; with L2 norms this is `uniform`")
def magnitude_local(task: Task) -> Found:
    return Found(by_share(task, weight_norms(task.space, 1)))


@strategy("norm-scale", "global ranking by |gamma| of the normalisations (Liu et al., Network Slimming, 2017)")
def norm_scale(task: Task) -> Found:
    """Elements that no normalisation scales are ranked by L1 norm, brought to the mean of all |gamma|."""
    gammas = norm_scales(task.space)
    if not gammas:
        raise DmscaleError("norm-scale needs dimensions with a normalisation of their own; this space has none")
    mean = float(np.mean(np.concatenate([g.numpy() for g in gammas.values()])))
    scores = {m: mean * s / s.mean().clamp(min=1e-30) for m, s in weight_norms(task.space, 1).items()} | gammas
    values = values_of(task.space, scores)
    # per member, so that a dimension of many linked layers does not outrank a single one by their number
    values = {n: v / max(len(task.space.dimensions[n].members), 1) for n, v in values.items()}
    return Found(by_threshold(task, scores, values))


@strategy("lamp", "global ranking by w^2 over the sum of all w^2 that are not smaller (Lee et al., LAMP, 2021)")
def lamp(task: Task) -> Found:
    scores = weight_norms(task.space, 2)
    values = {}
    for name, v in values_of(task.space, {m: s.square() for m, s in scores.items()}).items():
        values[name] = v / np.maximum(np.cumsum(v), 1e-30)  # v falls: the sum of those before it and itself
    return Found(by_threshold(task, scores, values))
