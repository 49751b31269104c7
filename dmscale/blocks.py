"""Removable blocks: what can be skipped so that a network becomes shallower.

A module call whose first output has the axes and the dtype of its first input, and which adds that very input on the
way, is a residual block: leaving it out leaves a working network.  Such children of one `ModuleList` or `Sequential`
with the same axes form one depth dimension.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from . import axes
from .sizes import Attribute
from .tracer import Call, Record


@dataclass(frozen=True, eq=False)
class Blocks:
    """The removable blocks of one container: `paths` in order, `ranges` the operators that each one runs.

    lists: those that hold an entry for each child of the container, which the forward takes by its position.
    """

    name: str
    container: str
    paths: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    minimum: int  # a container whose every child is removable keeps one
    lists: tuple[Attribute, ...] = ()


def find(model: nn.Module, record: Record) -> list[Blocks]:
    """The depth dimensions of `model`, outermost first; no block lies inside another."""
    times = Counter(call.path for call in record.calls)
    removable = {call.path: call for call in record.calls if times[call.path] == 1 and _is_residual(call, record)}
    runs: list[tuple[str, list[Call]]] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
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
        span = "" if alone else f" {first}" if first == last else f" {first}..{last}"
        found.append(
            Blocks(
                f"{container}{span} depth".strip(), container, tuple(paths),
                tuple((call.start, call.end) for call in run), int(len(run) == len(children)),
                _lists(container, children, record),
            )
        )  # fmt: skip
    return sorted(found, key=lambda b: b.ranges[0])


def _lists(container: str, children: list[str], record: Record) -> tuple[Attribute, ...]:
    """The lists of which the forward takes entry i, and no other, in or right before child i of the container."""
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
    if source is None or result is None or call.source_dtype != call.result_dtype or not call.passes_the_rest:
        return False
    if len(source.dims) != len(result.dims) or not all(axes.same(p, q) for p, q in zip(source.dims, result.dims)):
        return False
    adds_input = any(call.start < op <= call.end and source.origin in origins for op, origins in record.additions)
    return adds_input and any(call.start < term.op <= call.end for term in record.terms)


def _nested(p: str, q: str) -> bool:
    return p == q or p.startswith(q + ".") or q.startswith(p + ".")


def remove(model: nn.Module, path: str, gone: set[str]) -> None:
    """Take the children named in `gone` out of the container at `path`, in place; renumber what counts its position."""
    container = model.get_submodule(path)
    before = dict(container.named_children())
    stay = {name: child for name, child in before.items() if name not in gone}
    positions = {name: i for i, name in enumerate(before)}
    _renumber([(positions[name], child) for name, child in before.items()], [positions[name] for name in stay])
    container._modules.clear()
    numbered = all(name.isdigit() for name in before)
    for i, (name, child) in enumerate(stay.items()):
        container._modules[str(i) if numbered else name] = child


def _renumber(children: list[tuple[int, nn.Module]], stay: list[int]) -> None:
    """An int that equals the child's position in every child (`layer_idx` of a cache) is a position: renew it."""
    if len(children) < 2:
        return
    trees = [dict(child.named_modules()) for _, child in children]
    new = {old: i for i, old in enumerate(stay)}
    for path, module in trees[0].items():
        for key, value in vars(module).items():
            if type(value) is not int:
                continue
            others = [vars(tree[path]).get(key) if path in tree else None for tree in trees]
            if all(type(v) is int and v == position for v, (position, _) in zip(others, children)):
                for tree, (position, _) in zip(trees, children):
                    if position in new:
                        tree[path].__dict__[key] = new[position]
