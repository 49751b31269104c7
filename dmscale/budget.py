"""Budgets: what a user asks for, whether it can be reached, and the last step that meets it exactly."""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import axes, causes, naming
from .cost import METRICS, UNITS, Cost, metric_name, module_names, refusal, split_name, within
from .dimensions import bound_of
from .errors import BudgetError
from .structure import Structure
from .tables import number

if TYPE_CHECKING:
    from .space import Dimension, SearchSpace

SLACK = 0.005
"""A fitted structure lies at most this share below the binding target, and never above it."""

_MOST_EXCHANGES = 2048
"""About as many pairs of moves are tried at once in the last step of a fit."""

_MOST_STEPS = 256
"""A dimension goes at most this many steps at once."""

_MOST_ROUNDS = 4
"""So many times exchanges start again from what came closest."""

_MOST_RESTARTS = 12
"""So many dimensions are given a step, and room for it, where exchanges did not suffice."""

_FEW_DIMENSIONS = 32
"""With more, a round of exchanges that comes no nearer is the last one: there are other ways enough."""

_PREFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_BYTES = {f"{p}B": n for p, n in _PREFIX.items() if p not in ("", "B")} | {
    f"{p}iB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)
}
_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_NUMBER = r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
_TERM = re.compile(_NUMBER + r"(%|[kKMGT]i?B|[kKMGBT]|[mu]?s(?=\s)|)\s*(?:of\s+)?([A-Za-z_]+)(?:\s+in\s+(\S+))?")
_OF_WHAT = re.compile(_NUMBER + r"(%|[kKMGT]i?B|[kKMGBT]|[mu]?s|)")
_METRICS = (*METRICS, "latency")
_IN_BYTES = ("bytes", "activations", "kv_cache")


@dataclass(frozen=True)
class Budget:
    """Upper bounds in absolute numbers; strings and dicts, which take shares too, say the same (see `parse`).

    targets: metric -> MACs, parameters, bytes (bytes, activations, kv_cache) or ms (latency) of one forward on the example
        inputs.  A metric may carry a scope: "macs in backbone.*".  Whether there is such a metric, and whether its bound can
        be reached, is checked where the budget is used.
    """

    targets: Mapping[str, float]

    def __str__(self) -> str:
        parts = []
        for key, target in self.targets.items():
            metric, scope = split_name(key)
            parts.append(f"{number(target)} {UNITS[metric]}" + (f" in {scope}" if scope else ""))
        return ", ".join(parts)


def parse(target: Any, space: SearchSpace) -> Budget:
    """A budget from "50% macs", "6M params, 3 ms latency", dict(macs=0.5, params=6e6) or a `Budget`.

    A number up to one in a dict is a share of the full model's cost, a larger one absolute.  "50% macs in backbone.*"
    bounds what runs in modules that match the glob, or below them; a share is of what the full model costs there.  One
    that names latency measures it, once for a space.

    Raises:
        BudgetError: misspelt, more than the full model, below what is reachable, or contradictory.
    """
    shares = dict(_entries(target))
    if not shares:
        raise BudgetError("the budget is empty; write for example '50% macs' or dict(macs=0.5, params=6e6)")
    for key in shares:
        _check_scope(key, space)
    full, targets, problems = space.cost(), {}, []
    for key, (value, relative) in shares.items():
        if not full[key] and value == value and value > 0:
            problems.append(f"{key} is 0 in this model: there is nothing to bound")
            continue
        wanted = value * full[key] if relative else value
        if not 0 < wanted < float("inf"):
            problems.append(f"{key}: {value} is not a positive number")
        elif wanted > full[key] * (1 + 1e-9):
            problems.append(
                f"{key}: {number(wanted)} is {wanted / full[key]:.3g} times the full model's "
                f"{number(full[key])}; a budget cannot exceed 100%"
            )
        targets[key] = wanted
    if problems:
        raise BudgetError("; ".join(problems))
    found = Budget(targets)
    _check_reachable(space, found, full, [key for key, (_, relative) in shares.items() if not relative])
    return found


def names_latency(target: Any) -> bool:
    """Whether a budget, as users write one, bounds what must be measured.

    Raises:
        BudgetError: it is misspelt.
    """
    return any(key == "latency" for key, _ in _entries(target))


