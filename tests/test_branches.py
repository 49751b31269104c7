"""Attention and MLP of one block as removable branches: offered where they are all that a block does, replaced by zeros."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from nets import (
    NETS,
    FusedAttention,
    assert_same,
    counted_macs,
    difference,
    fingerprint,
    kinds,
    non_trivial,
    num_params,
    outputs,
)
from patterns import PATTERNS
from torch import nn

import dmscale

FORMS = ("tensor", "tuple", "keyword")


class Attention(FusedAttention):
    """Gives its output alone, or with scores that nobody reads; takes options that it ignores."""

    def __init__(self, form, layer_idx):
        super().__init__(24, 3)
        self.form, self.layer_idx = form, layer_idx

    def forward(self, hidden, mask=None, *, seen=None, **options):
        if seen is not None:
            seen.append(self.layer_idx)
        out = super().forward(hidden)
        return out if self.form == "tensor" else (out, hidden.mean(-1), mask)


class Block(nn.Module):
    """Pre-norm, in sequence or in parallel, with layer scale and dropout on the way."""

    def __init__(self, form, parallel, layer_idx):
        super().__init__()
        self.form, self.parallel = form, parallel
        self.norm1, self.norm2, self.attn = nn.LayerNorm(24), nn.LayerNorm(24), Attention(form, layer_idx)
        self.mlp = nn.Sequential(nn.Linear(24, 30), nn.GELU(), nn.Linear(30, 24))
        self.register_buffer("scale", torch.ones(1))
        self.gamma, self.drop = nn.Parameter(torch.ones(24)), nn.Dropout(0.1)

    def attention(self, x, seen):
        if self.form == "tensor":
            return self.attn(x, seen=seen)
        if self.form == "tuple":
            return self.attn(x, None)[0]
        out, _, mask = self.attn(hidden=x, seen=seen, mask=self.scale, other=1)
        return out * mask  # handed on

    def forward(self, x, seen=None):
        if self.parallel:
            return x + self.attention(self.norm1(x), seen) + self.mlp(self.norm2(x))
        x = x + self.drop(self.gamma * self.attention(self.norm1(x), seen))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, form="tensor", parallel=False):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 24), nn.Linear(24, 5)
        self.blocks = nn.ModuleList(Block(form, parallel, i) for i in range(4))

    def forward(self, x, seen=None):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, seen)
        return self.head(x)


def net(form="tensor", parallel=False):
    torch.manual_seed(0)
    return non_trivial(Net(form, parallel)), torch.randn(2, 7, 6)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_branches_are_offered_and_exact(form, parallel):
    model, x = net(form, parallel)
    before = fingerprint(model)
    space = dmscale.trace(model, x, branches=True)
    depths = {n: d.size for n, d in space.dimensions.items() if d.kind == "depth"}
    assert depths == {"blocks attn depth": 4, "blocks mlp depth": 4}
    structures = [space.sample(seed=s) for s in range(3)]
    structures += [space.structure({n: 1}) for n in depths]
    for structure in structures:
        small = space.export(structure)
        assert difference(outputs(small, x), outputs(space.gate(structure), x)) <= 1e-4
        assert space.cost(structure).macs == counted_macs(small, x)
        assert space.cost(structure).params == num_params(small)
    assert_same(before, fingerprint(model))


def test_without_the_option_whole_blocks_are_offered():
    model, x = net()
    assert {n for n, d in dmscale.trace(model, x).dimensions.items() if d.kind == "depth"} == {"blocks depth"}


@pytest.mark.parametrize("form", FORMS)
def test_a_model_without_a_branch_is_plain(form, tmp_path):
    """It pickles, copies, compiles to a graph, trains with a gradient for every parameter, saves and loads."""
    model, x = net(form)
    space = dmscale.trace(model, x, branches=True)
    structure = space.structure({"blocks attn depth": 2, "blocks mlp depth": 3}, space.magnitudes())
    small = space.export(structure)
    expected = outputs(small, x)
    pickled = pickle.dumps(small)
    assert b"dmscale." not in pickled
    dmscale.save(small, tmp_path / "small.safetensors", structure)
    loaded = dmscale.load(tmp_path / "small.safetensors", lambda: Net(form)).eval()
    for twin in (copy.deepcopy(small), pickle.loads(pickled), loaded, torch.export.export(small, (x,)).module()):
        assert difference(outputs(twin, x), expected) <= 1e-6
    F.mse_loss(small.train()(x), torch.zeros(2, 7, 5)).backward()
    assert all(p.grad is not None for p in small.parameters())  # so that DDP does not wait for one


def test_positions_are_counted_anew():
    """A cache has a slot for each attention that is left."""
    model, x = net()
    space = dmscale.trace(model, x, branches=True)
    scores = {"blocks attn depth": [1, 0, 2, 3]}
    small = space.export(space.structure({"blocks attn depth": 2}, scores))
    seen = []
    small(x, seen)
    assert seen == [0, 1]


def test_a_search_decides_on_branches():
    model, x = net()
    space = dmscale.trace(model, x, branches=True, only="* depth")
    search = dmscale.Search(space, "70% macs", 6)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    search.attach(optimizer)
    while not search.done:
        search.model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    small = search.export()
    assert counted_macs(small, x) <= 0.7 * counted_macs(model, x)


@pytest.mark.parametrize("name", ["residual_conv", "transformer_encoder", "residual_stack", "unet"])
def test_blocks_that_do_more_than_their_branches_stay_whole(name):
    """The two linear layers of PyTorch's own encoder are no module; a post-activation bottleneck has no branch."""
    model, x = NETS[name]()
    non_trivial(model)
    assert kinds(dmscale.trace(model, x, branches=True)) == kinds(dmscale.trace(model, x))


@pytest.mark.parametrize("name", ["repvgg", "low_rank_residual", "tree_aggregation", "multihead_attentions"])
def test_what_is_added_elsewhere_is_no_branch(name):
    """Parallel convolutions, low-rank products, aggregation: sums that are not a stream and what is made from it."""
    model, x = PATTERNS[name]()
    non_trivial(model)
    assert kinds(dmscale.trace(model, x, branches=True)) == kinds(dmscale.trace(model, x))


class Asks(Block):
    """Reads from its branch what a zero does not have."""

    def forward(self, x, seen=None):
        x = x + self.attn(self.norm1(x)).to(self.attn.proj.weight.dtype)
        return x + self.mlp(self.norm2(x))


def test_a_branch_that_cannot_be_zero_leaves_the_block_whole():
    model, x = net()
    model.blocks = nn.ModuleList(Asks("tensor", False, i) for i in range(3))
    space = dmscale.trace(non_trivial(model), x, branches=True)
    assert {n for n, d in space.dimensions.items() if d.kind == "depth"} == {"blocks depth"}
    assert "failed its trial" in space.frozen["blocks attn depth"]


def test_generation_with_a_cache_is_the_same_as_without():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = non_trivial(transformers.LlamaForCausalLM(config))
    ids = torch.randint(0, 50, (2, 7))
    space = dmscale.trace(model, {"input_ids": ids}, branches=True)
    names = ["model.layers self_attn depth", "model.layers mlp depth"]
    assert [n for n, d in space.dimensions.items() if d.kind == "depth"] == names
    small = space.export(space.structure(dict.fromkeys(names, 2), {names[0]: [0, 1, 0, 1], names[1]: [1, 0, 1, 0]}))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(ids, use_cache=True, **options), small.generate(ids, use_cache=False, **options))
