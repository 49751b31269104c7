"""Python sizes: ints that remember their expressions, and the equations that these must satisfy."""

import copy
import math
import operator
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmscale import axes
from dmscale.axes import axis, concat, cut
from dmscale.sizes import (
    Attribute,
    Equation,
    Extent,
    Operation,
    SizedInt,
    attributes_of,
    expression_of,
    extent,
    listening,
    solve,
)

OPERATORS = [operator.add, operator.sub, operator.mul, operator.floordiv]
HEADS, HEAD_DIM, C, GROUPS = (Attribute("attn", (name,)) for name in ("heads", "head_dim", "dim", "groups"))


def evaluated(e, values):
    """The value of an expression."""
    if isinstance(e, Operation):
        left, right = evaluated(e.left, values), evaluated(e.right, values)
        apply = dict(zip(("+", "-", "*", "//"), OPERATORS))[e.symbol]
        return apply(left, right)
    return values[e] if isinstance(e, Attribute) else e


# -- SizedInt ------------------------------------------------------------------------------------------------


steps_of_arithmetic = st.lists(st.tuples(st.sampled_from(OPERATORS), st.integers(1, 9), st.booleans()), max_size=5)


@given(st.integers(-20, 20), steps_of_arithmetic)
def test_a_sized_int_is_an_int_whose_expression_evaluates_to_it(start, steps):
    plain, sized = start, SizedInt(start, C)
    for apply, n, reflected in steps:
        if apply is operator.floordiv and plain == 0:
            reflected = False
        other = SizedInt(n, HEADS) if n == 7 else n
        plain, sized = (apply(n, plain), apply(other, sized)) if reflected else (apply(plain, n), apply(sized, other))
        assert sized == plain and isinstance(sized, SizedInt)
        assert evaluated(sized.expression, {C: start, HEADS: 7}) == plain
    assert evaluated((-sized).expression, {C: start, HEADS: 7}) == -plain == -sized


@given(st.integers(-20, 20), st.integers(-20, 20))
def test_a_sized_int_behaves_as_the_int_that_it_is(a, b):
    x, y = SizedInt(a, C), SizedInt(b, HEADS)
    assert (x == y, x != y, x < y, x <= y, x > y) == (a == b, a != b, a < b, a <= b, a > b)
    assert x != "a" and (x == "a") is False
    assert hash(x) == hash(a) and {a: 1}.get(x) == 1 and bool(x) == bool(a)
    assert list(range(x)) == list(range(a)) and str(x) == str(a) and f"{x:d}" == str(a)
    assert float(x) == float(a) and x * 0.5 == a * 0.5 and x / 2 == a / 2 and x**2 == a**2 and 2.0 * x == 2.0 * a
    assert [0, 1, 2][SizedInt(1, C)] == 1 and [1] * SizedInt(3, C) == [1, 1, 1] and divmod(x, 7) == divmod(a, 7)
    assert (round(x, -1), math.ceil(x)) == (round(a, -1), a) and all(f(x) is x for f in (round, math.floor, math.trunc))
    if a:
        assert 4 / x == 4 / a and x % 3 == a % 3


def test_copies_and_pickles_are_plain_ints():
    x = SizedInt(8, C)
    nested = copy.deepcopy({"a": (x,)})["a"][0]
    for other in (copy.copy(x), copy.deepcopy(x), nested, pickle.loads(pickle.dumps(x))):
        assert type(other) is int and other == 8
    assert expression_of(x) == C and expression_of(5) == 5


def test_escapes_and_comparisons_are_heard_only_while_listening():
    heard = []
    x, y = SizedInt(8, C), SizedInt(8, HEADS)
    with listening(lambda a, b: heard.append((a.expression, b.expression)), lambda a, how: heard.append(how)):
        assert x == y and (x != y) is False and x == 8 and x != SizedInt(9, HEADS)
        assert heard == [(C, HEADS)] * 2
        heard.clear()
        for use in (
            float,
            lambda v: v / 2,
            lambda v: 2 / v,
            lambda v: v**-0.5,
            lambda v: 2**v,
            lambda v: v * 0.5,
        ):
            use(x)
            assert len(heard) == 1, "a size became a plain number unheard"
            heard.clear()
    assert float(x) == 8.0 and x == y and not heard


def test_listening_ends_after_an_exception():
    heard = []
    with pytest.raises(ZeroDivisionError), listening(lambda a, b: None, lambda a, how: heard.append(how)):
        raise ZeroDivisionError
    float(SizedInt(8, C))
    assert not heard


def test_attributes_name_themselves():
    assert str(Attribute("blocks.0.attn", ("num_heads",))) == "blocks.0.attn.num_heads"
    assert str(Attribute("", ("sizes", 1))) == "sizes[1]"
    assert str(Attribute("attn", ("config", "hidden_size"))) == "attn.config.hidden_size"
    e = Operation("//", Operation("*", C, 3), HEADS)
    assert list(attributes_of(e)) == [C, HEADS]


