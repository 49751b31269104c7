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
    """
    scores = class_scores(output)
    return F.cross_entropy(scores.flatten(0, -2), target.flatten())


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
        DmscaleError: the batch does not fit the model, or has labels beyond its outputs.
    """
    batch = next(iter(batches), None)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise DmscaleError(f"expected batches (inputs, targets), got {type(batch).__name__}")
    with evaluating(model):
        try:
            scores = class_scores(call(model, batch[0]))
        except (RuntimeError, TypeError) as error:
            raise DmscaleError(f"the model cannot be called on a batch: {error}") from error
    needed = max(num_classes or 0, int(batch[1].max()) + 1)
    if scores.shape[-1] < needed:
        raise DmscaleError(f"the model has {scores.shape[-1]} outputs for {needed} classes; --classes sizes it")
    if scores.shape[:-1] != batch[1].shape:
        raise DmscaleError(f"scores {tuple(scores.shape)} do not fit targets {tuple(batch[1].shape)}")


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on a tensor, a tuple of positional arguments, or a dict of keyword arguments."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)
