"""Strategies on one space: each finds a structure that meets a budget; `dmscale.compare` puts them side by side."""

from . import uniform, chance, magnitude, taylor, isomorphic, knapsack, skipping, search  # noqa: F401, I001 (the order of tables)
from .base import REGISTRY, Found, Strategy, Task, add, select, strategy

__all__ = ["REGISTRY", "Found", "Strategy", "Task", "add", "select", "strategy"]
