"""The search: structure learnt inside the user's own training loop.

    search = Search(space, budget="50% macs", steps=2000)
    search.attach(optimizer)
    for x, y in loader:
        criterion(search.model(x), y).backward()
        optimizer.step(); optimizer.zero_grad()
        if search.done:
            break
    small = search.export()

`search.model` has the user's class and shares its parameters.  `attach` adds the masks, and what a method learns, to the
user's optimizer as a group of their own and does everything else around its step:

before  read the masks' gradients once (they have summed over micro-batches and have been unscaled by then): update the
        importance, c <- 0.99 c + 0.01 (m dL/dm)^2 (DMS, eq. 4), and let the method learn;
after   bring the structure to the schedule's target, and set the masks for the next forward.

The target falls exponentially from the full cost to the budget over the first 80% of the search (DMS, eq. 10); then the
weights settle in what is left.  At the end every constraint holds exactly (`budget.fit`).  How importance and gradients
become a structure is the method's part: see `methods`.
"""

from __future__ import annotations

import math
import numbers
import os
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import attachment, checkpoint, gates, latency, methods, recovery
from . import budget as _budgets
from . import importance as _importance
from .callbacks import Callback
from .errors import CheckpointError, SearchError
from .layout import Layout
from .space import SearchSpace
from .structure import Structure

PENALTY = 1.0
"""lambda of the resource loss; the paper's."""

_RIDING: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[Search]] = weakref.WeakKeyDictionary()
"""The searches that ride on each optimizer."""

_VERSION = 4  # of the state of a search


@dataclass(frozen=True)
class Member:
    """One network of a family: the `budget` that it meets, its `structure`, and the exported `model`."""

    budget: _budgets.Budget
    structure: Structure
    model: nn.Module


