"""Is the cost of 10,000 structures of resnet50 cheaper than one forward pass of its batch of 8?

python -m benchmarks.cost_speed
"""

from __future__ import annotations

import statistics

import numpy as np
import torch

import dmscale
from benchmarks.models import clock, timm_model


def main(count: int = 10_000, repeats: int = 3) -> None:
    """Print both times and their ratio."""
    now = clock()
    model, inputs = timm_model("resnet50", batch=8)
    space = dmscale.trace(model.eval(), inputs, verify=False)
    distinct = np.stack([space.vector(space.sample(seed)) for seed in range(200)])
    values = distinct[np.random.default_rng(0).integers(0, len(distinct), count)]  # 10,000 rows of sizes
    costs, forwards = [], []
    for _ in range(repeats):
        start = now()
        macs = space.costs.many(values, "macs")
        costs.append(now() - start)
        start = now()
        with torch.no_grad():
            model(*inputs)
        forwards.append(now() - start)
    assert len(macs) == count
    cost, forward = statistics.median(costs), statistics.median(forwards)
    print(
        f"MACs of {count} structures of resnet50: {cost * 1e3:.0f} ms; forward of batch 8: {forward * 1e3:.0f} ms; "
        f"ratio {cost / forward:.2f}"
    )


if __name__ == "__main__":
    main()
