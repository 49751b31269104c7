"""Functions that a trace runs as the plain Python that they were written as.

A function that remembers its results (`functools.lru_cache`) takes a size for any int of its value: it would hand out what it
made of another size that happens to be equal, or of plain numbers if the model ran before its trace (einops does so).  In a
function that was compiled by `torch.jit.script` no size is seen at all.  `from math import sqrt` is out of reach for what
stands for `math.sqrt` during a trace.  And `int(size)` is a plain number whatever its class says, `float(size)` too: in the
files of modules that do no more with `int` and `float` than to call them, others stand for them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
import math
import sys
import types
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
    files = {cls.__module__ for cls in classes}
    places = [*_files.places(files), *(p for cls in classes for p in _places(cls))]
    kinds = [(sys.modules[file], kind) for file in files for kind in _only_called(file)]
    try:
        for place in places:
            setattr(place.holder, place.name, place.plain)
        for holder, kind in kinds:
            setattr(holder, kind, KINDS[kind])
        yield
    finally:
        for holder, kind in kinds:
            delattr(holder, kind)
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


# -- int and float ----------------------------------------------------------------------------------------------------


class _Kind(type):
    """Stands for `int` or `float`, and gives a size back as the size that it is."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        original: Any = cls.__base__
        if len(args) == 1 and isinstance(args[0], (SizedInt, SizedFloat)):
            return _as_float(args[0]) if original is float else _as_int(args[0])
        return original(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__base__)  # type: ignore[arg-type]


def _as_int(value: SizedInt | SizedFloat) -> int:
    return value if isinstance(value, SizedInt) else int(value)


def _as_float(value: SizedInt | SizedFloat) -> float:
    return value**1.0 if isinstance(value, SizedInt) else value


KINDS: dict[str, Any] = {kind.__name__: _Kind(kind.__name__, (kind,), {}) for kind in (int, float)}
_EARLIER = ("__init__", "__new__", "reset_parameters")  # no trace runs these


def _only_called(file: str) -> tuple[str, ...]:
    """Which of `int` and `float` the functions of a file use, and only call, or ask with whether something is one."""
    holder = sys.modules.get(file)
    own = vars(holder) if holder is not None else {}
    found = [v for v in own.values() if getattr(v, "__module__", None) == file]
    functions = [f for v in found for f in (vars(v).values() if isinstance(v, type) else [v])]
    codes = [f.__code__ for f in functions if isinstance(f, types.FunctionType) and f.__name__ not in _EARLIER]
    used = tuple(kind for kind in KINDS if kind not in own and any(_names(code, kind) for code in codes))
    source = getattr(holder, "__file__", None)
    if not used or source is None:
        return ()
    beyond = _used_beyond_calls(source, len(linecache.getlines(source)))
    return tuple(kind for kind in used if kind not in beyond)


def _names(code: types.CodeType, name: str) -> bool:
    return name in code.co_names or any(_names(c, name) for c in code.co_consts if isinstance(c, types.CodeType))


@functools.cache
def _used_beyond_calls(source: str, lines: int) -> frozenset[str]:
    """Those that the functions of a file do anything else with: `x.to(int)`, `type(x) is int`."""
    try:
        tree = ast.parse("".join(linecache.getlines(source)))
    except SyntaxError:
        return frozenset(KINDS)
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            harmless.add(node.func)
            if node.func.id == "isinstance":
                harmless.update(n for argument in node.args[1:] for n in ast.walk(argument))
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            harmless.update(ast.walk(part) if part is not None else ())
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    bodies = [b for f in functions for b in (f.body if isinstance(f.body, list) else [f.body])]
    named = {n for body in bodies for n in ast.walk(body) if isinstance(n, ast.Name)}
    return frozenset(n.id for n in named - harmless if n.id in KINDS)