# -- equations -----------------------------------------------------------------------------------------------


def says(expression, dim):
    return Equation(expression, dim, "the test")


def values(solution, sizes):
    """The solved attributes where the free atoms have `sizes`."""
    return {a: q.evaluate(sizes) for a, q in solution.attributes.items()}


@pytest.fixture(params=[0, 1, 2, 3])
def any_order(request):
    """The same equations in several orders: the solution must not depend on it."""

    def reordered(equations):
        n = request.param
        turned = equations[n % len(equations) :] + equations[: n % len(equations)]
        return turned if n % 2 == 0 else turned[::-1]

    return reordered


def is_free(*dims):
    return [axes.is_free(dim) for dim in dims]


def test_extent_is_a_polynomial_in_the_free_atoms():
    (h,), (d,), fixed = axis(4), axis(8), axis(3, "spatial")
    (a,), (b,) = pieces = [axis(2), axis(5)]
    assert extent((*fixed, h, d)).evaluate({h: 3, d: 2}) == 18
    assert extent(concat(pieces)).evaluate({a: 1, b: 4}) == 5
    assert extent(fixed).constant == 3


def test_an_attribute_is_the_size_of_its_axis(any_order):
    h, d = axis(4), axis(8)
    s = solve(any_order([says(HEADS, h), says(HEAD_DIM, d), says(Operation("*", HEADS, HEAD_DIM), (*h, *d))]))
    assert values(s, {h[0]: 3, d[0]: 5}) == {HEADS: 3, HEAD_DIM: 5}
    assert not s.links and is_free(h, d) == [True, True]


def test_heads_times_head_dim_may_be_solved_from_the_product(any_order):
    h, d = axis(4), axis(8)
    s = solve(any_order([says(Operation("*", HEADS, HEAD_DIM), (*h, *d)), says(HEADS, h)]))
    assert values(s, {h[0]: 3, d[0]: 5}) == {HEADS: 3, HEAD_DIM: 5}
    assert is_free(h, d) == [True, True]


def test_the_quotient_of_width_and_heads_is_the_head_size(any_order):
    """view(b, n, heads, C // heads) of a fused projection whose width is C."""
    h, d = axis(4), axis(8)
    width = (*h, *d)
    equations = [says(HEADS, h), says(Operation("//", C, HEADS), d), says(C, width)]
    s = solve(any_order(equations))
    assert values(s, {h[0]: 2, d[0]: 5}) == {HEADS: 2, C: 10}
    assert not s.links and is_free(h, d) == [True, True]


def test_a_reshape_to_the_width_of_another_axis_links_them(any_order):
    """`reshape(b, n, C)` with C from the stream: heads and stream keep the same share, head size stays."""
    stream, h, d = axis(32), axis(4), axis(8)
    equations = [
        says(Extent(stream), (*h, *d)),
        says(HEADS, h),
        says(Operation("//", Extent(stream), HEADS), d),
    ]
    s = solve(any_order(equations))
    assert is_free(stream, h, d) == [True, True, False]
    assert s.links == [{stream[0], h[0]}]
    assert values(s, {h[0]: 2, stream[0]: 16}) == {HEADS: 2}


def test_one_attribute_for_two_axes_links_them(any_order):
    x, y, z = axis(6), axis(6), axis(6)
    s = solve(any_order([says(C, x), says(C, y), says(C, z), says(HEADS, axis(3))]))
    assert s.links == [{x[0], y[0], z[0]}]
    assert is_free(x, y, z) == [True] * 3


def test_links_that_meet_are_one(any_order):
    a, b, c, d = (axis(6) for _ in range(4))
    s = solve(any_order([says(Extent(a), b), says(Extent(c), d), says(Extent(b), c)]))
    assert s.links == [{a[0], b[0], c[0], d[0]}]


def test_multiples_link(any_order):
    narrow, wide, other = axis(6), axis(24), axis(5)
    s = solve(any_order([says(Operation("*", 4, Extent(narrow)), wide), says(GROUPS, other)]))
    assert s.links == [{narrow[0], wide[0]}]
    assert is_free(narrow, wide, other) == [True] * 3


def test_equations_of_three_axes_are_solved_together(any_order):
    """Two eighths and the rest, cut at c // 8 and at twice that: each equation has three axes, and all keep one share."""
    (a,), (b,), (rest,) = parts = [axis(4), axis(4), axis(24)]
    eighth = Operation("//", Extent(concat(parts)), 8)
    one, both = says(eighth, (a,)), says(Operation("*", eighth, 2), concat([(a,), (b,)]))
    s = solve(any_order([one, both]))
    assert s.links == [{a, b, rest}] and is_free(*parts) == [True] * 3
    (a,), (b,), (rest,) = parts = [axis(4), axis(4), axis(24)]  # by the first alone they could be chosen more freely
    s = solve([says(Operation("//", Extent(concat(parts)), 8), (a,))])
    assert s.links == [{a, b, rest}] and is_free(*parts) == [True] * 3


