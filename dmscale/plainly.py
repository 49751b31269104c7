"""Functions that a trace runs as the plain Python that they were written as.

A function that remembers its results (`functools.lru_cache`) takes a size for any int of its value: it would hand out what it
made of another size that happens to be equal, or of plain numbers if the model ran before its trace (einops does so).  In a
function that was compiled by `torch.jit.script` no size is seen at all.  `from math import sqrt` is out of reach for what
stands for `math.sqrt` during a trace.  And `int(size)` is a plain number whatever its class says, `float(size)` too: in the
files of modules that do no more with `int` and `float` than to call them, others stand for them.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
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


def _only_called(file: str) -> frozenset[str]:
    """Which of `int` and `float` the functions of a file use, and only call, or ask with whether something is one."""
    holder = sys.modules.get(file)
    if holder is None or sys.version_info < (3, 11):  # which does not tell a call from another use
        return frozenset()
    if not hasattr(holder, "__file__"):  # a notebook's, which may be written anew
        return _used(holder) - vars(holder).keys()
    return _used_by(file, len(vars(holder))) - vars(holder).keys()


@functools.lru_cache(maxsize=4096)
def _used_by(file: str, names: int) -> frozenset[str]:
    return _used(sys.modules[file])


def _used(holder: types.ModuleType) -> frozenset[str]:
    using = [(code, kind) for code in _codes(holder) for kind in KINDS if kind in code.co_names]
    beyond = {kind for code, kind in using if _is_taken(code, kind) and not _only_asks(code, kind)}
    return frozenset(kind for _, kind in using) - beyond


def _codes(holder: types.ModuleType) -> Iterator[types.CodeType]:
    """Those of the functions of a file that a trace may run, also inside of others and of what decorates them."""
    todo: list[Any] = list(vars(holder).values())
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, type):
            todo += vars(value).values() if value.__module__ == holder.__name__ else ()
        elif isinstance(value, types.FunctionType):
            if value.__globals__ is vars(holder):
                yield from _inside(value.__code__) if value.__name__ not in _EARLIER else ()
            todo += [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY_CELL]
        elif isinstance(value, property):
            todo += [value.fget, value.fset]
        elif isinstance(value, (staticmethod, classmethod)):
            todo.append(value.__func__)
        elif isinstance(value, functools.cached_property):
            todo.append(value.func)


def _inside(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of everything in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _inside(constant)


def _is_taken(code: types.CodeType, name: str) -> bool:
    """Whether a function does anything else with a global name than to call it; bytes are looked through quickly."""
    extended, instructions = 0, code.co_code
    for at in range(0, len(instructions), 2):
        operation, argument = instructions[at], extended | instructions[at + 1]
        extended = argument << 8 if operation == dis.EXTENDED_ARG else 0
        if operation == _LOAD_GLOBAL and not argument & 1 and code.co_names[argument >> 1] == name:
            return True
    return False


def _only_asks(code: types.CodeType, name: str) -> bool:
    """Whether a function does no more with a global name than to call it, or to ask whether something held is one."""
    steps = [i for i in dis.get_instructions(code) if i.opname not in ("PRECALL", "EXTENDED_ARG")]
    return all(
        _is_asked(steps, at) for at, step in enumerate(steps)
        if step.opname == "LOAD_GLOBAL" and step.argval == name and not _is_called(step)
    )  # fmt: skip


def _is_asked(steps: list[dis.Instruction], at: int) -> bool:
    """Whether the class that instruction `at` loads is in the second argument of `isinstance`."""
    end = at + 1
    while steps[end].opname in ("LOAD_GLOBAL", "LOAD_ATTR") and not _is_called(steps[end]):
        end += 1
    end += steps[end].opname == "BUILD_TUPLE"
    before = next((s for s in reversed(steps[:at]) if _is_called(s) or not s.opname.startswith("LOAD_")), None)
    return (
        before is not None and before.argval == "isinstance"
        and steps[end].opname.startswith("CALL") and steps[end].argval == 2
    )  # fmt: skip


def _is_called(step: dis.Instruction) -> bool:
    """Whether what is loaded is called next, with its arguments."""
    return step.opname == "LOAD_METHOD" or "NULL" in step.argrepr


_EMPTY_CELL = types.CellType()
_LOAD_GLOBAL = dis.opmap["LOAD_GLOBAL"]
