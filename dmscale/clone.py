"""Copies of a module tree that share, or replace, its tensors: the user's own module is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TraceError


def clone(model: nn.Module, replace: Callable[[Tensor], Tensor] = lambda t: t) -> nn.Module:
    """A deep copy of `model` in which every parameter and buffer `t` is `replace(t)`; by default `t` itself.

    Tensors that a module holds as plain attributes are shared.  Tied parameters stay tied.

    Raises:
        TraceError: an attribute of the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for t in (*module._parameters.values(), *module._buffers.values()):
            if t is not None and id(t) not in memo:
                memo[id(t)] = replace(t)
        for v in vars(module).values():
            if isinstance(v, Tensor) and id(v) not in memo:
                memo[id(v)] = v
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}). dmscale works on a copy of "
            "the module tree; move what cannot be copied (locks, open files, generators) out of the module."
        ) from error


def on_meta(t: Tensor) -> Tensor:
    """`t` without its elements: same shape, strides and dtype, on the meta device; a parameter stays one.

    Integers keep their elements: they are few (ids, positions, indices), and forwards look at them.
    """
    if not (t.is_floating_point() or t.is_complex()):
        return t.detach().clone()
    twin = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return nn.Parameter(twin, requires_grad=False) if isinstance(t, nn.Parameter) else twin


def alias(t: Tensor) -> Tensor:
    """Another tensor object on the elements of parameter `t`; a buffer is copied, since a forward may write to it."""
    return nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t.detach().clone()


def own_copy(t: Tensor) -> Tensor:
    """`t` with elements of its own."""
    twin = t.detach().clone()
    return nn.Parameter(twin, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else twin
