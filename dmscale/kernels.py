"""Results on the meta device from memory: most meta kernels are Python programs, that of a layer norm takes a millisecond.

What a kernel gives depends on nothing but the shapes, strides and dtypes of its tensors and on its other arguments, and a
network calls the same operators on the same shapes again and again.  So each is run once for such arguments, and its result
made from that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIMIT = 20_000  # results kept, about 1 kB each
_results: dict[Any, Any] = {}
_memorable: dict[Any, bool] = {}
_META = torch.device("meta")
_FIRST = object()  # the first argument is the result: an operator in place
_FLOATS = (torch.float32, torch.float64)
_UNKNOWN: tuple[Any, tuple[Any, ...]] = (None, ())  # not to be made from these


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, an ATen overload on meta tensors; from memory where that makes no difference.

    Views are always run: what they give shares its storage.
    """
    if not ("dtype" in kwargs or "out_dtype" in kwargs) and (made := told(func, args)) is not None:
        return made
    memorable = _memorable.get(func)
    if memorable is None:
        memorable = _memorable[func] = _is_memorable(func)
    if not memorable:
        return func(*args, **kwargs)
    try:
        key = (func, _form(args), tuple([(k, _form((v,))) for k, v in kwargs.items()]) if kwargs else None)
        known = _results.get(key)
    except TypeError:  # an argument that cannot be hashed
        return func(*args, **kwargs)
    if known is None:
        out = func(*args, **kwargs)
        if len(_results) >= _LIMIT:
            _results.clear()
        if args and out is args[0]:
            known = (_FIRST, ()) if _form(args) == key[1] else _UNKNOWN  # `resize_` has changed it
        else:
            known = _recipe(out)
        _results[key] = known
        return out
    made = known[0]
    if made is _FIRST:
        return args[0]
    if made is None:
        return func(*args, **kwargs)
    outs = [None if o is None else torch.empty_strided(o[0], o[1], dtype=o[2], device="meta") for o in known[1]]
    return outs[0] if made is Tensor else made(outs)


def told(func: Any, args: Any) -> Any:
    """What `func` gives, where a formula tells that from the form of its arguments; else None."""
    formula = _FORMULAS.get(func)
    return None if formula is None else formula(*args)


def _is_memorable(func: Any) -> bool:
    """Whether `func` gives new tensors, or writes into its first argument and gives that."""
    returned = [r.alias_info for r in func._schema.returns]
    if all(alias is None for alias in returned):
        return not func._schema.is_mutable
    first = func._schema.arguments[0].alias_info
    return len(returned) == 1 and returned[0].is_write and first is not None and first.is_write


def _like(x: Tensor) -> Tensor:
    return x.detach()  # a third of the time of making one; there are no elements to share


def _plain(*tensors: Tensor) -> bool:
    """Whether what contiguous tensors of this one dtype give is contiguous and of that dtype too."""
    dtype = tensors[0].dtype
    if dtype not in _FLOATS:
        return False
    return all([t.dtype is dtype and t.is_meta and t.is_contiguous() for t in tensors])


def _is_dense(x: Tensor) -> bool:
    """Whether the strides of `x` alone say in which order its elements lie, without gaps: what is like it is laid out so."""
    step = 1
    for stride, n in sorted(zip(x.stride(), x.shape)):
        if stride != step or (n == 1 and step != x.numel()):
            return False
        step *= n
    return True


def _is_in_order(x: Tensor) -> bool:
    """Whether the elements of `x` lie in their order, with gaps maybe: pieces of a chunk do."""
    strides = list(x.stride())  # where there is but one element those say nothing
    return 1 not in x.shape and 0 not in strides and strides == sorted(strides, reverse=True)


def _empty(shape: Sequence[int], x: Tensor) -> Tensor:
    return blank(tuple(shape), None, x.dtype).detach()


