"""Budgets: what a user asks for, whether it can be reached, and the last step that meets it exactly."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .cost import METRICS, UNITS, Cost
from .errors import BudgetError
from .structure import Structure
from .tables import number

if TYPE_CHECKING:
    from .space import Dimension, SearchSpace

SLACK = 0.005
"""A fitted structure lies at most this share below the binding target, and never above it."""

_MOST_EXCHANGES = 2048
"""About as many pairs of moves are tried at once in the last step of a fit."""

_PREFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_TERM = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%|[kKMGBT]?)\s*([A-Za-z_]+)\s*")


@dataclass(frozen=True)
class Budget:
    """Upper bounds: metric -> absolute number (MACs, parameters, bytes).  See `parse` for how users write one."""

    targets: Mapping[str, float]

    def __str__(self) -> str:
        return ", ".join(f"{number(t)} {UNITS[m]}" for m, t in self.targets.items())


def parse(target: Any, space: SearchSpace) -> Budget:
    """A budget from "50% macs", "6M params, 50% macs", dict(macs=0.5, params=6e6) or a `Budget`.

    A number up to one in a dict is a share of the full model's cost, a larger one absolute.

    Raises:
        BudgetError: misspelt, more than the full model, below what is reachable, or contradictory.
    """
    shares = dict(_entries(target))
    if not shares:
        raise BudgetError("the budget is empty; write for example '50% macs' or dict(macs=0.5, params=6e6)")
    full, targets, problems = space.cost(), {}, []
    for metric, (value, relative) in shares.items():
        wanted = value * full[metric] if relative else value
        if not 0 < wanted < float("inf"):
            problems.append(f"{metric}: {value} is not a positive number")
        elif wanted > full[metric] * (1 + 1e-9):
            problems.append(
                f"{metric}: {number(wanted)} is {wanted / max(full[metric], 1):.3g} times the full model's "
                f"{number(full[metric])}; a budget cannot exceed 100%"
            )
        targets[metric] = wanted
    if problems:
        raise BudgetError("; ".join(problems))
    found = Budget(targets)
    _check_reachable(space, found, full)
    return found


def _entries(target: Any) -> Iterator[tuple[str, tuple[float, bool]]]:
    if isinstance(target, Budget):
        for metric, value in target.targets.items():
            _check_metric(metric)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise BudgetError(f"budget {metric}={value!r} is no number")
            yield metric, (float(value), False)
    elif isinstance(target, Mapping):
        for metric, value in target.items():
            _check_metric(metric)
            if isinstance(value, str):
                yield from _entries(f"{value} {metric}")
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                yield metric, (float(value), value <= 1)
            else:
                raise BudgetError(f"budget {metric}={value!r} is no number")
    elif isinstance(target, str):
        seen: set[str] = set()
        for part in target.split(","):
            match = _TERM.fullmatch(part)
            if not match:
                raise BudgetError(
                    f"cannot read the budget {part.strip()!r}; write for example '50% macs' or '6M params'"
                )
            value, unit, metric = float(match[1]), match[2], match[3].lower()
            _check_metric(metric)
            if metric in seen:
                raise BudgetError(f"the budget {target!r} names {metric} twice")
            seen.add(metric)
            yield metric, (value / 100, True) if unit == "%" else (value * _PREFIX[unit], unit == "" and value <= 1)
    else:
        raise BudgetError(f"a budget is a string, a dict or a Budget, not {target!r}")


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        import difflib

        close = difflib.get_close_matches(metric, METRICS, 1, 0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BudgetError(f"unknown metric {metric!r} in the budget{hint}; metrics are {', '.join(METRICS)}")


def _check_reachable(space: SearchSpace, wanted: Budget, full: Cost) -> None:
    if not space.dimensions:
        reasons = "; ".join(f"{n}: {r}" for n, r in list(space.frozen.items())[:5])
        raise BudgetError(f"nothing in this model can shrink. Frozen: {reasons or 'no axis of any weight was found'}")
    least = space.cost(smallest(space))
    problems = [
        f"{m}: {number(t)} ({t / max(full[m], 1):.1%}) is below what is reachable, {number(least[m])} to {number(full[m])} "
        f"({least[m] / max(full[m], 1):.1%} to 100%)"
        for m, t in wanted.targets.items()
        if least[m] > t
    ]
    if problems:
        blocking = ", ".join(list(space.frozen)[:6]) or "none: the minimum sizes hold it up"
        raise BudgetError("; ".join(problems) + f". Frozen dimensions that would have to thaw: {blocking}")


def smallest(space: SearchSpace) -> Structure:
    """The structure with every dimension at its minimum."""
    return space.structure({n: d.lowest for n, d in space.dimensions.items()})


def satisfied(cost: Cost, wanted: Budget) -> bool:
    """Whether every constraint holds."""
    return all(cost[m] <= t for m, t in wanted.targets.items())


# -- the exact fit ----------------------------------------------------------------------------------------------------


def fit(
    space: SearchSpace, start: Structure, wanted: Budget, scores: Mapping[str, Any], keep: Structure | None
) -> Structure:
    """Move from `start` to a structure within `SLACK` below the budget.

    Far from the target all dimensions are scaled alike; the rest is done one step at a time, least importance per cost
    first, and where no single step fits, by exchanging one step for another.

    Args:
        scores: member -> score an element; the lowest go first, the highest come back first.
        keep: a structure whose elements come before all others, whatever their scores.
    """
    problem = _Problem(space, wanted, scores, keep)
    sizes = np.array([start.sizes[n] for n in space.dimensions], dtype=np.int64)
    sizes = problem.add(problem.exchange(problem.add(problem.remove(problem.scale(sizes)))))
    chosen = {n: int(k) for n, k in zip(space.dimensions, sizes)}
    return space.structure(chosen, problem.scores)


def allocate(
    space: SearchSpace, wanted: Budget, scores: Mapping[str, Any], start: Structure | None = None
) -> Structure:
    """What has most importance for its cost, under one threshold for the whole network: a knapsack, solved greedily.

    Prices are marginal costs at the sizes found so far, so the solution is found twice; it may lie further below the
    budget than `fit` allows, which is meant to follow it.

    Args:
        scores: member -> importance an element, additive over elements and members: an estimate of the loss that its
            removal costs.
        start: where the first prices are taken; the full structure by default.
    """
    problem = _Problem(space, wanted, scores, None)
    start = start or space.full()
    sizes = problem.threshold(np.array([start.sizes[n] for n in space.dimensions], dtype=np.int64))
    return space.structure({n: int(k) for n, k in zip(space.dimensions, sizes)}, problem.scores)


class _Problem:
    """Sizes of all dimensions as a vector (D,), their costs, and the moves between them."""

    def __init__(self, space: SearchSpace, wanted: Budget, scores: Mapping[str, Any], keep: Structure | None):
        self.space, self.wanted = space, wanted
        self.dimensions: list[Dimension] = list(space.dimensions.values())
        self.scores = {m: _preferring(np.asarray(s, dtype=np.float64), keep, m) for m, s in scores.items()}
        self.columns: list[tuple[int, Any]] = []  # dimension -> its columns in the vector of variables
        self.gain: list[np.ndarray] = []  # dimension -> importance of its first, second, ... step, best first
        column = 0
        for d in self.dimensions:
            if d.kind == "depth":
                continue
            totals = np.array([a.size for a in d.axes], dtype=np.int64)
            self.columns.append((column, totals))
            column += len(totals)
        widths = iter(list(self.columns))
        self.columns = []
        for d in self.dimensions:
            if d.kind == "depth":
                place = np.argsort(np.argsort(-self._score(d.name, d.size), kind="stable"))  # of each block, best first
                self.columns.append((column, place))
                column += d.size
            else:
                self.columns.append(next(widths))
            self.gain.append(self._gains(d))
        self.width = column
        self.lowest = np.array([d.lowest for d in self.dimensions])
        self.full = np.array([d.size for d in self.dimensions])
        self.targets = {m: t for m, t in wanted.targets.items()}
        self.allowed = [_allowed(d) for d in self.dimensions]  # sizes of each dimension, ascending

    def _score(self, member: str, size: int) -> np.ndarray:
        found = self.scores.get(member)
        return np.zeros(size) if found is None else found

    def _gains(self, d: Dimension) -> np.ndarray:
        """Importance of each element of a dimension with what is linked to it, the most important first."""
        total = np.zeros(d.size)
        for member, count in self.space._members(d):
            upto = np.concatenate([[0.0], np.cumsum(np.sort(self._score(member, count))[::-1])])
            ends = np.array([d.count(count, k) for k in range(d.size + 1)])
            total += np.diff(upto[ends])
        return total

    def costs(self, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> cost at each row of sizes (S, D), for the metrics of the budget."""
        variables = np.zeros((len(sizes), self.width), dtype=np.int64)
        for i, (d, (column, layout)) in enumerate(zip(self.dimensions, self.columns)):
            k = sizes[:, i : i + 1]
            variables[:, column + np.arange(len(layout))] = k > layout if d.kind == "depth" else k * layout // d.size
        return {m: self.space.costs.many(variables, m) for m in self.targets}

    def fits(self, sizes: np.ndarray) -> bool:
        return bool(self.load(sizes[None])[0] <= 1)

    def load(self, sizes: np.ndarray) -> np.ndarray:
        """The largest ratio of cost to target at each row of sizes (S, D), (S,): at most one means feasible."""
        found = self.costs(sizes)
        return np.max([found[m] / t for m, t in self.targets.items()], axis=0)

    def _scaled(self, sizes: np.ndarray, factor: float) -> np.ndarray:
        return np.array(
            [k if d.kind == "depth" else d.allowed(k * factor) for d, k in zip(self.dimensions, sizes)], dtype=np.int64
        )

    def scale(self, sizes: np.ndarray) -> np.ndarray:
        """All widths alike, where the target is more than a tenth away."""
        load = float(self.load(sizes[None])[0])
        if 0.9 <= load <= 1.1:
            return sizes
        low, high = (0.0, 1.0) if load > 1 else (1.0, float(max(self.full / np.maximum(sizes, 1))))
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.fits(self._scaled(sizes, middle)) else (low, middle)
        return self._scaled(sizes, low)

    def threshold(self, sizes: np.ndarray, rounds: int = 2) -> np.ndarray:
        """The largest sizes (D,) at which every kept step has more importance per cost than one global threshold."""
        owner = np.repeat(np.arange(len(self.dimensions)), self.full)
        gain = np.concatenate([_in_steps(g, d) for g, d in zip(self.gain, self.dimensions)])
        for _ in range(rounds):
            density = gain / self._prices(sizes)[owner]
            candidates = np.unique(density)

            def above(threshold: float, density: np.ndarray = density) -> np.ndarray:
                kept = np.bincount(owner[density > threshold], minlength=len(self.dimensions))
                return np.maximum(kept, self.lowest)

            low, high = 0, len(candidates) - 1  # at the highest candidate nothing but the minimum is kept
            if self.fits(self.full):
                return self.full.copy()
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.fits(above(candidates[middle])) else (middle + 1, high)
            sizes = above(candidates[low])
        return sizes

    def _prices(self, sizes: np.ndarray) -> np.ndarray:
        """What one element of each dimension costs at these sizes, as a share of the target that binds most, (D,)."""
        steps = [(self._step(d, int(k), up=False), int(k)) for d, k in zip(self.dimensions, sizes)]
        steps = [(a, b) if a < b else (b, self._step(d, b, up=True)) for (a, b), d in zip(steps, self.dimensions)]
        rows = np.stack([self._moved(sizes, i, k) for step in zip(*steps) for i, k in enumerate(step)])
        base = self.costs(sizes[None])
        binding = max(self.targets, key=lambda m: base[m][0] / self.targets[m])
        cost = self.costs(rows)[binding] / self.targets[binding]
        least, most = cost[: len(sizes)], cost[len(sizes) :]
        return np.maximum((most - least) / np.maximum([b - a for a, b in steps], 1), 1e-12)

    def _step(self, d: Dimension, k: int, up: bool) -> int:
        """The next allowed size above or below `k`; `k` itself at the end."""
        if up:
            return min((k // d.multiple + 1) * d.multiple, d.size)
        return max((k - 1) // d.multiple * d.multiple, d.lowest)

    def moves(self, sizes: np.ndarray, up: bool) -> list[tuple[int, int]]:
        """(dimension, new size) one step away."""
        steps = [(i, self._step(d, int(sizes[i]), up)) for i, d in enumerate(self.dimensions)]
        return [(i, k) for i, k in steps if k != sizes[i]]

    def _moved(self, sizes: np.ndarray, i: int, k: int) -> np.ndarray:
        out = sizes.copy()
        out[i] = k
        return out

    def _importance(self, i: int, a: int, b: int) -> float:
        low, high = sorted((a, b))
        return float(self.gain[i][low:high].sum())

    def remove(self, sizes: np.ndarray) -> np.ndarray:
        """Steps off, least importance per saved cost first, until the budget holds; blocks only when widths are spent."""
        while True:
            base = self.costs(sizes[None])
            over = [m for m, t in self.targets.items() if base[m][0] > t]
            if not over:
                return sizes
            moves = self.moves(sizes, up=False)
            moves = [m for m in moves if self.dimensions[m[0]].kind != "depth"] or moves
            found = self.costs(np.stack([self._moved(sizes, i, k) for i, k in moves]))
            saved = sum((base[m][0] - found[m]) / self.targets[m] for m in over)
            price = [self._importance(i, int(sizes[i]), k) for i, k in moves] / np.maximum(saved, 1e-12)
            i, k = moves[int(np.argmin(np.where(saved > 0, price, np.inf)))]
            sizes = self._moved(sizes, i, k)

    def add(self, sizes: np.ndarray) -> np.ndarray:
        """Steps back on, most importance per cost first, as long as one fits."""
        while True:
            moves = self.moves(sizes, up=True)
            if not moves:
                return sizes
            base = self.load(sizes[None])[0]
            load = self.load(np.stack([self._moved(sizes, i, k) for i, k in moves]))
            worth = [self._importance(i, int(sizes[i]), k) for i, k in moves] / np.maximum(load - base, 1e-12)
            worth = np.where(load <= 1, worth, -np.inf)
            best = int(np.argmax(worth))
            if worth[best] == -np.inf or (load[best] <= base and worth[best] <= 0):
                return sizes
            sizes = self._moved(sizes, *moves[best])

    def exchange(self, sizes: np.ndarray) -> np.ndarray:
        """Where more than `SLACK` is left unused: move one dimension, and give another all that then fits.

        Of what ends within the slack, what keeps most importance wins; else the same again from what came closest.
        """
        best, most = sizes, float(self.load(sizes[None])[0])
        for widths_only in (True, False):
            front = best[None]
            for _ in range(4):
                if most >= 1 - SLACK:
                    return best
                found = np.unique(np.concatenate([self._exchanged(s, widths_only) for s in front]), axis=0)
                load = self.load(found)
                found, load = found[load <= 1], load[load <= 1]
                if not len(load):
                    break
                close = found[load >= 1 - SLACK]
                if len(close):
                    return close[int(np.argmax([self._worth(p) for p in close]))]
                front = found[np.argsort(-load, kind="stable")[:8]]
                if load.max() > most:
                    best, most = front[0], float(load.max())
        return best

    def _exchanged(self, sizes: np.ndarray, widths_only: bool) -> np.ndarray:
        """For every dimension a few steps up or down, and every other one: the largest size of that which fits, (S, D)."""
        chosen = [i for i, d in enumerate(self.dimensions) if not (widths_only and d.kind == "depth")]
        reach = max(1, _MOST_EXCHANGES // (2 * max(len(chosen), 1) ** 2))
        starts, fills = [], []
        for i in chosen:
            allowed = self.allowed[i]
            at = int(np.searchsorted(allowed, sizes[i]))
            near = [k for k in range(max(at - reach, 0), min(at + reach + 1, len(allowed))) if k != at]
            for j in chosen:
                if j != i:
                    starts += [self._moved(sizes, i, int(allowed[k])) for k in near]
                    fills += [j] * len(near)
        if not starts:
            return sizes[None]
        found, other, each = np.stack(starts), np.array(fills), np.arange(len(starts))
        longest = max(len(a) for a in self.allowed)
        table = np.stack([np.pad(a, (0, longest - len(a)), mode="edge") for a in self.allowed])
        low, high = np.zeros(len(found), dtype=np.int64), np.array([len(self.allowed[j]) - 1 for j in fills])
        while (low < high).any():  # bisection, in all rows at once
            middle = (low + high + 1) // 2
            found[each, other] = table[other, middle]
            fits = self.load(found) <= 1
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        found[each, other] = table[other, low]
        return found

    def _worth(self, sizes: np.ndarray) -> float:
        return float(sum(g[:k].sum() for g, k in zip(self.gain, sizes)))


def _in_steps(gain: np.ndarray, d: Dimension) -> np.ndarray:
    """Importance of each element of a dimension, (N,) descending, made even within every step that is kept or left."""
    ends = np.union1d([0], _allowed(d))
    lengths = np.diff(ends)
    even = np.repeat(np.add.reduceat(gain, ends[:-1]) / lengths, lengths)
    return np.minimum.accumulate(even)  # links may break the order a little


def _allowed(d: Dimension) -> np.ndarray:
    return np.unique([d.lowest, *range(-(-d.lowest // d.multiple) * d.multiple, d.size, d.multiple), d.size])


def _preferring(scores: np.ndarray, keep: Structure | None, member: str) -> np.ndarray:
    """Scores with those of `keep`'s elements raised above all others."""
    if keep is None or member not in keep.kept:
        return scores
    raised = scores.copy()
    raised[list(keep.kept[member])] += scores.max() - scores.min() + 1
    return raised
