"""Polynomials agree with plain integers at random points, and nothing is ever rounded."""

import operator
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dmscale.polynomial import Inexact, Poly, Quotient

VARIABLES = ["x", "y", "z"]
points = st.fixed_dictionaries({v: st.integers(1, 9) for v in VARIABLES})
monomials = st.lists(st.sampled_from(VARIABLES), max_size=3)


@st.composite
def polys(draw):
    """A polynomial built by the public operations."""
    total = Poly.of(draw(st.integers(-3, 3)))
    for letters in draw(st.lists(monomials, max_size=3)):
        term = Poly.of(draw(st.integers(-4, 4)))
        for v in letters:
            term = term * Poly.variable(v)
        total = total + term
    return total


@pytest.mark.parametrize("apply", [operator.add, operator.sub, operator.mul])
@given(p=polys(), q=st.one_of(polys(), st.integers(-5, 5)), at=points)
def test_arithmetic_commutes_with_evaluation(apply, p, q, at):
    value = q if isinstance(q, int) else q.evaluate(at)
    assert apply(p, q).evaluate(at) == apply(p.evaluate(at), value)
    assert apply(q, p).evaluate(at) == apply(value, p.evaluate(at))
    assert (-p).evaluate(at) == -p.evaluate(at)


@given(polys(), polys(), polys())
def test_equal_polynomials_are_equal_and_hash_alike(p, q, r):
    assert (p + q) * r == p * r + q * r
    assert hash((p + q) * r) == hash(p * r + q * r)
    assert p - p == 0 and not (p - p).terms
    assert (p == q) == (not (p - q).terms)


@given(polys(), monomials, st.integers(1, 4))
def test_division_by_a_monomial_is_exact_or_refused(p, letters, c):
    divisor = Poly.of(c)
    for v in letters:
        divisor = divisor * Poly.variable(v)
    assert (p * divisor) // divisor == p
    try:
        quotient = p // divisor
    except Inexact:
        assert any(coefficient % c or not contains(m, letters) for m, coefficient in p.terms.items())
    else:
        assert quotient * divisor == p


def contains(monomial, letters):
    return all(monomial.count(v) >= letters.count(v) for v in letters)


@given(polys(), polys(), points)
def test_division_never_rounds(p, q, at):
    try:
        quotient = p // q
    except Inexact:
        return
    assert quotient * q == p
    assert quotient.evaluate(at) * q.evaluate(at) == p.evaluate(at)


def test_division_without_a_polynomial_result_is_refused():
    x, y = Poly.variable("x"), Poly.variable("y")
    for p, q in [(x, y), (x, 2), (x + 1, x), (x * y + 1, x + 1), (x, Poly.of(0))]:
        with pytest.raises(Inexact):
            p // Poly.of(q)
    assert (4 * x + 4 * y) // (x + y) == 4
    assert 0 // x == 0
    with pytest.raises(Inexact):
        1 // x


def test_constants_and_variables():
    x = Poly.variable("x")
    assert (x - x).constant == 0 and (x - x + 3).constant == 3 and Poly.of(7).constant == 7
    assert x.constant is None and (x + 1).constant is None
    assert (x * x + 1).variables == {"x"} and (0 * x).variables == set()
    assert Poly.of(x) is x


def test_tensors_evaluate_and_differentiate():
    p = 3 * Poly.variable("x") * Poly.variable("x") + 2 * Poly.variable("y") + 1
    x, y = torch.tensor([2.0, 5.0], requires_grad=True), torch.tensor([1.0, 1.0])
    value = p.evaluate({"x": x, "y": y})
    assert value.tolist() == [15.0, 78.0]
    value.sum().backward()
    assert x.grad.tolist() == [12.0, 30.0]


# -- quotients -----------------------------------------------------------------------------------------------


def exact(q, at):
    """The rational value of a quotient."""
    return Fraction(q.numerator.evaluate(at), q.denominator.evaluate(at))


@pytest.mark.parametrize("apply", [operator.add, operator.sub, operator.mul, operator.floordiv])
@given(p=st.tuples(polys(), polys()), q=st.tuples(polys(), polys()), at=points)
def test_quotients_are_exact_fractions(apply, p, q, at):
    assume(p[1].evaluate(at) and q[1].evaluate(at))
    if apply is operator.floordiv:
        assume(q[0].evaluate(at))
    a, b = Quotient(*p), Quotient(*q)
    exactly = operator.truediv if apply is operator.floordiv else apply
    assert exact(apply(a, b), at) == exactly(exact(a, at), exact(b, at))


@given(st.tuples(polys(), polys()), points)
def test_a_quotient_evaluates_to_an_integer_or_is_refused(p, at):
    assume(p[1].evaluate(at))
    q = Quotient(*p)
    value = exact(q, at)
    if value.denominator == 1:
        assert q.evaluate(at) == value
    else:
        with pytest.raises(Inexact):
            q.evaluate(at)


def test_quotients_simplify_and_refuse_zero():
    x, y = Poly.variable("x"), Poly.variable("y")
    assert Quotient(6 * x * y, 2 * y).numerator == 3 * x
    assert Quotient(6 * x * y, 2 * y).denominator == 1
    assert Quotient(x, y).variables == {"x", "y"}
    assert Quotient.of(3).evaluate({}) == 3
    with pytest.raises(Inexact):
        Quotient(x, 0)