def _check_numbers(
    steps: Any, warmup: Any, decay: Any, momentum: Any, lr: Any, penalty: Any, seed: Any, log_every: Any
) -> None:
    """Refuse numbers that a search cannot run with, all at once; the arguments are those of `Search`."""
    whole = {"steps": (steps, 1), "seed": (seed, None), "log_every": (1 if log_every is None else log_every, 1)}
    problems = [
        f"{name}={value!r} is no whole number{'' if least is None else ' of at least 1'}"
        for name, (value, least) in whole.items()
        if not _is_number(value, numbers.Integral) or (least is not None and value < least)
    ]
    problems += [
        f"{name}={value!r} is no number between 0 (included) and 1"
        for name, value in (("warmup", warmup), ("momentum", momentum))
        if not (_is_number(value, numbers.Real) and 0 <= value < 1)
    ]
    if not (_is_number(decay, numbers.Real) and 0 < decay <= 1):
        problems.append(f"decay={decay!r} is no number between 0 and 1 (included)")
    elif not problems and warmup >= decay:
        problems.append(
            f"warmup={warmup!r} leaves the target no time to fall before decay={decay!r}, the share of the steps after which "
            "it has reached the budget: give a smaller warmup or a larger decay"
        )
    if lr is not None and not (_is_number(lr, numbers.Real) and 0 < lr < math.inf):
        problems.append(f"lr={lr!r} is no positive number")
    if not (_is_number(penalty, numbers.Real) and 0 <= penalty < math.inf):
        problems.append(f"penalty={penalty!r} is no number of at least 0")
    if problems:
        raise SearchError("; ".join(problems))


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class Search:
    """A search for the structure of `space` that meets `budget`, while the network trains.

    Args:
        space: from `trace`.
        budget: "50% macs", dict(macs=0.5, params=6e6), or a `Budget`.
        steps: optimizer steps of the search.
        budgets: several budgets in place of one, of which the schedule passes through all: see `family`.
        method: one of `methods.METHODS`; "knapsack" by default, "dms" is the paper's.
        mode: how the budget acts on a method that learns by gradient: "penalty", "two-sided", "lagrangian", "projected".
        lr: learning rate of what the method learns, constant.  By default it is set from `steps`.
        penalty: lambda of the resource loss in mode "penalty".
        adapt: whether lambda follows the cost: raised while it stays behind the schedule.
        hard: for "dms", whether the forward uses hard masks (straight-through) instead of soft ones.
        balance: for "dms", whether the budget's gradient is brought to the length of the task's (the authors' grad_scale).
        importance: how elements are ranked, one of `importance.KINDS` or a function of the search that returns
            member -> scores; "taylor" by default.
        depth_importance: the same for blocks, if it should differ: one of `importance.DEPTH_KINDS`.
        warmup: share of the steps at the start in which the target stays at the full cost and importance is gathered.
        decay: share of the steps after which the target has reached the budget; more than `warmup`.
        momentum: of the moving average of importance; 0 takes the last step alone.
        train_weights: False for a structure-only search: no step of the optimizer moves the weights, after the last one of
            the search neither.
        seed: of the noise that some methods draw.
        log_every: steps between two entries of `history`; 200 entries by default.
        callbacks: what watches the search, see `dmscale.callbacks`; `search.callbacks` may be appended to.
    Raises:
        BudgetError: the budget cannot be read or reached; nothing has been trained then.
        SearchError: an option is misspelt, out of range, or does not go with the method.
    """

    model: nn.Module
    history: list[dict[str, Any]]

    @torch.inference_mode(False)  # around it the mode does not matter: what is made here is trained
    def __init__(
        self,
        space: SearchSpace,
        budget: Any = None,
        steps: int = 1000,
        *,
        budgets: Sequence[Any] = (),
        method: str = "knapsack",
        mode: str | None = None,
        lr: float | None = None,
        penalty: float = PENALTY,
        adapt: bool = True,
        hard: bool | None = None,
        balance: bool = False,
        importance: Any = "taylor",
        depth_importance: str | None = None,
        warmup: float = 0.05,
        decay: float = 0.8,
        momentum: float = 0.99,
        train_weights: bool = True,
        seed: int = 0,
        log_every: int | None = None,
        callbacks: Iterable[Callback] = (),
    ):
        _check_numbers(steps, warmup, decay, momentum, lr, penalty, seed, log_every)
        attachment.refuse_sharded(space.model, SearchError)
        self.space, self.steps, self.method_name, self.seed = space, steps, method, seed
        self.warmup, self.decay, self.momentum = warmup, decay, momentum
        self.train_weights = train_weights
        self.log_every = log_every or max(1, steps // 200)
        self.step = 0
        self.history = []
        self.family: list[Member] = []
        self.callbacks: list[Callback] = list(callbacks)
        self._noted: dict[str, Any] = {}
        self._structure: Structure | None = None
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._has_read = False  # whether the step in progress has given gradients
        self._ascends = False  # whether what is backpropagated is to rise
        self.layout = Layout(space)
        self.device = next((p.device for p in space.model.parameters()), torch.device("cpu"))
        self.layout.to(self.device)
        self._plan_schedule(budget, budgets)
        self._make_model()
        self._meter = _importance.Meter(space, self.layout, self.model, importance, depth_importance)
        self.importance = torch.zeros(self.layout.elements, dtype=torch.float32, device=self.device)
        self.measured = torch.zeros_like(self.importance)  # importance in the last step alone
        self.method = methods.make(self, mode, lr, penalty, adapt, hard, balance)

    def _plan_schedule(self, budget: Any, several: Sequence[Any]) -> None:
        """The times at which the target reaches each budget, loosest first, on a straight line in the log of the cost."""
        if budget is not None and several:
            raise SearchError("give a budget, or a sequence of budgets=, and not both")
        several = [several] if isinstance(several, (str, Mapping)) else several
        several = several or [budget]
        if any(_budgets.names_latency(b) for b in several):
            latency.share(self.space)
        found = [_budgets.parse(b, self.space) for b in several]
        metrics = {m for b in found for m in b.targets}
        if any(b.targets.keys() != metrics for b in found):
            raise SearchError(f"all budgets of a family must name the same metrics ({', '.join(sorted(metrics))})")
        self._full = {m: float(self.space.cost()[m]) for m in found[0].targets}
        found.sort(key=lambda b: -max(t / self._full[m] for m, t in b.targets.items()))
        depth = [max(math.log(self._full[m] / t) for m, t in b.targets.items()) for b in found]
        looser = any(b.targets[m] > a.targets[m] for a, b in zip(found, found[1:]) for m in metrics)
        if looser or any(b <= a for a, b in zip(depth, depth[1:])):
            raise SearchError(
                "two budgets of a family are the same, or are not tighter in every metric than those before"
            )
        self.budgets, self.budget = found, found[-1]
        start, end = self.warmup * self.steps, self.decay * self.steps
        share = [d / depth[-1] if depth[-1] else 1.0 for d in depth]
        self._times = [start, *(start + (end - start) * s for s in share)]

    def _make_model(self) -> None:
        """The gated model, with masks of one that collect gradients."""
        dtype = torch.float32  # whatever the default is: importance is an average of small squares
        ones = {a: torch.ones(a.size, dtype=dtype, device=self.device) for a in self.layout.axes}
        blocks = {n: torch.ones(len(s.paths), dtype=dtype, device=self.device) for n, s in self.space.stacks.items()}
        self.model = gates.attach(self.space.model, self.space.sites, ones, blocks, trainable=True)
        masks = gates.masks_of(self.model)
        self._masks = [*(masks.widths[a] for a in self.layout.axes), *(masks.depths[n] for n in self.space.stacks)]
        self._tell(torch.ones(self.layout.elements, dtype=dtype))

    # -- in the loop --------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether all steps have been taken; the structure is final then."""
        return self.step >= self.steps

    @property
    def has_own_importance(self) -> bool:
        """Whether a function of the user's says what matters."""
        return any(map(callable, self._meter.kinds.values()))

    @property
    def masks(self) -> tuple[nn.Parameter, ...]:
        """The masks of `search.model`: set by the search, never trained, whole on every rank."""
        return tuple(self._masks)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Ride on `optimizer`, which must own the parameters of the user's model (or of `search.model`: the same ones).

        Under DDP wrap `search.model`; under FSDP2 call `fully_shard` on it first and build the optimizer from its parameters.

        Raises:
            SearchError: it owns none of them, or the search is attached already, or it is an optimizer that cannot carry
                the structure (LBFGS, Muon), or carries another search of this model that has steps to take.
        """
        if self._optimizer is not None and self._optimizer() is not None:
            raise SearchError("this search is attached to an optimizer already; make one Search for each")
        attachment.check(optimizer)
        self._refuse_beside(_RIDING.get(optimizer, ()))
        own = {id(p) for m in (self.space.model, self.model) for p in m.parameters()} - {id(m) for m in self._masks}
        if self.train_weights and not any(id(p) in own for g in optimizer.param_groups for p in g["params"]):
            raise SearchError(
                "the optimizer owns no parameter of the traced model; build it from model.parameters() before attach, or "
                "say train_weights=False for a structure-only search"
            )
        attachment.without(optimizer, self._masks)
        # like the first group, so that a scheduler made before finds what it left there (initial_lr, max_lr ...)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "name", "param_names")}
        self._ascends = bool(group.get("maximize"))
        own_settings = {"params": [*self.method.parameters(), *self._masks], "lr": self.method.lr, "weight_decay": 0.0}
        if self._ascends:  # the budget does not
            own_settings["maximize"] = False
        optimizer.add_param_group(group | own_settings | self._names(optimizer))
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        if not attachment.shards(self.model):  # shards are not in the user's model: to clear them is to clear the masks
            masks = {id(m) for m in self._masks}
            weights = [p for p in self.model.parameters() if id(p) not in masks]
            self.model.register_forward_pre_hook(attachment.Following(self._masks, weights))
        self._optimizer = weakref.ref(optimizer)
        _RIDING.setdefault(optimizer, weakref.WeakSet()).add(self)

    def _refuse_beside(self, others: Iterable[Search]) -> None:
        """Raise if one of `others` waits for gradients of masks that no forward of this search gives."""
        own = {id(p) for p in self.space.model.parameters()}
        for other in others:
            if not other.done and any(id(p) in own for p in other.space.model.parameters()):
                raise SearchError(
                    f"the optimizer carries another search of this model, which has taken {other.step} of {other.steps} steps "
                    "and would wait for gradients in every step of this one: take the remaining steps first, or attach this "
                    "search to a new optimizer of the same parameters"
                )

    def _names(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Names for the added parameters, where the optimizer was built from named ones."""
        if "param_names" not in optimizer.param_groups[0]:
            return {}
        learnt = self.method.parameters()
        names = [f"dmscale.{self.method_name}.{i}" for i in range(len(learnt))]
        names += [f"dmscale.mask.{member}" for member in self.layout.members]
        return {"params": list(zip(names, [*learnt, *self._masks]))}

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self._has_read = False
        return attachment.around_closure(lambda: self._read(optimizer), args, kwargs)

    def _read(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of the masks, and let the method learn from them."""
        grads = [m.grad for m in self._masks]
        for m in self._masks:
            m.grad = None  # masks are set, not stepped
        for p in self.method.parameters():
            p.grad = None
        if not self.train_weights:
            self._hold_weights(optimizer)
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
        flat = -flat if self._ascends else flat
        if not bool(torch.isfinite(flat).all()):
            raise SearchError(
                f"the gradient is not finite at search step {self.step}: the loss is NaN or infinite. Weights and structure "
                "are those of the last good step; lower the learning rate, clip gradients, or check the data."
            )
        with torch.no_grad():
            self.measured = self._meter.measure(self, torch.cat(list(self._masks)), flat)
            self.importance.lerp_(self.measured, 1 - self.momentum)
            self.method.learn(flat)
            for p in self.method.parameters():
                if p.grad is not None:
                    p.grad.mul_(scale)  # which the optimizer takes out again
        self._has_read = True
        for group in optimizer.param_groups:
            if self._is_own(group):
                group["lr"] = self.method.lr  # constant, whatever a scheduler does to the others

    def _is_own(self, group: Mapping[str, Any]) -> bool:
        """Whether a group of the optimizer is the one that `attach` has added."""
        own = {id(p) for p in (*self.method.parameters(), *self._masks)}
        return any(id(p) in own for p in group["params"])

    def _hold_weights(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the optimizer nothing to move but the structure, and once that is final nothing at all."""
        for group in optimizer.param_groups:
            if not self._is_own(group):
                for p in group["params"]:
                    p.grad = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.done or not self._has_read:
            return
        with torch.no_grad():
            self.step += 1
            self.method.advance()
            self._take_snapshots()
            if self.done:
                self._finish()
            else:
                self._write(self.method.masks())
        if self.step % self.log_every == 0 or self.done:
            self._log()

    # -- schedule and cost --------------------------------------------------------------------------------------------

    @property
    def warming(self) -> bool:
        """Whether the target is still the full cost."""
        return self.step < self._times[0]

    @property
    def refining(self) -> bool:
        """Whether the target had reached the budget before this step: blocks are decided, the weights settle."""
        return self.step - 1 >= self._times[-1]

    @property
    def reaches_target(self) -> bool:
        """Whether the target has reached the budget in this very step."""
        return self.step - 1 < self._times[-1] <= self.step

    def targets(self) -> dict[str, float]:
        """Metric -> target at this step, absolute: full cost during warm-up, then exponential decay, then the budget."""
        out = {}
        for m, full in self._full.items():
            logs = [math.log(full), *(math.log(b.targets[m]) for b in self.budgets)]
            out[m] = math.exp(float(np.interp(self.step, self._times, logs)))
            if self.step >= self._times[-1]:
                out[m] = self.budget.targets[m]  # without rounding
        return out

    def loads(self, pruned: np.ndarray, binding_at: np.ndarray | None = None) -> np.ndarray:
        """Cost over this step's target at several vectors of pruned shares (S, D), of the metric that binds most: (S,).

        Args:
            binding_at: one vector (D,): the metric that binds there, and not the one of each row.
        """
        if binding_at is not None:
            metric = int(np.argmax(self._loads(binding_at[None])[0]))
            return self._loads(pruned)[:, metric]
        return self._loads(pruned).max(1)

    def _loads(self, pruned: np.ndarray) -> np.ndarray:
        variables = self.layout.cost_variables(pruned)
        return np.stack([self.space.costs.metrics[m].real(variables) / t for m, t in self.targets().items()], 1)

    def _costs(self, structure: Structure | None) -> dict[str, float]:
        """Metric -> the cost of a structure, or without one of what the method means now: blocks count for their share then."""
        if structure is None:
            loads = self._loads(1 - self.method.shares()[None])[0]
            return {m: float(load) * t for (m, t), load in zip(self.targets().items(), loads)}
        row = self.space.vector(structure)[None]
        return {m: float(self.space.costs.many(row, m)[0]) for m in self._full}

    # -- masks --------------------------------------------------------------------------------------------------------

    def _write(self, flat: Tensor) -> None:
        """Set the masks of the model, and tell the gates what they need not compute.

        Those are products with ones, and blends of blocks that are wholly in or out.
        """
        masks = gates.masks_of(self.model)
        changes = not torch.equal(torch.cat([m.data for m in self._masks]).to(flat.dtype), flat)
        if changes:
            torch._foreach_copy_([m.data for m in self._masks], list(flat.split(self.layout.sizes)))
        if changes or masks.outdated:  # else what gates remember of the masks stays good
            self._tell(flat)
        masks.settled = self.method.final or self.done

    def _tell(self, flat: Tensor) -> None:
        parts = np.split(flat.cpu().numpy(), np.cumsum(self.layout.sizes)[:-1])
        masks, widths = gates.masks_of(self.model), len(self.layout.axes)
        hard = [bool(((part == 0) | (part == 1)).all()) for part in parts]
        masks.hard = {a: int(part.sum()) for a, part, known in zip(self.layout.axes, parts, hard) if known}
        blocks = zip(masks.depths, parts[widths:], hard[widths:])
        masks.decided = {n: (part > 0.5).tolist() for n, part, known in blocks if known}

    def _finish(self) -> None:
        """Fit the structure to the budget and leave its hard masks on `search.model`."""
        if self._structure is None:
            self._structure = self.method.structure(self.budget)
        self._write(self.layout.mask_of(self._structure, self.device))

    def _take_snapshots(self) -> None:
        """Export a member of the family whenever the schedule passes its budget."""
        for budget, time in zip(self.budgets[:-1], self._times[1:-1]):
            if self.step - 1 < time <= self.step:
                structure = self.method.structure(budget)
                self.family.append(Member(budget, structure, self.space.export(structure)))
        if self.done and len(self.budgets) > 1:
            self._finish()
            self.family.append(Member(self.budget, self.structure, self.space.export(self.structure)))

    # -- results ------------------------------------------------------------------------------------------------------

    @property
    def structure(self) -> Structure:
        """The structure found so far, exactly on budget; final once `done`."""
        return self._structure if self._structure is not None else self.method.structure(self.budget)

    @property
    def pruned(self) -> Tensor:
        """The share of each dimension that is pruned now, (D,)."""
        return torch.as_tensor(1 - self.method.shares(), dtype=torch.float32)

    def scores(self) -> dict[str, np.ndarray]:
        """Member -> importance of each of its elements: an estimate of the loss it saves, in a unit common to all."""
        return self.layout.by_member(self.importance)

    def export(self, recalibrate: Iterable[Any] | None = None) -> nn.Module:
        """The plain smaller model, exactly on budget and verified against the gated one; warns before the last step.

        Args:
            recalibrate: batches (inputs, or (inputs, ...)) on which BatchNorm statistics are measured anew.
        Raises:
            ExportError: it differs from the gated model; the search stays usable.
            DmscaleError: there is no batch to recalibrate on.
        """
        if not self.done:
            warnings.warn(
                f"the search has taken {self.step} of its {self.steps} steps: what it exports is cut to the budget from where it "
                "is, and was not trained for. Give Search the number of optimizer steps that your loop takes",
                stacklevel=2,
            )
        attachment.gather(self.model, self.space.model)
        small = self.space.export(self.structure)
        if recalibrate is not None:
            recovery.recalibrate(small, recalibrate)
        return small

    def _log(self) -> None:
        found = self._structure if self.done else self.method.exactly()
        sizes = found.sizes if found is not None else {
            d.name: d.allowed(share * d.size) for d, share in zip(self.layout.dimensions, self.method.shares())
        }  # fmt: skip
        self.history.append(
            {
                "step": self.step,
                "cost": {m: cost / self._full[m] for m, cost in self._costs(found).items()},
                "target": {m: t / self._full[m] for m, t in self.targets().items()},
                "sizes": dict(sizes),
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
            "version": _VERSION,
            "step": self.step,
            "steps": self.steps,
            "method": self.method_name,
            "dimensions": [(d.name, d.size) for d in self.layout.dimensions],
            "terms": self._terms(),
            "importance": self.importance.clone(),
            "learnt": self.method.state_dict(),
            "history": list(self.history),
            "family": [(m.structure.to_json(), m.model.state_dict()) for m in self.family],
            "structure": self._structure.to_json() if self._structure else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; nothing is changed where that is refused.

        Raises:
            SearchError: the state is of another space, method or length.
            CheckpointError: it is of another budget, or of other settings; all that differ are named.
        """
        own = [(d.name, d.size) for d in self.layout.dimensions]
        theirs = [tuple(d) for d in state.get("dimensions", [])]
        if theirs != own:
            differing = [n for n, _ in theirs if n not in dict(own)] + [n for n, _ in own if n not in dict(theirs)]
            raise SearchError(f"the state is of another search space; dimensions differ: {differing[:5] or 'in size'}")
        for what, mine in (("version", _VERSION), ("steps", self.steps), ("method", self.method_name)):
            if state.get(what) != mine:
                raise SearchError(f"the state is of a search with {what}={state.get(what)!r}, this one has {mine!r}")
        self._check_terms(state["terms"])
        self.importance.copy_(state["importance"])
        self.method.load_state_dict(state["learnt"])
        self.step, self.history = state["step"], list(state["history"])
        self._structure = Structure.from_json(state["structure"]) if state["structure"] else None
        self.family = [self._restored(b, *kept) for b, kept in zip(self.budgets, state["family"])]
        if self.done:
            self._finish()
        else:  # this search may have taken steps of its own
            self._write(self.method.masks() if self.step else torch.ones_like(self.importance))

    def _terms(self) -> dict[str, Any]:
        """What the outcome depends on, beside weights and data: a search may go on from a state of the same alone."""
        kinds = {
            k: getattr(v, "__name__", type(v).__name__) if callable(v) else v for k, v in self._meter.kinds.items()
        }
        return {
            "budgets": [dict(b.targets) for b in self.budgets],
            "full cost": {m: v for m, v in self._full.items() if m != "latency"},  # which is measured anew
            "allowed": {d.name: (d.lowest, d.multiple) for d in self.layout.dimensions},
            "settings": {
                "warmup": self.warmup, "decay": self.decay, "momentum": self.momentum, "train_weights": self.train_weights,
                "seed": self.seed, **kinds, **self.method.settings(),
            },
        }  # fmt: skip

    def _check_terms(self, theirs: Mapping[str, Any]) -> None:
        own, problems = self._terms(), []
        if theirs["budgets"] != own["budgets"]:
            problems.append(
                f"is of a search for {theirs['budgets']}, this one is for {own['budgets']}: give the same budget"
            )
        elif theirs["full cost"] != own["full cost"]:
            problems.append(
                f"is of a model that costs {theirs['full cost']}, this one costs {own['full cost']}: trace with the same "
                "example inputs"
            )
        bounds = [n for n, bound in own["allowed"].items() if tuple(theirs["allowed"][n]) != bound]
        if bounds:
            (least, step), (lowest, multiple) = theirs["allowed"][bounds[0]], own["allowed"][bounds[0]]
            problems.append(
                f"keeps {least} or more by {step} of {bounds[0]!r}, this one {lowest} or more by {multiple}"
                f"{f', and {len(bounds) - 1} further dimensions differ' if bounds[1:] else ''}: trace with the same minimum "
                "and multiple"
            )
        before, now = theirs["settings"], own["settings"]
        other = [k for k in before.keys() | now.keys() if before.get(k) != now.get(k)]
        if other:
            was, has = (", ".join(f"{k}={of.get(k)!r}" for k in sorted(other)) for of in (before, now))
            problems.append(f"is of a search with {was}, this one has {has}: give the same arguments")
        if problems:
            raise CheckpointError(f"the state {'; it '.join(problems)}. Else begin anew, with another file.")

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
            CheckpointError: the file is missing, damaged, or of another model, optimizer, budget or other settings; nothing
                has been changed.
            SearchError: it is of another search space or length; nothing has been changed.
        """
        return checkpoint.load(self, path, optimizer)

    def _restored(self, budget: _budgets.Budget, text: str, weights: Mapping[str, Tensor]) -> Member:
        structure = Structure.from_json(text)
        model = self.space.export(structure, verify=False)  # it was verified, with the weights that it gets now
        model.load_state_dict(weights)
        return Member(budget, structure, model)
