"""Start larger: a wider and deeper network that computes what the given one does.

    large = expand(model, example_inputs, width=1.5, depth=2)

A network can then be searched from a larger version of itself and brought back to its own budget.  How widths grow
without a change of the function is in `widen.py`, how stacks of blocks do in `deepen.py`.  What was done, what was not
and why is left on the model as plain data in `model.dmscale_expansion`:

- widened, deepened: dimension -> [size before, size after];
- kept: dimension -> why it is as it was, or grew less than asked for;
- added: paths of the blocks put in;
- original: parameter or buffer -> position -> half-open ranges of the elements that the given network had.

`expansion_origin` names the structure that takes all new elements out again.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import axes, certify, deepen, known, running, tracing, widen
from .axes import Axis
from .errors import DmscaleError, ExportError, did_you_mean
from .export import EXPANSION, PLAN
from .space import SearchSpace, trace
from .structure import Structure
from .widen import Widths


def expand(
    model: nn.Module,
    example_inputs: Any,
    *,
    width: float | Mapping[str, float] = 1.0,
    depth: float | Mapping[str, int] = 1.0,
    freeze: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    noise: float = 0.1,
    seed: int = 0,
) -> nn.Module:
    """A wider and deeper model of the same class whose outputs are those of `model`.

    New elements of an axis copy the incoming weights of old ones, with noise, and have zero outgoing weights; added blocks
    start as the identity (Net2Net, Chen et al., ICLR 2016; `widen` and `deepen` say where this differs).  Axes that are
    normalised over (LayerNorm, RMSNorm) grow by whole factors only, and without noise.

        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> expand(model, torch.randn(2, 8), width=1.5)[0]
        Linear(in_features=8, out_features=48, bias=True)

    Args:
        model: any module with elements; it is left as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device.
        width: a factor of at least 1 for all widths and heads, or a dict of factors by glob over the names that `trace` shows,
            of which the last match counts.  Where a dimension of a tensor is a product (heads x head size, groups x channels)
            and one glob names several of its axes, the leading one grows alone.  Sizes are rounded to the nearest.
        depth: a factor of at least 1 for all stacks of blocks, or a dict of numbers of blocks (no factors) by glob.
        freeze: globs of dimensions to leave alone, as in `trace`.
        only: globs of the dimensions to expand; all by default.
        noise: standard deviation of the noise on new incoming weights as a share of the tensor's own; 0 gives exact copies.
            The outputs do not depend on it.
        seed: of the noise.
    Returns:
        a plain model; `model.dmscale_expansion` says what grew, what did not, and why.
    Raises:
        TraceError: the model does not run on the example inputs.
        DmscaleError: a factor is below 1, a glob matches nothing or only what cannot grow, the model has no elements (meta
            device), or nothing can grow at all.
        ExportError: the larger model differs from the given one.
    """
    _check_numbers(width, depth, noise)
    if isinstance(model, nn.Module) and any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise DmscaleError(
            f"{type(model).__name__} is on the meta device and has no weights to keep the function of; load them first, or "
            "build the larger network from its own configuration"
        )
    space = trace(model, example_inputs, freeze=freeze, only=only)
    factors, reasons = _factors(space, width)
    blocks_wanted = _blocks_wanted(space, depth)
    if not any(f > 1 for f in factors.values()) and not blocks_wanted:
        raise DmscaleError(_nothing(space, width, depth, reasons))
    widths = _verified(space, widen.plan(space, factors, reasons), noise, seed)
    _check_asked_for(widths, width, factors)
    large = widen.build(space, widths, model, noise, seed)
    names = _same_names(model, large)
    original = _originals(space, widths)
    large, deeper, not_deeper = _deepened(space, large, blocks_wanted, names, strict=isinstance(depth, Mapping))
    if not widths.sizes and not deeper:
        raise DmscaleError(_nothing(space, width, depth, widths.reasons | not_deeper))
    _check_same(space, large)
    tensors = (*large.named_parameters(), *large.named_buffers())
    record = {
        "widened": {n: [space.dimensions[n].size, size] for n, size in widths.sizes.items()},
        "deepened": deeper,
        "kept": widths.reasons | not_deeper,
        "added": [path for path, m in large.named_modules() if m.__dict__.pop(deepen.ADDED, None) is not None],
        "original": {n: original[names[id(t)]] for n, t in tensors if names[id(t)] in original},
    }
    large.__dict__.pop(PLAN, None)  # of an earlier export: sizes and blocks are no longer those
    large.__dict__[EXPANSION] = record
    return large


# -- what is asked for -------------------------------------------------------------------------------------------------


def _check_numbers(width: float | Mapping[str, float], depth: float | Mapping[str, int], noise: float) -> None:
    """Refuse what no model can be expanded by, before any work."""
    for argument, given in (("width", width), ("depth", depth)):
        for glob, value in given.items() if isinstance(given, Mapping) else [("", given)]:
            what = f"{argument} of {glob!r}" if glob else argument
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise DmscaleError(f"{what} is {value!r}; give a number of at least 1")
            if value < 1:
                raise DmscaleError(
                    f"{what} is {value:g}; give at least 1: an expansion makes nothing smaller, an export does"
                )
    if isinstance(noise, bool) or not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise DmscaleError(f"noise is {noise!r}; give a share of the weights' standard deviation, 0 or more")
    if width == 1 and depth == 1:
        raise DmscaleError("width and depth are 1: give factors above 1, for example width=1.5, depth=2")


def _factors(space: SearchSpace, width: float | Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """Dimension -> its factor, and dimension -> why it has none of its own."""
    names = [n for n, d in space.dimensions.items() if d.kind != "depth"]
    asked = dict(width) if isinstance(width, Mapping) else {"*": width}
    factors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for glob, factor in asked.items():
        matched = [n for n in names if fnmatch.fnmatchcase(n, glob)]
        if isinstance(width, Mapping) and not matched:
            raise DmscaleError(_no_match(space, "width", glob, names))
        following = widen.leaders(space, matched)
        for name in matched:
            if name in following:
                factors.pop(name, None)
                reasons[name] = f"'{following[name]}' grows instead: their product is the width of a tensor"
            else:
                factors[name] = float(factor)
                reasons.pop(name, None)
    return factors, reasons if any(f > 1 for f in factors.values()) else {}


def _blocks_wanted(space: SearchSpace, depth: float | Mapping[str, int]) -> dict[str, int]:
    """Stack -> how many blocks it shall have, for those that shall have more."""
    sizes = {n: len(s.paths) for n, s in space.stacks.items()}
    wanted: dict[str, int] = {}
    if not isinstance(depth, Mapping):
        larger = {n: int(size * depth + 0.5) for n, size in sizes.items()}
        return {n: count for n, count in larger.items() if count > sizes[n]}
    for glob, count in depth.items():
        matched = [n for n in sizes if fnmatch.fnmatchcase(n, glob)]
        if not matched:
            raise DmscaleError(_no_match(space, "depth", glob, list(sizes)))
        for name in matched:
            if not isinstance(count, int) or count < sizes[name]:
                raise DmscaleError(
                    f"depth of {glob!r} is {count!r}; '{name}' has {sizes[name]} blocks: give a whole number, not less"
                )
            wanted[name] = count
    return {n: count for n, count in wanted.items() if count > sizes[n]}


def _no_match(space: SearchSpace, argument: str, glob: str, names: Sequence[str]) -> str:
    frozen = next((n for n in space.frozen if fnmatch.fnmatchcase(n, glob)), None)
    if frozen is not None:
        return f"{argument}={{{glob!r}: ...}} matches only what cannot change: '{frozen}' ({space.frozen[frozen]})"
    what = "width or heads" if argument == "width" else "stack of blocks"
    return f"{argument}={{{glob!r}: ...}} matches no {what}{did_you_mean(glob, names)}"


def _nothing(space: SearchSpace, width: Any, depth: Any, reasons: Mapping[str, str]) -> str:
    why = list(reasons.items())[:3] or list(space.frozen.items())[:3]
    shown = "".join(f"\n  {name}: {reason}" for name, reason in why)
    return f"nothing in {type(space.model).__name__} can grow by width={width!r}, depth={depth!r}{shown}"


def _check_asked_for(widths: Widths, width: Any, factors: Mapping[str, float]) -> None:
    """Refuse a glob of which nothing can grow."""
    for glob, factor in width.items() if isinstance(width, Mapping) else ():
        matched = [n for n in factors if fnmatch.fnmatchcase(n, glob)]
        if factor > 1 and matched and not any(n in widths.sizes for n in matched):
            reasons = "".join(f"\n  {n}: {widths.reasons[n]}" for n in matched[:3] if n in widths.reasons)
            raise DmscaleError(f"width={{{glob!r}: {factor:g}}}: nothing that it names can grow so{reasons}")


# -- proof -------------------------------------------------------------------------------------------------------------


def _verified(space: SearchSpace, widths: Widths, noise: float, seed: int) -> Widths:
    """`widths` without what changes the function, or could never be trained, on weights that leave nothing trivial."""
    model, inputs = certify.trial_model(space)
    expected = _results(model, inputs)
    asked = dict(widths.sizes)

    def trial(names: Sequence[str]) -> str | None:
        some = widen.plan(space, {n: asked[n] / space.dimensions[n].size for n in names}, {})
        try:
            wide = widen.build(space, some, model, noise, seed)
            error = running.relative_error(_results(wide, inputs), expected)
        except Exception as failure:
            first = str(failure).splitlines()[0][:200] if str(failure) else ""
            return f"failed its trial: {type(failure).__name__}: {first}"
        return (
            None if error <= certify.tolerance(model) else f"failed its trial: the outputs would change by {error:.1e}"
        )

    bad: dict[str, str] = {}
    if widths.sizes and trial(list(asked)) is not None:
        bad = certify.at_fault(trial, list(asked)) or dict.fromkeys(asked, "failed its trial together with others")
    kept = _without(space, widths, bad)
    if kept.sizes:
        wide = widen.build(space, kept, model, noise, seed)
        kept = _without(space, kept, widen.untrainable(space, kept, wide, lambda m: _loss(m, inputs)))
    return kept


def _without(space: SearchSpace, widths: Widths, bad: Mapping[str, str]) -> Widths:
    if not bad:
        return widths
    factors = {n: size / space.dimensions[n].size for n, size in widths.sizes.items() if n not in bad}
    return widen.plan(space, factors, widths.reasons | dict(bad))


def _check_same(space: SearchSpace, large: nn.Module) -> None:
    inputs = space.example_inputs
    error = running.relative_error(_results(large, inputs), _results(space.model, inputs))
    if not error <= certify.tolerance(space.model):
        raise ExportError(
            f"the expanded {type(space.model).__name__} differs from the given one by {error:.1e} (relative). Please report "
            "it; freeze= and only= leave dimensions out meanwhile."
        )


def _results(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point outputs in evaluation mode, without inner activations that are handed out beside them."""
    with running.evaluating(model), certify.repeatable(model):
        args, kwargs = running.arguments(inputs)
        return _floats(running.call(model, args, kwargs))


