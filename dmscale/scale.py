"""Everything in one call: trace, search, export, fine-tune.

The pipelines of the paper (DMS, section 3.4) and what each is here:

    pretrained      scale(model, ...)                       search and fine-tuning go on from trained weights (DMS_p)
    from scratch    scale(model, ..., inherit=False)        the search's weights are thrown away; what is trained starts from
                                                            the weights before it, cut to the structure (DMS_np)
    structure only  scale(model, ..., train_weights=False)  a few hundred steps that move no weight, no fine-tuning (DMS_p-)
    from larger     scale(model, ..., expand={"width": 2})  from a wider or deeper network with the same outputs
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import budget as budgets
from . import checkpoint as checkpoints
from . import recovery
from .batches import Batches
from .callbacks import Callback
from .cost import Cost
from .distill import Distill, Distiller, frozen_copy
from .errors import CheckpointError, DmscaleError
from .expand import expand as expanded
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
    inherit: bool = True,
    expand: Mapping[str, Any] | None = None,
    distill: Any = None,
    ema: float | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    **options: Any,
) -> Scaled:
    """Search `model` down to `budget` while it trains, export it, fine-tune the result.

    AdamW with a constant rate in the search and a cosine in the fine-tuning; for any other recipe write the five lines of
    `Search` into a loop of your own.  The weights of `model` are trained by the search; its structure stays.

    Args:
        model: the network, trained or not, on the device where it shall train.  With `expand` it is left as it is.
        example_inputs: what one forward takes, on that device; costs are those of this forward.
        loader: batches of (inputs, targets); inputs are a tensor, a tuple or a dict.  It is run through as often as needed.
        criterion: criterion(output, targets) -> scalar loss.
        budget: "50% macs", dict(macs=0.5, params=6e6), or a `Budget`.
        steps: optimizer steps of the search; two passes over the loader by default, at least 200.
        finetune_steps: optimizer steps of the fine-tuning; by default twice `steps`, and none with train_weights=False, after
            which BatchNorm statistics alone are measured anew.
        lr: learning rate of the weights, in both phases.
        seed: of PyTorch's generators while this runs, which are restored, and of the noise that some methods draw.
        progress: whether to show a bar, if the output is a terminal.
        freeze, only, minimum, multiple: as in `trace`.
        inherit: whether the fine-tuning starts from the weights that the search has trained.  If not, it starts from those
            before the search, cut to the structure: from scratch where these are random.
        expand: arguments of `dmscale.expand`, as dict(width=1.5, depth=2): search a larger version of `model`.  Shares in
            `budget` are of `model` as it is given, "100% macs" its own cost.
        distill: what to learn from a frozen copy of `model` as it is now, in the search and after it: True or "logits",
            "relations", "features", several separated by commas, a dict with weights, a `distill.Distill`, or a function of
            the outputs of student and teacher.  It is added to the criterion.  Features are compared after the cut only,
            through the kept channels.  Use it with a trained `model`.
        ema: decay of an average of the weights in the fine-tuning (0.999 say), which the result holds; none by default.
        callbacks: what watches the search, see `dmscale.callbacks`.
        checkpoint: a folder.  Where it holds checkpoints of the same call the run goes on from there, bit for bit on a CPU;
            it is written to as this runs.  A checkpoint that cannot be written (a full disk) is a warning, not the end.
        checkpoint_every: optimizer steps between two checkpoints; by default a twentieth of the steps, in the search and in
            the fine-tuning each.  The last step of each is always kept.
        options: further arguments of `Search`.  With train_weights=False the search finds a structure and moves no weight.
    Raises:
        TraceError, BudgetError: before any training.
        SearchError: the loss became NaN or infinite.
        CheckpointError: a checkpoint in the folder is damaged, or of another budget, network or length.
        DmscaleError: the loader is empty, `distill` names no known term, or nothing can be expanded.
    """
    if expand is not None:
        budget = budgets.parse(budget, trace(model, example_inputs))
        model = expanded(model, example_inputs, **expand)
    space = trace(model, example_inputs, freeze=freeze, only=only, minimum=minimum, multiple=multiple)
    moves = options.get("train_weights", True)
    if not moves and not inherit:
        raise DmscaleError(
            "inherit=False: with train_weights=False the search trains no weights that could be inherited"
        )
    if steps is None:
        steps = max(200, 2 * _length(loader))
    finetune_steps = (2 * steps if moves else 0) if finetune_steps is None else finetune_steps
    how = Distill.parse(distill)
    search = Search(space, budget, steps, seed=seed, callbacks=callbacks, **options)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    with checkpoints.preserving_random_state(), contextlib.ExitStack() as stack:
        torch.manual_seed(seed)
        store = _Store(checkpoint, checkpoint_every, Batches(loader, device))
        before = store.before(model) if how is not None or not inherit or not moves else None
        teacher = before if how is not None else None
        bar = stack.enter_context(progress_bar(progress))
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
        search.attach(optimizer)
        shown = bar.add_task("search", total=steps)
        store.resume_search(search, optimizer)
        try:
            model.train()
            search.model.train()
            with _without_features(how, teacher, search.model) as distiller:
                while not search.done:
                    bar.update(shown, completed=search.step)
                    loss = recovery.loss_of(search.model, next(store.batches), criterion, distiller)
                    loss.backward()
                    search.note(loss=loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    store.save_search(search, optimizer)
        finally:
            model.train(training)
            if not moves and before is not None:  # the statistics of BatchNorm move without a gradient
                model.load_state_dict(before.state_dict())
        bar.update(shown, completed=steps)
        structure = search.structure
        shown = bar.add_task("fine-tune", total=finetune_steps)
        small = search.export() if inherit or before is None else _cut(space, structure, before)
        small.train()
        if finetune_steps == 0:
            recovery.recalibrate(small, (next(store.batches) for _ in range(20)))
        else:
            tuned = recovery.Recovery(
                small, criterion, finetune_steps, lr, weight_decay=weight_decay, teacher=teacher, distill=how, space=space,
                structure=structure, ema=ema,
            )  # fmt: skip
            store.resume_recovery(tuned)
            with tuned:
                while not tuned.done:
                    bar.update(shown, completed=tuned.steps_done)
                    tuned.step(next(store.batches))
                    store.save_recovery(tuned)
            tuned.finish()
    small.train(training)
    return Scaled(small, structure, space.cost(structure), space, search)


def _cut(space: SearchSpace, structure: Structure, weights: nn.Module) -> nn.Module:
    """The exported network with the weights that `weights`, a copy of the space's model, holds."""
    trained = {name: t.clone() for name, t in space.model.state_dict().items()}
    try:
        space.model.load_state_dict(weights.state_dict())
        return space.export(structure)
    finally:
        space.model.load_state_dict(trained)


