"""What a forward decides by its sizes: `if channels > 8`, `if x.shape[1] != y.shape[1]`, `assert channels % 8 == 0`.

A run shows the branch of the full model only.  Many a branch makes no difference (`if repeats == 1: return x`), so none is
taken for a bound; but the trial (`certify.py`) is made where sizes decide otherwise than they do now.  What fails there is
held to the sizes on this side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import axes
from .axes import Axis, Dim
from .polynomial import Inexact, Quotient
from .sizes import Attribute, Decision, Equation, Extent, Solution, Unknown, attributes_of, evaluate, in_units

if TYPE_CHECKING:
    from .dimensions import Dimension


def followed(decisions: Iterable[Decision], equations: Iterable[Equation]) -> list[Equation]:
    """The attributes that say nothing but what one axis is compared with, and are as long: they follow it.

    As in `if x.shape[-1] < self.channels: x = pad(x)`, which would pad a narrower one up to the old width.
    """
    said = {a for equation in equations for a in attributes_of(equation.expression)}
    compared: dict[Attribute, list[Dim]] = {}
    for decision in decisions:
        for one, other in ((decision.left, decision.right), (decision.right, decision.left)):
            if isinstance(other, Attribute) and other not in said:
                compared.setdefault(other, []).append(one.dim if isinstance(one, Extent) else ())
    return [
        Equation(a, dims[0], "a comparison")
        for a, dims in compared.items()
        if a.value == axes.size(dims[0]) and axes.is_free(dims[0]) and all(axes.same(dims[0], dim) for dim in dims)
    ]


@dataclass(frozen=True)
class Turn:
    """A size `at` which a dimension decides otherwise; from `minimum` on, in steps of `multiple`, it never does.

    minimum, multiple: None where nothing but the full size will do.
    """

    at: int
    minimum: int | None = None
    multiple: int | None = None


def turns(decisions: Iterable[Decision], solution: Solution, dimensions: Mapping[str, Dimension]) -> dict[str, Turn]:
    """Dimension -> where to try it, for those that decide on anything; several turns of one are the smallest of them."""
    owner = {a: d for d in dimensions.values() for a in d.axes}
    found: dict[str, Turn] = {}
    for decision in decisions:
        try:
            left, right = evaluate(decision.left, solution.attributes), evaluate(decision.right, solution.attributes)
        except (Unknown, Inexact):
            continue
        for name, turn in _turns_of(decision.symbol, left, right, solution.links, owner).items():
            d, other = dimensions[name], found.get(name)
            if d.allowed(turn.at) == turn.at and (other is None or turn.at < other.at):
                found[name] = turn
    return found


def _turns_of(
    symbol: str, left: Quotient, right: Quotient, links: list[set[Axis]], owner: Mapping[Axis, Dimension]
) -> dict[str, Turn]:
    rounded = 1
    if symbol == "%":
        divisor = right.numerator.constant if right.denominator == 1 else None
        if not divisor or left.denominator != 1:
            return {}
        poly, decides = left.numerator, lambda value: value % divisor
    else:
        difference = left - right
        poly, rounded, decides = difference.numerator, difference.denominator.constant or 0, _COMPARISONS[symbol]
        if not rounded:
            return {}
    poly, sizes = in_units(poly, links)
    variables = [v for v in poly.variables if isinstance(v, Axis)]
    if any(v not in owner for v in variables) or any(len(m) > 1 for m in poly.terms):
        return {}
    full = {v: sizes.get(v, v.size) for v in variables}
    if len(variables) == 1:
        (v,) = variables
        slope, start = poly.terms[(v,)], poly.terms.get((), 0)
        root, last = -start // slope, full[v]
        one_way = symbol != "%" and decides(slope + start) == decides(slope * last + start)
        if one_way and not (symbol == "==" and 1 < root < last and slope * root + start == 0):
            return {}  # most of what is asked: whether there is anything at all
        turn = _turn(lambda n: decides(slope * n + start), last)
        if turn is None:
            return {}
        d = owner[v]
        each = d.size // last
        least = None if turn.minimum is None else -(-turn.minimum // rounded) * rounded * each  # n // 2 is rounded down
        return {d.name: Turn(turn.at * each, least, turn.multiple and turn.multiple * each)}
    if len(variables) == 2 and owner[variables[0]] is not owner[variables[1]]:
        small, large = sorted(variables, key=lambda v: full[v])
        few = max(full[small] // 2, min(2, full[small]))
        pair = {small: few, large: few - (symbol != "==")}
        if pair[large] and decides(poly.evaluate({v: n for v, n in pair.items()})) != decides(
            poly.evaluate({v: n for v, n in full.items()})
        ):
            return {owner[v].name: Turn(n * (owner[v].size // full[v])) for v, n in pair.items()}
    return {}


_COMPARISONS: dict[str, Callable[[int], bool]] = {"<": lambda n: n < 0, "<=": lambda n: n <= 0, "==": lambda n: n == 0}


def _turn(decides: Callable[[int], Hashable], full: int) -> Turn | None:
    """Where, below `full`, a linear function of a size decides otherwise; None if nowhere."""
    now = decides(full)
    others = [n for n in range(1, full) if decides(n) != now]
    if not others:
        return None
    minimum = others[-1] + 1
    half = min(others, key=lambda n: abs(n - full // 2))  # as others do, a trial removes about half
    if minimum < full:
        return Turn(half, minimum)
    step = math.gcd(full, *(n for n in range(1, full) if decides(n) == now))
    even = step < full and all(decides(n) == now for n in range(step, full, step))
    return Turn(half, step, step) if even else Turn(half)
