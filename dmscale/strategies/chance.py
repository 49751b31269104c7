"""Random structures at the budget: what any method must beat (Yang et al., NAS evaluation is frustratingly hard, 2020)."""

from __future__ import annotations

import random

from .base import Found, Task, strategy


@strategy("random", "random sizes around the uniform ones, random elements")
def random_structure(task: Task) -> Found:
    return Found(task.space.sample_at(task.budget, task.seed))


@strategy("random-sizes", "random sizes around the uniform ones, strongest L2 norms stay")
def random_sizes(task: Task) -> Found:
    draw = random.Random(task.seed)
    base = task.space.uniform_at(task.budget)
    sizes = {n: k * draw.uniform(0.4, 1.6) for n, k in base.sizes.items()}
    return Found(task.fit(sizes, task.space.magnitudes()))
