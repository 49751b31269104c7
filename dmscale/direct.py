"""Operators without PyTorch's way to them: a fifth of a convolution's time in a trace, and two fifths of a batch norm's.

A layer's call, its forward, the torch function that this calls and the dispatcher between that and an ATen operator do nothing
that a trace has to see, where one operator is all there is.  So the tables here say of some layers and functions which operator
that is, and with which arguments; what it gives is told from the form of these (`kernels.py`).  Whatever is not plain goes the
way of all others, and what is noted is the same either way (tests/test_direct.py), but for products of matrices: PyTorch makes
views and a product of two or three dimensions of them, and here they are one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

if TYPE_CHECKING:
    from .tracer import Tracer

aten, _F = torch.ops.aten, torch._C._nn
_casts, _Undispatched = torch._C._is_any_autocast_enabled, torch._C._DisableTorchDispatch

Call = tuple[Any, tuple[Any, ...]]
"""A function, and its arguments."""
Plan = Callable[..., Call | None]
"""What tells of the arguments of a torch function which operator it comes to, with which; None where that is not plain."""
LayerPlan = Callable[[Any, Tensor], Call | None]
"""What tells of a layer and a tensor which torch function its forward calls, with which; with none it gives the tensor."""


# -- functions --------------------------------------------------------------------------------------------------------


def _many(value: Any, n: int) -> list[int]:
    """A stride or the like for `n` dimensions, as the dispatcher hands it on."""
    if isinstance(value, int):
        return [int(value)] * n
    return [*map(int, value)] if len(value) == n else [int(value[0])] * n


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Call | None:  # fmt: skip
    if isinstance(padding, str):
        return None
    n = weight.dim() - 2
    strides, paddings, dilations = _many(stride, n), _many(padding, n), _many(dilation, n)
    return aten.convolution.default, (x, weight, bias, strides, paddings, dilations, False, [0] * n, int(groups))


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool,
    momentum: float, eps: float, cudnn: bool,
) -> Call | None:  # fmt: skip
    if training or mean is None or mean.shape[0] != x.shape[1]:
        return None
    return aten.native_batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    cudnn: bool = True,
) -> Call | None:  # fmt: skip
    shape = [int(n) for n in shape]
    if list(x.shape[x.dim() - len(shape) :]) != shape:
        return None
    return aten.native_layer_norm.default, (x, shape, weight, bias, eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return aten.linear.default, (x, weight, bias)


def _matmul(a: Tensor, b: Tensor) -> Call | None:
    return (aten.matmul.default, (a, b)) if a.dim() > 1 and b.dim() > 1 else None


_NUMBERS = (int, float)
"""Plain ones: those that remember sizes are for `arrivals.py` to follow."""


def _arithmetic(operator: Any) -> Plan:
    def plan(x: Any, y: Any = None, *rest: Any) -> Call | None:
        if rest or not isinstance(x, Tensor):
            return None
        alike = x.dtype is y.dtype if isinstance(y, Tensor) else type(y) in _NUMBERS
        return (operator, (x, y)) if alike else None

    return plan


def _power(x: Any, exponent: Any) -> Call | None:
    plain = isinstance(x, Tensor) and type(exponent) in _NUMBERS
    return (aten.pow.Tensor_Scalar, (x, exponent)) if plain else None


def _ints(values: Sequence[Any]) -> list[int] | None:
    """Sizes or dimensions, given one by one or as a list; None where they are something else."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = values[0]
    return [int(v) for v in values] if all([isinstance(v, int) for v in values]) else None


def _view(x: Tensor, *sizes: Any) -> Call | None:
    wanted = _ints(sizes)
    return None if wanted is None else (aten.view.default, (x, wanted))


def _reshape(x: Tensor, *sizes: Any) -> Call | None:
    return _view(x, *sizes) if x.is_contiguous() else None  # else it may be copied