def test_a_sum_that_is_as_long_as_another_axis_keeps_its_shares(any_order):
    """A head of which a part is rotated, in two halves, and the head of the values, of one `head_dim`."""
    (half,), (plain,), value = axis(4), axis(8), axis(16)
    head = concat([(half,), (half,), (plain,)])
    s = solve(any_order([says(C, head), says(C, value), says(Extent(head), value)]))
    assert s.links == [{half, plain, value[0]}] and is_free((half,), (plain,), value) == [True] * 3
    assert values(s, {half: 1, plain: 2, value[0]: 4}) == {C: 4}
    (half,), (plain,), value = axis(3), axis(10), axis(16)  # no share of all but the whole is a number of elements
    solve(any_order([says(C, concat([(half,), (half,), (plain,)])), says(C, value)]))
    assert not any(is_free((half,), (plain,), value))


def test_literals_freeze(any_order):
    x, y = axis(8), axis(8)
    s = solve(any_order([says(8, x), says(C, y)]))
    assert is_free(x, y) == [False, True]
    assert "fixed in the test" in axes.reasons(x)[0]
    assert not s.links


def test_a_literal_reaches_what_is_linked_to_it(any_order):
    x, y = axis(8), axis(8)
    solve(any_order([says(C, x), says(C, y), says(8, y)]))
    assert is_free(x, y) == [False, False]


def test_an_attribute_of_a_frozen_axis_is_a_constant(any_order):
    x, y = axis(8, "input"), axis(8)
    s = solve(any_order([says(C, x), says(C, y)]))
    assert is_free(y) == [False]
    assert values(s, {}) == {C: 8}


def test_a_sum_is_solved_for_its_part(any_order):
    whole = axis(10)
    first, rest = cut(whole, [4, 6])
    s = solve(any_order([says(C, whole), says(HEADS, first), says(Operation("-", C, HEADS), rest)]))
    assert values(s, {first[0]: 3, rest[0]: 5}) == {C: 8, HEADS: 3}
    assert is_free(first, rest) == [True, True]


def test_a_rounded_quotient_cannot_follow(any_order):
    """C // 3 of 8 was 2: what it becomes for another C is anyone's guess."""
    x, y = axis(8), axis(2)
    s = solve(any_order([says(C, x), says(Operation("//", C, 3), y)]))
    assert is_free(x, y) == [False, False]
    assert values(s, {}) == {C: 8}


def test_what_a_rounded_quotient_is_of_is_not_known(any_order):
    """Half a kernel of 4 is padded with 1 on the left, and with 2 on the right: 3 would be padded with 1 as well."""
    kernel, channels = Attribute("conv", ("kernel",), 4), Attribute("conv", ("channels",), 9)
    left, right, x = axis(1, "a constant"), axis(2, "a constant"), axis(4)
    half = Operation("//", Operation("-", kernel, 1), 2)
    s = solve(
        any_order([
            says(half, left), says(Operation("-", Operation("-", kernel, 1), half), right),
            says(Operation("//", channels, 2), x),
        ])
    )  # fmt: skip
    assert values(s, {}) in ({}, {kernel: 4})  # nothing, or what it is
    assert is_free(x) == [False]


def test_an_attribute_that_is_a_ratio_of_two_axes_keeps_its_value_and_links_them(any_order):
    """LeViT splits heads into keys and `ratio` times as large values: the ratio stays whole at every size."""
    keys, values_ = axis(8), axis(16)
    s = solve(any_order([says(C, keys), says(Operation("*", GROUPS, C), values_)]))
    (k,), (v,) = keys, values_
    assert is_free(keys, values_) == [True, True] and s.links == [{k, v}]
    assert values(s, {k: 3, v: 6}) == {C: 3, GROUPS: 2}


def test_an_escape_freezes(any_order):
    """float(C), C / 2, C ** -0.5: the trace says that C equals the constant that it was."""
    x, y = axis(8), axis(8)
    constant = (axes.Axis(8, ["a constant"]),)
    solve(any_order([says(C, x), says(C, constant), says(HEADS, y)]))
    assert is_free(x, y) == [False, True]


def test_the_equations_hold_at_every_size_that_the_links_allow(any_order):
    stream, h, d, hidden = axis(32), axis(4), axis(8), axis(128)
    mlp = Attribute("mlp", ("hidden",))
    equations = [
        says(C, stream), says(HEADS, h), says(HEAD_DIM, d), says(mlp, hidden),
        says(Operation("*", HEADS, HEAD_DIM), (*h, *d)), says(C, (*h, *d)), says(Operation("*", 4, C), hidden),
    ]  # fmt: skip
    s = solve(any_order(equations))
    atoms = [x[0] for x in (stream, h, d, hidden)]
    sizes = {a: a.size // 2 if any(a in link for link in s.links) else a.size for a in atoms}
    found = values(s, sizes)
    for eq in equations:
        assert evaluated(eq.expression, found) == axes.measure(eq.dim, sizes)
    assert axes.is_free(stream)
