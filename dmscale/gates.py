"""Gates: run the full-size model as if parts of it were gone.

A mask acts where an axis is *consumed*.  Up to there a removed element may hold what it likes: masking the weight of the
linear or convolution that sums over it (`W * m`, O(weights)) equals masking its input.  Four more places need a mask:

- two activations that are contracted with each other (query and key over the head dims): the producers' rows are masked;
- a normalisation over a gated axis: its kept-count form.  For x' = m (x - mean_kept) sqrt(N / k) the full-size operator
  computes exactly the statistics of the k kept elements, and its scale is corrected by sqrt(k / N): true of LayerNorm,
  GroupNorm and every RMSNorm, whatever class implements it;
- a mean, variance or maximum anywhere in a forward: the same over what is kept (`calls.py`);
- a block: lerp(input, block(input), gate); a branch of a block: lerp(0, branch(input), gate);
- what an expert of a list gives, where its score is neither chosen nor under a softmax, or not its factor (`experts.py`).

All of it lives on a clone of the module tree that shares the user's parameters.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _unsafe_preserve_version_counter
from torch.nn.utils import parametrize

from . import attachment, axes, calls, remaking, running
from .axes import Axis, Dim
from .blocks import Blocks, Streams
from .branches import formed
from .calls import CallSite, FunctionCall, GatedForward
from .clone import clone
from .masking import Chosen, Kept, KeptInput, Masks, Product, along
from .tracer import Call, Contraction, Normalisation, Value
from .tracing import Trace

KEPT_COUNT = {"centred": True, "scaled": False, "mean square": False}
"""Kinds of normalisation that have a kept-count form -> whether the mean is subtracted."""


@dataclass(frozen=True, eq=False)
class WeightSite:
    """Mask parameter `name` of module `module` along its dimensions `dims` (position -> axes)."""

    module: str
    name: str
    dims: tuple[tuple[int, Dim], ...]


@dataclass(frozen=True, eq=False)
class InputSite:
    """Mask the first tensor that module `module` takes, along `dim` at `position`: cheaper than a larger weight."""

    module: str
    position: int
    dim: Dim


@dataclass(frozen=True, eq=False)
class NormSite:
    """Give module `module` its kept-count form over `dim` at `position`, from the end, of its input.

    `weight` is scaled where it is a parameter and there is a bias; else the output, without the `bias` that it holds.
    `input_kept`: whether the input is that or the output of a removable block, which the gate of the block keeps.
    `modified`: whether the forward writes to the output, which no gate must keep then.
    """

    module: str
    position: int
    dim: Dim
    group: Dim
    centred: bool
    over_space: bool
    weight: str | None
    bias: str | None
    input_kept: bool = False
    modified: bool = False


@dataclass(frozen=True, eq=False)
class ExpertSite:
    """Mask what module `module` gives with element `index` of `axis`: nothing else tells that it is gone."""

    module: str
    axis: Axis
    index: int


@dataclass(frozen=True)
class Sites:
    """Everywhere that a gated model differs from the user's."""

    weights: tuple[WeightSite, ...]
    inputs: tuple[InputSite, ...]
    norms: tuple[NormSite, ...]
    blocks: tuple[Blocks, ...]
    by_products: tuple[tuple[str, tuple[tuple[Dim, ...], ...]], ...] = ()
    calls: tuple[CallSite, ...] = ()
    experts: tuple[ExpertSite, ...] = ()


# -- planning: which places, or why an axis must stay ------------------------------------------------------------------


