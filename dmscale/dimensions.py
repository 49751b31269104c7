"""From a trace to the dimensions of a search space: what is free, under which name, in which steps.

An axis is a dimension of the space when it indexes parameters, nothing freezes it, and a gate exists wherever it is consumed.
Axes that size equations link are one dimension.  Each has a kind, a least size, and a multiple, of which some come from the
user and some from operators: as many experts as are chosen, what a kernel loads at once.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from . import axes, blocks, branches, calls, gates, naming, tracing
from .axes import Axis
from .polynomial import Poly, Quotient
from .sizes import Attribute, Solution, free_atoms, solve
from .tracer import Record


@dataclass(frozen=True, eq=False)
class Dimension:
    """One number of the network that can be chosen.

    name: after what a user recognises, `layer3.0.conv1`, `blocks.4.attn heads`, `blocks depth`.
    kind: 'width', 'heads', 'depth', or 'choice' where each element has a module of its own: experts, alternative operations.
    size: number of elements.
    minimum: fewest elements that a structure may keep: the user's, or more where operators need more (as many experts as are
        chosen, two channels under a variance).  Rounded up to `multiple` it is `lowest`.
    multiple: a structure keeps a multiple of this many elements (or all).
    axes: the axes behind a width, the dimension's own first; linked ones keep the same share, each its own elements.
    members: a name for each axis.
    """

    name: str
    kind: str
    size: int
    minimum: int = 1
    multiple: int = 1
    axes: tuple[Axis, ...] = ()
    members: tuple[str, ...] = ()

    def allowed(self, size: float) -> int:
        """The size nearest to `size` that the dimension may have."""
        if size >= self.size:
            return self.size
        step = self.multiple
        rounded = int(size / step + 0.5) * step
        return min(max(rounded, self.lowest), self.size)

    @property
    def lowest(self) -> int:
        """The smallest size that it may have."""
        step = self.multiple
        return min(-(-self.minimum // step) * step, self.size)

    def count(self, axis_size: int, size: int) -> int:
        """How many elements of an axis of `axis_size` are kept when the dimension keeps `size`."""
        return axis_size * size // self.size


@dataclass
class Options:
    """What a user asked of a trace: globs, and bounds by glob."""

    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    minimum: dict[str, int] = field(default_factory=dict)
    multiple: dict[str, int] = field(default_factory=dict)
    no_depth: dict[str, str] = field(default_factory=dict)  # stacks taken out -> reason
    branches: bool = False
    by_hand: set[str] = field(default_factory=set)  # reasons that the user gave to `SearchSpace.freeze`
    held: dict[Axis, tuple[int, int]] = field(default_factory=dict)  # size and step of what decides otherwise below

    def refuses(self, name: str) -> str | None:
        """Why the user does not want dimension `name`, if so."""
        if any(fnmatch.fnmatchcase(name, g) for g in self.freeze):
            return "frozen by freeze="
        if self.only and not any(fnmatch.fnmatchcase(name, g) for g in self.only):
            return "not named in only="
        return None


@dataclass
class Resolved:
    """What remains free once gates are planned and size equations solved."""

    solution: Solution
    sites: gates.Sites
    stacks: list[blocks.Blocks]


def resolve(trace: tracing.Trace, model: nn.Module, options: Options) -> Resolved:
    """Plan gates and solve size equations until neither freezes anything more."""
    stacks = _stacks(trace, model, options)
    watched = trace.indexing.union(trace.experts, *(free_atoms(equation) for equation in trace.record.equations))
    solution, solved, free = None, -1, _count_free(watched)
    while True:
        before = free
        sites = gates.plan(trace, stacks)
        free = _count_free(watched)
        if solution is None or free != solved:  # a solution is one for what was free then
            solution = solve(trace.record.equations)
            if options.freeze or options.only:
                for a, name in naming.name_axes(trace).items():
                    reason = options.refuses(name)
                    if reason and not a.reasons:
                        axes.freeze((a,), reason)
            free = solved = _count_free(watched)
        if free == before:
            return Resolved(replace(solution, attributes=_by_parameters(solution, trace.indexing)), sites, stacks)


def _stacks(trace: tracing.Trace, model: nn.Module, options: Options) -> list[blocks.Blocks]:
    """The stacks of blocks, or of branches, that the user wants."""
    whole = blocks.find(model, trace.record)
    while True:
        stacks = branches.find(model, trace.record, whole, options.no_depth) if options.branches else whole
        refused = {s.name: reason for s in stacks if (reason := options.refuses(s.name))}
        if refused.keys() <= options.no_depth.keys():
            return [s for s in stacks if s.name not in options.no_depth]
        options.no_depth |= refused  # where a branch is not wanted, whole blocks may be


def _by_parameters(solution: Solution, indexing: set[Axis]) -> dict[Attribute, Quotient]:
    """The attributes by the axes that index parameters, which alone are chosen: an axis linked to one is a multiple of it."""
    values: dict[Hashable, Poly] = {}
    for group in solution.links:
        for a in group - indexing:
            chosen = next((b for b in group & indexing if a.size % b.size == 0), None)
            if chosen is not None:
                values[a] = Poly.variable(chosen) * (a.size // chosen.size)

    def known(p: Poly) -> Poly:
        return Poly.of(p.evaluate({v: values.get(v, Poly.variable(v)) for v in p.variables}))

    return {
        a: Quotient(known(q.numerator), known(q.denominator)) if q.variables & values.keys() else q
        for a, q in solution.attributes.items()
    }


def _count_free(found: Iterable[Axis]) -> int:
    return sum([not a.reasons for a in found])


def dimensions(
    trace: tracing.Trace, resolved: Resolved, options: Options
) -> tuple[dict[str, Dimension], dict[str, str]]:
    """The dimensions by name, in the order of the forward, and the frozen axes of parameters, each with its reasons."""
    names = naming.name_axes(trace)
    heads = {a for dim in trace.record.batched for a in trace.atoms[dim]}
    groups = _groups([a for a in names if not a.reasons], resolved.solution.links)
    steps = _steps(trace.record.multiples)
    least = _least(trace.record.least)
    least |= {a: max(least.get(a, 1), 2) for a in _pairs(trace.record)}
    found: dict[str, Dimension] = {}
    for group in groups:
        group = sorted(group, key=lambda a: (names[a].count("."), a.size))  # the widest scope names the dimension
        name, size = names[group[0]], group[0].size
        kind = "heads" if group[0] in heads else "choice" if group[0] in trace.experts else "width"
        step = size // math.gcd(*(a.size for a in group))  # so that every linked axis keeps whole elements
        for a in group:  # keeps n * a.size / size elements of n: that must be a multiple of its own step
            step = math.lcm(step, steps.get(a, 1) * size // math.gcd(steps.get(a, 1) * size, a.size))
        wanted = bound_of(options.multiple, name, 1) if kind == "width" else 1
        needed = max(-(-least.get(a, 1) * size // a.size) for a in group)
        for a in group:
            if a in options.held:
                needed, step = max(needed, options.held[a][0]), math.lcm(step, options.held[a][1])
        found[name] = Dimension(
            name, kind, size, max(bound_of(options.minimum, name, 1), needed), math.lcm(step, wanted),
            tuple(group), tuple(names[a] for a in group),
        )  # fmt: skip
    for stack in resolved.stacks:
        found[stack.name] = Dimension(stack.name, "depth", len(stack.paths), stack.minimum)
    frozen = {names[a]: "; ".join(list(a.reasons)[:2]) for a in names if a.reasons} | options.no_depth
    return found, frozen


def _pairs(record: Record) -> set[Axis]:
    """The axes that keep two elements at least, for what becomes of one is no longer the same operation.

    `squeeze` takes a dimension of one away.  An unbiased variance divides by k - 1.  A centred normalisation of one element is
    its bias whatever comes in: what such a network computes is rounding, amplified.  And einsum multiplies element by element
    where there is one to contract.
    """
    single = [d for d in record.not_alone if axes.is_free(d)]
    single += [d for n in record.normalisations if n.kind in ("variance", "standardised") for d in n.dims]
    single += [n.dims[0] for n in record.normalisations if n.kind == "centred" and not n.group and len(n.dims) == 1]
    for c in record.contractions:
        call = calls.at(record, c.op) if axes.is_free(c.dim) else None
        if call is not None and call.name == "einsum":
            single.append(c.dim)
    found = set()
    for dim in single:
        free = [a for a in axes.factors(dim) if axes.is_free((a,)) and a.is_atom]
        others = [a for a in axes.factors(dim) if a not in free]  # of a sum each part keeps one
        if free and not others:
            found.add(max(free, key=lambda a: a.size))
    return found


def _steps(multiples: Iterable[tuple[axes.Dim, int]]) -> dict[Axis, int]:
    """Axis -> what its size must be a multiple of, so that every dimension is a multiple of what its kernel takes."""
    steps: dict[Axis, int] = {}

    def require(dim: axes.Dim, step: int) -> None:
        found = axes.factors(dim)
        fixed = math.prod(a.size for a in found if not axes.is_free((a,)))
        step //= math.gcd(step, fixed)
        free = [a for a in found if axes.is_free((a,))]
        if step == 1 or not free:
            return
        last = free[-1]
        if last.sum is None:
            steps[last] = math.lcm(steps.get(last, 1), step)
        else:
            for part in last.sum:
                require(part, step)

    for dim, step in multiples:
        require(dim, step)
    return steps


def _least(bounds: Iterable[tuple[axes.Dim, int]]) -> dict[Axis, int]:
    """Axis -> the smallest size that it may have, so that every dimension has what is chosen from it.

    Of a product, groups of experts, each factor must do with the least of the others.
    """
    least: dict[Axis, int] = {}

    def require(dim: axes.Dim, size: int) -> None:
        found = axes.factors(dim)
        for a in reversed(found):
            if axes.is_free((a,)):
                others = math.prod(least.get(b, 1) if axes.is_free((b,)) else b.size for b in found if b is not a)
                if a.sum is None:
                    least[a] = max(least.get(a, 1), -(-size // others))
                else:
                    fixed = sum(axes.size(part) for part in a.sum if not axes.is_free(part))
                    require(next(part for part in a.sum if axes.is_free(part)), -(-size // others) - fixed)

    for dim, size in sorted(bounds, key=lambda b: len(axes.factors(b[0]))):
        require(dim, size)
    return least


def bound_of(bounds: Mapping[str, int], name: str, default: int) -> int:
    """What bounds by glob say of a dimension: the last match counts."""
    found = [n for glob, n in bounds.items() if glob == "*" or fnmatch.fnmatchcase(name, glob)]
    return found[-1] if found else default


def _groups(free: list[Axis], links: list[set[Axis]]) -> list[list[Axis]]:
    """Free axes, those linked together, in the order in which they were made."""
    group_of = {id(a): i for i, link in enumerate(links) for a in link}
    out: dict[Any, list[Axis]] = {}
    for a in free:
        out.setdefault(group_of.get(id(a), a), []).append(a)
    return list(out.values())
