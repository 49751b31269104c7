"""After the cut: the smaller network is fine-tuned, taught by the dense one, and its BatchNorm statistics measured anew.

small = recover(search.export(), loader, criterion, steps=2000, teacher=dense, distill="logits, features",
                space=space, structure=search.structure, ema=0.999)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import running
from .batches import Batches
from .distill import Distill, Distiller
from .errors import DmscaleError
from .space import SearchSpace
from .structure import Structure


def recover(
    model: nn.Module,
    batches: Iterable[Any],
    criterion: Callable[[Any, Any], Tensor],
    steps: int,
    lr: float = 1e-3,
    *,
    weight_decay: float = 0.01,
    optimizer: torch.optim.Optimizer | None = None,
    teacher: nn.Module | None = None,
    distill: Any = None,
    space: SearchSpace | None = None,
    structure: Structure | None = None,
    ema: float | None = None,
) -> nn.Module:
    """Fine-tune an exported model in place, with a cosine schedule; by default with AdamW.

    Args:
        model: the smaller network, on the device where it shall train.
        batches: a loader of (inputs, targets), run through as often as needed.
        criterion: criterion(output, targets) -> scalar loss.
        steps: optimizer steps; without any only the BatchNorm statistics are measured anew.
        lr, weight_decay: of AdamW, where no `optimizer` is given.
        optimizer: one of the model's parameters to use instead.
        teacher: the dense network from before the search (`distill.frozen_copy` makes one), run in evaluation mode.
        distill: what to learn from it: "logits", "relations", "features", several separated by commas, a dict with
            weights, a `Distill`, or a function of both outputs; see `dmscale.distill`.  "logits" where there is a teacher.
        space, structure: of the teacher and the model, needed for "features".
        ema: decay of an average of the weights (0.999 say), which the model holds at the end; none by default.
    Returns:
        the model.
    Raises:
        DmscaleError: distillation without a teacher, features without space and structure, an empty loader.
    """
    recovery = Recovery(
        model, criterion, steps, lr, weight_decay=weight_decay, optimizer=optimizer, teacher=teacher, distill=distill,
        space=space, structure=structure, ema=ema,
    )  # fmt: skip
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    stream = batches if isinstance(batches, Batches) else Batches(batches, device)
    with recovery:
        if steps == 0:
            recalibrate(model, (next(stream) for _ in range(20)))
        while not recovery.done:
            recovery.step(next(stream))
    return recovery.finish()


class Recovery:
    """`recover` one step at a time, so that it can be watched, stopped and resumed; the arguments are the same.

    Use as a context manager: distilling features hooks both models while it is open.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        steps: int,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.01,
        optimizer: torch.optim.Optimizer | None = None,
        teacher: nn.Module | None = None,
        distill: Any = None,
        space: SearchSpace | None = None,
        structure: Structure | None = None,
        ema: float | None = None,
    ):
        how = Distill.parse(True if distill is None and teacher is not None else distill)
        if how is not None and teacher is None:
            raise DmscaleError(
                "distilling needs teacher=, the dense network: distill.frozen_copy(model) before the search"
            )
        if ema is not None and not 0 < ema < 1:
            raise DmscaleError(f"ema={ema} is not between 0 and 1; it is the decay of the average, 0.999 say")
        self.model, self.criterion, self.steps = model, criterion, steps
        self.steps_done = 0
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(steps, 1))
        self.average = Average(model, ema) if ema is not None else None
        self.distiller: Distiller | None = None
        if how is not None and teacher is not None:
            self.distiller = Distiller(how, teacher, model, space, structure)

    def __enter__(self) -> Recovery:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.distiller is not None:
            self.distiller.close()

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.steps_done >= self.steps

    def step(self, batch: tuple[Any, Any]) -> Tensor:
        """One optimizer step on (inputs, targets), in training mode; the loss."""
        self.model.train()
        loss = loss_of(self.model, batch, self.criterion, self.distiller)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.steps_done += 1
        if self.average is not None:
            self.average.update()
        return loss.detach()

    def finish(self) -> nn.Module:
        """The model, with averaged weights if there are any."""
        if self.average is not None:
            self.average.apply()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything, the weights included."""
        return {
            "step": self.steps_done,
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a recovery with the same arguments.

        Raises:
            DmscaleError: it had another number of steps, or only one of the two averages weights.
        """
        if state["steps"] != self.steps or (state["average"] is None) != (self.average is None):
            raise DmscaleError(
                f"the state is of a recovery of {state['steps']} steps {'with' if state['average'] else 'without'} ema; "
                f"this one has {self.steps} steps"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.steps_done = state["step"]


def loss_of(
    model: nn.Module,
    batch: tuple[Any, Any],
    criterion: Callable[[Any, Any], Tensor],
    distiller: Distiller | None = None,
) -> Tensor:
    """The loss of one batch: the criterion's, plus what the teacher says."""
    inputs, targets = batch
    args, kwargs = running.arguments(inputs)
    out = model(*args, **kwargs)
    loss = criterion(out, targets)
    return loss if distiller is None else loss + distiller(inputs, out)


class Average:
    """Exponential moving average of the weights and the floating-point buffers of a model.

    s <- d s + (1 - d) w after each step, with d = min(decay, (1 + n) / (10 + n)) at step n, so that short runs are not
    dominated by their first weights (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        everything = dict(model.named_parameters()) | dict(model.named_buffers())
        self._live = {n: t for n, t in everything.items() if t.is_floating_point()}
        self._shadow = {n: t.detach().clone() for n, t in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights of now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, t in self._live.items():
            self._shadow[name].lerp_(t.detach(), 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the model."""
        for name, t in self._live.items():
            t.copy_(self._shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """The average and how many steps it has seen."""
        return {"updates": self.updates, "shadow": dict(self._shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.updates = state["updates"]
        for name, t in self._shadow.items():
            t.copy_(state["shadow"][name])


def recalibrate(model: nn.Module, batches: Iterable[Any], limit: int = 100) -> nn.Module:
    """Measure the running statistics of every BatchNorm on `batches`, in place, as plain averages.

    Args:
        model: a module; its mode and everything but BatchNorm statistics stay as they are.
        batches: tensors, dicts of keyword arguments, or (inputs, targets) pairs as a loader gives them.
        limit: number of batches to use at most.
    Returns:
        the model.
    Raises:
        DmscaleError: there is no batch to measure on; the statistics are as they were, as after any exception.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    used = itertools.islice(batches, limit)
    first = next(used, None)
    if first is None:
        raise DmscaleError(
            "there is no batch to measure BatchNorm on; a generator can be run through only once, give a list or DataLoader"
        )
    momenta = {m: m.momentum for m in norms}
    before = [(b, b.clone()) for m in norms for b in m.buffers(recurse=False)]
    try:
        with torch.no_grad(), running.evaluating(model):
            for m in norms:
                m.reset_running_stats()
                m.momentum = None  # cumulative average
                m.train()
            for batch in itertools.chain([first], used):
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                args, kwargs = running.arguments(inputs)
                model(*args, **kwargs)
    except BaseException:
        for buffer, value in before:
            buffer.copy_(value)
        raise
    finally:
        for m, momentum in momenta.items():
            m.momentum = momentum
    return model