def plan(trace: Trace, blocks: Sequence[Blocks]) -> Sites:
    """Find a gate for every consumption of every free axis; freezes the axes that have none, with the reason."""
    weights: dict[tuple[str, str], dict[int, Dim]] = {}
    inputs: dict[str, InputSite] = {}
    norms: dict[str, NormSite] = {}
    functions = CallSites(trace)
    matters: set[int] | None = None
    found = _plan_lookups(trace, weights)
    for norm in trace.record.normalisations:
        free = [dim for dim in norm.dims if axes.is_free(dim)]
        if not free:
            continue
        if matters is None:
            matters = trace.record.matters()
        gives = trace.record.steps[norm.op].gives if norm.op in trace.record.steps else ()
        if gives and matters.isdisjoint(gives):
            continue  # nobody reads it: the mean over the heads of scores that nobody asked for
        if norm.kind == "selected by index":
            for dim in [d for d in free if trace.experts.keys().isdisjoint(axes.factors(d))]:
                axes.freeze(dim, f"{norm.kind} in {norm.path or 'the model'} ({norm.operator})")
            continue
        if norm.kind == "sum":
            for dim in free:
                _mask_producers(trace, dim, [norm.source], norm.path, norm.operator, weights, functions, norm.op)
            continue
        if norm.kind == "chosen":
            alone = not any(set(axes.atoms(dim)) & found for dim in free)
            if not functions.add(norm.op, free, norm.source, zero=alone):
                for dim in free:
                    axes.freeze(
                        dim, f"chosen from where no gate can be, in {norm.path or 'the model'} ({norm.operator})"
                    )
            continue
        site = _norm_site(trace, norm)
        # a normalisation written out is masked where it takes its statistics, if these calls can be found again
        by_parts = isinstance(site, str) or bool(_other_parts(trace, norm))
        power = -0.5 if norm.kind == calls.GIVEN_SCALE else 0
        where = [norm.group + dim for dim in free]  # in groups, channels are one dimension
        if by_parts and functions.add(norm.op, where, norm.source, power=power):
            continue
        if isinstance(site, str):
            for dim in norm.dims:
                axes.freeze(dim, site)
        else:
            norms[norm.path] = site
            bias = _bias_of(trace, norm)
            if bias is not None and bias in trace.slots:  # so that what is removed leaves as zero
                _mask(trace, norm.path, bias, _holding(trace, bias, norm.dims[0]), weights)
    _plan_scales(trace, functions)
    masked = {
        c.result.origin: norms[c.path].dim for c in trace.record.calls if c.path in norms and c.result is not None
    }
    removable = {path for stack in blocks for path in stack.paths}
    _note_kept_inputs(trace, norms, {path for stack in blocks if not stack.forms for path in stack.paths})
    streams = {path: s for stack in blocks for path, s in zip(stack.paths, stack.streams)}
    for call in sorted((c for c in trace.record.calls if c.path in removable), key=lambda c: c.start):
        # a block that is gone hands on its input, which must be zero there too
        for source, result in _renewed(call, streams.get(call.path, ())):
            if source.origin not in masked:
                masked.pop(result.origin, None)
    for contraction in trace.record.contractions:
        if axes.is_free(contraction.dim) and not _is_masked(contraction, masked):
            _plan_contraction(trace, contraction, weights, inputs, functions)
    sites = tuple(
        WeightSite(module, name, tuple(sorted((i, d) for i, d in dims.items() if axes.is_free(d))))
        for (module, name), dims in weights.items()
    )
    found_sites = Sites(
        tuple(s for s in sites if s.dims),
        tuple(s for s in inputs.values() if axes.is_free(s.dim)),
        tuple(s for s in norms.values() if axes.is_free(s.dim)),
        tuple(blocks),
        tuple(
            (key, tensors)
            for key, tensors in trace.record.by_products.items()
            if any(axes.is_free(d) for dims in tensors for d in dims)
        ),
        functions.kept(),
    )
    return replace(found_sites, experts=tuple(_expert_sites(trace, found_sites)))


def _expert_sites(trace: Trace, sites: Sites) -> Iterator[ExpertSite]:
    """Outputs of experts: where no score is masked, in a softmax or where some are chosen, and those used without theirs."""
    along = [(*s.dims,) for s in sites.weights] + [s.dims for s in sites.calls]
    masked = [d for dims in along for _, d in dims] + [s.dim for s in sites.inputs] + [s.dim for s in sites.norms]
    covered = {a for dim in masked for a in axes.atoms(dim)}
    found = {a: e for a, e in trace.experts.items() if not (a.reasons or (e.chosen and a in covered))}
    uses = _Uses(trace) if found else None
    for a, experts in found.items():
        assert uses is not None
        scores = {n.op for n in trace.record.normalisations if any(a in axes.atoms(d) for d in n.dims)}
        for i, paths in enumerate(experts.paths):
            calls = {path: trace.record.of("calls", path) for path in paths}
            own = [(c.start, c.end) for several in calls.values() for c in several]
            for path, several in calls.items():
                behind = {op for c in several if c.result is not None for op in uses.of(c.result.origin)}
                behind = {op for op in behind if not any(start < op <= end for start, end in own)}
                if behind and not (a in covered and behind <= scores | uses.products):
                    yield ExpertSite(path, a, i)


class _Uses:
    """What becomes of a tensor: the operators that take it, or what it is joined into.

    products: the operators that multiply two tensors.
    """

    def __init__(self, trace: Trace):
        self.record = trace.record
        self.takers: dict[int, list[int]] = {}
        for op, step in self.record.steps.items():
            for origin in set(step.takes).difference(step.gives):  # a view is the tensor itself
                self.takers.setdefault(origin, []).append(op)
        self.products = {c.op for c in self.record.contractions}
        self.products |= {op for op, s in self.record.steps.items() if s.operator == "mul" and len(set(s.takes)) == 2}

    def of(self, origin: int) -> Iterator[int]:
        """Numbers of operators; 0 for the model's caller."""
        if origin in self.record.results:
            yield 0
        for op in self.takers.get(origin, ()):
            step = self.record.steps[op]
            if step.operator in ("cat", "stack"):
                yield from self.of(step.gives[0])
            else:
                yield op


