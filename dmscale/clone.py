"""Copies of a module tree that share, or replace, its tensors: the user's own module is never touched."""

from __future__ import annotations

import collections
import copy
import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TraceError
from .kernels import blank
from .known import CACHES
from .running import raise_if_short, tensors_in
from .sizes import with_entries
from .tree import walk


def same(t: Tensor) -> Tensor:
    """`t`."""
    return t


def clone(
    model: nn.Module, replace: Callable[[Tensor], Tensor] = same, modules: Sequence[tuple[str, nn.Module]] | None = None,
    to_run: bool = False,
) -> nn.Module:  # fmt: skip
    """A deep copy of `model` in which every parameter and buffer `t` is `replace(t)`; by default `t` itself.

    Tensors that a module holds as plain attributes are shared where parameters are, else copied.  Tied parameters stay
    tied.  Of a module that was compiled in place the copy is not.

    Args:
        model: any module.
        replace: makes the tensors of the copy.
        modules: `walk(model)`, where that is known already.
        to_run: whether the copy will be run and nothing else: where nothing hangs, the places for hooks that no forward calls
            are the model's then.
    Raises:
        TraceError: an attribute of the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for _, module in walk(model) if modules is None else modules:
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and id(t) not in memo:
                memo[id(t)] = replace(t)
    functions: list[tuple[dict[Any, Any], Any]] = []
    try:
        twin = _copy(model, memo, same if replace is same else own_copy, _NOT_RUN if to_run else frozenset(), functions)
        for state, key in functions:
            state[key] = _rebound(state[key], memo)
        return twin
    except Exception as error:
        raise_if_short(error)
        raise TraceError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}). dmscale works on a copy of "
            "the module tree; move what cannot be copied (locks, open files, generators) out of the module."
        ) from error


def _copy(
    module: nn.Module, memo: dict[int, Any], replace: Callable[[Tensor], Tensor], shared: frozenset[str],
    functions: list[tuple[dict[Any, Any], Any]],
) -> nn.Module:  # fmt: skip
    """`copy.deepcopy` of a module, several times faster: most of what a module holds needs no copying.

    `replace` makes the tensors that are neither parameters nor buffers; what stands under the names in `shared` stays, if it
    is empty.  Where a module holds a function that encloses something, or one as a hook, is added to `functions`.
    """
    if id(module) in memo:
        return memo[id(module)]
    cls: Any = type(module)
    if _copies_itself(cls):
        for t in [v for part in module.modules() for v in part.__dict__.values() if isinstance(v, Tensor)]:
            if id(t) not in memo:  # its own copy would fail where it was computed from what takes gradients
                memo[id(t)] = replace(t)
        return copy.deepcopy(module, memo)
    twin = cls.__new__(cls)
    memo[id(module)] = twin
    state = twin.__dict__
    state.update(module.__dict__)
    for key, value in module.__dict__.items():
        kind = type(value)
        if kind in _ATOMIC:
            if kind is types.FunctionType and value.__closure__ and key != "_compiled_call_impl":
                functions.append((state, key))
            continue
        if kind in _EMPTY and not value:
            if key in _OF_ANY_MODULE and key not in shared:
                state[key] = kind()
            elif key not in _OF_ANY_MODULE:  # a hook may fill it, which is given the copy then
                state[key] = memo.setdefault(id(value), kind())
        elif kind is tuple and _ATOMIC.issuperset(map(type, value)):
            continue
        elif key == "_modules":
            state[key] = {
                n: None if m is None else _copy(m, memo, replace, shared, functions) for n, m in value.items()
            }
        elif key in ("_parameters", "_buffers"):
            state[key] = {n: None if t is None else _twin(t, memo, replace) for n, t in value.items()}
        elif isinstance(value, nn.Module):
            state[key] = _copy(value, memo, replace, shared, functions)
        elif isinstance(value, Tensor):
            state[key] = _twin(value, memo, replace)
        elif key in CACHES:
            state[key] = kind()
        elif _is_its_own_attributes(value):
            state[key] = memo[id(value)] = with_entries(value, copy.deepcopy(dict(value), memo))  # type: ignore[arg-type]
        elif key != "_compiled_call_impl":
            held = [
                vars(v) for v in (value, *(value.values() if isinstance(value, dict) else ())) if hasattr(v, "__dict__")
            ]
            for t in tensors_in((value, held)):
                if t.grad_fn is not None:  # what a forward has left behind, of which Python makes no copies
                    memo.setdefault(id(t), replace(t))
            state[key] = copy.deepcopy(value, memo)
    state.pop("_compiled_call_impl", None)
    if module._forward_hooks or module._forward_pre_hooks:  # a handle that is kept somewhere refers to these as well
        for key in _BESIDE_HOOKS:
            state[key] = copy.deepcopy(module.__dict__[key], memo)
        for hooks in (state["_forward_hooks"], state["_forward_pre_hooks"]):
            functions += [(hooks, key) for key, hook in hooks.items() if type(hook) is types.FunctionType]
    for name in _slots(cls):
        if hasattr(module, name):
            setattr(twin, name, copy.deepcopy(getattr(module, name), memo))
    return twin


def _is_its_own_attributes(value: Any) -> bool:
    """Whether `value` is a dict of which each entry is an attribute: a plain deep copy would have none."""
    return isinstance(value, dict) and getattr(value, "__dict__", None) is value


def _twin(t: Tensor, memo: dict[int, Any], replace: Callable[[Tensor], Tensor]) -> Tensor:
    """What stands for `t` in the copy; `replace` makes it where `t` is no parameter or buffer of the model."""
    if id(t) not in memo:
        memo[id(t)] = replace(t)
    return memo[id(t)]


def _rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """`function` with the copies of what it encloses or has as a global name: `lambda t: t @ self.embed.weight.t()`.

    That is modules, tensors, and what modules hold: the dict in which a hook leaves the features that a forward takes from it.
    """
    closure, names = function.__closure__ or (), function.__globals__
    cells = tuple(_with_copy(cell, memo) for cell in closure)
    held = [n for n in function.__code__.co_names if n in names and memo.get(id(names[n]), names[n]) is not names[n]]
    if all(map(operator.is_, cells, closure)) and not held:  # cells are equal where what is in them is
        return function
    names = {**names, **{n: memo[id(names[n])] for n in held}} if held else names
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    return twin


def _with_copy(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        value = cell.cell_contents
    except ValueError:  # a name that its function has not given a value yet
        return cell
    return types.CellType(memo[id(value)]) if memo.get(id(value), value) is not value else cell


@functools.cache
def _slots(cls: Any) -> tuple[str, ...]:
    """The attributes of a class that are in no `__dict__`."""
    slots = [vars(c).get("__slots__", ()) for c in cls.__mro__]
    names = (name for s in slots for name in ((s,) if isinstance(s, str) else s))
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


@functools.cache
def _copies_itself(cls: Any) -> bool:
    """Whether a class has a way of its own of being copied; PyTorch's layers only bring old pickles up to date there."""
    own = [
        getattr(cls, name, None)
        for name in _COPY_PROTOCOL
        if getattr(cls, name, None) is not getattr(nn.Module, name, None)
    ]
    return any(not str(getattr(method, "__module__", "")).startswith("torch.nn.modules.") for method in own)


