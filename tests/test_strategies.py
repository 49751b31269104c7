"""Every registered strategy keeps the contract: on budget, repeatable, and the user's model is left as it was."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import assert_same, fingerprint, non_trivial
from torch import nn

import dmscale
from dmscale import budget as budgets
from dmscale.demo import ResidualCNN, VisionTransformer
from dmscale.strategies import REGISTRY, Found, Strategy, Task, add, select
from dmscale.strategies.isomorphic import signature
from dmscale.strategies.knapsack import exact, greedy
from dmscale.strategies.ranking import by_share, by_threshold, relative, values_of
from dmscale.strategies.scores import mask_gradients, mean_of, norm_scales, parts, weight_norms
from dmscale.strategies.skipping import _spread

STEPS = 6
NETS = {
    "cnn": lambda: ResidualCNN((8, 12), 2),
    "vit": lambda: VisionTransformer(20, 3, 4, 5, 24),
}


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator))
        for _ in range(6)
    ]


def task_of(net):
    torch.manual_seed(0)
    model = non_trivial(NETS[net]())
    space = dmscale.trace(model, torch.randn(1, 1, 8, 8))
    data = batches()
    return Task(
        space, budgets.parse("45% macs", space), itertools.cycle(data), lambda n: data[:n], F.cross_entropy,
        lambda p: torch.optim.AdamW(p, 1e-3), STEPS,
    )  # fmt: skip


@functools.cache
def weights_task(net):
    """One task for tests that change nothing."""
    return task_of(net)


def assert_on_budget(task, structure):
    """Within the slack, or so near that not one more element fits."""
    space = task.space

    def used(s):
        return max(space.cost(s)[m] / t for m, t in task.budget.targets.items())

    assert used(structure) <= 1
    larger = [
        structure.sizes | {n: k + d.multiple} for n, d in space.dimensions.items() if (k := structure.sizes[n]) < d.size
    ]
    assert used(structure) >= 1 - budgets.SLACK or all(used(space.structure(s)) > 1 for s in larger), used(structure)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", REGISTRY)
def test_the_contract(name, net):
    strategy = REGISTRY[name]
    fresh = task_of if strategy.trains else weights_task  # a one-shot strategy must leave the task as it was
    task = replace(fresh(net))
    model, before = task.space.model, fingerprint(task.space.model)
    ticks = []
    task.tick = lambda loss: ticks.append(float(loss.detach()))
    found = strategy.find(task)
    assert isinstance(found, Found) and found.structure is not None and found.model is None
    assert_on_budget(task, found.structure)
    assert_same(before, fingerprint(model), values=not strategy.trains)
    assert all(p.grad is None for p in model.parameters())
    assert found.steps == len(ticks) == (STEPS if strategy.trains else 0)
    assert strategy.find(fresh(net)).structure == found.structure  # the same seed, the same structure
    assert task.space.export(found.structure)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_random_structures_differ_by_seed():
    for name in ("random", "random-sizes"):
        one, two = (REGISTRY[name].find(replace(weights_task("cnn"), seed=seed)).structure for seed in (1, 2))
        assert one != two


@pytest.mark.parametrize("name", ["search-gumbel", "search-number", "search-hard-concrete", "search-pas"])
def test_what_a_search_draws_differs_by_seed(name):
    """The batches being the same."""

    def sizes(seed):
        torch.manual_seed(0)
        return [e["cost"] for e in REGISTRY[name].find(replace(task_of("cnn"), seed=seed)).history]

    assert sizes(0) == sizes(0) != sizes(1)


def test_strategies_that_need_no_data_ask_for_none():
    for strategy in REGISTRY.values():
        if not strategy.needs_data:
            task = replace(weights_task("cnn"), calibration=None, stream=None)
            assert strategy.find(task).structure is not None


def test_mask_gradients_are_the_sum_of_w_times_dw():
    """An inner channel of a block is taken in by one convolution: dL/dm is the sum of w dL/dw over that slice of it."""
    task = weights_task("cnn")
    (x, y), model = batches()[0], task.space.model
    (scores,) = mask_gradients(task.space, [(x, y)], F.cross_entropy)
    weight = model.stage1[0].conv2.weight
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), weight)
    expected = (weight * grad).sum((0, 2, 3)).detach().double()
    torch.testing.assert_close(scores["stage1.0.conv1"], expected, rtol=1e-3, atol=1e-6)


def test_mask_gradients_predict_the_loss_of_a_small_change():
    """dL/dm of a block's gate is what the loss does when its residual is scaled a little, to first order."""
    task = weights_task("vit")
    x, y = batches()[0]
    (scores,) = mask_gradients(task.space, [(x, y)], F.cross_entropy)
    model, step = task.space.model, 1e-2

    def loss(scale):
        handle = model.blocks[1].register_forward_hook(lambda m, a, out: a[0] + scale * (out - a[0]))
        try:
            with torch.no_grad():
                return float(F.cross_entropy(model(x), y).double())
        finally:
            handle.remove()

    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    assert float(scores["blocks depth"][1]) == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_norms_and_scales_are_those_of_the_weights():
    space = weights_task("cnn").space
    conv1, norm1, conv2 = space.model.stage1[0].conv1, space.model.stage1[0].norm1, space.model.stage1[0].conv2
    expected = (
        conv1.weight.abs().sum((1, 2, 3)) + conv2.weight.abs().sum((0, 2, 3)) + norm1.weight.abs() + norm1.bias.abs()
    )
    torch.testing.assert_close(weight_norms(space, 1)["stage1.0.conv1"], expected.detach())
    torch.testing.assert_close(norm_scales(space)["stage1.0.conv1"], norm1.weight.abs().detach())
    l2, magnitudes = weight_norms(space, 2), space.magnitudes()
    assert l2.keys() == magnitudes.keys() and all(torch.allclose(l2[m], magnitudes[m]) for m in l2)


