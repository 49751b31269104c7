"""The gradient search: structure learnt inside the user's own training loop.

    search = Search(space, budget="50% macs", steps=2000)
    search.attach(optimizer)
    for x, y in loader:
        criterion(search.model(x), y).backward()
        optimizer.step(); optimizer.zero_grad()
        if search.done:
            break
    small = search.export()

`search.model` has the user's class and shares its parameters.  `attach` adds the structure scalars to the user's
optimizer as a group of their own and does everything else around its step:

before  read the masks' gradients once (they have summed over micro-batches and have been unscaled by then): update the
        importance, c <- 0.99 c + 0.01 (m dL/dm)^2 (DMS, eq. 4), and give each scalar a its gradient;
after   bring the cost to the schedule's target, and set the masks for the next forward.

The target falls exponentially from the full cost to the budget over the first 80% of the search (eq. 10); then the blocks
are decided, and the widths alone are refined.  At the end a last step meets every constraint exactly (`budget.fit`).

Two modes say how the budget acts on the scalars.  "penalty" is the paper's: lambda * log(cost / target) is added to the
loss above the target (eq. 6), and lambda and the learning rate are the user's to tune.  "projected", the default, has
neither: the gradient moves the scalars along the surface of equal cost, comparing what a change costs in loss with what it
saves, and a common shift then puts the cost on the target at every step.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import attachment, checkpoint, gates, recovery, topk
from . import budget as budgets
from .axes import Axis
from .callbacks import Callback
from .errors import SearchError
from .space import Dimension, SearchSpace
from .structure import Structure

MODES = ("projected", "penalty")


class Search:
    """A gradient search for the structure of `space` that meets `budget`.

    Args:
        space: from `trace`.
        budget: "50% macs", dict(macs=0.5, params=6e6), or a `Budget`.
        steps: optimizer steps of the search.
        mode: "projected" (default) or "penalty", see the module's docstring.
        lr: learning rate of the structure scalars, constant.  By default it is set from `steps`.
        penalty: lambda of the resource loss, in mode "penalty".
        hard: whether the forward uses hard masks, the gradient still passing through the soft ones (straight-through).
        warmup: share of the steps at the start in which the target stays at the full cost and importance is gathered.
        decay: share of the steps after which the target has reached the budget.
        momentum: of the moving average of importance.
        train_weights: False for a structure-only search: the weights do not move.
        log_every: steps between two entries of `history`; 200 entries by default.
        callbacks: what watches the search, see `dmscale.callbacks`; `search.callbacks` may be appended to.
    Raises:
        BudgetError: the budget cannot be read or reached; nothing has been trained then.
    """

    model: nn.Module
    history: list[dict[str, Any]]

    def __init__(
        self,
        space: SearchSpace,
        budget: Any,
        steps: int,
        *,
        mode: str = "projected",
        lr: float | None = None,
        penalty: float = 1.0,
        hard: bool = True,
        warmup: float = 0.05,
        decay: float = 0.8,
        momentum: float = 0.99,
        train_weights: bool = True,
        log_every: int | None = None,
        callbacks: Iterable[Callback] = (),
    ):
        if steps < 1:
            raise SearchError(f"steps={steps}: a search needs at least one optimizer step")
        if mode not in MODES:
            raise SearchError(f"mode={mode!r} is none of {', '.join(MODES)}")
        attachment.refuse_sharded(space.model, SearchError)
        self.space = space
        self.budget = budgets.parse(budget, space)
        self.steps, self.mode, self.penalty, self.hard = steps, mode, penalty, hard
        self.warmup, self.decay, self.momentum = warmup, decay, momentum
        self.lr = lr if lr is not None else 1.0 / (decay * steps)
        self.train_weights = train_weights
        self.log_every = log_every or max(1, steps // 200)
        self.step = 0
        self.history = []
        self.callbacks: list[Callback] = list(callbacks)
        self._noted: dict[str, Any] = {}
        self._layout = _Layout(space)
        device = next((p.device for p in space.model.parameters()), torch.device("cpu"))
        self._layout.to(device)
        ones = {a: torch.ones(a.size, device=device) for a in self._layout.axes}
        blocks = {n: torch.ones(len(s.paths), device=device) for n, s in space.stacks.items()}
        self.model = gates.attach(space.model, space.sites, ones, blocks, trainable=True)
        masks = gates.masks_of(self.model)
        self._masks = [*(masks.widths[a] for a in self._layout.axes), *(masks.depths[n] for n in space.stacks)]
        self.pruned = nn.Parameter(torch.zeros(len(self._layout.dimensions), device=device))
        self.importance = torch.zeros(self._layout.elements, device=device)
        self._direction = torch.zeros_like(self.pruned)  # smoothed task gradient
        self._full = {m: float(space.cost()[m]) for m in self.budget.targets}
        self._structure: Structure | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._has_read = False  # whether the step in progress has given gradients

    # -- in the loop --------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether all steps have been taken; the structure is final then."""
        return self.step >= self.steps

    @property
    def masks(self) -> tuple[nn.Parameter, ...]:
        """The masks of `search.model`: set by the search, never trained, whole on every rank."""
        return tuple(self._masks)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Ride on `optimizer`, which must own the parameters of the user's model (or of `search.model`: the same ones).

        Under DDP wrap `search.model`; under FSDP2 call `fully_shard` on it first and build the optimizer from its parameters.

        Raises:
            SearchError: it owns none of them, or the search is attached already, or it is an optimizer that cannot carry
                the structure (LBFGS, Muon).
        """
        if self._optimizer is not None and self._optimizer() is not None:
            raise SearchError("this search is attached to an optimizer already; make one Search for each")
        attachment.check(optimizer)
        own = {id(p) for m in (self.space.model, self.model) for p in m.parameters()} - {id(m) for m in self._masks}
        if self.train_weights and not any(id(p) in own for g in optimizer.param_groups for p in g["params"]):
            raise SearchError(
                "the optimizer owns no parameter of the traced model; build it from model.parameters() before attach, or "
                "say train_weights=False for a structure-only search"
            )
        attachment.without(optimizer, self._masks)
        # like the first group, so that a scheduler made before finds what it left there (initial_lr, max_lr ...)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "name", "param_names")}
        own_settings = {"params": [self.pruned, *self._masks], "lr": self.lr, "weight_decay": 0.0}
        optimizer.add_param_group(group | own_settings | self._names(optimizer))
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self._optimizer = weakref.ref(optimizer)

    def _names(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Names for the added parameters, where the optimizer was built from named ones."""
        if "param_names" not in optimizer.param_groups[0]:
            return {}
        names = [f"dmscale.mask.{member}" for member in self._layout.members]
        return {"params": list(zip(["dmscale.pruned", *names], [self.pruned, *self._masks]))}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._has_read = False
        return attachment.around_closure(lambda: self._read(optimizer), args, kwargs)

    def _read(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of the masks, and give the scalars theirs."""
        grads = [m.grad for m in self._masks]
        for m in self._masks:
            m.grad = None  # masks are set, not stepped
        self.pruned.grad = None
        if self.done or attachment.leaves_out(optimizer):
            return
        if all(g is None for g in grads):
            raise SearchError(
                "no gradient has reached the masks in this step: run the forward on search.model, which shares the "
                "parameters of the traced model, and not on the traced model itself; under DDP wrap search.model"
            )
        flat = torch.cat([torch.zeros_like(m) if g is None else g for m, g in zip(self._masks, grads)])
        scale = attachment.loss_scale(optimizer)
        flat = attachment.average(flat / scale, attachment.shards(self.model))
        if not bool(torch.isfinite(flat).all()):
            raise SearchError(
                f"the gradient is not finite at search step {self.step}: the loss is NaN or infinite. Weights and structure "
                "are those of the last good step; lower the learning rate, clip gradients, or check the data."
            )
        with torch.no_grad():
            current = torch.cat(list(self._masks))
            self.importance.lerp_((current * flat).square(), 1 - self.momentum)
            self.pruned.grad = self._scalar_gradient(flat) * scale
        self._has_read = True
        for group in optimizer.param_groups:
            if any(p is self.pruned for p in group["params"]):
                group["lr"] = self.lr  # constant, whatever a scheduler does to the others
            elif not self.train_weights:
                for p in group["params"]:
                    p.grad = None

    def _scalar_gradient(self, mask_gradient: Tensor) -> Tensor:
        """dL/da of each dimension, with the budget's part, (D,)."""
        layout = self._layout
        _, slope = self._soft_masks()
        task = layout.sum_by_dimension(mask_gradient * slope)
        saved = self._cost_slope()  # how fast log cost falls with a
        if self.mode == "penalty":
            above = (
                self._costs_at(self._scalars()[None]).max() > 1
            )  # the loss is lambda log(cost / target) there, else 0
            return task - self.penalty * saved if above else task
        self._direction.lerp_(task / saved.clamp(min=1e-6), 0.1)
        price = self._direction
        centre = (price * saved).sum() / saved.sum().clamp(min=1e-12)  # the multiplier that keeps the cost
        deviation = price - centre
        scale = deviation.abs().median().clamp(min=1e-20)
        return (deviation / scale).clamp(-3, 3)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.done or not self._has_read:
            return
        with torch.no_grad():
            self.pruned.clamp_(torch.zeros_like(self.pruned), self._layout.ceiling)
            if self._refining:
                self._hold_blocks()
            self.step += 1
            if self.mode == "projected":
                self._project()
            if self.done:
                self._finish()
            else:
                self._set_masks()
        if self.step % self.log_every == 0 or self.done:
            self._log()

    # -- schedule and cost --------------------------------------------------------------------------------------------

    @property
    def _refining(self) -> bool:
        return self.step >= self.decay * self.steps

    def _targets(self) -> dict[str, float]:
        """Metric -> target at this step, absolute: full cost during warm-up, then exponential decay, then the budget."""
        start, end = self.warmup * self.steps, self.decay * self.steps
        progress = min(max((self.step - start) / max(end - start, 1e-9), 0.0), 1.0)
        return {m: self._full[m] * (t / self._full[m]) ** progress for m, t in self.budget.targets.items()}

    def _costs_at(self, pruned: np.ndarray) -> np.ndarray:
        """Costs at several vectors of scalars (S, D), relative to this step's targets: (S, metrics)."""
        variables = self._layout.cost_variables(pruned)
        targets = self._targets()
        return np.stack([self.space.costs.metrics[m].real(variables) / t for m, t in targets.items()], 1)

    def _scalars(self) -> np.ndarray:
        return self.pruned.detach().double().cpu().numpy()

    def _cost_slope(self) -> Tensor:
        """-d log(cost) / d a of each dimension for the metric that binds most, (D,), by central differences."""
        a, h = self._scalars(), 1e-3
        metric = int(np.argmax(self._costs_at(a[None])[0]))
        steps = h * np.eye(len(a))
        logs = np.log(self._costs_at(np.concatenate([a - steps, a + steps]))[:, metric])
        slope = (logs[: len(a)] - logs[len(a) :]) / (2 * h)
        return torch.as_tensor(slope, dtype=self.pruned.dtype, device=self.pruned.device)

    def _project(self) -> None:
        """Shift all scalars alike so that the cost meets the target of this step; blocks no more once they are held."""
        layout, a = self._layout, self._scalars()
        moves = layout.is_width if self._refining else np.ones(len(a), dtype=bool)

        def shifted(by: np.ndarray) -> np.ndarray:
            return np.where(moves, np.clip(a + by[:, None], 0, layout.ceiling_array), a)

        low, high = -1.0, 1.0
        for _ in range(3):  # three rounds of a grid of 33 are 15 halvings
            grid = np.linspace(low, high, 33)
            over = self._costs_at(shifted(grid)).max(1) > 1
            first = int(np.argmin(over))  # costs fall with the shift: the first that is not over
            if over.all():
                low = high = 1.0
                break
            low, high = grid[max(first - 1, 0)], grid[first]
        self.pruned.copy_(torch.as_tensor(shifted(np.array([high]))[0], dtype=self.pruned.dtype))

    def _hold_blocks(self) -> None:
        """Once the blocks are decided their scalars stay where their hard count is."""
        layout = self._layout
        for i, d in enumerate(layout.dimensions):
            if d.kind == "depth":
                kept = d.allowed((1 - float(self.pruned[i])) * d.size)
                self.pruned[i] = 1 - kept / d.size

    # -- masks --------------------------------------------------------------------------------------------------------

    def _ranks(self) -> Tensor:
        layout = self._layout
        return topk.mid_ranks(self.importance, layout.segment, layout.start, layout.size)

    def _soft_masks(self) -> tuple[Tensor, Tensor]:
        layout = self._layout
        pruned = self.pruned.detach()[layout.dimension_of]
        return topk.soft_mask(self._ranks(), pruned, layout.sharpness, layout.element_size)

    def _set_masks(self) -> None:
        layout = self._layout
        ranks, pruned = self._ranks(), self.pruned.detach()[layout.dimension_of]
        if self.hard:
            mask = topk.hard_mask(ranks, pruned)
        else:
            mask, _ = topk.soft_mask(ranks, pruned, layout.sharpness, layout.element_size)
            if self._refining:
                mask = torch.where(layout.in_depth, topk.hard_mask(ranks, pruned), mask)
        self._write(mask)

    def _write(self, flat: Tensor) -> None:
        for m, values in zip(self._masks, flat.split(self._layout.sizes)):
            m.data.copy_(values)
        if self.hard or self._refining:
            self._decide_blocks()

    def _decide_blocks(self) -> None:
        """Tell the gates that blocks are in or out, so that no tensor is blended."""
        masks = gates.masks_of(self.model)
        masks.decided = {n: [keep > 0.5 for keep in m.tolist()] for n, m in masks.depths.items()}

    def _finish(self) -> None:
        """Fit the structure to the budget and leave its hard masks on `search.model`."""
        self._structure = self._fitted()
        kept = [*(self.space.widths_of(self._structure)[a] for a in self._layout.axes)]
        kept += [self._structure.kept[n] for n in self.space.stacks]
        for m, indices in zip(self._masks, kept):
            m.data.zero_()
            m.data[list(indices)] = 1
        self._decide_blocks()

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure:
        """The structure found so far, exactly on budget; final once `done`."""
        return self._structure if self._structure is not None else self._fitted()

    def _fitted(self) -> Structure:
        scores = self.scores()
        sizes = {d.name: (1 - a) * d.size for d, a in zip(self._layout.dimensions, self.pruned.tolist())}
        found = self.space.structure(sizes, scores)
        return budgets.fit(self.space, found, self.budget, scores, keep=found)

    def scores(self) -> dict[str, np.ndarray]:
        """Member -> importance of each of its elements: the mean |m dL/dm|, an estimate of the loss it saves."""
        parts = self.importance.sqrt().cpu().split(self._layout.sizes)
        return {name: part.double().numpy() for name, part in zip(self._layout.members, parts)}

    def export(self, recalibrate: Iterable[Any] | None = None) -> nn.Module:
        """The plain smaller model, exactly on budget and verified against the gated one.

        Args:
            recalibrate: batches (inputs, or (inputs, ...)) on which BatchNorm statistics are measured anew.
        Raises:
            ExportError: it differs from the gated model; the search stays usable.
        """
        attachment.gather(self.model, self.space.model)
        small = self.space.export(self.structure)
        if recalibrate is not None:
            recovery.recalibrate(small, recalibrate)
        return small

    def _log(self) -> None:
        targets = self._targets()
        costs = self._costs_at(self._scalars()[None])[0]
        self.history.append(
            {
                "step": self.step,
                "cost": {m: float(c) * t / self._full[m] for (m, t), c in zip(targets.items(), costs)},
                "target": {m: t / self._full[m] for m, t in targets.items()},
                "sizes": {
                    d.name: d.allowed((1 - a) * d.size) for d, a in zip(self._layout.dimensions, self.pruned.tolist())
                },
                **{name: float(value) for name, value in self._noted.items()},
            }
        )
        self._noted.clear()
        for callback in self.callbacks:
            callback.on_step(self, self.history[-1])
            if self.done:
                callback.on_end(self)

    def note(self, **values: float | Tensor) -> None:
        """Give numbers of this step, the loss say, to the next entry of `history` and to the callbacks.

        Tensors are read only when the entry is made, so that a step on a GPU need not wait.

        Raises:
            SearchError: a name is one that every entry has (step, cost, target, sizes).
        """
        taken = [name for name in values if name in ("step", "cost", "target", "sizes")]
        if taken:
            raise SearchError(f"note: {taken[0]!r} is a part of every entry of the history; choose another name")
        self._noted |= {name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()}

    # -- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights (those are in the user's model and optimizer): a resumed search goes on alike."""
        return {
            "version": 1,
            "step": self.step,
            "steps": self.steps,
            "dimensions": [(d.name, d.size) for d in self._layout.dimensions],
            "pruned": self.pruned.detach().clone(),
            "importance": self.importance.clone(),
            "direction": self._direction.clone(),
            "history": list(self.history),
            "structure": self._structure.to_json() if self._structure else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            SearchError: the state is of another space or another length.
        """
        own = [(d.name, d.size) for d in self._layout.dimensions]
        theirs = [tuple(d) for d in state.get("dimensions", [])]
        if theirs != own:
            differing = [n for n, _ in theirs if n not in dict(own)] + [n for n, _ in own if n not in dict(theirs)]
            raise SearchError(f"the state is of another search space; dimensions differ: {differing[:5] or 'in size'}")
        if state["steps"] != self.steps:
            raise SearchError(f"the state is of a search of {state['steps']} steps, this one has {self.steps}")
        with torch.no_grad():
            self.pruned.copy_(state["pruned"])
            self.importance.copy_(state["importance"])
            self._direction.copy_(state["direction"])
        self.step, self.history = state["step"], list(state["history"])
        self._structure = Structure.from_json(state["structure"]) if state["structure"] else None
        if self.done:
            self._finish()
        elif self.step:
            self._set_masks()

    def save(
        self,
        path: str | os.PathLike[str],
        optimizer: torch.optim.Optimizer | None = None,
        model: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint, atomically: at any moment `path` is the old file or the new one.

        Args:
            path: the file; its folder is made.
            optimizer: whose state to store too.
            model: whether to store the weights (and buffers) of the user's model.
            extra: tensors and plain data to store beside, the state of a scheduler, a GradScaler or a loader say.
        Raises:
            CheckpointError: it cannot be written (the disk is full ...); an earlier checkpoint is untouched.
        """
        checkpoint.save(self, path, optimizer, model, extra)

    def load(self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
        """Continue from a checkpoint: the search, the random generators, and the weights if the file holds them.

        Args:
            path: a file of `save`.
            optimizer: to load its state into; `attach` comes first.
        Returns:
            what was given as `extra`.
        Raises:
            CheckpointError: the file is missing, damaged, or of another model or optimizer; nothing has been changed.
            SearchError: it is of another search space or length; nothing has been changed.
        """
        return checkpoint.load(self, path, optimizer)


class _Layout:
    """All elements of a space in one flat vector: axes first, then stacks of blocks; and which dimension each is of."""

    def __init__(self, space: SearchSpace):
        self.space = space
        self.dimensions: list[Dimension] = list(space.dimensions.values())
        self.axes: list[Axis] = []
        self.members: list[str] = []
        owner: list[int] = []
        depth: list[bool] = []
        for i, d in enumerate(self.dimensions):
            if d.kind != "depth":
                self.axes += d.axes
                self.members += d.members
                owner += [i] * len(d.axes)
                depth += [False] * len(d.axes)
        index = {d.name: i for i, d in enumerate(self.dimensions)}
        for name in space.stacks:
            self.members.append(name)
            owner.append(index[name])
            depth.append(True)
        self.sizes = [a.size for a in self.axes] + [len(s.paths) for s in space.stacks.values()]
        self.elements = sum(self.sizes)
        sizes = torch.tensor(self.sizes)
        self.segment = torch.repeat_interleave(torch.arange(len(self.sizes)), sizes)
        self.start = torch.cumsum(sizes, 0) - sizes
        self.size = sizes
        self.dimension_of = torch.tensor(owner)[self.segment]
        self.in_depth = torch.tensor(depth)[self.segment]
        coarse = torch.tensor([self.dimensions[i].kind != "width" for i in owner])[self.segment]
        self.element_size = sizes[self.segment].float()
        self.sharpness = self.element_size * torch.where(coarse, 4.0, 1.0)
        self.ceiling = torch.tensor([1 - d.lowest / d.size for d in self.dimensions])
        self.ceiling_array = self.ceiling.double().numpy()
        self.is_width = np.array([d.kind != "depth" for d in self.dimensions])
        # each cost variable: the dimension it belongs to, its full size, and for blocks the place in the ranking
        self._width_columns = np.array([i for i, d in enumerate(self.dimensions) for _ in d.axes], dtype=np.int64)
        self._width_sizes = np.array([a.size for a in self.axes], dtype=np.float64)
        self._stacks = [(index[n], len(s.paths)) for n, s in space.stacks.items()]

    def to(self, device: torch.device) -> None:
        """Move every tensor to `device`."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def sum_by_dimension(self, flat: Tensor) -> Tensor:
        """Sum over the elements of each dimension, (D,)."""
        out = torch.zeros(len(self.dimensions), dtype=flat.dtype, device=flat.device)
        return out.index_add_(0, self.dimension_of, flat)

    def cost_variables(self, pruned: np.ndarray) -> np.ndarray:
        """The soft values of the space's cost variables at scalars (S, D), with a one behind the last, (S, V + 1)."""
        widths = self._width_sizes * (1 - pruned[:, self._width_columns])
        blocks = [np.repeat(1 - pruned[:, i : i + 1], n, 1) for i, n in self._stacks]
        return np.concatenate([widths, *blocks, np.ones((len(pruned), 1))], 1)
