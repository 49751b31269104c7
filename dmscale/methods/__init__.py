"""How a search turns gradients into a structure: one class a method, all on the same space, schedule, fit and export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SearchError
from .base import Method
from .comparators import ContinuousSparsification, Gumbel, HardConcrete, NumberSelection, Pas
from .dms import Dms, EstimatedTopk
from .knapsack import Knapsack

if TYPE_CHECKING:
    from ..search import Search

METHODS = {
    "knapsack": "importance per exact cost, one threshold for the network, hard masks (the default)",
    "dms": "DMS (ICML 2024): one learnable number a dimension behind a differentiable top-k",
    "dms-projected": "the same with hard masks, and the budget met at every step instead of a penalty",
    "dms-unnormalised": "DMS without its rank normalisation (the paper's ablation)",
    "estimated-topk": "hard top-k with a plain straight-through gradient",
    "gumbel": "two logits an element, Gumbel softmax",
    "number": "one logit a count, Gumbel softmax over counts",
    "hard-concrete": "L0 gates with a Lagrangian",
    "pas": "one weight an element, binarised straight-through",
    "continuous": "continuous sparsification: sigmoid(beta s) with rising beta",
}
"""Name -> what it is."""

_RELAXATIONS = {
    "gumbel": Gumbel, "number": NumberSelection, "hard-concrete": HardConcrete, "pas": Pas,
    "continuous": ContinuousSparsification,
}  # fmt: skip


def make(
    search: Search, mode: str | None, lr: float | None, penalty: float, adapt: bool, hard: bool | None, balance: bool
) -> Method:
    """The method that `search` names.

    Raises:
        SearchError: there is no such method, or it does not take the mode or option.
    """
    name = search.method_name
    if name not in METHODS:
        raise SearchError(f"method={name!r} is none of {', '.join(METHODS)}")
    if hard is not None and not name.startswith("dms"):
        raise SearchError(f"hard={hard}: only method 'dms' can run with soft or hard masks, not {name!r}")
    if balance and not name.startswith("dms"):
        raise SearchError(f"balance: only method 'dms' balances gradients, not {name!r}")
    if name == "knapsack":
        return Knapsack(search, mode)
    if name in _RELAXATIONS:
        return _RELAXATIONS[name](search, mode, lr, penalty, adapt)
    if name == "estimated-topk":
        return EstimatedTopk(search, mode, lr, penalty, adapt, hard=True)
    if name == "dms-projected":
        return Dms(search, mode or "projected", lr, penalty, adapt, hard is not False, balance=balance)
    return Dms(search, mode, lr, penalty, adapt, bool(hard), normalise=name == "dms", balance=balance)


__all__ = ["METHODS", "Method", "make"]