def _renewed(call: Call, streams: Streams) -> list[tuple[Value, Value]]:
    """What a block renews: as it took it, and as it leaves it."""
    if streams:
        given, parts = dict(call.given), dict(call.parts)
        return [(given[key], parts[place]) for place, key in streams]
    return [(call.source, call.result)] if call.source is not None and call.result is not None else []


def _note_kept_inputs(trace: Trace, norms: dict[str, NormSite], paths: set[str]) -> None:
    """Say of each site whether its input is kept by the gate of one of the blocks at `paths`."""
    ends = [v for c in trace.record.calls if c.path in paths for v in (c.source, c.result)]
    kept = {v.origin for v in ends if v is not None}
    for call in trace.record.calls:
        if call.path in norms and call.source is not None and call.source.origin in kept:
            norms[call.path] = replace(norms[call.path], input_kept=True)
        if call.path in norms and call.result is not None and call.result.origin in trace.record.modified:
            norms[call.path] = replace(norms[call.path], modified=True)


def _plan_scales(trace: Trace, functions: CallSites) -> None:
    """Gate products with a power of a size, wherever the same call always multiplies with that power of that size."""
    scales = trace.record.scales
    by_call = {s: calls.at(trace.record, s.op) for s in scales if axes.is_free(s.dim)}
    for s, call in by_call.items():
        others = [t for t in by_call if t.path == s.path and t.power == s.power and axes.same(t.dim, s.dim)]
        if call is None and any(by_call[t] is not None for t in others):
            continue  # what training mode has repeated of evaluation
        known = {id(by_call[t]) for t in others}
        if call is None or not all(id(f) in known for f in trace.record.functions if f.key == call.key):
            axes.freeze(s.dim, f"its size is fixed in {s.path or 'the model'} (power)")
        else:
            functions.scale(call, s.dim, s.power)


def _alike(a: FunctionCall, b: FunctionCall) -> bool:
    """Whether two calls of one function took and gave the same axes, but for those that stay; `keepdim` makes no difference."""
    if len(a.operands) != len(b.operands) or (a.result is None) != (b.result is None):
        return False
    pairs = [(v.dims, w.dims) for v, w in zip(a.operands, b.operands)]
    if a.result is not None and b.result is not None:
        pairs.append((tuple(filter(None, a.result.dims)), tuple(filter(None, b.result.dims))))
    return all(
        len(v) == len(w) and all(axes.same(p, q) or not (axes.is_free(p) or axes.is_free(q)) for p, q in zip(v, w))
        for v, w in pairs
    )


class CallSites:
    """The gates at calls of torch functions, as they are planned."""

    def __init__(self, trace: Trace):
        self.trace = trace
        self.sites: dict[tuple[str, str, int], CallSite] = {}

    def add(
        self, op: int, dims: Sequence[Dim], source: Value | None = None, zero: bool = False, power: float = 0
    ) -> bool:  # fmt: skip
        """Gate the call that ran operator `op` along `dims`; False where there is none, or it cannot be told apart.

        With `zero` it must also make zero what is masked: there were no weights to do so.  Of attention, `power` is that of the
        scale that it is given.
        """
        call = calls.at(self.trace.record, op)
        site = None if call is None else calls.site(call, dims, source)
        if call is None or site is None:
            return False
        key = (site.module, site.name, site.number)
        if not all(_alike(f, call) for f in self.trace.record.functions if f.key == key):
            return False  # a module called twice, or another call in training mode, and not with the same axes
        other = self.sites.get(key, site)
        alike = (
            other.operand == site.operand
            and len(other.dims) == len(site.dims)
            and all(i == j and axes.same(p, q) for (i, p), (j, q) in zip(other.dims, site.dims))
        )
        if alike:
            self.sites[key] = replace(other, zero=other.zero or zero, power=other.power or power)
        return alike

    def scale(self, call: FunctionCall, dim: Dim, power: float) -> None:
        """Let `call` follow the size of `dim`, with a power of which it multiplies."""
        same = [f.result for f in self.trace.record.functions if f.key == call.key]
        written = any(v is not None and v.origin in self.trace.record.modified for v in same)
        self.sites[call.key] = CallSite(*call.key, 0, ((0, dim),), power=power, modified=written)

    def kept(self) -> tuple[CallSite, ...]:
        """The sites whose axes are free in the end."""
        return tuple(s for s in self.sites.values() if any(axes.is_free(d) for _, d in s.dims))


def _is_masked(c: Contraction, masked: Mapping[int, Dim]) -> bool:
    """Whether an operand comes straight out of a kept-count normalisation over what is contracted: it is zero there."""
    wanted = set(axes.atoms(c.dim))
    return any(wanted <= set(axes.atoms(masked[v.origin])) for v, _ in c.operands if v.data and v.origin in masked)


