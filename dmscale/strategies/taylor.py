"""Rankings by what an element does to the loss, estimated from gradients on calibration batches (training data)."""

from __future__ import annotations

from torch import Tensor

from .base import Found, Task, strategy
from .ranking import by_share, by_threshold, values_of
from .scores import mask_gradients, mean_of, parts

BATCHES = 10
"""Calibration batches; the ranking hardly changes with more."""

_EXAMPLES = 8  # of one gradient of the Fisher estimate: the fewer, the closer to the per-example square


def taylor_scores(task: Task) -> dict[str, Tensor]:
    """Mean over batches of |sum of w dL/dw| (Molchanov et al., 2019; abs of the sum, as in knapsack pruning, 2020)."""
    return mean_of(mask_gradients(task.space, task.calibration(BATCHES), task.criterion), Tensor.abs)


def fisher_scores(task: Task) -> dict[str, Tensor]:
    """Mean of (dL/dm)^2: the Hessian-free second order, E[(dL/dm)^2] standing for the curvature, by parts of few examples."""
    batches = parts(task.calibration(BATCHES), _EXAMPLES)
    return mean_of(mask_gradients(task.space, batches, task.criterion), Tensor.square)


@strategy("taylor", "global ranking by |sum w dL/dw| (Molchanov et al., 2019), widths and heads", needs_data=True)
def taylor(task: Task) -> Found:
    scores = taylor_scores(task)
    return Found(by_threshold(task, scores, values_of(task.space, scores)))


@strategy("taylor-depth", "the same with blocks ranked among the elements", needs_data=True)
def taylor_depth(task: Task) -> Found:
    scores = taylor_scores(task)
    return Found(by_threshold(task, scores, values_of(task.space, scores), depth=True))


@strategy("taylor-local", "the same share everywhere, highest |sum w dL/dw| stay", needs_data=True)
def taylor_local(task: Task) -> Found:
    return Found(by_share(task, taylor_scores(task)))


@strategy("fisher", "global ranking by the Fisher information of masks (Theis et al., 2018)", needs_data=True)
def fisher(task: Task) -> Found:
    scores = fisher_scores(task)
    return Found(by_threshold(task, scores, values_of(task.space, scores)))
