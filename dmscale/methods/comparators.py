"""The paper's and the field's other relaxations, on the same space, schedule, exact fit and export.

Each has its own parameters theta and a differentiable mask m(theta).  The loss reaches theta through the masks' gradients,
the resource through the soft cost at the expected masks, log(r / r_t), with the `Pressure` of the chosen mode.  The rules
come from the papers named; constants that a paper does not fix are said to be ours.
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


class Relaxation(Method):
    """A differentiable mask with parameters of its own.

    A subclass gives `make()`, the initial parameters, `draw()`, the masks of a forward with their graph, and `expected()`,
    the differentiable probability of each element to be kept.
    """

    modes = ("penalty", "two-sided", "lagrangian")
    rate = 1e-2  # default learning rate, ours: for Adam, in a few hundred steps

    def __init__(self, search: Search, mode: str | None, lr: float | None, penalty: float, adapt: bool):
        super().__init__(search, mode)
        self.lr = self.rate if lr is None else lr
        self.pressure = Pressure(self.mode or "penalty", penalty, adapt)
        self.pressure_state = self.pressure.state
        self.generator = torch.Generator(search.device).manual_seed(search.seed)
        self.theta = nn.Parameter(self.make())
        self.drawn = self._drawn()

    def make(self) -> Tensor:
        """Initial parameters: one an element."""
        raise NotImplementedError

    def draw(self) -> Tensor:
        """The masks of one forward, (E,), with the graph back to `theta`."""
        raise NotImplementedError

    def expected(self) -> Tensor:
        """The probability of each element to be kept, (E,), differentiable."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        return super().settings() | self.pressure.settings()

    def parameters(self) -> list[nn.Parameter]:
        return [self.theta]

    def learn(self, gradient: Tensor) -> None:
        with torch.enable_grad():
            masks = self.redraw()
            variables = self.layout.soft_variables(self.expected())
            targets = self.search.targets()
            loads = torch.stack([self.search.space.costs.soft(variables, m) / t for m, t in targets.items()])
            resource = self.pressure(float(loads.detach().max())) * loads.max().clamp(min=1e-12).log()
            self.theta.grad = torch.autograd.grad((masks * gradient).sum() + resource, self.theta)[0]

    def redraw(self) -> Tensor:
        """The masks that the forward ran with, once more and with a graph."""
        state, now = self.noise_state, self.generator.get_state()
        self.generator.set_state(state)
        masks = self._at_least(self.draw())
        self.generator.set_state(now)
        return masks

    def _at_least(self, masks: Tensor) -> Tensor:
        """`masks` with ones at the best elements of each segment of which less is left than it must keep.

        A softmax or a normalisation over nothing gives no numbers.
        """
        layout = self.layout
        lacking = layout.sum_by_segment(masks.detach()) < layout.least
        if not bool(lacking.any()):
            return masks
        ranks = topk.mid_ranks(self.scores(), layout.segment, layout.start, layout.size)
        best = ranks > (1 - layout.least / layout.size)[layout.segment]
        return torch.where(best & lacking[layout.segment], straight_through(torch.ones_like(masks), masks), masks)

    def _drawn(self) -> Tensor:
        self.noise_state = self.generator.get_state()
        with torch.no_grad():
            return self._at_least(self.draw()).detach().clone()

    def advance(self) -> None:
        self.drawn.copy_(self._drawn())

    def masks(self) -> Tensor:
        return self.drawn

    def shares(self) -> np.ndarray:
        with torch.no_grad():
            return self.layout.kept_shares(self.expected())

    def scores(self) -> Tensor:
        with torch.no_grad():
            return self.expected()

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict({k: v for k, v in state.items() if k != "noise_state"})
        self.noise_state = state["noise_state"]
        self.generator.set_state(self.noise_state)
        self.draw()  # the generator is then where it was

    def uniform(self, *shape: int) -> Tensor:
        """Noise in (0, 1) that a resumed search draws again."""
        noise = torch.rand(*shape, generator=self.generator, dtype=torch.float32, device=self.search.device)
        return noise.clamp(1e-6, 1 - 1e-6)

    def gumbel(self, *shape: int) -> Tensor:
        """Noise of the standard Gumbel distribution."""
        return -torch.log(-torch.log(self.uniform(*shape)))


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` forward, the gradient of `soft` backward."""
    return hard + soft - soft.detach()


class Gumbel(Relaxation):
    """Two logits an element, hard Gumbel softmax at temperature 0.1 (the per-element rival of DMS, table 2).

    The keep logit starts at 3 (ours): at the 0.01 of the authors' code half of a pretrained network is masked at once.
    """

    temperature = 0.1

    def make(self) -> Tensor:
        return torch.tensor([0.0, 3.0], dtype=torch.float32, device=self.search.device).repeat(self.layout.elements, 1)

    def draw(self) -> Tensor:
        soft = ((self.theta + self.gumbel(*self.theta.shape)) / self.temperature).softmax(1)[:, 1]
        return straight_through((soft > 0.5).float(), soft)

    def expected(self) -> Tensor:
        return self.theta.softmax(1)[:, 1]


class NumberSelection(Relaxation):
    """One logit for each possible count of a dimension, hard Gumbel softmax, a prefix is kept (FBNetV2; DMS, table 2).

    Counts are of each segment; the full count starts 3 above the others (ours).
    """

    temperature = 0.1

    def make(self) -> Tensor:
        logits = torch.zeros(self.layout.elements, dtype=torch.float32, device=self.search.device)
        return logits.index_fill_(0, self._ends(), 3.0)

    def _ends(self) -> Tensor:
        return self.layout.start + self.layout.size - 1  # logit i of a segment stands for keeping i + 1 elements

    def _kept(self, logits: Tensor) -> Tensor:
        """P(count > i) of each element i, from the softmax over the counts of its segment."""
        segment, count = self.layout.segment, len(self.layout.sizes)
        top = logits.new_full((count,), -torch.inf).scatter_reduce(0, segment, logits.detach(), "amax")
        weights = (logits - top[segment]).exp()
        share = weights / logits.new_zeros(count).index_add(0, segment, weights)[segment]
        ahead = share.flip(0).cumsum(0).flip(0)  # what this and all later elements of all segments sum to
        after = torch.cat([ahead, ahead.new_zeros(1)])[self._ends() + 1]
        return (ahead - after[segment]).clamp(0, 1)

    def draw(self) -> Tensor:
        soft = self._kept((self.theta + self.gumbel(*self.theta.shape)) / self.temperature)
        return straight_through((soft > 0.5).float(), soft)

    def expected(self) -> Tensor:
        return self._kept(self.theta)


class HardConcrete(Relaxation):
    """L0 gates (Louizos et al., 2018), with a Lagrangian for the budget (Wang et al., 2020; Sheared-LLaMA)."""

    modes = ("lagrangian", "penalty", "two-sided")
    beta, low, high = 2 / 3, -0.1, 1.1
    rate = 5e-2

    def make(self) -> Tensor:
        return torch.full((self.layout.elements,), 3.0, dtype=torch.float32, device=self.search.device)

    def draw(self) -> Tensor:
        u = self.uniform(self.layout.elements)
        s = torch.sigmoid((u.log() - (1 - u).log() + self.theta) / self.beta)
        return (s * (self.high - self.low) + self.low).clamp(0, 1)

    def expected(self) -> Tensor:
        return torch.sigmoid(self.theta - self.beta * float(np.log(-self.low / self.high)))


class Pas(Relaxation):
    """Pruning-as-search (Li et al., 2022): one weight an element, binarised at 1/2, straight-through identity."""

    def make(self) -> Tensor:
        ranks = self.uniform(self.layout.elements)
        return 1 + 0.1 * ranks  # a little apart (ours), or all elements would cross 1/2 in one step

    def draw(self) -> Tensor:
        return straight_through((self.theta >= 0.5).float(), self.theta)

    def expected(self) -> Tensor:
        return self.draw()

    def scores(self) -> Tensor:
        return self.theta.detach()


class ContinuousSparsification(Relaxation):
    """m = sigmoid(beta s), beta rising from 1 to 200 (Savarese et al., 2020; grown networks: Yuan et al., 2021).

    Elements whose s rises above zero again grow back.  s starts at 3 (ours), so that a pretrained network starts whole.
    """

    rate = 3e-2

    def make(self) -> Tensor:
        return torch.full((self.layout.elements,), 3.0, dtype=torch.float32, device=self.search.device)

    def draw(self) -> Tensor:
        progress = min(1.0, self.search.step / max(self.search.decay * self.search.steps, 1))
        return torch.sigmoid(200**progress * self.theta)

    def expected(self) -> Tensor:
        return self.draw()

    def scores(self) -> Tensor:
        return self.theta.detach()