_SCALES = frozenset({
    "mul", "div", "add", "sub", "pow", "mean", "var", "var_mean", "sqrt", "rsqrt", "reciprocal", "clamp_min", "view",
    "_unsafe_view", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "clone", "_to_copy", "alias", "detach",
    "relu", "leaky_relu", "_prelu_kernel", "native_dropout", "native_layer_norm", "native_group_norm", "_fused_rms_norm",
})  # fmt: skip
"""Operators that a normalisation may be made of, and those behind it that hand on a positive factor as it is: no GELU."""


def _norm_site(trace: Trace, norm: Normalisation) -> NormSite | str:
    """The kept-count form of the module that runs `norm`, or why there is none."""
    where = f"{norm.path or 'the model'} ({norm.operator})"
    parts = _other_parts(trace, norm)
    if norm.kind not in KEPT_COUNT and not parts:
        return f"{norm.kind} over it in {where}" if norm.kind != "softmax" else f"softmax over it in {where}"
    call = _call_around(trace, norm)
    if call is None or len(norm.dims) != 1:
        return f"normalised over several axes, or outside a module of its own, in {where}"
    inside = any(trace.record.within(trace.record.terms, c.start, c.end) for c in trace.record.of("calls", norm.path))
    position = _position(call, norm.group + norm.dims[0])
    if inside or len(_beside(trace, norm)) > len(parts) or position is None:
        return f"normalised inside a module that does more than that, in {where}"
    behind = [trace.record.steps[op] for op in range(norm.op + 1, call.end + 1) if op in trace.record.steps]
    scales = all(step.operator.rstrip("_") in _SCALES for step in behind)
    weight = norm.weight.rpartition(".")[2] if norm.weight and (norm.bias or not scales) else None
    if weight is None and not scales:
        return f"normalised inside a module that does more than that, in {where}"
    bias = _bias_of(trace, norm)
    return NormSite(
        norm.path, position, norm.dims[0], norm.group, bool(parts) or KEPT_COUNT[norm.kind],
        norm.operator == "native_group_norm", weight, bias.rpartition(".")[2] if bias and not weight else None,
    )  # fmt: skip


def _call_around(trace: Trace, norm: Normalisation) -> Call | None:
    """The call of its module in which `norm` runs."""
    calls = trace.record.of("calls", norm.path)
    return next((c for c in calls if c.start < norm.op <= c.end), calls[0] if calls else None)


def _beside(trace: Trace, norm: Normalisation) -> list[Normalisation]:
    """The other normalisations over free axes in the same call of the same module."""
    call = _call_around(trace, norm)
    if call is None:
        return []
    return [
        n for n in trace.record.of("normalisations", norm.path)
        if n is not norm and call.start < n.op <= call.end and any(axes.is_free(d) for d in n.dims)
    ]  # fmt: skip


def _other_parts(trace: Trace, norm: Normalisation) -> list[Normalisation]:
    """Of a normalisation written out, the mean of the input and the mean square of what is left of it, the other one."""
    return [
        n for n in _beside(trace, norm)
        if {n.kind, norm.kind} == {"mean", "mean square"} and axes.same(n.dims[0], norm.dims[0])
    ]  # fmt: skip


def _bias_of(trace: Trace, norm: Normalisation) -> str | None:
    """The parameter that the module of `norm` adds to the result, by its operator or in an addition of its own."""
    if norm.bias is not None:
        return norm.bias
    added = [
        n for op, n in trace.record.biases if n.rpartition(".")[0] == norm.path and _holding(trace, n, norm.dims[0])
    ]
    return added[0] if added else None


def _position(call: Call, dim: Dim) -> int | None:
    """Where `dim` stands in the module's input and, unchanged, in its output: from the end, as -1 is the last."""
    if call.source is None or call.result is None or len(call.source.dims) != len(call.result.dims):
        return None
    rank = len(call.source.dims)
    return next(
        (i - rank for i, (p, q) in enumerate(zip(call.source.dims, call.result.dims))
         if axes.same(p, dim) and axes.same(q, dim)),
        None,
    )  # fmt: skip


def _plan_lookups(trace: Trace, weights: dict[tuple[str, str], dict[int, Dim]]) -> set[Axis]:
    """Mask the last weight of which elements are found by number: what is chosen counts for as much as its mask.

    What is gone is never chosen, so the masks of experts are there to collect gradients.  Returns the axes so masked.
    """
    found: set[Axis] = set()
    for lookup in reversed(trace.record.lookups):
        free = {a for a in axes.atoms(lookup.dim) if not a.reasons}
        held = [n for n in lookup.source.params if n in trace.slots and _holding(trace, n, lookup.dim)]
        if lookup.source.data or not held or free <= found:
            continue
        if not trace.record.written.isdisjoint(held):
            axes.freeze(lookup.dim, f"the forward writes to what is looked up, in {lookup.path or 'the model'}")
            continue
        for name in held:
            _mask(trace, lookup.path, name, _holding(trace, name, lookup.dim), weights)
        found |= free
    return found


