"""DMS (ICML 2024): one learnable scalar a dimension, the pruned share a, behind the differentiable top-k of `topk`.

The budget acts on the scalars in one of the modes of `base.Pressure`; the paper's is "penalty".  A fourth one is ours: in
mode "projected" the gradient moves the scalars along the surface of equal cost, comparing what a change costs in loss with
what it saves, and a common shift then puts the cost on the target at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import topk
from .base import Method, Pressure

if TYPE_CHECKING:
    from ..search import Search


class Dms(Method):
    """The paper's search, and its projected form.

    Args:
        hard: whether the forward uses hard masks, the gradient still passing through the soft ones (straight-through).
        normalise: whether importance is replaced by its rank (eq. 2); the paper's ablation is without.
        balance: whether the resource gradient is brought to the length of the task gradient (an option of the authors' code).
    """

    modes = ("penalty", "two-sided", "lagrangian", "projected")

    def __init__(
        self, search: Search, mode: str | None, lr: float | None, penalty: float, adapt: bool, hard: bool, *,
        normalise: bool = True, balance: bool = False,
    ):  # fmt: skip
        super().__init__(search, mode)
        self.lr = lr if lr is not None else 1.0 / (search.decay * search.steps)
        self.hard, self.normalise, self.balance = hard, normalise, balance
        self.pruned = nn.Parameter(torch.zeros(len(self.layout.dimensions), dtype=torch.float32, device=search.device))
        self.direction = torch.zeros_like(self.pruned.data)  # smoothed task gradient
        self.held = torch.full_like(self.pruned.data, torch.nan)  # where scalars of blocks stay, once these are decided
        self.task_norm = torch.zeros((), dtype=torch.float32)
        self.pressure = Pressure(self.mode or "penalty", penalty, adapt)
        self.pressure_state = self.pressure.state

    def settings(self) -> dict[str, Any]:
        return super().settings() | self.pressure.settings() | {"hard": self.hard, "balance": self.balance}

    def parameters(self) -> list[nn.Parameter]:
        return [self.pruned]

    def learn(self, gradient: Tensor) -> None:
        task = self.layout.sum_by_dimension(gradient * self._mask_slope())
        saved = self._cost_slope()  # how fast log cost falls with a
        self.pruned.grad = (
            self._along_equal_cost(task, saved) if self.mode == "projected" else self._pulled(task, saved)
        )

    def _pulled(self, task: Tensor, saved: Tensor) -> Tensor:
        resource = -self.pressure(float(self.search.loads(self._scalars()[None])[0])) * saved
        if self.balance:
            self.task_norm.lerp_(task.norm().cpu(), 0.01 if bool(self.task_norm) else 1.0)
            resource = resource / resource.norm().clamp(min=1e-12) * self.task_norm.to(resource.device)
        return task + resource

    def _along_equal_cost(self, task: Tensor, saved: Tensor) -> Tensor:
        self.direction.lerp_(task / saved.clamp(min=1e-6), 0.1)
        price = self.direction
        centre = (price * saved).sum() / saved.sum().clamp(min=1e-12)  # the multiplier that keeps the cost
        deviation = price - centre
        scale = deviation.abs().median().clamp(min=1e-20)
        return (deviation / scale).clamp(-3, 3)

    def advance(self) -> None:
        self.pruned.clamp_(torch.zeros_like(self.pruned), self.layout.ceiling)
        if self.search.refining:
            self._hold_blocks()
        if self.mode == "projected":
            self._project()

    def masks(self) -> Tensor:
        ranks, pruned = self._ranks(), self.pruned.detach()[self.layout.dimension_of]
        hard = topk.hard_mask(ranks, pruned)
        if self.hard:
            return hard
        soft = self._soft()[0]
        return torch.where(self.layout.in_depth, hard, soft) if self.search.refining else soft

    def shares(self) -> np.ndarray:
        return 1 - self._scalars()

    def _scalars(self) -> np.ndarray:
        return self.pruned.detach().cpu().double().numpy()

    def _ranks(self) -> Tensor:
        layout, importance = self.layout, self.search.importance
        if self.normalise:
            return topk.mid_ranks(importance, layout.segment, layout.start, layout.size)
        low, high = (
            importance.new_zeros(len(layout.sizes)).scatter_reduce_(
                0, layout.segment, importance, how, include_self=False
            )[layout.segment]
            for how in ("amin", "amax")
        )
        spread = (importance - low) / (high - low).clamp(min=1e-30)
        return torch.where(high > low, spread, torch.ones_like(spread))

    def _soft(self) -> tuple[Tensor, Tensor]:
        layout = self.layout
        pruned = self.pruned.detach()[layout.dimension_of]
        return topk.soft_mask(self._ranks(), pruned, layout.sharpness, layout.element_size)

    def _mask_slope(self) -> Tensor:
        """dm/da of each element, (E,)."""
        return self._soft()[1]

    def _cost_slope(self) -> Tensor:
        """-d log(cost) / d a of each dimension for the metric that binds most, (D,), by central differences."""
        a, h = self._scalars(), 1e-3
        steps = h * np.eye(len(a))
        logs = np.log(np.maximum(self.search.loads(np.concatenate([a - steps, a + steps]), binding_at=a), 1e-30))
        slope = (logs[: len(a)] - logs[len(a) :]) / (2 * h)
        return torch.as_tensor(slope, dtype=self.pruned.dtype, device=self.pruned.device)

    def _project(self) -> None:
        """Shift all scalars alike so that the cost meets the target of this step; blocks no more once they are held."""
        layout, a = self.layout, self._scalars()
        moves = layout.is_width if self.search.refining else np.ones(len(a), dtype=bool)

        def shifted(by: np.ndarray) -> np.ndarray:
            return np.where(moves, np.clip(a + by[:, None], 0, layout.ceiling_array), a)

        low, high = -1.0, 1.0
        for _ in range(3):  # three rounds of a grid of 33 are 15 halvings
            grid = np.linspace(low, high, 33)
            over = self.search.loads(shifted(grid)) > 1
            first = int(np.argmin(over))  # costs fall with the shift: the first that is not over
            if over.all():
                low = high = 1.0
                break
            low, high = grid[max(first - 1, 0)], grid[first]
        self.pruned.copy_(torch.as_tensor(shifted(np.array([high]))[0], dtype=self.pruned.dtype))

    def _hold_blocks(self) -> None:
        """Once the blocks are decided their scalars stay where their hard count is: the optimizer moves them on, and of many
        blocks one may lie within a single step."""
        for i, d in enumerate(self.layout.dimensions):
            if d.kind == "depth" and bool(self.held[i].isnan()):
                kept = d.allowed((1 - float(self.pruned[i])) * d.size)
                self.held[i] = 1 - kept / d.size
        self.pruned.copy_(torch.where(self.held.isnan(), self.pruned, self.held))


class EstimatedTopk(Dms):
    """Hard top-k by importance with dm/da = -1 for every element, a plain straight-through estimate (DMS, table 2)."""

    def _mask_slope(self) -> Tensor:
        return -self.pruned.new_ones(self.layout.elements)