def _floats(out: Any) -> list[Tensor]:
    fields = out.items() if isinstance(out, Mapping) else [("", out)]
    tensors = [t for key, value in fields if not known.is_by_product(out, key) for t in running.tensors_in(value)]
    return [t for t in tensors if t.is_floating_point()]


def _loss(model: nn.Module, inputs: Any) -> Tensor:
    """A number that every output has a say in."""
    args, kwargs = running.arguments(inputs)
    with running.evaluating(model), certify.repeatable(model):
        found = _floats(model(*args, **kwargs))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for t in found:
        total = total + (t.float().cpu() * torch.randn(t.shape, generator=generator)).sum()
    return total


# -- depth -------------------------------------------------------------------------------------------------------------


def _deepened(
    space: SearchSpace, large: nn.Module, wanted: Mapping[str, int], names: dict[int, str], strict: bool
) -> tuple[nn.Module, dict[str, list[int]], dict[str, str]]:
    """The model with more blocks, stack -> [blocks before, after], and why other stacks have no more."""
    done: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    by_container: dict[str, list[str]] = {}
    for name in wanted:
        by_container.setdefault(space.stacks[name].container, []).append(name)
    zeros: dict[str, tuple[str, ...]] = {}
    copies: dict[str, dict[str, int]] = {}
    for container, stacks in by_container.items():
        for name in stacks:
            try:
                found = deepen.sources(space, large, space.stacks[name])
            except deepen.NoIdentity as failure:
                reasons[name] = str(failure)
                continue
            zeros |= found
            more = deepen.spread(wanted[name] - len(space.stacks[name].paths), len(found))
            copies.setdefault(container, {}).update(zip(found, more))
    for container in sorted(copies, key=lambda c: -c.count(".")):  # inner first: outer ones renumber
        stacks = [n for n in by_container[container] if n not in reasons]
        deeper = _settled(space, large, container, copies[container], zeros, names)
        if deeper is None:
            reasons |= dict.fromkeys(stacks, "failed its trial: with more blocks the model fails, or does not run them")
            continue
        large = deeper
        done |= {n: [len(space.stacks[n].paths), wanted[n]] for n in stacks}
    if strict and reasons:
        raise DmscaleError("".join(f"depth of '{n}' cannot grow: {reason}\n" for n, reason in reasons.items()).rstrip())
    return large, done, reasons


