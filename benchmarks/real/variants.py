"""Variants of the searches for the ablations: the same strategy with one option changed.

python -m benchmarks.real --task cifar10 --budget "25% macs" --strategies dmscale,dmscale:snip,dmscale:no-average,...
"""

from __future__ import annotations

from typing import Any

from dmscale.strategies.base import Found, Strategy, Task
from dmscale.strategies.search import search

VARIANTS: dict[str, dict[str, Any]] = {
    "dmscale:snip": {"importance": "snip"},
    "dmscale:magnitude": {"importance": "magnitude"},
    "dmscale:activation": {"importance": "activation"},
    "dmscale:index": {"importance": "index"},
    "dmscale:no-average": {"momentum": 0.0},
    "dmscale:depth-by-residual": {"depth_importance": "residual"},
    "dmscale:early": {"decay": 0.5},
    "dms:hard": {"method": "dms", "hard": True},
    "dms:index": {"method": "dms", "importance": "index"},
    "dms:snip": {"method": "dms", "importance": "snip"},
    "dms:fisher": {"method": "dms", "importance": "fisher"},
    "dms:no-average": {"method": "dms", "momentum": 0.0},
    "dms:fixed-lambda": {"method": "dms", "adapt": False},
    "dms:balanced": {"method": "dms", "balance": True},
    "dms:lagrangian": {"method": "dms", "mode": "lagrangian"},
}
"""Name -> the options of `Search` in which it differs."""


def _strategy(name: str, options: dict[str, Any]) -> Strategy:
    def find(task: Task) -> Found:
        return search(task, **options)

    about = ", ".join(f"{k}={v}" for k, v in options.items())
    return Strategy(name, f"the search with {about}", find, trains=True, needs_data=True)


STRATEGIES = [_strategy(name, options) for name, options in VARIANTS.items()]
