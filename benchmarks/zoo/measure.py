"""What the zoo records of one model: whether dmscale keeps its word on it, what is free, and why the rest is not."""

from __future__ import annotations

import contextlib
import itertools
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dmscale
from dmscale import axes, certify, running

from .entry import Entry

TOLERANCE = 1e-4
"""Largest relative error of an exported model against the gated one."""
STRUCTURES = 3
"""Random structures tried on each model."""
NATURAL = (
    "an axis of the model's output", "vocabulary", "an axis of the model's input", "spatial", "a constant",
    "index of a concatenation", "kernel size",
)  # fmt: skip
"""Reasons that no rule should remove, the weightiest first: they are not in the summary of causes."""


@dataclass
class Row:
    """One line of the results.

    status: 'exact' (error <= 1e-4 and MACs equal), 'inexact', 'refused' (an error of dmscale's own), 'crashed' (any other
        exception), 'timeout' or 'skipped' (a package is missing).
    problem: what was raised, or what differs.
    dimensions: kind -> number.
    params, macs: of the full model on the example inputs.
    free_params, free_macs: share that goes when every width and the heads are at their minimum, all blocks kept.
    half_macs: MACs at half width and half the heads, as a share.
    error: largest relative error of exported against gated over the structures; macs_equal: predicted = counted on all,
        experts aside that a router gives other rows.
    read_s, trace_s: seconds of a trace without and with its trial; export_s: median seconds of an export, unverified.
    forward_s: seconds of the forward on meta tensors; 0 where it does not run there.
    causes: reason (without its place) -> share of the parameters that stay at the least sizes because of it.
    unknown: operator without a rule -> modules that ran it.
    frozen_by_unknown: operator without a rule -> names of the dimensions that it froze.
    """

    name: str
    family: str
    status: str = "crashed"
    problem: str = ""
    dimensions: dict[str, int] = field(default_factory=dict)
    frozen: int = 0
    params: int = 0
    macs: int = 0
    free_params: float = 0.0
    free_macs: float = 0.0
    half_macs: float = 1.0
    error: float = 0.0
    macs_equal: bool = False
    read_s: float = 0.0
    trace_s: float = 0.0
    export_s: float = 0.0
    forward_s: float = 0.0
    causes: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, list[str]] = field(default_factory=dict)
    frozen_by_unknown: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(entry: Entry) -> Row:
    """Trace, certify, sample, gate, export and count one entry; whatever it raises becomes part of the row."""
    row = Row(entry.name, entry.family)
    warnings.simplefilter("ignore")
    try:
        torch.manual_seed(0)
        model, inputs = entry.build()
        _measure(row, non_trivial(model), inputs)
    except dmscale.DmscaleError as error:
        row.status, row.problem = "refused", said(error)
    except Exception as error:  # a row of the table, whatever it was
        row.status, row.problem = "crashed", said(error)
    return row


def _measure(row: Row, model: nn.Module, inputs: Any) -> None:
    row.trace_s, space = timed(lambda: dmscale.trace(model, inputs))
    row.read_s, _ = timed(lambda: dmscale.trace(model, inputs, verify=False))
    row.forward_s = _meta_forward(model, inputs)
    _describe(row, space)
    problems = []
    if (counted := counted_macs(model, inputs)) != row.macs:
        problems.append(f"MACs predicted {row.macs}, counted {counted}")
    seconds = []
    for seed in range(STRUCTURES):
        structure = space.sample(seed=seed)
        took, small = timed(lambda chosen=structure: space.export(chosen, verify=False))
        seconds.append(took)
        row.error = max(row.error, certify.compare(space.gate(structure), small, inputs))
        cost = space.cost(structure)
        predicted = cost.macs - int(sum(cost[f"macs in {path}"] for path in space.routed))
        counted = counted_macs(small, inputs, space.routed)
        if predicted != counted:
            problems.append(f"MACs of structure {seed} predicted {predicted}, counted {counted}")
    row.export_s, row.macs_equal = statistics.median(seconds), not problems
    if not row.error <= TOLERANCE:
        problems.insert(0, f"exported and gated differ by {row.error:.1e}")
    row.status, row.problem = "inexact" if problems else "exact", "; ".join(problems[:2])


