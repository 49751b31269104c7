"""python -m benchmarks.real --task cifar10 --size small --budget "25% macs" --strategies dmscale,knapsack --seeds 3 --out runs/

One folder for each problem, size and budget below `--out`; what is there is not repeated, so the command resumes.
`--tables` prints what is there as markdown, for docs/benchmarks.md, and trains nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch

import dmscale
from dmscale.strategies import REGISTRY
from dmscale.strategies.base import Strategy

from . import variants
from .data import NoData
from .tasks import SIZES, TASKS, Problem, Setup

MAIN = (
    "dmscale", "dms", "uniform", "random", "magnitude-l2", "taylor", "knapsack", "knapsack-exact",
    "knapsack-fisher", "torch-pruning-taylor",
)  # fmt: skip
"""What the small table of all tasks compares.  All strategies would take days on two cores."""

SMALL = ("cifar10", "fashion", "shakespeare", "stories", "nuclei")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--task", default="all", help=f"{', '.join(TASKS)}; several with commas; all is {', '.join(SMALL)}"
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--budget", action="append", help='as "25%% macs"; repeatable; by default those of the task')
    known = f"{', '.join(REGISTRY)}, and peers where installed"
    groups = f"main ({', '.join(MAIN)}), {', '.join(variants.GROUPS)} (ablations)"
    parser.add_argument("--strategies", default="all", help=f"all, {groups}, or of {known}")
    parser.add_argument("--headline", action="store_true", help="the first budget of each task only")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--only", default="", help="networks of the task whose name contains this")
    parser.add_argument(
        "--validation", action="store_true", help="evaluate on held-out training data, to choose settings"
    )
    parser.add_argument("--redo", default="", help="strategies whose finished runs are thrown away first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch; by default its own choice")
    parser.add_argument(
        "--search-steps", type=int, help="instead of the task's; keep such runs in an --out of their own"
    )
    parser.add_argument("--recovery-steps", type=int)
    parser.add_argument(
        "--dimensions", default="", help='globs, with commas, of the dimensions to search, as "*heads"; all by default'
    )
    parser.add_argument("--distill", help="what every recovery learns from the dense network: logits, features, ...")
    parser.add_argument("--tables", action="store_true", help="print the tables that are there and stop")
    args = parser.parse_args()
    if args.tables:
        print_tables(args.out)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    setup = Setup(args.size, torch.device(args.device), args.validation, args.out / "dense")
    failed = 0
    for name in SMALL if args.task == "all" else args.task.split(","):
        if name not in TASKS:
            parser.error(f"unknown task {name!r}; tasks are {', '.join(TASKS)}")
        try:
            problems = TASKS[name](setup)
        except NoData as missing:
            print(f"{name}: skipped, {missing}", flush=True)
            continue
        for problem in problems:
            if args.only in problem.name:
                for budget in args.budget or problem.budgets[: 1 if args.headline else None]:
                    failed += run(problem, setup, budget, args)
    return 1 if failed else 0


def run(problem: Problem, setup: Setup, budget: str, args: argparse.Namespace) -> int:
    """One table; the number of strategies that crashed (one that says it does not apply here did not)."""
    tag = budget.replace("%", "").replace(" ", "-").replace(",", "_")
    split = "-validation" if setup.validation else ""
    variant = f"-{args.distill.replace(',', '-').replace(' ', '')}" if args.distill else ""
    searched = [g for g in args.dimensions.split(",") if g]
    variant += "".join(f"-{g}" for g in searched).replace("*", "").replace(" ", "")
    folder = args.out / f"{problem.name}-{setup.size}{split}" / f"{tag}{variant}"
    print(f"== {problem.name}, {setup.size}, {budget} -> {folder}", flush=True)
    recipe = dict(problem.recipe)
    for option in ("search_steps", "recovery_steps"):
        if getattr(args, option) is not None:
            recipe[option] = getattr(args, option)

    def report(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    extra = beyond_the_package(args.strategies)
    known = {*REGISTRY, *(s.name for s in extra)}
    groups = {"main": MAIN, **variants.GROUPS}
    strategies = [n for n in groups[args.strategies] if n in known] if args.strategies in groups else args.strategies
    result = dmscale.compare(
        problem.model, problem.example, problem.train, problem.criterion, problem.evaluate, budget=budget, out=folder,
        strategies=strategies, seeds=args.seeds, metric=problem.metric, higher_is_better=problem.higher_is_better,
        extra=extra, redo=[n for n in args.redo.split(",") if n], settings=problem.settings, report=report,
        distill=args.distill, only=searched, **recipe,
    )  # fmt: skip
    print(result.markdown(), flush=True)
    return sum(not r.values and not r.problem.startswith("DmscaleError") for r in result.rows)


def beyond_the_package(names: str) -> list[Strategy]:
    """Strategies of other libraries that are installed, and, where one is named, the variants of the ablations."""
    found = list(variants.STRATEGIES) if ":" in names or names in variants.GROUPS else []
    for peer in ("torch_pruning_", "modelopt_"):
        try:
            found += importlib.import_module(f"benchmarks.peers.{peer}").STRATEGIES
        except ImportError:
            continue
    return found


def print_tables(out: Path) -> None:
    """Every table below `out`, with what it was made on."""
    for path in sorted(out.glob("**/table.md")):
        configs = [json.loads(p.read_text()) for p in sorted(path.parent.glob("*/seed-*/config.json"))]
        print(f"### {path.parent.parent.name}, {path.parent.name.replace('-', ' ')}\n\n{path.read_text()}")
        for device, threads, torch_, ours in sorted(
            {(c["device"], c["threads"], c["torch"], c["dmscale"]) for c in configs}
        ):
            dates = sorted(c["date"][:10] for c in configs)
            print(f"{dates[0]} to {dates[-1]}; {device}, {threads} threads; torch {torch_}, dmscale {ours}.\n")


if __name__ == "__main__":
    sys.exit(main())
