"""torch-pruning (DepGraph, Fang et al., CVPR 2023) as strategies: group Taylor and group norm, brought to the same budget.

Both rank globally, one shot; the ratio is found by bisection, so that the pruned network is as near below the budget as its
groups allow.  torch-pruning removes what our trace calls free: layers whose outputs the trace has frozen are ignored, for
it cannot know, for example, that a shortcut pads channels to a fixed number.  Depth it cannot remove.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

import dmscale
from benchmarks.limits import within
from dmscale import axes, budget, running
from dmscale.evaluate import call
from dmscale.strategies.base import Found, Strategy, Task
from dmscale.strategies.taylor import BATCHES

_HALVINGS = 14
_SECONDS = 300.0  # of the wall for one network: on a small Llama it has not ended in a quarter of an hour
_MOST = 0.95  # of a layer: asked for more, torch-pruning leaves the whole layer as it is


def group_taylor(task: Task) -> Found:
    """`MetaPruner` by `GroupTaylorImportance`, gradients summed over the calibration batches."""
    model = copy.deepcopy(task.space.model)
    model.zero_grad()
    with running.evaluating(model):
        for inputs, targets in task.calibration(BATCHES):
            task.criterion(call(model, inputs), targets).backward()
    return Found(model=_bisected(task, model, tp.pruner.MetaPruner, tp.importance.GroupTaylorImportance()))


def group_norm(task: Task) -> Found:
    """`GroupNormPruner` by `GroupMagnitudeImportance`, without its sparse training: one shot as the others."""
    model = copy.deepcopy(task.space.model)
    return Found(model=_bisected(task, model, tp.pruner.GroupNormPruner, tp.importance.GroupMagnitudeImportance(p=2)))


def _bisected(task: Task, model: nn.Module, pruner: Any, importance: Any) -> nn.Module:
    """The least pruned network within the budget.

    Raises:
        DmscaleError: even at the highest ratio the network is over the budget, what is pruned does not run, or it takes
            longer than `_SECONDS`.
    """
    try:
        with within(_SECONDS):
            return _searched(task, model, pruner, importance)
    except TimeoutError as error:
        raise dmscale.DmscaleError(f"torch-pruning {error}") from error


def _searched(task: Task, model: nn.Module, pruner: Any, importance: Any) -> nn.Module:
    """The same without an end."""
    ignored = _workable(task, model, pruner, importance)
    kept, low, high, problem = None, 0.0, 0.99, ""
    for _ in range(_HALVINGS):
        ratio = (low + high) / 2
        small = _pruned(task, model, pruner, importance, ratio, ignored)
        cost = dmscale.trace(small, task.space.example_inputs, verify=False).cost()
        if budget.satisfied(cost, task.budget):
            kept, high = small, ratio
        else:
            low, problem = ratio, f"{cost.macs} MACs and {cost.params} parameters at a ratio of {ratio:.3f}"
    if kept is None:
        raise dmscale.DmscaleError(f"torch-pruning does not reach {task.budget}: {problem}")
    kept.zero_grad()
    return kept


def _workable(task: Task, model: nn.Module, pruner: Any, importance: Any) -> set[str]:
    """The shortest list of layers to ignore with which a pruned network runs: the frozen ones, then all that is composed.

    Raises:
        DmscaleError: there is none.
    """
    problem: Exception | None = None
    for composed in (False, True):
        ignored = set(_ignored(task, composed))
        try:
            _pruned(task, model, pruner, importance, 0.5, ignored)
        except TimeoutError:
            raise
        except Exception as error:  # whatever another library raises on a network that it cannot handle
            problem = error
        else:
            return ignored
    assert problem is not None
    raise dmscale.DmscaleError(
        f"torch-pruning cannot prune this network: {type(problem).__name__}: {problem}"
    ) from problem


def _pruned(task: Task, model: nn.Module, pruner: Any, importance: Any, ratio: float, ignored: set[str]) -> nn.Module:
    small = copy.deepcopy(model).eval()
    for ours, theirs in zip(
        model.parameters(), small.parameters()
    ):  # a copy has no gradients, and Taylor ranks by them
        theirs.grad = None if ours.grad is None else ours.grad.clone()
    args, kwargs = running.arguments(task.space.example_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every parameter that it prunes by a default
        pruner(
            small, kwargs or args, importance=importance, global_pruning=True, pruning_ratio=ratio,
            max_pruning_ratio=_MOST, ignored_layers=[small.get_submodule(p) for p in ignored],
        ).step()  # fmt: skip
    with torch.no_grad():
        call(small, task.space.example_inputs)
    return small


def _ignored(task: Task, composed: bool) -> Iterator[str]:
    """Layers whose outputs are frozen; with `composed` also those whose outputs are anywhere a part of something.

    Heads times their size, or channels beside padded ones, are such parts: torch-pruning does not follow these through a
    reshape or a pad.
    """
    slots, model = task.space.trace.slots, task.space.model
    free = {a for d in task.space.dimensions.values() for a in d.axes}
    parts = {a for dims in slots.values() for d in dims for a in axes.atoms(d) if len(list(axes.atoms(d))) > 1}
    for name, dims in slots.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight" and isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            own = set(axes.atoms(dims[0]))
            if not own & free or not own <= free or (composed and own & parts):
                yield path


STRATEGIES = [
    Strategy(
        "torch-pruning-taylor", f"torch-pruning {tp.__version__}, group Taylor, global", group_taylor, False, True, True
    ),
    Strategy(
        "torch-pruning-norm", f"torch-pruning {tp.__version__}, group norm, global", group_norm, False, False, True
    ),
]
