"""How long does a trace take, against the same forward on meta tensors under an empty dispatch mode?

    python -m benchmarks.trace_time [--zoo | --deployed | --once]

For each model: the median of interleaved runs of (a) the forward on meta tensors under a dispatch mode that does nothing,
(b) `dmscale.trace` without its trial, with no result of a meta kernel remembered from before (`kernels.py`), (c) the trial
(certification) in units of one real forward, and, where `torch-pruning` is installed, (d) its dependency graph.
Goals: b <= 3 a, c < 10 forwards.

`--zoo` times (b) against (d) alone, on every model of the zoo from timm and torchvision of which torch-pruning builds a graph,
with the small inputs of the zoo, which make the real forward inside (d) cheap.  `--deployed` does so at the input size that
each model of timm and each classifier of torchvision is made for, one image, as its user would call both.  Both call each tool
on one model again and again, with all memory that it needs at hand.  `--once` is what a user waits for: each model once, at the
size that it is made for, in a process that runs one of the tools alone, three processes each.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dmscale
from benchmarks.models import MODELS, clock, timm_model
from dmscale import certify, kernels, running
from dmscale.clone import clone, on_meta
from dmscale.known import quiet
from dmscale.sources import allow_missing_torchvision_operators
from dmscale.tracer import Tracer


class Empty(TorchDispatchMode):
    """Calls every operator and does nothing else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def seconds(function: Callable[[], Any]) -> float:
    """Seconds of one call, by `models.clock`, which pays for no garbage but its own."""
    gc.collect()
    now = clock()
    start = now()
    function()
    return now() - start


class KeepsIntegers(Tracer):
    """`Empty` for forwards that look at their integers: the tracer's own run without any inference."""

    @staticmethod
    def kernel(func: Any, args: Any, kwargs: Any) -> Any:
        """The meta kernel itself, nothing from memory."""
        return func(*args, **kwargs)

    def _infer(self, *args: Any) -> None:
        """Nothing."""


def meta_forward(model: nn.Module, inputs: Any) -> Callable[[], Any]:
    """The forward on meta tensors under an empty mode; integers keep their elements where the forward looks at them."""
    twin = quiet(clone(model, on_meta)).eval()
    args, kwargs = running.map_tensors(on_meta, running.arguments(inputs))

    def run(mode: Callable[[], TorchDispatchMode]) -> None:
        with torch.no_grad(), mode():
            twin(*args, **kwargs)

    try:
        run(Empty)
        return lambda: run(Empty)
    except Exception:  # positions made on the device of the weights are meta, and the forward looks at them
        return lambda: run(lambda: KeepsIntegers(meta=True))


def torch_pruning(model: nn.Module, inputs: Any) -> float | None:
    """Seconds of torch-pruning's graph, or None where it is not installed or fails."""
    try:
        import torch_pruning as tp

        example = inputs if isinstance(inputs, dict) else inputs[0] if isinstance(inputs, tuple) else inputs
        return seconds(lambda: tp.DependencyGraph().build_dependency(model, example_inputs=example))
    except Exception:
        return None


def main(repeats: int = 7) -> None:
    """Print one row a model."""
    print("| model | meta forward ms | trace ms | ratio | trial / forward | torch-pruning graph ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, inputs = make()
        model.eval()
        forward = meta_forward(model, inputs)
        a, b = [], []
        for _ in range(repeats):
            a.append(seconds(forward))
            kernels.forget()
            b.append(seconds(lambda: dmscale.trace(model, inputs, verify=False)))
        space = dmscale.trace(model, inputs, verify=False)
        real = min(seconds(lambda: running.outputs(model, inputs)) for _ in range(3))
        trial = seconds(lambda: certify.certify(space))
        other = torch_pruning(model, inputs)
        ratio = statistics.median(x / y for x, y in zip(b, a))
        print(
            f"| {name} | {statistics.median(a) * 1e3:.0f} | {statistics.median(b) * 1e3:.0f} | {ratio:.2f} | "
            f"{trial / real:.1f} | {'-' if other is None else f'{other * 1e3:.0f}'} |",
            flush=True,
        )


def as_deployed(name: str) -> tuple[nn.Module, Any] | None:
    """The zoo's model `name` with one image of the size that it is made for; None where nothing says which that is."""
    from benchmarks.zoo import vision

    library, _, name = name.partition(":")
    if library == "timm":
        options = {n: o for n, _, o in vision.TIMM.values()} | {n: o for n, (_, o) in vision.MORE_TIMM.items()}
        import timm

        model = timm.create_model(name, **{k: v for k, v in options[name].items() if k != "img_size"})
        return model, torch.randn(1, *model.default_cfg["input_size"])
    if name not in vision.CLASSIFICATION:
        return None
    import torchvision

    options = {k: v for k, v in vision.SIZED.get(name, {}).items() if k != "image_size"}
    size = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, weights=None, **options), torch.randn(1, 3, size, size)