def _plan_contraction(
    trace: Trace,
    c: Contraction,
    weights: dict[tuple[str, str], dict[int, Dim]],
    inputs: dict[str, InputSite],
    functions: CallSites,
) -> None:
    consumers = [(value, own) for value, own in c.operands if not value.data and value.params]
    # a table of positions that meets a weight is left alone: one mask will do, and the forward may write to a buffer
    weight = [(v, own) for v, own in consumers if any(n.rpartition(".")[0] == c.path for n in v.params)]
    consumers = weight or consumers
    if consumers:
        written = any(_holding(trace, n, c.dim) for v, _ in consumers for n in v.params & trace.record.written)
        maskable = not written and all(v.zeroed for v, _ in consumers)  # softplus(0) is not zero
        site = _input_site(trace, c, consumers, smaller=maskable)
        if site is not None:
            inputs[site.module] = site
            return
        if maskable:
            for value, own in consumers:
                for name in value.params:
                    positions = [i for i, d in enumerate(trace.slots[name]) if d is own] or _holding(trace, name, c.dim)
                    _mask(trace, c.path, name, positions, weights)
            return
    _mask_producers(trace, c.dim, [value for value, _ in c.operands], c.path, c.operator, weights, functions, c.op)


_TYPICAL_BATCH = 32  # of training, whatever batch the example has


def _input_site(
    trace: Trace, c: Contraction, consumers: Sequence[tuple[Value, Dim]], smaller: bool = True
) -> InputSite | None:
    """The input of the consuming module, where it is one and, by default, smaller than the weight."""
    if len(consumers) != 1 or len(consumers[0][0].params) != 1:
        return None
    calls, inside = trace.record.of("calls", c.path), trace.record.of("contractions", c.path)
    fed = {value.origin for value, _ in c.operands if value.data}
    if len(calls) != 1 or len(inside) != 1 or calls[0].source is None or calls[0].source.origin not in fed:
        return None
    source = calls[0].source.dims
    if smaller and source:
        (name,) = consumers[0][0].params
        elements = math.prod([axes.size(d) for d in source[1:]]) * max(_TYPICAL_BATCH, axes.size(source[0]))
        if elements >= math.prod([axes.size(d) for d in trace.slots[name]]):
            return None
    position = next((i for i, d in enumerate(source) if axes.same(d, c.dim)), None)
    return None if position is None else InputSite(c.path, position, c.dim)


def _mask_producers(
    trace: Trace,
    dim: Dim,
    values: Sequence[Value],
    path: str,
    operator: str,
    weights: dict[tuple[str, str], dict[int, Dim]],
    functions: CallSites,
    op: int,
) -> None:
    """Make the removed elements of `dim` zero in one of `values`: at the weights that made them, or where it is summed.

    Where the values are joined of parts (a rotated and a plain part of each head), the weights of one may make some of the
    elements only; then those of all are masked.
    """
    wanted = {a for a in axes.atoms(dim) if not a.reasons}
    written = trace.record.written  # a masked batch norm is zero whatever its statistics are
    values = [replace(v, params=v.params - written) if v.params & written else v for v in values]
    made = [v for v in values if any(_holding(trace, n, dim) for n in v.params)]
    producers = _producers(trace, wanted, [v for v in made if v.zeroed])
    if producers is None and functions.add(op, [dim], zero=True):
        return
    producers = producers or _producers(trace, wanted, made)
    if producers is None:
        axes.freeze(dim, f"summed over, with no weight to mask, in {path or 'the model'} ({operator})")
        return
    for name in producers:
        _mask(trace, path, name, _holding(trace, name, dim), weights)


def _producers(trace: Trace, wanted: set[Axis], values: Sequence[Value]) -> frozenset[str] | None:
    """The parameters of one of `values`, or of all, that hold every axis of `wanted`; None where some are in none."""
    all_of_them = frozenset().union(*(v.params for v in values))
    for names in (*sorted((v.params for v in values), key=len), all_of_them):
        if wanted <= {a for n in names for d in trace.slots[n] for a in axes.atoms(d)}:
            return names
    return None


def _holding(trace: Trace, name: str, dim: Dim) -> list[int]:
    """Positions of the parameter that hold a free axis of `dim`."""
    wanted = {a for a in axes.atoms(dim) if not a.reasons}
    return [i for i, d in enumerate(trace.slots[name]) if wanted & set(axes.atoms(d))]


def _mask(
    trace: Trace, path: str, name: str, positions: list[int], weights: dict[tuple[str, str], dict[int, Dim]]
) -> None:
    magnitude = trace.record.magnitudes.get(name)
    if magnitude is not None:
        there = [i for i in positions if axes.same(trace.slots[magnitude][i], trace.slots[name][i])]
        if there:
            _mask(trace, path, magnitude, there, weights)
        positions = [i for i in positions if i not in there]
        if not positions:
            return
    names = [name, *(alias for alias, first in trace.aliases.items() if first == name)]
    chosen = next((n for n in names if n.rpartition(".")[0] == path), name)  # of tied ones, the consumer's own
    module, _, leaf = chosen.rpartition(".")
    slot = weights.setdefault((module, leaf), {})
    for i in positions:
        slot[i] = trace.slots[name][i]


