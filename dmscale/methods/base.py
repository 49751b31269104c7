"""What a search method decides, and what it may lean on.

A `Search` measures importance, keeps the schedule and runs the masks on the user's model.  A method turns the gradients of
the masks into the next masks.  Each step the search calls, in this order,

    learn(gradient)    before the optimizer's step: dL/dm of every element, (E,); set `.grad` of the method's parameters
    advance()          after it: bring the structure to the target of this step
    masks()            what the next forward runs with, (E,)

and in the end `structure()`.  A method's parameters ride in the user's optimizer, in a group of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import budget as budgets
from ..errors import SearchError
from ..structure import Structure

if TYPE_CHECKING:
    from ..search import Search


class Method:
    """The base of all search methods.

    lr: learning rate of the parameters, constant; zero where there are none.
    final: whether what has gone stays gone.
    modes: how the budget may act, the default first; empty if the method meets it by construction.
    """

    lr = 0.0
    final = False
    modes: tuple[str, ...] = ()

    def __init__(self, search: Search, mode: str | None):
        if mode is not None and mode not in self.modes:
            offered = (
                f"takes mode {', '.join(self.modes)}"
                if self.modes
                else "takes no mode: it meets the budget by construction"
            )
            raise SearchError(f"mode={mode!r}: method {search.method_name!r} {offered}")
        self.search, self.layout, self.mode = search, search.layout, mode or next(iter(self.modes), None)

    def settings(self) -> dict[str, Any]:
        """What the user may choose of it, as it is: a resumed search must have the same."""
        return {"mode": self.mode, "lr": self.lr}

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return []

    def learn(self, gradient: Tensor) -> None:
        """Set the gradients of `parameters` from the loss's gradient by the masks, (E,)."""

    def advance(self) -> None:
        """Follow the schedule, after the optimizer's step."""

    def masks(self) -> Tensor:
        """The masks of the next forward, (E,)."""
        raise NotImplementedError

    def shares(self) -> np.ndarray:
        """The share of each dimension that is kept now, (D,)."""
        return self.layout.kept_shares(self.masks())

    def exactly(self) -> Structure | None:
        """The structure that the masks are now, of a method whose masks are hard; None where more or less is meant."""
        return None

    def scores(self) -> Tensor:
        """Which elements go first, lowest score first, (E,)."""
        return self.search.importance

    def structure(self, wanted: budgets.Budget) -> Structure:
        """The structure that is meant now, brought exactly to a budget."""
        scores = self.layout.by_member(self.scores())
        sizes = {d.name: share * d.size for d, share in zip(self.layout.dimensions, self.shares())}
        found = self.search.space.structure(sizes, scores)
        return budgets.fit(self.search.space, found, wanted, scores, keep=found)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed search needs of the method: its tensors by name."""
        return {k: v.detach().clone() for k, v in vars(self).items() if isinstance(v, Tensor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        with torch.no_grad():
            for name, value in state.items():
                getattr(self, name).copy_(value)


class Pressure:
    """How strongly a cost beyond its target pulls: the factor of d log(cost) in the gradient of the loss.

        penalty     lambda above the target, nothing below: L = lambda max(0, log(r / r_t))      (DMS, eq. 6)
        two-sided   lambda above and -lambda below: L = lambda |log(r / r_t)|
        lagrangian  max(0, mu + rho h) with h = log(r / r_t), mu raised by rho h at every step: augmented Lagrangian

    The factor adapts: while the cost stays behind the schedule it is raised, and lowered again when the cost runs ahead, so
    that the schedule is tracked without a lambda from the user.
    """

    RHO, RAISE, MOST = 0.1, 1.05, 1e3

    def __init__(self, mode: str, strength: float, adapt: bool):
        self.mode, self.strength, self.adapt = mode, strength, adapt
        self.state = torch.tensor([1.0, 0.0], dtype=torch.float32)  # what the strength is multiplied with; mu

    def settings(self) -> dict[str, Any]:
        """What the user has chosen of it."""
        return {"penalty": self.strength, "adapt": self.adapt}

    def __call__(self, load: float) -> float:
        """The factor at a ratio of cost to target, `load`."""
        h, raised, mu = float(np.log(max(load, 1e-12))), float(self.state[0]), float(self.state[1])
        if self.mode == "lagrangian":
            self.state[1] = max(0.0, mu + self.RHO * h)
            return self.strength * max(0.0, mu + self.RHO * h)
        if self.adapt:
            step = self.RAISE if load > 1.02 else 1 / self.RAISE if load < 0.98 else 1.0
            self.state[0] = min(max(raised * step, 1.0), self.MOST)
        sign = 1.0 if load > 1 else -1.0 if self.mode == "two-sided" else 0.0
        return self.strength * raised * sign
