"""Python ints that remember where they came from, and the equations that say which axis they must match.

Slicing weights is half of an export; `self.num_heads`, `groups` and split lists live in Python.  During a trace every
int attribute of every module, and every size that `x.shape` returns, is a `SizedInt`: it behaves as the int it is and
carries the expression that made it.  Where one arrives in `view`, `split`, a slice or `groups=`, the expression equals
the size of an axis: an `Equation`.  `solve` turns the equations into values for the attributes, links between axes
(`reshape(b, n, C)` with C from another tensor) and, where neither is possible, frozen axes.

A literal is an expression too: `view(b, n, 8, 64)` says that the last axis is 64 for ever.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from . import axes
from .axes import Axis, Dim
from .polynomial import Inexact, Poly, Quotient


@dataclass(unsafe_hash=True)  # not frozen: there are thousands, and that would treble the time to make them
class Attribute:
    """An int that a module holds.

    `key` is (name,), (name, index) in a tuple, (holder, name) in a settings object, a dict or a named tuple, or
    (config, name, index) in a list of a settings object.
    """

    module: str
    key: tuple[str | int, ...]
    value: int = field(default=0, compare=False)  # at full size

    def __str__(self) -> str:
        path = f"{self.module}.{self.key[0]}" if self.module else str(self.key[0])
        return path + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in self.key[1:])


@dataclass(frozen=True)
class Extent:
    """The size of a dimension."""

    dim: Dim


@dataclass(frozen=True)
class Operation:
    """`left symbol right` for + - * //."""

    symbol: str
    left: Expression
    right: Expression


Expression = int | Attribute | Extent | Operation

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
}


@dataclass(frozen=True)
class Equation:
    """`expression` must equal the size of `dim`; `where` names the operator and module that say so."""

    expression: Expression
    dim: Dim
    where: str


@dataclass(frozen=True)
class Decision:
    """A forward asked whether `left symbol right`, one of < <= ==; or, with %, what is left of a division."""

    symbol: str
    left: Expression
    right: Expression


class _Listener:
    """What `SizedInt` reports to while a trace runs: ints found equal, ints used as plain numbers."""

    equal: Callable[[SizedInt, SizedInt], None] | None = None
    escaped: Callable[[SizedInt, str], Equation] | None = None
    taken: Callable[[Attribute, int], None] | None = None
    decided: Callable[[Decision], None] | None = None
    released: Callable[[Equation], None] | None = None


_listener = _Listener()


