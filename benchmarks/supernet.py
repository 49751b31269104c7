"""Is a larger random supernet better to search than a small pretrained network, at equal final MACs and lower cost?

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m benchmarks.supernet --retrain-steps 500

The ablation of the paper (DMS, "pretraining vs supernet size") on the thin MobileNetV2 and the images of `benchmarks.real`
(task `fashion`, small).  Every row ends at the same absolute MACs, a share of those of the thin network.  What a search finds
is retrained from random weights with the recipe of the dense network ("retrained"), and, beside it, goes on for as many steps
from the weights that the search has trained ("inherited").  Supernets are grown by `dmscale.expand` and then drawn anew.
One JSON for each row and seed below `--out`; what is there is not repeated, so the command resumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dmscale
from benchmarks.latency_search import spread, task_of
from benchmarks.real import nets
from benchmarks.real.tasks import Problem, Setup, fashion
from dmscale import budget as budgets
from dmscale import recovery
from dmscale.compare import RECALIBRATION, Recipe, Stream, recover
from dmscale.strategies.search import search


@dataclass(frozen=True)
class Row:
    """What a row starts from: the thin network `width` times as wide with `depth` times its removable blocks."""

    about: str
    width: float = 1.0
    depth: float = 1.0
    pretrained: bool = False
    searched: bool = True


ROWS = {
    "uniform": Row("none: uniform widths of the thin network", searched=False),
    "pretrained": Row("the thin network, pretrained", pretrained=True),
    "scratch": Row("the thin network, random"),
    "supernet-2": Row("1.15 as wide, twice the blocks, random", 1.15, 2),
    "supernet-4": Row("1.6 as wide, twice the blocks, random", 1.6, 2),
}


def drawn_anew(net: nn.Module, seed: int) -> nn.Module:
    """`net` with fresh weights, each layer's by its own rule for its present size, so that nothing of the old is left."""
    torch.manual_seed(seed)
    for m in net.modules():
        if callable(reset := getattr(m, "reset_parameters", None)):
            reset()
    return net.to(memory_format=torch.channels_last)  # a step is a sixth to a third quicker on a CPU


def start(problem: Problem, row: Row, seed: int) -> nn.Module:
    """The network that is searched."""
    if row.pretrained:
        return problem.model().to(memory_format=torch.channels_last)
    torch.manual_seed(0)  # what can grow depends on the weights: with these, on zeros, everything
    net: nn.Module = nets.ThinMobileNet()
    if (row.width, row.depth) != (1, 1):
        net = dmscale.expand(net, torch.zeros_like(problem.example), width=row.width, depth=row.depth)
        assert not net.dmscale_expansion["kept"]
    return drawn_anew(net, seed)


def run(problem: Problem, row: Row, seed: int, steps: tuple[int, int], method: str, budget: float) -> dict[str, Any]:
    """Search, then retrain and recover: accuracies in percent, and costs in steps of the thin network.

    steps: of the search, and of retraining and recovery each.
    budget: share of the MACs of the thin network.
    """
    clock, device = time.perf_counter(), torch.device("cpu")
    thin = dmscale.trace(nets.ThinMobileNet(), problem.example, verify=False).cost().macs
    space = dmscale.trace(start(problem, row, seed), problem.example)
    wanted = budgets.Budget({"macs": budget * thin})
    lr = problem.recipe["lr"]
    recipe = Recipe(problem.criterion, problem.recipe["optimizer"], lr, lr, *steps)
    result: dict[str, Any] = {"supernet": space.cost().macs / thin, "search": 0.0, "pretraining": 0.0}
    if not row.searched:
        structure = space.uniform_at(wanted)
    else:
        task = task_of(problem, space, wanted, recipe, seed)
        torch.manual_seed(seed)
        found = search(task, method=method).structure
        assert found is not None and budgets.satisfied(space.cost(found), wanted)
        structure = found
        result["search"] = result["supernet"] * steps[0]
        result["pretraining"] = float(problem.settings["dense_steps"]) if row.pretrained else 0.0
        result["search_s"] = time.perf_counter() - clock
        small = space.export(structure).to(memory_format=torch.channels_last)
        recovery.recalibrate(small, task.calibration(RECALIBRATION))
        recover(small, task.stream, recipe, recipe.recovery_steps, lambda loss: None)
        result["inherited"] = problem.evaluate(small)
    small = drawn_anew(space.export(structure), seed)
    recover(small, Stream(problem.train, seed, device), recipe, recipe.recovery_steps, lambda loss: None)
    result["retrained"] = problem.evaluate(small)
    cost = space.cost(structure)
    result |= {"macs": cost.macs, "params": cost.params, "retraining": cost.macs / thin * steps[1]}
    result |= {"blocks": sum(structure.sizes[n] for n, d in space.dimensions.items() if d.kind == "depth")}
    return result | {"seconds": time.perf_counter() - clock, "structure": json.loads(structure.to_json())}


