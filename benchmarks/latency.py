"""How well is the latency of exported networks predicted?

    python -m benchmarks.latency [networks]

For each model: latency is learnt (operators alone, a few exported networks whole; nothing from a cache), then `networks` other
random structures (30 by default) are exported, predicted and measured.  All exported networks take turns, call by call, so that
a busy machine slows them alike.  With one thread the time is that of the process (what other processes take is not in it), else
the wall's; a fixed piece of work is timed beside every measurement, its slowdown is divided out, and the lower quartile taken.
Since the machine may have slowed down between learning and checking all the same, the error is also given after one common
factor, the median of measured / predicted, is taken out.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch
from scipy.stats import spearmanr

import dmscale
from benchmarks.models import clock, timm_model
from dmscale.latency import Meter

MODELS = {"mobilenetv3_small_050": 64, "resnet18": 64, "deit_tiny_patch16_224": 224}
"""timm model -> image size."""


def structures(space: dmscale.SearchSpace, count: int) -> list[dmscale.Structure]:
    """Random structures on random budgets of 25% to 95% of the MACs."""
    rng = np.random.default_rng(0)
    lowest = space.cost(dmscale.budget.smallest(space)).macs / space.cost().macs
    shares = rng.uniform(max(0.25, lowest + 0.02), 0.95, count)
    return [space.sample_at({"macs": float(share)}, seed=i) for i, share in enumerate(shares)]


def main(networks: int = 30) -> None:
    """Print one row a model."""
    print(
        "| model | learnt in s | full ms | mean error | without common factor | rank correlation | of MACs | bound by |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, size in MODELS.items():
        torch.manual_seed(0)
        model, inputs = timm_model(name, size)
        space = dmscale.trace(model.eval(), inputs, verify=False)
        start = time.perf_counter()
        meter = Meter(torch.device("cpu"), repeats=11, clock=clock(), steady=True)
        learnt = space.measure_latency(cache=False, meter=meter)
        seconds = time.perf_counter() - start
        tried = structures(space, networks)
        predicted = np.array([space.cost(s)["latency"] for s in tried])
        measured = np.array(meter.models([space.build(s) for s in tried], inputs))
        factor = statistics.median(measured / predicted)
        error = np.abs(predicted / measured - 1).mean()
        centred = np.abs(factor * predicted / measured - 1).mean()
        rank = spearmanr(predicted, measured).statistic
        of_macs = spearmanr(space.cost_of_many(tried, "macs"), measured).statistic
        bound = learnt.explain(space)
        print(
            f"| {name}, {size} px | {seconds:.0f} | {bound.full:.2f} | {error:.1%} | {centred:.1%} | {rank:.2f} | "
            f"{of_macs:.2f} | {bound.by or '-'} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
