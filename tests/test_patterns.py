"""What design.md section 4 promises, on each structural pattern that a network may have (`patterns.py`).

What must be free is free, with its kind and size; for random structures the gated model equals the exported one, and
predicted costs equal counted ones.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from nets import countable, difference, floats_of, kinds, non_trivial, num_params, outputs, run
from patterns import EXPECTED, PATTERNS, MeanGate, conv
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dmscale
from dmscale.gates import attach as attach_gates
from dmscale.gates import masks_of

aten = torch.ops.aten
UNCOUNTED = {"lstm_two_layers"}
"""torch.utils.flop_counter sees nothing of an LSTM, which runs as one operator; `test_cost` checks it by its formula."""


@functools.cache
def traced(name: str) -> tuple[nn.Module, Any, dmscale.SearchSpace]:
    torch.manual_seed(0)
    model, inputs = PATTERNS[name]()
    return non_trivial(model), inputs, dmscale.trace(model, inputs)


def structures(space):
    yield from (space.sample(seed=seed) for seed in range(2))
    yield space.uniform(0.5, depth=True)
    yield space.structure({n: d.lowest for n, d in space.dimensions.items()})


def counted_macs(model, inputs):
    """As in `nets`, and what PyTorch's counter passes over: products with vectors, and those of groups of rows."""
    vectors = {
        aten._grouped_mm: lambda a, b, *rest, out_shape=None, **_: 2 * a[0] * a[1] * b[-1],
        aten.mv: lambda a, b, out_shape=None, **_: 2 * a[0] * a[1],
        aten.vdot: lambda a, b, out_shape=None, **_: 2 * a[0],
        aten.dot: lambda a, b, out_shape=None, **_: 2 * a[0],
    }
    with countable(), FlopCounterMode(display=False, custom_mapping=vectors) as counter:
        outputs(model, inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PATTERNS)
def test_what_must_be_free_is_free_and_nothing_else(name):
    space = traced(name)[2]
    assert kinds(space) == EXPECTED[PATTERNS[name]], space.frozen
    assert not any("trial" in reason for reason in space.frozen.values())
    assert not space.trace.record.unknown


@pytest.mark.parametrize("name", PATTERNS)
def test_gated_equals_exported_and_predicted_costs_are_counted(name):
    model, inputs, space = traced(name)
    for structure in structures(space):
        small = space.export(structure, verify=False)
        assert difference(outputs(small, inputs), outputs(space.gate(structure), inputs)) <= 1e-4
        cost = space.cost(structure)
        assert cost.params == num_params(small) and cost.uncounted == ()
        if name not in UNCOUNTED:
            assert cost.macs == counted_macs(small, inputs)
    assert cost.params < 0.5 * space.cost().params  # the last one keeps the least of everything


