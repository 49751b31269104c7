"""Operators whose result depends on how many elements an axis has: normalisations, softmax, sums and means.

Masking and slicing differ here.  A rule notes the axis as normalised over; whether a kept-count form exists for it is
decided when the whole network has been read (`gates.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import axes
from ..axes import Dim
from ..numbering import Said, is_zero
from .registry import rule

if TYPE_CHECKING:
    from ..tracer import Tracer, Value

aten = torch.ops.aten
Tensor = torch.Tensor


@rule(
    aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional, aten.cudnn_batch_norm, aten.miopen_batch_norm,
    aten._batch_norm_with_update, aten._batch_norm_no_update,
)  # fmt: skip
def batch_norm(trace: Tracer, out: Sequence[Tensor], x: Tensor, *parameters: Any, **kwargs: Any) -> Sequence[Any]:
    """Statistics by channel: every per-channel vector has the channel's axis, and nothing mixes channels.

    With statistics that are given, `native_batch_norm` has one result that matters: the two behind it are empty on a CPU, and
    copies of what was given on other devices.
    """
    dims = trace.dims(x)
    training = any([p is True for p in parameters]) or trace._operator == "_batch_norm_with_update"
    others = [dims[0], *dims[2:]]
    if trace.value(x).data:  # in training they are those of this very batch, whatever they are now
        trace.freeze_dims(others, "statistics are taken over it")
    elif training:  # of a weight that is standardised
        trace.normalised("standardised", others, x)
    for p in parameters[:4]:
        if isinstance(p, Tensor):
            axes.unify(dims[1], trace.dims(p)[0])
    weight, _, mean, var = parameters[:4]
    if isinstance(mean, Tensor):
        trace.writes(mean, var)
        if weight is None:
            trace.shifts()
    if not training and trace._operator == "native_batch_norm":
        return [dims]
    return [dims, *([dims[1]] if o.dim() == 1 and o.numel() == x.shape[1] else trace.fresh(o, "statistics")
                    for o in out[1:])]  # fmt: skip


@rule(aten.native_layer_norm)
def layer_norm(
    trace: Tracer, out: Sequence[Tensor], x: Tensor, shape: Sequence[int], weight: Tensor | None,
    bias: Tensor | None, eps: float,
) -> Sequence[Any]:  # fmt: skip
    """Mean and variance over the last dimensions."""
    dims = trace.dims(x)
    for p in (weight, bias):
        if p is not None:
            for own, other in zip(dims[-len(shape) :], trace.dims(p)):
                axes.unify(own, other)
    trace.normalised("centred", dims[-len(shape) :], x, weight, bias)
    return [dims, *(_statistics(dims, len(shape)) for _ in out[1:])]


def _statistics(dims: Sequence[Dim], normalised: int) -> Sequence[Dim]:
    return [*dims[: len(dims) - normalised], *[()] * normalised]


@rule(aten._fused_rms_norm)
def rms_norm(
    trace: Tracer, out: Any, x: Tensor, shape: Sequence[int] | int, weight: Tensor | None = None, *args: Any
) -> Sequence[Any]:  # fmt: skip
    """Root mean square over the last dimensions; torch 2.8 says how many these are, not which."""
    dims, n = trace.dims(x), shape if isinstance(shape, int) else len(shape)
    if weight is not None:
        for own, other in zip(dims[-n:], trace.dims(weight)):
            axes.unify(own, other)
    trace.normalised("scaled", dims[-n:], x, weight, None)
    return [dims, *(_statistics(dims, n) for _ in out[1:])] if isinstance(out, (tuple, list)) else dims


@rule(aten.native_group_norm)
def group_norm(
    trace: Tracer, out: Sequence[Tensor], x: Tensor, weight: Tensor | None, bias: Tensor | None,
    n: int, c: int, hw: int, groups: int, eps: float,
) -> Sequence[Any]:  # fmt: skip
    """Mean and variance over the channels of a group; groups themselves do not meet (instance norm: one channel each)."""
    dims = list(trace.dims(x))
    inner = axes.axis(c // groups)
    group = axes.axis(groups)
    axes.unify(dims[1], (*group, *inner))
    trace.freeze_dims(dims[2:], "spatial")
    for p in (weight, bias):
        if p is not None:
            axes.unify(trace.dims(p)[0], dims[1])
    trace.normalised("centred", [inner], x, weight, bias, group=group)
    return [dims, *([dims[0], group] for _ in out[1:])]


@rule(aten._softmax, aten._safe_softmax, aten._log_softmax, aten.softmax, aten.log_softmax)
def softmax(trace: Tracer, out: Tensor, x: Tensor, dim: int, *args: Any) -> Sequence[Dim]:
    """A masked element would still take its share; a number alone has no dimension."""
    trace.normalised("softmax", [trace.dims(x)[dim]] if x.dim() else [], x)
    return trace.dims(x)


@rule(aten._softmax_backward_data, aten._log_softmax_backward_data)
def softmax_backward(trace: Tracer, out: Tensor, grad: Tensor, result: Tensor, dim: int, *args: Any) -> Sequence[Dim]:
    """Sums over the axis that the softmax was taken over."""
    dims = trace.broadcast([grad, result], out.shape)
    trace.normalised("softmax", [dims[dim]], result)
    return dims


@rule(aten.cumsum)
def cumsum(trace: Tracer, out: Tensor, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """The sum of all elements up to this one; what is zero where it is gone adds nothing to those behind it."""
    own = trace.dims(x)[dim] if x.dim() else ()
    if not is_zero(trace.value(x), own):
        return cumulative(trace, out, x, dim)
    trace.says(out, Said(ends=own))
    return trace.dims(x)


@rule(aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin)
def cumulative(trace: Tracer, out: Any, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """Every element depends on those before it: the axis is fixed."""
    if x.dim():
        trace.freeze(trace.dims(x)[dim], "cumulative")
    return trace.dims(x) if isinstance(out, Tensor) else [trace.dims(x)] * len(out)


@rule(aten._fft_c2c, aten._fft_r2c, aten._fft_c2r)
def fourier(trace: Tracer, out: Tensor, x: Tensor, dim: Sequence[int], *args: Any) -> Sequence[Dim]:
    """Every frequency depends on all elements of the axes that are transformed, and on how many there are."""
    dims = list(trace.dims(x))
    for i in dim:
        trace.freeze(dims[i], "a Fourier transform over it")
        if out.shape[i] != x.shape[i]:
            dims[i] = axes.axis(out.shape[i], "frequencies")
    return dims


def _reduced_positions(x: Tensor, dim: Any) -> set[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return set(range(x.dim()))
    return {i % max(1, x.dim()) for i in (dim if isinstance(dim, (list, tuple)) else [dim])}


def _reduce(trace: Tracer, out: Any, x: Tensor, dim: Any, kind: str) -> Sequence[Any]:
    dims, first = trace.dims(x), out if isinstance(out, Tensor) else out[0]
    gone = _reduced_positions(x, dim)
    over = [dims[i] for i in sorted(gone)]
    value = trace.value(x)
    trace.normalised(kind, [d for d in over if kind != "sum" or not is_zero(value, d)], x)
    _number(trace, out, value, over)
    keepdim = first.dim() == x.dim()
    result = [() if i in gone else d for i, d in enumerate(dims) if keepdim or i not in gone]
    return result if isinstance(out, Tensor) else [result for _ in out]


def _number(trace: Tracer, out: Any, value: Value, over: Sequence[Dim]) -> None:
    """Where a reduction gives numbers of elements: of the largest, say."""
    several = isinstance(out, (tuple, list))
    if trace._operator not in (_GIVE_BOTH if several else _GIVE_NUMBERS):
        return
    number = out[1] if several else out
    if len(over) != 1:
        trace.freeze_dims(over, "numbered together")
    elif axes.is_free(over[0]):
        trace.at_least(over[0], 1 + value.said.taken)
        trace.says(number, Said(over[0]))


_GIVE_NUMBERS = ("argmax", "argmin")
_GIVE_BOTH = ("max", "min", "median")


@rule(aten.mean)
def mean(trace: Tracer, out: Tensor, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """Mean; over the squares of its input it is the heart of RMSNorm."""
    return _reduce(trace, out, x, dim, "mean square" if trace.is_square(x) else "mean")


@rule(
    aten.amax, aten.amin, aten.prod, aten.any, aten.all, aten.logsumexp, aten.argmax,
    aten.argmin, aten.median, aten.count_nonzero,
)  # fmt: skip
def reduce(trace: Tracer, out: Any, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """Reductions over dimensions, or over everything."""
    return _reduce(trace, out, x, dim, "reduced")


@rule(aten.sum, aten.nansum)
def sum_(trace: Tracer, out: Tensor, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """A sum does not mind elements that are zero: masking the weights that make them is enough."""
    return _reduce(trace, out, x, dim, "sum")


@rule(aten.var, aten.std, aten.var_mean, aten.std_mean)
def variance(trace: Tracer, out: Any, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """Variance; its second argument may be the old boolean `unbiased`."""
    return _reduce(trace, out, x, None if isinstance(dim, bool) else dim, "variance")


@rule(aten.max, aten.min)
def extremum(trace: Tracer, out: Any, x: Tensor, other: Any = None, *args: Any, **kwargs: Any) -> Sequence[Any]:
    """`max(x)`, `max(x, dim)` reduce; `max(x, y)` is pointwise."""
    if isinstance(other, Tensor):
        return trace.broadcast([x, other], out.shape)
    return _reduce(trace, out, x, other, "reduced")


@rule(aten.linalg_vector_norm)
def vector_norm(
    trace: Tracer, out: Tensor, x: Tensor, order: Any = 2, dim: Any = None, *args: Any, **kwargs: Any
) -> Sequence[Dim]:  # fmt: skip
    """Norm over dimensions; zeros do not matter to those of positive order."""
    return _reduce(trace, out, x, dim, "sum" if order > 0 else "reduced")


@rule(aten.norm)
def norm(
    trace: Tracer, out: Tensor, x: Tensor, order: Any = 2, dim: Any = None, *args: Any, **kw: Any
) -> Sequence[Dim]:
    """Norm over dimensions, the older operator."""
    return _reduce(trace, out, x, dim, "sum" if order is None or order > 0 else "reduced")


@rule(aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss)
def loss(trace: Tracer, out: Tensor, x: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Sequence[Dim]:
    """Element by element, then the mean or the sum of all, unless asked for none."""
    dims = trace.broadcast([x, target], torch.broadcast_shapes(x.shape, target.shape))
    if out.dim() == len(dims):
        return dims
    _over_pairs(trace, dims, x, target)
    return []


def _over_pairs(trace: Tracer, over: Sequence[Dim], a: Tensor, b: Tensor) -> None:
    """What is computed of `a` and `b`, element by element, is summed up over these dimensions, at the same place in both."""
    if a.dim() == b.dim():
        trace.normalised("reduced", [d for d in over if d], a)
    else:
        trace.freeze_dims(over, "compared with a tensor of another rank")


@rule(aten._euclidean_dist, aten._cdist_forward, aten.dist)
def distance(trace: Tracer, out: Tensor, a: Tensor, b: Tensor, *args: Any) -> Sequence[Dim]:
    """Of every row to every row, or of all elements; what is zero in both does not matter."""
    if not out.dim():
        over = list(trace.broadcast([a, b], torch.broadcast_shapes(a.shape, b.shape)))
        dims: list[Dim] = []
    else:
        (*batch, n, width), (*other, m, same) = trace.dims(a), trace.dims(b)
        for one, two in zip((*reversed(batch), width), (*reversed(other), same)):
            axes.unify(one, two)
        over, dims = [width], [*batch, n, m]
    _over_pairs(trace, over, a, b)
    return dims


@rule(aten._weight_norm_interface)
def weight_norm(trace: Tracer, out: Sequence[Tensor], v: Tensor, g: Tensor, dim: int = 0) -> Sequence[Any]:
    """g * v / |v|, the norm over every dimension but `dim`: zeros of a masked `v` do not matter to it, but for a whole row's."""
    dims = trace.dims(v)
    for own, other in zip(dims, trace.dims(g)):
        if other:
            axes.unify(own, other)
    trace.normalised("sum", [d for i, d in enumerate(dims) if i != dim % v.dim()], v)
    trace.has_magnitude(v, g)
    return [dims, trace.dims(g)]
