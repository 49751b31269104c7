"""Elements of an axis that are chosen: what a tensor says about the numbers of elements.

A top-k gives numbers: position 3 of the experts' axis.  With an expert gone those behind it have other numbers, so an axis
whose elements are called by number cannot shrink in general.  It can where every number is used for nothing but to find
an element of that very axis: to gather its score, to index its weights, to be compared with all numbers, to be sorted and
counted.  Then renumbering what is left changes nothing, because the numbers that are left keep their order.

So a trace remembers of each tensor what it says about numbers (`Said`).  Operators that keep to such uses are listed here
or look after it in their rules; any other that takes numbers freezes the axis.

    scores (T, E) -topk-> numbers of E (T, k) -sort-> numbers of E -histc-> zero where gone (E,) -cumsum-> ends of E (E,)

A masked run never chooses what is gone (`calls.py`), which is why one-hot vectors and counts are zero there by themselves,
and why the rows of a group that has none end where those of the group before end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import axes
from .axes import Conflict, Dim

if TYPE_CHECKING:
    from .tracer import Tracer, Value

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Said:
    """What a tensor says about elements of axes by their number.

    numbers: the dimension whose elements its own elements are numbers of.
    zero: the dimensions along which it is zero at what is never chosen.
    ends: the dimension for which it adds up counts: where the rows of each element end.
    taken: how many elements can no longer be chosen, since a scatter has written -inf over them.
    """

    numbers: Dim | None = None
    zero: tuple[Dim, ...] = ()
    ends: Dim | None = None
    taken: int = 0


NOTHING = Said()


def _overloads(*packets: Any) -> set[Any]:
    return {getattr(packet, name) for packet in packets for name in packet.overloads()}


_MOVES = _overloads(
    aten.alias, aten.detach, aten.clone, aten._to_copy, aten.view, aten._unsafe_view, aten.permute, aten.transpose,
    aten.squeeze, aten.unsqueeze, aten.lift_fresh, aten.t, aten._reshape_alias, aten.expand, aten.split,
    aten.split_with_sizes, aten.slice, aten.select, aten.unbind, aten.chunk, aten.repeat, aten.flip,
)  # fmt: skip
"""The elements of the first argument, elsewhere."""
PICKS = _overloads(aten.index, aten.index_select, aten.gather, aten.embedding, aten.sort)
"""The same, and numbers among the other arguments are looked after by the rule."""
_LOOKED_AFTER = _overloads(
    aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.histc, aten.bincount, aten.searchsorted,
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like, aten.randn_like, aten.new_zeros,
    aten.new_ones, aten.new_empty, aten.new_full,
)  # fmt: skip
"""Rules that do with numbers what is allowed, or do not read them; what comes out says what the rule says."""
_EQUAL = _overloads(aten.eq)
_COMPARES = _overloads(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)
_TIMES = _overloads(aten.mul, aten.mul_, aten.bitwise_and, aten.logical_and)
_SUMS = _overloads(aten.sum, aten.cumsum)
_JOINS = _overloads(aten.cat, aten.stack)
_FILLS = _overloads(aten.masked_fill, aten.masked_fill_)


def heard(
    trace: Tracer, func: Any, args: Any, kwargs: Any, values: Sequence[Value], noted: Sequence[Said | None]
) -> Sequence[Said]:
    """What the results of an operator say; freezes axes whose numbers it takes and that it is not known to keep to.

    Args:
        trace: where to freeze.
        func, args, kwargs: the operator, and its arguments.
        values: what is known of its tensor arguments.
        noted: what its rule has said of each result; None where it did not.
    """
    before = [v.said for v in values]
    if all(s is NOTHING for s in before):
        return [s or NOTHING for s in noted]
    said = NOTHING
    first = before[0]
    if func in _MOVES and _keeps_values(func, kwargs.get("dtype"), first.numbers):
        said = first
    elif func in _JOINS:
        said = _joined(trace, values)
    elif func in PICKS:
        said = NOTHING if first.numbers is None else Said(first.numbers)
        noted = [*noted[:1], *[s or NOTHING for s in noted[1:]]]  # of a sort, the second result is a permutation
    elif func in _COMPARES:
        said = _compared(trace, func, args, values)
    elif func not in _LOOKED_AFTER:
        freeze_numbers(trace, values)
        zero = tuple(d for s in before for d in s.zero) if func in _TIMES else first.zero if func in _SUMS else ()
        keeps_lowest = func in _FILLS or torch.Tag.pointwise in func.tags
        said = Said(zero=zero, taken=max(s.taken for s in before) if keeps_lowest else 0)
    return [said if s is None else s for s in noted]


def _joined(trace: Tracer, values: Sequence[Value]) -> Said:
    numbers = [v.said.numbers for v in values]
    first = numbers[0]
    if first is not None and all(n is not None and axes.same(n, first) for n in numbers):
        return Said(first)
    freeze_numbers(trace, values)
    return NOTHING


def _keeps_values(func: Any, dtype: torch.dtype | None, numbers: Dim | None) -> bool:
    """Whether a copy or view holds the same numbers: in `bool` all but 0 are alike, in half precision large ones are."""
    if numbers is None or dtype is None:
        return func is not aten.view.dtype
    small = dtype.is_floating_point and dtype.itemsize < 4 and axes.size(numbers) > 256
    return dtype is not torch.bool and not small


def _compared(trace: Tracer, func: Any, args: Any, values: Sequence[Value]) -> Said:
    """Numbers of one axis among themselves; where one side is all of its numbers, being equal is a one-hot vector.

    Where one side is a number that Python counts, a module may go with it.
    """
    numbers = [v.said.numbers for v in values]
    if all(n is None for n in numbers):
        positive = func in (aten.gt.Scalar, aten.ne.Scalar) and args[1] == 0
        return Said(zero=values[0].said.zero) if positive else NOTHING
    if func is aten.eq.Scalar and numbers[0] is not None and args[1] in range(axes.size(numbers[0])):
        trace.one_by_one(numbers[0], [int(args[1])], "the numbers of its elements are computed with")
        return NOTHING
    p, q = (*numbers, None)[:2]
    try:
        if p is None or q is None:
            raise Conflict("numbers of elements against others")
        axes.unify(p, q)
    except Conflict:
        freeze_numbers(trace, values)
        return NOTHING
    every = [any(axes.same(p, d) for d in v.dims) for v in values]
    return Said(zero=(p,)) if func in _EQUAL and sorted(every) == [False, True] else NOTHING


def freeze_numbers(trace: Tracer, values: Sequence[Value]) -> None:
    """Fix every axis whose numbers are among `values`."""
    for v in values:
        if v.said.numbers is not None:
            trace.freeze(v.said.numbers, "the numbers of its elements are computed with")


def is_zero(value: Value, dim: Dim) -> bool:
    """Whether `value` is zero at what is gone from `dim`, without a mask."""
    return any(axes.same(dim, d) for d in value.said.zero)


def look_up(trace: Tracer, own: Dim, picked: Any, reason: str) -> bool:
    """Let elements of dimension `own` be found by the numbers `picked`: unified with it, or else frozen for `reason`."""
    numbers = trace.value(picked).said.numbers
    if numbers is None or axes.size(numbers) != axes.size(own):
        trace.freeze(own, reason)
        if numbers is not None:
            trace.freeze(numbers, reason)
        return False
    axes.unify(own, numbers)
    return True