def calls_once(tool: str) -> dict[str, float | None]:
    """Seconds of the one call of a tool, "dmscale" or "torch-pruning", on each model that the zoo has of both libraries."""
    from benchmarks.zoo import entries, peers

    def ours(model: nn.Module, inputs: Any) -> float:
        return seconds(lambda: dmscale.trace(model, inputs, verify=False))

    call = ours if tool == "dmscale" else torch_pruning
    call(*timm_model("resnet18"))  # whatever is imported at a first use
    took: dict[str, float | None] = {}
    for entry in peers.entries(entries()):
        torch.manual_seed(0)
        if (made := as_deployed(entry.name)) is not None:
            took[entry.name] = call(made[0].eval(), made[1])
    return took


def once(processes: int = 3) -> None:
    """Print a line a model of which torch-pruning builds a graph: medians of so many processes of each tool."""
    tools = ("dmscale", "torch-pruning")
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    for _ in range(processes):
        for tool in tools:
            run = subprocess.run(
                [sys.executable, "-m", "benchmarks.trace_time", "--once", tool], stdout=subprocess.PIPE, check=True
            )
            runs[tool].append(json.loads(run.stdout.splitlines()[-1]))
    ratios = []
    for name in runs["dmscale"][0]:
        if any(run[name] is None for run in runs["torch-pruning"]):
            continue
        a, b = (statistics.median(run[name] for run in runs[tool]) for tool in tools)
        ratios.append(a / b)
        print(f"{name}: {a * 1e3:.0f} ms, torch-pruning {b * 1e3:.0f} ms, ratio {a / b:.2f}")
    summary(ratios)


def summary(ratios: list[float]) -> None:
    """Print how many of the models are traced in less time than torch-pruning builds its graph."""
    low, middle, high = statistics.quantiles(ratios)
    print(f"quicker on {sum(r < 1 for r in ratios)} of {len(ratios)}; ratio {middle:.2f} ({low:.2f} to {high:.2f})")


def in_turns(model: nn.Module, inputs: Any, turns: int) -> tuple[list[float], list[float]]:
    """Seconds of our trace, remembering nothing, and of torch-pruning's graph, which must build."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(turns):
        took = torch_pruning(model, inputs)
        assert took is not None
        theirs.append(took)
        kernels.forget()
        ours.append(seconds(lambda: dmscale.trace(model, inputs, verify=False)))
    return ours, theirs


def zoo(deployed: bool, repeats: int = 3) -> None:
    """Print a line a model, and how many of them are traced in less time than torch-pruning builds its graph.

    Medians of `repeats` turns; of five times as many where these do not put a fifth between the two, or ours behind.
    """
    from benchmarks.zoo import entries, peers

    ratios: list[float] = []
    for entry in peers.entries(entries()):
        torch.manual_seed(0)
        made = as_deployed(entry.name) if deployed else entry.build()
        if made is None:
            continue
        model, inputs = made
        model.eval()
        if torch_pruning(model, inputs) is None:
            continue
        in_turns(model, inputs, 1)  # not counted: whatever is imported at a first use
        ours, theirs = in_turns(model, inputs, repeats)
        if statistics.median(ours) > 0.8 * statistics.median(theirs):
            for times, more in zip((ours, theirs), in_turns(model, inputs, 4 * repeats)):
                times += more
        a, b = statistics.median(ours), statistics.median(theirs)
        ratios.append(a / b)
        print(f"{entry.name}: {a * 1e3:.0f} ms, torch-pruning {b * 1e3:.0f} ms, ratio {a / b:.2f}", flush=True)
    summary(ratios)


if __name__ == "__main__":
    if sys.argv[1:] == ["--once"]:
        once()
    elif sys.argv[1:]:
        warnings.simplefilter("ignore")
        allow_missing_torchvision_operators()
        torch.set_num_threads(1)
        if sys.argv[1] == "--once":
            print(json.dumps(calls_once(sys.argv[2])))
        else:
            zoo(sys.argv[1] == "--deployed")
    else:
        main()
