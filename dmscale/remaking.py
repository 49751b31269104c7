"""What a gate made of a tensor is not kept for the backward: it is made again from what is kept anyway.

The operator behind a gate keeps the tensor that it takes: a masked copy of a weight, beside the weight that the gate
needs for its own backward.  Once the module around that operator has run, such copies are let go, by hooks on what autograd
has saved (`torch.autograd.graph`), and made anew, one at a time, when the backward comes by.  What is made anew is the same
to the bit.

Nothing is let go where somebody else has a hand on what is saved (activation checkpointing, a hook that moves it to the
host), and nothing small, which would cost more time than it saves.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import calls, running

SMALL = 2**16
"""Bytes below which a tensor is kept."""


class Remade(torch.autograd.Function):
    """A function of autograd whose result `again` makes from what the function has saved.

    `ctx.remakes` says whether it can: not where the result is an input as it is, nor where the function saves its result.
    """

    @staticmethod
    def again(ctx: Any) -> Tensor:
        """The result once more, the same elements in the same layout."""
        raise NotImplementedError


class _Scopes(threading.local):
    """For each module of a gated model that is running, innermost last: what gates made for it; None once others ran.

    Beside each tensor its version: one that has been changed in place since cannot be made again.
    """

    def __init__(self) -> None:
        self.open: list[list[tuple[Tensor, int]] | None] = []


_SCOPES = _Scopes()


def note(made: Tensor) -> Tensor:
    """`made`, the result of a `Remade`, which the module that runs may let go of in the end."""
    if _SCOPES.open and _SCOPES.open[-1] is not None:
        _SCOPES.open[-1].append((made, made._version))
    return made


class SparingForward(running.StandIn):
    """Stands for the forward of a module whose weights or input are gated, and lets go of what its operators keep of them.

    Weights that are used in a module around others are left as they are: there the whole graph would have to be searched.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module."""
        if calls.is_transformed() or not torch.is_grad_enabled() or _taken():
            return self.inner(*args, **kwargs)
        scopes = _SCOPES.open
        if scopes:
            scopes[-1] = None
        scopes.append([(t, t._version) for t in running.tensors_in((args, kwargs))[:1]])
        try:
            out = self.inner(*args, **kwargs)
        finally:
            made = scopes.pop()
        if made is not None:
            with calls.unseen():
                let_go(running.tensors_in(out), made)
        return out


def _taken() -> bool:
    """Whether what autograd saves goes through somebody's hooks, or PyTorch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def let_go(outputs: Iterable[Tensor], made: Sequence[tuple[Tensor, int]]) -> None:
    """Free what operators between `made` and `outputs` keep of those of `made` that a `Remade` can make again.

    Args:
        outputs: of a module.
        made: tensors that were made for it, and the version of each at that time.
    """
    found: dict[int, tuple[Any, torch.dtype]] = {}
    for t, version in made:
        node: Any = t.grad_fn
        can = issubclass(getattr(type(node), "_forward_cls", type(None)), Remade) and node.remakes
        real = type(t) is Tensor and t.device.type != "meta"
        if can and real and t.numel() * t.element_size() >= SMALL and t._version == version:
            found[t.untyped_storage().data_ptr()] = node, t.dtype
    if not found:
        return
    first = min(node._sequence_nr() for node, _ in found.values())
    todo = [t.grad_fn for t in outputs]
    seen = set()
    while todo:
        user: Any = todo.pop()
        if user is None or user in seen or user._sequence_nr() <= first:  # before the first that was made
            continue
        seen.add(user)
        todo += [node for node, _ in user.next_functions]
        kind: Any = type(user)
        for values, holders in _saved_names(kind):
            _exchange(user, values, holders, found)


def _exchange(user: Any, values: str, holders: str, found: dict[int, tuple[Any, torch.dtype]]) -> None:
    """Let the node `user` hold recipes instead of those of its saved tensors that are `found`."""
    held = getattr(user, holders)
    held = held if isinstance(held, (tuple, list)) else [held]
    if any(getattr(h, "unpack_hook", None) is not None for h in held):  # somebody else's, and to ask would call it
        return
    try:
        saved = getattr(user, values)
    except RuntimeError:  # changed since in place: the backward will say so
        return
    for holder, t in zip(held, saved if isinstance(saved, (tuple, list)) else [saved]):
        if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not (t.is_conj() or t.is_neg()):
            node, dtype = found.get(t.untyped_storage().data_ptr(), (None, None))
            if node is not None and dtype == t.dtype:
                holder.register_hooks(functools.partial(_recipe, node), _follow)


@functools.cache
def _saved_names(kind: type) -> tuple[tuple[str, str], ...]:
    """Where the nodes of a class hold what they have saved: names of the tensors, and of what takes hooks for them."""
    if hasattr(kind, "_forward_cls"):  # written in Python
        return (("saved_tensors", "_raw_saved_tensors"),)
    return tuple((n.removeprefix("_raw"), n) for n in dir(kind) if n.startswith("_raw_saved_"))


def _recipe(node: Any, t: Tensor) -> tuple[Any, ...]:
    return node, t.shape, t.stride(), t.storage_offset()


def _follow(recipe: tuple[Any, ...]) -> Tensor:
    node, *view = recipe
    with torch.no_grad():
        return type(node)._forward_cls.again(node).as_strided(*view)
