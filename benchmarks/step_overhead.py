"""What does a search step cost against the same plain training step?

    python -m benchmarks.step_overhead

Time: medians of interleaved plain and search steps (forward, backward, AdamW) of one process.  Memory: peak resident set of
a process that runs three steps of one kind, above that of a process that has built the model and the optimizer only.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dmscale
from benchmarks.models import llama, timm_model

SETTINGS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50, 128 px, batch 16": lambda: timm_model("resnet50", 128, 16),
    "efficientnet_b0, 128 px, batch 16": lambda: timm_model("efficientnet_b0", 128, 16),
    "deit_tiny, 224 px, batch 8": lambda: timm_model("deit_tiny_patch16_224", 224, 8),
    "llama, 4 layers of 256, 8 x 128 tokens": lambda: llama(4, 256, 8, 128),
}


def loss_of(model: nn.Module, inputs: Any) -> torch.Tensor:
    """A scalar that uses every output."""
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    out = out if isinstance(out, torch.Tensor) else out.logits
    return torch.nn.functional.cross_entropy(out.flatten(0, -2), torch.zeros(out[..., 0].numel(), dtype=torch.long))


def steppers(name: str, kinds: tuple[str, ...]) -> dict[str, Callable[[], None]]:
    """kind -> one training step; 'none' does nothing."""
    torch.manual_seed(0)
    model, inputs = SETTINGS[name]()
    model.train()
    out: dict[str, Callable[[], None]] = {}
    for kind in kinds:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        run: nn.Module = model
        if kind == "search":
            search = dmscale.Search(dmscale.trace(model, inputs, verify=False), "50% macs", 1000)
            search.attach(optimizer)
            run = search.model.train()

        def step(run: nn.Module = run, optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss_of(run, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

        out[kind] = step if kind != "none" else lambda: None
    return out


def peak_mb(name: str, kind: str) -> float:
    """Peak resident set, in MB, of a fresh process that runs three steps of `kind`."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step_overhead", name, kind]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main(repeats: int = 5) -> None:
    """Print one row a setting."""
    print("| model | plain s | search s | time ratio | plain MB | search MB | memory ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in SETTINGS:
        steps = steppers(name, ("plain", "search"))
        times: dict[str, list[float]] = {kind: [] for kind in steps}
        for i in range(repeats + 1):
            for kind, step in steps.items():
                start = time.perf_counter()
                step()
                if i:  # the first one warms up
                    times[kind].append(time.perf_counter() - start)
        base, plain, search = (peak_mb(name, kind) for kind in ("none", "plain", "search"))
        a, b = (statistics.median(times[k]) for k in ("plain", "search"))
        ratio = statistics.median(y / x for x, y in zip(times["plain"], times["search"]))
        plain, search = plain - base, search - base
        print(
            f"| {name} | {a:.2f} | {b:.2f} | {ratio:.2f} | {plain:.0f} | {search:.0f} | {search / plain:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        # what a trace imports (meta kernels, 50 to 90 MB) is no memory of a step: every process traces once
        dmscale.trace(*SETTINGS[sys.argv[1]](), verify=False)
        run = steppers(sys.argv[1], (sys.argv[2],))[sys.argv[2]]
        for _ in range(3):
            run()
        # not getrusage: its maximum is inherited from the parent process
        high = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(json.dumps(int(high.split()[1]) / 1024))
    else:
        main()