@contextlib.contextmanager
def _without_features(how: Distill | None, teacher: nn.Module | None, student: nn.Module) -> Iterator[Distiller | None]:
    """The distiller of the search: what is masked in a full-size network has activations that mean nothing."""
    if how is None or teacher is None:
        yield None
        return
    with Distiller(dataclasses.replace(how, features=0.0), teacher, student) as distiller:
        yield distiller


class _Store:
    """The checkpoints of one call of `scale`: `dense.ckpt`, `search.ckpt` and `recovery.ckpt` in a folder, or none.

    Args:
        folder: where they are; None keeps none.
        every: steps between two; a twentieth of each phase by default.
        batches: the stream that both phases read, whose place is kept with them.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, every: int | None, batches: Batches):
        self.folder = Path(folder) if folder is not None else None
        self.every, self.batches = every, batches

    def _found(self, name: str) -> Path | None:
        path = self.folder / name if self.folder is not None else None
        return path if path is not None and path.exists() else None

    def before(self, model: nn.Module) -> nn.Module:
        """A frozen copy of the model before the search, which a resumed process may no longer have."""
        copied = frozen_copy(model)
        if path := self._found("dense.ckpt"):
            weights = checkpoints.read(path)
            checkpoints.check_weights(copied, weights, path)
            copied.load_state_dict(weights)
        elif self.folder is not None:
            self._write(lambda path: checkpoints.write(path, copied.state_dict()), "dense.ckpt")
        return copied

    def resume_search(self, search: Search, optimizer: torch.optim.Optimizer) -> None:
        """Go on from `search.ckpt`, if it is there."""
        if path := self._found("search.ckpt"):
            extra = search.load(path, optimizer)
            state = checkpoints.random_state()
            self.batches.load_state_dict(extra["batches"])  # moves the generators
            checkpoints.set_random_state(state)

    def save_search(self, search: Search, optimizer: torch.optim.Optimizer) -> None:
        """Write `search.ckpt` if it is due."""
        if self._due(search.step, search.steps):
            extra = {"batches": self.batches.state_dict()}
            self._write(lambda path: search.save(path, optimizer, extra=extra), "search.ckpt")

    def resume_recovery(self, tuned: recovery.Recovery) -> None:
        """Go on from `recovery.ckpt`, if it is there."""
        if path := self._found("recovery.ckpt"):
            content = checkpoints.read(path)
            checkpoints.check_weights(tuned.model, content["recovery"]["model"], path)
            tuned.load_state_dict(content["recovery"])
            self.batches.load_state_dict(content["batches"])
            checkpoints.set_random_state(content["random"])

    def save_recovery(self, tuned: recovery.Recovery) -> None:
        """Write `recovery.ckpt` if it is due."""
        if self._due(tuned.steps_done, tuned.steps):
            content = {
                "recovery": tuned.state_dict(),
                "batches": self.batches.state_dict(),
                "random": checkpoints.random_state(),
            }
            self._write(lambda path: checkpoints.write(path, content), "recovery.ckpt")

    def _due(self, step: int, steps: int) -> bool:
        return self.folder is not None and (step % (self.every or max(1, steps // 20)) == 0 or step >= steps)

    def _write(self, write: Callable[[Path], None], name: str) -> None:
        assert self.folder is not None
        try:
            write(self.folder / name)
        except CheckpointError as error:  # the run itself is sound: go on, and try again when the next is due
            warnings.warn(str(error), RuntimeWarning, stacklevel=4)


def _length(loader: Iterable[Any]) -> int:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader of a stream has the method, and no length
        return 0
