"""Export: turn a structure into a plain, physically smaller model of the user's own class.

Every parameter is sliced by evaluating its axes, every attribute that the size equations tie to an axis is set, removed
blocks are taken out and what counts its position is renumbered.  What was done is left on the model as plain data in
`model.dmscale_plan`, so that `load` can do the same to a fresh model; nothing of dmscale is needed to run it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import axes, blocks
from .axes import Axis, Dim
from .blocks import Blocks
from .clone import clone
from .errors import ExportError
from .known import describe
from .polynomial import Quotient
from .sizes import Attribute

PLAN = "dmscale_plan"


def build(
    model: nn.Module,
    slots: Mapping[str, tuple[Dim, ...]],
    attributes: Mapping[Attribute, Quotient],
    stacks: Mapping[str, Blocks],
    widths: Mapping[Axis, tuple[int, ...]],
    depths: Mapping[str, tuple[int, ...]],
) -> nn.Module:
    """The smaller model, not yet verified.

    Args:
        model: the full model; it is copied.
        slots: parameter or buffer -> its dimensions.
        attributes: attribute -> its value as a polynomial of the free axes.
        stacks: the removable blocks by name.
        widths: free axis -> indices kept.
        depths: stack -> blocks kept.
    """
    masks = {a: _mask(a.size, kept) for a, kept in widths.items()}
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    sliced: set[str] = set()

    def smaller(t: Tensor) -> Tensor:
        data = t.detach()
        for position, dim in enumerate(slots.get(names[id(t)], ())):
            keep = axes.kept(dim, masks)
            if not bool(keep.all()):
                data = data.index_select(position, keep.nonzero()[:, 0].to(data.device))
                sliced.add(names[id(t)])
        data = data.clone(memory_format=torch.preserve_format)
        return nn.Parameter(data, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else data

    small = clone(model, smaller)
    sizes = {a: len(kept) for a, kept in widths.items()}
    values = _attribute_values(model, attributes, sizes)
    plan: dict[str, Any] = {"attributes": [], "blocks": []}
    for attribute, value in values.items():
        set_attribute(small, attribute, value)
        plan["attributes"].append([attribute.module, list(attribute.key), value])
    for module in small.modules():
        describe(module)
    _refresh_flat_weights(small)
    lists: dict[str, set[Attribute]] = {}
    gone: dict[str, set[str]] = {}  # a container may hold several stacks: take all their blocks out at once
    for name, stack in stacks.items():
        kept = depths.get(name, tuple(range(len(stack.paths))))
        lost = {p.rpartition(".")[2] for i, p in enumerate(stack.paths) if i not in kept}
        if lost:
            gone.setdefault(stack.container, set()).update(lost)
            lists.setdefault(stack.container, set()).update(stack.lists)
    for container, lost in sorted(gone.items(), key=lambda c: -c[0].count(".")):  # inner first: outer ones renumber
        children = [name for name, _ in small.get_submodule(container).named_children()]
        blocks.remove(small, container, lost)
        plan["blocks"].append([container, sorted(lost)])
        stay = [i for i, name in enumerate(children) if name not in lost]
        for attribute in sorted(lists[container], key=str):
            entries = [get_attribute(small, attribute)[i] for i in stay]
            set_attribute(small, attribute, entries)
            plan["attributes"].append([attribute.module, list(attribute.key), entries])
    setattr(small, PLAN, plan)
    return small


def _mask(size: int, kept: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def _attribute_values(
    model: nn.Module, attributes: Mapping[Attribute, Quotient], sizes: Mapping[Axis, int]
) -> dict[Attribute, int]:
    """The attributes whose value changes."""
    out: dict[Attribute, int] = {}
    for attribute, size in attributes.items():
        value = int(size.evaluate({v: sizes.get(v, v.size) for v in size.variables}))  # type: ignore[call-overload, attr-defined]
        if value != get_attribute(model, attribute):
            out[attribute] = value
    return out


def get_attribute(model: nn.Module, attribute: Attribute) -> Any:
    """The value of an int or a list that a module holds."""
    value: Any = model.get_submodule(attribute.module)
    for key in attribute.key:
        value = value[key] if isinstance(key, int) else getattr(value, key)
    return value


def set_attribute(model: nn.Module, attribute: Attribute, value: int | list) -> None:
    """Set an int or a list that a module holds: directly, in a tuple, or in a config, of which it gets its own copy."""
    module = model.get_submodule(attribute.module)
    name, *rest = attribute.key
    assert isinstance(name, str)
    if not rest:
        setattr(module, name, value)
        return
    holder = getattr(module, name)
    if isinstance(rest[0], int):
        changed = list(holder)
        changed[rest[0]] = value
        setattr(module, name, type(holder)(changed))
    else:
        own = copy.copy(holder)  # modules that share one config object must be able to differ
        own.__dict__[rest[0]] = value
        setattr(module, name, own)


def _refresh_flat_weights(model: nn.Module) -> None:
    """A recurrent layer keeps a list of its weights for its kernel; let it hold the sliced ones."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def replay(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Do to a fresh full model, in place, what `build` did beside the slicing: set attributes, take blocks out.

    Raises:
        ExportError: the model lacks a module or a block that the plan names.
    """
    named = dict(model.named_modules())
    missing = [path for path, *_ in (*plan["attributes"], *plan["blocks"]) if path not in named]
    if missing:
        raise ExportError(f"{type(model).__name__} has no module '{missing[0]}'; is it the model that was exported?")
    for module, key, value in plan["attributes"]:
        set_attribute(model, Attribute(module, tuple(key)), value)
    for container, gone in plan["blocks"]:
        children = [name for name, _ in model.get_submodule(container).named_children()]
        unknown = set(gone) - set(children)
        if unknown:
            raise ExportError(f"'{container}' has no blocks {sorted(unknown)}; is it the model that was exported?")
        blocks.remove(model, container, set(gone))
    setattr(model, PLAN, dict(plan))
    return model
