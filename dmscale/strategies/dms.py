"""The gradient search of this library, and the paper's form of it (DMS, ICML 2024)."""

from __future__ import annotations

from typing import Any

from ..evaluate import call
from ..search import Search
from .base import Found, Task, strategy


@strategy("dms", "gradient search, the library's default engine", trains=True, needs_data=True)
def dms(task: Task) -> Found:
    return search(task)


@strategy(
    "dms-paper", "gradient search as published: soft masks, log penalty above the target", trains=True, needs_data=True
)
def dms_paper(task: Task) -> Found:
    return search(task, mode="penalty", hard=False)


def search(task: Task, **options: Any) -> Found:
    """Search while the weights of `task.space.model` train; `options` are those of `Search`.

    A variant of one's own is `strategy("dms-x", ...)(lambda task: search(task, warmup=0.2))`.
    """
    found = Search(task.space, task.budget, task.steps, **options)
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
