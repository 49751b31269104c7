"""Loss and accuracy of any classifier, whatever form its inputs and outputs have."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import DmscaleError
from .running import arguments, evaluating


def classification_loss(output: Any, target: Tensor) -> Tensor:
    """Cross-entropy of class scores in a model's output, as `class_scores` reads it.

    `target` holds class numbers: (B,), one for each token (B, T), or one for each pixel
    (B, H, W); -100 is ignored.

    Raises:
        DmscaleError: on a CPU, a target is no class of the model's.
    """
    scores = class_scores(output)
    try:
        return F.cross_entropy(scores.flatten(0, -2), target.flatten())
    except IndexError as error:  # asked beforehand it would make a GPU wait at every step
        raise DmscaleError(f"the model has {scores.shape[-1]} outputs: {error} --classes sizes it") from error


def class_scores(output: Any) -> Tensor:
    """Class scores with the classes last: (B, K), (B, T, K) or, from (B, K, H, W), (B, H, W, K).

    Reads a tensor, an object or dict with `logits` (transformers) or `out` (torchvision's segmentation),
    and the first entry of anything else.
    """
    if isinstance(output, dict):
        key = next((key for key in ("logits", "out") if key in output), next(iter(output)))
        output = output[key]
    output = getattr(output, "logits", output)
    scores = output[0] if isinstance(output, (tuple, list)) else output
    return scores.movedim(1, -1) if scores.dim() == 4 else scores


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable) -> float:
    """Share of right labels, in [0, 1], over `(inputs, targets)` batches."""
    right = count = 0
    with evaluating(model):
        for x, target in batches:
            guess = class_scores(call(model, x)).argmax(-1)
            right += int((guess == target).sum())
            count += int((target != -100).sum())
    return right / max(count, 1)


@torch.no_grad()
def check_fit(model: nn.Module, batches: Iterable, num_classes: int | None) -> None:
    """One batch through model and loss, before hours of search.

    Raises:
        DmscaleError: there is no batch, it does not fit the model, or its targets are no classes of the model's.
    """
    batch = next(iter(batches), _NOTHING)
    if batch is _NOTHING:
        raise DmscaleError("there is no batch in it; expected batches (inputs, targets)")
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise DmscaleError(f"expected batches (inputs, targets), got {type(batch).__name__}")
    inputs, targets = batch
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise DmscaleError(
            f"targets are {kind}, not class numbers (int64); for another task call dmscale.scale with a criterion of your own"
        )
    with evaluating(model):
        try:
            scores = class_scores(call(model, inputs))
        except DmscaleError:
            raise
        except Exception as error:  # whatever other people's code raises
            raise DmscaleError(f"the model cannot be called on a batch: {error}") from error
    lowest = int(targets[targets != -100].min()) if (targets != -100).any() else 0
    if lowest < 0:
        raise DmscaleError(f"there is a target {lowest}; classes count from 0, and -100 is what the loss ignores")
    needed = max(num_classes or 0, int(targets.max()) + 1)
    if scores.shape[-1] < needed:
        raise DmscaleError(f"the model has {scores.shape[-1]} outputs for {needed} classes; --classes sizes it")
    if scores.shape[:-1] != targets.shape:
        raise DmscaleError(f"scores {tuple(scores.shape)} do not fit targets {tuple(targets.shape)}")


_NOTHING = object()


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)
