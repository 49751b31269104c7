"""The default method: a knapsack over importance and exact cost, solved again at every step while the network trains.

An element's importance, E[(m dL/dm)^2], is an estimate of the loss that its removal costs: half the curvature along its own
mask, which is one, with the empirical Fisher information for the curvature (OBD, LeCun et al., 1990; Theis et al., 2018).
Such estimates add up, and a block's is in the same unit as a channel's.  A block or an expert goes with all that is inside it,
so it is worth no less than any width that it alone holds: in its one gradient these parts cancel.  What is kept is
what has most importance for its exact marginal cost, under one threshold for the whole network, chosen so that the cost
follows the schedule.

While a dimension shrinks, what is left of it comes to matter more.  An average that is long enough to rank single elements
knows that too late, when too much of the dimension has gone.  So elements are ranked within their dimension by the long
average, and dimensions compared by a short one: a sum over elements needs fewer steps.

Masks are hard, and what has gone stays gone: the network trains, from the first step to the last, as the one that will be
exported.  There is no learning rate, no penalty and no relaxation, hence nothing to tune and nothing to round in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import budget as budgets
from ..errors import SearchError
from ..structure import Structure
from .base import Method

if TYPE_CHECKING:
    from ..search import Search

UPDATES = 400
"""About how often the knapsack is solved in a search: it takes some milliseconds, which a short step would feel."""

RECENT, FEWEST = 1 / 25, 5
"""Levels of dimensions are averaged over this share of a search, over no fewer steps than these, no longer than importance."""


class Knapsack(Method):
    """Keep what has most importance for its cost; see the module's docstring."""

    final = True

    def __init__(self, search: Search, mode: str | None):
        super().__init__(search, mode)
        self.kept = torch.ones(self.layout.elements, dtype=torch.float32, device=search.device)
        self.every = max(1, search.steps // UPDATES)
        self.recent = torch.zeros_like(self.kept)  # importance by the short average
        self.pace = max(1 - search.momentum, 1 / max(RECENT * search.steps, FEWEST))

    def learn(self, gradient: Tensor) -> None:
        if self.search.has_own_importance and bool((self.search.measured < 0).any()):
            least = min(self.layout.by_member(self.search.measured).items(), key=lambda member: member[1].min())
            raise SearchError(
                f"importance= gives {least[1].min():.3g} for an element of {least[0]!r}: method 'knapsack' compares and adds up "
                "what removals cost, from 0 upwards. Give such scores, or take a method that ranks elements alone: 'dms'."
            )
        self.recent.lerp_(self.search.measured, self.pace)

    def scores(self) -> Tensor:
        """What has gone has no importance left; a block or an expert has at least that of each width inside it."""
        scores, layout = self._importance() * self.kept, self.layout
        if len(layout.inside):
            widths = torch.where(layout.inside, layout.sum_by_segment(scores), 0.0).amax(1)
            at = layout.with_modules
            scores[at] = torch.maximum(scores[at], widths * self.kept[at])
        return scores

    def advance(self) -> None:
        search = self.search
        if search.warming or search.refining or (search.step % self.every and not search.reaches_target):
            return
        # what has gone is below what is left without importance, so that it stays gone
        scores = self.layout.by_member(torch.where(self.kept > 0, self.scores(), -1.0))
        target = budgets.Budget(search.targets())
        found = budgets.allocate(search.space, target, scores, start=self.exactly())
        if search.reaches_target:  # from here on the weights train in exactly what will be exported
            found = budgets.fit(search.space, found, target, self.layout.by_member(self._importance()), keep=found)
        self.kept.copy_(self.layout.mask_of(found, search.device))

    def masks(self) -> Tensor:
        return self.kept

    def exactly(self) -> Structure:
        sizes = {d.name: share * d.size for d, share in zip(self.layout.dimensions, self.shares())}
        return self.search.space.structure(sizes, self.layout.by_member(self.kept))

    def structure(self, wanted: budgets.Budget) -> Structure:
        """The elements that are kept now, brought exactly to a budget."""
        space, importance = self.search.space, self.layout.by_member(self._importance())
        return budgets.fit(space, self.exactly(), wanted, importance, keep=self.exactly())

    def _importance(self) -> Tensor:
        """The long average within each segment, at the level where the short one has what is kept of it now, (E,)."""
        layout, long = self.layout, self.search.importance
        now, then = (layout.sum_by_segment(average * self.kept) for average in (self.recent, long))
        return long * torch.where(then > 0, now / then, 0.0)[layout.segment]
