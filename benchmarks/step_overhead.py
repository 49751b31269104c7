"""What does a search step cost against the same plain training step?

    python -m benchmarks.step_overhead [--full] [--repeats 9]

A step is forward, backward and AdamW.  The search is the default one, in two phases: while all is kept (warm-up), and at the
budget of 50% of the MACs, where most masks are at work.  Plain and search steps take turns in one process; time is that of the
process where it runs a single thread (what other processes take is not in it), else the wall's; medians, and the median of the
ratios of neighbours.  Beside it what a busy machine cannot change: the number of operators that a step runs, and the bytes that
a forward has made and its backward finds (inputs aside).  The schedule also solves a knapsack, at most 400 times in a
search: its time is given by itself.  Memory: peak resident set of a process that runs the steps, above that of one that has
built model and optimizer only, with an allocator that hands freed blocks back.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dmscale
from benchmarks.models import clock, llama, timm_model
from dmscale import budget

SETTINGS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50, 128 px, batch 16": lambda: timm_model("resnet50", 128, 16),
    "efficientnet_b0, 128 px, batch 16": lambda: timm_model("efficientnet_b0", 128, 16),
    "deit_tiny, 224 px, batch 8": lambda: timm_model("deit_tiny_patch16_224", 224, 8),
    "llama, 4 layers of 256, 8 x 128 tokens": lambda: llama(4, 256, 8, 128),
}
FULL: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "vit_small, 224 px, batch 16": lambda: timm_model("vit_small_patch16_224", 224, 16),
    "llama, 12 layers of 832, 4 x 256 tokens": lambda: llama(12, 832, 4, 256),
}
BUDGET, QUICK = "50% macs", 4
"""The budget, and the steps after which the second phase begins."""


def loss_of(model: nn.Module, inputs: Any) -> torch.Tensor:
    """A scalar that uses every output."""
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    out = out if isinstance(out, torch.Tensor) else out.logits
    return torch.nn.functional.cross_entropy(out.flatten(0, -2), torch.zeros(out[..., 0].numel(), dtype=torch.long))


def made(name: str, kinds: tuple[str, ...]) -> dict[str, tuple[Callable[[], None], Callable[[], torch.Tensor], Any]]:
    """kind (plain, whole, pruned) -> a training step, its loss alone, and its search; 'none' does nothing."""
    torch.manual_seed(0)
    model, inputs = (SETTINGS | FULL)[name]()
    model.train()
    space = dmscale.trace(model, inputs, verify=False)
    out = {}
    for kind in kinds:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        run, search = model, None
        if kind in ("whole", "pruned"):
            steps, warmup, decay = (10000, 0.05, 0.8) if kind == "whole" else (100, 0.0, QUICK / 100)
            search = dmscale.Search(space, BUDGET, steps, warmup=warmup, decay=decay)
            search.attach(optimizer)
            run = search.model.train()

        def step(run: nn.Module = run, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss_of(run, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

        def loss(run: nn.Module = run) -> torch.Tensor:
            return loss_of(run, inputs)

        for _ in range(QUICK + 1 if kind == "pruned" else 0):
            step()
        out[kind] = (step, loss, search) if kind != "none" else (lambda: None, loss, None)
    return out


class _Count(TorchDispatchMode):
    """The number of operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operators(step: Callable[[], None]) -> int:
    """How many operators a step runs."""
    with _Count() as count:
        step()
    return count.number


class _Made(TorchDispatchMode):
    """The storages that operators make, told from each other while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.storages.append((StorageWeakRef(storage), storage.nbytes()))
        return out


def saved_mb(loss: Callable[[], torch.Tensor], given: set[int]) -> float:
    """MB that are there for the backward once a loss has been computed, each storage once, those `given` left out.

    Not read through hooks on what is saved: where there are such, a gate lets go of nothing.
    """
    with _Made() as made:
        value = loss()
    alive = {ref.cdata: size for ref, size in made.storages if not ref.expired() and ref.cdata not in given}
    del value
    return sum(alive.values()) / 2**20


def peak_mb(name: str, kind: str) -> float:
    """Peak resident set, in MB, of a fresh process that runs some steps of `kind`."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step_overhead", "--peak", name, kind]
    # glibc gives every large block back at once then; by default its heap keeps a share that differs from run to run
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def solve_ms(search: dmscale.Search) -> float:
    """Milliseconds of one knapsack, the least of five."""
    scores = search.layout.by_member(search.importance)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        budget.allocate(search.space, search.budget, scores)
        best = min(best, 1000 * (time.process_time() - start))
    return best


def main(names: list[str], repeats: int) -> None:
    """Print two rows a setting."""
    now = clock()
    print(
        "| model | phase | plain s | search s | time ratio | operators | saved MB | peak MB | peak ratio | knapsack ms |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in names:
        peak = {kind: peak_mb(name, kind) for kind in ("none", "plain", "whole", "pruned")}
        peak = {kind: mb - peak["none"] for kind, mb in peak.items()}
        steps = made(name, ("plain", "whole", "pruned"))
        times: dict[str, list[float]] = {kind: [] for kind in steps}
        for i in range(repeats + 1):
            for kind, (step, *_) in steps.items():
                gc.collect()
                start = now()
                step()
                if i:  # the first one warms up
                    times[kind].append(now() - start)
        counted = {kind: operators(step) for kind, (step, *_) in steps.items()}
        model = steps["whole"][2].space.model
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        saved = {kind: saved_mb(loss, own) for kind, (_, loss, _) in steps.items()}
        for kind, phase in (("whole", "all kept"), ("pruned", "at the budget")):
            ratio = statistics.median(b / a for a, b in zip(times["plain"], times[kind]))
            a, b = (statistics.median(times[k]) for k in ("plain", kind))
            print(
                f"| {name} | {phase} | {a:.3f} | {b:.3f} | {ratio:.2f} | {counted['plain']} -> {counted[kind]} | "
                f"{saved['plain']:.0f} -> {saved[kind]:.0f} | {peak['plain']:.0f} -> {peak[kind]:.0f} | "
                f"{peak[kind] / peak['plain']:.2f} | {solve_ms(steps['pruned'][2]):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="the larger models too")
    parser.add_argument("--only", default="", help="settings whose name begins so")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak", nargs=2, metavar=("SETTING", "KIND"), help="print the peak resident set of one kind")
    arguments = parser.parse_args()
    if arguments.peak:
        ((step, *_),) = made(arguments.peak[0], (arguments.peak[1],)).values()
        for _ in range(3 if arguments.peak[1] == "pruned" else 3 + QUICK + 1):  # as many for all
            step()
        # not getrusage: its maximum is inherited from the parent process
        high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(json.dumps(int(high.split()[1]) / 1024))
    else:
        main(
            [n for n in (SETTINGS | FULL if arguments.full else SETTINGS) if n.startswith(arguments.only)],
            arguments.repeats,
        )
