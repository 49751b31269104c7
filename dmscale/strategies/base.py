"""What a strategy is: given a task, it finds a structure that meets the task's budget.

A strategy is one file.  It registers a function of a `Task` under a name:

    @strategy("mine", "what it does (source)")
    def mine(task):
        return Found(task.fit(sizes, scores))

Everything else is the same for all of them: the space, the exact fit, the export, the recovery, the evaluation
(`dmscale.compare`).  A contract test (`tests/test_strategies.py`) runs every registered strategy and checks that it meets
the budget, repeats with its seed, leaves the user's model as it was, and that a one-shot one leaves the weights too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import budget as budgets
from ..budget import Budget
from ..errors import DmscaleError
from ..space import SearchSpace
from ..structure import Structure

Batch = tuple[Any, Any]
"""(inputs, targets), on the model's device; inputs are a tensor, a tuple or a dict."""


@dataclass
class Task:
    """What a strategy is given.  Two tasks with the same seed give the same batches in the same order.

    space: the search space; `space.model` holds the weights to start from.
    budget: what the structure must meet.
    stream: endless batches for a strategy that trains.  What it does not take, its recovery gets.
    calibration: number of batches -> that many batches for measuring, always the same, apart from `stream`.
    criterion: (output, targets) -> scalar loss.
    optimizer: parameters -> the optimizer of a search, its learning rate set.
    steps: optimizer steps that a strategy that trains takes.
    seed: of anything random in the strategy.
    tick: to be called after every optimizer step with the loss.
    """

    space: SearchSpace
    budget: Budget
    stream: Iterator[Batch]
    calibration: Callable[[int], list[Batch]]
    criterion: Callable[[Any, Any], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    steps: int
    seed: int = 0
    tick: Callable[[Tensor], None] = lambda loss: None

    def fit(self, sizes: Mapping[str, float], scores: Mapping[str, Any]) -> Structure:
        """The last step of every one-shot strategy: `sizes` with the elements of highest score, exactly on budget."""
        start = self.space.structure(sizes, scores)
        return budgets.fit(self.space, start, self.budget, scores, keep=None)

    def fits(self, sizes: Mapping[str, float]) -> bool:
        """Whether dimension -> size, all others full, is within the budget."""
        return budgets.satisfied(self.space.cost(self.space.structure(sizes)), self.budget)

    def load(self, sizes: Mapping[str, float]) -> float:
        """The share of the budget that dimension -> size, all others full, uses, of the metric that uses most."""
        cost = self.space.cost(self.space.structure(sizes))
        return max(cost[m] / t for m, t in self.budget.targets.items())


@dataclass(frozen=True)
class Found:
    """What a strategy returns.

    structure: of the task's space; None for an external tool that has a space of its own.
    model: the smaller model of such a tool.
    steps: optimizer steps taken; what is left of the total goes into recovery.
    history: as `Search.history`, where there is one.
    """

    structure: Structure | None = None
    model: nn.Module | None = None
    steps: int = 0
    history: Sequence[Mapping[str, Any]] = field(default=())


@dataclass(frozen=True)
class Strategy:
    """A named way to find a structure.

    name: in tables, folders and `--strategies`.
    about: one line, with the source.
    find: the function.
    trains: whether it takes optimizer steps (and may change weights).
    needs_data: whether it looks at calibration batches.
    external: whether it is somebody else's tool; it returns a model then, and no structure.
    """

    name: str
    about: str
    find: Callable[[Task], Found]
    trains: bool = False
    needs_data: bool = False
    external: bool = False


REGISTRY: dict[str, Strategy] = {}
"""Name -> strategy, in the order of registration."""


def strategy(
    name: str, about: str, *, trains: bool = False, needs_data: bool = False
) -> Callable[[Callable[[Task], Found]], Callable[[Task], Found]]:
    """Register the decorated function of a `Task` as a strategy.

    Raises:
        ValueError: the name is taken.
    """

    def register(find: Callable[[Task], Found]) -> Callable[[Task], Found]:
        add(Strategy(name, about, find, trains, needs_data))
        return find

    return register


def add(new: Strategy) -> None:
    """Put a strategy into the registry.

    Raises:
        ValueError: the name is taken.
    """
    if new.name in REGISTRY:
        raise ValueError(f"there is a strategy {new.name!r} already")
    REGISTRY[new.name] = new


def select(names: str | Iterable[str], extra: Iterable[Strategy] = ()) -> list[Strategy]:
    """Strategies by name: "all", "a,b", or a list; `extra` ones are known beside the registered.

    Raises:
        DmscaleError: an unknown name; all that are known are listed.
    """
    known = REGISTRY | {s.name: s for s in extra}
    if isinstance(names, str):
        names = list(known) if names.strip() == "all" else [n.strip() for n in names.split(",") if n.strip()]
    names = list(dict.fromkeys(names))
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        raise DmscaleError(
            f"unknown strategy {', '.join(map(repr, unknown)) or '(none given)'}; known are {', '.join(known)}"
        )
    return [known[n] for n in names]
