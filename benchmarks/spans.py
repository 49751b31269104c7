"""python -m benchmarks.spans --seeds 5: over how many steps the default search averages what it compares dimensions by.

The demo's networks and recipe, on a quarter of the training scans held out (another one for each seed), the test scans
untouched: to choose `RECENT` and `FEWEST` of `dmscale.methods.knapsack`.  A span of 100 steps is that of importance itself:
one average for all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from unittest import mock

import torch

from dmscale import demo
from dmscale.methods import knapsack

SPANS = (100, 10, 5, 2, 1)
BUDGETS = (0.25, 0.1)


def held_out(seed: int) -> demo.Digits:
    """The demo's training scans, a quarter of them as the test scans."""
    data = demo.load_digits()
    images, labels = data.train
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(100 + seed))
    cut = len(order) * 3 // 4
    return demo.Digits(
        (images[order[:cut]], labels[order[:cut]]), (images[order[cut:]], labels[order[cut:]]), data.empty
    )


def accuracies(name: str, seed: int, steps: int | None = None) -> dict[tuple[str, float], float]:
    """(row, budget) -> percent of the held-out scans, of uniform scaling and of a search by each span.

    Args:
        steps: of everything, in place of the demo's numbers.
    """
    recipe, data = demo.RECIPES[name], held_out(seed)
    if steps is not None:
        recipe = demo.Recipe(recipe.network, steps, steps, steps)
    job = demo.Job(name, recipe, data, seed)
    torch.manual_seed(seed)
    dense = recipe.network()
    demo.train(dense, job, recipe.train_steps, recipe.learning_rate, stage=0)
    found = {}
    for budget in BUDGETS:
        found["uniform", budget] = demo.accuracy(demo.scale_at_once(dense, "uniform", budget, job)[0], data)
        for span in SPANS:
            with mock.patch.multiple(knapsack, RECENT=0.0, FEWEST=span):
                small, *_ = demo.search_and_tune(dense, budget, job)
            found[f"{span} steps", budget] = demo.accuracy(small, data)
    return found


def table(seeds: Sequence[int], steps: int | None = None) -> str:
    """Mean, standard deviation and least of all seeds, as markdown."""
    nets = list(demo.RECIPES)
    runs = {name: [accuracies(name, seed, steps) for seed in seeds] for name in nets}
    columns = [f"{name} {budget:.0%}" for name in nets for budget in BUDGETS]
    lines = ["| levels over | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in ("uniform", *(f"{span} steps" for span in SPANS)):
        cells = [row]
        for name in nets:
            for budget in BUDGETS:
                values = [run[row, budget] for run in runs[name]]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f} ({min(values):.1f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spans", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    torch.set_num_threads(1)
    print(table(range(parser.parse_args().seeds)))
