"""What a structure costs, as a polynomial of the dimension sizes.

Every contraction of the trace contributes the product of its axis sizes, every parameter the product of its own; what
stands inside a removable block carries that block's gate as one more factor.  So a cost is a sum of monomials, and one
formula serves a single structure, ten thousand of them, and differentiable soft sizes.

A MAC is one multiply-accumulate of a contraction: convolutions, matrix products, both products of attention.
Normalisations, activations and additions are not counted, as in `torch.utils.flop_counter` (which counts two FLOPs a MAC).

A metric may be restricted to a part of the model: `macs in backbone.*` counts what runs in modules that the glob matches,
and below them.  Latency is measured, not counted, and has no polynomial (`latency.py`).
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from . import axes
from .errors import DmscaleError, did_you_mean
from .polynomial import Poly
from .sizes import extent_in

if TYPE_CHECKING:
    from .space import SearchSpace

METRICS = ("macs", "params", "bytes", "activations", "kv_cache")
"""What is counted.  A budget may name "latency" too, which is measured."""

UNITS = {
    "macs": "MACs", "params": "parameters", "bytes": "bytes", "activations": "bytes of activations",
    "kv_cache": "bytes of keys and values", "latency": "ms",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one structure costs, on the example inputs.

    macs: multiply-accumulates of one forward.
    params: number of parameters; tied ones count once.
    bytes: of the parameters in their own dtype.
    activations: bytes that one forward in evaluation mode writes: the results of all operators that depend on the input,
        views excluded, in-place results included.  It is the total over the forward, not the most that is held at one
        time; attention counts as its two products and the softmax between them, which fused kernels do not write out.
    kv_cache: bytes of the keys and the values of every attention, for all tokens and sequences of the example: what a
        decoder keeps of them while it generates.  Attention is two products of activations with a softmax between; keys
        and values are counted as they were before a repetition for grouped queries.  0 for a model without attention.
    uncounted: operators whose MACs are not known, as 'operator in module', and modules that get as many rows as values say:
        what the example sends there is counted.

    `cost["macs"]` is `cost.macs`; `cost["macs in backbone.*"]` and `cost["latency"]` (ms) are computed when asked for.  Of an
    unknown metric, or a scope that no module matches, a DmscaleError says what was meant.
    """

    macs: int
    params: int
    bytes: int
    activations: int
    kv_cache: int = 0
    uncounted: tuple[str, ...] = ()
    more: Callable[[str], float] | None = field(default=None, repr=False, compare=False)

    def __getitem__(self, metric: str) -> float:
        if metric in METRICS:
            return getattr(self, metric)
        if self.more is None:
            raise DmscaleError(f"{metric!r}: this cost holds only {', '.join(METRICS)}")
        return self.more(metric)

    def __reduce__(self) -> tuple[Any, ...]:
        return Cost, (*(getattr(self, m) for m in METRICS), self.uncounted)


class Metric(Protocol):
    """One cost of a search space, at vectors of its variables with a one behind the last: (S, V + 1) or (V + 1,)."""

    def count(self, values: np.ndarray) -> np.ndarray:
        """The value at S vectors of whole sizes, (S,): int64, or float64 for a measured metric."""

    def real(self, values: np.ndarray) -> np.ndarray:
        """The values at S vectors of real sizes, (S,) of float64."""

    def soft(self, values: torch.Tensor) -> torch.Tensor:
        """The value at one vector of real sizes: a differentiable scalar."""


def metric_name(metric: str, scope: str | None = None) -> str:
    """The key of a metric, restricted to a scope if one is given: "macs", "macs in backbone.*"."""
    return metric if scope is None else f"{metric} in {scope}"


def split_name(key: str) -> tuple[str, str | None]:
    """(metric, scope) of a key of `metric_name`."""
    metric, found, scope = key.partition(" in ")
    return metric.strip(), scope.strip() if found else None


