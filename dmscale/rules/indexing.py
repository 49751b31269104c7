"""Operators that pick elements by number: the axis that is numbered is fixed, the others pass.

It is free where the numbers are those that were chosen from that very axis (`numbering.py`): the experts of a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import axes
from ..axes import Conflict, Dim
from ..numbering import Said, freeze_numbers, is_zero, look_up
from .registry import rule

if TYPE_CHECKING:
    from ..tracer import Tracer

aten = torch.ops.aten
Tensor = torch.Tensor


@rule(aten.embedding)
def embedding(trace: Tracer, out: Tensor, weight: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """Rows of a table: the vocabulary is fixed, the width free."""
    rows, *width = trace.dims(weight)
    _look_up(trace, weight, rows, index, "vocabulary")
    for dim in width:
        trace.produced(dim)
    return [*trace.dims(index), *width]


@rule(aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(
    trace: Tracer, out: Sequence[Tensor], weight: Tensor, index: Tensor, offsets: Tensor, by_frequency: bool = False,
    mode: int = 0, sparse: bool = False, weights: Tensor | None = None, *args: Any,
) -> Sequence[Any]:  # fmt: skip
    """Sums, means or maxima of rows of a table: as many as there are offsets."""
    rows, width = trace.dims(weight)
    _look_up(trace, weight, rows, index, "vocabulary")
    trace.freeze_dims(
        [d for t in (index, offsets, weights) if t is not None for d in trace.dims(t)], "elements of bags"
    )
    trace.produced(width)
    bags = axes.axis(out[0].shape[0], "bags")
    inner = [trace.fresh(o, "elements of bags") for o in out[1:]]
    return [[bags, width], *inner[:-1], [bags, width] if mode == 2 else inner[-1]]  # where each maximum is from


@rule(aten._pack_padded_sequence)
def pack_padded_sequence(
    trace: Tracer, out: Sequence[Tensor], x: Tensor, lengths: Tensor, batch_first: bool
) -> Sequence[Any]:
    """The elements of all sequences, one time step after the other."""
    dims = trace.dims(x)
    trace.freeze_dims([*dims[:2], *trace.dims(lengths)], "the length of sequences")
    return [[axes.axis(out[0].shape[0], "packed"), *dims[2:]], trace.fresh(out[1], "the length of sequences")]


def _look_up(trace: Tracer, x: Tensor, own: Dim, picked: Tensor, reason: str) -> None:
    if look_up(trace, own, picked, reason):
        trace.looked_up(own, x)


@rule(aten.index)
def index(trace: Tracer, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Sequence[Dim]:
    """Advanced indexing: indexed axes are fixed; the index' own dimensions stand where the indexed ones were."""
    return _picked(trace, x, indices, lambda position: axes.axis(out.shape[position], "picked by a mask"))


def _picked(trace: Tracer, x: Tensor, indices: Sequence[Tensor | None], by_mask: Callable[[int], Dim]) -> list[Dim]:
    """The dimensions of `x[indices]`; `by_mask` gives the one at a position that counts what a boolean mask picks."""
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
        trace.freeze_dims(trace.dims(tensors[0]), "a mask")
        after = dims[used[0] + masked :]
        return [*dims[: used[0]], by_mask(-1 - len(after)), *after]
    for i in used:
        _look_up(trace, x, dims[i], padded[i], "indexed")  # type: ignore[arg-type]
    picked = trace.broadcast(tensors, torch.broadcast_shapes(*[t.shape for t in tensors]))
    rest = [d for i, d in enumerate(dims) if i not in used]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return [*rest[:at], *picked, *rest[at:]]


@rule(aten.nonzero)
def nonzero(trace: Tracer, out: Tensor, x: Tensor) -> Sequence[Dim]:
    """Where elements are not zero: numbers of an axis that is zero where it is gone; any others are fixed."""
    dims = trace.dims(x)
    if len(dims) == 1 and is_zero(trace.value(x), dims[0]):
        trace.says(out, Said(dims[0]))
    else:
        trace.freeze_dims(dims, "looked through for what is not zero")
    return [axes.axis(out.shape[0], "found by values"), axes.axis(out.shape[1], "numbers of dimensions")]


