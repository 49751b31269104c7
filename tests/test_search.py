"""The search rides on any optimizer, meets its budget exactly, repeats with its seed, and resumes where it stopped."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import NETS, assert_same, difference, fingerprint, outputs
from torch import nn

import dmscale
from dmscale import SearchError, gates
from dmscale.callbacks import Callback
from dmscale.methods import METHODS
from dmscale.methods.knapsack import Knapsack

STEPS = 40

EVERY_METHOD = [
    *(dict(method=name) for name in METHODS),
    dict(method="dms", mode="two-sided", balance=True),
    dict(method="dms", mode="lagrangian", hard=True),
    dict(method="gumbel", mode="two-sided"),
]
IMPORTANCES = ["taylor", "fisher", "snip", "magnitude", "activation", "index"]


def label(options):
    """How a test's options read in its name."""
    return "-".join(str(v) for v in options.values())


def problem(net="residual_conv", seed=0):
    """(model, inputs, a batch of inputs and targets for each step)."""
    torch.manual_seed(seed)
    model, inputs = NETS[net]()
    out = model.train()(inputs)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(inputs.shape, generator=generator), torch.randn(out.shape, generator=generator))
        for _ in range(STEPS)
    ]
    return model, inputs, batches


def adamw(parameters):
    return torch.optim.AdamW(parameters, 1e-3)


def sgd(parameters):
    return torch.optim.SGD(parameters, 1e-2, momentum=0.9, weight_decay=1e-4)


def train(search, optimizer, batches, micro_batches=1):
    """The loop of the README, over the batches that the search has not seen."""
    for x, y in batches[search.step :]:
        for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches)):
            (F.mse_loss(search.model(part), target) / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        if search.done:
            break
    return search


def searched(net="residual_conv", make_optimizer=adamw, budget="50% macs", micro_batches=1, seed=0, **options):
    model, inputs, batches = problem(net, seed)
    search = dmscale.Search(dmscale.trace(model, inputs), budget, STEPS, **options)
    optimizer = make_optimizer(model.parameters())
    search.attach(optimizer)
    return train(search, optimizer, batches, micro_batches)


def assert_on_budget(search):
    """Within 0.5% of the budget, or, in these nets of few elements, so near that not one more fits."""
    space, found = search.space, search.structure

    def used(structure):
        return max(space.cost(structure)[m] / t for m, t in search.budget.targets.items())

    assert used(found) <= 1
    larger = [found.sizes | {n: k + d.multiple} for n, d in space.dimensions.items() if (k := found.sizes[n]) < d.size]
    assert used(found) >= 0.995 or all(used(space.structure(s, search.scores())) > 1 for s in larger), used(found)


# -- any optimizer, any loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net, make_optimizer, options",
    [
        *(("residual_conv", adamw, options) for options in EVERY_METHOD),
        *((net, sgd, dict(method=m)) for net in ("residual_stack", "unet") for m in ("knapsack", "dms")),
    ],
    ids=lambda x: label(x) if isinstance(x, dict) else getattr(x, "__name__", x),
)
def test_a_search_ends_on_its_budget(net, make_optimizer, options):
    search = searched(net, make_optimizer, **options)
    assert search.done and search.step == STEPS
    assert_on_budget(search)
    small = search.export().eval()
    x = search.space.example_inputs
    assert (
        difference(outputs(small, x), outputs(search.model.eval(), x)) <= 1e-4
    )  # search.model ends as what is exported


@pytest.mark.parametrize("budget", [dict(macs=0.5, params=0.6), "30% params", "60% bytes, 45% macs"])
def test_any_budget_is_met(budget):
    assert_on_budget(searched(budget=budget))


def test_gradients_accumulate_over_micro_batches():
    """Without BatchNorm two halves of a batch are the batch: the search must find the same."""
    whole = searched("residual_stack", budget="40% macs", make_optimizer=sgd)
    torch.testing.assert_close(
        searched("residual_stack", budget="40% macs", make_optimizer=sgd, micro_batches=3).pruned, whole.pruned, rtol=0, atol=1e-3
    )  # fmt: skip


@pytest.mark.parametrize("before_attach", [True, False])
def test_a_scheduler_leaves_the_structure_rate_alone(before_attach):
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    optimizer = sgd(model.parameters())

    def schedule():
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    scheduler = schedule() if before_attach else None
    search.attach(optimizer)
    scheduler = scheduler or schedule()
    for x, y in batches:
        F.mse_loss(search.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0])
    assert optimizer.param_groups[0]["lr"] < 1e-4
    assert search.done
    assert_on_budget(search)


