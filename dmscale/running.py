"""Calling a model on example inputs, whatever form these and the outputs have."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .errors import TraceError

Inputs = Tensor | tuple | list | Mapping[str, Any]


def arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) of a call from a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        TraceError: there is no tensor in them.
    """
    args: tuple
    kwargs: dict[str, Any]
    if isinstance(example_inputs, Tensor):
        args, kwargs = (example_inputs,), {}
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args, kwargs = tuple(example_inputs), {}
    else:
        raise TraceError(
            f"example_inputs is a {type(example_inputs).__name__}; give a tensor, a tuple of positional arguments or a "
            "dict of keyword arguments, as the model's forward takes them"
        )
    if not tensors_in((args, kwargs)):
        raise TraceError("example_inputs hold no tensor; give the tensors that the model's forward takes")
    return args, kwargs


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`tree` with every tensor replaced."""
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested containers, mappings and dataclasses, in order; opaque objects (caches) are passed over."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [t for v in tree.values() for t in tensors_in(v)]
    if isinstance(tree, (tuple, list)):
        return [t for v in tree for t in tensors_in(v)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [t for f in dataclasses.fields(tree) for t in tensors_in(getattr(tree, f.name, None))]
    return []


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Run what `torch.compile` made as plain Python; nothing can be compiled where its module was never imported."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run `model` without gradients."""
    with torch.no_grad():
        return model(*args, **kwargs)


class StandIn:
    """Stands in a module's `__dict__` for its forward; `inner` is the forward that it stands for."""

    def __init__(self, module: nn.Module):
        self.module = [module]  # in a list: not a child of itself
        self.own = module.__dict__.get("forward")  # of a module whose forward was replaced before

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module[0]).forward(self.module[0], *args, **kwargs)


def is_empty(model: nn.Module) -> bool:
    """Whether the model is on the meta device, so that nothing has a value."""
    return any(p.is_meta for p in model.parameters())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, which tells nothing of a model; on the CPU PyTorch has no class for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def raise_if_short(error: Exception) -> None:
    """Raise `error` again if memory was short."""
    if is_out_of_memory(error):
        raise error


def outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The floating-point outputs of `model` on `example_inputs`, without gradients."""
    args, kwargs = arguments(example_inputs)
    return [t for t in tensors_in(call(model, args, kwargs)) if t.is_floating_point()]


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over all outputs, as a share of the largest expected magnitude; inf where shapes differ.

    What is infinite in both, alike, is no difference: a logit that is masked.
    """
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float("inf")
    finite = [t[torch.isfinite(t)] for t in expected]
    scale = max((float(t.abs().max()) for t in finite if t.numel()), default=0.0) + 1e-12
    worst = 0.0
    for a, b in zip(got, expected):
        if a.numel():
            a, b = a.float(), b.float()
            difference = float((a - b).masked_fill(a == b, 0).abs().max())
            worst = max(worst, difference) if difference == difference else float("inf")
    return worst / scale
