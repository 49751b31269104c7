"""Ranking within groups of dimensions that play the same part (Fang et al., Isomorphic Pruning, ECCV 2024).

Scores of a head and of a hidden channel do not compare; those of two heads do.  Two dimensions are isomorphic when the same
kinds of parameters hold them at the same places, whatever their sizes.  Within such a group elements are ranked
together, and of every group the same share goes.
"""

from __future__ import annotations

import numpy as np

from .. import axes
from ..space import Dimension, SearchSpace
from .base import Found, Task, strategy
from .ranking import by_threshold, relative, values_of
from .scores import weight_norms
from .taylor import taylor_scores


@strategy(
    "isomorphic", "|sum w dL/dw| ranked within groups of dimensions of one kind (Fang et al., 2024)", needs_data=True
)
def isomorphic(task: Task) -> Found:
    scores = taylor_scores(task)
    return Found(by_threshold(task, scores, ranked(task.space, values_of(task.space, scores))))


@strategy("isomorphic-l2", "L2 norms over the layer's mean, ranked within groups of dimensions of one kind")
def isomorphic_norm(task: Task) -> Found:
    scores = weight_norms(task.space, 2)
    return Found(by_threshold(task, scores, ranked(task.space, relative(values_of(task.space, scores)))))


def ranked(space: SearchSpace, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The place of each value among all of its group, in (0, 1]: a threshold on it takes the same share of each group."""
    groups: dict[tuple, list[str]] = {}
    for name, d in space.dimensions.items():
        groups.setdefault(signature(space, d), []).append(name)
    out = {}
    for names in groups.values():
        everything = np.sort(np.concatenate([values[n] for n in names]))
        for n in names:
            out[n] = np.searchsorted(everything, values[n], side="right") / len(everything)
    return out


def signature(space: SearchSpace, d: Dimension) -> tuple:
    """What makes dimensions isomorphic: their kind and, of each parameter that holds them, its module's class, the place, and
    how many axes share that place (a head's channels lie beside the heads, hidden channels are alone).

    A residual stream is held by as many parameters as there are blocks; only which kinds they are counts.
    """
    own = set(d.axes)
    held = set()
    for name, dims in space.trace.slots.items():
        path, _, leaf = name.rpartition(".")
        for position, dim in enumerate(dims):
            atoms = list(axes.atoms(dim))
            if own & set(atoms):
                held.add((type(space.model.get_submodule(path)).__name__, leaf, position, len(atoms)))
    return (d.kind, *sorted(held))
