"""Export: turn a structure into a plain, physically smaller model of the user's own class.

Every parameter is sliced by evaluating its axes, every attribute that the size equations tie to an axis is set, removed
blocks are taken out and what counts its position is renumbered.  What was done is left on the model as plain data in
`model.dmscale_plan`, so that `load` can do the same to a fresh model; nothing of dmscale is needed to run it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import axes, blocks, branches
from .axes import Axis, Dim
from .blocks import Blocks
from .clone import clone
from .errors import ExportError
from .experts import Experts
from .known import describe
from .polynomial import Quotient
from .sizes import Attribute, is_copy_of_items, with_entries
from .tree import walk

if TYPE_CHECKING:
    from .tracing import Trace

PLAN = "dmscale_plan"
EXPANSION = "dmscale_expansion"


def build(
    model: nn.Module,
    trace: Trace,
    attributes: Mapping[Attribute, Quotient],
    stacks: Mapping[str, Blocks],
    experts: Mapping[str, Experts],
    widths: Mapping[Axis, tuple[int, ...]],
    depths: Mapping[str, tuple[int, ...]],
) -> nn.Module:
    """The smaller model, not yet verified.

    Args:
        model: the full model; it is copied.
        trace: of the model.
        attributes: attribute -> its value as a polynomial of the free axes.
        stacks: the removable blocks by name.
        experts: member whose elements have a module each -> these.
        widths: free axis -> indices kept.
        depths: stack, or member of experts -> blocks or experts kept.
    """
    indices = {a: torch.tensor(kept, dtype=torch.long) for a, kept in widths.items()}
    small, values = resize(model, trace, attributes, indices)
    plan: dict[str, Any] = {
        "attributes": [[a.module, list(a.key), value] for a, value in values.items()],
        "constants": [[n, [[i, at.tolist()] for i, at in cuts]] for n, cuts in _cuts(trace.constants, indices).items()],
        "blocks": [],
        "branches": {"gone": [], "groups": []},
    }
    modules = dict(small.named_modules())  # under the names of the full model
    held = [_holder(small, name)[name.rpartition(".")[2]] for name, _ in plan["constants"]]
    # they live on where their block goes, so that nothing else gets an id of theirs
    resized = {id(t): t for t in held}
    follow: dict[str, set[Attribute]] = {}
    gone: dict[str, set[str]] = {}  # a container may hold several stacks: take all their blocks out at once
    for name, stack in stacks.items():
        kept = depths.get(name, tuple(range(len(stack.paths))))
        lost = {p.rpartition(".")[2] for i, p in enumerate(stack.paths) if i not in kept}
        if lost and stack.forms:
            lost_forms = [[p, *f] for i, (p, f) in enumerate(zip(stack.paths, stack.forms)) if i not in kept]
            plan["branches"]["gone"] += lost_forms
            plan["branches"]["groups"].append(list(stack.paths))
        elif lost:
            gone.setdefault(stack.container, set()).update(lost)
            follow.setdefault(stack.container, set()).update(stack.follow)
    for name, found in experts.items():
        kept = depths.get(name, tuple(range(len(found.paths))))
        for path in [p for i, paths in enumerate(found.paths) if i not in kept for p in paths]:
            container, _, lost_name = path.rpartition(".")
            gone.setdefault(container, set()).add(lost_name)
            follow.setdefault(container, set()).update(found.follow)
    branches.remove(modules, **plan["branches"])
    for container, lost in sorted(gone.items(), key=lambda c: -c[0].count(".")):  # inner first: outer ones renumber
        children = [name for name, _ in small.get_submodule(container).named_children()]
        blocks.remove(small, container, lost)
        plan["blocks"].append([container, sorted(lost)])
        stay = [i for i, name in enumerate(children) if name not in lost]
        for attribute in sorted(follow[container], key=str):
            before = get_attribute(small, attribute)
            value = len(stay) if isinstance(before, int) else [before[i] for i in stay]
            set_attribute(small, attribute, value)
            plan["attributes"].append([attribute.module, list(attribute.key), value])
    plan["resized"] = [
        f"{path}.{key}" if path else key
        for path, module in small.named_modules() for key, t in module.__dict__.items() if id(t) in resized
    ]  # fmt: skip
    setattr(small, PLAN, plan)
    small.__dict__.pop(EXPANSION, None)  # what it says of elements holds for the larger model
    return small


def _laid_out(data: Tensor, like: Tensor) -> Tensor:
    """`data` with channels last if `like` has them so: slicing forgets it."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if like.dim() == dims and like.is_contiguous(memory_format=layout) and not like.is_contiguous():
            return data.contiguous(memory_format=layout)
    return data


