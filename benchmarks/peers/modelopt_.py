"""NVIDIA ModelOpt's FastNAS as a strategy, brought to the same budget of MACs.

FastNAS measures the loss of every layer at every width, the others full and BatchNorm recalibrated, and then bisects one
threshold on these losses for the whole network.  It prunes widths only.  With its default divisor of the channels, 32, a
thin network has next to nothing to prune: here a layer may have any number of tenths of its channels, rounded to one.

The `zoo` extra installs it.  Without touching an environment that has that extra's other packages:

    pip install --no-deps --target DIR nvidia-modelopt==0.47.0 torchprofile==0.0.4 pulp omegaconf
    PYTHONPATH=DIR:. python -m benchmarks.real --strategies modelopt-fastnas ...

ModelOpt 0.47 declares neither `requests` nor `torchprofile`, and cannot count MACs with torchprofile 0.1.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import itertools
import warnings
from collections.abc import Iterator

import torch
from torch import nn

import dmscale
from dmscale import budget, running
from dmscale.evaluate import call
from dmscale.strategies.base import Batch, Found, Strategy, Task
from dmscale.strategies.scores import parts

# An ImportError where it is not installed.  Importing ModelOpt itself takes seconds: where it is used.
_VERSION = importlib.metadata.version("nvidia-modelopt")

_BATCHES = 4  # a pass for every width of every layer: fewer than the other strategies measure on
_EXAMPLES, _QUEUE = 8, 50  # BatchNorm is recalibrated on as many batches; with fewer ModelOpt leaves it as it is
_SHARES = tuple(i / 10 for i in range(1, 11))  # of the channels of a layer; theirs are twentieths, twice the passes


def fastnas(task: Task) -> Found:
    """FastNAS with minus the loss on calibration batches as its score.

    Raises:
        DmscaleError: the budget is of anything but MACs, ModelOpt cannot convert the network or fails on it, its smallest
            structure is over the budget, or the one that it finds is by our count.
    """
    if set(task.budget.targets) != {"macs"}:
        raise dmscale.DmscaleError(f"FastNAS searches for MACs here, not for {task.budget}")
    try:
        with _quietly():
            small = _searched(copy.deepcopy(task.space.model).eval(), task)
    except dmscale.DmscaleError:
        raise
    except Exception as error:  # whatever another library raises on a network that it cannot handle
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise dmscale.DmscaleError(f"ModelOpt cannot prune this network: {told}") from error
    cost = dmscale.trace(small, task.space.example_inputs, verify=False).cost()
    if not budget.satisfied(cost, task.budget):
        raise dmscale.DmscaleError(f"FastNAS misses the budget of {task.budget}: what it found costs {cost.macs} MACs")
    return Found(model=small)


def _searched(model: nn.Module, task: Task) -> nn.Module:
    """`model`, made smaller in place and plain again.

    Raises:
        DmscaleError: not even the smallest structure is within the budget.
    """
    import modelopt.torch.nas as mtn
    from modelopt.torch.prune.fastnas import FastNASConfig
    from modelopt.torch.prune.pruning import PruneModeRegistry

    config = FastNASConfig()
    for _, rules in config.items():
        for rule in (rules or {}).values():
            rule.update({key: 1 for key in rule if key.endswith("_divisor")})
            rule.update({key: _SHARES for key in rule if key.endswith("s_ratio")})
    model = mtn.convert(model, [("fastnas", config)], registry=PruneModeRegistry)

    args, kwargs = running.arguments(task.space.example_inputs)
    inputs, limits = (*args, kwargs), {"flops": 2 * task.budget.targets["macs"]}  # theirs are two for a MAC
    reached, costs = mtn.profile(model, inputs, limits, verbose=False, use_centroid=True)
    if not reached:
        least = costs["min"]["flops"] / 2
        raise dmscale.DmscaleError(f"FastNAS does not reach {task.budget}: its smallest structure has {least:.0f} MACs")

    batches = task.calibration(_BATCHES)
    few = list(itertools.islice(itertools.cycle(parts(batches, _EXAMPLES)), _QUEUE))

    def score(network: nn.Module) -> float:
        with torch.no_grad(), running.evaluating(network):
            return -sum(float(task.criterion(call(network, x), y)) for x, y in batches) / len(batches)

    settings = {"score_func": score, "forward_loop": lambda m: _run(m, few), "verbose": False}
    small, _ = mtn.search(model, limits, inputs, settings)
    for path, module in small.named_modules():  # what they leave behind
        for name in vars(module).keys() - vars(task.space.model.get_submodule(path)).keys():
            delattr(module, name)
    return small


def _run(model: nn.Module, batches: list[Batch]) -> None:
    for inputs, _ in batches:
        call(model, inputs)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without its tables, its progress and its warnings, of optional parts that it does not find for example."""
    silent = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        warnings.simplefilter("ignore")
        yield


STRATEGIES = [
    Strategy("modelopt-fastnas", f"NVIDIA ModelOpt {_VERSION}, FastNAS, by tenths", fastnas, False, True, True)
]
