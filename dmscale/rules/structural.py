"""Operators that move, split, join or repeat axes without looking at the elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import axes
from ..axes import Conflict, Dim
from .registry import rule

if TYPE_CHECKING:
    from ..tracer import Tracer

aten = torch.ops.aten
Tensor = torch.Tensor


@rule(
    aten.alias, aten.detach, aten._conj, aten.lift_fresh, aten.clone, aten._to_copy, aten.contiguous, aten.zeros_like,
    aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like, aten.bernoulli,
    aten.nan_to_num, aten.positive, aten.lift,
)  # fmt: skip
def unchanged(trace: Tracer, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """Every dimension as it was."""
    return trace.dims(x)


@rule(aten.tril, aten.triu)
def triangle(trace: Tracer, out: Tensor, x: Tensor, offset: int = 0) -> Sequence[Dim]:
    """What is kept of an element depends on its row and column number: both are fixed.

    But for a triangle with or without the diagonal of a square: of rows and columns that are one axis, what stays is one again.
    """
    rows, columns = trace.dims(x)[-2:]
    beside = offset if trace._operator == "triu" else -offset
    if beside in (0, 1) and axes.size(rows) == axes.size(columns):
        axes.unify(rows, columns)
    else:
        trace.freeze_dims([rows, columns], "a triangle is cut out")
    return trace.dims(x)


@rule(aten.diagonal, aten.diagonal_copy)
def diagonal(trace: Tracer, out: Tensor, x: Tensor, offset: int = 0, i: int = 0, j: int = 1) -> Sequence[Dim]:
    """Rows and columns become one, in a last dimension: element n of one goes with element n of the other."""
    dims = trace.dims(x)
    rows, columns = dims[i], dims[j]
    rest = [dim for k, dim in enumerate(dims) if k not in (i % x.dim(), j % x.dim())]
    return [*rest, _paired(trace, rows, columns, offset, out.shape[-1])]


@rule(aten.diag_embed)
def diag_embed(trace: Tracer, out: Tensor, x: Tensor, offset: int = 0, i: int = -2, j: int = -1) -> Sequence[Dim]:
    """The last dimension becomes rows and columns."""
    *rest, own = trace.dims(x)
    i, j = i % out.dim(), j % out.dim()
    whole = _paired(trace, own, own, offset, out.shape[i])
    for position in sorted((i, j)):
        rest.insert(position, whole)
    return rest


def _paired(trace: Tracer, rows: Dim, columns: Dim, offset: int, length: int) -> Dim:
    """The dimension of a diagonal; what lies beside the main one, or of what is not square, depends on numbers."""
    if offset or axes.size(rows) != axes.size(columns):
        trace.freeze_dims([rows, columns], "a diagonal beside the main one")
        return axes.axis(length, "a diagonal beside the main one")
    axes.unify(rows, columns)
    return rows


@rule(aten.view_as_real, aten.view_as_real_copy)
def view_as_real(trace: Tracer, out: Tensor, x: Tensor) -> Sequence[Dim]:
    """A last dimension of two comes in."""
    return [*trace.dims(x), axes.axis(2, "real and imaginary part")]


@rule(aten.view_as_complex, aten.view_as_complex_copy)
def view_as_complex(trace: Tracer, out: Tensor, x: Tensor) -> Sequence[Dim]:
    """The last dimension, of two, goes.  Rows of the memory that `x` looks into must then be of even length."""
    *dims, parts = trace.dims(x)
    trace.freeze(parts, "real and imaginary part")
    if x._base is not None and x.stride(-1) == 1:
        trace.multiple_of(trace.dims(x._base)[-1], 2)
    return dims


@rule(aten.t, aten.t_)
def t(trace: Tracer, out: Tensor, x: Tensor) -> Sequence[Dim]:
    """Transpose of a matrix, or a vector as it was."""
    return list(reversed(trace.dims(x)))


@rule(aten.transpose, aten.transpose_, aten.swapaxes)
def transpose(trace: Tracer, out: Tensor, x: Tensor, i: int, j: int) -> Sequence[Dim]:
    """Two dimensions change places."""
    dims = list(trace.dims(x))
    if dims:
        dims[i], dims[j] = dims[j], dims[i]
    return dims


@rule(aten.permute)
def permute(trace: Tracer, out: Tensor, x: Tensor, order: Sequence[int]) -> Sequence[Dim]:
    """Dimensions in a new order."""
    dims = trace.dims(x)
    return [dims[i] for i in order]


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(trace: Tracer, out: Tensor, x: Tensor, position: int) -> Sequence[Dim]:
    """A dimension of size one comes in."""
    dims = list(trace.dims(x))
    dims.insert(position % out.dim(), ())
    return dims


@rule(aten.squeeze, aten.squeeze_)
def squeeze(trace: Tracer, out: Tensor, x: Tensor, positions: Any = None) -> Sequence[Dim]:
    """Dimensions of size one go."""
    dims = trace.dims(x)  # `squeeze_` has changed the shape of `x` already
    wanted = range(len(dims)) if positions is None else positions if isinstance(positions, Sequence) else [positions]
    gone = {i % max(len(dims), 1) for i in wanted}
    for i in gone:
        if i < len(dims) and axes.size(dims[i]) > 1:
            trace.not_alone(dims[i])
    return [d for i, d in enumerate(dims) if not (i in gone and axes.size(d) == 1)]


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias)
def view(trace: Tracer, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """The same factors in the same order, grouped anew; a view to another dtype keeps what it can."""
    if args and isinstance(args[0], torch.dtype):
        if out.shape != x.shape:
            raise Conflict("view to a dtype of another width")
        return trace.dims(x)
    if 0 in x.shape:
        return trace.fresh(out, "empty")
    dims, first, last = trace.dims(x), 0, 0  # dimensions at either end that stay as they are have no part in a conflict
    while first < min(x.dim(), out.dim()) and x.shape[first] == out.shape[first]:
        first += 1
    while last < min(x.dim(), out.dim()) - first and x.shape[-1 - last] == out.shape[-1 - last]:
        last += 1
    try:
        return axes.regroup(dims, out.shape, trace.where)
    except Conflict as error:
        inner = slice(first, x.dim() - last)
        if first == last == 0:
            raise
        trace.record.conflicts.append(f"{trace.where}: {error}")
        trace.freeze_dims(dims[inner], f"conflict ({error})")
        new = [axes.axis(n, f"conflict in {trace.where}") for n in out.shape[first : out.dim() - last]]
        return [*dims[:first], *new, *dims[x.dim() - last :]]


@rule(aten.expand)
def expand(trace: Tracer, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """New and stretched dimensions are axes of their own, free until something says otherwise: GQA repeats."""
    dims, lead = trace.dims(x), out.dim() - x.dim()
    return [
        axes.axis(n) if i < lead or x.shape[i - lead] != n else dims[i - lead] for i, n in enumerate(out.shape)
    ]  # fmt: skip


@rule(aten.repeat)
def repeat(trace: Tracer, out: Tensor, x: Tensor, counts: Sequence[int]) -> Sequence[Dim]:
    """Each dimension becomes (count, dimension)."""
    dims, lead = trace.dims(x), len(counts) - x.dim()
    return [(*axes.axis(n), *(dims[i - lead] if i >= lead else ())) for i, n in enumerate(counts)]


@rule(aten.cat)
def cat(trace: Tracer, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Sequence[Dim]:
    """A sum along one dimension, unified along the others; empty one-dimensional tensors are skipped as in PyTorch.

    Of pieces of one element, as many as there are modules, one may go with each, as in a stack.
    """
    pieces = [t for t in tensors if t.dim() > 1 or t.numel() > 0]
    parts = [trace.dims(t) for t in pieces]
    if not parts:
        return trace.fresh(out, "empty")
    dim %= out.dim()
    for other in parts[1:]:
        for i, (p, q) in enumerate(zip(parts[0], other)):
            if i != dim:
                axes.unify(p, q)
    dims = list(parts[0])
    if len(parts) == out.shape[dim] and trace.has_list_of(len(parts)):
        dims[dim] = _one_of_each(trace, pieces)
    else:
        dims[dim] = axes.concat([part[dim] for part in parts])
    return dims


def _one_of_each(trace: Tracer, pieces: Sequence[Tensor]) -> Dim:
    """A new dimension, fixed unless a module goes with each element."""
    index = axes.axis(len(pieces))
    trace.one_by_one(index, range(len(pieces)), "index of a stack", pieces)
    return index


@rule(aten.stack)
def stack(trace: Tracer, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Sequence[Dim]:
    """A new dimension, fixed unless a module goes with each element; the others unified."""
    dims = list(trace.broadcast(tensors, tensors[0].shape))
    dims.insert(dim % out.dim(), _one_of_each(trace, tensors))
    return dims


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.unsafe_chunk, aten.unsafe_split_with_sizes)
def split(trace: Tracer, out: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> Sequence[Sequence[Dim]]:
    """The axis is the sum of the pieces; those of one element are as many as there are modules, where one goes with each."""
    dims = trace.dims(x)
    if len(out) == x.shape[dim] and trace.has_list_of(len(out)):
        trace.one_by_one(dims[dim], range(len(out)), "selected by index")
        return [_replaced(dims, dim % x.dim(), ()) for _ in out]
    pieces = _cut(trace, dims[dim], [o.shape[dim] for o in out])
    return [_replaced(dims, dim % x.dim(), piece) for piece in pieces]


def _cut(trace: Tracer, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """`axes.cut`; a dimension that cannot be cut there is fixed, and those beside it have no part in that."""
    try:
        return axes.cut(dim, sizes)
    except Conflict as error:
        trace.record.conflicts.append(f"{trace.where}: {error}")
        trace.freeze(dim, f"conflict ({error})")
        return [axes.axis(n, f"conflict in {trace.where}") for n in sizes]


def _replaced(dims: Sequence[Dim], position: int, dim: Dim) -> list[Dim]:
    out = list(dims)
    out[position] = dim
    return out


@rule(aten.slice)
def slice_(
    trace: Tracer, out: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Sequence[Dim]:
    """The middle of three pieces, or one element that a module may go with.

    With a step the axis is viewed as (piece, step), which needs a fixed step.
    """
    dims, total, wanted = trace.dims(x), x.shape[dim], out.shape[dim]
    dim %= x.dim()
    start = 0 if start is None else min(max(start + total if start < 0 else start, 0), total)
    if wanted == total:
        return dims
    if wanted == 1 and trace.has_list_of(total) and axes.is_free(dims[dim]):
        trace.one_by_one(dims[dim], [start], "")
        trace.normalised("selected by index", [dims[dim]], x)
        return _replaced(dims, dim, ())
    if not wanted:  # says nothing of where it begins
        return _replaced(dims, dim, axes.axis(0, "empty"))
    if step == 1:
        sizes = [start, wanted, total - start - wanted]
        return _replaced(dims, dim, _cut(trace, dims[dim], sizes)[1])
    if total % step == 0 and start < step and wanted == total // step:
        piece = axes.axis(total // step)
        axes.unify(dims[dim], (*piece, *axes.axis(step, "strided slice")))
        return _replaced(dims, dim, piece)
    trace.freeze(dims[dim], "strided slice")
    return _replaced(dims, dim, axes.axis(wanted, "strided slice"))


@rule(aten.narrow)
def narrow(trace: Tracer, out: Tensor, x: Tensor, dim: int, start: int, length: int) -> Sequence[Dim]:
    """A slice by start and length."""
    return slice_(trace, out, x, dim, start, start + length)


@rule(aten.select)
def select(trace: Tracer, out: Tensor, x: Tensor, dim: int, index: int) -> Sequence[Dim]:
    """One element of an axis by number: the axis is fixed, unless only the shape is read, or a module goes with each element."""
    dims = list(trace.dims(x))
    trace.one_by_one(dims[dim], [index % x.shape[dim]], "")
    trace.normalised("selected by index", [dims.pop(dim)], x)
    return dims


@rule(aten.unbind)
def unbind(trace: Tracer, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> Sequence[Sequence[Dim]]:
    """Every element of an axis by number: the axis is fixed, unless a module goes with each."""
    dims = list(trace.dims(x))
    trace.one_by_one(dims.pop(dim), range(len(out)), "selected by index")
    return [dims for _ in out]


@rule(aten.glu)
def glu(trace: Tracer, out: Tensor, x: Tensor, dim: int = -1) -> Sequence[Dim]:
    """The first half times a gate from the second: two equal pieces of one axis."""
    dims = trace.dims(x)
    value, gate = _cut(trace, dims[dim], [out.shape[dim]] * 2)
    axes.unify(value, gate)
    return _replaced(dims, dim % x.dim(), value)


@rule(aten.constant_pad_nd)
def constant_pad_nd(trace: Tracer, out: Tensor, x: Tensor, padding: Sequence[int], *args: Any) -> Sequence[Dim]:
    """Padding is a sum (the channel padding of a parameter-free shortcut); cropping is a slice.

    Its ends are frozen, but for those of a free axis whose sizes will be equated with what Python gives.
    """
    dims = list(trace.dims(x))
    for j in range(len(padding) // 2):
        before, after = padding[2 * j : 2 * j + 2]
        i = x.dim() - 1 - j
        if before < 0 or after < 0:
            crop = [max(-before, 0), min(x.shape[i], x.shape[i] + min(before, 0) + min(after, 0)), max(-after, 0)]
            dims[i] = _cut(trace, dims[i], crop)[1]
        if before > 0 or after > 0:
            sized = trace.making_sized and axes.is_free(dims[i])
            ends = [(axes.Axis(n, () if sized and n > 1 else ("padding",)),) for n in (before, after)]
            dims[i] = axes.concat([part for part in (ends[0], dims[i], ends[1]) if axes.size(part)])
    return dims


@rule(aten.flip)
def flip(trace: Tracer, out: Tensor, x: Tensor, positions: Sequence[int]) -> Sequence[Dim]:
    """Reversed axes keep their size: element i no longer pairs with element i."""
    for i in positions:
        trace.freeze(trace.dims(x)[i], "reversed")
    return trace.dims(x)


@rule(aten.roll)
def roll(trace: Tracer, out: Tensor, x: Tensor, shifts: Any, positions: Sequence[int] = ()) -> Sequence[Dim]:
    """Rolled axes keep their size."""
    for i in positions or range(x.dim()):
        trace.freeze(trace.dims(x)[i], "rolled")
    return trace.dims(x)


@rule(aten.unfold)
def unfold(trace: Tracer, out: Tensor, x: Tensor, dim: int, length: int, step: int) -> Sequence[Dim]:
    """Windows along one axis, which is fixed."""
    dims = list(trace.dims(x))
    dim %= x.dim()  # the result has one more
    trace.freeze(dims[dim], "unfolded into windows")
    dims[dim] = axes.axis(out.shape[dim], "windows")
    return [*dims, axes.axis(length, "window")]


@rule(aten.pixel_shuffle)
def pixel_shuffle(trace: Tracer, out: Tensor, x: Tensor, factor: int) -> Sequence[Dim]:
    """(C r r) H W -> C (H r) (W r)."""
    *lead, c, h, w = trace.dims(x)
    channels = axes.axis(x.shape[-3] // factor**2)
    r, s = axes.axis(factor, "pixel shuffle"), axes.axis(factor, "pixel shuffle")
    axes.unify(c, (*channels, *r, *s))
    return [*lead, channels, (*h, *r), (*w, *s)]


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(trace: Tracer, out: Tensor, x: Tensor, factor: int) -> Sequence[Dim]:
    """C (H r) (W r) -> (C r r) H W."""
    *lead, c, h, w = trace.dims(x)
    r, s = axes.axis(factor, "pixel shuffle"), axes.axis(factor, "pixel shuffle")
    new_h, new_w = (axes.axis(n, "spatial") for n in out.shape[-2:])
    axes.unify(h, (*new_h, *r))
    axes.unify(w, (*new_w, *s))
    return [*lead, (*c, *r, *s), new_h, new_w]


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(trace: Tracer, out: Tensor, x: Tensor, groups: int) -> Sequence[Dim]:
    """(g c) -> (c g)."""
    dims = trace.dims(x)
    g, c = axes.axis(groups), axes.axis(x.shape[1] // groups)
    axes.unify(dims[1], (*g, *c))
    return _replaced(dims, 1, (*c, *g))


@rule(aten.log_sigmoid_forward)
def log_sigmoid(trace: Tracer, out: Sequence[Tensor], x: Tensor) -> Sequence[Any]:
    """Element by element; the buffer for the backward is empty on some devices."""
    dims = trace.dims(x)
    return [dims, dims if out[1].shape == x.shape else [axes.axis(n, "empty") for n in out[1].shape]]


@rule(aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full, aten.new_empty_strided)
def created(trace: Tracer, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """A new tensor: its axes are free where Python sizes made it, since those will be equated with them."""
    return [axes.axis(n, *([] if trace.making_sized else ["a constant"])) for n in out.shape]


@rule(aten.as_strided, aten.as_strided_)
def as_strided(
    trace: Tracer, out: Tensor, x: Tensor, sizes: Sequence[int], strides: Sequence[int], offset: int | None = None
) -> Sequence[Dim]:
    """The same shape: `x` itself, or in place another memory layout for it (pooling in channels-last).

    Anything else says nothing about axes.
    """
    dims = trace.dims(x)
    elsewhere = tuple(strides) != x.stride() or offset not in (None, x.storage_offset())
    if list(sizes) != [axes.size(d) for d in dims] or elsewhere:
        raise Conflict(f"as_strided of {[axes.size(d) for d in dims]} to {list(sizes)}")
    return dims