def refusal(key: str, modules: Sequence[str] | None = None) -> str:
    """Why there is no cost of this name, and what may be meant; empty where there is one.

    Args:
        modules: names of the modules that a scope may match; any scope is taken without them.
    """
    metric, scope = split_name(key)
    known = (*METRICS, "latency")
    if metric not in known:
        flops = "; a MAC is two FLOPs" if "flop" in metric.lower() else did_you_mean(metric, known, 1)
        return f"unknown metric {metric!r}; metrics are {', '.join(known)}{flops}"
    if scope is None:
        return ""
    if metric == "latency":
        return f"{key!r}: latency is of the whole model; take macs or activations of a part of it"
    if modules is None or any(within(n, scope) for n in modules):
        return ""
    meant = did_you_mean(scope.rstrip(".*"), modules) or f"; there are {', '.join(map(repr, modules[:3]))}."
    return (
        f"{key!r}: no module of the model matches {scope!r}{meant} A scope is a glob over the names of modules, what lies "
        "below them included."
    )


def module_names(model: nn.Module) -> list[str]:
    """What a scope may match: every name of every module but the model itself."""
    return [n for n, _ in model.named_modules(remove_duplicate=False) if n]


def within(path: str, scope: str) -> bool:
    """Whether the module at `path` matches the glob `scope`, or lies below one that does."""
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), scope) for i in range(len(parts)))


class CostTerm(NamedTuple):
    """One addend of a cost: what it is, and the modules that it belongs to (several for a tied parameter)."""

    poly: Poly
    paths: tuple[str, ...]


class Monomials:
    """A polynomial laid out for evaluation: `coefficients` (M,) and, for each monomial, `index` (M, K) of its variables.

    The variable behind the last one is the constant one, with which short monomials are filled.
    """

    def __init__(self, poly: Poly, variables: Mapping[Hashable, int]):
        width = max((len(m) for m in poly.terms), default=0)
        one = len(variables)
        # in an order of their own, so that rounding at real sizes is the same in every run
        terms: dict[tuple[int, ...], int] = {}
        for m, c in poly.terms.items():
            row = (*sorted(variables[v] for v in m), *[one] * (width - len(m)))
            terms[row] = terms.get(row, 0) + c
        self.coefficients = np.array([terms[row] for row in sorted(terms)], dtype=np.int64)
        self.index = np.array(sorted(terms), dtype=np.int64).reshape(len(terms), width)
        self._tensors: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def count(self, values: np.ndarray) -> np.ndarray:
        """Exact value at `values` (S, V + 1) of int64: one number for each of S structures, (S,)."""
        out = np.broadcast_to(self.coefficients, (len(values), len(self.coefficients))).copy()
        for column in self.index.T:
            out *= values[:, column]
        return out.sum(1)

    def real(self, values: np.ndarray) -> np.ndarray:
        """Values at real sizes (S, V + 1) of float64: (S,)."""
        out = np.broadcast_to(self.coefficients.astype(np.float64), (len(values), len(self.coefficients))).copy()
        for column in self.index.T:
            out *= values[:, column]
        return out.sum(1)

    def soft(self, values: torch.Tensor) -> torch.Tensor:
        """Differentiable value at `values` (V + 1,): a scalar of the same dtype."""
        if values.device not in self._tensors:
            laid_out = torch.from_numpy(self.coefficients), torch.from_numpy(self.index)
            self._tensors[values.device] = laid_out[0].to(values.device), laid_out[1].to(values.device)
        coefficients, index = self._tensors[values.device]
        out = coefficients.to(values.dtype)
        for k in range(index.shape[1]):
            out = out * values[index[:, k]]
        return out.sum() if index.shape[1] else out.sum() + 0 * values.sum()  # a constant has a gradient too, zero


class _Metrics(Mapping[str, Metric]):
    """Metric by name, laid out when first asked for: those of METRICS, any of them in a scope, and measured ones."""

    def __init__(self, model: CostModel):
        self._model = model
        self._made: dict[str, Metric] = {}

    def __getitem__(self, key: str) -> Metric:
        if key not in self._made:
            self._made[key] = self._model._lay_out(key)
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(METRICS)

    def __len__(self) -> int:
        return len(METRICS)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and (key in self._made or split_name(key)[0] in METRICS)