def _flatten(x: Tensor, start: Any = 0, end: Any = -1) -> Call | None:
    rank = x.dim()
    if (
        not rank
        or type(start) is not int
        or type(end) is not int
        or start % rank >= end % rank
        or not x.is_contiguous()
    ):
        return None
    start, end, shape = start % rank, end % rank, list(x.shape)
    return aten.view.default, (x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


def _permute(x: Tensor, *order: Any) -> Call | None:
    wanted = _ints(order)
    return None if wanted is None else (aten.permute.default, (x, wanted))


def _transpose(x: Tensor, i: Any, j: Any) -> Call | None:
    return (aten.transpose.int, (x, int(i), int(j))) if isinstance(i, int) and isinstance(j, int) else None


def _unbind(x: Tensor, dim: int = 0) -> Call | None:
    if type(dim) is not int:
        return None
    return aten.unbind.int, (x, dim) if dim else (x,)


def _item(x: Tensor, index: Any) -> Call | None:
    """`x[:, :n, :]`: slices of which at most one leaves anything out."""
    if type(index) is not tuple or len(index) > x.dim():
        return None
    found: Call = aten.alias.default, (x,)
    for i, (at, n) in enumerate(zip(index, x.shape)):
        if type(at) is not slice or at.step is not None:
            return None
        start, stop = at.start or 0, n if at.stop is None else at.stop
        if not isinstance(start, int) or not isinstance(stop, int):
            return None
        if int(start) or int(stop) < n:
            if len(found[1]) > 1:
                return None
            found = aten.slice.Tensor, (x, i, int(start), int(stop))
    return found


def _joined(tensors: Any, dim: int = 0) -> Call | None:
    plain = type(dim) is int and all([t.dim() for t in tensors])
    return (aten.cat.default, (list(tensors), dim)) if plain else None


def _softmax(x: Tensor, dim: Any, dtype: Any = None) -> Call | None:
    return (aten._softmax.default, (x, dim, False)) if type(dim) is int and dtype is None else None


def _gelu(x: Tensor, approximate: str = "none") -> Call:
    return aten.gelu.default, (x,)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False) -> Call | None:
    dims = [dim] if type(dim) is int else list(dim) if type(dim) in (tuple, list) else []
    if not dims or not all([type(d) is int for d in dims]):
        return None
    return aten.mean.dim, (x, dims, keepdim) if keepdim else (x, dims)


def _pooled(x: Tensor, size: Any) -> Call | None:
    one = size == 1 or (isinstance(size, (tuple, list)) and all([n == 1 for n in size]))
    return (aten.mean.dim, (x, [-1, -2], True)) if one else None


def _of_one(operator: Any) -> Plan:
    return lambda x: (operator, (x,))


def _methods(*names: str) -> list[Any]:
    """Functions of `torch` and methods of tensors of these names: a method, or an operator in Python, is called by its own."""
    return [getattr(holder, name) for name in names for holder in (torch, Tensor) if hasattr(holder, name)]


