"""How exactly, and how fast, does the fit meet a budget?

    python -m benchmarks.budget_exactness [pairs]

Random pairs (200 by default) of model and budget: one constraint; multiples of 8 or 16; two constraints; a constraint on a part
of the model.  Each is fitted from a random structure with random importance.  `used` is the share of the binding constraint
that the structure takes: at most 100%, and 99.5% or more where sizes allow.  Milliseconds are of this process alone.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dmscale
from benchmarks.models import llama, timm_model
from dmscale import budget

MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": lambda: timm_model("resnet18", 64),
    "mobilenetv3_small_050": lambda: timm_model("mobilenetv3_small_050", 64),
    "deit_tiny": lambda: timm_model("deit_tiny_patch16_224"),
    "llama, 4 layers": llama,
}
SCOPES = {"resnet18": "layer[34]", "mobilenetv3_small_050": "blocks.[345]", "deit_tiny": "blocks.*.mlp",
          "llama, 4 layers": "model.layers.*.mlp"}  # fmt: skip
KINDS = ("one", "multiples", "two", "scope")
METRICS = ("macs", "params", "bytes", "activations")


def drawn(space: dmscale.SearchSpace, keys: list[str], rng: random.Random) -> dict[str, float]:
    """A reachable share of the full cost for each metric."""
    least, full = space.cost(budget.smallest(space)), space.cost()
    return {key: rng.uniform(low + 0.03, 0.97) for key in keys if (low := least[key] / full[key]) < 0.9}


def main(pairs: int = 200) -> None:
    """Print one row a model and kind."""
    print("| model | budget | pairs | feasible | within 0.5% | used: least | used: median | ms: median | ms: most |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    each = -(-pairs // (len(MODELS) * len(KINDS)))
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, inputs = make()
        spaces = {m: dmscale.trace(model, inputs, multiple=m, verify=False) for m in (1, 8, 16)}
        for kind in KINDS:
            rng = random.Random(f"{name} {kind}")
            used, milliseconds = [], []
            for i in range(each):
                space = spaces[rng.choice((8, 16)) if kind == "multiples" else 1]
                keys = rng.sample(METRICS, 2 if kind == "two" else 1)
                keys = [f"{rng.choice(('macs', 'params'))} in {SCOPES[name]}"] if kind == "scope" else keys
                wanted = budget.parse(drawn(space, keys, rng) or {"macs": 0.7}, space)
                members = [m for d in space.dimensions.values() for m in space._members(d)]
                scores = {m: torch.rand(n).numpy() for m, n in members}
                start = space.sample(seed=i)
                clock = time.process_time()
                found = budget.fit(space, start, wanted, scores, keep=start)
                milliseconds.append(1000 * (time.process_time() - clock))
                cost = space.cost(found)
                used.append(max(cost[m] / t for m, t in wanted.targets.items()))
            print(
                f"| {name} | {kind} | {each} | {sum(u <= 1 for u in used)} | {sum(0.995 <= u <= 1 for u in used)} | "
                f"{min(used):.2%} | {statistics.median(used):.2%} | {statistics.median(milliseconds):.0f} | "
                f"{max(milliseconds):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
