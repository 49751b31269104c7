"""How a search rides on an optimizer, whatever surrounds it: closures, loss scales, sharded weights.

`Search` reads the gradients of its masks in a hook before the optimizer's step.  Four things may have happened to them, or
not yet:

closure   `optimizer.step(closure)` computes the gradients inside of the step: the reading moves to the end of the closure.
scale     a `GradScaler` unscales the gradients before the step and leaves a step out if one is not finite; for a fused
          optimizer it does neither, and hands the scale and what it found to the optimizer instead.
skipping  a step that is left out has no hook, and `model.zero_grad()` does not reach the masks: what they hold of such a
          step goes before the next forward, where the weights hold nothing any more.
sharding  DDP averages the gradients of the masks like those of any parameter.  FSDP2 averages those of the weights that it
          shards; masks stay whole on every rank, and are averaged here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DmscaleError, SearchError
from .tree import walk

Optimizer = torch.optim.Optimizer


def check(optimizer: Optimizer) -> None:
    """Refuse the optimizers that cannot hold the structure's parameters.

    Raises:
        SearchError: with the remedy.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise SearchError(
            "LBFGS evaluates the loss several times in one step and has a single parameter group: it cannot carry the "
            "structure. Search with SGD or Adam, and use LBFGS on the exported model."
        )
    if name == "Muon":
        raise SearchError(
            "Muon orthogonalises matrices, and the structure's parameters are vectors: attach the search to the optimizer "
            "of the remaining parameters (AdamW beside Muon), and step both."
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise SearchError(
            f"{name} runs no hooks around its steps, so that a search would wait for ever: it wraps an optimizer, and was not "
            "initialised as one. Attach to the optimizer inside, before it is wrapped."
        )
    if not getattr(type(optimizer).step, "hooked", False):  # a wrapper whose first step would go unnoticed
        optimizer._patch_step_function()  # as its zero_grad does


def without(optimizer: Optimizer, gone: Iterable[Tensor]) -> None:
    """Take parameters out of the groups of `optimizer`, in place, where it was built from `search.model.parameters()`."""
    ids = {id(p) for p in gone}
    for group in optimizer.param_groups:
        stays = [i for i, p in enumerate(group["params"]) if id(p) not in ids]
        if len(stays) < len(group["params"]):
            for key in ("params", "param_names"):
                if key in group:
                    group[key] = [group[key][i] for i in stays]


def around_closure(
    read: Callable[[], None], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Call `read` once the gradients are there: now, or at the end of the closure among the arguments of `step`.

    Args:
        read: what reads the gradients.
        args, kwargs: of the step as its pre-hook gets them, the optimizer first.
    Returns:
        the arguments to step with, or None where they stay.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        read()
        return None

    def then_read() -> Any:
        loss = closure()
        read()
        return loss

    return (args, kwargs | {"closure": then_read}) if "closure" in kwargs else ((args[0], then_read, *args[2:]), kwargs)


def leaves_out(optimizer: Optimizer) -> bool:
    """Whether this step of a fused optimizer will change nothing, because a scaled gradient is not finite."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def loss_scale(optimizer: Optimizer) -> Tensor | float:
    """What the gradients are still multiplied with: the scale that a fused optimizer will divide by, else 1."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale


class Following:
    """A hook before the forward of `search.model`: gradients of masks go when those of the weights have gone.

    The user accumulates and clears gradients of weights.  Where some hold one the step goes on; where none does, whatever
    masks still hold is of a step that was given up, infinite under a `GradScaler`, and would stay there for good.  Under a
    compiler the forward does not ask.  A copy of the model follows nothing.

    Args:
        masks, weights: of the gated model.
    """

    def __init__(self, masks: Iterable[nn.Parameter] = (), weights: Iterable[nn.Parameter] = ()):
        self.masks, self.weights = list(masks), list(weights)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or all(m.grad is None for m in self.masks):
            return
        trained = [w for w in self.weights if w.requires_grad]
        if trained and not any(w.grad is not None and bool(w.grad.any()) for w in trained):
            for m in self.masks:
                m.grad = None

    def __reduce__(self) -> Any:
        return Following, ()


# -- sharded weights (FSDP2) -------------------------------------------------------------------------------------------


def _is_sharded(t: Tensor) -> bool:
    if type(t) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and only where it may be one

    return isinstance(t, DTensor)


def several_processes() -> bool:
    """Whether this is one process of several that train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def shards(model: nn.Module) -> list[Any]:
    """The process groups over which FSDP2 has sharded `model`, one for each dimension of its mesh; none if it has not."""
    found = next((p for p in model.parameters() if _is_sharded(p)), None)
    return [] if found is None else list(found.device_mesh.get_all_groups())  # type: ignore[attr-defined]


def average(t: Tensor, groups: Iterable[Any]) -> Tensor:
    """The mean of `t` over all ranks of `groups`: the same, to the bit, on each."""
    for group in groups:
        torch.distributed.all_reduce(t, group=group)
        t = t / torch.distributed.get_world_size(group)
    return t


def average_over_all(t: Tensor) -> Tensor:
    """The mean of `t` over all processes that train together; `t` where there is one."""
    return average(t, [torch.distributed.group.WORLD]) if several_processes() else t


def gather(gated: nn.Module, model: nn.Module) -> None:
    """Copy the sharded weights of the gated model into the user's, in place, on every rank; all ranks must call it.

    FSDP2 replaces the parameters of what it shards: from then on the gated model alone is trained.
    """
    if not shards(gated):
        return
    with torch.no_grad():
        for own, trained in _pairs(gated, model):
            if _is_sharded(trained):
                own.copy_(trained.full_tensor())  # type: ignore[attr-defined]


def _pairs(gated: nn.Module, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter of the user's model, the same of the gated one)."""
    for name, own in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = gated.get_submodule(path)
        parametrized = getattr(module, "parametrizations", {})
        yield own, parametrized[leaf].original if leaf in parametrized else module._parameters[leaf]  # type: ignore[misc]


def refuse_sharded(model: nn.Module, error: type[DmscaleError]) -> None:
    """Raise `error` if the user's model is sharded already: no full weight is there to trace, gate or slice."""
    if any([_is_sharded(p) for _, module in walk(model) for p in module._parameters.values() if p is not None]):
        raise error(
            f"the parameters of {type(model).__name__} are sharded already (DTensor). Trace and build the Search on the plain "
            "model, then fully_shard(search.model), and build the optimizer from search.model.parameters()."
        )