def test_the_structure_does_not_depend_on_a_scheduler_of_the_weights():
    """With a rate of zero for the weights, a schedule has nothing to change."""

    def with_schedule(factor):
        model, inputs, batches = problem()
        search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        search.attach(optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)
        for x, y in batches:
            F.mse_loss(search.model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return search

    assert torch.equal(with_schedule(0.5).pruned, with_schedule(1.0).pruned)


def test_clipping_and_several_groups_work():
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    weights = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": rest, "weight_decay": 0.0}], 1e-3, amsgrad=True)
    search.attach(optimizer)
    for x, y in batches:
        F.mse_loss(search.model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert_on_budget(search)


@pytest.mark.parametrize(
    "options", [dict(method="knapsack"), dict(method="dms", mode="two-sided"), dict(method="hard-concrete")], ids=label
)
def test_what_is_maximised_is_searched_as_its_negative_is_minimised(options):
    def run(sign, maximize):
        model, inputs, batches = problem()
        search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS, **options)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, maximize=maximize)
        search.attach(optimizer)
        for x, y in batches:
            (sign * F.mse_loss(search.model(x), y)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return search

    assert run(-1, True).history == run(1, False).history


def test_the_optimizer_may_be_built_from_the_search_model():
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    optimizer = adamw(p for p in search.model.parameters() if any(p is q for q in model.parameters()))
    search.attach(optimizer)
    assert_on_budget(train(search, optimizer, batches))


def test_more_steps_than_the_search_has_do_no_harm():
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS // 2)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    for i, (x, y) in enumerate(batches):
        F.mse_loss(search.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if i + 1 == STEPS // 2:
            found = search.structure
    assert search.step == STEPS // 2 and search.structure == found
    assert_on_budget(search)


def test_batchnorm_with_small_batches():
    model, inputs, _ = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "40% macs", STEPS)
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    for _ in range(STEPS):
        F.mse_loss(search.model(torch.randn(1, 3, 8, 8)), torch.randn(1, 5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_on_budget(search)
    assert all(bool(p.isfinite().all()) for p in model.state_dict().values())
    assert all(bool(t.isfinite().all()) for t in outputs(search.export().eval(), inputs))


# -- what it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(method="knapsack"),
        *(dict(method="dms", mode=m, hard=h) for m in ("projected", "penalty") for h in (True, False)),
    ],
    ids=label,
)
def test_what_contributes_nothing_goes_first(options):
    """Half of the hidden units have no weight to the output; that half is not the first, nor the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    dead = torch.randperm(32)[:16]
    with torch.no_grad():
        model[2].weight[:, dead] = 0
    space = dmscale.trace(model, torch.randn(2, 8))
    search = dmscale.Search(space, "50% macs", STEPS, **options, train_weights=False)
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    for _ in range(STEPS):
        F.mse_loss(search.model(torch.randn(16, 8)), torch.randn(16, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = set(search.structure.kept["0"])
    assert len(kept) == 16
    assert kept == set(range(32)) - set(dead.tolist())


def test_the_idle_layer_shrinks_more_than_the_busy_one():
    """Two layers alike in cost, one of them with an output that nearly nothing reads."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.busy, self.idle = nn.Linear(8, 32), nn.Linear(8, 32)
            self.out_busy, self.out_idle = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x):
            return self.out_busy(self.busy(x).relu()) + 1e-3 * self.out_idle(self.idle(x).relu())

    torch.manual_seed(0)
    model, teacher = Two(), Two()
    space = dmscale.trace(model, torch.randn(2, 8))
    search = dmscale.Search(space, "60% macs", 200)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    for _ in range(200):
        x = torch.randn(16, 8)
        with torch.no_grad():
            y = teacher(x)
        F.mse_loss(search.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert search.structure.sizes["idle"] < 0.5 * search.structure.sizes["busy"]
    assert_on_budget(search)


# -- the same again ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_structure():
    a, b = searched(seed=3), searched(seed=3)
    assert a.structure == b.structure
    assert torch.equal(a.pruned, b.pruned) and torch.equal(a.importance, b.importance)
    assert searched(seed=4).structure != a.structure


@functools.cache
def uninterrupted(method):
    return searched(method=method)


@pytest.mark.parametrize(
    "stop, method", [*((n, "knapsack") for n in (1, 19, 36, STEPS)), *((19, m) for m in METHODS if m != "knapsack")]
)
def test_a_search_resumes_bit_for_bit(stop, method, tmp_path):
    whole = uninterrupted(method)
    model, inputs, batches = problem()
    first = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS, method=method)
    optimizer = adamw(model.parameters())
    first.attach(optimizer)
    train(first, optimizer, batches[:stop])
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "search": first.state_dict()},
        tmp_path / "state.pt",
    )
    state = torch.load(tmp_path / "state.pt", weights_only=True)

    fresh, inputs, batches = problem()
    again = dmscale.Search(dmscale.trace(fresh, inputs), "50% macs", STEPS, method=method)
    optimizer = adamw(fresh.parameters())
    again.attach(optimizer)
    fresh.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    again.load_state_dict(state["search"])
    assert again.step == stop
    train(again, optimizer, batches)
    assert again.structure == whole.structure
    assert again.history == whole.history
    assert torch.equal(again.pruned, whole.pruned) and torch.equal(again.importance, whole.importance)
    for name, t in whole.space.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], t), name
    small, expected = again.export(), whole.export()
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), expected.state_dict().values()))


def test_a_state_of_another_search_is_refused():
    model, inputs, _ = problem()
    state = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS).state_dict()
    other, inputs, _ = problem("unet")
    with pytest.raises(SearchError, match="another search space.*residual width"):
        dmscale.Search(dmscale.trace(other, inputs), "50% macs", STEPS).load_state_dict(state)
    model, inputs, _ = problem()
    with pytest.raises(SearchError, match=f"steps={STEPS}, this one has {STEPS + 1}"):
        dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS + 1).load_state_dict(state)


def test_a_state_is_a_copy():
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches[:10])
    state = search.state_dict()
    copied = copy.deepcopy(state)
    train(search, optimizer, batches)
    assert torch.equal(state["importance"], copied["importance"])
    assert all(torch.equal(state["learnt"][key], copied["learnt"][key]) for key in copied["learnt"])
    assert state["history"] == copied["history"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [dict(method="knapsack"), dict(method="dms"), dict(method="gumbel"),
                                     dict(importance="activation"), dict(depth_importance="residual")], ids=label)  # fmt: skip
def test_a_search_runs_whatever_the_default_dtype_is(options, dtype):
    """Masks and what is learnt of them are float32: small squares are averaged."""
    torch.set_default_dtype(dtype)
    try:
        model, inputs, batches = problem("residual_stack")
        search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", 8, **options)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        search.attach(optimizer)
        assert_on_budget(train(search, optimizer, batches))
        small = search.export()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == dtype for p in small.parameters())
    assert all(m.dtype == torch.float32 for m in search.masks)
    assert search.importance.dtype == torch.float32 and float(search.importance.max()) > 0


