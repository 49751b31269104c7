"""Export: every structural pattern, cut by random structures, equals the gated model and is what its sizes say."""

from __future__ import annotations

import copy
import functools
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import (
    EXPECTED,
    NETS,
    assert_same,
    counted_macs,
    difference,
    fingerprint,
    floats_of,
    kinds,
    non_trivial,
    num_params,
    outputs,
    run,
)  # fmt: skip
from torch import nn

import dmscale
from dmscale import budget, export


@functools.cache
def space(name):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    return dmscale.trace(non_trivial(model), inputs)


def agrees(over, structure):
    """Export `structure`, compare with the gated model and the predicted cost; the exported model."""
    small = over.export(structure, verify=False)
    inputs = over.example_inputs
    assert difference(outputs(small, inputs), outputs(over.gate(structure), inputs)) <= 1e-4
    cost = over.cost(structure)
    assert cost.params == num_params(small)
    if not any(isinstance(m, nn.LSTM) for m in small.modules()):  # which PyTorch's counter does not see
        assert cost.macs == counted_macs(small, inputs)
    return small


@pytest.mark.parametrize("name", NETS)
def test_the_dimensions_are_those_of_the_network(name):
    """Neither fewer nor more, each with a name of its own, and every frozen axis with a reason."""
    over = space(name)
    assert kinds(over) == EXPECTED[NETS[name]], over.frozen
    assert all(reason and "trial" not in reason for reason in over.frozen.values())
    assert not set(over.dimensions) & set(over.frozen)
    shown = str(over)
    assert all(n in shown for n in over.dimensions)


@pytest.mark.parametrize("name", NETS)
def test_export_equals_gate(name):
    over = space(name)
    for structure in (over.uniform(0.5), over.uniform(0.5, depth=True), *(over.sample(seed=s) for s in range(4))):
        agrees(over, structure)


@pytest.mark.parametrize("name", NETS)
def test_one_dimension_at_a_time(name):
    """At its minimum, all others full: a wrong slice of one cannot hide behind another."""
    over = space(name)
    for dimension, d in over.dimensions.items():
        small = agrees(over, over.structure({dimension: d.lowest}, over.magnitudes()))
        if d.kind != "depth" and d.size > d.lowest:
            assert num_params(small) < num_params(over.model)


@pytest.mark.parametrize("name", NETS)
def test_everything_at_its_minimum(name):
    over = space(name)
    agrees(over, budget.smallest(over))


@pytest.mark.parametrize("name", NETS)
def test_the_full_structure_is_bit_identical(name):
    over = space(name)
    same = over.export(over.full())
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(same, over.example_inputs), outputs(over.model, over.example_inputs))
    )
    for (n, a), (m, b) in zip(same.state_dict().items(), over.model.state_dict().items()):
        assert n == m and torch.equal(a, b) and a.data_ptr() != b.data_ptr()  # a copy, in every tensor


@given(data=st.data())
@settings(max_examples=25)
@pytest.mark.parametrize(
    "name", ["grouped", "unet", "gqa_by_expand", "rotary_half", "dense_concat", "transformer_encoder"]
)
def test_any_structure_exports(name, data):
    """Sizes and elements drawn at will."""
    over = space(name)
    sizes, scores = {}, {}
    for n, d in over.dimensions.items():
        sizes[n] = data.draw(st.integers(d.lowest, d.size))
        for member, total in over._members(d):
            scores[member] = data.draw(st.permutations(range(total)))
    structure = over.structure(sizes, scores)
    for n, d in over.dimensions.items():
        assert structure.sizes[n] == d.allowed(sizes[n]) and abs(structure.sizes[n] - sizes[n]) <= d.multiple
    agrees(over, structure)
    assert dmscale.Structure.from_json(structure.to_json()) == structure


@pytest.mark.parametrize("name", NETS)
def test_the_exported_model_is_plain(name):
    """It copies, pickles, trains, and its layers describe themselves rightly."""
    over = space(name)
    small = over.export(over.sample(seed=1))
    assert type(small) is type(over.model)
    expected = outputs(small, over.example_inputs)
    pickled = pickle.dumps(small)
    assert b"dmscale." not in pickled
    for twin in (copy.deepcopy(small), pickle.loads(pickled)):
        assert all(torch.equal(a, b) for a, b in zip(outputs(twin, over.example_inputs), expected))
    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif isinstance(module, nn.modules.conv._ConvNd):
            own = type(module)(
                module.in_channels, module.out_channels, module.kernel_size, groups=module.groups, bias=module.bias is not None
            )  # fmt: skip
            assert own.weight.shape == module.weight.shape
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            assert tuple(module.normalized_shape) == (
                tuple(module.weight.shape) if module.weight is not None else tuple(module.normalized_shape)
            )
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            assert module.num_features == len(module.weight) == len(module.running_mean)
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight)
        elif isinstance(module, nn.MultiheadAttention):
            assert module.head_dim * module.num_heads == module.embed_dim == module.out_proj.weight.shape[0]
    twin = copy.deepcopy(small).train()
    optimizer = torch.optim.SGD(twin.parameters(), 1e-2)
    sum(t.square().mean() for t in floats_of(run(twin, over.example_inputs))).backward()
    assert all(bool(p.grad.isfinite().all()) for p in twin.parameters() if p.grad is not None)
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(twin.parameters(), small.parameters()))


