"""How long a model takes, measured so that two models can be compared on a machine that does other work too.

Three things make wall-clock times of small networks lie, and each has its remedy here.  The first calls pay
for memory and kernels that later ones reuse: they are not counted.  Other processes slow some calls at
random: the median over many calls ignores them.  And the machine drifts (clock speed, temperature, a
neighbour's job), which would favour whichever model was measured at the better moment: models to be compared
take turns, call by call, in an order that rotates.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .errors import DmscaleError
from .running import arguments, evaluating, tensors_in


def measure_latency(model: nn.Module, example_inputs: Any, repeats: int = 50, warmup: int = 5) -> float:
    """The median time in ms of one forward pass of `model`, in evaluation mode and without gradients.

    `example_inputs` is a tensor, a tuple, or a dict of keyword arguments, on the model's device; its batch is
    the batch that is timed.  The model's own training mode is restored.

    Raises:
        DmscaleError: `repeats` is not positive, or `warmup` is negative.

    >>> measure_latency(nn.Linear(4, 4), torch.zeros(1, 4)) > 0
    True
    """
    return compare_latency([model], example_inputs, repeats, warmup)[0]


@torch.no_grad()
def compare_latency(
    models: Sequence[nn.Module], example_inputs: Any, repeats: int = 50, warmup: int = 5
) -> list[float]:
    """The median times in ms of several models on the same inputs, measured in turns.

    As `measure_latency`, which see; each of the `repeats` rounds calls every model once.
    """
    if repeats < 1 or warmup < 0:
        raise DmscaleError(f"repeats must be at least 1 and warmup 0 or more, got {repeats} and {warmup}")
    args, kwargs = arguments(example_inputs)
    wait = _finish_queued_work((args, kwargs))
    times: list[list[float]] = [[] for _ in models]
    with evaluating(*models):
        for turn in range(warmup + repeats):
            for i in range(len(models)):
                k = (i + turn) % len(models)  # nobody always runs after the same neighbour's cache
                wait()
                start = time.perf_counter()
                models[k](*args, **kwargs)
                wait()
                times[k].append(1000 * (time.perf_counter() - start))
    return [statistics.median(of_model[warmup:]) for of_model in times]


def _finish_queued_work(inputs: Any) -> Callable[[], None]:
    """What to call before reading the clock: on an accelerator a call returns before its work is done."""
    queued = {tensor.device for tensor in tensors_in(inputs) if tensor.device.type != "cpu"}

    def wait() -> None:
        for device in queued:
            torch.accelerator.synchronize(device)

    return wait
