"""The settings object that a model was built from, brought in line with its exported, smaller self.

A model whose class builds it from one settings object (`type(model)(model.config)`) can be saved and loaded by its own
library only if those settings describe it.  Which number is called what is not looked up but tried: a number of the
settings is set to a size that such a number has become, the class builds the model anew without elements, and the change
stays if every shape that it moves is then the exported one.  So what layers do not agree on keeps its old value.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import axes
from .axes import Axis, Dim
from .known import builds_from

Shapes = dict[str, tuple[int, ...]]
_MOST_TRIES = 96  # of building the model anew, some milliseconds each for a small one
_TOGETHER = 4  # numbers that only fit together: heads, key-value heads, head size, and one more


def settle(
    model: nn.Module, small: nn.Module, slots: Mapping[str, tuple[Dim, ...]], sizes: Mapping[Axis, int],
    stacks: Mapping[int, Sequence[int]],
) -> dict[str, Any]:  # fmt: skip
    """Set in `small.config`, and in what shares it, every number that describes `small`.

    Args:
        model: the full model.
        small: the exported one; its config, and those of its modules, are replaced.
        slots: parameter -> its dimensions.
        sizes: free axis -> its size in `small`.
        stacks: number of children of a container -> positions of those that stay.
    Returns:
        what changed, field -> value; nothing where the class does not build the model from its config.
    """
    name = builds_from(model)
    if name is None:
        return {}
    before = getattr(model, name)
    candidates = _candidates(before, slots, sizes, stacks)
    full = _shapes(type(model), before) if candidates else None
    if full is None or full != _own_shapes(model):
        return {}
    changes = _agreeing(type(model), before, full, _own_shapes(small), candidates, stacks)
    after = _changed(before, changes)
    for path, module in model.named_modules():
        twin = _find(small, path)
        if twin is not None and getattr(module, name, None) is before:
            own = getattr(twin, name)
            if all(vars(own).get(k) in (v, vars(after).get(k)) for k, v in vars(before).items()):
                setattr(twin, name, after)
    setattr(small, name, after)
    return changes


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _candidates(
    settings: Any, slots: Mapping[str, tuple[Dim, ...]], sizes: Mapping[Axis, int], stacks: Mapping[int, Sequence[int]]
) -> dict[str, list[int]]:
    """Field -> what its number has become somewhere: a dimension, a product of neighbouring factors, a stack."""
    became: dict[int, set[int]] = {}
    for full, stay in stacks.items():
        became.setdefault(full, set()).add(len(stay))
    for dim in {dim for dims in slots.values() for dim in dims}:
        for run in _runs(dim):
            became.setdefault(axes.size(run), set()).add(int(axes.measure(run, sizes)))
    found = {}
    for field, value in vars(settings).items():
        others = sorted(became.get(value, set()) - {value}) if type(value) is int and value > 1 else []
        if others:
            found[field] = others
    return found


def _runs(dim: Dim) -> Iterator[Dim]:
    found = axes.factors(dim)
    for i, j in itertools.combinations(range(len(found) + 1), 2):
        yield tuple(found[i:j])
    for a in found:
        for part in a.sum or ():
            yield from _runs(part)


def _agreeing(
    cls: type, settings: Any, full: Shapes, wanted: Shapes, candidates: Mapping[str, list[int]],
    stacks: Mapping[int, Sequence[int]],
) -> dict[str, Any]:  # fmt: skip
    """The changes, found alone or a few together, that make what they move as it is wanted."""
    changes: dict[str, Any] = {}
    now, tries = full, 0
    for together in range(1, _TOGETHER + 1):
        for fields in itertools.combinations(candidates, together):
            for values in itertools.product(*(candidates[f] for f in fields)):
                if tries == _MOST_TRIES or now == wanted:
                    return changes
                if any(f in changes for f in fields):
                    break
                tried = changes | dict(zip(fields, values))
                for lists in _cut_lists(settings, fields, values, stacks):
                    tries += 1
                    shapes = _shapes(cls, _changed(settings, tried | lists))
                    if shapes is not None and _fits(now, shapes, wanted):
                        changes, now = tried | lists, shapes
                        break
    return changes


def _cut_lists(
    settings: Any, fields: Sequence[str], values: Sequence[int], stacks: Mapping[int, Sequence[int]]
) -> list[dict[str, Any]]:
    """What else changes with a number of layers: the lists with an entry for each keep those of the layers that stay."""
    cut: dict[str, Any] = {}
    for field, value in zip(fields, values):
        stay = stacks.get(getattr(settings, field), ())
        if len(stay) == value:
            for name, entries in vars(settings).items():
                if isinstance(entries, (list, tuple)) and len(entries) == getattr(settings, field):
                    cut[name] = type(entries)(entries[i] for i in stay)
    return [cut, {}] if cut else [{}]


def _fits(now: Shapes, then: Shapes, wanted: Shapes) -> bool:
    """Whether something moved, and all that did moved to where it is wanted."""
    moved = False
    for name in now.keys() | then.keys():
        a, b, c = now.get(name), then.get(name), wanted.get(name)
        if a == b:
            continue
        moved = True
        if a is None or b is None:
            if b is not None or c is not None:
                return False
        elif c is None or len(a) != len(b) or any(x != y and y != z for x, y, z in zip(a, b, c)):
            return False
    return moved


def _changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    own = copy.deepcopy(settings)
    for field, value in changes.items():
        own.__dict__[field] = value
    return own


def _own_shapes(model: nn.Module) -> Shapes:
    return {n: tuple(t.shape) for n, t in model.named_parameters(remove_duplicate=False)}


def _shapes(cls: type, settings: Any) -> Shapes | None:
    """The shapes of a model built from `settings`; None where they do not go together."""
    try:
        with torch.device("meta"), torch.random.fork_rng([]):
            return _own_shapes(cls(copy.deepcopy(settings)))
    except Exception:  # whatever a constructor raises on numbers that do not divide
        return None