# -- manners ----------------------------------------------------------------------------------------------------------


def test_the_users_model_keeps_its_structure():
    model, inputs, batches = problem()
    before = fingerprint(model)
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    assert_same(before, fingerprint(model))
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches)
    search.export()
    assert_same(before, fingerprint(model), values=False)
    assert type(search.model) is type(model)
    assert any(not torch.equal(before["tensors"][n][2], p) for n, p in model.named_parameters())  # it has been trained


def test_buffers_are_trained_with_the_users_model():
    """`search.model` shares BatchNorm statistics too: what is exported later has seen the data."""
    model, inputs, batches = problem()
    before = {n: b.clone() for n, b in model.named_buffers()}
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches)
    assert all(not torch.equal(before[n], b) for n, b in model.named_buffers())


@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_a_structure_only_search_leaves_the_weights(make_optimizer):
    model, inputs, batches = problem("residual_stack")
    before = fingerprint(model)
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS, train_weights=False)
    optimizer = make_optimizer(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches)
    assert_on_budget(search)
    assert_same(before, fingerprint(model))
    for x, y in batches[:2]:  # a loop that does not stop in time
        F.mse_loss(search.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(before, fingerprint(model))


def test_a_structure_only_search_needs_no_weights_in_the_optimizer():
    model, inputs, batches = problem("residual_stack")
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS, train_weights=False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    search.attach(optimizer)
    train(search, optimizer, batches)
    assert_on_budget(search)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(bad):
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches[:10])
    weights = [p.detach().clone() for p in model.parameters()]
    pruned, importance = search.pruned.detach().clone(), search.importance.clone()
    x, y = batches[10]
    (F.mse_loss(search.model(x), y) * bad).backward()
    with pytest.raises(SearchError, match="step 10.*NaN or infinite.*learning rate"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    assert torch.equal(pruned, search.pruned) and torch.equal(importance, search.importance)
    assert_on_budget(search)  # a structure is there
    search.export()
    optimizer.zero_grad()  # and whoever repairs the cause may go on
    train(search, optimizer, batches)
    assert search.done
    assert_on_budget(search)


def test_history_tells_cost_target_and_sizes():
    search = searched(log_every=4)
    assert [entry["step"] for entry in search.history] == list(range(4, STEPS + 1, 4))
    targets = [entry["target"]["macs"] for entry in search.history]
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == pytest.approx(0.5)
    for entry in search.history:
        assert set(entry["sizes"]) == set(search.space.dimensions)
        assert entry["cost"]["macs"] <= entry["target"]["macs"] + 1e-3  # projected: on the target at every step
        assert all(d.lowest <= entry["sizes"][n] <= d.size for n, d in search.space.dimensions.items())


@pytest.mark.parametrize("method", ["knapsack", "dms", "hard-concrete"])
@pytest.mark.parametrize("net", ["residual_stack", "residual_conv"])
def test_the_last_entry_of_the_history_is_the_structure_that_is_found(net, method):
    search = searched(net, method=method, log_every=4)
    assert search.history[-1]["sizes"] == search.structure.sizes
    assert search.history[-1]["cost"]["macs"] == search.space.cost(search.structure).macs / search.space.cost().macs


def test_the_cost_in_the_history_is_that_of_the_masks_whichever_blocks_are_out():
    """Blocks differ in width, so that a share of them says little of what they cost."""
    model, inputs, batches = problem("residual_stack")
    space = dmscale.trace(model, inputs, minimum={"blocks.0.up": 20})
    seen = []

    class Compare(Callback):
        def on_step(self, search, record):
            masks = {m: mask.detach() for m, mask in zip(search.layout.members, search.masks)}
            structure = space.structure(record["sizes"], masks)
            assert all(sum(masks[m].tolist()) == len(structure.kept[m]) for m in masks)
            assert record["cost"]["macs"] == pytest.approx(space.cost(structure).macs / space.cost().macs, rel=1e-12)
            seen.append(record["sizes"]["blocks depth"])

    scores = {
        m: np.full(k, 1e-9 if "0.up" in m else 1.0) for d in space.dimensions.values() for m, k in space._members(d)
    }
    scores["blocks depth"] = np.array([0.0, 1, 1, 1, 1])
    search = dmscale.Search(space, "60% macs", STEPS, importance=lambda search: scores, callbacks=[Compare()])
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches)
    assert min(seen) < max(seen)


@pytest.mark.parametrize("method", ["dms", "dms-projected", "estimated-topk"])
@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_blocks_that_are_decided_stay_however_far_a_step_goes(method, make_optimizer):
    """Of five blocks one is a fifth of the scalar, which the optimizer moves on at every step."""
    search = searched("residual_stack", make_optimizer, "70% macs", method=method, lr=0.2, log_every=1)
    decided = [e["sizes"]["blocks depth"] for e in search.history[:-1] if e["step"] > search.decay * STEPS]
    assert len(decided) > 5 and len(set(decided)) == 1


