"""Polynomials with integer coefficients in the sizes of axes: what costs and size equations are made of.

A variable is any hashable object (an `Axis` atom, a block).  `//` of two polynomials is exact division and raises
`Inexact` where the quotient is no polynomial.  `Quotient` keeps such a quotient, so that `C // num_heads` is a number
that can be compared with a head size although C, free, need not be a multiple of it.  Nothing is ever rounded.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

Monomial = tuple[Hashable, ...]


class Inexact(ArithmeticError):
    """A quotient of two polynomials that is no polynomial."""


class Poly:
    """An immutable polynomial; `terms` maps a sorted tuple of variables (with repetition) to its coefficient."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Monomial, int]):
        self.terms = {m: c for m, c in terms.items() if c}

    @staticmethod
    def of(value: Poly | int) -> Poly:
        """`value` as a polynomial."""
        return value if isinstance(value, Poly) else Poly({(): int(value)})

    @staticmethod
    def variable(v: Hashable) -> Poly:
        """The polynomial that is one variable."""
        return Poly({(v,): 1})

    @property
    def variables(self) -> set[Hashable]:
        return {v for m in self.terms for v in m}

    @property
    def constant(self) -> int | None:
        """The value of a polynomial without variables, else None."""
        if not self.terms:
            return 0
        return self.terms.get(()) if len(self.terms) == 1 else None

    def __add__(self, other: Poly | int) -> Poly:
        terms = dict(self.terms)
        for m, c in Poly.of(other).terms.items():
            terms[m] = terms.get(m, 0) + c
        return Poly(terms)

    __radd__ = __add__

    def __neg__(self) -> Poly:
        return Poly({m: -c for m, c in self.terms.items()})

    def __sub__(self, other: Poly | int) -> Poly:
        return self + -Poly.of(other)

    def __rsub__(self, other: Poly | int) -> Poly:
        return Poly.of(other) - self

    def __mul__(self, other: Poly | int) -> Poly:
        terms: dict[Monomial, int] = {}
        other = Poly.of(other)
        if (factor := other.constant) is not None:
            return self if factor == 1 else Poly({m: c * factor for m, c in self.terms.items()})
        for m, c in self.terms.items():
            for n, d in other.terms.items():
                key = tuple(sorted((*m, *n), key=id))
                terms[key] = terms.get(key, 0) + c * d
        return Poly(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Poly | int) -> Poly:
        other = Poly.of(other)
        if not other.terms:
            raise Inexact("division by zero")
        if other.constant == 1:
            return self
        if len(other.terms) > 1:  # only multiples of the divisor
            lead, c = next(iter(other.terms.items()))
            quotient = Poly({(): self.terms.get(lead, 0) // c})
            if (quotient * other).terms != self.terms:
                raise Inexact
            return quotient
        (divisor, c), terms = next(iter(other.terms.items())), {}
        for m, d in self.terms.items():
            rest = list(m)
            for v in divisor:
                if v not in rest:
                    raise Inexact
                rest.remove(v)
            if d % c:
                raise Inexact
            terms[tuple(rest)] = d // c
        return Poly(terms)

    def __rfloordiv__(self, other: Poly | int) -> Poly:
        return Poly.of(other) // self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Poly, int)) and self.terms == Poly.of(other).terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __repr__(self) -> str:
        return " + ".join(" * ".join([str(c), *map(repr, m)]) for m, c in self.terms.items()) or "0"

    def evaluate(self, values: Mapping[Hashable, Any]) -> Any:
        """The value at `values`: ints, arrays over many structures or differentiable tensors, one for each variable."""
        total: Any = 0
        for m, c in self.terms.items():
            term: Any = c
            for v in m:
                term = term * values[v]
            total = total + term
        return total


_ONE = Poly({(): 1})


class Quotient:
    """`numerator / denominator`, a polynomial where the division is exact."""

    __slots__ = ("denominator", "numerator")

    def __init__(self, numerator: Poly | int, denominator: Poly | int = 1):
        self.numerator, self.denominator = Poly.of(numerator), _ONE if denominator == 1 else Poly.of(denominator)
        if self.denominator is _ONE:
            return
        try:
            self.numerator, self.denominator = self.numerator // self.denominator, _ONE
        except Inexact:
            if not self.denominator.terms:
                raise

    @staticmethod
    def of(value: Quotient | Poly | int) -> Quotient:
        """`value` as a quotient."""
        return value if isinstance(value, Quotient) else Quotient(value)

    @property
    def variables(self) -> set[Hashable]:
        return self.numerator.variables | self.denominator.variables

    def __add__(self, other: Quotient) -> Quotient:
        return Quotient(
            self.numerator * other.denominator + other.numerator * self.denominator,
            self.denominator * other.denominator,
        )

    def __sub__(self, other: Quotient) -> Quotient:
        return self + Quotient(-other.numerator, other.denominator)

    def __mul__(self, other: Quotient) -> Quotient:
        return Quotient(self.numerator * other.numerator, self.denominator * other.denominator)

    def __floordiv__(self, other: Quotient) -> Quotient:
        return Quotient(self.numerator * other.denominator, self.denominator * other.numerator)

    def __repr__(self) -> str:
        return repr(self.numerator) if self.denominator == 1 else f"({self.numerator}) / ({self.denominator})"

    def evaluate(self, values: Mapping[Hashable, Any]) -> int:
        """The integer value at `values`.

        Raises:
            Inexact: the division leaves a remainder there.
        """
        value, rest = divmod(self.numerator.evaluate(values), self.denominator.evaluate(values))
        if rest:
            raise Inexact
        return value
