"""The zoo: does dmscale keep its word on the models that people have?  `python -m benchmarks.zoo`, or `make zoo`."""

from __future__ import annotations

import importlib
import importlib.util

from .entry import Entry

CATALOGUES = ("vision", "language")
"""Modules of this package that hold `ENTRIES`."""


def entries() -> list[Entry]:
    """Every entry of the zoo, by family and name.

    Raises:
        ValueError: two entries have one name.
    """
    found: dict[str, Entry] = {}
    for name in CATALOGUES:
        if importlib.util.find_spec(f"{__name__}.{name}") is None:
            continue
        for entry in importlib.import_module(f"{__name__}.{name}").ENTRIES:
            if entry.name in found:
                raise ValueError(f"two entries of the zoo are called {entry.name!r}")
            found[entry.name] = entry
    return sorted(found.values(), key=lambda e: (e.family, e.name))


__all__ = ["Entry", "entries"]