@pytest.mark.parametrize("name", NETS)
def test_the_users_model_is_untouched(name):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    before = fingerprint(model.train())
    over = dmscale.trace(model, inputs)
    over.export(over.sample(seed=2))
    assert_same(before, fingerprint(model))


# -- what single patterns must do -------------------------------------------------------------------------------------


def test_a_plain_chain_offers_no_depth():
    assert not [d for n in ("conv_chain", "mlp", "unet") for d in space(n).dimensions.values() if d.kind == "depth"]


def test_elements_that_stay_are_those_of_the_structure():
    over = space("mlp")
    structure = over.structure({"0": 3}, {"0": [float(i in (4, 9, 30)) for i in range(32)]})
    small = over.export(structure)
    assert structure.kept["0"] == (4, 9, 30)
    assert torch.equal(small[0].weight, over.model[0].weight[[4, 9, 30]])
    assert torch.equal(small[1].running_mean, over.model[1].running_mean[[4, 9, 30]])
    assert torch.equal(small[3].weight, over.model[3].weight[:, [4, 9, 30]])


def test_groups_follow_the_number_of_groups():
    over = space("grouped")
    by_size = {d.size: n for n, d in over.dimensions.items()}
    small = over.export(over.structure({by_size[4]: 2, by_size[6]: 5, by_size[5]: 3}))
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (2, 10, 6)


def test_a_depthwise_convolution_stays_one():
    over = space("depthwise_multiplier")
    by_size = {d.size: n for n, d in over.dimensions.items()}
    small = over.export(over.structure({by_size[10]: 4, by_size[3]: 2}))
    assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (4, 4, 8)


def test_both_halves_of_a_fused_glu_shrink_alike():
    small = space("glu_by_chunk").export(space("glu_by_chunk").uniform(0.5))
    assert (small.both.out_features, small.out.in_features) == (14, 7)
    kept = list(space("glu_by_chunk").uniform(0.5).kept.values())[0]
    rows = [*kept, *(14 + k for k in kept)]
    assert torch.equal(small.both.weight, space("glu_by_chunk").model.both.weight[rows])


def test_heads_set_the_attributes_that_the_forward_reads():
    over = space("gqa_by_expand")
    by = {(d.kind, d.size): n for n, d in over.dimensions.items()}
    small = over.export(over.structure({by["heads", 3]: 2, by["heads", 2]: 1}))
    assert (small.attn.repeats, small.attn.head_dim) == (1, 8)
    assert small.attn.q.out_features == 2 * 1 * 8 and small.attn.k.out_features == 2 * 8
    small = space("split_attention").export(space("split_attention").structure({"attn heads": 1}))
    assert small.attn.heads == 1 and small.attn.q.out_features == small.attn.proj.in_features == 8


def test_removed_blocks_renumber_the_others():
    over = space("residual_stack")
    structure = over.structure({"blocks depth": 3}, {"blocks depth": [1.0, 0.0, 1.0, 0.0, 1.0]})
    small = over.export(structure)
    assert [b.layer_idx for b in small.blocks] == [0, 1, 2] and list(dict(small.blocks.named_children())) == [
        "0",
        "1",
        "2",
    ]
    assert [b.layer_idx for b in over.model.blocks] == [0, 1, 2, 3, 4]
    for mine, i in zip(small.blocks, (0, 2, 4)):
        assert torch.equal(mine.up.weight, over.model.blocks[i].up.weight)


def test_tied_weights_stay_tied():
    over = space("tied_embeddings")
    small = over.export(over.uniform(0.5))
    assert small.head.weight is small.embed.weight and small.embed.weight.shape == (30, 9)
    assert (small.embed.embedding_dim, small.head.in_features) == (9, 9)


def test_buffers_shrink_and_positions_do_not():
    over = space("buffers")
    small = over.export(over.uniform(0.5))
    k = over.uniform(0.5).sizes["first"]
    assert small.scale.shape == (k,) and small.sign.shape == (1, k) and small.sign.dtype == torch.int64
    over = space("positions")
    small = over.export(budget.smallest(over))
    assert small.ids.shape == (1, 32) and small.fixed.shape == (32, 1) and small.learned.shape == (1, 32, 1)
    longer = torch.randn(1, 32, 6)
    assert difference(outputs(small, longer), outputs(over.gate(budget.smallest(over)), longer)) <= 1e-4