# -- acting ------------------------------------------------------------------------------------------------------------


class MaskedWeight(nn.Module):
    """Parametrisation W * m along some dimensions, and a scale for the weight of a normalisation."""

    masks: Masks

    def __init__(self, masks: Masks, dims: Sequence[tuple[int, Dim]], scale: Dim | None = None):
        super().__init__()
        self.__dict__["masks"] = masks  # no child of every masked layer: FSDP2 would shard it once for each
        self.dims, self.scale = list(dims), scale

    def forward(self, weight: Tensor) -> Tensor:
        """`weight` with the shape that it has."""
        places: list[int | None] = [position for position, _ in self.dims]
        factors, ones = [self.masks(d) for _, d in self.dims], [self.masks.is_whole(d) for _, d in self.dims]
        if self.scale is not None:
            places.append(None)
            factors.append(self.masks.share(self.scale, 0.5))
            ones.append(self.masks.is_whole(self.scale))
        compiling = calls.is_transformed()  # which fuses the products
        with contextlib.nullcontext() if compiling else calls.unseen():
            # a vector's products cost less than a function of Python
            if compiling or (weight.dim() < 2 and weight.dtype not in calls.PRECISE):
                for place, factor in zip(places, factors):
                    weight = weight * along(factor, weight, place)
                return weight
            return remaking.note(Product.apply(weight, places, ones, *factors))


def attach(
    model: nn.Module, sites: Sites, widths: Mapping[Axis, Tensor], depths: Mapping[str, Tensor], trainable: bool = False
) -> nn.Module:
    """A clone of `model` that shares its parameters, with gates at `sites`.

    Args:
        model: the user's model; it is not touched.
        sites: from `plan`.
        widths: axis -> mask, (size,) in [0, 1].
        depths: name of a stack of blocks -> mask, (number of blocks,).
        trainable: whether the masks collect gradients.
    Returns:
        a model of the same class; `masks_of(it)` gives its `Masks`.
    """
    gated = clone(model)
    masks = Masks(widths, depths, trainable)
    _hold(gated, masks)
    scales = {s.module: s.dim for s in sites.norms}
    scaled = {(s.module, s.weight) for s in sites.norms if s.weight}
    dims = {(s.module, s.name): s.dims for s in sites.weights}
    for module, name in dims.keys() | scaled:
        mask = MaskedWeight(masks, dims.get((module, name), ()), scales[module] if (module, name) in scaled else None)
        owner = gated.get_submodule(module)
        if parametrize.is_parametrized(owner):
            _own_class(owner)
        _parametrize(owner, name, mask)
    for consumer in sites.inputs:
        gated.get_submodule(consumer.module).register_forward_pre_hook(MaskedInput(masks, consumer), with_kwargs=True)
    for site in sites.norms:
        norm = gated.get_submodule(site.module)
        norm.register_forward_pre_hook(KeptCount(masks, site), with_kwargs=True)
        if site.weight is None:
            norm.register_forward_hook(Rescale(masks, site))
    for expert in sites.experts:
        gated.get_submodule(expert.module).register_forward_hook(MaskedExpert(masks, expert))
    block_gates: dict[str, BlockGate] = {}
    for stack in sites.blocks:
        for i, path in enumerate(stack.paths):
            form = stack.forms[i][1] if stack.forms else stack.outputs[i]
            modified = bool(stack.modified) and stack.modified[i]
            streams = stack.streams[i] if stack.streams else ()
            gate = BlockGate(masks, stack.name, i, bool(stack.forms), form if trainable else None, modified, streams)
            gated.get_submodule(path).register_forward_hook(gate, with_kwargs=True)
            block_gates[path] = gate
    in_module: dict[str, list[CallSite]] = {}
    for call in sites.calls:
        in_module.setdefault(call.module, []).append(call)
    for path, found in in_module.items():
        owner = gated.get_submodule(path)
        owner.__dict__["forward"] = GatedForward(owner, masks, found)
    gated_inside = {module for module, _ in dims.keys() | scaled}
    gated_inside |= {s.module for s in sites.inputs} | {s.module for s in sites.norms}
    for path in sorted(gated_inside) if trainable else ():
        owner = gated.get_submodule(path)
        owner.__dict__["forward"] = remaking.SparingForward(owner)
    for path, gate in block_gates.items():
        if gate.form is not None:
            block = gated.get_submodule(path)
            block.__dict__["forward"] = SkippableForward(block, gate)
    if sites.by_products and not trainable:
        gated.register_forward_hook(KeptByProducts(masks, sites.by_products))
    return gated


