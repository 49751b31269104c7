"""Functions that a trace runs as the plain Python that they were written as.

A function that remembers its results (`functools.lru_cache`) takes a size for any int of its value: it would hand out what it
made of another size that happens to be equal, or of plain numbers if the model ran before its trace (einops does so).  In a
function that was compiled by `torch.jit.script` no size is seen at all.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .sizes import SizedFloat, SizedInt

_REMEMBERS, _SCRIPTED = functools._lru_cache_wrapper, torch.jit.ScriptFunction
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "scipy", "sympy", __package__}
"""Packages that no size reaches, or that take it for a plain number."""
_ANY_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


@contextlib.contextmanager
def plainly(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, functions of all files and of the classes of `modules` run as they were written."""
    classes = {cls for kind in set(map(type, modules)) for cls in kind.__mro__ if not _is_foreign(cls.__module__)}
    places = [*_files.functions({cls.__module__ for cls in classes}), *_methods(classes)]
    try:
        for holder, name, value in places:
            static = isinstance(value, staticmethod)
            setattr(holder, name, staticmethod(_plain(value.__func__)) if static else _plain(value))
        yield
    finally:
        for holder, name, value in places:
            setattr(holder, name, value)


class _Files:
    """Where such functions stand in files, each of which is searched once."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}  # by the file's name in `sys.modules`
        self._searched = 0

    def functions(self, anew: set[str]) -> list[tuple[Any, str, Any]]:
        """Holder, name and value of each; the files named in `anew`, and a notebook's, may have got more since."""
        for file in (*anew, "__main__", *(sys.modules if len(sys.modules) != self._searched else ())):
            if file in anew or file == "__main__" or (file not in self._names and not _is_foreign(file)):
                held = getattr(sys.modules.get(file), "__dict__", {})
                self._names[file] = [name for name, value in list(held.items()) if _is_other(value)]
        self._searched = len(sys.modules)
        found = [(sys.modules.get(file), name) for file, names in self._names.items() for name in names]
        held_now = [(module, name, getattr(module, name, None)) for module, name in found]
        return [place for place in held_now if _is_other(place[2])]


_files = _Files()


def _methods(classes: Iterable[type]) -> Iterator[tuple[Any, str, Any]]:
    for cls in classes:
        for name, value in list(vars(cls).items()):
            if _is_other(value.__func__ if isinstance(value, staticmethod) else value):
                yield cls, name, value


def _is_foreign(file: str) -> bool:
    return file.partition(".")[0] in _FOREIGN


def _is_other(value: Any) -> bool:
    kind = type(value)
    if kind is _REMEMBERS:
        code = getattr(value.__wrapped__, "__code__", None)
        return code is None or bool(code.co_argcount or code.co_kwonlyargcount or code.co_flags & _ANY_ARGUMENTS)
    return kind is _SCRIPTED and hasattr(value, "_torchdynamo_inline")


@functools.cache
def _plain(function: Any) -> Callable[..., Any]:
    """`function` without memory where it is given sizes; without compilation."""
    compiled = type(function) is _SCRIPTED
    written = function._torchdynamo_inline if compiled else function.__wrapped__

    @functools.wraps(written)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (written if compiled or _any_size((args, tuple(kwargs.values()))) else function)(*args, **kwargs)

    if not compiled:
        call.cache_clear, call.cache_info = function.cache_clear, function.cache_info  # type: ignore[attr-defined]
    return call


def _any_size(values: tuple[Any, ...]) -> bool:
    return any(isinstance(v, (SizedInt, SizedFloat)) or (isinstance(v, tuple) and _any_size(v)) for v in values)