def _entries(target: Any) -> Iterator[tuple[str, tuple[float, bool]]]:
    """(metric with its scope, (number, whether it is a share)) of each constraint."""
    if isinstance(target, Budget):
        for key, value in target.targets.items():
            key = _checked(key)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise BudgetError(f"budget {key}={value!r} is no number")
            yield key, (float(value), False)
    elif isinstance(target, Mapping):
        for key, value in target.items():
            key = _checked(key)
            if isinstance(value, str):
                yield from _entries(f"{value} {key}")
            elif isinstance(value, numbers.Real) and not isinstance(value, bool):
                yield key, (float(value), float(value) <= 1)
            else:
                raise BudgetError(f"budget {key}={value!r} is no number")
    elif isinstance(target, str):
        seen: set[str] = set()
        if re.search(r"(?:^|,)\s*\d{1,3},\d{3}\b", target):
            raise BudgetError(
                f"cannot read the budget {target!r}: a comma separates constraints; write 1000 or 1k for 1,000"
            )
        for part in target.split(","):
            key, value, relative = _term(part)
            if key in seen:
                raise BudgetError(f"the budget {target!r} names {key} twice")
            seen.add(key)
            yield key, (value, relative)
    else:
        raise BudgetError(f"a budget is a string, a dict or a Budget, not {target!r}")


def _term(text: str) -> tuple[str, float, bool]:
    """(metric with its scope, number, whether it is a share) of "50% macs in backbone.*"."""
    text = text.strip()
    alone = _OF_WHAT.fullmatch(text)
    match = _TERM.fullmatch(f"{text} latency" if alone and alone[2] in _TIME else text)
    if match is None or alone and alone[2] not in _TIME:
        raise BudgetError(f"cannot read the budget {text!r}{_how_to_write(text, alone and alone[2])}")
    value, unit, metric, scope = float(match[1]), match[2], match[3].lower(), match[4]
    if (unit + metric).lower() in _METRICS:  # the k of "5 kv_cache"
        unit, metric = "", (unit + metric).lower()
    key = _checked(metric_name(metric, scope))
    if unit == "%":
        return key, value / 100, True
    known: dict[str, float] = dict(_PREFIX) if metric != "latency" else {"": 1}
    known = known | _BYTES if metric in _IN_BYTES else known | _TIME if metric == "latency" else known
    if unit not in known:
        raise BudgetError(f"cannot read the budget {text!r}: {unit} is no unit of {metric}")
    return key, value * known[unit], unit == "" and value <= 1


def _how_to_write(text: str, unit: str | None) -> str:
    """What a budget that cannot be read may have meant, whose unit is `unit` where it names nothing else."""
    if text.startswith("-"):
        return ": give a positive number"
    if unit in _BYTES:
        return f"; write of what: '{text} bytes' (those of the parameters), '{text} activations' or '{text} kv_cache'"
    return "; write for example '50% macs' or '6M params'"


def _checked(key: Any) -> str:
    """`key` in the form of `metric_name`, its metric known."""
    if problem := refusal(str(key)):
        raise BudgetError(problem)
    return metric_name(*split_name(str(key)))


def _check_scope(key: str, space: SearchSpace) -> None:
    if problem := refusal(key, module_names(space.model)):
        raise BudgetError(problem)


def _check_reachable(space: SearchSpace, wanted: Budget, full: Cost, absolute: Sequence[str]) -> None:
    """Refuse a budget below the smallest structure, and say what holds it up; `absolute` are those given as a number."""
    if not space.dimensions:
        reasons = "; ".join(f"{n}: {r}" for n, r in list(space.frozen.items())[:5])
        raise BudgetError(f"nothing in this model can shrink. Frozen: {reasons or 'no axis of any weight was found'}")
    least = space.cost(smallest(space, wanted))
    below = [key for key, t in wanted.targets.items() if least[key] > t]
    if not below:
        return
    problems = []
    for key in below:
        t = wanted.targets[key]
        problems.append(
            f"{key}: {number(t)} ({t / full[key]:.1%}) is below what is reachable, {number(least[key])} to "
            f"{number(full[key])} ({least[key] / full[key]:.1%} to 100%)"
            + (f" (did you mean '{t:g}% {key}'?)" if key in absolute and 1 <= t <= 100 and key != "latency" else "")
        )
    raise BudgetError(". ".join(["; ".join(problems), *_what_holds(space, below)]))