def _parametrize(module: nn.Module, name: str, mask: nn.Module) -> None:
    """Let `mask` make the tensor `name` of a module."""
    original = module._parameters.get(name, module._buffers.get(name))
    cls: Any = type(module)
    if any("__init_subclass__" in vars(c) for c in cls.__mro__ if c.__module__ not in ("builtins", "typing")):
        module.__class__ = type(cls.__name__, (_Unannounced, cls), {})
    assert original is not None
    counted = contextlib.nullcontext() if original.is_inference() else _unsafe_preserve_version_counter(original)
    try:
        with counted:  # PyTorch writes the tensor to itself, which a backward that waits for it would mind
            parametrize.register_parametrization(module, name, mask, unsafe=True)
    except KeyError:  # `keys` is a method of the ModuleDict that would take it; all that comes before is done
        made = parametrize.ParametrizationList([mask], original, unsafe=True)
        module.parametrizations._modules[name] = made  # type: ignore[union-attr]


class _Unannounced:
    """Before a class: it is not told of those that PyTorch derives from it, which it may want to be told more of."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _own_class(module: nn.Module) -> None:
    """Give a parametrised module a class that nothing else has: PyTorch puts a property for each tensor into it.

    A clone has the class of what it is a clone of, so the user's own module would get that property too.
    """
    cls = type(module)
    inside = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, inside)


_MASKS = "_dmscale_masks"


def _hold(gated: nn.Module, masks: Masks) -> None:
    """Let the module tree own the masks, in a leaf or else where no container would run a child that it is given."""
    if len(masks._list):
        holders = [m for m in gated.modules() if not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))]
        leaf = next((m for m in holders if not m._modules and m._parameters), holders[0] if holders else gated)
        leaf.add_module(_MASKS, masks)
    gated.__dict__[_MASKS] = masks


def masks_of(gated: nn.Module) -> Masks:
    """The masks of a model made by `attach`."""
    return gated.__dict__[_MASKS]


# Hooks are objects rather than closures, so that a copy of a gated model has masks of its own.


@dataclass
class MaskedInput:
    """Before a linear or convolution whose weight is larger than its input: x * m."""

    masks: Masks
    site: InputSite

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return replace_first((args, kwargs), self.apply)

    def apply(self, x: Tensor) -> Tensor:
        mask, at = self.masks(self.site.dim), self.site.position
        if calls.is_transformed():
            return x * along(mask, x, at)
        with calls.unseen():
            return Product.apply(x, [at], [self.masks.is_whole(self.site.dim)], mask)


@dataclass
class KeptCount:
    """Before a normalisation: x' = m (x - mean of the kept) sqrt(N / k), in the dtype of x."""

    masks: Masks
    site: NormSite

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return replace_first((args, kwargs), self.apply)

    def apply(self, x: Tensor) -> Tensor:
        site, mask, count = self.site, self.masks(self.site.dim), self.masks.count(self.site.dim)
        at, groups, shape = site.position % x.dim(), axes.size(site.group), x.shape
        # the gates of blocks keep their inputs once every block is in or out
        kept = site.input_kept and groups == 1 and not calls.is_transformed() and bool(self.masks.decided)
        if groups > 1:
            x, at = x.reshape(*shape[:at], groups, mask.numel(), *shape[at + 1 :]), at + 1
        with calls.unseen():
            y = KeptInput.apply(x, mask, at, site.centred, site.over_space, count, kept)
        return y.reshape(shape) if groups > 1 else y


@dataclass
class Rescale:
    """After a normalisation: times sqrt(k / N), all but the bias that was added."""

    masks: Masks
    site: NormSite

    def __call__(self, module: nn.Module, args: tuple, out: Any) -> Any:
        scale = self.masks.share(self.site.dim, 0.5)
        if self.site.bias is not None:
            b = getattr(module, self.site.bias)
            return replace_first(out, lambda y: torch.lerp(b.to(y.dtype), y, scale.to(y.dtype)))
        whole = self.masks.is_whole(self.site.dim)
        return replace_first(out, lambda y: _apart(calls.Scaled.apply(y, scale, whole), self.site.modified))


def _apart(x: Tensor, modified: bool) -> Tensor:
    """`x`, or a copy where the forward writes to it: a gate keeps it for its gradient, or has handed on what it was given."""
    return x.clone() if modified else x


@dataclass
class MaskedExpert:
    """After an expert: y * m, of its element."""

    masks: Masks
    site: ExpertSite

    def __call__(self, module: nn.Module, args: tuple, out: Any) -> Any:
        gate = self.masks((self.site.axis,))[self.site.index]
        return replace_first(out, lambda y: y * gate.to(y.dtype))


