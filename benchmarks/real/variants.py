"""Variants of the searches for the ablations: the same strategy with one option changed.

python -m benchmarks.real --task cifar10 --budget "50% macs" --strategies dmscale,dmscale:snip,dms:strict-ranks,...

Groups of them have names of their own for `--strategies`, see `GROUPS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dmscale import topk
from dmscale.methods import knapsack
from dmscale.strategies.base import Found, Strategy, Task
from dmscale.strategies.search import search

VARIANTS: dict[str, dict[str, Any]] = {
    "dmscale:snip": {"importance": "snip"},
    "dmscale:fisher": {"importance": "fisher"},
    "dmscale:magnitude": {"importance": "magnitude"},
    "dmscale:activation": {"importance": "activation"},
    "dmscale:index": {"importance": "index"},
    "dmscale:no-average": {"momentum": 0.0},
    "dmscale:one-average": {"fewest": 100},
    "dmscale:depth-by-residual": {"depth_importance": "residual"},
    "dmscale:early": {"decay": 0.5},
    "dmscale:half-length": {"length": 0.5},
    "dmscale:quarter-length": {"length": 0.25},
    "dms:projected": {"method": "dms", "mode": "projected"},
    "dms:hard": {"method": "dms", "hard": True},
    "dms:index": {"method": "dms", "importance": "index"},
    "dms:snip": {"method": "dms", "importance": "snip"},
    "dms:fisher": {"method": "dms", "importance": "fisher"},
    "dms:no-average": {"method": "dms", "momentum": 0.0},
    "dms:no-warm-up": {"method": "dms", "warmup": 0.0},
    "dms:balanced": {"method": "dms", "balance": True},
    "dms:lagrangian": {"method": "dms", "mode": "lagrangian"},
    "dms:half-length": {"method": "dms", "length": 0.5},
    "dms:quarter-length": {"method": "dms", "length": 0.25},
    "dms:strict-ranks": {"method": "dms", "rank": 0.0},
    "dms:inclusive-ranks": {"method": "dms", "rank": 1.0},
    **{
        f"{'dmscale' if m == 'knapsack' else m}:frozen": {"method": m, "train_weights": False}
        for m in ("knapsack", "dms", "dms-unnormalised", "estimated-topk", "gumbel", "number", "hard-concrete", "pas",
                  "continuous")
    },
    **{
        f"dms:lambda-{penalty:g}-lr-{lr:g}": {"method": "dms", "adapt": False, "penalty": penalty, "lr": lr}
        for penalty in (0.1, 1.0, 10.0) for lr in (2e-1, 2e-2, 2e-3)
    },
}  # fmt: skip
"""Name -> the options of `Search` in which it differs; `length` is a share of the steps, `rank` the offset of a rank, and
`fewest` the number of steps over which dimensions are compared."""

GROUPS = {
    "engines": (
        "dmscale", "dms", "dms-unnormalised", "dms:projected", "search-estimated-topk", "search-gumbel", "search-number",
        "search-hard-concrete", "search-pas", "search-continuous",
    ),
    "structure-only": (*(n for n in VARIANTS if n.endswith(":frozen")), "taylor", "fisher", "knapsack"),
    "importances": ("dmscale", *(n for n in VARIANTS if n.partition(":")[2] in (
        "snip", "fisher", "magnitude", "activation", "index", "no-average", "one-average", "depth-by-residual")), "dms"),
    "lengths": ("dmscale", "dms", *(n for n in VARIANTS if n.endswith("length")), "dmscale:early"),
    "ranks": ("dms", "dms:strict-ranks", "dms:inclusive-ranks", "dms:hard", "dms:no-warm-up"),
    "lambdas": ("dms", "dms:balanced", "dms:lagrangian", *(n for n in VARIANTS if "lambda" in n)),
}  # fmt: skip
"""The questions of docs/benchmarks.md: name -> strategies."""


def _strategy(name: str, options: dict[str, Any]) -> Strategy:
    rest = {k: v for k, v in options.items() if k not in ("length", "rank", "fewest")}

    def find(task: Task) -> Found:
        shorter = dataclasses.replace(task, steps=max(1, round(task.steps * options.get("length", 1.0))))
        fewest = mock.patch.object(knapsack, "FEWEST", options.get("fewest", knapsack.FEWEST))
        with _ranked(options.get("rank", 0.5)), fewest:
            return search(shorter, **rest)

    about = ", ".join(f"{k}={v}" for k, v in options.items())
    return Strategy(name, f"the search with {about}", find, trains=True, needs_data=True)


@contextlib.contextmanager
def _ranked(offset: float) -> Iterator[None]:
    """Ranks of DMS as (rank + offset) / N: 0 is the paper's equation, 1 the authors' code, 1/2 ours."""
    middle = topk.mid_ranks

    def ranks(importance: Tensor, segment: Tensor, start: Tensor, size: Tensor) -> Tensor:
        return middle(importance, segment, start, size) + (offset - 0.5) / size[segment].to(torch.float32)

    if offset == 0.5:
        yield
        return
    with mock.patch.object(topk, "mid_ranks", ranks):
        yield


STRATEGIES = [_strategy(name, options) for name, options in VARIANTS.items()]
