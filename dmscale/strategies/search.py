"""The searches of this library: its default, the paper's (DMS, ICML 2024), and the comparators behind `Search(method=)`."""

from __future__ import annotations

from typing import Any

from ..evaluate import call
from ..methods import METHODS
from ..search import Search
from .base import Found, Task, strategy


@strategy("dmscale", "the search of this library, its default method", trains=True, needs_data=True)
def default(task: Task) -> Found:
    return search(task)


def search(task: Task, **options: Any) -> Found:
    """Search while the weights of `task.space.model` train; `options` are those of `Search`.

    A variant of one's own is `strategy("dms-x", ...)(lambda task: search(task, warmup=0.2))`.
    """
    found = Search(task.space, task.budget, task.steps, **{"seed": task.seed, **options})
    optimizer = task.optimizer(task.space.model.parameters())
    found.attach(optimizer)
    found.model.train()
    while not found.done:
        inputs, targets = next(task.stream)
        loss = task.criterion(call(found.model, inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.tick(loss)
    return Found(found.structure, steps=task.steps, history=found.history)


def _register(method: str, about: str) -> None:
    name = method if method.startswith("dms") else f"search-{method}"

    @strategy(name, about, trains=True, needs_data=True)
    def find(task: Task) -> Found:
        return search(task, method=method)


for _method, _about in METHODS.items():
    if _method != "knapsack":  # which is the default
        _register(_method, _about)