def _what_holds(space: SearchSpace, keys: Sequence[str]) -> list[str]:
    """Sentences about what keeps costs from being smaller: bounds of the user's, frozen axes that can thaw, launches."""
    said = []
    for argument in ("minimum", "multiple"):
        held = [(n, d) for n, d in _bound_by(space, argument) if _saves(space, n, keys)]
        bound = [f"'{n}' at {d.minimum if argument == 'minimum' else d.lowest}" for n, d in held]
        if bound:
            said.append(f"{argument}= holds {', '.join(bound[:6])}{_and_more(bound, 6)}: lower it")
    scopes = [split_name(key)[1] for key in keys]
    where = "" if None in scopes else f" in {' and '.join(dict.fromkeys(map(str, scopes)))}"
    frozen = list(dict.fromkeys(n for scope in scopes for n in _thawable_within(space, scope)))
    if frozen:
        said.append(
            f"Frozen dimensions{where} that would have to thaw: {', '.join(frozen[:6])}{_and_more(frozen, 6)} (space.frozen says "
            "why)"
        )
    elif not said:
        said.append(f"Nothing that is frozen{where} could thaw: start from a smaller model")
    if "latency" in keys and space.latency is not None:
        said.append(f"Latency is {space.latency.explain(space)}")
    return said


