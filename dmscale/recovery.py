"""After the cut: BatchNorm statistics measured anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from . import running


def recalibrate(model: nn.Module, batches: Iterable[Any], limit: int = 100) -> nn.Module:
    """Measure the running statistics of every BatchNorm on `batches`, in place, as plain averages.

    Args:
        model: a module; its mode and everything but BatchNorm statistics stay as they are.
        batches: tensors, dicts of keyword arguments, or (inputs, targets) pairs as a loader gives them.
        limit: number of batches to use at most.
    Returns:
        the model.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    momenta = {m: m.momentum for m in norms}
    try:
        with torch.no_grad(), running.evaluating(model):
            for m in norms:
                m.reset_running_stats()
                m.momentum = None  # cumulative average
                m.train()
            for i, batch in enumerate(batches):
                if i == limit:
                    break
                inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
                args, kwargs = running.arguments(inputs)
                model(*args, **kwargs)
    finally:
        for m, momentum in momenta.items():
            m.momentum = momentum
    return model
