"""How much of a network is free, what holds the rest, and what would free it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import axes, naming
from .axes import Axis, Dim

if TYPE_CHECKING:
    from .space import SearchSpace

PLAIN_NUMBER = "it makes a plain number (a scale): compute that in __init__ and keep it as a float"
# How a reason begins -> what would free the axis.  Those that nothing in the model's code would change come first: an
# axis with several reasons counts for the first of them.
REMEDIES: dict[str, str] = {
    "an axis of the model's output": "it is an output of the model: build the model with fewer (classes, vocabulary)",
    "an axis of the model's input": "it is an input of the model: build the model for smaller inputs",
    "frozen by freeze=": "it is yours to thaw: leave it out of freeze=",
    "not named in only=": "it is yours to thaw: name it in only=",
    "vocabulary": "its elements are picked by token number: build the model with a smaller vocabulary",
    "empty": "it has no elements",
    "kernel size": "a kernel keeps its size",
    "the forward never reads it": "give example inputs that use it, or take it out of the model",
    "failed its trial at": "write one branch that serves all sizes; if that is so already, please report it, with the model",
    "failed its trial": "please report it, with the model",
    "no rule for": "register a rule for the operator: docs/architecture.md, How to add a rule",
    "softmax over it": "write the softmax as e = x.exp() and e / e.sum(dim, keepdim=True)",
    "the default scale of attention": "pass scale= to scaled_dot_product_attention",
    "its size is fixed in a power": PLAIN_NUMBER,
    "its size is fixed in a division": PLAIN_NUMBER,
    "its size is fixed in a float()": PLAIN_NUMBER,
    "its size is fixed in a arithmetic": PLAIN_NUMBER,
    "its size is fixed in": "write that size as x.shape[i] or as an int attribute of the module, not as a number",
    "a size computed in": "compute that size from attributes by + - * and divisions without a remainder",
    "normalised inside": "move the normalisation into a module of its own, or write it with x.mean and x.var",
    "normalised over several": "move the normalisation into a module of its own, over one axis",
    "mean over it": "call x.mean(...) in the module's own forward, alike in every call",
    "variance over it": "call x.var(...) or x.std(...) in the module's own forward, alike in every call",
    "reduced over it": "call x.amax(...) or x.amin(...) in the module's own forward; positions of a maximum cannot follow",
    "summed over": "call x.sum(...) in the module's own forward, or make the summands by a layer with a weight",
    "selected by index": "take its parts by split or chunk, not by number",
    "indexed": "take its parts by split or chunk, not by number",
    "picked by a mask": "take its parts by split or chunk, not by a mask",
    "written by": "join its parts by cat, do not write them by number",
    "a constant": "make the constant that it meets a buffer, or from x.shape",
    "made by": "make the constant that it meets a buffer, or from x.shape",
    "two views of it do not fit": "use numbers of groups, heads or windows of which one divides the other",
    "conflict (a part ends inside of a group": "choose numbers of groups (of heads, of channels) that divide every part",
    "conflict": "sizes meet there in two ways that do not fit: please report it, with the model",
    "the forward writes to its output": "write that sum out of place, y = y + x and not y += x",
    "its elements are read by": "do it with tensors: what Python makes of the elements cannot be followed",
    "statistics are taken": "it is a batch or spatial axis",
}
# How reasons begin that only another model would take away.
_FOR_GOOD = (
    "an axis of the model's output", "an axis of the model's input", "vocabulary", "empty", "kernel size",
    "statistics are taken",
)  # fmt: skip
BY_HAND = "it is yours to thaw: trace anew, without the call of space.freeze"
OTHERWISE = "its operator depends on the order or number of its elements: replace the operator, or keep the size"


@dataclass(frozen=True)
class Cause:
    """A reason why axes are frozen.

    reason: without its place, with the operator in parentheses.
    axes: names of the axes that it holds, as in `SearchSpace.frozen`.
    macs, params: share of the model's MACs and parameters that these axes index.
    remedy: what would free them.
    """

    reason: str
    axes: tuple[str, ...]
    macs: float
    params: float
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {**vars(self), "axes": list(self.axes)}


def free_share(space: SearchSpace) -> dict[str, float]:
    """The share of MACs and of parameters that goes when every width and the heads are at their minimum."""
    least = space.cost(space.structure({n: d.lowest for n, d in space.dimensions.items() if d.kind != "depth"}))
    return {m: 1 - least[m] / max(space.cost()[m], 1) for m in ("macs", "params")}


def find(space: SearchSpace) -> list[Cause]:
    """Why axes of `space` are frozen, what holds most of the network first."""
    held: dict[tuple[str, str], list[Axis]] = {}
    names = naming.name_axes(space.trace)
    for a in names:
        if a.reasons:
            mine = next((r for r in a.reasons if r in space.options.by_hand), None)
            reason = mine or _placeless(_deciding(a))
            held.setdefault((reason, BY_HAND if mine else remedy(reason)), []).append(a)
    macs, params = _terms(space)
    causes = []
    for (reason, frees), frozen in held.items():
        inside = set(frozen)
        held_by = tuple(names[a] for a in frozen)
        causes.append(Cause(reason, held_by, _share(macs, inside), _share(params, inside), frees))
    return sorted(causes, key=lambda c: -(c.macs + c.params))


def remedy(reason: str) -> str:
    """What would free an axis that is frozen for `reason`."""
    return next((text for start, text in REMEDIES.items() if reason.startswith(start)), OTHERWISE)


def can_thaw(reasons: Iterable[str]) -> bool:
    """Whether another trace, or another way to write the forward, may free an axis that is frozen for `reasons`."""
    return not any(r.startswith(_FOR_GOOD) for r in reasons)


def _deciding(a: Axis) -> str:
    """The reason of an axis that is hardest to remove."""
    order = list(REMEDIES)
    return min(a.reasons, key=lambda r: next((i for i, start in enumerate(order) if r.startswith(start)), len(order)))


def _placeless(reason: str) -> str:
    """`softmax over it in blocks.3.attn (_softmax)` -> `softmax over it (_softmax)`."""
    short = re.sub(r",? in (?:the model|[^\s()]*) ?\(_?((?:[^()]|\(\))*)\)", r" (\1)", reason)
    return re.sub(r"^its size is fixed \((.*)\)$", r"its size is fixed in a \1", short)


def _terms(space: SearchSpace) -> tuple[list[tuple[tuple[Dim, ...], int]], list[tuple[tuple[Dim, ...], int]]]:
    """(dimensions, cost) of every contraction and of every parameter."""
    parameters = {n for n, _ in space.model.named_parameters()}
    macs = [term.dims for term in space.trace.record.terms]
    params = [dims for name, dims in space.trace.slots.items() if name in parameters]
    return tuple([(dims, axes.size(tuple(a for d in dims for a in d))) for dims in part] for part in (macs, params))  # type: ignore[return-value]


def _share(terms: list[tuple[tuple[Dim, ...], int]], inside: set[Axis]) -> float:
    total = sum(cost for _, cost in terms)
    held = sum(cost for dims, cost in terms if any(a in inside for d in dims for a in axes.atoms(d)))
    return held / max(total, 1)