def finished(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result that `path` holds, made first where it is missing; the file is written whole or not at all."""
    if not path.exists():
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(result) + "\n")
        temporary.replace(path)
        seen = ", ".join(f"{k} {result[k]:.2f}" for k in ("retrained", "inherited", "seconds") if k in result)
        print(f"{time.strftime('%H:%M:%S')} {path}: {seen}", flush=True)
    return json.loads(path.read_text())


def table(of_row: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a line for each row; below it the difference to the pretrained network, seed by seed."""
    lines = [
        "| searched | its MACs | retrained % | inherited % | blocks | params | pretraining + search | retraining |"
    ]
    lines.append(f"| --- |{' ---: |' * 7}")
    notes = []
    for name, runs in of_row.items():
        mean = {k: statistics.fmean(r[k] for r in runs) for k in runs[0] if isinstance(runs[0][k], (int, float))}
        cells = [f"{mean['supernet']:.2f}"]
        for kind in ("retrained", "inherited"):
            cells.append(spread([r[kind] for r in runs], ".2f") if kind in mean else "")
            if kind in mean and name != "pretrained":
                less = [r[kind] - other[kind] for r, other in zip(runs, of_row["pretrained"])]
                notes.append(f"{ROWS[name].about}, {kind}, less pretrained: {spread(less, '+.2f')}")
        cells += [
            f"{mean['blocks']:.1f}",
            f"{mean['params'] / 1e3:.1f}k",
            f"{mean['pretraining']:.0f} + {mean['search']:.0f}",
        ]
        lines.append(f"| {ROWS[name].about} | {' | '.join(cells)} | {mean['retraining']:.0f} |")
    return "\n".join([*lines, "", *notes])


def main(seeds: int, retrain_steps: int, methods: str, budget: float, out: Path) -> None:
    """Run what is missing, seed by seed, and print a table for each method and the seeds so far."""
    problem = fashion(Setup("small", torch.device("cpu"), False, out / "dense"))[0]
    steps = (problem.recipe["search_steps"], retrain_steps)
    print(f"the thin network, pretrained: {problem.evaluate(problem.model()):.2f} %", flush=True)
    for method in methods.split(","):
        of_row: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
        for seed in range(seeds):
            for name, row in ROWS.items():
                folder = f"{name}-{method}" if row.searched else name
                path = out / f"{budget:g}-retrain-{retrain_steps}" / folder / f"seed-{seed}.json"
                of_row[name].append(finished(path, lambda: run(problem, row, seed, steps, method, budget)))
            print(f"\n{method}, {seed + 1} seeds, {retrain_steps} steps of retraining\n\n{table(of_row)}\n", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.supernet", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--retrain-steps", type=int, default=1000, help="as the dense network by default")
    parser.add_argument("--methods", default="knapsack", help="of the search, several with commas; knapsack,dms say")
    parser.add_argument("--budget", type=float, default=0.25, help="share of the MACs of the thin network")
    parser.add_argument("--out", type=Path, default=Path("runs/supernet"))
    main(**vars(parser.parse_args()))
