"""Knapsack pruning: importance against exact cost (Aflalo et al., 2020; reference 1.128).

Importance is |sum w dL/dw| of an element with all that is linked to it.  What an element costs depends on what else is
kept, so costs are taken where the search is, from the exact cost polynomial, and not once at the start as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import budget as budgets
from ..optional import require
from ..structure import Structure
from .base import Found, Task, strategy
from .ranking import by_share
from .taylor import fisher_scores, taylor_scores

_ROUNDS = 6  # of the exact form: solve, linearise the cost there, solve again
_REACH = 1.5  # how far a size may move in one round, as a factor: the linear cost is right only nearby


@strategy(
    "knapsack", "least |sum w dL/dw| per saved cost goes, one element at a time, widths and heads", needs_data=True
)
def knapsack(task: Task) -> Found:
    return Found(greedy(task, taylor_scores(task), depth=False))


@strategy("knapsack-depth", "the same with blocks among the elements", needs_data=True)
def knapsack_depth(task: Task) -> Found:
    return Found(greedy(task, taylor_scores(task), depth=True))


@strategy(
    "knapsack-exact", "the most |sum w dL/dw| within the budget, by integer programming (needs scipy)", needs_data=True
)
def knapsack_exact(task: Task) -> Found:
    return Found(exact(task, taylor_scores(task)))


@strategy(
    "knapsack-fisher",
    "the same with blocks, by E[(dL/dm)^2]: what the default search solves, in one shot",
    needs_data=True,
)
def knapsack_fisher(task: Task) -> Found:
    return Found(greedy(task, fisher_scores(task), depth=True))


def greedy(task: Task, scores: Mapping[str, Any], depth: bool) -> Structure:
    """From the full network, drop what is worth least for the cost that it saves until the budget holds.

    Without `depth` blocks go only when the widths are spent.
    """
    if depth:
        start = budgets.allocate(task.space, task.budget, scores)
        return budgets.fit(task.space, start, task.budget, scores, keep=None)
    problem = budgets._Problem(task.space, task.budget, scores, None)
    return task.fit(_named(task, problem.remove(problem.full.copy())), scores)


def exact(task: Task, scores: Mapping[str, Any]) -> Structure:
    """The integer program over the size of every width: most importance within the cost, linearised at the last solution.

    Raises:
        MissingPackageError: scipy is not installed.
    """
    problem = budgets._Problem(task.space, task.budget, scores, None)
    best: Structure | None = None
    for start in (greedy(task, scores, depth=False), by_share(task, scores)):  # the linear cost finds a local optimum
        for _ in range(_ROUNDS):
            if best is not None and _worth(problem, start) <= _worth(problem, best):
                break
            best = start
            start = task.fit(_named(task, _solve(problem, _vector(best))), scores)
    assert best is not None
    return best


def _vector(structure: Structure) -> np.ndarray:
    return np.array(list(structure.sizes.values()), dtype=np.int64)


def _worth(problem: budgets._Problem, structure: Structure) -> float:
    return float(problem._worth(_vector(structure)[None])[0])


def _solve(problem: budgets._Problem, reference: np.ndarray) -> np.ndarray:
    """The best sizes near `reference` by the cost linearised there: choose one size a dimension."""
    optimize = require("scipy.optimize", "strategies", "the exact knapsack")
    sparse = require("scipy.sparse", "strategies", "the exact knapsack")
    choices: list[tuple[int, int]] = []
    for i, d in enumerate(problem.dimensions):
        near = problem.allowed[i]
        if d.kind == "depth":
            near = reference[i : i + 1]
        near = near[(near >= reference[i] / _REACH - 1) & (near <= reference[i] * _REACH + 1)]
        choices += [(i, int(k)) for k in near]
    rows = problem._moved(reference, choices)
    at, found = problem.costs(reference[None]), problem.costs(rows)
    worth = np.array([problem.kept[i][k] for i, k in choices])
    one = sparse.csr_matrix((np.ones(len(choices)), ([i for i, _ in choices], np.arange(len(choices)))))
    constraints = [optimize.LinearConstraint(one, 1, 1)]
    for m, target in problem.targets.items():
        change = (found[m] - at[m]) / target
        constraints.append(optimize.LinearConstraint(change[None], -np.inf, 1 - at[m][0] / target))
    result = optimize.milp(
        -worth / max(float(worth.max()), 1e-30), integrality=np.ones(len(choices)), bounds=optimize.Bounds(0, 1),
        constraints=constraints, options={"time_limit": 20.0},
    )  # fmt: skip
    if result.x is None:
        return reference
    out = reference.copy()
    for (i, k), x in zip(choices, result.x):
        if x > 0.5:
            out[i] = k
    return out


def _named(task: Task, sizes: np.ndarray) -> dict[str, float]:
    return {n: int(k) for n, k in zip(task.space.dimensions, sizes)}