@contextmanager
def listening(
    equal: Callable[[SizedInt, SizedInt], None], escaped: Callable[[SizedInt, str], Equation],
    taken: Callable[[Attribute, int], None] | None = None, decided: Callable[[Decision], None] | None = None,
    released: Callable[[Equation], None] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Report comparisons and escapes of `SizedInt`s, and entries taken from `Listed`, while the context lasts."""
    before = dict(vars(_listener))
    vars(_listener).update(equal=equal, escaped=escaped, taken=taken, decided=decided, released=released)
    try:
        yield
    finally:
        vars(_listener).clear()
        vars(_listener).update(before)


class Listed(list):
    """A list that a module holds, and which reports the entries that are taken by number: kinds of layers, say."""

    attribute: Attribute | None = None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and self.attribute is not None and _listener.taken:
            _listener.taken(self.attribute, index % len(self))
        return list.__getitem__(self, index)

    def __reduce__(self) -> tuple:
        return list, (list(self),)


def listed(values: list, attribute: Attribute) -> Listed:
    """`values`, of which `attribute` is the name."""
    out = Listed(values)
    out.attribute = attribute
    return out


def with_entries(holder: Any, entries: Mapping[str, Any]) -> Any:
    """A copy of a dict or a named tuple with other values under some names, and in the attributes that it has of these names."""
    if not isinstance(holder, dict):
        return holder._replace(**entries)
    if type(holder) is dict:
        return {**holder, **entries}
    cls: Any = type(holder)
    own, attributes = cls.__new__(cls), getattr(holder, "__dict__", {})  # its own methods may refuse to set anything
    put: Any = OrderedDict.__setitem__ if isinstance(own, OrderedDict) else dict.__setitem__
    for name, value in {**holder, **entries}.items():
        put(own, name, value)
    if attributes is holder:
        own.__dict__ = own
    elif attributes:
        own.__dict__.update({**attributes, **{name: value for name, value in entries.items() if name in attributes}})
    return own


def is_dict_of_settings(value: Any) -> bool:
    """Whether `value` is a dict of a class of its own that holds numbers by name: a config that may be read as an object too."""
    own = isinstance(value, dict) and type(value).__module__ not in ("builtins", "collections")
    return own and any(type(k) is str and type(v) is int for k, v in value.items())


def is_copy_of_items(held: Mapping[str, Any], key: str) -> bool:
    """Whether a module holds under `_name` the items of the dict that it holds as `name`, as layers of einops do."""
    named = held.get(key[1:]) if type(held[key]) is tuple else None
    return type(named) is dict and bool(named) and held[key] == tuple(named.items())


class SizedInt(int):
    """An int with the expression that produced it; copies and pickles as a plain int."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> SizedInt:
        self = super().__new__(cls, value)
        self.expression = expression
        return self

    def __deepcopy__(self, memo: dict) -> int:
        return int(self)

    def __copy__(self) -> int:
        return int(self)

    def __reduce__(self) -> tuple:
        return int, (int(self),)

    def __neg__(self) -> SizedInt:
        return SizedInt(-int(self), Operation("-", 0, self.expression))

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other) if isinstance(other, int) else NotImplemented
        if same is True and isinstance(other, SizedInt) and _listener.equal:
            # the branch that the model takes because two sizes are equal must stay the one it takes
            _listener.equal(self, other)
        elif same is not NotImplemented:
            _decide("==", self, other)
        return same

    def __ne__(self, other: object) -> bool:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    __hash__ = int.__hash__

    def __lt__(self, other: Any) -> bool:
        return _decide("<", self, other, int.__lt__(self, other))

    def __le__(self, other: Any) -> bool:
        return _decide("<=", self, other, int.__le__(self, other))

    def __gt__(self, other: Any) -> bool:
        return _decide("<", other, self, int.__gt__(self, other))

    def __ge__(self, other: Any) -> bool:
        return _decide("<=", other, self, int.__ge__(self, other))

    def __mod__(self, other: Any) -> Any:
        return _decide("%", self, other, int.__mod__(self, other))

    def __rmod__(self, other: Any) -> Any:
        return _decide("%", other, self, int.__rmod__(self, other))

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __pos__(self) -> SizedInt:
        return self

    def __abs__(self) -> SizedInt:
        return self if int(self) >= 0 else -self

    def __round__(self, digits: Any = None) -> Any:
        return self if digits is None else int.__round__(self, digits)

    def __floor__(self) -> SizedInt:
        return self

    __ceil__ = __trunc__ = __floor__

    def __rshift__(self, other: Any) -> Any:
        return self // (1 << other)

    def __lshift__(self, other: Any) -> Any:
        return self * (1 << other)

    def escape(self, how: str) -> Equation | None:
        """Fix the size: the number goes where nothing follows it."""
        return _listener.escaped(self, how) if _listener.escaped else None

    def _to_the(self, power: float, value: float, how: str) -> float:
        """`value`, which is this size to `power` times a constant."""
        fixed = self.escape(how)
        return value if fixed is None else SizedFloat(value, self, power, fixed)

    def __float__(self) -> float:
        self.escape("float()")
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        if hasattr(other, "__torch_function__"):  # which divides itself
            return NotImplemented
        if type(other) in (int, float):
            return self._to_the(1, int(self) / other, "division")
        if isinstance(other, SizedInt) and other and int(self) % int(other) == 0:
            quotient: Any = self // other  # elements / channels: channels cancel
            return quotient._to_the(1, int(self) / int(other), "division")
        self.escape("division")
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        if type(other) in (int, float):
            return self._to_the(-1, other / int(self), "division")
        self.escape("division")
        return other / int(self)

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        if type(other) is float and mod is None:
            return self._to_the(other, pow(int(self), other), "power")
        self.escape("power")
        return pow(int(self), other, mod)

    def __rpow__(self, other: Any, mod: Any = None) -> Any:
        self.escape("power")
        return pow(other, int(self), mod)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return _in_numpy(ufunc, method, inputs, kwargs)