@rule(aten.index_select)
def index_select(trace: Tracer, out: Tensor, x: Tensor, dim: int, picked: Tensor) -> Sequence[Dim]:
    """One axis picked by numbers."""
    dims = list(trace.dims(x))
    _look_up(trace, x, dims[dim], picked, "indexed")
    dims[dim] = trace.dims(picked)[0] if picked.dim() else ()
    return dims


@rule(aten.gather)
def gather(trace: Tracer, out: Tensor, x: Tensor, dim: int, picked: Tensor, **kwargs: Any) -> Sequence[Dim]:
    """Like `index_select` element by element."""
    for i, (own, other) in enumerate(zip(trace.dims(x), trace.dims(picked))):
        if i == dim % x.dim():
            _look_up(trace, x, own, picked, "indexed")
        elif axes.size(own) == axes.size(other):
            axes.unify(own, other)
        else:
            trace.freeze_dims([own, other], "indexed")
    return trace.dims(picked)


@rule(aten.isin)
def isin(trace: Tracer, out: Tensor, elements: Any, test_elements: Any, **kwargs: Any) -> Sequence[Dim]:
    """Each element looked up among others, whose number is fixed."""
    if isinstance(test_elements, Tensor):
        trace.freeze_dims(trace.dims(test_elements), "elements to look up")
    return trace.dims(elements) if isinstance(elements, Tensor) else []


@rule(aten.bucketize)
def bucketize(trace: Tracer, out: Tensor, x: Any, boundaries: Tensor, **kwargs: Any) -> Sequence[Dim]:
    """Each element looked up between boundaries, whose number is fixed."""
    trace.freeze_dims(trace.dims(boundaries), "boundaries of buckets")
    return trace.dims(x) if isinstance(x, Tensor) else []


@rule(aten.masked_scatter)
def masked_scatter(trace: Tracer, out: Tensor, x: Tensor, mask: Tensor, source: Tensor) -> Sequence[Dim]:
    """Elements of `source`, one after another, where the mask says: whole rows where it says the same all along them."""
    dims = list(trace.broadcast([x, mask], out.shape))
    given = list(trace.dims(source))
    while (
        dims
        and given
        and axes.size(dims[-1]) == axes.size(given[-1])
        and _is_constant_along_last(mask, out.dim(), len(dims))
    ):
        axes.unify(dims.pop(), given.pop())
    trace.freeze_dims([*dims, *given], "picked by a mask")
    return trace.broadcast([x, mask], out.shape)


def _is_constant_along_last(mask: Tensor, rank: int, position: int) -> bool:
    at = position - 1 - (rank - mask.dim())
    return at < 0 or mask.shape[at] == 1 or mask.stride(at) == 0


@rule(aten.topk)
def largest(
    trace: Tracer, out: Sequence[Tensor], x: Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any
) -> Sequence[Any]:
    """Some elements of an axis and their numbers.  There must be as many; what is gone must not be among them."""
    dims = list(trace.dims(x))
    if not dims:  # a single number
        return [dims, dims]
    own, least = dims[dim], k + trace.value(x).said.taken
    if least >= axes.size(own):
        trace.freeze(own, "all of it is sorted")
    elif axes.is_free(own):
        trace.normalised("chosen", [own], x)
        trace.at_least(own, least)
        trace.says(out[1], Said(own))
    dims[dim] = axes.axis(out[0].shape[dim], "chosen")
    return [dims, dims]


