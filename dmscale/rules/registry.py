"""The registry of operator rules, and the equations in which regular operators are written.

A rule says how the axes of an operator's outputs follow from those of its inputs.  It is called with the trace, the
output and the operator's own arguments, and returns the dimensions of the output (or a list of them for several
outputs):

    @rule(aten.transpose)
    def transpose(trace, out, x, i, j):
        dims = list(trace.dims(x))
        dims[i], dims[j] = dims[j], dims[i]
        return dims

A regular operator needs no function, only its equation:

    equation(aten.mm, "n k, k m -> n m")

A letter that is on the left only is contracted; the product of the letters is the number of MACs.  `(g o)` is a product
of axes, `*x` stands for any number of dimensions.  Pointwise operators need nothing: PyTorch tags them.

What a rule cannot express it freezes through `trace.freeze`, or it raises `Conflict`, and the trace freezes every axis
that meets in the call.  An operator without a rule freezes the axes that pass through it and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import axes
from ..axes import Conflict, Dim

if TYPE_CHECKING:
    from ..tracer import Tracer

Dims = Sequence[Dim]
Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""Operator overload -> rule.  `rule` and `equation` fill it when the modules of this package are imported."""


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of every overload of `operators` (packets such as `torch.ops.aten.view`)."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            for name in operator.overloads():
                RULES[getattr(operator, name)] = function
        return function

    return register


