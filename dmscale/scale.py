"""Everything in one call: trace, search, export, fine-tune."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import recovery, running
from .cost import Cost
from .errors import DmscaleError
from .progress import progress_bar
from .search import Search
from .space import SearchSpace, trace
from .structure import Structure


@dataclass(frozen=True)
class Scaled:
    """What `scale` returns: the smaller `model`, its `structure` and `cost`, and the `space` and `search` behind them."""

    model: nn.Module
    structure: Structure
    cost: Cost
    space: SearchSpace
    search: Search


def scale(
    model: nn.Module,
    example_inputs: Any,
    loader: Iterable[Any],
    criterion: Callable[[Any, Any], Tensor],
    *,
    budget: Any,
    steps: int | None = None,
    finetune_steps: int | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    progress: bool = True,
    freeze: str | Iterable[str] = (),
    only: str | Iterable[str] = (),
    minimum: int | Mapping[str, int] = 1,
    multiple: int | Mapping[str, int] = 1,
    **options: Any,
) -> Scaled:
    """Search `model` down to `budget` while it trains, export it, fine-tune the result.

    AdamW with a constant rate in the search and a cosine in the fine-tuning; for any other recipe write the five lines of
    `Search` into a loop of your own.  The weights of `model` are trained by the search; its structure stays.

    Args:
        model: the network, trained or not, on the device where it shall train.
        example_inputs: what one forward takes, on that device; costs are those of this forward.
        loader: batches of (inputs, targets); inputs are a tensor, a tuple or a dict.  It is run through as often as needed.
        criterion: criterion(output, targets) -> scalar loss.
        budget: "50% macs", dict(macs=0.5, params=6e6), or a `Budget`.
        steps: optimizer steps of the search; two passes over the loader by default, at least 200.
        finetune_steps: optimizer steps of the fine-tuning; twice `steps` by default.
        lr: learning rate of the weights, in both phases.
        seed: of PyTorch's generators while this runs; they are restored.
        progress: whether to show a bar, if the output is a terminal.
        freeze, only, minimum, multiple: as in `trace`.
        options: further arguments of `Search`.
    Raises:
        TraceError, BudgetError: before any training.
        SearchError: the loss became NaN or infinite.
        DmscaleError: the loader is empty.
    """
    space = trace(
        model, example_inputs, freeze=_strings(freeze), only=_strings(only), minimum=minimum, multiple=multiple
    )
    if steps is None:
        steps = max(200, 2 * _length(loader))
    finetune_steps = 2 * steps if finetune_steps is None else finetune_steps
    search = Search(space, budget, steps, **options)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), progress_bar(progress) as bar:
        torch.manual_seed(seed)
        batches = _endless(loader, device)
        model.train()
        search.model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
        search.attach(optimizer)
        shown = bar.add_task("search", total=steps)
        try:
            while not search.done:
                _step(search.model, next(batches), criterion, optimizer)
                bar.advance(shown)
        finally:
            model.train(training)
        small = search.export().train()
        structure = search.structure
        optimizer = torch.optim.AdamW(small.parameters(), lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(finetune_steps, 1))
        shown = bar.add_task("fine-tune", total=finetune_steps)
        for _ in range(finetune_steps):
            _step(small, next(batches), criterion, optimizer)
            schedule.step()
            bar.advance(shown)
        if finetune_steps == 0:
            recovery.recalibrate(small, itertools.islice(batches, 20))
    return Scaled(small.train(training), structure, space.cost(structure), space, search)


def _strings(globs: str | Iterable[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _length(loader: Iterable[Any]) -> int:
    return len(loader) if isinstance(loader, Sized) else 0


def _endless(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Any]]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise DmscaleError(f"the loader gave a {type(batch).__name__}; expected pairs (inputs, targets)")
            yield tuple(running.map_tensors(lambda t: t.to(device, non_blocking=True), tuple(batch)))  # type: ignore[misc]
        if empty:
            raise DmscaleError(
                "the loader gave no batch; a generator can be run through only once, give a list or DataLoader"
            )


def _step(model: nn.Module, batch: tuple[Any, Any], criterion: Any, optimizer: torch.optim.Optimizer) -> None:
    inputs, targets = batch
    out = (
        model(**inputs)
        if isinstance(inputs, Mapping)
        else model(*inputs)
        if isinstance(inputs, tuple)
        else model(inputs)
    )
    criterion(out, targets).backward()
    optimizer.step()
    optimizer.zero_grad()