@pytest.mark.parametrize(
    "name", ["unet", "gqa_native", "residual_stack", "transformer_encoder", "pixel_shuffle", "branch_on_value"]
)
def test_other_inputs_than_the_example_agree(name):
    """Another batch size, and another length or image where the network takes one."""
    over = space(name)
    structure = over.uniform(0.5)
    small, gated = over.export(structure), over.gate(structure)
    shape = list(over.example_inputs.shape)
    for batch, scale in ((1, 1), (5, 1), (2, 2)):
        longer = [batch, *shape[1:]] if len(shape) == 2 else [batch, *(n * scale for n in shape[1:-1]), shape[-1]]
        if len(shape) == 4:
            longer = [batch, shape[1], *(n * scale for n in shape[2:])]
        x = torch.randn(longer)
        assert difference(outputs(small, x), outputs(gated, x)) <= 1e-4


def test_the_plan_does_the_same_to_a_fresh_model():
    over = space("residual_stack")
    small = over.export(over.structure({"blocks depth": 2, "blocks.1.up": 5}))
    torch.manual_seed(0)
    fresh = export.replay(NETS["residual_stack"]()[0], small.dmscale_plan)
    assert len(fresh.blocks) == 2 and [b.layer_idx for b in fresh.blocks] == [0, 1]