def resize(
    model: nn.Module,
    trace: Trace,
    attributes: Mapping[Attribute, Quotient],
    indices: Mapping[Axis, Tensor],
    fill: Callable[[str, Tensor], Tensor] = lambda name, t: t,
) -> tuple[nn.Module, dict[Attribute, int]]:
    """A copy of `model` with other elements along its axes: fewer (an export) or some of them again (an expansion).

    Args:
        model: it is copied.
        trace: of the model.
        attributes: attribute -> its value as a polynomial of the free axes.
        indices: axis -> which of its elements stands at each new place, (new size,) of int64.
        fill: (name, the tensor gathered) -> what the copy shall hold, of that shape.
    Returns:
        the copy, with elements of its own, and the attributes that were set.
    Raises:
        Inexact: an attribute has no whole value at these sizes.
        ExportError: a module holds its parameters where no copy can be given others.
    """
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    shapes: dict[str, torch.Size] = {}

    def resized(t: Tensor) -> Tensor:
        data, name = t.detach(), names[id(t)]
        for position, index in _cut(trace.slots.get(name, ()), indices):
            data = data.index_select(position, index.to(data.device))
        dense = t.layout is torch.strided
        own = _laid_out(data, t).clone(memory_format=torch.preserve_format) if dense else data.clone()
        data = fill(name, own)
        shapes[name] = data.shape
        return nn.Parameter(data, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else data

    twin = clone(model, resized)
    for name, t in twin.named_parameters():
        if t.shape != shapes.get(name, t.shape):
            holder = next(m for path, m in reversed(walk(twin)) if not path or name.startswith(f"{path}."))
            raise ExportError(f"a {type(holder).__name__} does not hold {name} as modules hold their parameters")
    _resize_constants(twin, _cuts(trace.constants, indices))
    values = _attribute_values(model, attributes, {a: len(index) for a, index in indices.items()})
    for attribute, value in values.items():
        set_attribute(twin, attribute, value)
    for module in twin.modules():
        describe(module)
    _refresh_flat_weights(twin)
    return twin, values


def _cut(dims: Sequence[Dim], indices: Mapping[Axis, Tensor]) -> list[tuple[int, Tensor]]:
    """Where a tensor of dimensions `dims` changes: (position, which of its elements stands at each new place)."""
    found = [(i, axes.gathered(dim, indices)) for i, dim in enumerate(dims)]
    return [(i, at) for i, at in found if not torch.equal(at, torch.arange(axes.size(dims[i])))]


def _cuts(
    constants: Mapping[str, tuple[Dim, ...]], indices: Mapping[Axis, Tensor]
) -> dict[str, list[tuple[int, Tensor]]]:
    found = {name: _cut(dims, indices) for name, dims in constants.items()}
    return {name: cuts for name, cuts in found.items() if cuts}


def _resize_constants(model: nn.Module, cuts: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
    """Resize tensors that modules hold as plain attributes, in place; what several modules share they share still."""
    resized: dict[int, tuple[Any, Tensor]] = {}
    for name, positions in cuts.items():
        old = new = _holder(model, name).get(name.rpartition(".")[2])
        if isinstance(new, Tensor):  # a forward may keep there what it makes when it first needs it
            for position, index in positions:
                new = new.index_select(position, index.to(new.device))
            resized[id(old)] = old, new  # the first lives on, so that nothing else gets its id
    for module in model.modules() if resized else ():
        for key, value in module.__dict__.items():
            if id(value) in resized:
                module.__dict__[key] = resized[id(value)][1]


def constants(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor, of the plain attributes of modules that the export has resized; none of another model."""
    held = getattr(model, PLAN, {}).get("resized", ())
    return {name: _holder(model, name)[name.rpartition(".")[2]] for name in held}


def _hold(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let modules hold these tensors as plain attributes; those that have held one tensor do so again."""
    known: dict[int, tuple[Any, Tensor]] = {}
    for name, t in tensors.items():
        holder, key = _holder(model, name), name.rpartition(".")[2]
        old = holder.get(key)
        _, holder[key] = (old, t) if old is None else known.setdefault(id(old), (old, t.to(old.device)))


def _holder(model: nn.Module, name: str) -> dict[str, Any]:
    return model.get_submodule(name.rpartition(".")[0]).__dict__


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
        value = value[key] if isinstance(key, int) or type(value) is dict else getattr(value, key)
    return value


def set_attribute(model: nn.Module, attribute: Attribute, value: int | list) -> None:
    """Set an int or a list that a module holds: directly, in a tuple, a dict or a config, of which it gets its own copy."""
    module = model.get_submodule(attribute.module)
    name, *rest = attribute.key
    assert isinstance(name, str)
    if not rest:
        setattr(module, name, value)
        return
    copied = f"_{name}" in module.__dict__ and is_copy_of_items(module.__dict__, f"_{name}")
    setattr(module, name, _with(getattr(module, name), rest, value))
    if copied:
        setattr(module, f"_{name}", tuple(getattr(module, name).items()))


def _with(holder: Any, key: Sequence[str | int], value: Any) -> Any:
    """A copy of a tuple, list or config with `value` at `key`: modules that share one must be able to differ."""
    first, *rest = key
    if isinstance(first, int):
        changed = list(holder)
        changed[first] = value
        return type(holder)(changed)
    value = _with(_entry(holder, first), rest, value) if rest else value
    if isinstance(holder, (dict, tuple)):
        return with_entries(holder, {first: value})
    own = copy.copy(holder)
    own.__dict__[first] = value
    return own


def _entry(holder: Any, name: str) -> Any:
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def _refresh_flat_weights(model: nn.Module) -> None:
    """A recurrent layer keeps a list of its weights for its kernel; let it hold the sliced ones."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def replay(model: nn.Module, plan: Mapping[str, Any], saved: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Do to a fresh full model, in place, what `build` did beside the slicing: set attributes, take blocks out.

    Args:
        saved: what `constants` gave of the exported model; without it what the fresh one holds is cut.
    Raises:
        ExportError: the model lacks a module or a block that the plan names.
    """
    named = dict(model.named_modules())
    cuts = {n: [(i, torch.tensor(at)) for i, at in several] for n, several in plan.get("constants", ())}
    paths = [path for path, *_ in (*plan["attributes"], *plan["blocks"])] + [n.rpartition(".")[0] for n in cuts]
    missing = [path for path in paths if path not in named]
    if missing:
        raise ExportError(f"{type(model).__name__} has no module '{missing[0]}'; is it the model that was exported?")
    _resize_constants(model, cuts)
    for module, key, value in plan["attributes"]:
        set_attribute(model, Attribute(module, tuple(key)), value)
    if "branches" in plan:  # files written before there were branches lack it
        lost = [path for path, *_ in plan["branches"]["gone"] if path not in named]
        if lost:
            raise ExportError(f"{type(model).__name__} has no module '{lost[0]}'; is it the model that was exported?")
        branches.remove(named, **plan["branches"])
    for container, gone in plan["blocks"]:
        children = [name for name, _ in model.get_submodule(container).named_children()]
        unknown = set(gone) - set(children)
        if unknown:
            raise ExportError(f"'{container}' has no blocks {sorted(unknown)}; is it the model that was exported?")
        blocks.remove(model, container, set(gone))
    _hold(model, saved or {})
    setattr(model, PLAN, dict(plan))
    return model
