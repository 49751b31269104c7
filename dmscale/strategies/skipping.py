"""Layer skipping: blocks go, by a rule, until one more would undercut the budget; widths give what is left to save.

Three rules say which blocks stay (reference 3.22): spread evenly (Unified Layer Skipping, 2024), those whose output is least
like their input (ShortGPT and others, 2024), those whose residual is largest beside what it is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import blocks, running
from ..errors import DmscaleError
from ..evaluate import call
from .base import Found, Task, strategy

_BATCHES = 4


@strategy("skip-uniform", "blocks spread evenly stay, first and last always (Unified Layer Skipping, 2024)")
def skip_uniform(task: Task) -> Found:
    return Found(_skipped(task, {n: _spread(len(s.paths)) for n, s in task.space.stacks.items()}))


@strategy("skip-similar", "blocks whose output is most like their input go (ShortGPT, 2024)", needs_data=True)
def skip_similar(task: Task) -> Found:
    return Found(_skipped(task, _measured(task, lambda x, y: 1 - nn.functional.cosine_similarity(x, y, -1).mean())))


@strategy("skip-contribution", "blocks whose residual is smallest beside their output go", needs_data=True)
def skip_contribution(task: Task) -> Found:
    return Found(
        _skipped(task, _measured(task, lambda x, y: ((y - x).norm(dim=-1) / y.norm(dim=-1).clamp(min=1e-12)).mean()))
    )


def _skipped(task: Task, worth: dict[str, Tensor]) -> Any:
    """Take out the blocks that are worth least, over all stacks, while the budget is not undercut; then fit exactly."""
    if not worth:
        raise DmscaleError("layer skipping needs removable residual blocks; this space has no depth dimension")
    space = task.space
    sizes: dict[str, float] = {n: space.dimensions[n].size for n in worth}
    order = sorted((float(v), n, i) for n, w in worth.items() for i, v in enumerate(w))
    for _, name, _ in order:
        fewer = sizes | {name: max(sizes[name] - 1, space.dimensions[name].lowest)}
        if task.fits(fewer):
            break
        sizes = fewer
    return task.fit(sizes, space.magnitudes() | worth)


def _spread(count: int) -> Tensor:
    """Scores by which the best k of `count` blocks lie evenly, for any k: first, last, then the middles of the widest gaps."""
    order = [0, count - 1][: min(count, 2)]
    while len(order) < count:
        placed = sorted(order)
        gap, left = max((b - a, -a) for a, b in zip(placed, placed[1:]))
        order.append(-left + gap // 2)
    scores = torch.zeros(count)
    scores[torch.tensor(order)] = torch.linspace(1, 0, count)
    return scores


def _measured(task: Task, measure: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Stack -> mean of `measure` of each block's input and output, channels last, (blocks,)."""
    totals = {n: torch.zeros(len(s.paths)) for n, s in task.space.stacks.items()}

    def note(stack: str, i: int, x: Tensor, y: Tensor) -> None:
        channels_first = y.dim() in (3, 4, 5) and not _channels_last(
            task.space.model, task.space.stacks[stack].paths[i]
        )
        x, y = (t.movedim(1, -1) if channels_first else t for t in (x.float(), y.float()))
        totals[stack][i] += float(measure(x, y)) / _BATCHES

    with _watched(task, note), running.evaluating(task.space.model), torch.no_grad():
        for inputs, _ in task.calibration(_BATCHES):
            call(task.space.model, inputs)
    return totals


def _channels_last(model: nn.Module, path: str) -> bool:
    """Whether a block's channels are last: it holds no convolution or BatchNorm."""
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    return not any(isinstance(m, kinds) for m in model.get_submodule(path).modules())


@contextmanager
def _watched(task: Task, note: Callable[[str, int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `note` with every block's input and output while this lasts; no hook stays behind."""
    handles = []
    for name, stack in task.space.stacks.items():
        for i, path in enumerate(stack.paths):

            def hook(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name, i: int = i) -> None:
                note(name, i, *blocks.ends(task.space.stacks[name], i, args, kwargs, out))

            handles.append(task.space.model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for h in handles:
            h.remove()
