"""Removable blocks: what can be skipped so that a network becomes shallower.

A module call whose first output has the axes and the dtype of its first input, and which adds that very input on the
way, is a residual block: leaving it out leaves a working network.  Such children of one `ModuleList` or `Sequential`
with the same axes form one depth dimension.
"""

from __future__ import annotations

import ast
import bisect
import functools
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import axes, running
from .sizes import Attribute, attributes_of
from .syntax import syntax
from .tracer import Call, Record, Value
from .tree import once, walk

Streams = tuple[tuple[int, int | str], ...]
"""Of what a block renews: the place in its output, and the position or name of the argument that it was."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """The removable blocks of one container: `paths` in order, `ranges` the operators that each one runs.

    forms: for branches, the argument and the form of the output of each (see `branches.zero`); empty for whole blocks.
    outputs: for whole blocks, the form of the output of each; None where it has none of these.
    modified: of each whole block, whether the forward writes to its output.
    streams: of each whole block that renews several tensors, the place of each in its output and the argument that it was.
    follow: lists with an entry for each child of the container, which the forward takes by its position, and how many there are.
    """

    name: str
    container: str
    paths: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    minimum: int  # a container whose every child is removable keeps one
    forms: tuple[tuple[Any, Any], ...] = ()
    follow: tuple[Attribute, ...] = ()
    outputs: tuple[Any, ...] = ()
    modified: tuple[bool, ...] = ()
    streams: tuple[Streams, ...] = ()


def find(model: nn.Module, record: Record) -> list[Blocks]:
    """The depth dimensions of `model`, outermost first; no block lies inside another."""
    times = Counter([call.path for call in record.calls])
    called = {call.path: call for call in record.calls if times[call.path] == 1}
    sums = [addition.op for addition in record.additions]
    adding = [c for c in called.values() if bisect.bisect_right(sums, c.start) < bisect.bisect_right(sums, c.end)]
    adding = [c for c in adding if not _writes_to_its_input(c, record)]
    several = {call.path: streams for call in adding if call.parts and (streams := _streams(call, record))}
    removable = {call.path: call for call in adding if call.path in several or _is_residual(call, record)}
    runs: list[tuple[str, list[Call]]] = []
    reached = _reached_into(model, record, removable)
    for path in dict.fromkeys([_parent(path) for path in removable]):
        module = model.get_submodule(path)
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            counts = isinstance(module, nn.ModuleList) and _counts_its_blocks(path, module, called, removable, record)
            if path not in reached and not counts and not _changed_between(path, module, called, several):
                runs += [(path, run) for run in _runs(path, module, removable)]
    runs.sort(key=lambda r: (len(r[1]) < 2, r[0].count(".")))  # real stacks first, then outermost
    taken: list[str] = []
    found: list[Blocks] = []
    for container, run in runs:
        paths = [call.path for call in run]
        if any(_nested(p, t) for p in paths for t in taken):
            continue
        taken += paths
        children = list(dict(model.get_submodule(container).named_children()))
        alone = [c for c, r in runs].count(container) == 1
        first, last = paths[0].rpartition(".")[2], paths[-1].rpartition(".")[2]
        follow = counted(model, _parent(container), (container,), record) if container else ()
        span = "" if alone else f" {first}" if first == last else f" {first}..{last}"
        found.append(
            Blocks(
                f"{container}{span} depth".strip(), container, tuple(paths),
                tuple((call.start, call.end) for call in run), int(len(run) == len(children)),
                outputs=tuple(_handing_on(call.form, several.get(call.path, ())) for call in run),
                follow=(*_lists(container, children, record), *follow),
                modified=tuple(any(v.origin in record.modified for v in results(call)) for call in run),
                streams=tuple(several.get(call.path, ()) for call in run) if several.keys() & {*paths} else (),
            )
        )  # fmt: skip
    return sorted(found, key=lambda b: b.ranges[0])


def _writes_to_its_input(call: Call, record: Record) -> bool:
    """Whether a block adds in place, `x += f(x)`: there is nothing left then to hand on without it."""
    taken = [v.origin for _, v in call.given] if call.parts else []
    taken += [call.source.origin] if call.source is not None else []
    return any(call.start < op <= call.end for origin in taken for op in record.modified.get(origin, ()))


def _reached_into(model: nn.Module, record: Record, removable: dict[str, Call]) -> set[str]:
    """Containers of which something outside calls a part of a block, as in `self.blocks[0].norm.embed(t)`.

    With a block gone, that would be a part of another one.  An activation that all blocks hold is a part of each.
    """
    found: set[str] = set()
    around: dict[str, list[Call]] = {"": []}  # path -> the blocks that it and what it is inside of are
    common = _common(model) if removable else set()

    def blocks_at(path: str) -> list[Call]:
        if path not in around:
            outer, block = blocks_at(_parent(path)), removable.get(path)
            around[path] = outer if block is None else [*outer, block]
        return around[path]

    for call in record.calls if removable else ():
        for block in blocks_at(_parent(call.path)):
            if not (block.start <= call.start and call.end <= block.end) and call.path not in common:
                found.add(_parent(block.path))
    return found


def _common(model: nn.Module) -> set[str]:
    """The first place of every module without weights that stands in several."""
    places = walk(model, again=True)
    times = Counter([id(module) for _, module in places])
    several = [(path, module) for path, module in once(places) if times[id(module)] > 1]
    return {path for path, module in several if not [*module.parameters(), *module.buffers()]}


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _counts_its_blocks(
    path: str, module: nn.Module, called: dict[str, Call], removable: dict[str, Call], record: Record
) -> bool:
    """Whether the loop over a list does something of its own between some blocks and not between others.

    As in `if i == 10: x = cat([token, x])`, or `if i == 0: x = self.position(x)`: with a block gone it would do so elsewhere.
    And as in `[block(x[i]) for i, block in enumerate(blocks)]`: the others would be given what was not theirs.
    """
    paths = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
    children = [called[p] for p in paths if p in called]
    if len(children) < 2 or not any(c.path in removable for c in children):
        return False
    in_time = sorted(children, key=lambda c: c.start)
    if not all(_feeds(a, b, record) for a, b in zip(in_time, in_time[1:]) if removable.keys() & {a.path, b.path}):
        return True
    own, others = set(), set()
    for before, after in zip(children, children[1:]):
        inside = [c for c in record.calls if before.end <= c.start < c.end <= after.start]
        gap, end = after.start - before.end, before.end
        between = []
        for c in sorted(inside, key=lambda c: (c.start, -c.end)):
            if c.start >= end:  # not inside one that was subtracted
                gap, end = gap - (c.end - c.start), c.end
                between.append(c.path)
        own.add(gap)
        others.add(tuple(between))
    called_once = any(p in called for between in others for p in between)  # which block it follows, only the loop knows
    untold = len(children) == 2 and own != {0}  # one gap does not tell whether all would be alike
    return len(own) > 1 or len(others) > 1 or called_once or untold


def _feeds(before: Call, after: Call, record: Record) -> bool:
    """Whether `after` computes with anything that depends on what `before` gives."""
    known = {*before.others} if before.result is None else {before.result.origin, *before.others}
    for op in range(before.end + 1, after.end + 1):
        step = record.steps.get(op)
        if step is not None and not known.isdisjoint(step.takes):
            if op > after.start:
                return True
            known.update(step.gives)
    return False


def _lists(container: str, children: list[str], record: Record) -> tuple[Attribute, ...]:
    """The lists of which the forward takes entry i, and no other, in or right before child i of the container."""
    if not record.taken:
        return ()
    prefix = f"{container}." if container else ""
    position = {f"{prefix}{name}": i for i, name in enumerate(children)}
    calls = sorted((c for c in record.calls if c.path in position), key=lambda c: c.start)
    taken: dict[Attribute, list[tuple[int, int]]] = {}
    for op, attribute, index in record.taken:
        taken.setdefault(attribute, []).append((op, index))
    found = []
    for attribute, entries in taken.items():
        nearest = [next((position[c.path] for c in calls if c.end > op), None) for op, _ in entries]
        if {i for _, i in entries} == set(range(len(children))) and nearest == [i for _, i in entries]:
            found.append(attribute)
    return tuple(found)


def counted(model: nn.Module, owner: str, containers: Sequence[str], record: Record) -> tuple[Attribute, ...]:
    """The numbers of modules in `containers`, which the module at `owner` holds, that its forward counts up to.

    `for i in range(self.layers): x = self.blocks[i](x)`.  Where nothing else is made of such a number, and no other list of
    the owner has as many entries.
    """
    module = model.get_submodule(owner)
    entries = len(list(model.get_submodule(containers[0]).children()))
    cls: Any = type(module)
    alike = {name for name, value in vars(module).items() if isinstance(value, int) and value == entries}
    named = [name for name in _counted_up_to(cls) if name in alike] if alike - {"training"} else []
    as_many = [
        n for n, c in module.named_children() if isinstance(c, (nn.ModuleList, nn.Sequential)) and len(c) == entries
    ]
    if any((f"{owner}.{name}" if owner else name) not in containers for name in as_many):
        return ()
    sizes = [e.expression for e in record.equations] + [e for d in record.decisions for e in (d.left, d.right)]
    used = {(a.module, a.key) for e in sizes for a in attributes_of(e)} if named else set()
    found = [Attribute(owner, (name,), entries) for name in named]
    return tuple(a for a in found if (a.module, a.key) not in used)


@functools.cache
def _counted_up_to(cls: Any) -> tuple[str, ...]:
    """The attributes to which the methods of a class count: `range(self.layers)`, `range(self.first, self.last)`."""
    found: list[str] = []
    for name, function in [m for c in cls.__mro__ for m in vars(c).items() if isinstance(m[1], types.FunctionType)]:
        if "range" not in function.__code__.co_names or name == "__init__" or (tree := syntax(function)) is None:
            continue
        me = function.__code__.co_varnames[:1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "range" and len(node.args) in (1, 2):
                end = node.args[-1]
                if isinstance(end, ast.Attribute) and isinstance(end.value, ast.Name) and (end.value.id,) == me:
                    found.append(end.attr)
    return tuple(dict.fromkeys(found))


def _runs(container: str, module: nn.Module, removable: dict[str, Call]) -> list[list[Call]]:
    runs: list[list[Call]] = []
    previous: Call | None = None
    for name, _ in module.named_children():
        call = removable.get(f"{container}.{name}" if container else name)
        if call is not None:
            if previous is not None and _same_axes(previous, call):
                runs[-1].append(call)
            else:
                runs.append([call])
        previous = call
    return runs


def _same_axes(a: Call, b: Call) -> bool:
    assert a.source is not None and b.source is not None
    p, q = a.source.dims, b.source.dims
    return len(p) == len(q) and all(axes.same(x, y) for x, y in zip(p, q))


def _is_residual(call: Call, record: Record) -> bool:
    source, result = call.source, call.result
    if source is None or result is None or source.dtype != result.dtype or not call.passes_the_rest:
        return False
    if len(source.dims) != len(result.dims) or not all(map(axes.same, source.dims, result.dims)):
        return False
    return bool(branches(call, record) and record.within(record.terms, call.start, call.end))


def branches(call: Call, record: Record) -> list[Value]:
    """What a block adds to its input on the way to its output: the last value of each residual branch, in order."""
    assert call.source is not None
    return _added(call, call.source, record)[0]


def _added(call: Call, source: Value, record: Record) -> tuple[list[Value], set[int]]:
    """What is added to `source` while `call` runs, in order, and the origins of all the sums."""
    carried: set[int] = {source.origin}
    found: list[Value] = []
    for addition in record.within(record.additions, call.start, call.end):
        added = [v for v in addition.operands if v.origin not in carried]
        if len(added) < 2:
            found += added
            carried.add(addition.result.origin)
    return found, carried


def results(call: Call) -> list[Value]:
    """The tensors that a block renews, as they leave it."""
    return [v for _, v in call.parts] or ([] if call.result is None else [call.result])


def _streams(call: Call, record: Record) -> Streams:
    """Of a block that adds to several tensors, text and image say, what it renews; none if it gives anything else."""
    found: list[tuple[int, int | str]] = []
    for place, out in call.parts:
        alike = [(key, v) for key, v in call.given if v.dtype == out.dtype and len(v.dims) == len(out.dims)]
        alike = [(key, v) for key, v in alike if all(map(axes.same, v.dims, out.dims))]
        sources = [key for key, v in alike if out.origin in _added(call, v, record)[1] - {v.origin}]
        if len(sources) != 1:
            return ()
        found.append((place, sources[0]))
    different = len({key for _, key in found}) == len(found)
    return tuple(found) if different and record.within(record.terms, call.start, call.end) else ()


def _changed_between(path: str, module: nn.Module, called: dict[str, Call], several: Mapping[str, Streams]) -> bool:
    """Whether a loop does not hand on what a block renews as it is, but as another tensor, or with work of its own."""
    paths = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
    children = [called[p] for p in paths if p in several]
    for before, after in zip(children, children[1:]):
        made, given = dict(before.parts), dict(after.given)
        if any(key in given and given[key].origin != made[place].origin for place, key in several[before.path]):
            return True
    return False


def _handing_on(form: Any, streams: Streams) -> Any:
    """The form of the output of a block that is left out, of which `streams` are handed on."""
    if not streams:
        return form
    ((kind, parts),) = form.items()
    known = {place: {"argument": key} for place, key in streams}
    return {kind: [known.get(i, part) for i, part in enumerate(parts)]}


def ends(stack: Blocks, block: int, args: tuple, kwargs: dict[str, Any], out: Any) -> tuple[Tensor, Tensor]:
    """The first tensor that a block renews, and what it becomes, in a call of it."""
    if stack.streams and stack.streams[block]:
        place, key = stack.streams[block][0]
        return args[key] if isinstance(key, int) else kwargs[key], out[place]
    return running.tensors_in((args, kwargs))[0], running.tensors_in(out)[0]


def _nested(p: str, q: str) -> bool:
    return p == q or p.startswith(q + ".") or q.startswith(p + ".")


def remove(model: nn.Module, path: str, gone: set[str]) -> None:
    """Take the children named in `gone` out of the container at `path`, in place; renumber what counts its position."""
    container = model.get_submodule(path)
    before = dict(container.named_children())
    stay = {name: child for name, child in before.items() if name not in gone}
    _arrange(container, list(stay.items()))


def insert(model: nn.Module, path: str, copies: Mapping[str, Sequence[nn.Module]]) -> list[str]:
    """Put `copies[name]` behind the child `name` of the container at `path`, in place; renumber what counts its position.

    Returns the paths of what was put in.
    """
    container = model.get_submodule(path)
    before = dict(container.named_children())
    order: list[tuple[str, nn.Module]] = []
    for name, child in before.items():
        order.append((name, child))
        order += [(name, copy) for copy in copies.get(name, ())]
    new = {id(copy) for several in copies.values() for copy in several}
    _arrange(container, order)
    return [f"{path}.{n}" if path else n for n, child in container.named_children() if id(child) in new]


def _arrange(container: nn.Module, order: Sequence[tuple[str, nn.Module]]) -> None:
    """Let `container` hold these modules, each with the name of the child that it is or is a copy of."""
    places = [(module, key) for key in position_keys(container) for module in [m for _, m in order]]
    prefix = numbered_as(container)
    container._modules.clear()
    for i, (name, child) in enumerate(order):
        free = name if name not in container._modules else f"{name}_{i}"
        container._modules[free if prefix is None else f"{prefix}{i}"] = child
    position = {id(child): i for i, (_, child) in enumerate(order)}
    for module, (path, key) in places:
        module.get_submodule(path).__dict__[key] = position[id(module)]


def numbered_as(container: nn.Module) -> str | None:
    """What stands before the numbers that the children of a container are named by; None where they have other names.

    Nothing in a list.  A forward calls the children of a dict by name: `self.experts[f"expert_{i}"]`.
    """
    names = list(container._modules)
    if all(name.isdigit() for name in names):
        return ""
    prefix = names[0].rstrip("0123456789")
    counted = names == [f"{prefix}{i}" for i in range(len(names))]
    return prefix if counted and isinstance(container, nn.ModuleDict) else None


def position_keys(container: nn.Module) -> list[tuple[str, str]]:
    """(path below the child, attribute) of every int that equals the child's position in every child (`layer_idx`)."""
    return _keys_that_count(list(enumerate(container.children())))


def renumber(children: list[tuple[int, nn.Module]], stay: list[int]) -> None:
    """Renew what counts positions in modules at given positions, of which only those in `stay` remain."""
    new = {old: i for i, old in enumerate(stay)}
    for path, key in _keys_that_count(children):
        for position, child in children:
            if position in new:
                child.get_submodule(path).__dict__[key] = new[position]


def _keys_that_count(children: list[tuple[int, nn.Module]]) -> list[tuple[str, str]]:
    trees = [dict(child.named_modules()) for _, child in children]
    if len(trees) < 2:
        return []
    found = []
    for path, module in trees[0].items():
        for key, value in vars(module).items():
            if type(value) is not int:
                continue
            others = [vars(tree[path]).get(key) if path in tree else None for tree in trees]
            if all(type(v) is int and v == position for v, (position, _) in zip(others, children)):
                found.append((path, key))
    return found