def test_masks_are_ones_until_the_target_falls():
    model, inputs, batches = problem()
    expected = outputs(copy.deepcopy(model).eval(), inputs)
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS, warmup=0.5)
    assert difference(outputs(search.model.eval(), inputs), expected) <= 1e-6
    search.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    search.attach(optimizer)
    train(search, optimizer, batches[: STEPS // 2])
    assert float(search.importance.max()) > 0  # it has been watching
    assert torch.equal(search.pruned, torch.zeros_like(search.pruned))
    train(search, optimizer, batches[: STEPS // 2 + 5])
    assert float(search.pruned.detach().max()) > 0


@pytest.mark.parametrize("net, least", [("wide_mlp", 0.98), ("resnet", 0.75)])  # a block goes as a whole
def test_the_cost_follows_the_target_where_nothing_has_importance(net, least):
    """As behind a layer that starts with weights of zero, or that is not trained."""
    from test_budget import FINE

    torch.manual_seed(0)
    model, inputs = FINE[net]()
    nn.init.zeros_(model[-1].weight)
    search = dmscale.Search(dmscale.trace(model, inputs, verify=False), "50% macs", STEPS, log_every=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    search.attach(optimizer)
    masks = torch.cat(list(search.masks)).detach()
    while not search.refining:
        search.model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        before, masks = masks, torch.cat(list(search.masks)).detach()
        found = search.space.cost(search.method.exactly()).macs / search.space.cost().macs
        assert least <= found / search.history[-1]["target"]["macs"] <= 1 + 1e-9
        assert search.reaches_target or bool((masks <= before).all())  # but for the exact fit what has gone stays gone


@pytest.mark.parametrize("net", ["residual_conv", "split_attention", "group_norm"])
def test_validating_under_inference_mode_makes_no_difference(net):
    """Nor does it to make the search there."""
    found = []
    for inference in (True, False):
        model, inputs, batches = problem(net)
        space = dmscale.trace(model, inputs, verify=False)
        with torch.inference_mode(inference):
            search = dmscale.Search(space, "50% macs", STEPS)
        optimizer = sgd(model.parameters())
        search.attach(optimizer)
        for end in range(0, STEPS + 1, 10):
            train(search, optimizer, batches[:end])
            with torch.inference_mode(inference):
                search.model.eval()(inputs)
            search.model.train()
        found.append((search.structure, *search.masks, *model.parameters()))
    assert found[0][0] == found[1][0] and all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:]))


@pytest.mark.parametrize("net", ["residual_conv", "residual_stack", "unet"])
def test_the_weights_settle_in_what_is_exported(net):
    """From the step at which the budget is reached the masks stay as they are."""
    model, inputs, batches = problem(net)
    search = dmscale.Search(dmscale.trace(model, inputs), "40% macs", STEPS)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches[: STEPS * 4 // 5])
    settled = torch.cat([m.detach().clone() for m in search.masks])
    assert float(settled.sum()) < len(settled)
    train(search, optimizer, batches)
    assert search.done and torch.equal(torch.cat(list(search.masks)), settled)


def test_masks_that_somebody_has_overwritten_are_set_again_at_the_next_step():
    """By loading an earlier state of `search.model`, whose masks are among its parameters."""
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS, decay=0.2)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    earlier = copy.deepcopy(search.model.state_dict())
    train(search, optimizer, batches[: STEPS - 2])
    settled = [m.detach().clone() for m in search.masks]
    search.model.load_state_dict(earlier)
    assert not all(torch.equal(m, n) for m, n in zip(search.masks, settled))
    train(search, optimizer, batches[: STEPS - 1])
    assert all(torch.equal(m, n) for m, n in zip(search.masks, settled))


def test_what_was_known_of_masks_before_they_were_overwritten_is_known_again_after_a_step():
    """Also if they have their old values, as after a broadcast."""
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS, decay=0.2)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches[: STEPS - 2])
    masks = gates.masks_of(search.model)
    known = masks.hard, masks.decided
    assert known[0].keys() == masks.widths.keys()
    search.model.load_state_dict(search.model.state_dict())
    assert not masks.hard and not masks.decided
    train(search, optimizer, batches[: STEPS - 1])
    assert (masks.hard, masks.decided) == known


@pytest.mark.parametrize("net", ["residual_conv", "residual_stack", "split_attention", "group_norm"])
@pytest.mark.parametrize("start", [0, STEPS])
def test_an_average_of_the_search_model_computes_with_its_own_masks(net, start):
    """One that follows at once, so that it must be the search's model after every update."""
    model, inputs, batches = problem(net)
    search = dmscale.Search(dmscale.trace(model, inputs, verify=False), "40% macs", STEPS)
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches[:start])
    follow = torch.optim.swa_utils.get_ema_multi_avg_fn(0.0)
    average = torch.optim.swa_utils.AveragedModel(search.model, multi_avg_fn=follow, use_buffers=True)
    train(search, optimizer, batches)
    average.update_parameters(search.model)  # the first update copies
    average.update_parameters(search.model)
    found, expected = outputs(average.module.eval(), inputs), outputs(search.model.eval(), inputs)
    assert difference(found, expected) <= 1e-5
    with torch.no_grad():
        for mask in gates.masks_of(average.module).parameters():
            mask.fill_(1)
    assert difference(outputs(average.module, inputs), outputs(model.eval(), inputs)) <= 1e-5