def _and_more(names: Sequence[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _bound_by(space: SearchSpace, argument: str) -> list[tuple[str, Dimension]]:
    """The dimensions that could be smaller without the user's `minimum` or `multiple`."""
    held = []
    for name, d in space.dimensions.items():
        asked = bound_of(getattr(space.options, argument), name, 1)
        holds = d.minimum == asked if argument == "minimum" else d.kind == "width" and d.lowest > d.minimum
        if d.kind != "depth" and asked > 1 and holds:
            held.append((name, d))
    return held


def _saves(space: SearchSpace, name: str, keys: Sequence[str]) -> bool:
    """Whether one of these costs depends on the size of a dimension."""
    full, less = space.cost(), space.cost(space.structure({name: space.dimensions[name].lowest}))
    return any(less[key] < full[key] for key in keys)


def _thawable_within(space: SearchSpace, scope: str | None) -> list[str]:
    """Names of the frozen axes that a change could free, of those of parameters in `scope` if one is given; then stacks."""
    names = naming.name_axes(space.trace)
    inside = {
        a
        for n, dims in space.trace.slots.items() if scope is None or within(n.rpartition(".")[0], scope)
        for dim in dims for a in axes.atoms(dim)
    }  # fmt: skip
    return [name for a, name in names.items() if a in inside and a.reasons and causes.can_thaw(a.reasons)] + [
        n for n in space.options.no_depth if scope is None
    ]


def smallest(space: SearchSpace, wanted: Budget | None = None) -> Structure:
    """The structure with every dimension at its minimum.

    Of blocks and experts those stay that load the budget least, or the first where there is none.
    """
    sizes = {n: d.lowest for n, d in space.dimensions.items()}
    found = space.structure(sizes)
    if wanted is None or not space.parts:
        return found
    scores: dict[str, np.ndarray] = {}
    column = len(space.variables) - sum(map(len, space.parts.values()))
    base = space.vector(found)
    base[column:] = 0
    for name, parts in space.parts.items():
        n = len(parts)
        rows = np.repeat(base[None], n + 1, 0)
        rows[np.arange(n), column + np.arange(n)] = 1
        loads = [space.costs.many(rows, m) / t for m, t in wanted.targets.items()]
        scores[name] = -np.sum([np.maximum(load[:n] - load[n], 0) for load in loads], axis=0)
        column += n
    return space.structure(sizes, scores)


def satisfied(cost: Cost, wanted: Budget) -> bool:
    """Whether every constraint holds."""
    return all(cost[m] <= t for m, t in wanted.targets.items())


# -- the exact fit ----------------------------------------------------------------------------------------------------


def fit(
    space: SearchSpace, start: Structure, wanted: Budget, scores: Mapping[str, Any], keep: Structure | None
) -> Structure:
    """Move from `start` to a structure within `SLACK` below the budget.

    Far from the target all dimensions are scaled alike; the rest is done a few steps at a time, least importance per cost
    first, and where no single step fits, by exchanging one step for another.  Where that does not suffice and there are few
    structures (coarse multiples, a small network), all of them are looked at.

    Args:
        scores: member -> score an element; the lowest go first, the highest come back first.
        keep: a structure whose elements come before all others, whatever their scores.
    Raises:
        BudgetError: nothing meets the budget, which `parse` would have refused.
    """
    problem = _Problem(space, wanted, scores, keep)
    sizes = np.array([start.sizes[n] for n in space.dimensions], dtype=np.int64)
    sizes = problem.remove(problem.scale(sizes))
    if not problem.fits(sizes):  # with all at their minimum: the blocks of the highest scores are too dear
        least = smallest(space, wanted)
        if not satisfied(space.cost(least), wanted):
            raise BudgetError(
                f"no structure meets the budget of {wanted}; dmscale.budget.parse says what is in the way"
            )
        blocks = {n: _indicator(least.kept[n], len(parts)) for n, parts in space.parts.items()}
        problem = _Problem(space, wanted, {**scores, **blocks}, None)
    sizes = problem.of_few(problem.make_room(problem.settle(sizes)))
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
        start: what there is to choose from, its elements being those of the highest scores, and where the first prices are
            taken; the full structure by default.
    """
    problem = _Problem(space, wanted, scores, None)
    start = start or space.full()
    sizes = problem.threshold(np.array([start.sizes[n] for n in space.dimensions], dtype=np.int64))
    return space.structure({n: int(k) for n, k in zip(space.dimensions, sizes)}, problem.scores)


def _indicator(kept: Sequence[int], size: int) -> np.ndarray:
    out = np.zeros(size)
    out[list(kept)] = 1
    return out


class _Problem:
    """Sizes of all dimensions as a vector (D,), their costs, and the moves between them."""

    def __init__(self, space: SearchSpace, wanted: Budget, scores: Mapping[str, Any], keep: Structure | None):
        self.space, self.wanted = space, wanted
        self.dimensions: list[Dimension] = list(space.dimensions.values())
        self.importance = {m: np.asarray(s, dtype=np.float64) for m, s in scores.items()}
        self.scores = {m: _preferring(s, keep, m) for m, s in self.importance.items()}  # in what order elements go
        self.is_depth = np.array([d.kind == "depth" for d in self.dimensions])
        self.full = np.array([d.size for d in self.dimensions])
        self.targets = dict(wanted.targets)
        counted = all(split_name(m)[0] in METRICS for m in self.targets)
        self.most_exchanges = _MOST_EXCHANGES if counted else _MOST_EXCHANGES // 4  # tables are slower than polynomials
        self.allowed = [_allowed(d) for d in self.dimensions]  # sizes of each dimension, ascending
        # importance of the first k elements of a dimension, best first; all dimensions behind one another
        self.kept = [np.concatenate([[0.0], np.cumsum(self._gains(d))]) for d in self.dimensions]
        self._kept_start = np.concatenate([[0], np.cumsum(self.full + 1)[:-1]])
        self._kept = np.concatenate(self.kept)
        self._lay_out()

    def _lay_out(self) -> None:
        """Of each variable of the cost: its dimension, the full size of its axis, and of blocks and experts their rank."""
        widths = [(i, a.size, 0) for i, d in enumerate(self.dimensions) for a in d.axes]
        index = {m: i for i, d in enumerate(self.dimensions) for m in (d.name, *d.members)}
        blocks: list[tuple[int, int, int]] = []
        for name, parts in self.space.parts.items():
            score = self.scores.get(name, np.zeros(len(parts)))
            blocks += [(index[name], len(parts), int(p)) for p in np.argsort(np.argsort(-score, kind="stable"))]
        both = np.array([*widths, *blocks], dtype=np.int64).reshape(-1, 3)
        self._dimension_of, self._size_of, self._rank, self._widths = *both.T, len(widths)

    def _gains(self, d: Dimension) -> np.ndarray:
        """Importance of each element of a dimension with what is linked to it, the last to go first."""
        total = np.zeros(d.size)
        for member, count in self.space._members(d):
            if member not in self.scores:
                continue
            order = np.argsort(-self.scores[member], kind="stable")
            upto = np.concatenate([[0.0], np.cumsum(self.importance[member][order])])
            ends = count * np.arange(d.size + 1) // d.size
            total += np.diff(upto[ends])
        return total

    def costs(self, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> cost at each row of sizes (S, D), for the metrics of the budget."""
        n = self._widths
        kept = sizes[:, self._dimension_of] * self._size_of // self.full[self._dimension_of]
        variables = np.concatenate([kept[:, :n], kept[:, n:] > self._rank[n:]], 1)
        return {m: self.space.costs.many(variables, m) for m in self.targets}

    def loads(self, sizes: np.ndarray) -> np.ndarray:
        """Cost as a share of its target at each row of sizes (S, D), (S, metrics)."""
        found = self.costs(sizes)
        return np.stack([found[m] / t for m, t in self.targets.items()], 1)

    def fits(self, sizes: np.ndarray) -> bool:
        return bool(self.load(sizes[None])[0] <= 1)

    def load(self, sizes: np.ndarray) -> np.ndarray:
        """The largest ratio of cost to target at each row of sizes (S, D), (S,): at most one means feasible."""
        return self.loads(sizes).max(1)

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
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self.fits(self._scaled(sizes, middle)) else (low, middle)
        return self._scaled(sizes, low)

    def threshold(self, most: np.ndarray, rounds: int = 2) -> np.ndarray:
        """The largest sizes (D,), `most` at most, at which every kept step has more importance per cost than those that go.

        Equals, such as steps without any importance, go from all dimensions alike.
        """
        if self.fits(most):
            return most.copy()
        ends = [a[(a > 0) & (a <= k)] for a, k in zip(self.allowed, most)]  # of some stacks every block may go
        lengths = np.concatenate([np.diff(e, prepend=0) for e in ends])
        owner = np.repeat(np.arange(len(ends)), [len(e) for e in ends])
        gain = np.concatenate([_in_steps(k, e) for k, e in zip(self.kept, ends)])
        middle_of = (np.concatenate(ends) - lengths / 2) / self.full[owner]
        lowest, sizes = np.array([a[0] for a in self.allowed]), most
        stays = ~np.isin(owner, self._that_matter(self.full, widths_only=False))  # to take it would save nothing
        for _ in range(rounds):
            # the steps of a dimension stay in their order
            order = np.lexsort((middle_of, -np.where(stays, np.inf, gain / self._prices(sizes)[owner])))

            def best(few: int, order: np.ndarray = order) -> np.ndarray:
                kept = np.bincount(owner[order[:few]], lengths[order[:few]], len(ends)).astype(np.int64)
                return np.maximum(kept, lowest)

            low, high = 0, len(order) - 1
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self.fits(best(middle)) else (low, middle - 1)
            sizes = best(low)
        return sizes

    def _prices(self, sizes: np.ndarray) -> np.ndarray:
        """What one element of each dimension costs at these sizes, as a share of the target that binds most, (D,)."""
        at = [int(np.searchsorted(a, k)) for a, k in zip(self.allowed, sizes)]
        below = [(i, int(a[max(n - 1, 0)])) for i, (a, n) in enumerate(zip(self.allowed, at))]
        above = [(i, int(a[min(max(n, 1), len(a) - 1)])) for i, (a, n) in enumerate(zip(self.allowed, at))]
        loads = self.loads(np.concatenate([sizes[None], self._moved(sizes, below), self._moved(sizes, above)]))
        cost = loads[1:, int(np.argmax(loads[0]))].reshape(2, -1)
        elements = np.array([b - a for (_, a), (_, b) in zip(below, above)])
        return np.maximum((cost[1] - cost[0]) / np.maximum(elements, 1), 1e-12)

    def _steps(self, sizes: np.ndarray, i: int, up: bool) -> np.ndarray:
        """The next sizes of a dimension, `sizes[i]` first; of blocks, which differ in cost, only the next one."""
        allowed = self.allowed[i]
        most = 2 if self.is_depth[i] else _MOST_STEPS + 1
        if up:
            at = int(np.searchsorted(allowed, sizes[i], side="right"))
            return np.concatenate([sizes[i : i + 1], allowed[at : at + most - 1]])
        at = int(np.searchsorted(allowed, sizes[i]))
        return np.concatenate([sizes[i : i + 1], allowed[max(at - most + 1, 0) : at][::-1]])

    def _moved(self, sizes: np.ndarray, moves: Sequence[tuple[int, int]]) -> np.ndarray:
        """One row for each move (dimension, new size), (moves, D)."""
        out = np.repeat(sizes[None], len(moves), 0)
        out[np.arange(len(moves)), [i for i, _ in moves]] = [k for _, k in moves]
        return out

    def remove(self, sizes: np.ndarray, but: int | None = None) -> np.ndarray:
        """Steps off, least importance per saved cost first, until the budget holds; blocks only when widths are spent.

        As many at once as save half of what is too much; with all at their minimum, dimension `but` left as it is, the budget
        may still not hold.
        """
        while True:
            base = self.loads(sizes[None])[0]
            over = base > 1
            if not over.any():
                return sizes
            paths = {i: self._steps(sizes, i, up=False) for i in range(len(sizes)) if i != but}
            paths = {i: p for i, p in paths.items() if len(p) > 1}
            paths = {i: p for i, p in paths.items() if not self.is_depth[i]} or paths
            if not paths:
                return sizes
            rows = self._moved(sizes, [(i, int(p[1])) for i, p in paths.items()])
            saved = np.maximum(base - self.loads(rows), 0)[:, over]
            steps = self._in_order(paths, saved.sum(1), np.maximum.accumulate, ascending=True)
            excess = base[over] - 1
            enough = (np.cumsum(saved[steps.row] * steps.share[:, None], 0) > excess / 2).all(1)
            sizes = steps.take(sizes, max(int(np.argmax(enough)) if enough.any() else len(enough), 1))

    def add(self, sizes: np.ndarray) -> np.ndarray:
        """Steps back on, most importance per cost first, as long as one fits; at once as many as fill half of what is left."""
        while True:
            paths = {i: self._steps(sizes, i, up=True) for i in range(len(sizes))}
            paths = {i: p for i, p in paths.items() if len(p) > 1}
            if not paths:
                return sizes
            base = self.loads(sizes[None])[0]
            loads = self.loads(self._moved(sizes, [(i, int(p[1])) for i, p in paths.items()]))
            fits = loads.max(1) <= 1
            more, paths = loads[fits] - base, {i: p for (i, p), f in zip(paths.items(), fits) if f}
            if not paths:
                return sizes
            steps = self._in_order(paths, loads[fits].max(1) - base.max(), np.minimum.accumulate, ascending=False)
            filled = np.cumsum(more[steps.row] * steps.share[:, None], 0)
            few = int(np.argmax(np.append((filled > (1 - base) / 2).any(1), True)))
            while few > 1 and not self.fits(steps.take(sizes, few)):
                few //= 2
            sizes = steps.take(sizes, max(few, 1))

    def _in_order(self, paths: Mapping[int, np.ndarray], cost: np.ndarray, running: Any, ascending: bool) -> _Steps:
        """Every step of `paths`, by importance per cost; those of one dimension stay in their order.

        Args:
            paths: dimension -> its sizes, from the one that it has.
            cost: of the first step of each path, (paths,); the following ones are taken to cost as much an element.
            running: the ufunc that keeps the order within a path.
        """
        price, row, size, share = [], [], [], []
        for r, (i, path) in enumerate(paths.items()):
            elements = np.abs(np.diff(path))
            by_first = elements / elements[0]
            won = np.diff(self.kept[i][path])
            importance = -won if ascending else won  # below zero by some scores
            price.append(running(importance / np.maximum(cost[r] * by_first, 1e-12)))
            if ascending and cost[r] <= 0:
                price[-1][:] = np.inf  # it saves nothing
            row.append(np.full(len(elements), r))
            size.append(path[1:])
            share.append(by_first)
        order = np.argsort(np.concatenate(price) * (1 if ascending else -1), kind="stable")
        rows = np.concatenate(row)[order]
        return _Steps(rows, np.array(list(paths))[rows], np.concatenate(size)[order], np.concatenate(share)[order])

    def settle(self, sizes: np.ndarray) -> np.ndarray:
        """From a structure that meets the budget to one that wastes none of it."""
        return self.add(self.exchange(self.add(sizes)))

    def make_room(self, sizes: np.ndarray) -> np.ndarray:
        """Where more than `SLACK` is left unused still: one dimension a step up, room made among the others, and settled again.

        The dearest step comes first.  It is what remains where nearly all is kept and a single step costs more than is left, as
        with multiples of 16: an exchange gives room in one other dimension only.
        """
        best, most = sizes, float(self.load(sizes[None])[0])
        if most >= 1 - SLACK:
            return best
        up = [(int(i), self._steps(sizes, int(i), up=True)) for i in self._that_matter(sizes, widths_only=False)]
        moves = [(i, int(path[1])) for i, path in up if len(path) > 1]
        rows = self._moved(sizes, moves)
        for at in np.argsort(-self.load(rows), kind="stable")[:_MOST_RESTARTS] if moves else ():
            start = self.remove(rows[at], but=moves[at][0])
            if not self.fits(start):
                continue
            found = self.settle(start)
            load = float(self.load(found[None])[0])
            if load > most:
                best, most = found, load
            if most >= 1 - SLACK:
                break
        return best

    def of_few(self, sizes: np.ndarray) -> np.ndarray:
        """Where more than `SLACK` is left unused still, and there are few structures: of all what wastes least.

        Of what ends within the slack, what keeps most importance.  Few are ten times as many as are exchanged at once.
        """
        most = float(self.load(sizes[None])[0])
        if most >= 1 - SLACK or math.prod(map(len, self.allowed)) > 10 * self.most_exchanges:
            return sizes
        rows = np.stack(np.meshgrid(*self.allowed, indexing="ij"), -1).reshape(-1, len(sizes))
        load = self.load(rows)
        close = rows[(load <= 1) & (load >= 1 - SLACK)]
        if len(close):
            return close[int(np.argmax(self._worth(close)))]
        load = np.where(load <= 1, load, 0)
        best = int(np.argmax(load))
        return rows[best] if load[best] > most else sizes

    def exchange(self, sizes: np.ndarray) -> np.ndarray:
        """Where more than `SLACK` is left unused: move one dimension, and give another all that then fits.

        Of what ends within the slack, what keeps most importance wins; else the same again from what came closest.
        """
        best, most = sizes, float(self.load(sizes[None])[0])
        for widths_only in (True, False):
            front, seen = best[None], {round(most, 9)}
            for _ in range(_MOST_ROUNDS):
                if most >= 1 - SLACK:
                    return best
                most_rows = self.most_exchanges // (1 if len(front) == 1 else 4)
                found = np.concatenate([self._exchanged(s, widths_only, most_rows) for s in front])
                load = self.load(found)
                found, load = found[load <= 1], load[load <= 1]
                if not len(load):
                    break
                close = found[load >= 1 - SLACK]
                if len(close):
                    return close[int(np.argmax(self._worth(close)))]
                if load.max() <= most and len(sizes) > _FEW_DIMENSIONS:
                    break
                if load.max() > most:
                    best, most = found[int(np.argmax(load))], float(load.max())
                # equal blocks give many structures of one cost: as a start each of them is as good as another
                distinct, first = np.unique(-load.round(9), return_index=True)
                new = [int(i) for cost, i in zip(-distinct, first) if float(cost) not in seen][:8]
                front, seen = found[new], seen | {float(load[i].round(9)) for i in new}
                if not len(front):
                    break
        return best

    def _exchanged(self, sizes: np.ndarray, widths_only: bool, most: int) -> np.ndarray:
        """For every dimension a few steps up or down, and every other one: the largest size of that which fits, (S, D).

        Of more than `most` such pairs some, spread evenly.
        """
        chosen = self._that_matter(sizes, widths_only)
        reach = max(1, self.most_exchanges // (2 * max(len(chosen), 1) ** 2))
        starts: list[np.ndarray] = [sizes[None]]
        fills: list[np.ndarray] = [chosen[:1]]
        for i in chosen:
            allowed = self.allowed[i]
            at = int(np.searchsorted(allowed, sizes[i]))
            near = [k for k in range(max(at - reach, 0), min(at + reach + 1, len(allowed))) if k != at]
            rows = self._moved(sizes, [(i, int(allowed[k])) for k in near])
            fill = chosen[chosen != i]
            starts.append(np.repeat(rows, len(fill), 0))
            fills.append(np.tile(fill, len(near)))
        found, other = np.concatenate(starts), np.concatenate(fills)
        if len(found) == 1:
            return sizes[None]
        every = -(-len(found) // (most if reach == 1 else self.most_exchanges))
        return self._filled(found[::every], other[::every])

    def _that_matter(self, sizes: np.ndarray, widths_only: bool) -> np.ndarray:
        """Dimensions whose size changes a cost of the budget: not those of blocks that are out."""
        ends = np.stack([np.array([a[0] for a in self.allowed]), self.full])
        loads = np.stack([self.loads(np.where(np.eye(len(sizes), dtype=bool), end, sizes)) for end in ends])
        matters = (loads[0] != loads[1]).any(1) & ~(self.is_depth & widths_only)
        return np.flatnonzero(matters)

    def _filled(self, found: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Rows of sizes (S, D), in each of them dimension `other` (S,) at the largest size that fits; those where none does
        are left out."""
        each = np.arange(len(found))
        table = self._table
        low, high = np.zeros(len(found), dtype=np.int64), np.array([len(a) - 1 for a in self.allowed])[other]
        found[each, other] = table[other, low]
        possible = self.load(found) <= 1
        found, other, low, high = found[possible], other[possible], low[possible], high[possible]
        each = np.arange(len(found))
        found[each, other] = table[other, high]
        low = np.where(self.load(found) <= 1, high, low) if len(found) else low
        while len(open_ := np.flatnonzero(low < high)):  # bisection, in all rows at once
            middle = (low[open_] + high[open_] + 1) // 2
            rows = found[open_]
            rows[np.arange(len(open_)), other[open_]] = table[other[open_], middle]
            fits = self.load(rows) <= 1
            low[open_], high[open_] = np.where(fits, middle, low[open_]), np.where(fits, high[open_], middle - 1)
        found[each, other] = table[other, low]
        return found

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Allowed sizes, one row a dimension, the last one repeated where there are fewer."""
        longest = max(len(a) for a in self.allowed)
        return np.stack([np.pad(a, (0, longest - len(a)), mode="edge") for a in self.allowed])

    def _worth(self, sizes: np.ndarray) -> np.ndarray:
        """Importance that is kept at each row of sizes (S, D), (S,)."""
        return self._kept[self._kept_start + sizes].sum(1)


@dataclass(frozen=True)
class _Steps:
    """Steps in the order in which they are to be taken, (N,) each: row of the path, dimension, size that it leads to, and
    number of elements as a multiple of the path's first step."""

    row: np.ndarray
    dimension: np.ndarray
    size: np.ndarray
    share: np.ndarray

    def take(self, sizes: np.ndarray, few: int) -> np.ndarray:
        """Sizes (D,) after the first `few` steps."""
        out = sizes.copy()
        out[self.dimension[:few]] = self.size[:few]  # of several steps of one dimension the last one counts
        return out


def _in_steps(kept: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Importance of an element in each step, (S,) descending, given that of the first k elements and where steps end."""
    gain = np.diff(kept[ends], prepend=0.0) / np.diff(ends, prepend=0)
    return np.minimum.accumulate(gain)  # links may break the order a little


def _allowed(d: Dimension) -> np.ndarray:
    """The sizes that a dimension may have, ascending."""
    # `lowest` is a multiple itself, or the size
    return np.append(np.arange(d.lowest, d.size, d.multiple), d.size)


def _preferring(scores: np.ndarray, keep: Structure | None, member: str) -> np.ndarray:
    """Scores by which the elements of `keep` come before all others, and else in the order of theirs."""
    if keep is None or member not in keep.kept:
        return scores
    places = np.arange(len(scores))
    # ranks: to add something to the scores would round the order of small ones away
    ranks = np.empty(len(scores))
    ranks[np.lexsort((-places, scores, np.isin(places, keep.kept[member])))] = places
    return ranks
