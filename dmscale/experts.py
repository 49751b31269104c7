"""Experts in lists: modules of which there are as many as an axis has elements.

    scores = self.router(x).softmax(-1)  # (T, E)
    out = sum(scores[:, i, None] * expert(x) for i, expert in enumerate(self.experts))

The elements of the router's axis are taken by number, each for the module of that number: with an element and its module
gone, the others have new numbers in both.  The loop is Python's and leaves nothing in a trace.  So that element i goes with
module i, of every list that has as many and is held where the elements were taken, is a guess, which the trial of the space
proves or takes back (`certify.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from . import axes, routing
from .axes import Axis, Dim
from .blocks import counted, numbered_as
from .sizes import Attribute
from .tracer import READ, Call, Position, Record


@dataclass(frozen=True, eq=False)
class Experts:
    """The modules that go with the elements of an axis.

    containers: the lists that hold a module for each element.
    paths: for each element its modules, one in each list.
    ranges: for each element the operators that go with it, from behind the first number of a pair up to the second.
    chosen: whether values say which rows each one gets: with one gone these go to others, and no operator with it.
    follow: the numbers of modules that forwards count up to.
    """

    containers: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    ranges: tuple[tuple[tuple[int, int], ...], ...]
    chosen: bool = False
    follow: tuple[Attribute, ...] = ()


def lists(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, set[int]]:
    """Path of a module -> how many modules are in each of the lists that it is or holds, of those that hold any."""
    found: dict[str, set[int]] = {}
    for path, module in modules:
        if _is_numbered(module) and len(module._modules) > 1:
            for owner in (path, path.rpartition(".")[0]):
                found.setdefault(owner, set()).add(len(module._modules))
    return found


def find(model: nn.Module, record: Record) -> dict[Axis, Experts]:
    """The axes of which every element was taken by number for a module of its own; freezes the others whose elements were.

    Args:
        model: the traced model.
        record: of its trace.
    """
    taken: dict[Axis, list[Position]] = {}
    for position in record.positions:
        (*outer, last) = axes.factors(position.dim) or (None,)
        if outer or last is None or not last.is_atom:
            _fix(position.dim, [position])
        elif not last.reasons:
            taken.setdefault(last, []).append(position)
    found: dict[str, tuple[Axis, Experts]] = {}  # by the list
    routed = set(routing.routed(record, model)) if taken else set()
    for axis, positions in taken.items():
        several = [
            _experts(model, owner, axis.size, record, routed, [p for p in positions if p.path == owner])
            for owner in dict.fromkeys([p.path for p in positions])
        ]
        if not all(several):
            _fix((axis,), positions)
            continue
        experts = _together([e for e in several if e is not None])
        for other, before in [found[c] for c in experts.containers if c in found]:
            axes.unify((axis,), (other,))  # stacked once more, in training mode say
            experts = _together([before, experts])
        found.update(dict.fromkeys(experts.containers, (axis, experts)))
    return {axes.factors((axis,))[0]: experts for axis, experts in found.values()}


def _together(several: Sequence[Experts]) -> Experts:
    """Lists of which each holds a module for the same elements: operations that share what says how much each counts."""
    return Experts(
        tuple(dict.fromkeys(c for e in several for c in e.containers)),
        tuple(tuple(dict.fromkeys(p for paths in each for p in paths)) for each in zip(*[e.paths for e in several])),
        tuple(tuple(dict.fromkeys(r for ranges in each for r in ranges)) for each in zip(*[e.ranges for e in several])),
        any(e.chosen for e in several),
        tuple(dict.fromkeys(a for e in several for a in e.follow)),
    )


def _fix(dim: Dim, positions: Sequence[Position]) -> None:
    """Freeze what no module goes with; where there is no reason the gates see to it, if the result matters."""
    reason = next((p.reason for p in positions if p.reason), None)
    if reason is not None:
        axes.freeze(dim, reason)


def _unreached(experts: Experts, numbers: Iterable[int], record: Record) -> bool:
    """Whether no row of the example chose the experts of these numbers, so that the forward had nothing to do for them."""
    return experts.chosen and not any(record.of("calls", p) for i in numbers for p in experts.paths[i])


def _experts(
    model: nn.Module, owner: str, size: int, record: Record, routed: set[str], positions: Sequence[Position]
) -> Experts | None:  # fmt: skip
    """The lists of `size` modules at `owner`, if all are given the same, or what values say.

    None too where an element is not among the `positions` that were taken there.
    """
    containers = tuple(_lists(model, owner, size, record))
    if not containers:
        return None
    prefixes = [f"{c}." if c else "" for c in containers]
    names = [list(model.get_submodule(c)._modules) for c in containers]
    paths = tuple(tuple(p + n[i] for p, n in zip(prefixes, names)) for i in range(size))
    calls = [[c for p in several for c in record.of("calls", p)] for several in paths]
    alike = _all_alike([c[0] for c in calls if c])
    read = any(p.reason.startswith(READ) for p in positions)
    chosen = any(p in routed for several in paths for p in several) or (read and not alike)
    if not (alike or chosen):
        return None  # each has a part of its own, and would be given that of another one
    if _made_elsewhere(model, paths, positions):
        return None
    ranges = tuple(tuple((c.start, c.end) for c in of_one if not chosen) for of_one in calls)
    experts = Experts(containers, paths, ranges, chosen, counted(model, owner, containers, record))
    missing = set(range(size)).difference([p.number for p in positions])
    return None if missing and not _unreached(experts, missing, record) else experts


def _made_elsewhere(model: nn.Module, paths: Sequence[Sequence[str]], positions: Sequence[Position]) -> bool:
    """Whether other modules made what was stacked, of which there happen to be as many (steps, beside an ensemble)."""
    stacked = [p for p in positions if p.made and p.number is not None]
    have_any = any(next(model.get_submodule(p).parameters(), None) is not None for several in paths for p in several)
    own = [n.startswith(f"{path}.") for p in stacked for n in p.made for path in paths[p.number or 0]]
    return bool(stacked) and have_any and not any(own)


def _all_alike(calls: Sequence[Call]) -> bool:
    """Whether all were given tensors of the same axes."""
    given = [c.source.dims for c in calls if c.source is not None]
    return all(len(dims) == len(given[0]) and all(map(axes.same, dims, given[0])) for dims in given)


def _lists(model: nn.Module, owner: str, size: int, record: Record) -> Iterator[str]:
    """The lists of `size` modules that the module at `owner` is or holds, of which any was called."""
    module = model.get_submodule(owner)
    held = [(owner, module)] + [
        (f"{owner}.{name}" if owner else name, child) for name, child in module.named_children()
    ]
    for path, child in held:
        prefix = f"{path}." if path else ""
        listed = _is_numbered(child) and len(child._modules) == size
        if listed and any(record.of("calls", prefix + name) for name in child._modules):
            yield path


def _is_numbered(module: nn.Module) -> bool:
    """Whether it is a list of modules, or a dict of those whose names count them."""
    return isinstance(module, nn.ModuleList) or (isinstance(module, nn.ModuleDict) and numbered_as(module) is not None)
