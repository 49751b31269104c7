"""Names for axes: what a user who knows the model would call them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import axes
from .axes import Axis
from .tracing import Trace

_CONSTANTS = ("index of a concatenation", "kernel size")  # three of q, k, v: never a width


def name_axes(trace: Trace) -> dict[Axis, str]:
    """Axis -> a unique name, for every axis of a parameter that some weight makes, in the order of the forward.

    An axis that one layer makes has the layer's path.  One that several make (a residual stream, the two inputs of a
    gated MLP) has the path that they share, and 'width'.  Heads and head dims are named after the attention module, experts
    after the module of router and matrices, or the list that they are in.
    """
    atoms = trace.atoms
    heads = {a for dim in trace.record.batched for a in atoms[dim]}
    makers: dict[Axis, dict[str, None]] = {}
    siblings: dict[Axis, list[Axis]] = {}
    for _, path, dim in trace.record.produced:
        for factors in products(dim):
            for a in factors:
                siblings.setdefault(a, factors)
        for a in atoms[dim]:
            if a in trace.indexing:
                makers.setdefault(a, {})[path] = None
    for name, dims in trace.slots.items():  # what no operator makes from a weight: a table that is only indexed
        for dim in dims:
            for a in atoms[dim]:
                if not a.reasons and a not in makers:
                    makers[a] = {name.rpartition(".")[0] or name: None}
    experts: set[Axis] = set()
    for lookup in trace.record.lookups:
        if not lookup.source.data and len(lookup.source.dims) > 2:  # one matrix for each number
            for a in atoms[lookup.dim]:
                experts.add(a)
                makers.get(a, {})[lookup.path] = None
    for a, found in trace.experts.items():  # after the list, whatever makes their scores
        makers[a] = {found.containers[0]: None}
    names: dict[Axis, str] = {}
    numbers = _numbers(trace, makers)
    makers = {a: paths for a, paths in makers.items() if a not in numbers}
    for a, paths in makers.items():
        near = siblings.get(a, [a])
        if a in experts:
            names[a] = _expert_name(a, list(paths), near)
        else:
            names[a] = _name(a, list(paths), [s for s in near if s is not a], heads)
    return _unique(names, makers)


def _numbers(trace: Trace, found: Iterable[Axis]) -> set[Axis]:
    """Fixed axes that are mere numbers in the layout of a parameter; all outputs of a layer are none."""
    numbers = {a for a in found if any([r.startswith(_CONSTANTS) for r in a.reasons])}
    picked = {a for a in found if any([r.startswith("selected by index") for r in a.reasons])}
    if picked:
        picked -= {f[0] for dims in trace.slots.values() for dim in dims for f in products(dim) if len(f) == 1}
    return numbers | picked


def products(dim: axes.Dim) -> list[list[Axis]]:
    """The products of atoms below `dim`, one for each part of a sum."""
    found = axes.factors(dim)
    if len(found) == 1 and found[0].sum is not None:
        return [p for part in found[0].sum for p in products(part)]
    return [[a for f in found for a in axes.atoms((f,))]]


def _name(a: Axis, paths: Sequence[str], siblings: Sequence[Axis], heads: set[Axis]) -> str:
    prefix = paths[0] if len(paths) == 1 else _common(paths)
    beside_heads = any(s in heads for s in siblings)
    if a in heads or beside_heads:
        module = prefix if len(paths) > 1 else prefix.rpartition(".")[0]
        module = module or paths[0]
        if a not in heads:
            return f"{module} head_dim"
        first = not any(s in heads for s in siblings) or len(paths) > 1  # kv heads, then query heads for each
        return f"{module} heads" if first else f"{module} heads per group"
    if len(paths) == 1:
        return prefix or "width"
    return f"{prefix} width" if prefix else "residual width"


def _expert_name(a: Axis, paths: Sequence[str], product: Sequence[Axis]) -> str:
    inside = "experts" if len(product) == 1 else "expert groups" if a is product[0] else "experts per group"
    return f"{_common(paths)} {inside}".strip()


def _common(paths: Sequence[str]) -> str:
    split = [p.split(".") for p in paths]
    shared = []
    for parts in zip(*split):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _unique(names: dict[Axis, str], makers: dict[Axis, dict[str, None]]) -> dict[Axis, str]:
    """Tell equal names apart by their first maker, then by number."""
    out: dict[Axis, str] = {}
    used: set[str] = set()
    for a, name in names.items():
        if name in used:
            first = next(iter(makers[a]))
            name = f"{name} of {first}" if first and first not in name else name
        base, n = name, 2
        while name in used:
            name, n = f"{base} ({n})", n + 1
        used.add(name)
        out[a] = name
    return out