def test_batchnorm_is_recalibrated_as_a_plain_average():
    over = space("residual_conv")
    small = over.export(over.uniform(0.5))
    batches = [torch.randn(4, 3, 8, 8) + 1 for _ in range(3)]
    modes = [m.training for m in small.modules()]
    weights = {n: p.clone() for n, p in small.named_parameters()}
    dmscale.recovery.recalibrate(small, batches)
    seen = torch.cat([small[0](b) for b in batches]).detach()
    torch.testing.assert_close(small[1].running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert [m.training for m in small.modules()] == modes
    assert all(torch.equal(p, weights[n]) for n, p in small.named_parameters())
    assert small[1].momentum == over.model[1].momentum


@pytest.mark.parametrize("batches", ["none", "of another width"])
def test_statistics_stay_where_nothing_can_be_measured(batches):
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    model(torch.randn(16, 8))
    before = {n: b.clone() for n, b in model.named_buffers()}
    given = iter([]) if batches == "none" else [torch.randn(4, 8), torch.randn(4, 7)]
    with pytest.raises(dmscale.DmscaleError if batches == "none" else RuntimeError, match="no batch to measure|mat1"):
        dmscale.recovery.recalibrate(model, given)
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    assert model.training and model[1].momentum == 0.1


@pytest.mark.parametrize("name", ["unet", "residual_conv", "gqa_by_expand", "branch_on_value"])
def test_the_exported_model_goes_through_torch_export(name):
    over = space(name)
    if name == "branch_on_value":
        pytest.skip("torch.export takes no branch on values, of any model")
    small = over.export(over.uniform(0.5))
    exported = torch.export.export(small, (over.example_inputs,))
    assert difference(outputs(exported.module(), over.example_inputs), outputs(small, over.example_inputs)) <= 1e-5


# -- sizes kept in one object for all modules ------------------------------------------------------------------


class Sizes(NamedTuple):
    heads: int
    dim: int


@dataclass(frozen=True)
class FrozenSizes:
    heads: int
    dim: int


class SizedAttention(nn.Module):
    """Attention that reads the number and size of its heads from whatever it was given."""

    def __init__(self, sizes, width=16):
        super().__init__()
        self.sizes = sizes
        self.q, self.k, self.v = (nn.Linear(width, self.of("heads") * self.of("dim")) for _ in range(3))
        self.out = nn.Linear(self.of("heads") * self.of("dim"), width)

    def of(self, name):
        return self.sizes[name] if isinstance(self.sizes, dict) else getattr(self.sizes, name)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (m(x).view(b, n, self.of("heads"), self.of("dim")).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(
            1, 2
        )  # (B, heads, N, dim) -> (B, N, heads, dim)
        return x + self.out(y.reshape(b, n, self.of("heads") * self.of("dim")))


@pytest.mark.parametrize(
    "sizes", [{"heads": 4, "dim": 6, "drop": 0.1}, Sizes(4, 6), FrozenSizes(4, 6)], ids=["dict", "tuple", "dataclass"]
)
def test_sizes_may_be_kept_in_a_dict_a_named_tuple_or_an_object(sizes):
    def make():
        torch.manual_seed(0)
        blocks = (SizedAttention(sizes) for _ in range(2))  # both hold one object
        return non_trivial(nn.Sequential(nn.Linear(5, 16), *blocks, nn.Linear(16, 3)))

    model, before = make(), copy.deepcopy(sizes)
    own = dmscale.trace(model, torch.randn(2, 7, 5))
    assert {n: d.size for n, d in own.dimensions.items()} == {
        "residual width": 16, "1 heads": 4, "1 head_dim": 6, "2 heads": 4, "2 head_dim": 6, "depth": 2,
    }  # fmt: skip
    structure = own.structure({"1 heads": 3, "2 heads": 1, "2 head_dim": 5, "residual width": 9})
    small = agrees(own, structure)
    assert [(m.of("heads"), m.of("dim")) for m in small[1:3]] == [(3, 6), (1, 5)]
    assert type(small[1].sizes) is type(sizes) and type(small[1].of("heads")) is int
    assert sizes == before and model[1].sizes is sizes and model[2].sizes is sizes
    again = export.replay(make(), getattr(small, export.PLAN))
    assert [m.sizes for m in again[1:3]] == [m.sizes for m in small[1:3]]


def test_a_dict_through_which_modules_hand_tensors_stays_one():
    """What one module puts there another one takes; a copy for each would lose it."""

    class Writer(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared, self.layer = shared, nn.Linear(5, 8)

        def forward(self, x):
            self.shared["seen"] = self.layer(x)
            return x

    class Reader(Writer):
        def forward(self, x):
            return self.shared["seen"]

    shared = {"width": 8, "seen": torch.zeros(1)}
    model = nn.Sequential(Writer(shared), Reader(shared), nn.Linear(8, 2))
    own = dmscale.trace(model, torch.randn(3, 5))
    assert {n: d.size for n, d in own.dimensions.items()} == {"0.layer": 8}
    agrees(own, own.uniform(0.5))


class Positions(nn.Module):
    """A table that is a plain attribute, as many write it; `late` makes it in the first forward that needs it."""

    def __init__(self, width: int, late: bool = False):
        super().__init__()
        self.width = width
        self.table = None if late else self.made()

    def made(self):
        at = torch.arange(40)[:, None] / (1 + torch.arange(self.width))
        return at.sin().unsqueeze(0)

    def forward(self, x):
        if self.table is None:
            self.table = self.made()
        return x + self.table[:, : x.shape[1]].to(x.device)


class WithTables(nn.Module):
    def __init__(self, late: bool = False):
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.positions, self.again = Positions(12, late), Positions(12, late)
        self.again.table = self.positions.table
        self.scale, self.inner, self.outer = torch.rand(9) + 0.5, nn.Linear(12, 9), nn.Linear(9, 12)
        self.mixing, self.behind = torch.randn(12, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = self.again(self.positions(self.first(x)))
        x = x + self.outer(self.inner(x).relu() * self.scale)
        return self.last(x) + self.behind(x @ self.mixing)


@pytest.mark.parametrize("late", [False, True])
def test_tensors_that_are_plain_attributes_are_sliced_too(late, tmp_path):
    def make():
        torch.manual_seed(0)
        return non_trivial(WithTables(late))

    model, x = make(), torch.randn(2, 6, 5)
    model(x)  # makes what is made late
    own, before = dmscale.trace(model, x), model.scale.clone()
    assert {n: d.size for n, d in own.dimensions.items()} == {"residual width": 12, "inner": 9, "width": 7}
    for seed in range(4):
        structure = own.sample(seed)
        small = agrees(own, structure)
        assert small.positions.table.shape == (1, 40, structure.sizes["residual width"])
        assert late or small.again.table is small.positions.table
        dmscale.save(small, tmp_path / "small.safetensors")
        loaded = dmscale.load(tmp_path / "small.safetensors", make).eval()
        assert difference(outputs(loaded, x), outputs(small, x)) < 1e-6
        assert late or loaded.again.table is loaded.positions.table
    assert torch.equal(model.scale, before) and model.positions.table.shape == (1, 40, 12)
    large = dmscale.expand(model, x, width=2)
    assert large.scale.shape == (18,) and difference(outputs(large, x), outputs(model, x)) < 1e-5


class Widths:
    def __init__(self, width):
        self.width = width


class LoadsByItself(nn.Module):
    """Built from its config, with a way of its own to load weights, which takes no `assign` (networks for super-resolution)."""

    config_class = Widths

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first, self.last = nn.Linear(4, config.width), nn.Linear(config.width, 3)

    def forward(self, x):
        return self.last(self.first(x).relu())

    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict(state_dict, strict)


def test_a_class_may_load_weights_in_a_way_of_its_own():
    space = dmscale.trace(LoadsByItself(Widths(16)).eval(), torch.randn(2, 4))
    assert space.export(space.uniform(0.5)).config.width == 8