def test_multiples_hold_at_every_step_of_the_default_search():
    """They are learnt under, not rounded to after it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    search = dmscale.Search(dmscale.trace(model, torch.randn(4, 8), multiple=8), "40% params", STEPS)
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    kept = set()
    while not search.done:
        x = torch.randn(16, 8)
        F.mse_loss(search.model(x), x[:, :4]).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept |= {(mask.numel(), int(mask.sum())) for mask in search.masks}
    assert len(kept) > 4 and all(count % 8 == 0 for _, count in kept)


@pytest.mark.parametrize("width", [12288, 18944, 32000])
def test_a_structure_that_does_not_change_stays_however_wide_a_layer_is(width):
    """Of as many elements a sum of float32 shares is off by some, of which the default search would lose one at every step."""
    model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 1))
    space = dmscale.trace(model, torch.randn(1, 2), verify=False)
    search = dmscale.Search(space, "50% macs", STEPS)
    for kept in range(width // 9, width, width // 9):
        scores = {"0": torch.randn(width, generator=torch.Generator().manual_seed(kept))}
        structure = space.structure({"0": kept}, scores)
        search.method.kept.copy_(search.layout.mask_of(structure, search.device))
        assert search.method.exactly() == structure


def test_multiples_hold_at_the_end():
    model, inputs, batches = problem("unet")
    space = dmscale.trace(model, inputs, multiple=2)
    search = dmscale.Search(space, "50% macs", STEPS)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches)
    assert space.cost(search.structure).macs <= search.budget.targets["macs"]
    assert all(k % 2 == 0 or k == space.dimensions[n].size for n, k in search.structure.sizes.items())


# -- wrong use --------------------------------------------------------------------------------------------------------


def test_a_search_has_one_optimizer():
    model, inputs, _ = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    optimizer = adamw(model.parameters())
    search.attach(optimizer)
    for other in (optimizer, sgd(model.parameters())):
        with pytest.raises(SearchError, match="attached to an optimizer already"):
            search.attach(other)


def test_a_search_beside_an_unfinished_one_of_the_same_model_is_refused_with_the_remedy():
    model, inputs, batches = problem("mlp")
    space = dmscale.trace(model, inputs, verify=False)
    first, second = dmscale.Search(space, "80% macs", STEPS), dmscale.Search(space, "50% macs", STEPS)
    optimizer = sgd(model.parameters())
    first.attach(optimizer)
    train(first, optimizer, batches[:5])
    groups = len(optimizer.param_groups)
    with pytest.raises(SearchError, match=f"has taken 5 of {STEPS} steps.*remaining steps first.*a new optimizer"):
        second.attach(optimizer)
    assert len(optimizer.param_groups) == groups
    train(first, optimizer, batches)
    second.attach(optimizer)  # one after the other
    assert_on_budget(train(second, optimizer, batches))
    third = dmscale.Search(space, "50% macs", STEPS)
    other = sgd(model.parameters())
    third.attach(other)
    assert_on_budget(train(third, other, batches))


def test_two_searches_of_two_models_share_an_optimizer():
    pairs = [problem("mlp"), problem("mlp", seed=1)]
    searches = [dmscale.Search(dmscale.trace(m, x, verify=False), "50% macs", STEPS) for m, x, _ in pairs]
    optimizer = sgd([p for m, _, _ in pairs for p in m.parameters()])
    for search in searches:
        search.attach(optimizer)
    for batches in zip(*(b for _, _, b in pairs)):
        sum(F.mse_loss(s.model(x), y) for s, (x, y) in zip(searches, batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for search in searches:
        assert_on_budget(search)


def test_an_optimizer_of_something_else_is_refused():
    model, inputs, _ = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    other = adamw(copy.deepcopy(model).parameters())
    groups = len(other.param_groups)
    with pytest.raises(SearchError, match="owns no parameter of the traced model.*train_weights=False"):
        search.attach(other)
    assert len(other.param_groups) == groups
    search.attach(adamw(model.parameters()))  # the refusal has left the search usable


@pytest.mark.parametrize(
    "options, says",
    [(dict(steps=0), "steps=0"), (dict(steps=10, mode="prox"), "mode='prox'.*takes no mode"),
     (dict(steps=10, method="dms", mode="prox"), "takes mode penalty, two-sided"),
     (dict(method="random"), "none of knapsack, dms"),
     (dict(importance="size"), "importance='size' is none of taylor"), (dict(depth_importance="size"), "residual, similarity"),
     (dict(method="pas", hard=True), "only method 'dms'"), (dict(budgets=["75% macs"]), "and not both")],
)  # fmt: skip
def test_wrong_arguments_are_named(options, says):
    model, inputs, _ = problem("mlp")
    with pytest.raises(SearchError, match=says):
        dmscale.Search(dmscale.trace(model, inputs), "50% macs", **options)


@pytest.mark.parametrize(
    "options, says",
    [(dict(steps="100"), "steps='100' is no whole number of at least 1"), (dict(steps=True), "steps=True"),
     (dict(steps=10.5), "steps=10.5"), (dict(seed=0.5), "seed=0.5 is no whole number"), (dict(log_every=0), "log_every=0"),
     (dict(warmup=-1), r"warmup=-1 is no number between 0 \(included\) and 1"), (dict(warmup="5%"), "warmup='5%'"),
     (dict(momentum=1.5), "momentum=1.5"), (dict(momentum=1.0), "momentum=1.0"), (dict(momentum=math.nan), "momentum=nan"),
     (dict(decay=0.0), r"decay=0.0 is no number between 0 and 1 \(included\)"), (dict(decay=1.5), "decay=1.5"),
     (dict(decay=None), "decay=None"), (dict(warmup=0.9), "warmup=0.9 leaves .* before decay=0.8.*smaller warmup or a larger"),
     (dict(method="dms", lr=-1.0), "lr=-1.0 is no positive number"), (dict(method="dms", penalty=-1), "penalty=-1"),
     (dict(momentum=2, lr=0, decay=2), "momentum=2 .*decay=2 .*lr=0 ")],
)  # fmt: skip
def test_numbers_that_no_search_can_run_with_are_refused_together(options, says):
    model, inputs, _ = problem("mlp")
    with pytest.raises(SearchError, match=says):
        dmscale.Search(dmscale.trace(model, inputs, verify=False), **{"budget": "50% macs", "steps": 10} | options)


def test_numbers_of_numpy_are_numbers():
    model, inputs, _ = problem("mlp")
    search = dmscale.Search(
        dmscale.trace(model, inputs, verify=False), "50% macs", np.int64(10), warmup=np.float32(0.5), seed=np.int32(1)
    )
    assert search.steps == 10


# -- importance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, "residual", "similarity"])
@pytest.mark.parametrize("kind", IMPORTANCES)
def test_every_importance_finds_a_structure_on_budget(kind, depth):
    if depth is None or kind == "taylor":
        search = searched("residual_conv", importance=kind, depth_importance=depth)
        assert_on_budget(search)
        assert float(search.importance.max()) > 0


def test_an_index_importance_keeps_the_first_elements():
    search = searched(importance="index")
    widths = [m for d in search.space.dimensions.values() for m in d.members]
    assert widths and all(search.structure.kept[m] == tuple(range(len(search.structure.kept[m]))) for m in widths)


def test_an_activation_importance_is_the_mean_square_that_is_taken_in():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    search = dmscale.Search(
        dmscale.trace(model, torch.randn(2, 8)), "50% macs", 10, importance="activation", momentum=0.0
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    search.attach(optimizer)
    x = torch.randn(16, 8)
    before, after = model[0](x).square().mean(0), model[1](model[0](x)).square().mean(0)
    search.model(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(search.importance, ((before + after) / 2).detach())


@pytest.mark.parametrize(
    "net", ["fused_attention", "gqa_native", "rotary_half", "residual_conv", "transformer_encoder"]
)
def test_an_activation_importance_is_of_every_element(net):
    """Of heads and of blocks too: what nothing is measured of would go first."""
    torch.manual_seed(0)
    model, inputs = NETS[net]()
    search = dmscale.Search(dmscale.trace(model, inputs), "60% macs", STEPS, importance="activation")
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    search.model(torch.randn(8, *inputs.shape[1:])).square().mean().backward()
    optimizer.step()
    unseen = {m for m in search.layout.members if net == "transformer_encoder" and "heads" in m}  # within a function
    assert all(v.any() for m, v in search.layout.by_member(search.measured).items() if m not in unseen)


def test_an_activation_importance_of_a_head_is_that_of_all_its_channels():
    torch.manual_seed(0)
    model, inputs = NETS["fused_attention"]()
    space = dmscale.trace(model, inputs)
    search = dmscale.Search(space, "60% macs", STEPS, importance="activation")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    search.attach(optimizer)
    seen = []
    model.get_submodule("attn.proj").register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    x = torch.randn(8, *inputs.shape[1:])
    model(x)
    search.model(x).square().mean().backward()
    optimizer.step()
    heads, channels = (space.dimensions[f"attn {n}"].size for n in ("heads", "head_dim"))
    squares = seen[0].square().mean((0, 1)).view(heads, channels)
    found = search.layout.by_member(search.measured)
    assert np.allclose(found["attn heads"], squares.sum(1), rtol=1e-5)
    assert np.allclose(found["attn head_dim"], squares.sum(0), rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [dict(importance="activation"), dict(depth_importance="residual")], ids=label)
def test_validation_between_steps_leaves_importance_alone(options, training):
    """Whether gradients are disabled for it or not; a search in evaluation mode counts what it runs for its steps."""

    def run(validate):
        model, inputs, batches = problem("residual_stack")
        search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS, **options)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        search.attach(optimizer)
        for batch in batches[:10]:
            search.model.train(training)
            train(search, optimizer, [*[batch] * search.step, batch])
            search.model.eval()
            if validate:
                with torch.set_grad_enabled(training):
                    search.model(3 * batch[0])
        return search

    expected = run(False).importance
    assert float(expected.max()) > 0 and torch.equal(run(True).importance, expected)


def test_the_user_may_say_what_matters():
    wanted = torch.randperm(32)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    space = dmscale.trace(model, torch.randn(2, 8))
    search = dmscale.Search(space, "50% macs", STEPS, importance=lambda search: {"0": wanted})
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    for _ in range(STEPS):
        search.model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(search.structure.kept["0"]) == {i for i in range(32) if wanted[i] >= 16}


@pytest.mark.parametrize(
    "said, says",
    [
        ({"0.weight": [1.0] * 32}, "importance= gives scores of '0.weight': no dimension has such a member"),
        ({"0": [1.0] * 8}, r"scores of '0' have shape \(8,\); give one an element: \(32,\)"),
        ({"0": [math.nan] * 32}, "scores of '0' hold NaN"),
        ({"0": [math.inf] * 32}, "infinite scores of '0'"),
        ([1.0] * 32, "gives a list; it must give a dict"),
        ({"0": [-1.0] * 32}, "gives -1 for an element of '0': method 'knapsack' compares"),
    ],
)
@pytest.mark.parametrize("method", ["knapsack", "dms"])
def test_what_is_no_importance_is_refused_at_the_first_step(said, says, method):
    """Else it would count for nothing, or keep what should go."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    space = dmscale.trace(model, torch.randn(2, 8))
    search = dmscale.Search(space, "50% macs", STEPS, method=method, importance=lambda search: said)
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    search.model(torch.randn(16, 8)).square().mean().backward()
    if method == "dms" and "knapsack" in says:
        optimizer.step()  # it ranks elements, by any numbers
    else:
        with pytest.raises(SearchError, match=says):
            optimizer.step()


