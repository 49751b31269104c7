"""Which modules do something else in training mode?  A trace runs in evaluation mode, and once more where one does.

What only training does is read from the source: a branch of a method on `training`.  What follows from a number alone
(`self.p if self.training else 0`), and what PyTorch's own layers do, says nothing of axes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_NOT_RUN = {"__init__", "train", "eval", "extra_repr"}
Also = tuple[str, ...]
"""Attributes of a module that must be true besides `training`."""


def differs_in_training(modules: Iterable[nn.Module]) -> bool:
    """Whether a forward of one of `modules` takes another branch in training mode."""
    for module in modules:
        cls: Any = type(module)
        for also in _branches(cls):
            if all(getattr(module, name, True) for name in also):
                return True
    return False


@functools.cache
def _branches(cls: Any) -> tuple[Also, ...]:
    """For each branch on `training` in the methods of a class: what else must be true."""
    if issubclass(cls, nn.modules.batchnorm._NormBase):
        return ()  # they learn statistics by other means, which the rule of a batch norm knows
    methods = [m for c in cls.__mro__ if not _is_pytorch(c) for n, m in vars(c).items() if n not in _NOT_RUN]
    return tuple(dict.fromkeys(also for method in methods for also in _in_method(method)))


def _is_pytorch(cls: type) -> bool:
    return cls is object or cls.__module__.startswith("torch.nn.modules.")


def _in_method(method: Any) -> Iterator[Also]:
    function = inspect.unwrap(method) if callable(method) else getattr(method, "fget", None)
    if not isinstance(function, types.FunctionType) or not _names_training(function.__code__):
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        yield ()  # without its source all that is known is that it asks
        return
    for node in ast.walk(tree):
        decides = isinstance(node, (ast.If, ast.While)) or (
            isinstance(node, ast.IfExp) and not (_is_number(node.body) and _is_number(node.orelse))
        )
        if decides and any(_is_training(n) for n in ast.walk(node.test)):  # type: ignore[attr-defined]
            yield _also(node.test)  # type: ignore[attr-defined]


def _names_training(code: types.CodeType) -> bool:
    return "training" in code.co_names or any(
        isinstance(c, types.CodeType) and _names_training(c) for c in code.co_consts
    )


def _is_training(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "training"


def _is_number(node: ast.AST) -> bool:
    """Whether an expression is `0` or `self.p`."""
    return isinstance(node, (ast.Constant, ast.Name, ast.Attribute))


def _also(test: ast.AST) -> Also:
    """The attributes of the module that `test` joins to `training` by `and`."""
    if not isinstance(test, ast.BoolOp) or not isinstance(test.op, ast.And):
        return ()
    return tuple(
        v.attr for v in test.values
        if isinstance(v, ast.Attribute) and isinstance(v.value, ast.Name) and not _is_training(v)
    )  # fmt: skip