@rule(aten.sort, aten.argsort)
def ordered(trace: Tracer, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """Sorted axes are fixed."""
    # sort(x, dim), sort.stable(x, *, stable, dim)
    position = kwargs.get("dim", next((a for a in args if type(a) is int), -1))
    dims = list(trace.dims(x))
    if dims:
        trace.freeze(dims[position], "sorted")
        dims[position] = axes.axis(x.shape[position], "sorted")
    return [dims, dims] if isinstance(out, (tuple, list)) else dims


@rule(aten.histc)
def histogram(
    trace: Tracer, out: Tensor, x: Tensor, bins: int = 100, min: float = 0, max: float = 0, **kwargs: Any
) -> Sequence[Dim]:
    """How often each number occurs, if there is a bin for each; otherwise numbers are values like any others."""
    numbers = trace.value(x).said.numbers
    return _counted(trace, out, x, numbers is not None and (min, max) == (0, axes.size(numbers) - 1))


@rule(aten.bincount)
def bincount(trace: Tracer, out: Tensor, x: Tensor, weights: Tensor | None = None, *args: Any, **kw: Any) -> Any:
    """The same with whole numbers, or the sum of weights of each."""
    if weights is not None:
        freeze_numbers(trace, [trace.value(weights)])
    return _counted(trace, out, x, True)


def _counted(trace: Tracer, out: Tensor, x: Tensor, each: bool) -> Sequence[Dim]:
    trace.freeze_dims(trace.dims(x), "counted")
    numbers = trace.value(x).said.numbers
    if numbers is None or not each or out.shape[0] != axes.size(numbers):
        freeze_numbers(trace, [trace.value(x)])
        return trace.fresh(out, "counts")
    trace.says(out, Said(zero=(numbers,)))
    return [numbers]


@rule(aten.searchsorted)
def searchsorted(trace: Tracer, out: Tensor, row: Tensor, x: Any, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """Where each element belongs in a sorted row, whose length is fixed; of sorted numbers, where those of each end."""
    trace.freeze_dims(trace.dims(row), "a sorted row")
    if not isinstance(x, Tensor):
        freeze_numbers(trace, [trace.value(row)])
        return []
    given, own = trace.value(row).said.numbers, trace.value(x).said.numbers
    right = kwargs.get("right") or kwargs.get("side") == "right"
    if given is None or own is None or not right or kwargs.get("sorter") is not None:
        freeze_numbers(trace, [trace.value(row), trace.value(x)])
    else:
        axes.unify(given, own)
        if any(axes.same(own, d) for d in trace.dims(x)):
            trace.says(out, Said(ends=own))
    return trace.dims(x)


@rule(aten.index_put, aten.index_put_)
def index_put(
    trace: Tracer, out: Tensor, x: Tensor, indices: Sequence[Any], values: Tensor, *args: Any
) -> Sequence[Dim]:
    """Writing at numbered places: the values look like `x[indices]`, broadcast."""
    for t in indices:
        if t is not None:
            trace.freeze_dims(trace.dims(t), "written by index")
    given = trace.dims(values)

    def by_mask(position: int) -> Dim:
        dim = given[position] if -position <= len(given) else ()
        trace.freeze(dim, "written by a mask")
        return dim

    for own, other in zip(reversed(_picked(trace, x, indices, by_mask)), reversed(given)):
        if other:
            axes.unify(own, other)
    return trace.dims(x)


@rule(aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_)
def index_add(
    trace: Tracer, out: Tensor, x: Tensor, dim: int, picked: Tensor, source: Tensor, **kw: Any
) -> Sequence[Dim]:
    """Adding rows at numbered places."""
    for i, (own, other) in enumerate(zip(trace.dims(x), trace.dims(source))):
        if i == dim % x.dim():
            trace.freeze_dims([own, other, *trace.dims(picked)], "written by index")
        else:
            axes.unify(own, other)
    return trace.dims(x)


@rule(aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.scatter_reduce, aten.scatter_reduce_)
def scatter(
    trace: Tracer, out: Tensor, x: Tensor, dim: int, picked: Tensor, source: Any = None, *args: Any, **kw: Any
) -> Any:
    """Writing element by element at numbered places."""
    freeze_numbers(trace, [trace.value(t) for t in (x, source) if isinstance(t, Tensor)])
    for i, (own, other) in enumerate(zip(trace.dims(x), trace.dims(picked))):
        if i == dim % x.dim():
            trace.freeze(other, "written by index")
            if look_up(trace, own, picked, "written by index") and _is_lowest(source):
                said = trace.value(x).said
                trace.says(out, Said(taken=said.taken + picked.shape[i]))
        elif axes.size(own) != axes.size(other):
            trace.freeze_dims([own, other], "written by index")
        else:
            axes.unify(own, other)
    if isinstance(source, Tensor):
        for own, other in zip(trace.dims(picked), trace.dims(source)):
            if axes.size(own) == axes.size(other):
                axes.unify(own, other)
    return trace.dims(x)


def _is_lowest(source: Any) -> bool:
    return not isinstance(source, Tensor) and source == float("-inf")