@dataclass
class BlockGate:
    """After a block: lerp(input, output, gate).  After a branch: lerp(0, output, gate).

    form: of the output, as in `branches.zero`; None where the block must be run.
    modified: whether the forward writes to the output.
    streams: where the block renews several tensors, the place of each in the output and the argument that it was.
    """

    masks: Masks
    stack: str
    index: int
    branch: bool = False
    form: Any = None
    modified: bool = False
    streams: Streams = ()
    skipped: bool = False  # in the call of the moment

    def can_skip(self) -> bool:
        """Whether the block need not be run: it is out and stays out, so not even the gradient of its gate is asked for.

        It is run where somebody counts on it: several processes, which wait for the gradients of all parameters; a forward
        around it that counts the calls inside; a compiled model, which would be compiled anew for every block.
        """
        if self.form is None or not self.masks.settled or self.masks.is_in(self.stack, self.index) is not False:
            return False
        return not (calls.counting() or attachment.several_processes())

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        if self.streams:
            parts = list(out)
            for place, key in self.streams:
                parts[place] = self._apply(args[key] if isinstance(key, int) else kwargs[key], parts[place])
            return type(out)(parts)
        return self._apply(running.tensors_in((args, kwargs))[0], out)

    def _apply(self, x: Tensor, out: Any) -> Any:
        """`out` with its first tensor gated, which was `x` before the block."""
        gate = self.masks.depths[self.stack][self.index]
        # a compiled model would be compiled anew at every change of what is decided, and fuses the lerp anyway
        is_in = None if calls.is_transformed() else self.masks.is_in(self.stack, self.index)
        if self.skipped:
            return replace_first(out, lambda y: _apart(y, self.modified))  # as `SkippableForward` made it
        if is_in is None:
            x = torch.zeros_like(x) if self.branch else x
            return replace_first(out, lambda y: torch.lerp(x, y, gate.to(y.dtype)))
        if self.branch:
            return replace_first(out, lambda y: _apart(Kept.apply(y, gate, is_in), self.modified))
        return replace_first(out, lambda y: _apart(Chosen.apply(x, y, gate, is_in), self.modified))


class SkippableForward(running.StandIn):
    """Stands for the forward of a block or branch, and does not run it once it is out for good.

    One that is given something to write into, a list of hidden states or a cache, is run all the same.
    """

    def __init__(self, module: nn.Module, gate: BlockGate):
        super().__init__(module)
        self.gate = gate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not calls.is_transformed():
            self.gate.skipped = self.gate.can_skip() and _is_constant((*args, *kwargs.values()))
        if self.gate.skipped:
            x = running.tensors_in((args, kwargs))[0]
            given: dict[int | str, Any] = dict(enumerate(args))
            given.update(kwargs)
            return formed(self.gate.form, torch.zeros_like(x) if self.gate.branch else x, given)
        return self.inner(*args, **kwargs)


def _is_constant(x: Any) -> bool:
    """Whether a callee can leave nothing behind in `x`, tensors aside."""
    if isinstance(x, tuple):
        return all(map(_is_constant, x))
    return x is None or isinstance(x, (Tensor, int, float, str, torch.dtype, torch.device))


@dataclass
class KeptByProducts:
    """After the model: hand out the kept elements of inner activations, as the exported model will.

    fields: key of the output, and the dimensions of each tensor under it, in the order of `running.tensors_in`.
    """

    masks: Masks
    fields: tuple[tuple[str, tuple[tuple[Dim, ...], ...]], ...]

    def __call__(self, module: nn.Module, args: tuple, out: Any) -> Any:
        for key, tensors in self.fields:
            if key not in out:  # no cache was asked for
                continue
            out[key] = running.map_tensors(functools.partial(self._next_kept, iter(tensors)), out[key])
        return out

    def _next_kept(self, dims: Iterator[tuple[Dim, ...]], t: Tensor) -> Tensor:
        return self._kept(t, next(dims, ()))

    def _kept(self, t: Tensor, dims: tuple[Dim, ...]) -> Tensor:
        for i, dim in enumerate(dims):
            if axes.is_free(dim):
                t = t.index_select(i, (self.masks(dim) > 0.5).nonzero()[:, 0])
        return t


def replace_first(tree: Any, function: Any) -> Any:
    """`tree` with its first tensor, in the order of `running.tensors_in`, replaced by `function` of it."""
    return _visited(tree, [function])


def _visited(node: Any, todo: list[Any]) -> Any:
    # not a closure that calls itself: such a cycle would hold a step's activations until the garbage is collected
    if not todo:
        return node
    if isinstance(node, Tensor):
        return todo.pop()(node)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*[_visited(x, todo) for x in node])
    if isinstance(node, (tuple, list)):
        return type(node)([_visited(x, todo) for x in node])  # a list: torch.compile cannot hand on a generator
    if isinstance(node, Mapping):
        changed = {k: _visited(v, todo) for k, v in node.items()}
        return type(node)(**changed) if type(node) is not dict else changed
    return node
