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
        self.contracted = [
            letter for letter in letters
            if letter not in in_result and sum(_mentions(op, letter) for op in self.operands) > 1
        ]  # fmt: skip

    def bind(self, operands: Sequence[Dims], sizes: Mapping[str, int], known: Mapping[str, Any]) -> dict[str, Any]:
        """Match operands against the equation, unifying what shares a letter.

        Args:
            operands: the dimensions of each operand, as many as the equation names.
            sizes: sizes of letters that no operand shows alone, such as the number of groups.
            known: dimensions bound beforehand: a Dim for a letter, a list of them for a `*` letter.
        Returns:
            letter -> Dim, and `*` letter -> list of Dim.
        """
        bound: dict[str, Any] = {letter: axes.axis(n) for letter, n in sizes.items()} | dict(known)
        products: list[tuple[tuple[str, ...], Dim]] = []
        for tokens, dims in zip(self.operands, operands):
            dims = list(dims)
            extra = len(dims) - sum(not t.startswith("*") for t in tokens if isinstance(t, str))
            extra -= sum(isinstance(t, tuple) for t in tokens)
            for token in tokens:
                if isinstance(token, tuple):
                    products.append((token, dims.pop(0)))
                elif token.startswith("*"):
                    self._bind_rest(bound, token[1:], dims[:extra])
                    del dims[:extra]
                else:
                    _bind_letter(bound, token, dims.pop(0))
        for letters, dim in products:
            unknown = [letter for letter in letters if letter not in bound]
            if len(unknown) > 1:
                raise Conflict(f"sizes of {unknown} are not known in {self.text}")
            if unknown:
                rest = axes.size(tuple(a for letter in letters if letter in bound for a in bound[letter]))
                whole = rest == 1  # `(g o)` with one group is `o` itself
                bound[unknown[0]] = dim if whole else axes.axis(axes.size(dim) // rest)
            axes.unify(dim, tuple(a for letter in letters for a in bound[letter]))
        return bound

    @staticmethod
    def _bind_rest(bound: dict[str, Any], letter: str, dims: list[Dim]) -> None:
        for old, new in zip(bound.setdefault(letter, dims), dims):
            axes.unify(old, new)

    def positions(self, letter: str, operands: Sequence[Dims]) -> list[Dim | None]:
        """The dimension of each operand in which `letter` stands, or None."""
        found: list[Dim | None] = []
        for tokens, dims in zip(self.operands, operands):
            at = next((i for i, token in enumerate(tokens) if letter == token or letter in token), None)
            found.append(None if at is None else dims[at])  # `*x` stands behind every letter that is contracted
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


def _bind_letter(bound: dict[str, Any], letter: str, dim: Dim) -> None:
    if letter in bound:
        axes.unify(bound[letter], dim)
    else:
        bound[letter] = dim


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
    bound = eq.bind([trace.dims(t) for t in operands], sizes or {}, known or {})
    macs: list[Dim] = []
    for letter in eq.macs:
        value = bound[letter]
        macs += value if isinstance(value, list) else [value]
    trace.count_macs(macs)
    for letter in eq.contracted:
        met = [(t, own) for t, own in zip(operands, eq.positions(letter, [trace.dims(t) for t in operands])) if own]
        trace.contracted(bound[letter], met)
    weights = [i for i, t in enumerate(operands) if not trace.value(t).data]
    activations = [i for i in range(len(operands)) if i not in weights]
    if not weights and "b" in bound:
        trace.batched(bound["b"])
    for token in eq.result:
        for letter in token if isinstance(token, tuple) else (token,):
            in_weight, in_activation = (
                any(_mentions(eq.operands[i], letter) for i in group) for group in (weights, activations)
            )
            if in_weight and not in_activation:
                trace.produced(bound[letter])
    return eq.output(bound), bound


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
