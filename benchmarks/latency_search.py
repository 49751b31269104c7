"""Is a search for latency better than one for MACs, at equal latency?

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m benchmarks.latency_search --batch 64

The pretrained CIFAR ResNet-20 and the recipe of `benchmarks.real` (task `cifar10`, small).  Latency is that of the deployed batch
on the CPU, learnt as in `benchmarks.latency`.  With each seed one search meets a budget of MACs; the budget of the other is the
latency predicted for what the first one found.  Both are exported and recover alike.  At the end the dense and all exported
networks are measured in turns.  Runs are kept below `--out`, so the command resumes; a search for MACs serves every batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dmscale
from benchmarks.models import clock
from benchmarks.real.tasks import Problem, Setup, cifar10
from dmscale import budget as budgets
from dmscale import recovery, storage
from dmscale.compare import OF_CALIBRATION, RECALIBRATION, Recipe, Stream, recover
from dmscale.latency import Meter
from dmscale.strategies.base import Task
from dmscale.strategies.search import search


def task_of(problem: Problem, space: dmscale.SearchSpace, wanted: budgets.Budget, recipe: Recipe, seed: int) -> Task:
    """What `dmscale.compare` would give a strategy to do on `problem`, on the CPU."""
    device = torch.device("cpu")
    return Task(
        space, wanted, Stream(problem.train, seed, device),
        lambda n: list(itertools.islice(Stream(problem.train, seed + OF_CALIBRATION, device), n)),
        recipe.criterion, lambda p: recipe.optimizer(p, recipe.search_lr), recipe.search_steps, seed,
    )  # fmt: skip


def run(
    problem: Problem, space: dmscale.SearchSpace, wanted: budgets.Budget, seed: int, place: Path
) -> tuple[dmscale.Structure, nn.Module, float]:
    """Search, export and recover, unless `place` has it: structure, network, accuracy in percent."""
    if not (place / "result.json").exists():
        dense = problem.model()
        space.model.load_state_dict(dense.state_dict())
        rates = {"lr": problem.recipe["lr"], "search_lr": problem.recipe["lr"]}
        steps = {k: problem.recipe[k] for k in ("search_steps", "recovery_steps")}
        recipe = Recipe(problem.criterion, problem.recipe["optimizer"], **rates, **steps)
        task = task_of(problem, space, wanted, recipe, seed)
        torch.manual_seed(seed)
        start = time.perf_counter()
        found = search(task).structure
        assert found is not None and budgets.satisfied(space.cost(found), wanted)
        small = space.export(found)
        recovery.recalibrate(small, task.calibration(RECALIBRATION))
        recover(small, task.stream, recipe, recipe.recovery_steps, lambda loss: None)
        value = problem.evaluate(small)
        storage.save(small, place / "weights.safetensors", found)
        (place / "structure.json").write_text(found.to_json())
        (place / "result.json").write_text(json.dumps({"accuracy": value, "budget": str(wanted)}) + "\n")
        print(f"{place}: {value:.2f} %, {time.perf_counter() - start:.0f} s", flush=True)
    structure = dmscale.Structure.from_json((place / "structure.json").read_text())
    result = json.loads((place / "result.json").read_text())
    if result["budget"] != str(wanted) and "latency" in wanted.targets:
        raise SystemExit(f"{place} met {result['budget']}, and {wanted} is wanted now; remove it to run it again")
    return structure, dmscale.load(place / "weights.safetensors", problem.model), result["accuracy"]


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation as text."""
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def main(batch: int, budget: str, seeds: int, out: Path) -> None:
    """Run what is missing, measure, and print the table."""
    problem = cifar10(Setup("small", torch.device("cpu"), False, out))[0]
    torch.manual_seed(0)
    inputs = torch.randn(batch, *problem.example.shape[1:])
    space = dmscale.trace(problem.model(), inputs)
    meter = Meter(torch.device("cpu"), repeats=11, clock=clock(), steady=True)
    tag = budget.replace("%", "").replace(" ", "-")
    # kept beside the runs: a search that is resumed is given the same budget
    learnt = space.measure_latency(cache=out / f"latency-batch-{batch}.json", meter=meter)
    dense = problem.model()
    rows: dict[str, list[tuple[dmscale.Structure, nn.Module, float]]] = {"MACs": [], "latency": []}
    for seed in range(seeds):
        wanted = budgets.parse(budget, space)
        rows["MACs"].append(run(problem, space, wanted, seed, out / f"{tag}-macs" / f"seed-{seed}"))
        same = budgets.Budget({"latency": space.cost(rows["MACs"][-1][0])["latency"]})
        place = out / f"{tag}-latency-batch-{batch}" / f"seed-{seed}"
        rows["latency"].append(run(problem, space, same, seed, place))
    every = [r for of_target in rows.values() for r in of_target]
    first, *times = meter.models([dense, *(model for _, model, _ in every)], inputs)
    full = space.cost()

    print(f"\nbatch {batch}, {torch.get_num_threads()} threads, {seeds} seeds; learnt {learnt.explain(space)}\n")
    print("| budget | accuracy % | MACs % | predicted ms | measured ms |\n| --- | ---: | ---: | ---: | ---: |")
    print(f"| none (dense) | {problem.evaluate(dense):.2f} | 100 | {full['latency']:.2f} | {first:.2f} |")
    columns: dict[str, list[list[Any]]] = {}
    for i, (target, of_target) in enumerate(rows.items()):
        costs = [space.cost(s) for s, _, _ in of_target]
        columns[target] = [[a for _, _, a in of_target], [100 * c.macs / full.macs for c in costs],
                           [c["latency"] for c in costs], times[i * seeds : (i + 1) * seeds]]  # fmt: skip
        print(f"| {target} | {' | '.join(map(spread, columns[target], ('.2f', '.1f', '.2f', '.2f')))} |")
    a, b = columns["MACs"], columns["latency"]
    print(
        f"\nlatency less MACs, seed by seed: accuracy {spread([y - x for x, y in zip(a[0], b[0])], '+.2f')}, ", end=""
    )
    print(f"measured {spread([100 * (y / x - 1) for x, y in zip(a[3], b[3])], '+.1f')} %", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency_search", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="images a call, as deployed")
    parser.add_argument("--budget", default="25% macs", help="of the search for MACs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/latency-search"))
    main(**vars(parser.parse_args()))
