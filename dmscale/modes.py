"""Which modules do something else in training mode?  A trace runs in evaluation mode, and once more where one does.

What only training does is read from the source: a branch on `training` in a method, or in a function that it is handed to.  What
follows from a number alone (`self.p if self.training else 0`), and what PyTorch's own layers do, says nothing of axes.  Where all
that branches are helpers of forwards (biases that evaluation keeps in a table) or layers without weights (stochastic depth),
these alone are called in both modes.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from . import axes
from .syntax import syntax

if TYPE_CHECKING:
    from .axes import Dim
    from .tracer import Tracer, Value

_NOT_RUN = {"__init__", "train", "eval", "extra_repr"}


class Branch(NamedTuple):
    """A branch on `training`.

    test: what is asked; None where that is not known.
    me: what the method calls its module.
    of_itself: whether it is the module's own mode that the method asks for.
    """

    test: ast.expr | None = None
    me: str = ""
    of_itself: bool = False

    def is_open(self, module: nn.Module) -> bool:
        """Whether it goes another way in training mode, as `module` is: not where a rate of zero decides."""
        if self.test is None:
            return True
        ways = {_truth(self.test, module, self.me, mode) for mode in (False, True)}
        return None in ways or len(ways) > 1


def differs_in_training(modules: Iterable[nn.Module]) -> bool:
    """Whether a forward of one of `modules` takes another branch in training mode."""
    return bool(_branching(modules))


def _branching(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Branch]]:
    """The modules that take another branch in training mode, with the name of the method that does."""
    found = []
    for module in modules:
        cls: Any = type(module)
        found += [(module, name, branch) for name, branch in _branches(cls) if branch.is_open(module)]
    return found


@functools.cache
def _branches(cls: Any) -> tuple[tuple[str, Branch], ...]:
    """The branches on `training` in the methods of a class, each with the method's name."""
    if issubclass(cls, nn.modules.batchnorm._NormBase):
        return ()  # they learn statistics by other means, which the rule of a batch norm knows
    methods = [m for c in cls.__mro__ if not _is_pytorch(c) for m in vars(c).items() if m[0] not in _NOT_RUN]
    return tuple(dict.fromkeys((name, branch) for name, method in methods for branch in _in_method(cls, method)))


class BothModes:
    """While it is open, helpers that branch on `training` run in both modes whenever a forward calls one.

    If each gives the same, all else goes the same way in training mode: what was not called is not called then either.

    touched: dimensions of what they computed in training mode.
    """

    def __init__(self, tracer: Tracer, modules: Iterable[nn.Module]):
        self.touched: set[Dim] = set()
        self._tracer = tracer
        branching = _branching(modules)
        helpers = tracer.meta and all(_is_helper(*found) for found in branching)  # values would be others then
        self._helpers = list(dict.fromkeys((module, name) for module, name, _ in branching)) if helpers else []
        self.differs = bool(branching) and not helpers
        """Whether a run in training mode may tell more: a forward branches, or a helper does what shows elsewhere."""

    def __enter__(self) -> BothModes:
        for module, name in self._helpers:
            module.__dict__[name] = self._twice(module, name)
        return self

    def __exit__(self, *exc: Any) -> None:
        for module, name in self._helpers:
            module.__dict__.pop(name, None)

    def _twice(self, module: Any, name: str) -> Any:
        method, tracer = getattr(module, name), self._tracer

        def call(*args: Any, **kwargs: Any) -> Any:
            out = method(*args, **kwargs)
            if self.differs or module.training:  # called by another helper then
                return out
            places = (module.__dict__, module._parameters, module._buffers)
            before = [dict(place) for place in places]
            counting, tracer.counting = tracer.counting, tracer.counting.copy()  # those of evaluation go on
            with tracer.record.apart() as beside:
                module.training = True
                try:
                    other = method(*args, **kwargs)
                except Exception:
                    other = None
            module.training, tracer.counting = False, counting
            self.touched |= beside.touched
            self.differs = _changed(places, before) or beside.tells or not _same(tracer, out, other)
            return out

        return call


