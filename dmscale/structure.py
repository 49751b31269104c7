"""A structure: which elements of each dimension are kept.  Small, immutable, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import DmscaleError

_VERSION = 1


@dataclass(frozen=True)
class Structure:
    """The outcome of a search, or of a rule: a sub-network of a search space.

    sizes: dimension -> number of its elements that are kept.
    kept: dimension -> indices of the kept elements, ascending.  Where several axes are linked to one dimension (they
        keep the same share, each its own elements), every further axis has an entry under its own name.
    full: dimension -> its full size.
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]]
    full: Mapping[str, int] = field(default_factory=dict)

    def share(self, name: str) -> float:
        """The kept share of dimension `name`, in (0, 1]."""
        return self.sizes[name] / self.full[name]

    def to_json(self, **extra: Any) -> str:
        """JSON with sizes and kept indices (as ranges); `extra` is stored beside them."""
        dimensions = {n: {"size": k, "of": self.full.get(n, k)} for n, k in self.sizes.items()}
        kept = {n: _ranges(i) for n, i in self.kept.items()}
        return json.dumps({"dmscale": _VERSION, "dimensions": dimensions, "kept": kept, **extra}, indent=1)

    @staticmethod
    def from_json(text: str) -> Structure:
        """The inverse of `to_json`.

        Raises:
            DmscaleError: the text is no structure, or one of a newer version.
        """
        try:
            data = json.loads(text)
            version, dimensions, kept = data["dmscale"], data["dimensions"], data["kept"]
        except (ValueError, KeyError, TypeError) as error:
            raise DmscaleError(f"not a structure: {error!r}; expected what Structure.to_json() writes") from error
        if version > _VERSION:
            raise DmscaleError(f"the structure has version {version}, this dmscale reads up to {_VERSION}; update it")
        return Structure(
            {n: d["size"] for n, d in dimensions.items()},
            {n: tuple(i for a, b in ranges for i in range(a, b)) for n, ranges in kept.items()},
            {n: d["of"] for n, d in dimensions.items()},
        )

    def __hash__(self) -> int:
        return hash((tuple(self.sizes.items()), tuple(self.kept.items())))

    def __str__(self) -> str:
        return "\n".join(f"{n}: {k} of {self.full.get(n, k)}" for n, k in self.sizes.items())


def _ranges(indices: Iterable[int]) -> list[list[int]]:
    """Ascending indices as half-open ranges."""
    out: list[list[int]] = []
    for i in indices:
        if out and out[-1][1] == i:
            out[-1][1] = i + 1
        else:
            out.append([i, i + 1])
    return out
