"""Wider without a change of the function: which axes can grow, and what the new elements hold.

An element of an axis is *dead* when whatever consumes the axis multiplies it by zero: then the elements that make it may
hold anything.  So a network is widened by giving every new element the incoming weights of an old one, with some noise,
and zero outgoing ones.  Where an axis is consumed is what the trace recorded for gates (`gates.py`): the mask of a gated
model and the zeros of a widened one stand in the same places.

Net2Net (Chen, Goodfellow and Shlens, ICLR 2016) copies a unit and splits the outgoing weights between the copies; that
holds for any nonlinearity too, but needs noise in weights that count in order to tell the copies apart, and the first
units of the wider network are not the old network any more.  With zero outgoing weights the function is exactly kept
whatever the noise, the copies are told apart by their outgoing weights from the first step on, and the old network stays
inside the new one as it was: taking the new elements out gives it back.

A *normalised* axis (LayerNorm, RMSNorm, GroupNorm within a group) is not indifferent to what a dead element holds.  Its
mean and mean square stay exactly what they are when every element is there equally often, hence a whole number of times
and without noise.  For m < n new elements no linear map A of the n old ones will do: A'A = (m / n) I has rank n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import axes, naming
from .axes import Axis, Dim
from .export import resize
from .gates import KEPT_COUNT
from .tracer import Contraction, Value

if TYPE_CHECKING:
    from .space import SearchSpace

Zeros = dict[str, dict[int, set[Axis]]]
"""Parameter -> position -> the axes whose new elements are zero there."""


@dataclass
class Widths:
    """What to widen: `sizes` by dimension, `zeros` that keep the function, and `reasons` for what stays (or grows less)."""

    sizes: dict[str, int]
    zeros: Zeros = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def plan(space: SearchSpace, factors: Mapping[str, float], reasons: Mapping[str, str]) -> Widths:
    """The widths nearest to `factors` (dimension -> factor) for which the function can be kept."""
    quiet = normalised(space)
    widths = Widths({}, reasons=dict(reasons))
    for name, factor in factors.items():
        size, reason = _size(space, name, factor, quiet)
        if reason:
            widths.reasons[name] = reason
        if size > space.dimensions[name].size:
            widths.sizes[name] = size
    while True:
        targets = _targets(space, widths.sizes)
        widths.zeros, refused = _zeros(space, targets, quiet)
        refused |= _uneven(space, targets)
        owner = _owner(space)
        lost = {owner[a]: reason for a, reason in refused.items()}
        if not lost:
            return widths
        for name, reason in lost.items():
            del widths.sizes[name]
            widths.reasons[name] = reason


def _size(space: SearchSpace, name: str, factor: float, quiet: Mapping[Axis, str]) -> tuple[int, str]:
    """The new size of a dimension, and why it is not what was asked for."""
    d = space.dimensions[name]
    where = next((quiet[a] for a in d.axes if a in quiet), None)
    if where is not None:
        whole = int(factor + 1e-9)
        if abs(whole - factor) < 1e-9:
            return d.size * whole, ""
        less = "not widened" if whole == 1 else f"widened by {whole} instead of {factor:g}"
        return d.size * whole, f"{less}: normalised over in {where}, where only whole multiples keep the statistics"
    size = max(int(d.size * factor / d.multiple + 0.5) * d.multiple, d.size)
    return size, f"{factor:g} times {d.size} is nearest to {d.size}" if size == d.size and factor > 1 else ""


def leaders(space: SearchSpace, names: Sequence[str]) -> dict[str, str]:
    """Dimension -> the one that grows instead of it.

    Where a dimension of a tensor is a product (heads x head size, groups x channels of each), one factor for all would
    count twice: the leading axis grows alone.
    """
    owner = {a: n for a, n in _owner(space).items() if n in names}
    leading: set[str] = set()
    following: dict[str, str] = {}
    for dims in space.trace.slots.values():
        for product in (p for dim in dims for p in naming.products(dim)):
            inside = list(dict.fromkeys(owner[a] for a in product if a in owner))
            if len(inside) < 2:
                continue
            first = next((n for n in inside if n in leading), None)
            first = first or next((n for n in inside if n not in following), inside[0])
            leading.add(first)
            for name in inside:
                if name not in leading:
                    following.setdefault(name, first)
    return following


def normalised(space: SearchSpace) -> dict[Axis, str]:
    """Free axis -> the module that takes statistics over it."""
    return {
        a: norm.path or "the model"
        for norm in space.trace.record.normalisations if norm.kind in KEPT_COUNT
        for dim in norm.dims for a in axes.atoms(dim) if not a.reasons
    }  # fmt: skip


def _owner(space: SearchSpace) -> dict[Axis, str]:
    return {a: n for n, d in space.dimensions.items() for a in d.axes}


def _targets(space: SearchSpace, sizes: Mapping[str, int]) -> dict[Axis, int]:
    """Axis -> its new size."""
    return {a: d.count(a.size, sizes[n]) for n, d in space.dimensions.items() if n in sizes for a in d.axes}


# -- zeros: where new elements are consumed ----------------------------------------------------------------------------


def _zeros(space: SearchSpace, targets: Mapping[Axis, int], quiet: Mapping[Axis, str]) -> tuple[Zeros, dict[Axis, str]]:
    """Where the weights of new elements must be zero; axes for which there is no such place, with the reason."""
    record = space.trace.record
    zeros: Zeros = {}
    refused = {a: "each of its elements has a module of its own" for a in targets if a in space.trace.experts}
    for dim, _ in record.least:
        inside = {a for a in axes.atoms(dim) if a in targets}
        refused |= dict.fromkeys(inside, "the largest of its elements are chosen, and new ones would be among them")
    for norm in record.normalisations:
        inside = {a for dim in norm.dims for a in axes.atoms(dim) if a in targets}
        if norm.kind == "sum" and inside:
            sites = _last_made(space, norm.source, inside, norm.op, quiet)
            if sites is None:
                refused |= dict.fromkeys(
                    inside, f"summed over in {norm.path or 'the model'}, with no weight to be zero"
                )
            else:
                _add(zeros, sites, inside)
    for c in record.contractions:
        inside = {a for a in axes.atoms(c.dim) if a in targets}
        if inside and not _add_consumer(space, c, inside, zeros, quiet):
            where = f"{c.path or 'the model'} ({c.operator})"
            refused |= dict.fromkeys(inside, f"new elements cannot be zero for one operand alone in {where}")
    return zeros, refused


def _add_consumer(
    space: SearchSpace, c: Contraction, inside: set[Axis], zeros: Zeros, quiet: Mapping[Axis, str]
) -> bool:
    """Let one operand of a contraction be zero at new elements: the weight, or else what made an activation last."""
    weights = [(v, own) for v, own in c.operands if not v.data and v.params]
    options = [_consuming(space, v, own, inside, quiet) for v, own in weights]
    for i, (value, _) in enumerate(c.operands):
        if value.data:
            others = {n for j, (v, _) in enumerate(c.operands) if j != i for n in v.params}
            sites = _last_made(space, value, inside, c.op, quiet)
            # both operands made by one weight would both be zero, and neither would ever get a gradient
            options.append(None if sites is None or others & sites.keys() else sites)
    possible = [sites for sites in options if sites]
    if not possible:
        return False
    done = (s for s in possible if all(inside <= zeros.get(n, {}).get(i, set()) for n, at in s.items() for i in at))
    _add(zeros, next(done, possible[0]), inside)
    return True


def _add(zeros: Zeros, sites: Mapping[str, Sequence[int]], inside: set[Axis]) -> None:
    for name, positions in sites.items():
        for position in positions:
            zeros.setdefault(name, {}).setdefault(position, set()).update(inside)


def _consuming(
    space: SearchSpace, value: Value, own: Dim, inside: set[Axis], quiet: Mapping[Axis, str]
) -> dict[str, list[int]] | None:
    """The positions of a weight along which it is contracted; None where zeros would reach a normalised axis too."""
    slots = space.trace.slots
    if not inside.isdisjoint(quiet) and any(_used_elsewhere(space, n) for n in value.params):
        return None  # an embedding that is the output layer too makes the axis which is normalised
    return {n: [i for i, d in enumerate(slots[n]) if d is own] or _holding(slots[n], inside) for n in value.params}


def _used_elsewhere(space: SearchSpace, name: str) -> bool:
    """Whether a parameter has several names, or a module that runs several times."""
    path = name.rpartition(".")[0]
    calls = sum(call.path == path for call in space.trace.record.calls)
    return calls > 1 or name in space.trace.aliases.values()


def _last_made(
    space: SearchSpace, value: Value, inside: set[Axis], before: int, quiet: Mapping[Axis, str]
) -> dict[str, list[int]] | None:
    """The positions of the parameters of the module that made `value` last; None where a normalisation lies behind it."""
    read, slots = space.trace.record.read, space.trace.slots
    holding = {n: at for n in value.params if (at := _holding(slots[n], inside))}
    if not holding:
        return None
    last = max(holding, key=lambda n: read.get(n, 0))
    module = last.rpartition(".")[0]
    made = {n: at for n, at in holding.items() if n.rpartition(".")[0] == module}
    taken = [
        n.op for n in space.trace.record.normalisations
        if n.op < before and any(a in quiet for a in inside & {a for dim in n.dims for a in axes.atoms(dim)})
    ]  # fmt: skip
    return made if not taken or read.get(last, 0) >= max(taken) else None


def _holding(dims: Sequence[Dim], inside: set[Axis]) -> list[int]:
    return [i for i, d in enumerate(dims) if not inside.isdisjoint(axes.atoms(d))]


def _uneven(space: SearchSpace, targets: Mapping[Axis, int]) -> dict[Axis, str]:
    """Axes that are normalised together with others which grow by another factor: statistics would shift."""
    refused: dict[Axis, str] = {}
    for norm in space.trace.record.normalisations:
        for dim in norm.dims if norm.kind in KEPT_COUNT else ():
            if _times(dim, targets) is None:
                reason = f"normalised in {norm.path or 'the model'} together with axes that do not grow as much"
                refused |= {a: reason for a in axes.atoms(dim) if a in targets}
    return refused


def _times(dim: Dim, targets: Mapping[Axis, int]) -> int | None:
    """How often each element of `dim` is there in the wider network, None where that differs."""
    times = 1
    for a in axes.factors(dim):
        parts = {_times(part, targets) for part in a.sum} if a.sum is not None else {targets.get(a, a.size) // a.size}
        one = parts.pop()
        if parts or one is None:
            return None
        times *= one
    return times


# -- the wider model ---------------------------------------------------------------------------------------------------


def build(space: SearchSpace, widths: Widths, model: nn.Module, noise: float, seed: int) -> nn.Module:
    """A copy of `model` with `widths`, not yet verified."""
    targets = _targets(space, widths.sizes)
    indices = {a: torch.arange(n) % a.size for a, n in targets.items()}
    loud = [a for a in targets if a not in normalised(space)]
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)

    def fill(name: str, t: Tensor) -> Tensor:
        dims = space.trace.slots.get(name, ())
        if noise and name in parameters and t.dim() > 1 and t.is_floating_point():
            t = _noisy(t, dims, targets, loud, noise, generator)
        for position, at in widths.zeros.get(name, {}).items():
            new = ~old_elements(dims[position], targets, at)
            t = t.index_fill(position, new.nonzero()[:, 0].to(t.device), 0)
        return t

    wide, _ = resize(model, space.trace, space.attributes, indices, fill)
    return wide


def old_elements(dim: Dim, targets: Mapping[Axis, int], of: Iterable[Axis]) -> Tensor:
    """Which elements of the widened `dim` are old along the axes `of`: booleans, (new size of the dimension,)."""
    wanted = set(of)
    masks = {a: torch.arange(n) < (a.size if a in wanted else n) for a, n in targets.items()}
    return axes.kept(dim, masks)


def _noisy(
    t: Tensor, dims: Sequence[Dim], targets: Mapping[Axis, int], loud: Sequence[Axis], noise: float,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Noise of `noise` standard deviations on what is new along the `loud` axes, equal for copies along the others."""
    inside = [[a for a in axes.atoms(d) if a in targets] for d in dims]
    if not any(a in loud for some in inside for a in some):
        return t
    extra = torch.randn(t.shape, generator=generator) * (noise * float(t.float().std()))
    same = {a: torch.arange(n) if a in loud else torch.arange(n) % a.size for a, n in targets.items()}
    new = torch.zeros([1] * t.dim(), dtype=torch.bool)
    for position, dim in enumerate(dims):
        if inside[position]:
            extra = extra.index_select(position, axes.gathered(dim, same, targets))
            shape = [1] * t.dim()
            shape[position] = -1
            new = new | ~old_elements(dim, targets, loud).view(shape)
    return t + (extra * new).to(t.device, t.dtype)


