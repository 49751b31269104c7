"""Branches: what a residual block adds to its stream, removable one by one.

In x + f(norm(x)) the module that is f is a branch: without it zero is added.  An exported model must run without dmscale,
so a branch that goes is replaced by a `torch.fx.GraphModule` with its signature that gives its input times zero, in the
place and the form of its output (alone, in a tuple ...).  It has no parameters and no MACs, and gradients still pass.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import axes
from .blocks import Blocks, renumber
from .tracer import Call, Record, Step

# Of zeros these make zeros.
_KEEP_ZERO = {"mul", "mul_", "div", "div_", "neg", "roll", "slice", "constant_pad_nd", "native_dropout", "index_select"}


def find(model: nn.Module, record: Record, stacks: Sequence[Blocks], refused: Iterable[str] = ()) -> list[Blocks]:
    """`stacks` with every stack that does all its work in branches replaced by one stack for each kind of branch.

    Args:
        refused: names of stacks that must not be offered; a block whose branch is refused stays whole.
    """
    flow = _Flow(record)
    times = Counter(call.path for call in record.calls)
    once = [c for c in record.calls if times[c.path] == 1]
    out: list[Blocks] = []
    for stack in stacks:
        inside = [c for c in once for p in stack.paths if c.path.startswith(p + ".")]
        found = [c for c in inside if flow.is_branch(c) and _can_be_zero(model, flow, c)]
        found = [c for c in found if not any(c.path.startswith(o.path + ".") for o in found)]
        groups = _groups(stack, found)
        work = [t for t in record.terms for start, end in stack.ranges if start < t.op <= end]
        covered = all(any(c.start < t.op <= c.end for c in found) for t in work)
        replaces = covered and not any(g.name in refused for g in groups)
        out += groups if replaces else [stack]
    return sorted(out, key=lambda b: b.ranges[0])


def _groups(stack: Blocks, calls: Sequence[Call]) -> list[Blocks]:
    """One stack for each place that a branch has in a block."""
    places: dict[str, list[Call]] = {}
    for path in stack.paths:
        for call in calls:
            if call.path.startswith(path + "."):
                places.setdefault(call.path[len(path) + 1 :], []).append(call)
    base = stack.name.removesuffix("depth").strip()
    return [
        Blocks(
            f"{base} {place} depth".strip(), stack.container, tuple(c.path for c in found),
            tuple((c.start, c.end) for c in found), 1, tuple((c.argument, c.form) for c in found),
        )
        for place, found in places.items()
    ]  # fmt: skip


class _Flow:
    """Which operator made and which ones read each tensor of a trace."""

    def __init__(self, record: Record):
        self.results = record.results
        self.contractions = {t.op for t in record.terms}
        self.maker: dict[int, tuple[int, Step]] = {}
        self.readers: dict[int, list[Step]] = {}
        for op, step in record.steps.items():
            for origin in set(step.gives) - set(step.takes):
                self.maker[origin] = op, step
            for origin in set(step.takes) - set(step.gives):
                self.readers.setdefault(origin, []).append(step)

    def is_branch(self, call: Call) -> bool:
        """Whether the result of `call` is added to the very stream that it was made from, and goes nowhere else."""
        source, result = call.source, call.result
        if source is None or result is None or source.dtype != result.dtype:
            return False
        if len(source.dims) != len(result.dims) or not all(map(axes.same, source.dims, result.dims)):
            return False
        works = any(call.start < op <= call.end for op in self.contractions)
        total = self._added(result.origin) if works else None
        return total is not None and self._comes_from(source.origin, self._summands(total, result.origin))

    def is_unused(self, origin: int) -> bool:
        """Whether nothing reads a tensor."""
        return origin not in self.readers and origin not in self.results

    def _added(self, origin: int) -> int | None:
        """The sum that a tensor ends in, if it goes there alone and would be zero there if it were zero."""
        while origin not in self.results and len(self.readers.get(origin, ())) == 1:
            (step,) = self.readers[origin]
            if step.operator in ("add", "add_") and len(set(step.takes)) == 2:
                return step.gives[0]
            if step.operator not in _KEEP_ZERO or (step.operator.startswith("div") and step.takes[0] != origin):
                return None
            origin = step.gives[0]
        return None

    def _summands(self, total: int, branch: int) -> set[int]:
        """All that is added up, before and behind: the residual stream at every point."""
        top: int | None = total
        found: set[int] = set()
        while top is not None:
            found.add(top)
            top = self._added(top)
        todo = list(found)
        while todo:
            op_step = self.maker.get(todo.pop())
            if op_step is not None and op_step[1].operator in ("add", "add_"):
                new = set(op_step[1].takes) - found
                found |= new
                todo += new
        return found - {branch}

    def _comes_from(self, origin: int, stream: set[int]) -> bool:
        """Whether a tensor is made from one of `stream` without a contraction on the way."""
        todo, seen = [origin], set()
        while todo:
            origin = todo.pop()
            if origin in stream:
                return True
            if origin in seen or origin not in self.maker:
                continue
            seen.add(origin)
            op, step = self.maker[origin]
            if op not in self.contractions:
                todo += step.takes
        return False


def _can_be_zero(model: nn.Module, flow: _Flow, call: Call) -> bool:
    """Whether a plain module can stand for `call`: its first tensor is a named argument, its outputs are few and simple."""
    module = model.get_submodule(call.path)
    named = all(_name_of(module, key) is not None for key in (call.argument, *_handed_on(call.form)))
    return named and call.form is not None and all(flow.is_unused(origin) for origin in call.others)


def _name_of(module: nn.Module, argument: int | str | None) -> str | None:
    """The name under which `forward` takes the argument at a position, or of a name; None if it has none."""
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return None
    named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(argument, int):
        return named[argument] if argument < len(named) else None
    return argument if argument in parameters else None


def zero(module: nn.Module, argument: int | str, form: Any) -> nn.Module:
    """A plain module with the signature of `module` that returns its input times zero.

    Args:
        argument: position or name of the input.
        form: of the output: "x" for the tensor, {"argument": position or name} for another input handed on, None, or
            {"tuple": [...]} and {"list": [...]} of those.
    """
    graph = torch.fx.Graph()
    inputs: dict[str, torch.fx.Node] = {}
    for name, p in inspect.signature(module.forward).parameters.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            graph.placeholder(("*" if p.kind is p.VAR_POSITIONAL else "**") + name)
        else:
            first = not inputs and p.kind is not p.KEYWORD_ONLY
            inputs[name] = graph.placeholder(name) if first else graph.placeholder(name, default_value=None)
    chosen = _name_of(module, argument)
    assert chosen is not None  # `find` offers no other
    handed = {key: inputs[_name_of(module, key)] for key in _handed_on(form)}  # type: ignore[index]
    graph.output(formed(form, graph.call_function(torch.mul, (inputs[chosen], 0)), handed))
    plain = torch.fx.GraphModule(nn.Module(), graph, "Zero")
    for key, value in vars(module).items():  # what the modules around it may ask of it
        if type(value) in (int, float, bool, str, type(None)) and not key.startswith("_"):
            setattr(plain, key, value)
    return plain


def formed(form: Any, x: Any, handed: Mapping[int | str, Any]) -> Any:
    """An output of `form` (see `zero`) around `x`, with others of the arguments handed on; one that is not given is None."""
    if form is None or form == "x":
        return form and x
    ((kind, parts),) = form.items()
    if kind == "argument":
        return handed.get(parts)
    inside = [formed(part, x, handed) for part in parts]
    return tuple(inside) if kind == "tuple" else inside


def _handed_on(form: Any) -> list[int | str]:
    """The arguments that a form hands on."""
    if not isinstance(form, Mapping):
        return []
    ((kind, parts),) = form.items()
    return [parts] if kind == "argument" else [key for part in parts for key in _handed_on(part)]


def remove(modules: Mapping[str, nn.Module], gone: Sequence[tuple[str, int | str, Any]], groups: Any) -> None:
    """Put zeros in place of branches, in place.

    Args:
        modules: path in the full model -> module, of the model that is being changed.
        gone: (path, argument, form) of the branches to remove.
        groups: for each kind of branch, the paths of those in blocks that stay, in order; an int of theirs that counts
            their position (`layer_idx` of a cache) is renewed so that those that stay count on.
    """
    lost = {path for path, *_ in gone}
    for group in groups:
        children = [(i, modules[path]) for i, path in enumerate(group)]
        renumber(children, [i for i, path in enumerate(group) if path not in lost])
    for path, argument, form in gone:
        parent, _, name = path.rpartition(".")
        modules[parent]._modules[name] = zero(modules[path], argument, form)