@pytest.mark.parametrize("name", ["global_response_norm", "channels_first_norm", "spatial_attention", "checkpointed"])
def test_a_search_learns_through_every_pattern(name):
    """Gradients reach every mask through reductions and recomputation; the search ends on its budget."""
    model, inputs, space = traced(name)
    search = dmscale.Search(space, "60% params", 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    search.attach(optimizer)
    grads = []
    while not search.done:
        sum(t.square().mean() for t in floats_of(run(search.model, inputs))).backward()
        grads.append([p.grad.clone() for p in masks_of(search.model)._list if p.grad is not None])
        assert all(bool(g.isfinite().all()) for g in grads[-1])
        optimizer.step()
        optimizer.zero_grad()
    small = search.export()
    assert len(grads[0]) == len(masks_of(search.model)._list) and all(bool(g.any()) for g in grads[0])
    assert num_params(small) <= 0.6 * num_params(model)


def test_what_must_shrink_with_a_width_does():
    """Tables of rotary positions, slopes of heads, fixed filters: buffers follow their axes, positions stay."""
    _, _, space = traced("rotary_tables")
    small = space.export(space.uniform(0.5))
    assert small.attn.cos.shape == small.attn.sin.shape == (16, 2)
    _, _, space = traced("alibi")
    small = space.export(space.uniform(0.5))
    assert small.attn.slopes.shape == (2,) and small.attn.distance.shape == (7, 7) and small.attn.heads == 2
    _, _, space = traced("haar")
    small = space.export(space.structure({"0.0": 3}))
    assert small[1].filters.shape == (12, 1, 2, 2) and small[1].channels == 3


def test_channels_that_are_split_evenly_stay_so():
    """Half of the channels of one unit are two quarters of the one before: three axes that keep one share."""
    _, inputs, space = traced("split_shuffle")
    linked = next(d for d in space.dimensions.values() if len(d.axes) > 1)
    assert sorted(a.size for a in linked.axes) == [5, 5, 10]
    for keep in range(1, 5):
        structure = space.structure({linked.name: keep})
        assert difference(outputs(space.export(structure), inputs), outputs(space.gate(structure), inputs)) <= 1e-4


def test_what_is_normalised_to_its_mean_keeps_two_elements():
    """LayerNorm of one channel is its bias, whatever comes in; a root mean square of one is its sign."""
    for norm, least in ((nn.LayerNorm(9), 2), (nn.RMSNorm(9), 1), (nn.GroupNorm(9, 9), 1)):
        space = dmscale.trace(nn.Sequential(nn.Linear(3, 9), norm, nn.Linear(9, 2)), torch.randn(4, 3))
        assert [d.lowest for d in space.dimensions.values()] == [least]


class Cached(nn.Module):
    """A recurrence whose first state is laid out by a number that nothing reads without a cache (RWKV)."""

    class Config:
        def __init__(self):
            self.width, self.use_cache = 12, True

    class Cache:
        def __init__(self, state):
            self.state = state

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        self.embed, self.inner, self.out, self.head = (nn.Linear(*s) for s in ((6, 12), (12, 12), (12, 12), (12, 5)))

    def forward(self, x):
        x = self.embed(x)
        y = self.inner(x)
        if not self.config.use_cache:
            return self.head(x + self.out(y)), None
        state = x.new_zeros(x.shape[0], self.config.width)
        return self.head(x + self.out(y + state) + state), self.Cache(state)


def test_a_cache_that_is_made_by_a_number_follows():
    """What runs without its cache but not with it is traced with it: widths that share the number keep one share."""
    model, x = non_trivial(Cached()), torch.randn(2, 6)
    space = dmscale.trace(model, x)
    assert [(d.size, len(d.axes)) for d in space.dimensions.values()] == [(12, 1)] and model.config.use_cache
    for seed in range(3):
        small = space.export(space.sample(seed=seed))
        assert small.config.width == small.head.in_features and small(x)[1].state.shape[1] == small.config.width


class Listing(nn.Module):
    """A width that the forward reads from a list in its config (PVT)."""

    class Config:
        def __init__(self):
            self.widths, self.seed = [7, 14], 3

    def __init__(self):
        super().__init__()
        self.config = self.Config()
        self.embed, self.head = nn.Linear(6, 7), nn.Linear(14, 5)
        self.widen = nn.Linear(7, 14)

    def forward(self, x):
        return self.head(self.widen(self.embed(x)).reshape(x.shape[0], -1, self.config.widths[-1]))


def test_a_number_in_a_list_of_a_config_follows():
    """The exported model has a list of its own; the user's is as it was."""
    model, x = non_trivial(Listing()), torch.randn(2, 7, 6)
    space = dmscale.trace(model, x)
    assert kinds(space) == {("width", 7): 1, ("width", 14): 1}
    small = space.export(space.structure({"embed": 3, "widen": 9}))
    assert small.config.widths == [7, 9] and model.config.widths == [7, 14]


class Experts(nn.Module):
    """Rows go where the first number in them says; each expert gets its own, and one that gets none is not called."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 14), nn.Linear(14, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(14, 9), nn.ReLU(), nn.Linear(9, 14)) for _ in range(3))

    def forward(self, x):
        to, x = x[:, 0].abs().long(), self.embed(x)
        y = torch.zeros_like(x)
        for i in to.unique().tolist():
            rows = (to == i).nonzero()[:, 0]
            y = y.index_add(0, rows, self.experts[i](x[rows]))
        return self.head(x + y)


def test_an_expert_that_the_example_does_not_reach_follows():
    """Its axes are those of the others; its rows, and theirs, are counted as the example sends them."""
    model, x = non_trivial(Experts()), torch.randn(12, 6)
    x[:, 0] = torch.tensor([0.5, 1.5]).repeat(6)
    space = dmscale.trace(model, x)
    assert kinds(space) == {("width", 14): 1, ("width", 9): 3}, space.frozen
    assert all(len(d.axes) == 1 for d in space.dimensions.values())  # that their sizes were compared links nothing
    assert space.routed == ("experts.0", "experts.1", "experts.2")
    assert sum("experts.2" in u for u in space.cost().uncounted) == 1
    assert space.cost().macs == counted_macs(model, x)
    other = x.clone()
    other[:, 0] = torch.tensor([0.5, 1.5, 2.5]).repeat(4)
    for structure in structures(space):
        small = space.export(structure)
        assert small.experts[2][0].in_features == small.head.in_features
        assert difference(outputs(small, other), outputs(space.gate(structure), other)) <= 1e-4


# -- reductions over a part of an axis --------------------------------------------------------------------------------

CALLS = {
    "sum": lambda x: x.sum(1),
    "sum of all": lambda x: x.sum(),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "vector norm": lambda x: torch.linalg.vector_norm(x, 3, (1, 2)),
    "mean": lambda x: x.mean((1, -1), keepdim=True),
    "mean by torch": lambda x: torch.mean(input=x, dim=1),
    "variance": lambda x: x.var(1),
    "biased variance": lambda x: x.var(1, False),
    "unbiased over two": lambda x: torch.var(x, (1, 2), unbiased=True, keepdim=True),
    "correction": lambda x: x.std((1, 2), correction=0),
    "deviation of all": lambda x: x.std(),
    "largest": lambda x: x.amax(1),
    "smallest": lambda x: torch.amin(x, dim=(1, 2)),
    "maximum": lambda x: x.max(1)[0],
    "minimum of all": lambda x: x.min(),
}


class Reduces(nn.Module):
    """A reduction of what a convolution makes, beside one of the same name that no mask concerns."""

    def __init__(self, call):
        super().__init__()
        self.make, self.call, self.last = nn.Linear(3, 9), call, nn.Linear(9, 2)

    def forward(self, x):
        first = self.call(x)
        y = self.make(x).transpose(1, 2)  # (b, 9, n)
        return self.call(y), self.last(y.transpose(1, 2)), first


@pytest.mark.parametrize("name", CALLS)
def test_a_reduction_over_what_is_kept(name):
    """One free axis, whichever function is called and however; the result is that of the smaller tensor."""
    model, x = Reduces(CALLS[name]), torch.randn(2, 5, 3)
    space = dmscale.trace(model, x)
    assert kinds(space) == {("width", 9): 1}, space.frozen
    assert [s.number for s in space.sites.calls] in ([1], [])  # a sum may have its weights masked instead
    for seed in range(3):
        structure = space.sample(seed=seed + 1)
        if name == "variance" and structure.sizes["make"] == 1:
            continue  # 0 / 0 in the smaller model too
        expected = outputs(space.export(structure), x)
        assert difference(outputs(space.gate(structure), x), expected) <= 1e-5


@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("largest", "smallest", "maximum", "minimum of all")])
def test_the_gradient_of_a_mask_through_a_reduction(name):
    """Against finite differences, for soft masks."""
    model, x = Reduces(CALLS[name]).double(), torch.randn(2, 5, 3, dtype=torch.double)
    space = dmscale.trace(model, x)
    (axis,) = space.dimensions["make"].axes

    def result(mask):
        gated = attach_gates(model, space.sites, {axis: mask}, {}, trainable=True)
        total = sum(t.sum() for t in floats_of(gated(x)))
        return total, masks_of(gated).widths[axis]

    mask = torch.rand(9, dtype=torch.double) * 0.5 + 0.5
    total, leaf = result(mask)
    total.backward()
    for i in range(0, 9, 4):
        step = torch.zeros(9, dtype=torch.double)
        step[i] = 1e-6
        slope = (result(mask + step)[0] - result(mask - step)[0]) / 2e-6
        assert float(leaf.grad[i]) == pytest.approx(float(slope), rel=1e-4, abs=1e-6)


def test_positions_of_a_maximum_are_no_part_of_it():
    """Which channel is largest is a number of the full width: where it is read, the axis stays."""

    class Which(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.last = nn.Linear(3, 9), nn.Linear(9, 2)

        def forward(self, x):
            value, where = self.make(x).max(-1, keepdim=True)
            return self.last(self.make(x)) + value * where

    assert "numbers of its elements" in dmscale.trace(Which(), torch.randn(2, 3)).frozen["make"]


def test_nested_forwards_count_alike():
    """Masked forwards inside one another each find their own calls, called twice or not at all."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate, self.second = conv(3, 10), MeanGate(), conv(10, 8)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = x - x.mean(1, keepdim=True)
            x = self.gate(self.gate(self.first(x)))
            x = self.second(x - x.mean(1, keepdim=True))
            return self.head(x * x.std(1, keepdim=True))

    model, x = non_trivial(Outer()), torch.randn(2, 3, 5, 5)
    space = dmscale.trace(model, x)
    assert kinds(space) == {("width", 10): 1, ("width", 8): 1}
    assert {(s.module, s.name, s.number) for s in space.sites.calls} == {
        ("gate", "mean", 0), ("", "mean", 3), ("", "std", 0)
    }  # fmt: skip
    for seed in range(3):
        structure = space.structure({"first.0": 3 + seed, "second.0": 2 + seed})
        assert difference(outputs(space.export(structure), x), outputs(space.gate(structure), x)) <= 1e-5


def test_what_nobody_reads_freezes_nothing():
    """The scores of `nn.MultiheadAttention`, averaged over the heads, are handed out and mostly dropped."""

    class Dropped(nn.Module):
        def __init__(self, read):
            super().__init__()
            self.read, self.embed, self.head = read, nn.Linear(6, 24), nn.Linear(24, 5)
            self.attn = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, x):
            x = self.embed(x)
            y, scores = self.attn(x, x, x)
            return self.head(y) * (scores.mean() if self.read else 1.0)

    x = torch.randn(2, 7, 6)
    assert any(d.kind == "heads" for d in dmscale.trace(Dropped(False), x).dimensions.values())
    assert "mean over it" in str(dmscale.trace(Dropped(True), x).frozen)
