"""Operators that pick elements by number: the axis that is numbered is fixed, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import axes
from ..axes import Conflict, Dim
from .registry import rule

if TYPE_CHECKING:
    from ..trace import Tracer

aten = torch.ops.aten
Tensor = torch.Tensor


@rule(aten.embedding)
def embedding(trace: Tracer, out: Tensor, weight: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """Rows of a table: the vocabulary is fixed, the width free."""
    rows, *width = trace.dims(weight)
    trace.freeze(rows, "vocabulary")
    for dim in width:
        trace.produced(dim)
    return [*trace.dims(index), *width]


@rule(aten.index)
def index(trace: Tracer, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Sequence[Dim]:
    """Advanced indexing: indexed axes are fixed; the index' own dimensions stand where the indexed ones were."""
    dims = list(trace.dims(x))
    padded = [*indices, *[None] * (len(dims) - len(indices))]
    used = [i for i, t in enumerate(padded) if t is not None]
    tensors = [t for t in padded if t is not None]
    if any(t.dtype in (torch.bool, torch.uint8) for t in tensors):
        if len(used) > 1:
            raise Conflict("several boolean masks")
        masked = tensors[0].dim()
        for d in dims[used[0] : used[0] + masked]:
            trace.freeze(d, "picked by a mask")
        return [*dims[: used[0]], axes.axis(out.shape[used[0]], "picked by a mask"), *dims[used[0] + masked :]]
    for i in used:
        trace.freeze(dims[i], "indexed")
    picked = trace.broadcast(tensors, torch.broadcast_shapes(*[t.shape for t in tensors]))
    rest = [d for i, d in enumerate(dims) if i not in used]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return [*rest[:at], *picked, *rest[at:]]


@rule(aten.index_select)
def index_select(trace: Tracer, out: Tensor, x: Tensor, dim: int, picked: Tensor) -> Sequence[Dim]:
    """One axis picked by numbers."""
    dims = list(trace.dims(x))
    trace.freeze(dims[dim], "indexed")
    dims[dim] = axes.axis(out.shape[dim], "indexed")
    return dims


@rule(aten.gather)
def gather(trace: Tracer, out: Tensor, x: Tensor, dim: int, picked: Tensor, **kwargs: Any) -> Sequence[Dim]:
    """Like `index_select` element by element."""
    for i, (own, other) in enumerate(zip(trace.dims(x), trace.dims(picked))):
        if i == dim % x.dim():
            trace.freeze(own, "indexed")
        elif axes.size(own) == axes.size(other):
            axes.unify(own, other)
        else:
            trace.freeze_dims([own, other], "indexed")
    return trace.dims(picked)


@rule(aten.topk, aten.sort, aten.argsort)
def ordered(trace: Tracer, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """Sorted axes are fixed."""
    # topk(x, k, dim), sort(x, dim), sort.stable(x, *, stable, dim)
    outs = out if isinstance(out, (tuple, list)) else [out]
    position = kwargs.get("dim", next((a for a in args[1 if outs[0].shape != x.shape else 0 :] if type(a) is int), -1))
    dims = list(trace.dims(x))
    trace.freeze(dims[position], "sorted")
    dims[position] = axes.axis(outs[0].shape[position], "sorted")
    return [dims for _ in outs] if isinstance(out, (tuple, list)) else dims


@rule(aten.index_put, aten.index_put_)
def index_put(trace: Tracer, out: Tensor, x: Tensor, indices: Sequence[Any], values: Tensor, *args: Any) -> Sequence[Dim]:
    """Writing at numbered places; trailing dimensions that are written whole are unified with the values'."""
    dims = trace.dims(x)
    padded = [*indices, *[None] * (len(dims) - len(indices))]
    for d, t in zip(dims, padded):
        if t is not None:
            trace.freeze(d, "written by index")
    whole = [d for d, t in zip(dims, padded) if t is None]
    for own, other in zip(reversed(whole), reversed(trace.dims(values))):
        if other and axes.size(own) == axes.size(other):
            axes.unify(own, other)
    return dims


@rule(aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_)
def index_add(trace: Tracer, out: Tensor, x: Tensor, dim: int, picked: Tensor, source: Tensor, **kw: Any) -> Sequence[Dim]:
    """Adding rows at numbered places."""
    for i, (own, other) in enumerate(zip(trace.dims(x), trace.dims(source))):
        if i == dim % x.dim():
            trace.freeze_dims([own, other], "written by index")
        else:
            axes.unify(own, other)
    return trace.dims(x)


@rule(aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce, aten.scatter_reduce_)
def scatter(trace: Tracer, out: Tensor, x: Tensor, dim: int, picked: Tensor, source: Any = None, *args: Any, **kw: Any) -> Any:
    """Writing element by element at numbered places."""
    for i, (own, other) in enumerate(zip(trace.dims(x), trace.dims(picked))):
        if i == dim % x.dim() or axes.size(own) != axes.size(other):
            trace.freeze_dims([own, other], "written by index")
        else:
            axes.unify(own, other)
    if isinstance(source, Tensor):
        for own, other in zip(trace.dims(picked), trace.dims(source)):
            if axes.size(own) == axes.size(other):
                axes.unify(own, other)
    return trace.dims(x)