def _settled(
    space: SearchSpace, model: nn.Module, container: str, copies: Mapping[str, int],
    zeros: Mapping[str, tuple[str, ...]], names: dict[int, str],
) -> nn.Module | None:  # fmt: skip
    """`model` with copies of blocks of `container`, all of which run; where the model counts its blocks, counted anew."""
    before = len(dict(model.get_submodule(container).named_children()))
    deeper = deepen.deepen(space, model, container, copies, zeros, names)
    if _works(space, deeper):
        return deeper
    for attribute in deepen.counters(deeper, container, before):
        again = deepen.counted_anew(deeper, attribute, sum(copies.values()))
        if _works(space, again):
            return again
    return None


def _works(space: SearchSpace, model: nn.Module) -> bool:
    try:
        with certify.repeatable(model):
            out, all_ran = deepen.run_added(model, space.example_inputs)
        expected = _results(space.model, space.example_inputs)
    except Exception:  # whatever a forward raises that counts its blocks
        return False
    return all_ran and running.relative_error(_floats(out), expected) <= certify.tolerance(space.model)


# -- the way back ------------------------------------------------------------------------------------------------------


def _same_names(model: nn.Module, large: nn.Module) -> dict[int, str]:
    """id of a tensor of the wider model -> its name in the given one."""
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in large.named_parameters()]
    return {id(t): n for n, t in (*large.named_parameters(), *large.named_buffers())}


