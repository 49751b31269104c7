"""The algebra of axes obeys its laws: order does not matter, regrouping goes back, masks are indices of real arrays."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dmscale import axes
from dmscale.axes import (
    Conflict,
    atoms,
    axis,
    concat,
    cut,
    freeze,
    kept,
    measure,
    reasons,
    regroup,
    same,
    size,
    unify,
)

# -- what a set of axes means, spelled out element by element ------------------------------------------------


def deciders(dim):
    """For each element of `dim`, the (free atom, index) pairs that decide whether it is kept."""
    out = [()]
    for a in axes.factors(dim):
        if a.sum is not None:
            inner = [d for part in a.sum for d in deciders(part)]
        else:
            inner = [() if a.reasons else ((a, i),) for i in range(a.size)]
        out = [x + y for x in out for y in inner]
    return out


def meaning(dims):
    """`deciders` of several dims with the pairs numbered as they appear: equal for equal partitions and masks."""
    number = {}
    return [[tuple(number.setdefault(pair, len(number)) for pair in d) for d in deciders(dim)] for dim in dims]


def factorisations(n):
    """Strategy of ordered factorisations of `n`, such as (2, 3, 2) of 12."""
    if n == 1:
        return st.just(())
    divisors = st.sampled_from([d for d in range(2, n + 1) if n % d == 0])
    return divisors.flatmap(lambda d: factorisations(n // d).map(lambda rest: (d, *rest)))


@st.composite
def dims_of(draw, n):
    """A random dimension of size `n`: a product of free, frozen and summed axes."""
    dim = ()
    for d in draw(factorisations(n)):
        kind = draw(st.sampled_from(["free", "free", "frozen", "sum"]))
        if kind == "sum":
            first = draw(st.integers(1, d - 1))
            dim += concat([axis(first), axis(d - first)]) if d > 2 else axis(d)
        else:
            dim += axis(d, *(["a reason"] if kind == "frozen" else []))
    return dim


def free_atoms(dims):
    return [a for a in dict.fromkeys(a for dim in dims for a in atoms(dim)) if not a.reasons]


def draw_masks(draw, dims):
    """Random masks for the free atoms of `dims`, none of them empty."""
    masks = {}
    for a in free_atoms(dims):
        bits = draw(st.lists(st.booleans(), min_size=a.size, max_size=a.size))
        bits[draw(st.integers(0, a.size - 1))] = True
        masks[a] = torch.tensor(bits)
    return masks


# -- unification ---------------------------------------------------------------------------------------------


@st.composite
def recipes(draw):
    """Plans of several dims of one size, and pairs of them to unify; plans can be built again and again."""
    chain = draw(st.permutations([2, 2, 3]))  # boundaries from one chain of divisors: most problems have a solution
    plans = []
    for _ in range(draw(st.integers(3, 7))):
        product = [chain[0]]
        for factor in chain[1:]:
            if draw(st.booleans()):
                product.append(factor)
            else:
                product[-1] *= factor
        frozen = [draw(st.integers(0, 5)) == 0 for _ in product]
        parts = [draw(st.sampled_from([0, 0, 1, 2])) if n > 2 else 0 for n in product]  # a sum of (part, n - part)
        plans.append(list(zip(product, frozen, parts)))
    index = st.integers(0, len(plans) - 1)
    return plans, draw(st.lists(st.tuples(index, index), min_size=1, max_size=8))


def unified(plans, pairs):
    """The dims of `plans` after unifying `pairs`, or None where that is a conflict."""
    dims = []
    for plan in plans:
        dim = ()
        for n, frozen, part in plan:
            why = ["a reason"] if frozen else []
            dim += concat([axis(part, *why), axis(n - part, *why)]) if part else axis(n, *why)
        dims.append(dim)
    try:
        for i, j in pairs:
            unify(dims[i], dims[j])
    except Conflict:
        return None
    return dims


@given(recipes(), st.data())
def test_unification_does_not_depend_on_the_order(problem, data):
    plans, pairs = problem
    shuffled = [(j, i) if data.draw(st.booleans()) else (i, j) for i, j in data.draw(st.permutations(pairs))]
    first, second = unified(plans, pairs), unified(plans, shuffled)
    assert (first is None) == (second is None), "a conflict in one order only"
    assume(first is not None)
    assert meaning(first) == meaning(second)


@given(recipes())
def test_unified_dims_have_the_same_masks(problem):
    plans, pairs = problem
    dims = unified(plans, pairs)
    assume(dims is not None)
    for i, j in pairs:
        assert deciders(dims[i]) == deciders(dims[j])


def test_unifying_twice_says_nothing_new():
    x, (h, d) = axis(6), (axis(2), axis(3))
    unify(x, (*h, *d))
    before = meaning([x, h, d])
    unify((*h, *d), x)
    assert meaning([x, h, d]) == before


@given(st.data(), st.sampled_from([12, 24, 30, 48]))
def test_two_views_of_one_axis_fix_what_lies_across_their_boundaries_alone(data, n):
    p, q = data.draw(factorisations(n)), data.draw(factorisations(n))
    x, y = (tuple(a for d in sizes for a in axis(d)) for sizes in (p, q))
    unify(x, y)
    assert deciders(x) == deciders(y)
    boundaries = sorted({prod(sizes[i:]) for sizes in (p, q) for i in range(len(sizes) + 1)}, reverse=True)
    assert (not reasons(x)) == all(m % k == 0 for m, k in zip(boundaries, boundaries[1:]))
    viewed = regroup([axis(d) for d in p], q)
    assert [size(d) for d in viewed] == list(q)
    assert sorted(a.size for a in free_atoms([x])) == sorted(a.size for a in free_atoms(viewed))


def test_groups_and_heads_that_do_not_divide_each_other():
    """48 channels are 4 groups of 12 and 6 heads of 8: two times six times four, of which the six stay."""
    width = axis(48)
    groups, heads = regroup([width], [4, 12]), regroup([width], [6, 8])
    assert [[(a.size, bool(a.reasons)) for a in atoms(d)] for d in (*groups, *heads)] == [
        [(2, False), (2, True)], [(3, True), (4, False)], [(2, False), (3, True)], [(2, True), (4, False)]
    ]  # fmt: skip
    assert "do not fit" in reasons(width)[0]


def test_conflict_where_sizes_differ():
    with pytest.raises(Conflict):
        unify(axis(4), axis(5))


def test_fixed_axes_may_be_regrouped_freely():
    fixed = [tuple(a for n in sizes for a in axis(n, "spatial")) for sizes in ((8, 7), (28, 2))]
    channels, same_channels = axis(5), axis(5)
    unify((*fixed[0], *channels), (*fixed[1], *same_channels))
    assert same(channels, same_channels)
    assert [size(d) for d in regroup([axis(8, "spatial"), axis(7, "spatial"), axis(5)], [28, 2, 5])] == [
        28,
        2,
        5,
    ]


def test_an_axis_cannot_contain_itself():
    part = axis(2)
    (whole,) = concat([part, axis(1), axis(3)])
    whole.size = 2  # honest sizes forbid it; the check must not rely on them
    with pytest.raises(Conflict, match="contain itself"):
        unify(part, (whole,))


# -- freezing ------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from([12, 30]))
def test_what_refines_a_frozen_axis_is_frozen(data, n):
    frozen, other = axis(n, "input"), data.draw(dims_of(n))
    unify(frozen, other)
    assert not axes.is_free(frozen) and not axes.is_free(other)
    assert "input" in reasons(other)


@given(st.data(), st.sampled_from([12, 30]))
def test_freezing_reaches_every_dim_that_shares_an_atom(data, n):
    dim, other = axis(n), data.draw(dims_of(n))
    unify(dim, other)
    freeze(dim, "output")
    assert not axes.is_free(other)
    assert not axes.is_free(regroup([other], [n])[0])
    assert all("output" in reasons((a,)) for a in atoms(other))


def test_pieces_of_a_frozen_axis_are_frozen():
    assert all(not axes.is_free(piece) for piece in cut(axis(6, "input"), [1, 2, 3]) if piece)
    assert all(not axes.is_free(part) for part in regroup([axis(6, "input")], [2, 3]))


# -- regrouping and cutting ----------------------------------------------------------------------------------


@given(st.data(), st.sampled_from([12, 24, 30]))
def test_regrouping_goes_back(data, n):
    shape, other = data.draw(factorisations(n)), data.draw(factorisations(n))
    dims = [axis(d) for d in shape]
    try:
        there = regroup(dims, other)
    except Conflict:
        assume(False)
    back = regroup(there, shape)
    assert [size(d) for d in there] == list(other)
    assert axes.reasons(tuple(a for d in dims for a in d)) or all(same(p, q) for p, q in zip(dims, back))
    assert [deciders(d) for d in dims] == [deciders(d) for d in back]


@given(st.data(), st.integers(2, 12))
def test_concatenating_the_pieces_of_a_cut_gives_the_axis(data, n):
    dim = axis(n)
    ends = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    pieces = cut(dim, [b - a for a, b in zip([0, *ends], [*ends, n])])
    assert same(concat(pieces), dim)
    assert deciders(concat(pieces)) == deciders(dim)


def test_cutting_again_elsewhere_refines_the_pieces():
    dim = axis(12)
    halves, thirds = cut(dim, [6, 6]), cut(dim, [4, 4, 4])
    assert deciders(concat(halves)) == deciders(concat(thirds)) == deciders(dim)
    assert [a.size for a in atoms(dim)] == [4, 2, 2, 4]


# -- masks are indices of real arrays ------------------------------------------------------------------------


class Program:
    """Array operations on arrays of element ids, with their axes beside them; runs again on sliced inputs."""

    def __init__(self, arrays, dims):
        self.inputs, self.dims, self.values = arrays, [list(d) for d in dims], list(arrays)
        self.steps = []

    def add(self, kind, sources, arguments, results):
        """Note a step; `results` are the axes of the arrays that it makes."""
        self.steps.append((kind, sources, arguments, len(self.dims), len(results)))
        sizes = [[size(d) for d in dims] for dims in results]
        made = self.apply(kind, [self.values[i] for i in sources], arguments, sizes)
        assert [list(v.shape) for v in made] == sizes, "the axes do not have the array's sizes"
        self.values += made
        self.dims += [list(d) for d in results]

    @staticmethod
    def apply(kind, arrays, arguments, sizes):
        if kind == "reshape":
            return [arrays[0].reshape(sizes[0])]
        if kind == "permute":
            return [arrays[0].transpose(arguments)]
        if kind == "concat":
            return [np.concatenate(arrays, axis=arguments)]
        if kind == "cut":
            ends = np.cumsum([s[arguments] for s in sizes])[:-1]
            return np.split(arrays[0], ends, axis=arguments)
        return [arrays[0] * 1009 + arrays[1]]  # pointwise

    def check(self, masks):
        """Slicing and running gives what running and slicing gives, for every array of the program."""
        counts = {a: int(m.sum()) for a, m in masks.items()}
        sliced = [a[np.ix_(*keep)] for a, keep in zip(self.inputs, map(self.masks_of(masks), self.dims))]
        for kind, sources, arguments, first, number in self.steps:
            sizes = [[measure(d, counts) for d in dims] for dims in self.dims[first : first + number]]
            sliced += self.apply(kind, [sliced[i] for i in sources], arguments, sizes)
        for value, small, dims in zip(self.values, sliced, self.dims):
            np.testing.assert_array_equal(value[np.ix_(*self.masks_of(masks)(dims))], small)

    @staticmethod
    def masks_of(masks):
        return lambda dims: [kept(d, masks).bool().numpy() for d in dims]


@st.composite
def programs(draw):
    shapes = draw(st.lists(st.sampled_from([(12,), (4, 6), (2, 12), (6, 4), (3, 8)]), min_size=1, max_size=3))
    arrays = [np.arange(np.prod(s)).reshape(s) + 1000 * i for i, s in enumerate(shapes)]
    program = Program(arrays, [[draw(dims_of(n)) for n in s] for s in shapes])
    for _ in range(draw(st.integers(1, 7))):
        i, j = (draw(st.integers(0, len(program.values) - 1)) for _ in range(2))
        x, dims, other = program.values[i], program.dims[i], program.dims[j]
        kind = draw(st.sampled_from(["reshape", "reshape", "permute", "concat", "cut", "pointwise"]))
        at = draw(st.integers(0, x.ndim - 1))
        try:
            if kind == "reshape":
                program.add(kind, [i], None, [regroup(dims, draw(factorisations(x.size)))])
            elif kind == "permute":
                order = draw(st.permutations(range(x.ndim)))
                program.add(kind, [i], order, [[dims[k] for k in order]])
            elif kind == "cut":
                first = draw(st.integers(1, max(1, x.shape[at] - 1)))
                pieces = cut(dims[at], [first, x.shape[at] - first])
                program.add(kind, [i], at, [[*dims[:at], p, *dims[at + 1 :]] for p in pieces])
            elif x.ndim == program.values[j].ndim and x.size < 100:
                shape = program.values[j].shape
                free = [at] if kind == "concat" else []
                if all(n == m or k in free for k, (n, m) in enumerate(zip(x.shape, shape))):
                    for k, (p, q) in enumerate(zip(dims, other)):
                        if k not in free:
                            unify(p, q)
                    joined = [*dims[:at], concat([dims[at], other[at]]), *dims[at + 1 :]]
                    program.add(kind, [i, j], at, [joined if kind == "concat" else dims])
        except Conflict:
            for dim in (*dims, *(other if kind in ("concat", "pointwise") else ())):
                freeze(dim, "conflict")
    return program


@settings(max_examples=250)
@given(programs(), st.data())
def test_masks_are_the_indices_of_real_arrays(program, data):
    every = [d for dims in program.dims for d in dims]
    program.check(draw_masks(data.draw, every))


def test_a_wrong_algebra_is_caught():
    """The check above can fail: axes in the wrong order do not slice as the array does."""
    program = Program([np.arange(24).reshape(4, 6)], [[axis(4), axis(6)]])
    a, b = program.dims[0]
    program.add("reshape", [0], None, [[(*a, *b)]])
    masks = {a[0]: torch.tensor([True, False, True, True]), b[0]: torch.arange(6) % 2 == 0}
    program.check(masks)
    program.dims[1] = [(*b, *a)]
    with pytest.raises(AssertionError):
        program.check(masks)


@given(st.data(), st.sampled_from([6, 12, 24]))
def test_measure_counts_the_kept_elements(data, n):
    dim = data.draw(dims_of(n))
    masks = draw_masks(data.draw, [dim])
    counts = {a: int(m.sum()) for a, m in masks.items()}
    assert measure(dim, counts) == int(kept(dim, masks).sum())
    assert measure(dim, {}) == size(dim) == len(kept(dim, {}))


def test_soft_masks_are_differentiable():
    (h,), (d,) = axis(3), axis(2)
    soft = torch.tensor([0.5, 1.0, 0.0], requires_grad=True)
    mask = kept((h, d), {h: soft})
    mask.sum().backward()
    assert torch.equal(mask.detach(), torch.tensor([0.5, 0.5, 1.0, 1.0, 0.0, 0.0]))
    assert torch.equal(soft.grad, torch.full((3,), 2.0))


def test_a_fixed_product_may_be_cut_anywhere_and_a_free_one_may_not():
    rows, columns = axis(3, "spatial"), axis(7, "padded")
    first, rest = cut((*rows, *columns), [16, 5])
    assert (size(first), size(rest)) == (16, 5) and reasons(first) == reasons(rest) == ["spatial", "padded"]
    with pytest.raises(Conflict):
        cut((*axis(3, "spatial"), *axis(7)), [16, 5])