class CostModel:
    """The costs of a search space over one vector of variables: the sizes of free axes, the gates of blocks.

    Args:
        variables: axis atoms and blocks, in the order of the vector.
        terms: metric -> its addends.
        uncounted: operators whose MACs are not known.
        measured: metric -> what makes it; called when it is first asked for.
        modules: names of the modules that a scope may match; any is taken without them.
    """

    metrics: Mapping[str, Metric]

    def __init__(
        self,
        variables: Sequence[Hashable],
        terms: Mapping[str, Sequence[CostTerm]],
        uncounted: Sequence[str] = (),
        measured: Mapping[str, Callable[[], Metric]] | None = None,
        modules: Sequence[str] | None = None,
    ):
        self.variables = {v: i for i, v in enumerate(variables)}
        self.metrics = _Metrics(self)
        self.uncounted = tuple(uncounted)
        self._terms, self._measured, self._modules = terms, dict(measured or {}), modules

    def _lay_out(self, key: str) -> Metric:
        metric, scope = split_name(key)
        if scope is None and metric in self._measured:
            return self._measured[metric]()
        if problem := refusal(key, self._modules):
            raise DmscaleError(problem)
        chosen = [t.poly for t in self._terms[metric] if scope is None or any(within(p, scope) for p in t.paths)]
        return Monomials(total(chosen), self.variables)

    def exact(self, values: Sequence[int] | np.ndarray) -> Cost:
        """The cost at one vector of sizes."""
        row = np.append(np.asarray(values, dtype=np.int64), 1)[None]
        counted = {m: int(self.metrics[m].count(row)[0]) for m in METRICS}
        return Cost(**counted, uncounted=self.uncounted, more=lambda metric: self.metrics[metric].count(row)[0].item())

    def many(self, values: np.ndarray, metric: str, chunk: int = 4096) -> np.ndarray:
        """One metric at many vectors (S, V): (S,) of int64, of float64 for latency."""
        one = np.ones((len(values), 1), dtype=np.int64)
        values = np.concatenate([values.astype(np.int64), one], 1)
        parts = [self.metrics[metric].count(values[i : i + chunk]) for i in range(0, len(values), chunk)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def soft(self, values: torch.Tensor, metric: str) -> torch.Tensor:
        """One metric at a vector of soft sizes (V,): a differentiable scalar."""
        return self.metrics[metric].soft(torch.cat([values, values.new_ones(1)]))


def total(polynomials: Sequence[Poly]) -> Poly:
    """The sum of polynomials."""
    terms: dict[tuple[Hashable, ...], int] = {}
    for p in polynomials:
        for monomial, coefficient in p.terms.items():
            terms[monomial] = terms.get(monomial, 0) + coefficient
    return Poly(terms)


def product(polynomials: Sequence[Any]) -> Poly:
    """The product of polynomials."""
    out = Poly.of(1)
    for p in polynomials:
        out = out * p
    return out


_MOST_HOLDERS = 6
"""Blocks that a parameter is shared by in what a cost says of it; shared by more it is counted as if it stayed."""


# -- from a space ------------------------------------------------------------------------------------------------------


def cost_model(space: SearchSpace) -> CostModel:
    """The costs of a space over its variables: the free axes, then a gate for each removable block and each expert."""
    record = space.trace.record
    inside, free = block_finder(space), space.free_axes
    blocks = [
        ((name, i), tuple(f"{path}." for path in paths)) for name, of_each in space.parts.items()
        for i, paths in enumerate(of_each)
    ]  # fmt: skip
    terms: dict[str, list[CostTerm]] = {m: [] for m in METRICS}

    def add(
        metric: str, dims: Sequence[axes.Dim], gate: tuple[Hashable, ...], weight: int, paths: Sequence[str]
    ) -> None:
        poly = product([extent_in(dim, free) for dim in dims] + [Poly.variable(g) for g in gate])
        terms[metric].append(CostTerm(poly * weight if weight != 1 else poly, tuple(paths)))

    for term in record.terms:
        add("macs", term.dims, inside(term.op), 1, [term.path])
    for op, element, dims, path in record.activations:
        add("activations", dims, inside(op), element, [path])
    for kept in record.cached:
        add("kv_cache", _once(kept.dims, kept.repeated), inside(kept.op), kept.element, [kept.path])
    parameters = dict(space.model.named_parameters(remove_duplicate=False))
    for name, dims in space.trace.slots.items():
        if name in parameters:
            owners = [name, *(n for n, first in space.trace.aliases.items() if first == name)]
            held = {tuple(p for p, inside_of in blocks if n.startswith(inside_of)) for n in holders(space, owners)}
            paths = [n.rpartition(".")[0] for n in owners]
            for gate, sign in _any_of(sorted(held)):
                add("params", dims, gate, sign, paths)
                add("bytes", dims, gate, sign * parameters[name].element_size(), paths)
    uncounted = [f"{op} in {path or 'the model'}" for op, paths in record.unknown.items() for path in paths]
    uncounted += [f"other rows than the example's in {path}" for path in space.routed]
    return CostModel(space.variables, terms, uncounted, {"latency": space._latency_metric}, module_names(space.model))


def _any_of(gates: Sequence[tuple[Hashable, ...]]) -> Iterator[tuple[tuple[Hashable, ...], int]]:
    """What stays as long as one of several blocks does, 1 - (1 - a)(1 - b) of their gates: products of them, with signs."""
    if () in gates or len(gates) > _MOST_HOLDERS:
        yield (), 1
        return
    for n in range(1, len(gates) + 1):
        for several in itertools.combinations(gates, n):
            yield tuple(dict.fromkeys(g for gate in several for g in gate)), (-1) ** (n + 1)


def holders(space: SearchSpace, names: Sequence[str]) -> list[str]:
    """The names of a parameter, each by the first place of the container that its block goes from.

    A container may stand in several places (`self.tower = Sequential(...)` and `self.trunk = Sequential(stem, self.tower)`):
    a block that goes from it is gone from all of them, unlike one whose parameter another block holds.
    """
    if len(names) == 1:
        return list(names)
    model = space.model
    paths = {path.rpartition(".")[0] for of_each in space.parts.values() for paths in of_each for path in paths}
    first = {id(model.get_submodule(path)): path for path in paths}
    held = []
    for name in names:
        place, module = "", model
        for key in name.split(".")[:-1]:
            module = module.get_submodule(key)
            place = first.get(id(module), f"{place}.{key}" if place else key)
        held.append(f"{place}.{name.rpartition('.')[2]}" if place else name)
    return held


def _once(dims: Sequence[axes.Dim], repeated: Sequence[axes.Dim]) -> list[axes.Dim]:
    """`dims` as they were before the repetitions."""
    left = [a for dim in dims for a in axes.factors(dim)]
    for a in axes.factors([a for dim in repeated for a in dim]):
        if a in left:
            left.remove(a)
    return [(a,) for a in left]


def block_finder(space: SearchSpace) -> Callable[[int], tuple[Hashable, ...]]:
    """What tells of an operator's number the removable block and the expert that it runs in, as cost variables."""
    gates_at: dict[int, tuple[Hashable, ...]] = {}
    ranges = {n: [(r,) for r in s.ranges] for n, s in space.stacks.items()} | {
        m: list(e.ranges) for m, e in space.experts.items()
    }
    for name, of_each in ranges.items():
        for i, found in enumerate(of_each):
            for op in [op for start, end in found for op in range(start + 1, end + 1)]:
                gates_at[op] = (*gates_at.get(op, ()), (name, i))
    return lambda op: gates_at.get(op, ())
