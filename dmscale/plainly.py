"""Functions that a trace runs as the plain Python that they were written as.

A function that remembers its results (`functools.lru_cache`) takes a size for any int of its value: it would hand out what it
made of another size that happens to be equal, or of plain numbers if the model ran before its trace (einops does so).  In a
function that was compiled by `torch.jit.script` no size is seen at all.  And `from math import sqrt` is out of reach for what
stands for `math.sqrt` during a trace.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .sizes import SizedFloat, SizedInt, square_root

_REMEMBERS, _SCRIPTED = functools._lru_cache_wrapper, torch.jit.ScriptFunction
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "scipy", "sympy", __package__}
"""Packages that no size reaches, or that take it for a plain number."""
_ROOT = math.sqrt
_ANY_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


@contextlib.contextmanager
def plainly(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, functions of all files and of the classes of `modules` run as they were written."""
    classes = {cls for kind in set(map(type, modules)) for cls in kind.__mro__ if not _is_foreign(cls.__module__)}
    places = [*_files.places({cls.__module__ for cls in classes}), *(p for cls in classes for p in _places(cls))]
    try:
        for place in places:
            setattr(place.holder, place.name, place.plain)
        yield
    finally:
        for place in places:
            setattr(place.holder, place.name, place.value)


class _Place(NamedTuple):
    """Where such a function is held, and what stands for it during a trace."""

    holder: Any
    name: str
    value: Any
    plain: Any


class _Files:
    """Where such functions stand in files, each of which is searched once."""

    def __init__(self) -> None:
        self._places: dict[str, list[_Place]] = {}  # by the file's name in `sys.modules`
        self._searched = 0

    def places(self, anew: set[str]) -> list[_Place]:
        """Those of today; the files named in `anew`, and a notebook's, may have got more since."""
        for file in (*anew, "__main__", *(sys.modules if len(sys.modules) != self._searched else ())):
            if file in anew or file == "__main__" or (file not in self._places and not _is_foreign(file)):
                self._places[file] = _places(sys.modules.get(file))
        self._searched = len(sys.modules)
        return [p for places in self._places.values() for p in places if p.holder.__dict__.get(p.name) is p.value]


_files = _Files()


def _places(holder: Any) -> list[_Place]:
    """Those in a file or a class."""
    found = []
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        static = isinstance(value, staticmethod)
        function = value.__func__ if isinstance(value, staticmethod) else value
        if _is_other(function):
            plain = square_root if function is _ROOT else _plain(function)
            static = static or (function is _ROOT and isinstance(holder, type))
            found.append(_Place(holder, name, value, staticmethod(plain) if static else plain))
    return found


def _is_foreign(file: str) -> bool:
    return file.partition(".")[0] in _FOREIGN


def _is_other(value: Any) -> bool:
    kind = type(value)
    if kind is _REMEMBERS:
        code = getattr(value.__wrapped__, "__code__", None)
        return code is None or bool(code.co_argcount or code.co_kwonlyargcount or code.co_flags & _ANY_ARGUMENTS)
    return value is _ROOT or (kind is _SCRIPTED and hasattr(value, "_torchdynamo_inline"))


@functools.cache  # held in several files, it is one in all of them
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
