"""Uniform scaling, the field's plainest baseline, without depth and with it by a rule; L2 norms say which elements stay."""

from __future__ import annotations

import math

from .base import Found, Task, strategy
from .ranking import by_share

DEPTH_POWER = math.log(1.2) / math.log(1.1)
"""Of compound scaling: depth goes as 1.2^phi where width goes as 1.1^phi (Tan and Le, EfficientNet, 2019, eq. 3)."""


@strategy("uniform", "the same share of every width and of the heads, strongest L2 norms stay")
def uniform(task: Task) -> Found:
    return Found(task.space.uniform_at(task.budget))


@strategy("uniform-depth", "the same share of every width, of the heads and of every stack of blocks")
def uniform_depth(task: Task) -> Found:
    return Found(task.space.uniform_at(task.budget, depth=True))


@strategy("compound", "depth share = width share ^ 1.91 (the rule of EfficientNet, 2019)")
def compound(task: Task) -> Found:
    return Found(by_share(task, task.space.magnitudes(), DEPTH_POWER))
