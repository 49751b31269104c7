"""The settings object that a model was built from, brought in line with its exported, smaller self.

A model whose class builds it from one settings object (`type(model)(model.config)`) can be saved and loaded by its own
library only if those settings describe it.  Which number is called what is not looked up but tried: a number of the
settings is set to a size that such a number has become, the class builds the model anew without parameters, and the change
stays if all that it moves (shapes, buffers, scales) is then as exported.  So what layers do not agree on keeps its old
value, and so does what the class would read otherwise: a smaller head has other rotary frequencies than a part of a
larger one.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import axes, certify, running
from .axes import Axis, Dim
from .known import builds_from

Outline = dict[str, Any]
"""Of a model: parameter -> shape; buffer -> its elements; attribute -> its value, where that is a float."""

_MOST_TRIES = 32  # of building the model anew, some milliseconds each for a small one
_TOGETHER = 4  # numbers that only fit together: heads, key-value heads, head size, and one more


def settle(
    model: nn.Module, small: nn.Module, slots: Mapping[str, tuple[Dim, ...]], sizes: Mapping[Axis, int],
    stacks: Mapping[int, Sequence[int]], example_inputs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Set in `small.config`, and in what shares it, every number that describes `small`.

    Args:
        model: the full model.
        small: the exported one; its config, and those of its modules, are replaced.
        slots: parameter -> its dimensions.
        sizes: free axis -> its size in `small`.
        stacks: number of children of a container -> positions of those that stay.
        example_inputs: what a model built from settings that fit in full is compared on.
    Returns:
        what changed, field -> value; nothing where the class does not build the model from its config.
    """
    name = builds_from(model)
    if name is None:
        return {}
    before = getattr(model, name)
    candidates = _candidates(before, slots, sizes, stacks)
    full = _built(type(model), before) if candidates else None
    if full is None or _moved(_outline(full), _outline(model), parameters_only=True):
        return {}
    changes, built = _agreeing(type(model), before, full, _outline(small), candidates, stacks)
    if not _moved(_outline(built), _outline(small), parameters_only=True) and _differs(built, small, example_inputs):
        more = _one_more(type(model), _changed(before, changes), candidates, changes, small, example_inputs)
        if more is None:
            return {}  # better settings that do not fit than such that fit another model
        changes |= more
    after = _changed(before, changes)
    for module in small.modules():  # what shared it before: with a block gone, others stand where it stood
        own = vars(module).get(name)
        if type(own) is type(before) and all(
            vars(own).get(k) in (v, vars(after).get(k)) for k, v in vars(before).items()
        ):
            setattr(module, name, after)
    setattr(small, name, _changed(getattr(small, name), changes))  # what the equations have set in it stays
    return changes


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
    cls: type, settings: Any, full: nn.Module, wanted: Outline, candidates: Mapping[str, list[int]],
    stacks: Mapping[int, Sequence[int]],
) -> tuple[dict[str, Any], nn.Module]:  # fmt: skip
    """The changes, found alone or a few together, that make what they move as it is wanted; and the model so built."""
    changes: dict[str, Any] = {}
    built, now, tries = full, _outline(full), 0
    for fields, values in _combinations(candidates):
        if any(f in changes for f in fields):
            continue
        if tries >= _MOST_TRIES or not _moved(now, wanted, parameters_only=True):
            break
        for lists in _cut_lists(settings, fields, values, stacks):
            tried = changes | dict(zip(fields, values)) | lists
            tries += 1
            model = _built(cls, _changed(settings, tried))
            then = {} if model is None else _outline(model)
            moved = _moved(now, then)
            if model is not None and moved and not _misses(moved, now, then, wanted):
                changes, built, now = tried, model, then
                break
    return changes, built


def _one_more(
    cls: type, settings: Any, candidates: Mapping[str, list[int]], changes: Mapping[str, Any], small: nn.Module,
    example_inputs: Any,
) -> dict[str, Any] | None:  # fmt: skip
    """The number that no parameter shows, groups of experts say, with which a model that fits in full also computes the same."""
    others = ({f: v} for f, values in candidates.items() if f not in changes for v in values)
    for tried in itertools.islice(others, _MOST_TRIES):
        built = _built(cls, _changed(settings, tried))
        fits = built is not None and not _moved(_outline(built), _outline(small), parameters_only=True)
        if fits and not _differs(built, small, example_inputs):  # type: ignore[arg-type]
            return tried
    return None


def _combinations(candidates: Mapping[str, list[int]]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    for together in range(1, _TOGETHER + 1):
        for fields in itertools.combinations(candidates, together):
            for values in itertools.product(*(candidates[f] for f in fields)):
                yield fields, values


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


def _moved(now: Outline, then: Outline, parameters_only: bool = False) -> list[str]:
    """The names under which two outlines differ."""
    names = [n for n in now.keys() | then.keys() if not parameters_only or isinstance(now.get(n, then.get(n)), tuple)]
    return [n for n in names if not _same(now.get(n), then.get(n))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=1e-6))
    return type(a) is type(b) and a == b


def _misses(moved: Sequence[str], now: Outline, then: Outline, wanted: Outline) -> bool:
    """Whether anything moved to where it is not wanted; of a parameter each dimension counts for itself."""
    for name in moved:
        a, b, c = now.get(name), then.get(name), wanted.get(name)
        if isinstance(a, tuple) and all(isinstance(x, tuple) and len(x) == len(a) for x in (b, c)):
            if any(x != y and y != z for x, y, z in zip(a, b, c)):  # type: ignore[arg-type]
                return True
        elif not _same(b, c):
            return True
    return False


def _changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    own = copy.deepcopy(settings)
    for field, value in changes.items():
        own.__dict__[field] = value
    return own


def _outline(model: nn.Module) -> Outline:
    found: Outline = {n: tuple(t.shape) for n, t in model.named_parameters(remove_duplicate=False)}
    found |= {n: t.detach().cpu() for n, t in model.named_buffers(remove_duplicate=False) if not t.is_meta}
    for path, module in model.named_modules():
        found |= {f"{path}.{k}": v for k, v in vars(module).items() if type(v) is float}
    return found


def _built(cls: type, settings: Any) -> nn.Module | None:
    """A model built from `settings`, its parameters without elements; None where the numbers do not go together."""
    try:
        with _empty_parameters(), torch.random.fork_rng([]):
            return cls(copy.deepcopy(settings))
    except Exception:  # whatever a constructor raises on numbers that do not divide
        return None


@contextlib.contextmanager
def _empty_parameters() -> Iterator[None]:
    """Every parameter that a module registers meanwhile is moved to the meta device; buffers keep their elements."""
    register = nn.Module.register_parameter

    def without_elements(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_elements  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _differs(built: nn.Module, small: nn.Module, example_inputs: Any) -> bool:
    """Whether a built model with the parameters of the exported one gives other outputs."""
    if running.is_empty(small):
        return False
    # a class may have a way of its own, without `assign`
    nn.Module.load_state_dict(built, nn.Module.state_dict(small), assign=True)
    built.eval()
    try:
        return not certify.compare(small, built, example_inputs) <= certify.tolerance(small)
    except Exception:  # more groups than there are experts, say
        return True