def _originals(space: SearchSpace, widths: Widths) -> dict[str, dict[int, list[list[int]]]]:
    """Parameter or buffer -> position -> ranges of its old elements, for every dimension that grew."""
    targets = {
        a: d.count(a.size, widths.sizes[n]) for n, d in space.dimensions.items() if n in widths.sizes for a in d.axes
    }
    return {
        name: found
        for name, dims in space.trace.slots.items()
        if (found := {
            i: widen.ranges_of(widen.old_elements(dim, targets, targets))
            for i, dim in enumerate(dims) if any(a in targets for a in axes.atoms(dim))
        })
    }  # fmt: skip


def expansion_origin(space: SearchSpace) -> Structure:
    """The structure that keeps what the network had before `expand`; its export is that network again.

    Args:
        space: `trace` of a model that `expand` returned.
    Raises:
        DmscaleError: the model was not made by `expand`, or something that grew is frozen in this space.
    """
    record = getattr(space.model, EXPANSION, None)
    if record is None:
        raise DmscaleError(f"{type(space.model).__name__} was not made by dmscale.expand: it has no {EXPANSION}")
    added = set(record["added"])
    blocks_kept = {s.name: tuple(i for i, p in enumerate(s.paths) if p not in added) for s in space.stacks.values()}
    unreachable = added - {p for s in space.stacks.values() for p in s.paths}
    if unreachable:
        raise DmscaleError(
            f"the added block '{min(unreachable)}' cannot be removed in this space; trace without freezing depth"
        )
    old = _old_masks(space, record["original"])
    kept: dict[str, tuple[int, ...]] = dict(blocks_kept)
    sizes: dict[str, int] = {n: len(k) for n, k in blocks_kept.items()}
    for name, d in space.dimensions.items():
        if d.kind != "depth":
            for a, member in zip(d.axes, d.members):
                kept[member] = tuple(old[a].nonzero()[:, 0].tolist()) if a in old else tuple(range(a.size))
            sizes[name] = len(kept[d.members[0]]) * d.size // d.axes[0].size
    return Structure(
        {n: sizes[n] for n in space.dimensions},
        {m: kept[m] for d in space.dimensions.values() for m, _ in space._members(d)},
        {n: d.size for n, d in space.dimensions.items()},
    )


def _old_masks(space: SearchSpace, original: Mapping[str, Mapping[int, Any]]) -> dict[Axis, Tensor]:
    """Free axis -> which of its elements are old; every recorded tensor must come out as it was."""
    free = {a for d in space.dimensions.values() for a in d.axes}
    old: dict[Axis, Tensor] = {}
    recorded = [
        (name, int(i), _mask(space.trace, name, int(i), ranges))
        for name, positions in original.items() for i, ranges in positions.items()
    ]  # fmt: skip
    for name, position, mask in recorded:
        dim = space.trace.slots[name][position]
        for a in axes.atoms(dim):
            if a in free and a not in old:
                at = axes.coordinates(dim)[a]
                old[a] = torch.zeros(a.size, dtype=torch.bool)
                old[a][at[mask & (at >= 0)]] = True
    for name, position, mask in recorded:
        dim = space.trace.slots[name][position]
        if not torch.equal(axes.kept(dim, old) & torch.ones_like(mask), mask):
            why = next((f": {r}" for r in axes.reasons(dim)), "")
            raise DmscaleError(f"'{name}' grew along dimension {position}, which cannot shrink back in this space{why}")
    return old


def _mask(trace: tracing.Trace, name: str, position: int, ranges: Sequence[Sequence[int]]) -> Tensor:
    dims = trace.slots.get(name)
    if dims is None or position >= len(dims):
        raise DmscaleError(
            f"the model has no '{name}' any more; expansion_origin is of the model as expand returned it"
        )
    mask = torch.zeros(axes.size(dims[position]), dtype=torch.bool)
    for start, end in ranges:
        mask[start:end] = True
    return mask