class Equation:
    """`b (g i) *x, (g o) i *k -> b (g o) *y`: the dimensions of each operand and of the result, as letters.

    Args:
        text: operands, arrow, result.
        macs: letters whose product is the number of MACs; by default every letter on the left.
    """

    def __init__(self, text: str, macs: str | None = None):
        left, right = text.split("->")
        self.text = text
        self.operands = [_tokens(operand) for operand in left.split(",")]
        self.result = _tokens(right)
        letters = dict.fromkeys(re.findall(r"\w+", left))
        self.macs = list(letters) if macs is None else macs.split()
        in_result = set(re.findall(r"\w+", right))
        self.contracted = {
            letter: self._positions(letter)
            for letter in letters if letter not in in_result and len(self._mentioning(letter)) > 1
        }  # fmt: skip
        alone = [x.lstrip("*") for token in self.result for x in (token if isinstance(token, tuple) else (token,))]
        self.makers = [(x, which) for x in alone if (which := self._mentioning(x))]
        self._plans: dict[tuple[int, ...], list[tuple[Any, int, int, int]]] = {}

    def bind(self, operands: Sequence[Dims], sizes: Mapping[str, int], known: Mapping[str, Any]) -> dict[str, Any]:
        """Match operands against the equation, unifying what shares a letter.

        Args:
            operands: the dimensions of each operand, as many as the equation names.
            sizes: sizes of letters that no operand shows alone, such as the number of groups.
            known: dimensions bound beforehand: a Dim for a letter, a list of them for a `*` letter.
        Returns:
            letter -> Dim, and `*` letter -> list of Dim.
        """
        bound: dict[str, Any] = dict(known)
        for letter, n in sizes.items():
            bound[letter] = axes.axis(n)
        products: list[tuple[tuple[str, ...], Dim]] = []
        for token, which, start, end in self._plan(tuple([len(dims) for dims in operands])):
            dims, old = operands[which], bound.get(token)
            if end >= 0:
                if old is None:
                    bound[token] = list(dims[start:end])
                else:
                    for p, q in zip(old, dims[start:end]):
                        axes.unify(p, q)
            elif token.__class__ is tuple:
                products.append((token, dims[start]))
            elif old is None:
                bound[token] = dims[start]
            else:
                axes.unify(old, dims[start])
        for letters, dim in products:
            unknown = [letter for letter in letters if letter not in bound]
            if len(unknown) > 1:
                raise Conflict(f"sizes of {unknown} are not known in {self.text}")
            if unknown:
                rest = axes.size(tuple(a for letter in letters if letter in bound for a in bound[letter]))
                if rest == 1:  # `(g o)` with one group is `o` itself
                    bound[unknown[0]] = dim
                    continue
                bound[unknown[0]] = axes.axis(axes.size(dim) // rest)
            axes.unify(dim, tuple(a for letter in letters for a in bound[letter]))
        return bound

    def _plan(self, ranks: tuple[int, ...]) -> list[tuple[Any, int, int, int]]:
        """(token, operand, its first dimension there, the end of a `*` letter or -1) for operands of these ranks."""
        plan = self._plans.get(ranks)
        if plan is None:
            plan = self._plans[ranks] = []
            for which, (tokens, rank) in enumerate(zip(self.operands, ranks)):
                position, extra = 0, rank - sum(isinstance(t, tuple) or not t.startswith("*") for t in tokens)
                for token in tokens:
                    if isinstance(token, str) and token.startswith("*"):
                        plan.append((token[1:], which, position, position + extra))
                        position += extra
                    else:
                        plan.append((token, which, position, -1))
                        position += 1
        return plan

    def _mentioning(self, letter: str) -> list[int]:
        return [i for i, tokens in enumerate(self.operands) if _mentions(tokens, letter)]

    def _positions(self, letter: str) -> list[tuple[int, int]]:
        """(operand, dimension) wherever `letter` stands; from the end where a `*x` stands before it, never behind as well."""
        found = []
        for which, tokens in enumerate(self.operands):
            at = next((i for i, token in enumerate(tokens) if letter == token or letter in token), None)
            if at is not None:
                behind = any(isinstance(token, str) and token.startswith("*") for token in tokens[:at])
                found.append((which, at - len(tokens) if behind else at))
        return found

    def output(self, bound: Mapping[str, Any]) -> list[Dim]:
        """The dimensions of the result."""
        out: list[Dim] = []
        for token in self.result:
            if isinstance(token, tuple):
                out.append(tuple(a for letter in token for a in bound[letter]))
            elif token.startswith("*"):
                out += bound[token[1:]]
            else:
                out.append(bound[token])
        return out


def _tokens(text: str) -> list[str | tuple[str, ...]]:
    found = re.findall(r"\(([^)]*)\)|(\*?\w+)", text)
    return [tuple(group.split()) if group else word for group, word in found]


def _mentions(tokens: list[str | tuple[str, ...]], letter: str) -> bool:
    return any(letter in t if isinstance(t, tuple) else t.lstrip("*") == letter for t in tokens)


def contract(
    trace: Tracer,
    eq: Equation,
    operands: Sequence[torch.Tensor],
    *,
    sizes: Mapping[str, int] | None = None,
    known: Mapping[str, Any] | None = None,
) -> tuple[list[Dim], dict[str, Any]]:
    """Apply a contraction: unify, count its MACs, note the contracted axes.  Returns output dimensions and binding."""
    values = [trace.value(t) for t in operands]
    bound = eq.bind([v.dims for v in values], sizes or {}, known or {})
    macs: list[Dim] = []
    for letter in eq.macs:
        dims = bound[letter]
        if dims.__class__ is list:  # of a `*` letter
            macs += dims
        else:
            macs.append(dims)
    trace.count_macs(macs)
    for letter, positions in eq.contracted.items():
        met = [(values[i], values[i].dims[at]) for i, at in positions if values[i].dims[at]]
        trace.contracted(bound[letter], met)
    if "b" in bound and all([v.data for v in values]):
        for dim in _several(bound["b"]):
            trace.batched(dim)
    for letter, makers in eq.makers:
        if not any([values[i].data for i in makers]):  # weights alone
            for dim in _several(bound[letter]):
                trace.produced(dim)
    return eq.output(bound), bound


def _several(bound: Any) -> Sequence[Dim]:
    """The dimensions that a letter is bound to: those of a `*` letter, or its own."""
    return bound if isinstance(bound, list) else [bound]


def equation(operator: Any, text: str, *, bias: bool = False) -> None:
    """Register a regular operator by its equation.

    Args:
        operator: the packet, such as `torch.ops.aten.mm`.
        text: the equation over its tensor operands.
        bias: whether the first argument is added to the result (`addmm`), broadcast.
    """
    eq = Equation(text)

    @rule(operator)
    def apply(trace: Tracer, out: torch.Tensor, *args: Any, **kwargs: Any) -> list[Dim]:
        dims, _ = contract(trace, eq, args[bias : bias + len(eq.operands)])
        if bias:
            for own, added in zip(reversed(dims), reversed(trace.dims(args[0]))):
                if added:
                    axes.unify(own, added)
        return dims
