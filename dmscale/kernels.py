"""Results on the meta device from memory: most meta kernels are Python programs, that of a layer norm takes a millisecond.

What a kernel gives depends on nothing but the shapes, strides and dtypes of its tensors and on its other arguments, and a
network calls the same operators on the same shapes again and again.  So each is run once for such arguments, and its result
made from that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIMIT = 20_000  # results kept, about 1 kB each
_results: dict[Any, Any] = {}
_memorable: dict[Any, bool] = {}
_FIRST = object()  # the first argument is the result: an operator in place
_UNKNOWN: tuple[Any, tuple[Any, ...]] = (None, ())  # not to be made from these


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, an ATen overload on meta tensors; from memory where that makes no difference.

    Views are always run: what they give shares its storage.
    """
    formula = _FORMULAS.get(func)
    if formula is not None and (made := formula(*args)) is not None:
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


def _is_memorable(func: Any) -> bool:
    """Whether `func` gives new tensors, or writes into its first argument and gives that."""
    returned = [r.alias_info for r in func._schema.returns]
    if all(alias is None for alias in returned):
        return not func._schema.is_mutable
    first = func._schema.arguments[0].alias_info
    return len(returned) == 1 and returned[0].is_write and first is not None and first.is_write


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")  # `empty_like` is a program too


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Any:
    """A layer of its own for each shape leaves nothing to remember, and its kernel, a decomposition, is the slowest of all."""
    if not x.is_meta or not x.is_contiguous() or x.dtype not in (torch.float32, torch.float64):
        return None
    return _like(x), *[torch.empty(x.shape[1], dtype=x.dtype, device="meta") for _ in range(2)]


def _activation(x: Tensor, *rest: Any) -> Any:
    return _like(x) if x.is_meta and x.is_contiguous() and x.is_floating_point() else None


def _activation_(x: Tensor, *rest: Any) -> Any:
    return x if x.is_meta else None


aten = torch.ops.aten
_FORMULAS = {
    aten.native_batch_norm.default: _batch_norm,
    **{p.default: _activation for p in (
        aten.relu, aten.gelu, aten.silu, aten.sigmoid, aten.tanh, aten.hardsigmoid, aten.hardswish, aten.hardtanh,
        aten.leaky_relu, aten.elu, aten.mish, aten.softplus,
    )},
    **{p.default: _activation_ for p in (
        aten.relu_, aten.silu_, aten.sigmoid_, aten.tanh_, aten.hardsigmoid_, aten.hardswish_, aten.hardtanh_,
        aten.leaky_relu_, aten.elu_, aten.mish_,
    )},
}  # fmt: skip
"""Operators that convolutional networks call on many shapes: what they give is plain to see."""


def forget() -> None:
    """Start without memory, to time a first trace."""
    _results.clear()


def _form(args: Any) -> tuple[Any, ...]:
    """What a kernel can tell of its arguments, hashable."""
    out: list[Any] = []
    for x in args:
        if isinstance(x, Tensor):
            if not x.is_meta or x.is_conj() or x.is_neg():
                raise TypeError("its elements matter")
            out.append((x.shape, x.stride(), x.dtype))
        elif isinstance(x, (tuple, list)):
            out.append(_form(x))
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