def test_a_threshold_keeps_the_most_valuable():
    """With an exact fit that has little to do, what is kept is worth more than what is cut, over all dimensions."""
    task = weights_task("cnn")
    scores = {m: torch.rand(n) for d in task.space.dimensions.values() for m, n in task.space._members(d)}
    values = relative(values_of(task.space, scores))
    structure = by_threshold(task, scores, values)
    widths = [d for d in task.space.dimensions.values() if d.kind != "depth"]
    kept = np.concatenate([values[d.name][: structure.sizes[d.name]] for d in widths])
    cut = np.concatenate([values[d.name][structure.sizes[d.name] :] for d in widths])
    assert np.quantile(kept, 0.25) >= np.quantile(cut, 0.75)


@pytest.mark.parametrize("seed", range(3))
def test_equals_go_from_all_dimensions_alike(seed):
    """As the scales of a BatchNorm before any training: the same number of each would be the whole of a narrow layer."""
    layers = [[nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()] for a, b in ((1, 16), (16, 64), (64, 128))]
    model = nn.Sequential(*itertools.chain(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    space = dmscale.trace(model, torch.randn(1, 1, 8, 8))
    task = replace(weights_task("cnn"), space=space, budget=budgets.parse(f"{(20, 45, 70)[seed]}% macs", space))
    found = REGISTRY["norm-scale"].find(task).structure
    shares = [found.share(n) for n in space.dimensions]
    assert max(shares) - min(shares) < 0.15


def worth(space, structure, scores):
    return sum(
        float(values_of(space, scores)[n][:k].sum())
        for n, k in structure.sizes.items()
        if space.dimensions[n].kind != "depth"
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_knapsack_keeps_no_less_importance_than_the_greedy_or_uniform_one(seed):
    task = weights_task("cnn")
    generator = torch.Generator().manual_seed(seed)
    members = [(m, n) for d in task.space.dimensions.values() for m, n in task.space._members(d)]
    scores = {m: torch.rand(n, generator=generator) * torch.rand((), generator=generator) for m, n in members}
    by_greed, by_program = greedy(task, scores, depth=False), exact(task, scores)
    plain = by_share(task, scores)
    assert worth(task.space, by_greed, scores) > 0.98 * worth(task.space, plain, scores)
    assert worth(task.space, by_program, scores) >= worth(task.space, by_greed, scores)
    assert worth(task.space, by_program, scores) >= worth(task.space, plain, scores)


def test_isomorphic_dimensions_are_those_of_one_kind():
    space = weights_task("vit").space
    groups = {}
    for name, d in space.dimensions.items():
        groups.setdefault(signature(space, d), []).append(name)
    hidden = [set(g) for g in groups.values() if "blocks.0.mlp.0" in g]
    assert hidden == [{f"blocks.{i}.mlp.0" for i in range(3)}], groups.values()


def test_blocks_are_spread():
    for count in range(1, 12):
        order = torch.argsort(_spread(count), descending=True).tolist()
        assert sorted(order) == list(range(count))
        if count > 1:
            assert set(order[:2]) == {0, count - 1}
    kept = sorted(torch.argsort(_spread(12), descending=True)[:6].tolist())
    assert max(b - a for a, b in zip(kept, kept[1:])) <= 3


def test_skipping_takes_as_many_blocks_as_the_budget_asks_for():
    task = weights_task("vit")
    task = replace(task, budget=budgets.parse("55% macs", task.space))
    structure = REGISTRY["skip-uniform"].find(task).structure
    blocks = structure.sizes["blocks depth"]
    assert blocks == 2 and structure.kept["blocks depth"] == (0, 2)
    assert not task.fits({"blocks depth": blocks}) and task.fits({"blocks depth": blocks - 1})


def test_a_space_without_what_a_strategy_needs_is_refused_by_name():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    space = dmscale.trace(net, torch.randn(2, 8))
    task = replace(weights_task("cnn"), space=space, budget=budgets.parse("50% macs", space))
    for name, reason in (("norm-scale", "normalisation"), ("skip-uniform", "depth")):
        with pytest.raises(dmscale.DmscaleError, match=reason):
            REGISTRY[name].find(task)


def test_parts_cut_batches_and_means_weigh_them_alike():
    data = batches()[:1]
    cut = list(parts(data, 3))
    assert [len(y) for _, y in cut] == [3, 3, 2]
    torch.testing.assert_close(torch.cat([x for x, _ in cut]), data[0][0])
    assert mean_of([{"a": torch.tensor([1.0])}, {"a": torch.tensor([3.0])}], torch.square) == {"a": torch.tensor([5.0])}


def test_selection_by_name():
    mine = Strategy("mine", "", lambda task: Found())
    assert [s.name for s in select("uniform, dmscale,uniform")] == ["uniform", "dmscale"]
    assert select("all", [mine])[-1] is mine and len(select("all")) == len(REGISTRY)
    for names in ("nonsense", "", []):
        with pytest.raises(dmscale.DmscaleError, match="knapsack-exact"):
            select(names)
    with pytest.raises(ValueError, match="already"):
        add(REGISTRY["uniform"])