class OverWidths(nn.Module):
    """A normalisation, a softmax and a mean over widths, of which nothing that is a number may be left."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.norm(self.a(x))
        return self.c(self.b(x).softmax(-1) - x.mean(-1, keepdim=True))


@pytest.mark.parametrize("method", ["gumbel", "number", "hard-concrete", "pas", "continuous"])
def test_no_method_masks_more_than_may_go(method):
    torch.manual_seed(0)
    model = OverWidths()
    space = dmscale.trace(model, torch.randn(2, 8))
    search = dmscale.Search(space, "40% params", 2 * STEPS, method=method, lr=0.3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    search.attach(optimizer)
    least = {d.name: d.lowest for d in space.dimensions.values()}
    assert least == {"a": 2, "b": 1}
    closed = False
    while not search.done:
        search.model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept = {m: float(mask.detach().sum()) for m, mask in zip(search.layout.members, search.masks)}
        assert all(kept[n] >= k - 1e-6 for n, k in least.items())
        closed |= any(kept[n] <= k for n, k in least.items())
    assert closed or method in ("number", "continuous", "hard-concrete")


# -- a family ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["knapsack", "dms-projected", "dms"])
def test_one_search_gives_a_family(method):
    search = searched("residual_stack", budget=None, budgets=["25% macs", "75% macs", "50% macs"], method=method)
    full = search.space.cost().macs
    assert [m.budget.targets["macs"] / full for m in search.family] == pytest.approx([0.75, 0.5, 0.25])
    for member in search.family:
        used = search.space.cost(member.structure).macs / member.budget.targets["macs"]
        assert 0.9 < used <= 1
        assert member.model(search.space.example_inputs) is not None
    assert search.family[-1].structure == search.structure


def test_a_resumed_search_keeps_the_family_that_it_had():
    budgets = ["80% macs", "40% macs"]
    whole = searched("residual_stack", budget=None, budgets=budgets)
    model, inputs, batches = problem("residual_stack")
    first = dmscale.Search(dmscale.trace(model, inputs), steps=STEPS, budgets=budgets)
    optimizer = adamw(model.parameters())
    first.attach(optimizer)
    train(first, optimizer, batches[:25])
    assert len(first.family) == 1
    fresh, inputs, batches = problem("residual_stack")
    again = dmscale.Search(dmscale.trace(fresh, inputs), steps=STEPS, budgets=budgets)
    resumed = adamw(fresh.parameters())
    again.attach(resumed)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    again.load_state_dict(first.state_dict())
    train(again, resumed, batches)
    assert [m.structure for m in again.family] == [m.structure for m in whole.family]
    for a, b in zip(again.family, whole.family):
        assert all(torch.equal(p, q) for p, q in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_a_resumed_family_has_the_settings_of_what_it_was():
    """The object that a model was built from says the sizes of a member, before and after."""

    @dataclasses.dataclass
    class Settings:
        width: int = 24

    class Built(nn.Module):
        config_class = Settings  # as models of transformers say it

        def __init__(self, config):
            super().__init__()
            self.config = config
            self.up, self.down = nn.Linear(8, config.width), nn.Linear(config.width, 4)

        def forward(self, x):
            return self.down(self.up(x).relu())

    def make():
        torch.manual_seed(0)
        model = Built(Settings())
        space = dmscale.trace(model, torch.randn(2, 8))
        search = dmscale.Search(space, steps=STEPS, budgets=["75% macs", "50% macs"])
        optimizer = sgd(model.parameters())
        search.attach(optimizer)
        return search, optimizer

    search, optimizer = make()
    train(search, optimizer, [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(STEPS - 5)])
    resumed, _ = make()
    resumed.load_state_dict(search.state_dict())
    for found in (search, resumed):
        (member,) = found.family
        assert member.model.config.width == member.model.up.out_features < 24


@pytest.mark.parametrize(
    "budgets, says",
    [
        (["50% macs", "50% macs"], "the same"),
        (["60% macs, 70% params", "50% macs, 80% params"], "not tighter in every"),
        (["50% macs", "40% params"], "same metrics"),
        ([], "not None"),
    ],
)
def test_a_family_that_makes_no_sense_is_refused(budgets, says):
    model, inputs, _ = problem("mlp")
    with pytest.raises(dmscale.DmscaleError, match=says):
        dmscale.Search(dmscale.trace(model, inputs), steps=10, budgets=budgets)


def test_elements_rank_by_the_long_average_and_dimensions_by_the_recent_one():
    model, inputs, _ = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", 1000)
    layout, method = search.layout, search.method
    search.importance.copy_(torch.rand(layout.elements))
    method.recent.copy_(torch.rand(layout.elements))
    method.kept.copy_((torch.rand(layout.elements) < 0.7).float())
    scores = method.scores()
    for segment in range(len(layout.axes)):
        kept = (layout.segment == segment) & (method.kept > 0)
        assert torch.equal(scores[kept].argsort(), search.importance[kept].argsort())
        torch.testing.assert_close(scores[kept].sum(), method.recent[kept].sum())


@pytest.mark.parametrize(
    "steps, momentum, pace", [(100, 0.99, 1 / 5), (1000, 0.99, 1 / 40), (10_000, 0.99, 1 / 100), (10, 0.0, 1.0)]
)
def test_levels_follow_a_part_of_the_search_and_never_less_than_importance_does(steps, momentum, pace):
    model, inputs, _ = problem("mlp")
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", steps, momentum=momentum)
    assert search.method.pace == pytest.approx(pace)


def test_a_block_is_worth_no_less_than_any_width_inside_it():
    model, inputs, _ = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", 10)
    layout, method = search.layout, search.method
    assert layout.inside.any(1).all()  # every block of this network holds a width of its own
    search.importance.copy_(torch.rand(layout.elements))
    method.recent.copy_(search.importance)
    first = int(layout.inside[0].nonzero()[0])
    method.kept[layout.segment == first] = 0  # a width that is empty gives its block nothing
    scores, alone = method.scores(), search.importance * method.kept
    widths = [float(alone[layout.segment == j].sum()) for j in range(len(layout.sizes))]
    for block, inside, own in zip(scores[layout.in_depth], layout.inside, alone[layout.in_depth]):
        most = max(w for w, within in zip(widths, inside) if within)
        assert float(block) == pytest.approx(max(most, float(own)))
    torch.testing.assert_close(scores[~layout.in_depth], alone[~layout.in_depth])


# -- everything in one call -------------------------------------------------------------------------------------------


def test_scale_does_all_of_it():
    model, inputs, batches = problem()
    model.eval()
    before = fingerprint(model)
    state = torch.random.get_rng_state()
    found = dmscale.scale(
        model, inputs, batches, F.mse_loss, budget="50% macs", steps=20, finetune_steps=10, progress=False
    )
    assert 0.995 <= found.cost.macs / found.space.cost().macs / 0.5 <= 1
    assert found.search.done and found.structure == found.search.structure
    assert not found.model.training and found.model(inputs).shape == (4, 5)
    assert_same(before, fingerprint(model), values=False)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(9)  # what the generators hold outside does not matter
    model, inputs, batches = problem()
    again = dmscale.scale(
        model.eval(), inputs, batches, F.mse_loss, budget="50% macs", steps=20, finetune_steps=10, progress=False
    )
    assert again.structure == found.structure
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), found.model.state_dict().values()))


def test_the_seed_of_scale_is_that_of_the_search():
    model, inputs, batches = problem("mlp")
    found = dmscale.scale(
        model, inputs, batches, F.mse_loss, budget="50% macs", steps=2, finetune_steps=1, progress=False, seed=5
    )
    assert found.search.seed == 5


@pytest.mark.parametrize("loader, says", [([], "no batch"), ([torch.zeros(2, 8)], "expected pairs")])
def test_scale_names_a_wrong_loader(loader, says):
    model, inputs, _ = problem("mlp")
    with pytest.raises(dmscale.DmscaleError, match=says):
        dmscale.scale(model, inputs, loader, F.mse_loss, budget="50% macs", steps=5, progress=False)


# -- blocks that are out ----------------------------------------------------------------------------------------------


def count_skipped(monkeypatch):
    """How often a block or branch was not run, filled in as searches train."""
    skipped, formed = [], gates.formed
    monkeypatch.setattr(gates, "formed", lambda *args: skipped.append(args) or formed(*args))
    return skipped


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("net", ["residual_conv", "transformer_encoder"])
def test_a_block_that_is_out_is_not_run_and_makes_no_difference(net, branches, monkeypatch):
    def run(skipping):
        monkeypatch.setattr(Knapsack, "final", skipping)
        model, inputs, batches = problem(net)
        space = dmscale.trace(model, inputs, only="*depth", branches=branches)
        search = dmscale.Search(space, "60% params", STEPS)
        optimizer = sgd(model.parameters())
        search.attach(optimizer)
        skipped = count_skipped(monkeypatch)
        return train(search, optimizer, batches), len(skipped), copy.deepcopy(model.state_dict())

    (fast, skipped, weights), (slow, none, same_weights) = run(True), run(False)
    assert skipped > 0 and none == 0
    assert fast.structure == slow.structure
    inside = [p for n, s in fast.space.stacks.items() for i, p in enumerate(s.paths) if i not in fast.structure.kept[n]]
    for name, value in weights.items():  # those of what is gone decay no longer, and its statistics stand still
        if not any(name.startswith(p + ".") for p in inside):
            assert torch.equal(value, same_weights[name]), name


def test_a_block_that_is_given_something_to_write_into_is_run(monkeypatch):
    model, inputs, batches = problem("residual_stack")  # its forward asks whether every block has been there
    search = dmscale.Search(dmscale.trace(model, inputs, only="*depth"), "60% params", STEPS)
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    skipped = count_skipped(monkeypatch)
    train(search, optimizer, batches)
    assert len(search.structure.kept["blocks depth"]) < 5
    assert not skipped


class Counted(nn.Module):
    """A softmax of the forward itself, which a gate finds by its number, behind blocks with softmaxes of their own."""

    def __init__(self):
        super().__init__()

        class Mixing(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

            def forward(self, x):
                return x + self.down(torch.softmax(self.up(x), -1))

        self.blocks = nn.Sequential(*(Mixing() for _ in range(4)))
        self.wide, self.head = nn.Linear(8, 22), nn.Linear(22, 5)

    def forward(self, x):
        return self.head(torch.softmax(self.wide(self.blocks(x)), -1))


def test_blocks_are_run_where_the_forward_around_counts_their_calls(monkeypatch):
    torch.manual_seed(0)
    model, inputs = Counted(), torch.randn(6, 8)
    space = dmscale.trace(model, inputs, minimum={"blocks depth": 1})
    search = dmscale.Search(space, "30% params", STEPS)
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    skipped = count_skipped(monkeypatch)
    train(search, optimizer, [(torch.randn(6, 8), torch.randn(6, 5)) for _ in range(STEPS)])
    assert search.structure.sizes["blocks depth"] < 4 and search.structure.sizes["wide"] < 22
    assert not skipped
    assert difference(outputs(search.model.eval(), inputs), outputs(search.export().eval(), inputs)) < 1e-5


def test_an_export_before_the_last_step_warns():
    """A loop may end earlier than the search expects, which would go unnoticed."""
    model, inputs, batches = problem()
    search = dmscale.Search(dmscale.trace(model, inputs), "50% macs", STEPS)
    optimizer = sgd(model.parameters())
    search.attach(optimizer)
    train(search, optimizer, batches[: STEPS // 2])
    with pytest.warns(UserWarning, match=f"has taken {STEPS // 2} of its {STEPS} steps.*number of optimizer steps"):
        search.export()
    train(search, optimizer, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.export()
