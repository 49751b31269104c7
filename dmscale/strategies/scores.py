"""Scores of elements: by weights, and by the gradient of masks.  Member -> (elements,), higher is more important."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import gates, running
from ..axes import Axis
from ..errors import SearchError
from ..evaluate import call
from ..space import SearchSpace
from .base import Batch


def weight_norms(space: SearchSpace, power: int) -> dict[str, Tensor]:
    """The L1 (`power` 1) or L2 norm (2) of all weights at each element."""
    powers = {n: p.detach().float().abs().pow(power) for n, p in space.model.named_parameters()}
    return {m: s.pow(1 / power) for m, s in space.project(powers).items()}


def norm_scales(space: SearchSpace) -> dict[str, Tensor]:
    """Mean |gamma| of the normalisations over each element, only for members that are normalised (Network Slimming)."""
    scales = {}
    for path, module in space.model.named_modules():
        weight = getattr(module, "weight", None)
        # a normalisation is known by what it holds: a vector of weights, which no linear layer or convolution has
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and weight.numel() > 1:
            scales[f"{path}.weight" if path else "weight"] = weight.detach().float().abs()
    totals = space.project(scales)
    counts = space.project({n: torch.ones_like(t) for n, t in scales.items()})
    return {
        m: t / counts[m].clamp(min=1)
        for m, t in totals.items()
        if m not in space.stacks and bool((counts[m] > 0).all())
    }


def mask_gradients(
    space: SearchSpace, batches: Iterable[Batch], criterion: Callable[[Any, Any], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """dL/dm at masks of one, for each batch: the first-order change of the loss when an element goes.

    One backward gives it for all elements, heads and blocks at once: by the chain rule it is the sum of w dL/dw over the
    weights that take the element in.  The model is in evaluation mode; neither weights nor their `.grad` are touched.

    Raises:
        SearchError: the loss or a gradient is not finite, or no gradient reaches the masks.
    """
    device = next((p.device for p in space.model.parameters()), torch.device("cpu"))
    axes: list[Axis] = [a for d in space.dimensions.values() for a in d.axes]
    names = [m for d in space.dimensions.values() for m in d.members] + list(space.stacks)
    gated = gates.attach(
        space.model, space.sites, {a: torch.ones(a.size, device=device) for a in axes},
        {n: torch.ones(len(s.paths), device=device) for n, s in space.stacks.items()}, trainable=True,
    )  # fmt: skip
    masks = gates.masks_of(gated)
    parameters = [*(masks.widths[a] for a in axes), *(masks.depths[n] for n in space.stacks)]
    with running.evaluating(gated):
        for inputs, targets in batches:
            loss = criterion(call(gated, inputs), targets)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            if all(g is None for g in found):
                raise SearchError("no gradient reaches the masks: does the criterion use the model's output?")
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
            if not all(bool(torch.isfinite(g).all()) for g in grads):
                raise SearchError(
                    "a gradient of the calibration batches is not finite; check the data and the criterion"
                )
            yield {n: g.detach().cpu().double() for n, g in zip(names, grads)}


def mean_of(scores: Iterable[dict[str, Tensor]], function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Member -> mean over the dicts of `function` of its scores."""
    total: dict[str, Tensor] = {}
    count = 0
    for each in scores:
        count += 1
        for m, g in each.items():
            total[m] = total[m] + function(g) if m in total else function(g)
    return {m: t / count for m, t in total.items()}


def parts(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Batches cut along the first axis of every tensor into parts of at most `size` examples."""
    for batch in batches:
        tensors = running.tensors_in(batch)
        count = tensors[0].shape[0] if tensors[0].dim() else 1
        if any(not t.dim() or t.shape[0] != count for t in tensors):
            yield batch  # something in it has no batch axis
            continue
        for start in range(0, count, size):
            yield running.map_tensors(operator.itemgetter(slice(start, start + size)), batch)