OPERATORS: dict[Any, Plan] = {
    function: plan for functions, plan in (
        ((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
        ((torch.batch_norm,), _batch_norm),
        ((torch.layer_norm,), _layer_norm),
        ((_F.linear,), _linear),
        (_methods("matmul", "__matmul__"), _matmul),
        ((Tensor.add, Tensor.__add__), _arithmetic(aten.add.Tensor)),
        ((Tensor.sub, Tensor.__sub__), _arithmetic(aten.sub.Tensor)),
        ((Tensor.mul, Tensor.__mul__), _arithmetic(aten.mul.Tensor)),
        ((Tensor.div, Tensor.true_divide, Tensor.__truediv__), _arithmetic(aten.div.Tensor)),
        ((Tensor.add_, Tensor.__iadd__), _arithmetic(aten.add_.Tensor)),
        (_methods("pow", "__pow__"), _power),
        ((Tensor.view,), _view),
        ((Tensor.reshape,), _reshape),
        (_methods("flatten"), _flatten),
        (_methods("permute"), _permute),
        (_methods("transpose"), _transpose),
        ((Tensor.unbind,), _unbind),
        ((Tensor.__getitem__,), _item),
        ((torch.cat,), _joined),
        (_methods("softmax"), _softmax),
        (_methods("mean"), _mean),
        ((_F.adaptive_avg_pool2d,), _pooled),
        ((_F.gelu,), _gelu),
        (_methods("rsqrt"), _of_one(aten.rsqrt.default)),
        (_methods("sigmoid"), _of_one(aten.sigmoid.default)),
        ((torch.relu,), _of_one(aten.relu.default)),
        ((torch.relu_,), _of_one(aten.relu_.default)),
        ((_F.silu,), _of_one(aten.silu.default)),
        ((_F.silu_,), _of_one(aten.silu_.default)),
        ((_F.hardswish,), _of_one(aten.hardswish.default)),
        ((_F.hardswish_,), _of_one(aten.hardswish_.default)),
        ((_F.hardsigmoid,), _of_one(aten.hardsigmoid.default)),
        ((_F.hardsigmoid_,), _of_one(aten.hardsigmoid_.default)),
    ) for function in functions
}  # fmt: skip
"""Torch function -> the operator that it comes to."""

_NAMED: dict[Any, set[str]] = {
    torch.cat: {"dim"}, _F.gelu: {"approximate"},
    **dict.fromkeys(_methods("softmax"), {"dim"}), **dict.fromkeys(_methods("mean"), {"dim", "keepdim"}),
}  # fmt: skip
"""Function -> what its plan takes by name."""

_PARTS = {torch.batch_norm, torch.layer_norm}
"""Functions that give the first only of what the operator gives."""


def result(tracer: Tracer, function: Any, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function gives, inferred; None where it has to go PyTorch's way.  `plan` is that of `OPERATORS`."""
    if not tracer.meta or _casts():
        return None
    if kwargs and not kwargs.keys() <= _NAMED.get(function, set()):
        return None
    with _Undispatched():
        call = plan(*args, **kwargs)
        out = None if call is None else tracer.apply(*call)
    return out[0] if out is not None and function in _PARTS else out


def call(tracer: Tracer, function: Any, *args: Any) -> Any:
    """`function(*args)`, of a function of `OPERATORS`, by whichever way."""
    out = result(tracer, function, OPERATORS[function], args, {})
    return function(*args) if out is None else out


# -- layers -----------------------------------------------------------------------------------------------------------
#
# A plain layer has its weights among its parameters: code that puts other tensors in their place takes them away from there.


def _conv(function: Any) -> LayerPlan:
    def plan(layer: Any, x: Tensor) -> Call | None:
        held, state = layer._parameters, layer.__dict__
        if "weight" not in held or "bias" not in held or state["padding_mode"] != "zeros":
            return None
        given = (x, held["weight"], held["bias"], state["stride"], state["padding"], state["dilation"], state["groups"])
        return function, given

    return plan


def _batch_norm_layer(layer: Any, x: Tensor) -> Call | None:
    held, kept, state = layer._parameters, layer._buffers, layer.__dict__
    mean, var = kept.get("running_mean"), kept.get("running_var")
    if state["training"] or mean is None or var is None or "weight" not in held or "bias" not in held:
        return None
    given = (x, held["weight"], held["bias"], mean, var, False, state["momentum"] or 0.0, state["eps"], True)
    return torch.batch_norm, given


def _linear_layer(layer: Any, x: Tensor) -> Call | None:
    held = layer._parameters
    return (_F.linear, (x, held["weight"], held["bias"])) if "weight" in held and "bias" in held else None


def _layer_norm_layer(layer: Any, x: Tensor) -> Call | None:
    held = layer._parameters
    if "weight" not in held or "bias" not in held:
        return None
    return torch.layer_norm, (x, layer.normalized_shape, held["weight"], held["bias"], layer.eps, True)


def _calls(plain: Any, in_place: Any = None) -> LayerPlan:
    """An activation: a function of one tensor, `in_place` where the layer says so."""
    return lambda layer, x: (in_place if in_place is not None and layer.inplace else plain, (x,))


def _nothing(layer: Any, x: Tensor) -> Call | None:
    """A dropout, or nothing at all."""
    return None if layer.training else (None, (x,))


_PLANS: dict[type[nn.Module], LayerPlan] = {
    nn.Conv1d: _conv(torch.conv1d), nn.Conv2d: _conv(torch.conv2d), nn.Conv3d: _conv(torch.conv3d),
    nn.BatchNorm1d: _batch_norm_layer, nn.BatchNorm2d: _batch_norm_layer, nn.BatchNorm3d: _batch_norm_layer,
    nn.Linear: _linear_layer, nn.LayerNorm: _layer_norm_layer, nn.GELU: _calls(_F.gelu), nn.Sigmoid: _calls(torch.sigmoid),
    nn.ReLU: _calls(torch.relu, torch.relu_), nn.SiLU: _calls(_F.silu, _F.silu_),
    nn.Hardswish: _calls(_F.hardswish, _F.hardswish_), nn.Hardsigmoid: _calls(_F.hardsigmoid, _F.hardsigmoid_),
    nn.Identity: _nothing, nn.Dropout: _nothing, nn.Dropout2d: _nothing,
}  # fmt: skip
_LAYERS: dict[Any, tuple[Any, LayerPlan]] = {cls: (cls.forward, plan) for cls, plan in _PLANS.items()}
"""Layer -> its forward, as PyTorch has it, and what that calls."""


def is_open() -> bool:
    """Whether layers may go the short way: nothing waits for the calls of all modules."""
    return not hooks._has_any_global_hook()


def layer(module: nn.Module) -> Callable[[Tensor], Call | None] | None:
    """What tells of a tensor which torch function a plain layer of PyTorch's calls on it; None for any other module."""
    cls: Any = type(module)
    known = _LAYERS.get(cls)
    if known is None or cls.forward is not known[0] or "forward" in module.__dict__:
        return None
    return None if module._backward_hooks or module._backward_pre_hooks else functools.partial(known[1], module)