@functools.lru_cache(maxsize=4096)
def blank(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    """A tensor on the meta device to make others of, whose storage says nothing; contiguous where no `strides` are given."""
    if torch.is_inference_mode_enabled():  # what is made there cannot be written to elsewhere
        with torch.inference_mode(False):
            return blank.__wrapped__(shape, strides, dtype)
    if strides is None:
        return torch.empty(shape, dtype=dtype, device=_META)
    return torch.empty_strided(shape, strides, dtype=dtype, device=_META)


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Any:
    """A layer of its own for each shape leaves nothing to remember, and its kernel, a decomposition, is the slowest of all."""
    if not _plain(x):
        return None
    if not training:  # nothing is done with the others, so they need not be new
        given = blank((x.shape[1],), None, x.dtype)
        return _like(x), given, given
    return _like(x), _empty((x.shape[1],), x), _empty((x.shape[1],), x)


def _layer_norm(x: Tensor, shape: Sequence[int], *rest: Any) -> Any:
    if not x.is_meta or x.dtype not in _FLOATS:  # of the others the statistics are of another dtype
        return None
    each = [*x.shape[: x.dim() - len(shape)], *[1] * len(shape)]
    return _empty(x.shape, x), _empty(each, x), _empty(each, x)  # the kernel makes `x` contiguous


def _group_norm(x: Tensor, weight: Any, bias: Any, n: int, c: int, places: int, groups: int, *rest: Any) -> Any:
    return (_like(x), _empty((n, groups), x), _empty((n, groups), x)) if _plain(x) else None


def _resized(x: Tensor, size: Sequence[int], *rest: Any) -> Any:
    return _empty((*x.shape[:2], *size), x) if _plain(x) and x.numel() and min(size) > 0 else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    more: Any,
    groups: int,
) -> Any:
    taken, kernel = x.shape, weight.shape
    rank = len(kernel) - 2
    if transposed or len(taken) != len(kernel) or taken[1] != groups * kernel[1] or not _plain(x, weight):
        return None
    shape = [taken[0], kernel[0]]
    for i in range(rank):
        s, p, d = (stride[i], padding[i], dilation[i]) if len(stride) == rank else (stride[0], padding[0], dilation[0])
        shape.append((taken[i + 2] + 2 * p - d * (kernel[i + 2] - 1) - 1) // s + 1)
    return _empty(shape, x) if min(shape) > 0 else None  # the kernel says what is wrong


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Any:
    # a weight comes transposed, a step of a sequence in strides: `linear` gives what is contiguous all the same
    if not _plain(bias) or not (bias.dtype is a.dtype is b.dtype) or not (a.is_meta and b.is_meta):
        return None
    if a.dim() != 2 or b.dim() != 2:
        return None
    fits = a.shape[1] == b.shape[0] and bias.shape == b.shape[1:]
    return _empty((a.shape[0], b.shape[1]), a) if fits else None


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> Any:
    if x.dim() < 2 or weight.dim() != 2 or weight.dtype is not x.dtype:
        return None
    if not _plain(x) or x.shape[-1] != weight.shape[1]:
        return None  # what is not contiguous is copied first, or multiplied in batches
    return _empty((*x.shape[:-1], weight.shape[0]), x)


def _matmul(a: Tensor, b: Tensor) -> Any:
    rank = a.dim()
    if a.dtype not in _FLOATS or b.dtype is not a.dtype or rank < 2 or a.shape[-1] != b.shape[-2]:
        return None
    if b.dim() == 2:
        return _empty((*a.shape[:-1], b.shape[-1]), a) if rank > 2 and a.is_contiguous() else None
    if a.shape[:-2] != b.shape[:-2] or not _is_batch(a) or not _is_batch(b):
        return None  # one is stretched or copied first
    return _empty((*a.shape[:-1], b.shape[-1]), a)


def _grouped(a: Tensor, b: Tensor, *rest: Any) -> Any:
    """Rows of `a` by one of the matrices in `b` each: the meta kernel takes the one dtype that a GPU's does."""
    if a.dim() != 2 or b.dim() != 3 or a.shape[1] != b.shape[1]:
        return None
    return _empty((a.shape[0], b.shape[2]), a) if a.dtype is b.dtype is torch.float32 else None


def _is_batch(x: Tensor) -> bool:
    """Whether the matrices in the last two dimensions of `x` lie at equal distances."""
    shape, stride = x.shape, x.stride()
    lead = [(n, s) for n, s in zip(shape[:-2], stride) if n != 1]
    return all([s == m * t for (_, s), (m, t) in zip(lead, lead[1:])])


def _binary(x: Any, y: Any, *rest: Any) -> Any:
    if not isinstance(y, Tensor):
        return _like(x) if type(y) in (int, float) and _plain(x) else None
    if not isinstance(x, Tensor):
        return None
    if not _plain(x, y):
        alike = x.dtype is y.dtype and x.dtype in _FLOATS and x.is_meta and y.is_meta and x.shape == y.shape
        if alike and _is_in_order(x) and _is_in_order(y):
            return _empty(x.shape, x)
        return _like(x) if alike and _is_dense(x) else None
    larger, other = (x, y) if x.dim() >= y.dim() else (y, x)
    if x.shape != y.shape:
        if x.dim() == y.dim() and x.numel() < y.numel():
            larger, other = y, x
        lead = larger.dim() - other.dim()
        if any([n not in (1, larger.shape[lead + i]) for i, n in enumerate(other.shape)]):
            return None  # both are stretched
    return _like(larger)


def _binary_(x: Tensor, y: Any, *rest: Any) -> Any:
    if isinstance(y, Tensor):
        return x if x.is_meta and y.is_meta and x.dtype is y.dtype and x.shape == y.shape else None
    return x if type(y) in (int, float) and x.is_meta and x.is_floating_point() else None


def _mean(x: Tensor, dims: Any, keepdim: bool = False, *rest: Any) -> Any:
    if not dims or not _plain(x):
        return None
    over = {d % x.dim() for d in dims}
    return _empty([1 if i in over else n for i, n in enumerate(x.shape) if keepdim or i not in over], x)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not first.dim() or any([t.dim() != first.dim() or t.dtype is not first.dtype for t in tensors]):
        return None
    if not _plain(*tensors) and (
        first.dim() > 3 or first.dtype not in _FLOATS or not all([t.is_meta for t in tensors])
    ):
        return None  # of pictures the result may be laid out by channels
    dim %= first.dim()
    shape = list(first.shape)
    shape[dim] = sum([t.shape[dim] for t in tensors])
    fits = all([n == m for t in tensors for i, (n, m) in enumerate(zip(t.shape, shape)) if i != dim])
    return _empty(shape, first) if fits else None


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Any:
    first = tensors[0]
    if not _plain(*tensors) or any([t.shape != first.shape for t in tensors]):
        return None
    shape = list(first.shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return _empty(shape, first)


def _compare(x: Tensor, number: Any) -> Any:
    if not x.is_meta or not x.is_contiguous() or type(number) not in (int, float) or x.is_complex():
        return None
    return blank(tuple(x.shape), None, torch.bool).detach()


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    return (_like(v), _like(g)) if _plain(v, g) else None


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Any:
    return _like(x) if _plain(x) and not half_to_float else None


def _slice(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    return x[(*[slice(None)] * dim, slice(start, end))] if dim >= 0 and step == 1 else None


def _norm(x: Tensor, ord: float = 2, dims: Any = None, keepdim: bool = False) -> Any:
    if not dims or not x.dim() or not x.is_meta or x.dtype not in _FLOATS:
        return None
    over = {d % x.dim() for d in dims}
    return _empty([1 if i in over else n for i, n in enumerate(x.shape) if keepdim or i not in over], x)


def _cumsum(x: Tensor, dim: int) -> Any:
    return _empty(x.shape, x) if x.dim() and _plain(x) else None


def _activation(x: Tensor, *rest: Any) -> Any:
    return _like(x) if x.is_meta and x.is_floating_point() and (x.is_contiguous() or _is_dense(x)) else None


def _activation_(x: Tensor, *rest: Any) -> Any:
    return x if x.is_meta else None


aten = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    **{p.default: _resized for p in (
        aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
    )},
    aten.convolution.default: _convolution,
    aten.addmm.default: _addmm,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten._grouped_mm.default: _grouped,
    aten.mean.dim: _mean,
    aten.linalg_vector_norm.default: _norm,
    aten.cumsum.default: _cumsum,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    **{p.Scalar: _compare for p in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)},
    aten._weight_norm_interface.default: _weight_norm,
    **{p.Tensor: _binary for p in (aten.add, aten.mul, aten.sub, aten.div)},
    aten._softmax.default: _softmax,
    aten.add_.Tensor: _binary_,
    aten.view.default: torch.Tensor.view,
    aten.permute.default: torch.Tensor.permute,
    aten.transpose.int: torch.Tensor.transpose,
    aten.unbind.int: torch.Tensor.unbind,
    aten.slice.Tensor: _slice,
    aten.alias.default: torch.Tensor.detach,
    **{p.default: _activation for p in (
        aten.relu, aten.gelu, aten.silu, aten.sigmoid, aten.tanh, aten.hardsigmoid, aten.hardswish, aten.hardtanh,
        aten.leaky_relu, aten.elu, aten.mish, aten.softplus, aten.clamp_min, aten.rsqrt, aten.neg, aten.exp, aten.sin, aten.cos,
    )},
    aten.pow.Tensor_Scalar: _activation,
    **{p.default: _activation_ for p in (
        aten.relu_, aten.silu_, aten.sigmoid_, aten.tanh_, aten.hardsigmoid_, aten.hardswish_, aten.hardtanh_,
        aten.leaky_relu_, aten.elu_, aten.mish_,
    )},
}  # fmt: skip
"""Operators that are called on many shapes: of contiguous tensors what they give is plain to see."""


def forget() -> None:
    """Start without memory, to time a first trace."""
    _results.clear()
    blank.cache_clear()


def _form(args: Any) -> tuple[Any, ...]:
    """What a kernel can tell of its arguments, hashable."""
    out: list[Any] = []
    for x in args:
        if isinstance(x, (tuple, list)):
            out.append(_form(x))
        elif x is not None and isinstance(x, Tensor):
            if not x.is_meta or x.is_conj() or x.is_neg():
                raise TypeError("its elements matter")
            out.append((x.shape, x.stride(), x.dtype))
        else:
            out.append((type(x), x))  # 1, 1.0 and True are equal, and not the same
    return tuple(out)


def _recipe(out: Any) -> tuple[Any, tuple[Any, ...]]:
    """How to make `out` again: Tensor, tuple or list, and shape, strides and dtype of each tensor in it."""
    made = Tensor if isinstance(out, Tensor) else type(out)
    outs = (out,) if made is Tensor else out
    if made not in (Tensor, tuple, list) or not all(
        o is None or (isinstance(o, Tensor) and o.is_meta and not o.is_conj() and not o.is_neg()) for o in outs
    ):
        return _UNKNOWN
    return made, tuple(None if o is None else (o.shape, o.stride(), o.dtype) for o in outs)