def _describe(row: Row, space: dmscale.SearchSpace) -> None:
    full = space.cost()
    least = space.cost(space.structure({n: d.lowest for n, d in space.dimensions.items() if d.kind != "depth"}))
    row.dimensions = dict(Counter(d.kind for d in space.dimensions.values()))
    row.frozen, row.params, row.macs = len(space.frozen), full.params, full.macs
    row.free_params, row.free_macs = 1 - least.params / max(full.params, 1), 1 - least.macs / max(full.macs, 1)
    row.half_macs = space.cost(space.uniform(0.5)).macs / max(full.macs, 1)
    row.causes = causes(space)
    row.unknown = {op: sorted(paths) for op, paths in space.trace.record.unknown.items()}
    for operator, paths in row.unknown.items():
        told = [f"in {path or 'the model'} ({operator})" for path in paths]
        row.frozen_by_unknown[operator] = [n for n, why in space.frozen.items() if any(t in why for t in told)]


def causes(space: dmscale.SearchSpace) -> dict[str, float]:
    """Reason, without its place -> the share of parameters that stay at the least sizes and that it holds, largest first.

    A natural reason counts for those parameters alone that no other holds, and the weightiest of them.
    """
    parameters = dict(space.model.named_parameters())
    least = {a: d.count(a.size, d.lowest) for d in space.dimensions.values() for a in d.axes}
    held = Counter[str]()
    for name, dims in space.trace.slots.items():
        if name in parameters:
            stay = int(axes.measure(tuple(a for dim in dims for a in dim), least))  # type: ignore[call-overload]
            held.update(dict.fromkeys(_reasons(dims), stay))
    total = sum(p.numel() for p in parameters.values())
    return {reason: n / total for reason, n in held.most_common()}


def _reasons(dims: tuple[axes.Dim, ...]) -> set[str]:
    frozen = [a.reasons for dim in dims for a in axes.atoms(dim) if a.reasons]
    others = {_placeless(next(iter(why))) for why in frozen if not any(r.startswith(NATURAL) for r in why)}
    natural = (start for start in NATURAL if any(r.startswith(start) for why in frozen for r in why))
    return others or set(itertools.islice(natural, 1))


def _placeless(reason: str) -> str:
    """`softmax over it in blocks.3.attn (_softmax)` -> `softmax over it (_softmax)`; numbers of sizes are left out."""
    reason = re.sub(r" in \S+( \S+)? (\([^()]*\))", r" \2", reason)
    return re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "n", reason)[:120]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _meta_forward(model: nn.Module, inputs: Any) -> float:
    from benchmarks.trace_time import meta_forward

    try:
        return timed(meta_forward(model, inputs))[0]
    except Exception:  # forwards that look at values do not run without any
        return 0.0


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:400]


def non_trivial(model: nn.Module) -> nn.Module:
    """In evaluation mode, with nothing constant: zeros and ones of an initialisation would hide a wrong slice."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        for p in model.parameters():
            if p.numel() > 1 and p.is_floating_point() and bool((p == p.flatten()[0]).all()):
                constant = float(p.flatten()[0])
                p.uniform_(0.5, 1.5).mul_(constant) if constant > 0.1 else p.uniform_(-0.2, 0.2)
    return model.eval()


def counted_macs(model: nn.Module, inputs: Any, without: Sequence[str] = ()) -> int:
    """MACs of one forward by PyTorch's counter, which counts two FLOPs for each; but for those in the modules `without`.

    How many rows an expert gets is for its router to say: another structure routes otherwise.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:  # the counter follows backward passes too, and fails on a parameter that a module takes as input
        p.requires_grad_(False)
    try:
        with countable(), FlopCounterMode(display=False) as counter:
            running.outputs(model, inputs)
    finally:
        for p in learning:
            p.requires_grad_(True)
    in_modules = counter.get_flop_counts()
    left_out = [sum(in_modules.get(f"{type(model).__name__}.{path}", {}).values()) for path in without]
    return (counter.get_total_flops() - sum(left_out)) // 2


@contextlib.contextmanager
def countable() -> Iterator[None]:
    """Attention, `nn.MultiheadAttention` and recurrent layers by plain matrix products: all that the counter sees."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