def _is_helper(module: nn.Module, name: str, branch: Branch) -> bool:
    """Whether a method is one that a forward may call, of which nothing is known but what it gives, or a forward like that."""
    plain = isinstance(inspect.getattr_static(type(module), name), types.FunctionType)
    inner = name != "forward" or not (module._modules or module._parameters)
    return branch.of_itself and plain and inner and name not in module.__dict__


def _same(tracer: Tracer, out: Any, other: Any) -> bool:
    """Whether two results are a tensor, or tuples of tensors, of one shape and type, of the same axes and the same making."""
    if type(out) is tuple and type(other) is tuple and out:
        return len(out) == len(other) and all(_same(tracer, a, b) for a, b in zip(out, other))
    if not (isinstance(out, Tensor) and isinstance(other, Tensor)) or out.shape != other.shape:
        return False
    a, b = tracer.value(out), tracer.value(other)
    fixed = [not (axes.is_free(p) or axes.is_free(q)) for p, q in zip(a.dims, b.dims)]
    return _making(a) == _making(b) and all(f or axes.same(p, q) for f, p, q in zip(fixed, a.dims, b.dims))


def _making(value: Value) -> tuple[Any, ...]:
    return value.dtype, value.params, value.data, value.zeroed, value.square, value.repeated, value.product, value.said


def _changed(places: Iterable[dict[str, Any]], before: Iterable[dict[str, Any]]) -> bool:
    """Whether a module holds something else than before; what it held is put back."""
    changed = False
    for place, old in zip(places, before):
        if len(place) != len(old) or any(place.get(key) is not value for key, value in old.items()):
            place.clear()
            place.update(old)
            changed = True
    return changed


def _is_pytorch(cls: type) -> bool:
    return cls is object or cls.__module__.startswith("torch.nn.modules.")


def _in_method(cls: Any, method: Any) -> Iterator[Branch]:
    function = inspect.unwrap(method) if callable(method) else getattr(method, "fget", None)
    if not isinstance(function, types.FunctionType) or not _names_training(function.__code__):
        return
    tree = syntax(function)
    if tree is None:
        yield Branch()  # without its source all that is known is that it asks
        return
    me = "".join(function.__code__.co_varnames[:1])
    asked = [node.value for node in ast.walk(tree) if _is_training(node)]  # type: ignore[attr-defined]
    of_itself = all(isinstance(module, ast.Name) and module.id == me for module in asked)
    for test in _tests(tree, function, cls, me):
        yield Branch(test, me, of_itself)


def _tests(tree: ast.AST, function: types.FunctionType, cls: Any, me: str, depth: int = 3) -> Iterator[ast.expr]:
    """The conditions of branches on `training` in `tree`, the source of `function`, and in what it hands `training` to."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.While)) or (
            isinstance(node, ast.IfExp) and not (_is_number(node.body) and _is_number(node.orelse))
        ):
            if _asks(node.test):
                yield node.test
        elif isinstance(node, ast.Call) and depth:
            handed = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(map(_asks, handed)) and (called := _called(node.func, function, cls, me)) is not None:
                inside = _as_called(called, node)
                if inside is not None:
                    yield from _tests(inside, called, cls, me, depth - 1)


def _asks(node: ast.AST) -> bool:
    return any(map(_is_training, ast.walk(node)))


def _called(expression: ast.expr, function: types.FunctionType, cls: Any, me: str) -> types.FunctionType | None:
    """The function that a name stands for in `function`; None for PyTorch's own, and for what is not known by its name."""
    if isinstance(expression, ast.Name):
        found = function.__globals__.get(expression.id)
    elif isinstance(expression, ast.Attribute):
        holder: Any = expression.value
        if isinstance(holder, ast.Name) and holder.id == me:
            found = getattr(cls, expression.attr, None)
        else:
            names = ast.unparse(expression).split(".")
            found = functools.reduce(lambda o, n: getattr(o, n, None), names[1:], function.__globals__.get(names[0]))
    else:
        return None
    found = inspect.unwrap(found) if callable(found) else None
    ours = isinstance(found, types.FunctionType) and not found.__module__.startswith("torch.")
    return found if ours else None