class SizedFloat(float):
    """A power of a size times a constant: 1 / sqrt(head_dim).  Copies and pickles as a plain float.

    No trace sees all that is done with a plain number, so the size is `fixed` by an equation.  An arrival takes it back
    where the number is the factor of a tensor, for a gate says there what it becomes; so does a comparison, which is tried
    (`if elements * 2 / 1024**3 > 2: in parts`); any other use that is seen fixes anew.
    """

    size: SizedInt
    power: float
    fixed: Equation

    def __new__(cls, value: float, size: SizedInt, power: float, fixed: Equation) -> SizedFloat:
        self = super().__new__(cls, value)
        self.size, self.power, self.fixed = size, power, fixed
        return self

    def __reduce__(self) -> tuple:
        return float, (float(self),)

    def escape(self, how: str) -> None:
        """Fix the size: the number goes where nothing follows it."""
        if _listener.escaped:
            _listener.escaped(self.size, how)

    def _scaled(self, value: Any, power: float, other: Any) -> Any:
        """`value` of the arithmetic with `other`: still a power of the size if that was a plain number."""
        if type(other) in (int, float) and isinstance(value, float):
            return SizedFloat(value, self.size, power, self.fixed)
        self.escape("arithmetic")
        return value

    def __mul__(self, other: Any) -> Any:
        if hasattr(other, "__torch_function__"):  # which multiplies itself
            return NotImplemented
        return self._scaled(float(self) * other, self.power, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if hasattr(other, "__torch_function__"):
            return NotImplemented
        return self._scaled(float(self) / other, self.power, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._scaled(other / float(self), -self.power, other)

    def __pow__(self, other: Any, mod: Any = None) -> Any:
        return self._scaled(pow(float(self), other), self.power * other, other)

    def __neg__(self) -> Any:
        return self._scaled(-float(self), self.power, 1)

    def __floordiv__(self, other: Any) -> Any:
        return self._scaled(float(self) // other, 1, None)

    def __mod__(self, other: Any) -> Any:
        return self._scaled(float(self) % other, 1, None)

    def _decides(self, symbol: str, other: Any, outcome: Any) -> Any:
        """`outcome`, of the question `self symbol other`; of a share of a size, the size where the answer changes is noted."""
        share = float(self) / int(self.size)
        plain = isinstance(other, (int, float)) and not isinstance(other, SizedFloat) and math.isfinite(other)
        if self.power == 1 and share > 0 and plain:
            if _listener.decided and _listener.released:
                bound = math.ceil(other / share) if symbol == "<" else math.floor(other / share)
                _listener.decided(Decision(symbol, self.size.expression, bound))
                _listener.released(self.fixed)
        else:
            self.escape("comparison")
        return outcome

    def __lt__(self, other: Any) -> bool:
        return self._decides("<", other, float.__lt__(self, other))

    def __ge__(self, other: Any) -> bool:
        return self._decides("<", other, float.__ge__(self, other))

    def __le__(self, other: Any) -> bool:
        return self._decides("<=", other, float.__le__(self, other))

    def __gt__(self, other: Any) -> bool:
        return self._decides("<=", other, float.__gt__(self, other))

    def __int__(self) -> int:
        self.escape("int()")
        return int(float(self))

    def __round__(self, digits: Any = None) -> Any:
        self.escape("round()")
        return round(float(self), digits)

    def __floor__(self) -> int:
        self.escape("floor()")
        return math.floor(float(self))

    def __ceil__(self) -> int:
        self.escape("ceil()")
        return math.ceil(float(self))

    def __add__(self, other: Any) -> Any:
        return self._scaled(float(self) + other, 1, None)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._scaled(float(self) - other, 1, None)

    def __rsub__(self, other: Any) -> Any:
        return self._scaled(other - float(self), 1, None)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return _in_numpy(ufunc, method, inputs, kwargs)


def _decide(symbol: str, left: Any, right: Any, outcome: Any = None) -> Any:
    """`outcome`, of the question `left symbol right`."""
    if _listener.decided and outcome is not NotImplemented and isinstance(left, int) and isinstance(right, int):
        _listener.decided(Decision(symbol, expression_of(left), expression_of(right)))
    return outcome


def square_root(x: Any) -> float:
    """`math.sqrt`, of a size a power of it."""
    if isinstance(x, SizedInt):
        return x._to_the(0.5, _sqrt(int(x)), "float()")
    root = _sqrt(x)
    return SizedFloat(root, x.size, x.power / 2, x.fixed) if isinstance(x, SizedFloat) else root


_sqrt, _pow = math.sqrt, math.pow


def power(x: Any, exponent: Any) -> float:
    """`math.pow`, of a size a power of it."""
    return x ** float(exponent) if isinstance(x, (SizedInt, SizedFloat)) else _pow(x, exponent)


def _in_numpy(ufunc: Any, method: str, inputs: tuple, kwargs: dict[str, Any]) -> Any:
    """What a function of numpy gives, of a size a power of it; any other fixes the sizes that it is given."""
    name, plain = ufunc.__name__, method == "__call__" and not kwargs
    if plain and name == "sqrt":
        return square_root(inputs[0])
    if plain and name in ("power", "float_power") and type(inputs[1]) is float:
        return inputs[0] ** inputs[1]
    for x in inputs:
        if isinstance(x, (SizedInt, SizedFloat)):
            x.escape(f"{name}()")
    numbers = [int(x) if isinstance(x, SizedInt) else float(x) if isinstance(x, SizedFloat) else x for x in inputs]
    return getattr(ufunc, method)(*numbers, **kwargs)


def expression_of(value: int) -> Expression:
    """The expression of a `SizedInt`; a plain int is its own."""
    return value.expression if isinstance(value, SizedInt) else int(value)


def _arithmetic(symbol: str, reflected: bool) -> Callable[[SizedInt, Any], Any]:
    apply = _OPERATIONS[symbol]
    plain = {"+": "add", "-": "sub", "*": "mul", "//": "floordiv"}[symbol]
    name = f"__{'r' if reflected else ''}{plain}__"

    def method(self: SizedInt, other: Any) -> Any:
        if not isinstance(other, int):
            if isinstance(other, float):
                self.escape(f"arithmetic with {other}")
            return getattr(int(self), name)(other)
        a, b = (other, self) if reflected else (self, other)
        return SizedInt(apply(int(a), int(b)), Operation(symbol, expression_of(a), expression_of(b)))

    method.__name__ = name
    return method


for _symbol, _name in {"+": "add", "-": "sub", "*": "mul", "//": "floordiv"}.items():
    setattr(SizedInt, f"__{_name}__", _arithmetic(_symbol, False))
    setattr(SizedInt, f"__r{_name}__", _arithmetic(_symbol, True))


# -- solving ----------------------------------------------------------------------------------------------------------


def extent(dim: Dim) -> Poly:
    """The size of `dim` as a polynomial in its free atoms; frozen ones are constants."""
    found = axes.atoms(dim)
    free = {a: Poly.variable(a) for a in found if not a.reasons}
    if not free:
        return Poly.of(axes.size(dim))
    if len(found) == 1 and axes.factors(dim) == found:
        return free[found[0]]
    return Poly.of(axes.measure(dim, free, Poly.of(0)))


def extent_in(dim: Dim, free: set[Axis]) -> Poly:
    """The size of `dim` as a polynomial in the axes of `free`; a dimension without any of them is a constant."""
    return extent(dim) if any(a in free for a in axes.atoms(dim)) else Poly.of(axes.size(dim))


class Unknown(Exception):
    """An expression mentions an attribute of which nothing is known."""


def evaluate(e: Expression, known: Mapping[Attribute, Quotient]) -> Quotient:
    """`e` as a quotient of polynomials; raises `Unknown`, or `Inexact` where it is rounded at full size."""
    if isinstance(e, int):
        return Quotient(e)
    if isinstance(e, Extent):
        return Quotient(extent(e.dim))
    if isinstance(e, Attribute):
        if e not in known:
            raise Unknown
        return known[e]
    left, right = evaluate(e.left, known), evaluate(e.right, known)
    if e.symbol == "//" and _now(left) % _now(right):
        raise Inexact  # rounded already at full size: what it would become is anyone's guess
    return _OPERATIONS[e.symbol](left, right)


def _now(q: Quotient) -> int:
    """The value at full sizes."""
    return q.evaluate({a: a.size for a in q.variables})  # type: ignore[attr-defined]


def _solve_for_attribute(
    e: Expression, value: Quotient, known: dict[Attribute, Quotient]
) -> tuple[Attribute, Quotient] | None:
    """The attribute, and its value, that makes `e` equal `value`; None where `e` has not exactly one unknown.

    Raises:
        Inexact: more than one value does: a quotient in `e` is rounded at full size.
    """
    divided = False
    while not isinstance(e, Attribute):
        if not isinstance(e, Operation):
            return None
        divided = divided or e.symbol == "//"
        left, right = _try(e.left, known), _try(e.right, known)
        if right is not None and left is None:  # unknown op right = value
            value, e = _undo_left(e.symbol, value, right), e.left
        elif left is not None and right is None:  # left op unknown = value
            value, e = _undo_right(e.symbol, value, left), e.right
        else:
            return None
    if divided and _now(value) != e.value:
        raise Inexact  # (4 - 1) // 2 is what (3 - 1) // 2 is
    return e, value


def _undo_left(symbol: str, value: Quotient, right: Quotient) -> Quotient:
    """x where x symbol right = value."""
    return {"+": value - right, "-": value + right}[symbol] if symbol in "+-" else (
        value // right if symbol == "*" else value * right
    )  # fmt: skip


def _undo_right(symbol: str, value: Quotient, left: Quotient) -> Quotient:
    """x where left symbol x = value."""
    return {"+": value - left, "-": left - value}[symbol] if symbol in "+-" else (
        value // left if symbol == "*" else left // value
    )  # fmt: skip


def _try(e: Expression, known: dict[Attribute, Quotient]) -> Quotient | None:
    try:
        return evaluate(e, known)
    except Unknown:
        return None


@dataclass
class Solution:
    """`attributes`: each solved attribute's value; `links`: sets of atoms that must keep the same share."""

    attributes: dict[Attribute, Quotient]
    links: list[set[Axis]]


def solve(equations: list[Equation]) -> Solution:
    """Solve size equations; freezes the atoms of those that have no solution, with the reason.

    Equations between attributes and axes define the attributes.  What is left relates axes: `a * x = b * y` links x and
    y, anything else freezes what it mentions.  Freezing turns variables into constants, so this repeats until stable.
    An attribute that is whole at some sizes only (a ratio of two axes) keeps its value, which relates these axes.
    """
    kept: dict[Attribute, Quotient] = {}
    while True:
        before = {a for eq in equations for a in free_atoms(eq)}
        solution = _solve_once(equations, kept)
        if before != {a for eq in equations for a in free_atoms(eq)}:
            continue
        rounded = [a for a, q in solution.attributes.items() if not _is_whole(q, solution.links)]
        if not rounded:
            return solution
        kept |= {a: Quotient(_now(solution.attributes[a])) for a in rounded}


def _is_whole(q: Quotient, links: list[set[Axis]]) -> bool:
    """Whether `q` is an int at every size that the links allow."""
    if q.denominator == 1:
        return True
    units, _ = _units(q.variables, links)
    return Quotient(Poly.of(q.numerator.evaluate(units)), Poly.of(q.denominator.evaluate(units))).denominator == 1


def free_atoms(eq: Equation) -> set[Axis]:
    """The atoms that an equation tells of and that may still change."""
    return {a for dim in (eq.dim, *_extents(eq.expression)) for a in axes.atoms(dim) if not a.reasons}


def _extents(e: Expression) -> Iterator[Dim]:
    if isinstance(e, Extent):
        yield e.dim
    elif isinstance(e, Operation):
        yield from _extents(e.left)
        yield from _extents(e.right)


def attributes_of(e: Expression) -> Iterator[Attribute]:
    """The attributes that an expression mentions."""
    if isinstance(e, Attribute):
        yield e
    elif isinstance(e, Operation):
        yield from attributes_of(e.left)
        yield from attributes_of(e.right)


def _solve_once(equations: list[Equation], kept: Mapping[Attribute, Quotient]) -> Solution:
    known = dict(kept)
    # Plain `attribute = axis` first, then attributes inside expressions of known ones; what relates axes to a product is
    # settled first.  So the solution does not depend on the order in which the model said these things.
    todo = sorted(dict.fromkeys(equations), key=lambda eq: len(axes.factors(eq.dim)))
    sizes = {id(eq): Quotient(extent(eq.dim)) for eq in todo}  # nothing is frozen before all attributes are known
    unsolved = sorted(todo, key=lambda eq: isinstance(eq.expression, Operation))
    progress = True
    while progress:
        progress = False
        shares: list[Attribute] = []
        unsolved = [eq for eq in unsolved if any(a not in known for a in attributes_of(eq.expression))]
        for eq in unsolved:
            try:
                found = _solve_for_attribute(eq.expression, sizes[id(eq)], known)
            except Inexact:
                continue
            if found and found[0] not in known:
                if _is_share(found[1]):
                    shares.append(found[0])
                    continue
                known[found[0]] = found[1]
                progress = True
        if not progress:
            held = shares[:1] or _free_divisor(todo, known) or _fixed_factors(todo, known)
            known.update({a: Quotient(a.value) for a in held})
            progress = bool(held)
    links: list[set[Axis]] = []
    related: list[tuple[Equation, Poly]] = []
    fixed = False  # as long as nothing is, sizes are what they were
    for eq in reversed(todo):
        if not fixed and isinstance(eq.expression, Attribute) and known.get(eq.expression) is sizes[id(eq)]:
            continue  # most: what says what the attribute is
        try:
            size = Quotient(extent(eq.dim)) if fixed else sizes[id(eq)]
            difference = (evaluate(eq.expression, known) - size).numerator
        except (Inexact, Unknown):
            _freeze(_mentioned(eq, known), f"a size computed in {eq.where} cannot follow it")
            fixed = True
            continue
        if not difference.terms:
            continue
        if any(v.reasons for v in difference.variables):  # type: ignore[attr-defined]
            continue  # frozen in this very pass: the next one sees a constant
        pair = _proportional(difference, {})
        if pair is None:
            related.append((eq, difference))
        else:
            _join(links, pair)
    _freeze_unrelated(related, links, known)
    return Solution(known, links)


def _is_share(q: Quotient) -> bool:
    """Whether `q` is a ratio of sums, whole only if their parts keep their shares, and then it is what it was.

    As `parts` is where `x[:, : channels // parts]` is the first of three pieces.
    """
    return bool(q.denominator.variables) and len(q.numerator.terms) + len(q.denominator.terms) > 2


def _free_divisor(equations: list[Equation], known: Mapping[Attribute, Quotient]) -> list[Attribute]:
    """An attribute that another one, of which nothing is known either, is divided by: `channels // paths`, two paths say.

    Any value of it will do if the other follows, so it keeps its own.
    """
    for eq in equations:
        e = eq.expression
        if isinstance(e, Operation) and e.symbol == "//":
            a, b = e.left, e.right
            if isinstance(a, Attribute) and isinstance(b, Attribute) and a not in known and b not in known:
                return [b]
    return []


def _fixed_factors(equations: list[Equation], known: Mapping[Attribute, Quotient]) -> list[Attribute]:
    """Attributes in a product of which nothing is known, that make up what is fixed of its size: `fields * width`, of 26 widths.

    They keep their values, so that the one that is left follows.
    """
    for eq in equations:
        size, factors = extent(eq.dim).terms, _factors(eq.expression)
        unknown = [f for f in factors if isinstance(f, Attribute) and f not in known]
        distinct = list(dict.fromkeys(unknown))
        if len(size) != 1 or len(distinct) < 2 or len(unknown) < len(factors):
            continue
        ((variables, fixed),) = size.items()
        rest = [a for a in distinct if math.prod(f.value for f in unknown if f != a) == fixed]
        if variables and rest:
            inside = not free_atoms(eq).isdisjoint(axes.atoms((axes.factors(eq.dim)[-1],)))
            follows = rest[-1 if inside else 0]  # of equal ones, the one that stands where the free axis does
            return [f for f in distinct if f != follows]
    return []


def _factors(e: Expression) -> list[Expression]:
    """What a product is of; an expression that is none alone."""
    if isinstance(e, Operation) and e.symbol == "*":
        return _factors(e.left) + _factors(e.right)
    return [e]


def _freeze_unrelated(
    related: list[tuple[Equation, Poly]], links: list[set[Axis]], known: dict[Attribute, Quotient]
) -> None:
    """Link or freeze what equations of three or more axes mention, where it still are so many when linked axes count as one.

    Half of the channels against two quarters that are linked already is again a pair.  So are two of three parts of which
    two equations tell: those that are linear are solved together.  A sum is as long as another axis as long as all keep the
    same share (heads that are rotated in part, and `head_dim` of keys and values): these are linked.
    """
    progress = True
    while progress:
        progress, rest = False, []
        for eq, difference in related:
            units, sizes = in_units(difference, links)
            pair = _proportional(units, sizes)
            if pair is not None:
                _join(links, pair)
                progress = True
            elif units.terms:
                rest.append((eq, difference))
        related = rest
        if not progress and len(related) > 1:
            values, sizes = _units({v for _, difference in related for v in difference.variables}, links)
            for solved in _eliminated([Poly.of(difference.evaluate(values)) for _, difference in related]):
                pair = _proportional(solved, sizes)
                if pair is not None:
                    _join(links, pair)
                    progress = True
        if not progress:  # one at a time: what it links may be a pair in another one
            shares = (_in_proportion(*in_units(difference, links)) for _, difference in related)
            same_share = next((found for found in shares if found is not None), None)
            if same_share is not None:
                _join(links, same_share)
                progress = True
    for eq, difference in related:
        units, _ = in_units(difference, links)
        if units.terms and not any(v.reasons for v in difference.variables):  # type: ignore[attr-defined]
            shared = difference.variables - _without_common_factors(difference).variables
            _freeze(_least_to_fix(units, eq, known) - shared, f"its size is fixed in {eq.where}")


def _eliminated(equations: list[Poly]) -> list[Poly]:
    """The linear ones of `equations`, each `= 0`, solved for one another (Gauss-Jordan): the same ones in fewer variables."""
    solved: list[tuple[Any, dict[Any, Fraction]]] = []  # a variable, and an equation in which it has the factor one

    def without(row: dict[Any, Fraction], variable: Any, other: dict[Any, Fraction]) -> dict[Any, Fraction]:
        factor = row.get(variable, Fraction(0))
        left = {m: row.get(m, Fraction(0)) - factor * other.get(m, Fraction(0)) for m in {**row, **other}}
        return {m: c for m, c in left.items() if c}

    for p in equations:
        if any(len(m) > 1 for m in p.terms):
            continue
        row = {m: Fraction(c) for m, c in p.terms.items()}
        for variable, other in solved:
            row = without(row, variable, other)
        own = next((m for m in row if m), None)
        if own is not None:
            row = {m: c / row[own] for m, c in row.items()}
            solved = [(variable, without(other, own, row)) for variable, other in solved] + [(own, row)]
    common = [math.lcm(*(c.denominator for c in row.values())) for _, row in solved]
    return [Poly({m: int(c * n) for m, c in row.items()}) for (_, row), n in zip(solved, common)]


def _join(links: list[set[Axis]], found: Iterable[Axis]) -> None:
    joined = set(found)
    for group in [g for g in links if g & joined]:
        links.remove(group)
        joined |= group
    links.append(joined)


def in_units(difference: Poly, links: list[set[Axis]]) -> tuple[Poly, dict[Axis, int]]:
    """`difference` with linked axes as multiples of one of them, which then has the size that divides all of theirs."""
    values, sizes = _units(difference.variables, links)
    return Poly.of(difference.evaluate(values)), sizes


def _without_common_factors(p: Poly) -> Poly:
    """`p` without the variables that are factors of it: at positive values it is zero where `p` is."""
    common: Counter[Hashable] | None = None
    for m in p.terms:
        common = Counter(m) if common is None else common & Counter(m)
    if not common:
        return p
    return Poly({tuple(sorted((Counter(m) - common).elements(), key=id)): c for m, c in p.terms.items()})


def _units(variables: set[Hashable], links: list[set[Axis]]) -> tuple[dict[Hashable, Poly], dict[Axis, int]]:
    """Variable -> what it is in units, of linked ones one; and the size of each unit that is unlike the axis' own."""
    values: dict[Hashable, Poly] = {v: Poly.variable(v) for v in variables}
    sizes: dict[Axis, int] = {}
    for group in links:
        inside = [v for v in variables if v in group]
        if inside:
            first = inside[0]
            assert isinstance(first, Axis)
            sizes[first] = math.gcd(*(a.size for a in group))
            for v in inside:
                assert isinstance(v, Axis)
                values[v] = Poly.variable(first) * (v.size // sizes[first])
    return values, sizes


def _proportional(difference: Poly, sizes: Mapping[Axis, int]) -> tuple[Axis, Axis] | None:
    """(x, y) where `difference = 0` says a * x = b * y with positive a and b; `sizes` are those unlike the axes' own."""
    if len(difference.terms) != 2:
        return None
    (m, c), (n, d) = difference.terms.items()
    common = [v for v in m if v in n]
    m, n = tuple(v for v in m if v not in common), tuple(v for v in n if v not in common)
    if len(m) != 1 or len(n) != 1 or (c > 0) == (d > 0):
        return None
    x, y = m[0], n[0]
    assert isinstance(x, Axis) and isinstance(y, Axis)
    return (x, y) if abs(c) * sizes.get(x, x.size) == abs(d) * sizes.get(y, y.size) else None


def _in_proportion(difference: Poly, sizes: Mapping[Axis, int]) -> list[Axis] | None:
    """The axes of which `difference = 0` holds at any share, if that may be less than the whole: it is a sum of them alone.

    Of heads * width = heads * (rotated + rest) the heads may be any number.
    """
    difference = _without_common_factors(difference)
    found = [v for m in difference.terms for v in m]
    if len(found) < 3 or any(len(m) != 1 for m in difference.terms) or any(v.reasons for v in found):  # type: ignore[attr-defined]
        return None
    full = {v: sizes.get(v, v.size) for v in found}  # type: ignore[attr-defined, call-overload]
    return found if math.gcd(*full.values()) > 1 and not difference.evaluate(full) else None  # type: ignore[return-value]


def _mentioned(eq: Equation, known: dict[Attribute, Quotient]) -> set[Axis]:
    """The free axes in an equation, and in what is known of its attributes."""
    found = free_atoms(eq)
    for attribute in attributes_of(eq.expression):
        if attribute in known:
            found |= {a for a in known[attribute].variables if isinstance(a, Axis)}
    return found


def _least_to_fix(difference: Poly, eq: Equation, known: dict[Attribute, Quotient]) -> set[Axis]:
    """Axes whose fixing brings `difference = 0` nearer to a link between the others, or all of them.

    heads * head_dim = width, and width // heads = head_dim: with head_dim, the innermost, fixed, the others are linked.
    What both sides have as a factor need not be fixed: heads * a = heads * b is a = b.
    """
    if len(difference.terms) == 2:
        m, n = difference.terms
        common = [v for v in m if v in n]
        sides = [[v for v in side if v not in common] for side in (m, n)]
        if any(len(side) > 1 for side in sides):
            inner = _innermost(set(max(sides, key=len)), eq)  # type: ignore[arg-type]
            if inner is not None:
                return {inner}
        elif common:
            return {v for side in sides for v in side}  # type: ignore[misc]
    return _mentioned(eq, known)


def _innermost(factors: set[Axis], eq: Equation) -> Axis | None:
    """Which of the factors of a product is its last: `eq` shows the product, or it is what a quotient leaves."""
    for dim in (eq.dim, *_extents(eq.expression)):
        found = _below(dim, factors)
        if len(found) > 1:
            return found[-1]
    quotient = isinstance(eq.expression, Operation) and eq.expression.symbol == "//"
    found = _below(eq.dim, factors)
    return found[0] if len(found) == 1 and quotient else None


def _below(dim: Dim, wanted: set[Axis]) -> list[Axis]:
    """The atoms of `wanted` in order, each alone below a factor of `dim`: the one of both halves of a rotary head too."""
    inside = [[a for a in axes.atoms((factor,)) if a in wanted] for factor in axes.factors(dim)]
    return [] if any(len(found) > 1 for found in inside) else [found[0] for found in inside if found]


def _freeze(found: set[Axis], reason: str) -> None:
    for a in found:
        axes.freeze((a,), reason)
