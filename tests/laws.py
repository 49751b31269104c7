"""The law of operator rules: slicing the inputs and running equals running and slicing the output.

`check` runs one call of an ATen operator under a `Tracer`, keeps a random part of every free axis that met in it, runs
the operator again on the sliced inputs, and compares with the sliced outputs of the full run.  What rules promise about
sums is tested as they promise it: along a contracted axis, slicing equals zeroing what is removed in any one operand.
Axes that a rule freezes or declares normalised over are not tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from dmscale import axes
from dmscale.arrivals import _leading
from dmscale.tracer import Tracer

aten = torch.ops.aten
Tensor = torch.Tensor


@dataclass
class Call:
    """One call of an operator overload, with copies of its arguments."""

    func: Any
    args: tuple
    kwargs: dict

    def copied(self) -> tuple[tuple, dict]:
        """The arguments with fresh tensors; a tensor given twice stays one tensor."""
        memo: dict[int, Tensor] = {}

        def copy(t: Tensor) -> Tensor:
            return memo.setdefault(id(t), t.detach().clone())

        return tree_map_only(Tensor, copy, (self.args, self.kwargs))

    def __str__(self) -> str:
        def short(t: Tensor) -> str:
            return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"

        args, kwargs = tree_map_only(Tensor, short, (self.args, self.kwargs))
        return f"{self.func}(*{args}, **{kwargs})"


class Recorder(TorchDispatchMode):
    """Notes calls of the operator overloads that `wanted` accepts: `cap` of each, `share` of them from one source."""

    def __init__(self, wanted: Any, cap: int, share: int):
        super().__init__()
        self.wanted, self.cap, self.share = wanted, cap, share
        self.calls: dict[Any, list[Call]] = {}
        self.source: dict[Any, int] = {}

    def next_source(self) -> None:
        """What follows comes from another source."""
        self.source = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.wanted(func) and is_small((args, kwargs)):
            found = self.calls.setdefault(func, [])
            if len(found) < self.cap and self.source.get(func, 0) < self.share:
                self.source[func] = self.source.get(func, 0) + 1
                found.append(Call(func, *Call(func, args, kwargs).copied()))
        return func(*args, **kwargs)


def is_small(tree: Any) -> bool:
    """Whether a tree of arguments has a tensor with an axis, and few elements in all."""
    tensors = [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]
    return any(t.dim() and t.numel() > 1 for t in tensors) and sum(t.numel() for t in tensors) <= 20000


@dataclass
class Verdict:
    """What one check found: `problems` in words, `proven` the number of axes that the law was tried on."""

    problems: list[str] = field(default_factory=list)
    proven: int = 0
    conflict: bool = False


def is_arbitrary(func: Any) -> bool:
    """Whether the values differ from run to run, so that only sizes can be compared."""
    uninitialised = ("empty_like", "new_empty", "new_empty_strided")
    return torch.Tag.nondeterministic_seeded in func.tags or func._overloadpacket.__name__ in uninitialised


class Checked:
    """A traced call: axes of all that goes in and out."""

    def __init__(self, call: Call):
        self.call = call
        self.args, self.kwargs = call.copied()
        self.tracer = Tracer()
        self.tracer.making_sized = True
        self.tensors = list({id(t): t for t in _tensors((self.args, self.kwargs))}.values())
        for t in self.tensors:
            self.tracer.watch(t)
        values = [self.tracer.value(t) for t in self.tensors]
        self.originals = [t.clone() for t in self.tensors]  # operators may write into their arguments
        # not entered as a mode: composite operators would be taken apart before it sees them
        self.out = self.tracer.__torch_dispatch__(call.func, (), self.args, self.kwargs)
        self.values, self.dims = values, [v.dims for v in values]
        self.position = {id(t): i for i, t in enumerate(self.tensors)}
        self.outs = _tensors(self.out)
        self.out_dims = [self.tracer.dims(o) for o in self.outs]

    def dims_of(self, t: Tensor) -> Any:
        """The dimensions of an argument, as they were before the call."""
        return self.dims[self.position[id(t)]]

    def run(self, tensors: list[Tensor], sizes: dict | None = None) -> list[Tensor]:
        """Run the operator on other tensors in place of its own; with `sizes`, its int arguments follow."""
        func, args, kwargs = self.call.func, self.args, self.kwargs
        if sizes is not None:
            func, args, kwargs = adapted(self, lambda dim: axes.measure(dim, sizes))
        args, kwargs = tree_map_only(
            Tensor,
            lambda t: tensors[self.position[id(t)]].clone() if id(t) in self.position else t,
            (args, kwargs),
        )
        return _tensors(func(*args, **kwargs))

    def free(self) -> list[axes.Axis]:
        """The atoms that the law is tried on."""
        atoms = dict.fromkeys(a for dims in (*self.dims, *self.out_dims) for d in dims for a in axes.atoms(d))
        normalised = {
            a for n in self.tracer.record.normalisations if n.kind != "sum" for d in n.dims for a in axes.atoms(d)
        }
        # a squeeze of everything takes with it what shrinks to one
        least = 3 if self.call.func in (aten.squeeze.default, aten.squeeze_.default) else 2
        return [a for a in atoms if a.size >= least and not a.reasons and a not in normalised]

    def summed(self) -> list[tuple[int, Any]]:
        """(argument, its dimension) for everything that is summed over."""
        record = self.tracer.record
        found = [(v, dim) for c in record.contractions for v, dim in c.operands]
        found += [(n.source, dim) for n in record.normalisations if n.kind == "sum" for dim in n.dims]
        return [(self.values.index(v), dim) for v, dim in found if v in self.values]


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def sliced(t: Tensor, dims: Any, masks: dict) -> Tensor:
    """`t` cut to what `masks` keep of its axes."""
    for i, dim in enumerate(dims):
        keep = axes.kept(dim, masks).bool()
        if not keep.all():
            t = t.index_select(i, keep.nonzero()[:, 0])
    return t


def zeroed(t: Tensor, dims: Any, own: Any, masks: dict) -> Tensor:
    """`t` with zeros where `masks` remove elements of its dimension `own`."""
    i = next(i for i, d in enumerate(dims) if d is own or axes.same(d, own))
    keep = axes.kept(own, masks).bool().reshape([-1 if j == i else 1 for j in range(t.dim())])
    return torch.where(keep, t, torch.zeros((), dtype=t.dtype))


def check(call: Call, seed: int = 0) -> Verdict:
    """Try the law on one call: each free axis alone (a few of them), then all of them together."""
    verdict = Verdict()
    generator = torch.Generator().manual_seed(seed)
    checked = Checked(call)
    for o, dims in zip(checked.outs, checked.out_dims):
        if [axes.size(d) for d in dims] != list(o.shape):
            verdict.problems.append(f"{call}: traced sizes {[axes.size(d) for d in dims]} of {list(o.shape)}")
    for conflict in checked.tracer.record.conflicts:
        verdict.conflict = True
        if "the rule gave" in conflict:
            verdict.problems.append(f"{call}: {conflict}")
    free = checked.free()
    for chosen in [[a] for a in free[:4]] + ([free] if len(free) > 1 else []):
        masks = {a: _some(a.size, generator) for a in chosen}
        problem = _try(checked, masks)
        verdict.proven += 1
        if problem:
            verdict.problems.append(f"{call}, keeping {[m.tolist() for m in masks.values()]}: {problem}")
    return verdict


def _some(n: int, generator: torch.Generator) -> Tensor:
    """A random half of `n` elements, two or more where that is not all."""
    keep = torch.zeros(n, dtype=torch.bool)
    keep[torch.randperm(n, generator=generator)[: 1 if n == 2 else max(2, n // 2)]] = True
    return keep


def _try(checked: Checked, masks: dict) -> str | None:
    sizes = {a: int(m.sum()) for a, m in masks.items()}
    small = [sliced(t, dims, masks) for t, dims in zip(checked.originals, checked.dims)]
    try:
        got = checked.run(small, sizes)
    except Exception as error:  # whatever an operator raises on wrong shapes
        return f"fails on sliced inputs: {type(error).__name__}: {str(error).splitlines()[0]}"
    touched = [(i, own) for i, own in checked.summed() if not axes.kept(own, masks).all()]
    references = []
    for i, own in touched:
        tensors = list(checked.originals)
        for j, other in touched:
            # what one contraction removes is removed from one operand; two sums, or contractions of two axes, remove both
            if i == j or not axes.same(other, own):
                tensors[j] = zeroed(tensors[j], checked.dims[j], other, masks)
        references.append(checked.run(tensors))
    for reference in references or [checked.outs]:
        if len(reference) != len(got):
            return f"{len(got)} outputs instead of {len(reference)}"
        for whole, part, dims in zip(reference, got, checked.out_dims):
            expected = sliced(whole, dims, masks)
            if expected.shape != part.shape:
                return f"gives {list(part.shape)} instead of {list(expected.shape)}"
            if not is_arbitrary(checked.call.func) and not _close(expected, part):
                return "gives other elements"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)  # float32 sums in another order


# -- int arguments that follow the sizes ---------------------------------------------------------------------

_ADAPTERS: dict[str, Any] = {}


def _adapts(*names: str) -> Any:
    def register(function: Any) -> Any:
        _ADAPTERS.update(dict.fromkeys(names, function))
        return function

    return register


def adapted(checked: Checked, size: Any) -> tuple[Any, tuple, dict]:
    """The call with its int arguments set to what `size` says of the axes that they name."""
    func, args, kwargs = checked.call.func, list(checked.args), dict(checked.kwargs)
    adapter = _ADAPTERS.get(func._overloadpacket.__name__)
    if adapter is None:
        return func, tuple(args), kwargs
    names = [a.name for a in func._schema.arguments]
    given = dict(zip(names, args)) | kwargs
    func = adapter(checked, size, given) or func
    names = [a.name for a in func._schema.arguments]
    positional = [a.name for a in func._schema.arguments if not a.kwarg_only and a.name in given]
    assert positional == names[: len(positional)], "an argument was left out"
    return (
        func,
        tuple(given[n] for n in positional),
        {n: given[n] for n in names if n in given and n not in positional},
    )


def _contiguous(sizes: list[int]) -> list[int]:
    return list(torch.empty(sizes, device="meta").stride())


@_adapts("view", "_unsafe_view", "reshape", "expand", "_reshape_alias", "new_zeros", "new_ones", "new_empty",
         "new_full",
         "new_empty_strided", "as_strided", "as_strided_")  # fmt: skip
def _to_shape(checked: Checked, size: Any, given: dict) -> None:
    name = "shape" if "shape" in given else "size"
    if name in given:
        given[name] = [size(d) for d in checked.out_dims[0]]
        if "stride" in given:
            given["stride"] = _contiguous(given[name])


@_adapts("repeat")
def _repeat(checked: Checked, size: Any, given: dict) -> None:
    counts, own = given["repeats"], checked.dims_of(given["self"])
    lead = len(counts) - len(own)
    given["repeats"] = [size(d) // (size(own[i - lead]) if i >= lead else 1) for i, d in enumerate(checked.out_dims[0])]


@_adapts("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
def _split(checked: Checked, size: Any, given: dict) -> Any:
    for name in ("split_size", "chunks"):
        given.pop(name, None)
    dim = given.setdefault("dim", 0)
    given["split_sizes"] = [size(dims[dim]) for dims in checked.out_dims]
    return aten.split_with_sizes.default


@_adapts("slice", "narrow")
def _slice(checked: Checked, size: Any, given: dict) -> None:
    x, dim = given["self"], given.setdefault("dim", 0)
    own = checked.dims_of(x)[dim]
    if "length" in given:
        start, end = given["start"] % max(1, x.shape[dim]), None
    else:
        start, end, _ = slice(given.get("start"), given.get("end")).indices(x.shape[dim])
    if given.get("step", 1) != 1:
        given["start"], given["end"] = start, size(own) if end == x.shape[dim] else end
        return
    wanted = checked.outs[0].shape[dim]
    before, middle, _ = axes.cut(own, [start, wanted, x.shape[dim] - start - wanted])
    given["start"] = size(before) if start else 0
    if "length" in given:
        given["length"] = size(middle)
    else:
        given["end"] = given["start"] + (size(middle) if wanted else 0)


@_adapts("constant_pad_nd")
def _pad(checked: Checked, size: Any, given: dict) -> None:
    own, pad = checked.dims_of(given["self"]), list(given["pad"])
    for j in range(len(pad) // 2):
        dim, (before, after) = own[-1 - j], pad[2 * j : 2 * j + 2]
        if min(before, after) < 0:
            total = axes.size(dim)
            cut = axes.cut(dim, [max(-before, 0), total + min(before, 0) + min(after, 0), max(-after, 0)])
            pad[2 * j : 2 * j + 2] = [-size(c) if p < 0 else p for c, p in ((cut[0], before), (cut[2], after))]
        if max(before, after) > 0:
            parts = axes.factors(checked.out_dims[0][-1 - j])[0].sum
            for end, at in (before, 0), (after, -1):
                if end > 0 and parts is not None:
                    pad[2 * j - at] = size(parts[at])
    given["pad"] = pad


@_adapts("convolution")
def _convolution(checked: Checked, size: Any, given: dict) -> None:
    channels = checked.dims_of(given["input"])[-given["weight"].dim() + 1]
    given["groups"] = size(_leading(channels, given["groups"]))


@_adapts("channel_shuffle", "native_channel_shuffle")
def _shuffle(checked: Checked, size: Any, given: dict) -> None:
    given["groups"] = size(_leading(checked.dims_of(given["self"])[1], given["groups"]))


@_adapts("native_group_norm")
def _group_norm(checked: Checked, size: Any, given: dict) -> None:
    batch, channels, *spatial = checked.dims_of(given["input"])
    given["N"], given["C"] = size(batch), size(channels)
    given["HxW"] = size(tuple(a for d in spatial for a in d))
    given["group"] = size(_leading(channels, given["group"]))