def untrainable(
    space: SearchSpace, widths: Widths, wide: nn.Module, loss: Callable[[nn.Module], Tensor]
) -> dict[str, str]:
    """Dimensions whose new elements get no gradient where the old ones do, so that they would stay dead for ever."""
    targets = _targets(space, widths.sizes)
    parameters = dict(wide.named_parameters())
    for p in parameters.values():
        p.requires_grad_(p.is_floating_point())
    try:
        with torch.enable_grad():
            value = loss(wide)
            if not value.requires_grad:
                return {}
            value.backward()
    except RuntimeError:  # a forward that writes in place, say: nothing can be said
        return {}
    moving = {a: [False, False] for a in targets}  # whether old, and new elements have a gradient
    for name, dims in space.trace.slots.items():
        grad = parameters[name].grad if name in parameters else None
        for position, dim in enumerate(dims if grad is not None else ()):
            inside = [a for a in axes.atoms(dim) if a in targets]
            if inside:
                assert grad is not None
                along = (
                    (grad != 0).sum([i for i in range(grad.dim()) if i != position]) if grad.dim() > 1 else grad != 0
                )
                found = along.cpu() > 0
                for a in inside:
                    old = old_elements(dim, targets, [a])
                    moving[a] = [moving[a][0] or bool(found[old].any()), moving[a][1] or bool(found[~old].any())]
    owner = _owner(space)
    return {
        owner[a]: "its new elements would never get a gradient" for a, (old, new) in moving.items() if old and not new
    }


def ranges_of(mask: Tensor) -> list[list[int]]:
    """True elements of a mask as half-open ranges."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1, dtype=torch.int32))
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [[int(a), int(b)] for a, b in zip(starts, ends)]
