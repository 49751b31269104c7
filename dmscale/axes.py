"""Axes: which numbers in a network must change together.

Every dimension of every tensor is a product of **axes**, most significant first (row-major, what `reshape` merges and
splits).  An axis is an unknown with a size.  Two axes that an operator pairs element by element are *unified*; an axis
can be *refined* into a product (a `view` splits it) or a sum (what `cat` joins and `split` cuts).  What is left when a
whole network has been read, the atoms, are the numbers that can be chosen.

This is type inference by unification.  Heads, head dims, grouped convolutions, fused projections, gated MLPs and dense
concatenations are not cases of it but results:

    >>> qkv, heads = axis(96), axis(4)
    >>> _, h, d = regroup([qkv], [3, 4, 8])        # (96,) viewed as (3, 4, 8)
    >>> unify(h, heads)                            # one head is now 3 x 8 rows of the projection
    >>> keep = torch.tensor([True, False, True, True])
    >>> int(kept(qkv, {atoms(heads)[0]: keep}).sum())
    72

Pure Python; torch is used for index masks only.  What the algebra cannot express raises `Conflict`, and the caller
freezes the axes involved: a frozen axis keeps its size for ever and carries the reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import gcd

import torch

__all__ = [
    "Atoms",
    "Axis",
    "Conflict",
    "Dim",
    "atoms",
    "axis",
    "concat",
    "coordinates",
    "cut",
    "factors",
    "freeze",
    "gathered",
    "is_free",
    "is_multilinear",
    "kept",
    "measure",
    "reasons",
    "regroup",
    "same",
    "size",
    "unify",
]


class Conflict(Exception):
    """Two dimensions cannot be the same product of axes; the message says which sizes met."""


class Axis:
    """A node of the union-find forest: an atom, a product of axes, or a sum of dimensions."""

    __slots__ = ("parent", "product", "reasons", "size", "sum")

    def __init__(self, size: int, reasons: Iterable[str] = ()):
        self.size = int(size)
        self.parent: Axis | None = None
        self.product: Dim | None = None
        self.sum: tuple[Dim, ...] | None = None
        self.reasons: dict[str, None] = dict.fromkeys(reasons) if reasons else {}

    @property
    def is_atom(self) -> bool:
        return self.product is None and self.sum is None

    def root(self) -> Axis:
        if self.parent is None:
            return self
        node = self.parent
        while node.parent is not None:
            node = node.parent
        while self.parent is not None and self.parent is not node:  # path compression
            self.parent, self = node, self.parent
        return node

    def __repr__(self) -> str:
        node = self.root()
        if node.product is not None:
            return "(" + " ".join(map(repr, node.product)) + ")"
        if node.sum is not None:
            return "[" + " + ".join(" ".join(map(repr, part)) or "1" for part in node.sum) + "]"
        return f"{'!' if node.reasons else ''}{node.size}"


Dim = tuple[Axis, ...]
"""A dimension of a tensor: a product of axes, most significant first.  `()` has size one."""


def axis(size: int, *reasons: str) -> Dim:
    """A dimension made of one new axis of `size`; frozen if `reasons` are given.  A size of one needs no axis."""
    return () if size == 1 else (Axis(size, reasons if size else ("empty",)),)


def size(dim: Dim) -> int:
    """Number of elements of `dim`."""
    total = 1
    for a in dim:
        total *= (a if a.parent is None else a.root()).size
    return total


def factors(dim: Iterable[Axis]) -> list[Axis]:
    """The roots whose product `dim` is: no products among them, no axis of size one."""
    out: list[Axis] = []
    for a in dim:
        if a.parent is not None:
            a = a.root()
        if a.product is not None:
            out += factors(a.product)
        elif a.size != 1:
            out.append(a)
    return out


def atoms(dim: Dim) -> list[Axis]:
    """The atoms below `dim`, in row-major order, each once."""
    found = _leaves(dim)
    return found if len(found) < 2 else list(dict.fromkeys(found))


class Atoms(dict[Dim, list[Axis]]):
    """`atoms` of any dimension, found once: to be asked when everything has been unified, and axes are only frozen."""

    def __missing__(self, dim: Dim) -> list[Axis]:
        found = self[dim] = atoms(dim)
        return found


def _leaves(dim: Iterable[Axis]) -> list[Axis]:
    out: list[Axis] = []
    for a in dim:  # most of a trace's time would go here: no generators, no call for an atom
        if a.parent is not None:
            a = a.root()
        if a.product is not None:
            out += _leaves(a.product)
        elif a.sum is not None:
            for part in a.sum:
                out += _leaves(part)
        elif a.size != 1:
            out.append(a)
    return out


def same(p: Dim, q: Dim) -> bool:
    """Whether two dimensions are the same product of the same axes (not merely of one size)."""
    if p == q:
        return True
    p_, q_ = factors(p), factors(q)
    return len(p_) == len(q_) and all(
        a is b or (a.sum is not None and b.sum is not None and len(a.sum) == len(b.sum)
                   and all(same(x, y) for x, y in zip(a.sum, b.sum)))
        for a, b in zip(p_, q_)
    )  # fmt: skip


def freeze(dim: Iterable[Axis], reason: str) -> None:
    """Fix the size of every atom below `dim`, for `reason`."""
    for a in _leaves(dim):
        a.reasons[reason] = None


def reasons(dim: Dim) -> list[str]:
    """Why atoms below `dim` are frozen."""
    return list(dict.fromkeys(r for a in _leaves(dim) for r in a.reasons))


def is_free(dim: Iterable[Axis]) -> bool:
    """Whether any atom below `dim` may still change its size."""
    for a in dim:  # written out, not `any(...)`: a trace asks this for every dimension of every tensor
        if a.parent is not None:
            a = a.root()
        if a.product is not None:
            if is_free(a.product):
                return True
        elif a.sum is not None:
            if any(is_free(part) for part in a.sum):
                return True
        elif a.size != 1 and not a.reasons:
            return True
    return False


# -- refining ---------------------------------------------------------------------------------------------------------


def _split(a: Axis, lead: int) -> Dim:
    """Refine root `a` into (lead, rest); a sum becomes a product if its pieces can be unified."""
    if lead <= 0 or a.size % lead:
        raise Conflict(f"{a.size} is not divisible by {lead}")
    if a.sum is None:
        return _become_product(a, (Axis(lead, a.reasons), Axis(a.size // lead, a.reasons)))
    # n equal pieces laid one after another are a product (n, piece): fused q, k, v viewed as (3, heads, head_dim).
    pieces = cut((a,), [a.size // lead] * lead)
    for piece in pieces[1:]:
        unify(pieces[0], piece)
    index = Axis(lead, ["index of a concatenation"])
    if a.product is None:  # unifying the pieces may have refined `a` itself
        a.sum = None
        a.product = (index, *pieces[0])
    return tuple(factors((a,)))


def _become_product(a: Axis, parts: Dim) -> Dim:
    a.product = parts
    return parts


def unify(p: Dim, q: Dim) -> None:
    """Make two dimensions of one size the same axes, refining either as far as needed.

    Where no common refinement exists (6 x 2 against 4 x 3), what lies across the boundaries is fixed, and nothing else.

    Raises:
        Conflict: the sizes differ, or a sum would have to be split where its pieces differ.
    """
    if p == q:
        return
    if len(p) == len(q) == 1:  # most are
        a, b = p[0], q[0]
        if a.parent is not None:
            a = a.root()
        if b.parent is not None:
            b = b.root()
        if a is b:
            return
        if a.size == b.size and a.product is None and b.product is None:
            _merge(a, b)
            return
    if size(p) != size(q):
        raise Conflict(f"{size(p)} against {size(q)}")
    left, right = factors(p), factors(q)
    while left and right:
        a, b = left[0], right[0]
        if a is b:
            left, right = left[1:], right[1:]
        elif a.size == b.size:
            _merge(a, b)
            left, right = left[1:], right[1:]
        elif a.size % b.size and b.size % a.size:
            shared = gcd(a.size, b.size)
            if shared > 1 and is_free((a, b)):
                left = [*_split(a, shared), *left[1:]]
            else:
                left, right = _fix_across(left, right)
        elif a.size > b.size:
            left = [*_split(a, b.size), *left[1:]]
        else:
            right = [*_split(b, a.size), *right[1:]]
        if left and right:
            left, right = factors(left), factors(right)  # merging may have refined what is left


def _fix_across(left: list[Axis], right: list[Axis]) -> tuple[list[Axis], list[Axis]]:
    """Pass over leading factors of equal product, of which none is a boundary of both sides (2 x 3 and 3 x 2): all fixed.

    As few are fixed as will do; of those that are already (56 rows as 8 x 7 and as 28 x 2) there is nothing to learn.
    """
    why = _two_views(left[0].size, right[0].size)
    m = n = 1
    while m != n or m == 1:
        side, own, other = (left, m, n) if m <= n else (right, n, m)
        if not side:
            raise Conflict(f"{[a.size for a in left]} against {[a.size for a in right]}")
        a = side[0]
        wanted = gcd(a.size, other // gcd(own, other))
        if 1 < wanted < a.size:
            side[:1] = _split(a, wanted)
        passed = side.pop(0)
        freeze((passed,), why)
        m, n = (m * passed.size, n) if side is left else (m, n * passed.size)
        left, right = factors(left), factors(right)
    return left, right


def _two_views(m: int, n: int, where: str = "") -> str:
    return f"two views of it do not fit ({m} against {n})" + (f" in {where}" if where else "")


def _merge(a: Axis, b: Axis) -> None:
    """Union of two different roots of one size; neither is a product."""
    if b.sum is not None:
        a, b = b, a
    if b.sum is None:
        if a.sum is not None and any(leaf is b for leaf in _leaves((a,))):
            raise Conflict(f"an axis of {a.size} would contain itself")
        b.parent = a
        for reason in b.reasons:
            freeze((a,), reason)
        return
    assert a.sum is not None and b.sum is not None
    bounds = sorted(_bounds(a.sum) | _bounds(b.sum))
    sizes = [end - start for start, end in zip([0, *bounds], bounds)]
    pieces_a, pieces_b = cut((a,), sizes), cut((b,), sizes)
    for x, y in zip(pieces_a, pieces_b):
        unify(x, y)
    if a.sum is not None:
        a.sum = tuple(pieces_a)
    if b is not a.root():
        b.parent = a


def _bounds(parts: Sequence[Dim]) -> set[int]:
    ends, total = set(), 0
    for part in parts:
        total += size(part)
        ends.add(total)
    return ends


def concat(parts: Sequence[Dim]) -> Dim:
    """The dimension that `cat` builds from `parts`, in order."""
    parts = [part for part in parts if size(part) > 0]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return (Axis(0, ["empty"]),)
    out = Axis(sum(size(part) for part in parts))
    out.sum = tuple(parts)
    return (out,)


def cut(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """Cut `dim` into consecutive pieces of `sizes`, as `split` does; the axis becomes their sum.

    Raises:
        Conflict: the sizes do not add up, or a cut falls inside an element of a product.
    """
    if sum(sizes) != size(dim):
        raise Conflict(f"{size(dim)} cut into {list(sizes)}")
    if any(n == 0 for n in sizes):
        pieces = iter(cut(dim, [n for n in sizes if n]))
        return [next(pieces) if n else (Axis(0, ["empty"]),) for n in sizes]
    if len(sizes) == 1:
        return [dim]
    lead, *rest = factors(dim)
    if rest:  # whole elements of the leading axis only
        inner = size(tuple(rest))
        if any(n % inner for n in sizes):
            if not is_free(dim):  # nothing will ever be cut from it: pieces of any size say no more of it
                return [axis(n, *reasons(dim)) for n in sizes]
            raise Conflict(f"a part ends inside of a group: {[a.size for a in (lead, *rest)]} cut into {list(sizes)}")
        return [(*piece, *rest) for piece in cut((lead,), [n // inner for n in sizes])]
    if lead.sum is None:
        lead.sum = tuple(axis(n, *lead.reasons) for n in sizes)
        return list(lead.sum)
    return _cut_sum(list(lead.sum), list(sizes))


def _cut_sum(parts: list[Dim], sizes: list[int]) -> list[Dim]:
    pieces: list[Dim] = []
    for wanted in sizes:
        got: list[Dim] = []
        while wanted:
            part = parts.pop(0)
            if size(part) > wanted:
                part, rest = cut(part, [wanted, size(part) - wanted])
                parts.insert(0, rest)
            got.append(part)
            wanted -= size(part)
        pieces.append(concat(got))
    return pieces


def regroup(dims: Sequence[Dim], sizes: Sequence[int], where: str = "") -> list[Dim]:
    """The dimensions of a `reshape` of `dims` to `sizes`: the same factors in the same order, grouped anew.

    What lies across a boundary that no refinement has (4 x 12 as 6 x 8, of which 2 x 6 x 4 is left) is fixed;
    its reason says `where`.

    Raises:
        Conflict: a boundary falls inside an axis that cannot be split there.
    """
    todo = [a for dim in dims for a in factors(dim)]
    out: list[Dim] = []
    for wanted in sizes:
        got: list[Axis] = []
        while wanted > 1:
            todo = factors(todo)
            if not todo:
                raise Conflict(f"nothing left to fill {wanted}")
            a = todo.pop(0)
            if wanted % a.size == 0:
                got.append(a)
                wanted //= a.size
            elif a.size % wanted == 0:
                todo = [*_split(a, wanted), *todo]
            elif todo and not is_free((a, todo[0])):
                # fixed axes may be grouped in any way: nothing will ever be cut from them
                todo = [Axis(a.size * todo[0].size, reasons((a, todo[0]))), *todo[1:]]
            elif not todo:
                raise Conflict(f"an axis of {a.size} viewed as {wanted}")
            elif (shared := gcd(a.size, wanted)) > 1:
                todo = [*_split(a, shared), *todo]
            else:
                across = gcd(todo[0].size, wanted)
                if 1 < across < todo[0].size:
                    todo[:1] = _split(todo[0], across)
                freeze((a, todo[0]), _two_views(a.size, wanted, where))
                todo = [a, *todo]
        out.append(tuple(got))
    return out


# -- evaluating -------------------------------------------------------------------------------------------------------


def kept(dim: Dim, masks: Mapping[Axis, torch.Tensor]) -> torch.Tensor:
    """Evaluate `dim` to a mask of shape (size(dim),), from a mask for some of its atoms.

    `masks[atom]` has shape (atom.size,) and any dtype: booleans give the kept indices, floats give soft masks and the
    result is differentiable in them.  Atoms without a mask are kept whole.
    """
    like = next(iter(masks.values()), None)
    like = torch.ones(1, dtype=torch.bool) if like is None else like
    out: torch.Tensor | None = None
    for a in factors(dim):
        if a.sum is not None:
            mask = torch.cat([kept(part, masks) for part in a.sum])
        else:
            found = masks.get(a)
            mask = torch.ones(a.size, dtype=like.dtype, device=like.device) if found is None else found
        out = mask if out is None else (out[:, None] * mask[None, :]).reshape(-1)
    return torch.ones(1, dtype=like.dtype, device=like.device) if out is None else out


def gathered(dim: Dim, indices: Mapping[Axis, torch.Tensor], sizes: Mapping[Axis, int] | None = None) -> torch.Tensor:
    """Evaluate `dim` to indices into it, (new size,) of int64, from indices into some of its atoms.

    `indices[atom]`, (new size of the atom,), says which of its elements stands at each new place: fewer than there are
    (an export), or some of them again (an expansion).  Atoms without indices stay as they are.  `sizes` are the sizes
    that the elements are counted in, where these are not the atoms' own.

        >>> rows = (Axis(2), Axis(3))
        >>> gathered(rows, {rows[1]: torch.tensor([0, 2])}).tolist()
        [0, 2, 3, 5]
    """
    sizes = {} if sizes is None else sizes
    out = torch.zeros(1, dtype=torch.int64)
    for a in factors(dim):
        if a.sum is not None:
            parts, total = [], 0
            for part in a.sum:
                parts.append(gathered(part, indices, sizes) + total)
                total += int(measure(part, sizes))  # type: ignore[call-overload]
            index = torch.cat(parts)
        else:
            total = sizes.get(a, a.size)
            found = indices.get(a)
            index = torch.arange(total) if found is None else found
        out = (out[:, None] * total + index[None, :]).reshape(-1)
    return out


def coordinates(dim: Dim) -> dict[Axis, torch.Tensor]:
    """Atom -> which of its elements each element of `dim` belongs to, (size(dim),) of int64; -1 for those of none."""
    out: dict[Axis, torch.Tensor] = {}
    total = 1
    for f in factors(dim):
        own: dict[Axis, torch.Tensor] = {}
        start = 0
        for part in f.sum or ():
            for a, at in coordinates(part).items():
                own.setdefault(a, torch.full((f.size,), -1))[start : start + len(at)] = at
            start += size(part)
        if f.sum is None:
            own[f] = torch.arange(f.size)
        none, none_of_own = torch.full((total,), -1), torch.full((f.size,), -1)
        pairs = {a: (out.get(a, none), own.get(a, none_of_own)) for a in (*out, *(a for a in own if a not in out))}
        out = {a: torch.maximum(left[:, None], right[None, :]).reshape(-1) for a, (left, right) in pairs.items()}
        total *= f.size
    return out


def is_multilinear(dim: Dim) -> bool:
    """Whether no atom of `dim` meets itself in a product: a mask of `dim` is linear in that of each atom then."""
    seen: set[Axis] = set()
    for f in factors(dim):
        own = set(atoms((f,)))
        if seen & own or (f.sum is not None and not all(map(is_multilinear, f.sum))):
            return False
        seen |= own
    return True


def measure(dim: Dim, sizes: Mapping[Axis, object], zero: object = 0):
    """Evaluate the size of `dim` from a size for some of its atoms: a polynomial in them.

    The sizes may be ints, arrays over many structures, tensors, or symbols: whatever adds and multiplies.
    """
    out: object = 1
    for a in factors(dim):
        if a.sum is not None:
            value: object = zero
            for part in a.sum:
                value = value + measure(part, sizes, zero)  # type: ignore[operator]
        else:
            value = sizes.get(a, a.size)
        out = out * value  # type: ignore[operator]
    return out