_COPY_PROTOCOL = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
_ATOMIC = {int, float, str, bool, type(None), bytes, torch.dtype, torch.device, type, types.FunctionType, staticmethod}
_EMPTY = {dict, list, set, collections.OrderedDict}
_OF_ANY_MODULE = frozenset(nn.Module().__dict__)
_BESIDE_HOOKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
"""Where a module says how its hooks are to be called."""
_NOT_RUN = frozenset({
    "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
})  # fmt: skip
"""Where a module has hooks that no forward calls."""


def on_meta(t: Tensor) -> Tensor:
    """`t` without its elements: same shape, strides and dtype, on the meta device; a parameter stays one.

    Integers keep their elements: they are few (ids, positions, indices), and forwards look at them.
    """
    dtype = t.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return t.detach().clone()
    bare = blank(t.shape, t.stride(), dtype)
    if type(t) is nn.Parameter:  # most are, and their constructor takes longer
        return torch.Tensor._make_subclass(nn.Parameter, bare, False)
    twin = bare.detach()
    return nn.Parameter(twin, requires_grad=False) if isinstance(t, nn.Parameter) else twin


def alias(t: Tensor) -> Tensor:
    """Another tensor object on the elements of parameter `t`; a buffer is copied, since a forward may write to it."""
    return nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t.detach().clone()


def own_copy(t: Tensor) -> Tensor:
    """`t` with elements of its own."""
    twin = t.detach().clone()
    return nn.Parameter(twin, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else twin