def _as_called(function: types.FunctionType, call: ast.Call) -> ast.AST | None:
    """The source of a function with the arguments of a call in the place of their names."""
    tree = syntax(function)
    method = (
        isinstance(call.func, ast.Attribute)
        and function.__qualname__.count(".")
        and "<locals>" not in function.__qualname__
    )
    given = [call.func.value, *call.args] if method else call.args  # type: ignore[attr-defined]
    try:
        bound = inspect.signature(function).bind_partial(*given, **{k.arg: k.value for k in call.keywords if k.arg})
    except (TypeError, ValueError):
        return None
    defaults = {
        name: ast.Constant(p.default) for name, p in inspect.signature(function).parameters.items()
        if isinstance(p.default, (bool, int, float, str, type(None)))
    }  # fmt: skip
    arguments = {**defaults, **{k: v for k, v in bound.arguments.items() if isinstance(v, ast.expr)}}
    return None if tree is None else _Put(arguments).visit(tree)


class _Put(ast.NodeTransformer):
    def __init__(self, arguments: dict[str, ast.expr]):
        self.arguments = arguments

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """An argument for its name, where that is read."""
        return self.arguments.get(node.id, node) if isinstance(node.ctx, ast.Load) else node


def _names_training(code: types.CodeType) -> bool:
    """Whether a function asks for a mode, other than to hand it on, as in `self.head.train(self.training)`."""
    if "training" in code.co_names and not ("train" in code.co_names and _only_hands_on(code)):
        return True
    return any(isinstance(c, types.CodeType) and _names_training(c) for c in code.co_consts)


def _only_hands_on(code: types.CodeType) -> bool:
    """Whether every mode that is asked for is the argument of a call of `train`: the bytecode tells without the source."""
    steps = [(i.opname, i.argval) for i in dis.get_instructions(code) if i.opname not in ("PRECALL", "EXTENDED_ARG")]
    for at, step in enumerate(steps):
        if step == ("LOAD_ATTR", "training"):
            holder = at - 1
            while steps[holder][0] == "LOAD_ATTR":
                holder -= 1
            call, given = steps[at + 1]
            if steps[holder - 1][1] != "train" or not call.startswith("CALL") or given != 1:
                return False
    return True


def _is_training(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "training"


def _is_number(node: ast.AST) -> bool:
    """Whether an expression is `0` or `self.p`."""
    return isinstance(node, (ast.Constant, ast.Name, ast.Attribute))


def _truth(test: ast.expr, module: nn.Module, me: str, mode: bool) -> bool | None:
    """Whether a condition on `training`, and on what a module holds, is met; None where that is not known."""
    if isinstance(test, ast.BoolOp):
        parts = [_truth(part, module, me, mode) for part in test.values]
        decisive = isinstance(test.op, ast.Or)  # one true part decides an `or`, a false one an `and`
        return decisive if decisive in parts else None if None in parts else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        truth = _truth(test.operand, module, me, mode)
        return None if truth is None else not truth
    if _is_training(test):
        return mode
    if not _is_held(test, me):
        return None
    try:
        return bool(eval(compile(ast.Expression(test), "<a condition>", "eval"), {me: module}))
    except Exception:
        return None


def _is_held(node: ast.AST, me: str) -> bool:
    """Whether an expression is a comparison of what a module holds by name and of constants, or one of these."""
    if isinstance(node, ast.Compare):
        return all(_is_held(n, me) for n in (node.left, *node.comparators))
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == me and not _is_training(node)
    return isinstance(node, ast.Constant)
