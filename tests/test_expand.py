"""Starting larger: the function stays, new parts can learn, and taking them out gives the network back."""

from __future__ import annotations

import copy
import json
import pickle
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import NETS, assert_same, difference, fingerprint, non_trivial, outputs, run
from torch import nn

import dmscale
from dmscale import axes
from dmscale.axes import Axis

TOLERANCE = 1e-4


# -- networks ---------------------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """As in MobileNetV3: expansion, depthwise convolution, squeeze and excitation, linear projection."""

    def __init__(self, width, hidden):
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise, self.norm2 = (
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
        )
        self.squeeze, self.excite = nn.Conv2d(hidden, 6, 1), nn.Conv2d(6, hidden, 1)
        self.project, self.norm3 = nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.norm2(self.depthwise(self.norm1(self.expand(x)).relu())).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x + self.norm3(self.project(y))


def mobile():
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    blocks = nn.Sequential(InvertedResidual(8, 24), InvertedResidual(8, 20))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)), torch.randn(2, 3, 8, 8)


def demo_cnn():
    from dmscale.demo import ResidualCNN

    return ResidualCNN((6, 10), 2), torch.randn(2, 1, 8, 8)


def demo_vit():
    from dmscale.demo import VisionTransformer

    return VisionTransformer(dim=20, blocks=2, num_heads=3, head_dim=4, hidden=28), torch.randn(2, 1, 8, 8)


def timm_resnet():
    """A thin ResNet-10-T with one block more."""
    pytest.importorskip("timm")
    from timm.models.resnet import BasicBlock, ResNet

    model = ResNet(
        BasicBlock, (2, 1, 1, 1), channels=(8, 12, 16, 20), num_classes=5, stem_width=8, stem_type="deep_tiered",
        avg_down=True,
    )  # fmt: skip
    return model, torch.randn(2, 3, 32, 32)


def timm_vit():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, init_values=0.1
    )
    return model, torch.randn(2, 3, 16, 16)


def llama(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=42, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8, max_position_embeddings=32, pad_token_id=0, eos_token_id=None, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def tied_llama():
    """The embedding is the output layer too: its columns make the residual stream and consume it."""
    return llama(tie_word_embeddings=True)


def qwen3():
    """Normalised queries and keys, and a config with one entry for each layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=32, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 7))}


OWN = {f.__name__: f for f in (mobile, demo_cnn, demo_vit, timm_resnet, timm_vit, llama, tied_llama, qwen3)}
SOME = [
    "conv_chain", "grouped", "depthwise_multiplier", "squeeze_excite", "pixel_shuffle", "conv_transpose", "dense_concat",
    "unet", "glu_by_chunk", "layer_norm_plain", "own_rms_norm", "group_norm", "buffers", "called_twice",
    "shared_parameter", "residual_stack", "residual_conv", "fused_attention", "split_attention", "gqa_by_expand",
    "rotary_half", "multihead_attention", "positions", "tied_embeddings", "dict_output", "conv_lstm",
]  # fmt: skip
FACTORIES = {n: NETS[n] for n in SOME} | OWN


def make(name):
    model, inputs = (FACTORIES.get(name) or NETS[name])()
    return non_trivial(model), inputs


def parameters_equal(a, b):
    p, q = dict(a.named_parameters()), dict(b.named_parameters())
    return p.keys() == q.keys() and all(torch.equal(p[n], q[n]) for n in p)


# -- the function stays, and the way back -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FACTORIES)
def test_the_function_stays_and_the_origin_is_inside(name):
    """Random factors for every dimension and random numbers of blocks; whole factors where statistics are taken."""
    model, inputs = make(name)
    before = fingerprint(model)
    rng = random.Random(name)
    space = dmscale.trace(model, inputs, verify=False)
    width = {n: rng.choice([1, 1.3, 2, 2.6]) for n, d in space.dimensions.items() if d.kind != "depth"}
    width[rng.choice(list(width))] = 2
    depth = {n: d.size + rng.randint(0, 3) for n, d in space.dimensions.items() if d.kind == "depth"}
    try:
        large = dmscale.expand(model, inputs, width=width, depth=depth)
    except (
        dmscale.DmscaleError
    ) as error:  # one dimension that cannot grow by its factor: ask for all, and take what can
        assert "nothing that it names can grow" in str(error)
        large = dmscale.expand(model, inputs, width=2, depth=1.5)
    assert_same(before, fingerprint(model))
    assert type(large) is type(model)
    assert difference(outputs(large, inputs), outputs(model, inputs)) <= TOLERANCE
    grown = large.dmscale_expansion["widened"] | large.dmscale_expansion["deepened"]
    found = dmscale.trace(large, inputs)
    assert grown and found.cost().params > space.cost().params
    origin = dmscale.expansion_origin(found)
    assert found.cost(origin).macs == space.cost().macs
    small = found.export(origin)
    assert parameters_equal(small, model)
    assert difference(outputs(small, inputs), outputs(model, inputs)) <= 1e-6


@pytest.mark.parametrize("name", ["demo_vit", "timm_vit", "llama"])
def test_every_kind_of_width_of_a_transformer_doubles(name):
    model, inputs = make(name)
    large = dmscale.expand(model, inputs, width=2, depth=2)
    before, after = dmscale.trace(model, inputs, verify=False), dmscale.trace(large, inputs, verify=False)
    sizes = {n: d.size for n, d in after.dimensions.items()}
    for n, d in before.dimensions.items():
        wanted = d.size if any(part in n for part in ("head_dim", "per group")) else 2 * d.size
        assert sizes[n] == wanted, n  # the first block keeps its place, so every name is there again
    assert difference(outputs(large, inputs), outputs(model, inputs)) <= TOLERANCE


def test_half_factors_leave_normalised_axes_alone_and_say_so():
    model, inputs = make("demo_vit")
    record = dmscale.expand(model, inputs, width=1.5).dmscale_expansion
    assert "only whole multiples" in record["kept"]["residual width"] and "norm" in record["kept"]["residual width"]
    assert record["widened"]["blocks.0.attn heads"] == [3, 5] and record["widened"]["blocks.0.mlp.0"] == [28, 42]
    record = dmscale.expand(model, inputs, width=2.5, only="residual width").dmscale_expansion
    assert record["widened"] == {"residual width": [20, 40]}
    assert "widened by 2 instead of 2.5" in record["kept"]["residual width"]


def test_noise_changes_weights_and_not_the_function():
    model, inputs = make("demo_cnn")
    expected = outputs(model, inputs)
    plain, noisy, other = (
        dmscale.expand(model, inputs, width=2, noise=noise, seed=seed) for noise, seed in ((0, 0), (0.5, 0), (0.5, 1))
    )
    n = model.stem[0].out_channels
    weight = plain.stem[0].weight
    assert torch.equal(weight[:n], model.stem[0].weight) and torch.equal(weight[n:], weight[:n])
    assert not torch.equal(noisy.stem[0].weight[n:], weight[n:]) and torch.equal(noisy.stem[0].weight[:n], weight[:n])
    assert not torch.equal(noisy.stem[0].weight, other.stem[0].weight)
    again = dmscale.expand(model, inputs, width=2, noise=0.5, seed=1)
    assert parameters_equal(other, again)
    for large in (plain, noisy, other):
        assert difference(outputs(large, inputs), expected) <= TOLERANCE


def test_an_exported_network_grows_again():
    model, inputs = make("demo_cnn")
    space = dmscale.trace(model, inputs)
    small = space.export(space.uniform(0.5, depth=True))
    large = dmscale.expand(small, inputs, width=3, depth=3)
    assert not hasattr(large, "dmscale_plan")
    assert difference(outputs(large, inputs), outputs(small, inputs)) <= TOLERANCE
    found = dmscale.trace(large, inputs)
    back = found.export(dmscale.expansion_origin(found))
    assert parameters_equal(back, small) and not hasattr(back, "dmscale_expansion")


def test_the_larger_network_is_plain(tmp_path):
    model, inputs = make("demo_vit")
    large = dmscale.expand(model, inputs, width=2, depth=2)
    data = pickle.dumps(large)
    assert not any(
        type(m).__module__.startswith("dmscale") for m in large.blocks[1].modules() if "demo" not in type(m).__module__
    )
    assert json.loads(json.dumps(large.dmscale_expansion))["added"] == ["blocks.1", "blocks.3"]
    assert not any("_dmscale" in key for m in large.modules() for key in vars(m))
    expected = outputs(large, inputs)
    for twin in (pickle.loads(data), copy.deepcopy(large)):
        assert difference(outputs(twin, inputs), expected) == 0
        assert dmscale.expansion_origin(dmscale.trace(twin, inputs, verify=False)).sizes["blocks depth"] == 2
    dmscale.save(large, tmp_path / "large.safetensors")
    fresh = dmscale.load(
        tmp_path / "large.safetensors", lambda: dmscale.expand(model, inputs, width=2, depth=2, seed=5)
    )
    assert difference(outputs(fresh, inputs), expected) == 0


# -- what is new can learn --------------------------------------------------------------------------------------------


def train(model, inputs, steps=2, rate=0.1):
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((t - 1).square().mean() for t in [run(model, inputs)]).backward()
        optimizer.step()


@pytest.mark.parametrize("noise", [0, 0.1])
def test_copies_come_apart_in_training(noise):
    model, inputs = make("residual_stack" if noise else "demo_vit")
    large = dmscale.expand(model, inputs, width=2, depth=2, noise=noise)
    start = {n: p.detach().clone() for n, p in large.named_parameters()}
    train(large, inputs)
    space = dmscale.trace(large, inputs, verify=False)
    origin = space.widths_of(dmscale.expansion_origin(space))
    for name, dims in space.trace.slots.items():
        for i, dim in enumerate(dims):
            grown = [a for a in axes.atoms(dim) if a in origin and len(origin[a]) < a.size]
            if name in start and grown and len(start[name].shape) > 1:
                masks = {a: torch.isin(torch.arange(a.size), torch.tensor(origin[a])) for a in grown}
                new = (~axes.kept(dim, masks)).nonzero()[:, 0]
                p = dict(large.named_parameters())[name]
                moved = (p - start[name]).index_select(i, new)
                assert bool((moved != 0).any()), (name, i)  # neither zeros nor copies stay where they were


def test_an_added_block_is_the_identity_and_learns():
    model, inputs = make("demo_cnn")
    large = dmscale.expand(model, inputs, depth=2)
    assert large.dmscale_expansion["added"] == [f"stage{s}.{i}" for s in (1, 2) for i in (1, 3)]
    block = large.stage1[1]
    x = torch.rand(2, 6, 4, 4)
    with torch.no_grad():
        assert torch.equal(block(x), x)
    zero = [n for n, p in block.named_parameters() if not p.any()]
    assert zero == ["norm2.weight", "norm2.bias"]  # the scale alone: the convolutions before it keep their weights
    assert torch.equal(block.conv2.weight, model.stage1[0].conv2.weight)
    train(large.train(), inputs, steps=2)
    assert not torch.equal(block.conv1.weight, model.stage1[0].conv1.weight) and block.norm2.weight.any()


@pytest.mark.parametrize(
    "name, zero",
    [
        ("llama", ["self_attn.o_proj.weight", "mlp.down_proj.weight"]),
        ("timm_vit", ["ls1.gamma", "ls2.gamma"]),  # of a layer scale and the projection before it, the last alone
        ("mobile", ["norm3.weight", "norm3.bias"]),
    ],
)
def test_the_last_parameters_of_a_branch_are_zero(name, zero):
    model, inputs = make(name)
    large = dmscale.expand(model, inputs, depth=2)
    for path in large.dmscale_expansion["added"]:
        assert [n for n, p in large.get_submodule(path).named_parameters() if not p.any()] == zero, path
    assert difference(outputs(large, inputs), outputs(model, inputs)) == 0


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_deeper_language_model_generates_with_its_cache(name):
    model, inputs = make(name)
    large = dmscale.expand(model, inputs, width=2, depth={"model.layers depth": 5})
    assert [layer.self_attn.layer_idx for layer in large.model.layers] == list(range(5))
    expected = model.generate(inputs["input_ids"][:1], max_new_tokens=6, do_sample=False)
    for use_cache in (True, False):
        got = large.generate(inputs["input_ids"][:1], max_new_tokens=6, do_sample=False, use_cache=use_cache)
        assert torch.equal(got, expected)
    assert model.config.num_hidden_layers == 2


def test_a_search_from_a_larger_network_comes_back_to_its_own_budget():
    model, inputs = make("demo_cnn")
    macs = dmscale.trace(model, inputs, verify=False).cost().macs
    large = dmscale.expand(model, inputs, width=1.5, depth=2)
    space = dmscale.trace(large, inputs)
    search = dmscale.Search(space, budget={"macs": macs}, steps=6)
    optimizer = torch.optim.SGD(large.parameters(), 0.01)
    search.attach(optimizer)
    search.model.train()
    while not search.done:
        x, y = torch.randn(4, 1, 8, 8), torch.randint(0, 10, (4,))
        nn.functional.cross_entropy(search.model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    small = search.export()
    found = dmscale.trace(small, inputs, verify=False).cost().macs
    assert 0.99 * macs <= found <= macs and found == space.cost(search.structure).macs


# -- what cannot grow, and why ----------------------------------------------------------------------------------------


class Counted(nn.Module):
    """Runs as many blocks as an attribute says."""

    def __init__(self, literal=False):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 12), nn.Linear(12, 4)
        self.blocks = nn.ModuleList(FeedForward() for _ in range(3))
        self.repeats, self.literal = 3, literal

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks[: 3 if self.literal else self.repeats]:
            x = block(x)
        return self.head(x)


class FeedForward(nn.Module):
    def __init__(self, post=False):
        super().__init__()
        self.up, self.down = nn.Linear(12, 14), nn.Linear(14, 12)
        self.post = nn.LayerNorm(12) if post else nn.Identity()

    def forward(self, x):
        return self.post(x + self.down(self.up(x).relu()))


def test_blocks_that_an_attribute_counts():
    model, x = non_trivial(Counted()), torch.randn(3, 8)
    large = dmscale.expand(model, x, depth={"blocks depth": 5})
    assert large.repeats == len(large.blocks) == 5 and model.repeats == 3
    assert difference(outputs(large, x), outputs(model, x)) <= TOLERANCE


def test_blocks_that_would_not_run():
    model, x = non_trivial(Counted(literal=True)), torch.randn(3, 8)
    with pytest.raises(dmscale.DmscaleError, match="'blocks depth' cannot grow.*does not run them"):
        dmscale.expand(model, x, depth={"blocks depth": 5})
    record = dmscale.expand(model, x, width=2, depth=2).dmscale_expansion
    assert record["deepened"] == {} and "does not run them" in record["kept"]["blocks depth"]


def test_blocks_that_a_normalisation_ends_are_not_copied():
    blocks = nn.Sequential(*(FeedForward(post=True) for _ in range(3)))
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), blocks, nn.Linear(12, 4))
    x = torch.randn(3, 8)
    record = dmscale.expand(non_trivial(model), x, width=2, depth=2).dmscale_expansion
    assert record["deepened"] == {} and "follows the addition" in record["kept"]["2 depth"]


def test_what_would_never_learn_is_not_offered():
    model, x = make(
        "branch_on_value"
    )  # a sum that only a branch looks at wants new elements to be zero, as their reader does
    with pytest.raises(dmscale.DmscaleError, match="stem: its new elements would never get a gradient"):
        dmscale.expand(model, x, width=2, only="stem")
    vit, inputs = make("demo_vit")  # queries and keys come from one weight: zero in one is zero in both
    with pytest.raises(dmscale.DmscaleError, match="zero for one operand alone in blocks.0.attn"):
        dmscale.expand(vit, inputs, width={"blocks.0.attn head_dim": 2})


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "width and depth are 1"),
        ({"width": 0.5}, "width is 0.5; .*at least 1"),
        ({"width": "2"}, "width is '2'; give a number"),
        ({"depth": 0.9}, "depth is 0.9; .*at least 1"),
        ({"width": {"0": 0.5}}, "width of '0' is 0.5"),
        ({"width": {"conv9": 2}}, "matches no width or heads"),
        ({"width": {"6": 2}}, "matches only what cannot change.*an axis of the model's output"),
        ({"depth": {"9 depth": 4}}, "matches no stack of blocks"),
        ({"depth": {"3 depth": 2}}, "has 4 blocks"),
        ({"depth": {"3 depth": 4.5}}, "whole number"),
        ({"width": 2, "freeze": "nothing"}, "freeze='nothing' matches no dimension"),
        ({"width": 2, "noise": -1}, "noise is -1"),
        ({"width": 1.5, "only": "3 depth"}, "nothing in Sequential can grow"),
    ],
)
def test_refusals(options, message):
    model, inputs = make("residual_conv")
    with pytest.raises(dmscale.DmscaleError, match=message):
        dmscale.expand(model, inputs, **options)


def test_a_model_without_elements_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(dmscale.DmscaleError, match="meta device"):
        dmscale.expand(model, torch.randn(2, 8, device="meta"), width=2)


def test_an_expansion_that_changes_the_function_is_refused(monkeypatch):
    """Whatever goes wrong behind the trial, nothing different from the given network is handed out."""
    from dmscale import widen

    model, inputs = make("conv_chain")
    build = widen.build

    def wrong(space, widths, of, noise, seed):
        wide = build(space, widths, of, noise, seed)
        if of is model:
            with torch.no_grad():
                wide[0].weight[0] += 1
        return wide

    monkeypatch.setattr(widen, "build", wrong)
    with pytest.raises(dmscale.ExportError, match="differs from the given one"):
        dmscale.expand(model, inputs, width=2)


def test_what_fails_its_trial_stays_as_it_was(monkeypatch):
    from dmscale import widen

    model, inputs = make("conv_chain")
    zeros = widen._zeros

    def forgetful(space, targets, quiet):
        found, refused = zeros(space, targets, quiet)
        return {n: at for n, at in found.items() if n != "3.weight"}, refused

    monkeypatch.setattr(widen, "_zeros", forgetful)  # what layer 3 takes in would no longer be multiplied by zero
    large = dmscale.expand(model, inputs, width=2)
    record = large.dmscale_expansion
    assert set(record["widened"]) == {"3", "6", "11"} and "failed its trial" in record["kept"]["0"]
    assert difference(outputs(large, inputs), outputs(model, inputs)) <= TOLERANCE


def test_the_origin_needs_an_expansion_that_can_shrink():
    model, inputs = make("residual_conv")
    with pytest.raises(dmscale.DmscaleError, match="was not made by dmscale.expand"):
        dmscale.expansion_origin(dmscale.trace(model, inputs, verify=False))
    large = dmscale.expand(model, inputs, width=1.5, depth=2)
    with pytest.raises(dmscale.DmscaleError, match="cannot shrink back.*frozen by freeze="):
        dmscale.expansion_origin(dmscale.trace(large, inputs, freeze="residual width", verify=False))
    with pytest.raises(dmscale.DmscaleError, match="added block '3.1' cannot be removed"):
        dmscale.expansion_origin(dmscale.trace(large, inputs, freeze="3 depth", verify=False))


# -- the algebra ------------------------------------------------------------------------------------------------------


@st.composite
def dims_with_indices(draw):
    """A dimension of products and sums, and new elements for some of its atoms."""
    atoms = [Axis(draw(st.integers(2, 4))) for _ in range(4)]
    a, b, c, d = atoms
    total = axes.concat([(b, c), (d,)])
    dim = draw(st.sampled_from([(a, b), (a, *total), (*total, a), total, (b, a, c)]))
    chosen = [x for x in atoms if draw(st.booleans())]
    lists = {x: draw(st.lists(st.integers(0, x.size - 1), min_size=1, max_size=6)) for x in chosen}
    return dim, {x: torch.tensor(i) for x, i in lists.items()}


@given(dims_with_indices())
def test_gathering_agrees_with_sizes_masks_and_coordinates(drawn):
    dim, indices = drawn
    index = axes.gathered(dim, indices)
    assert len(index) == axes.measure(dim, {a: len(i) for a, i in indices.items()})
    for a in axes.atoms(dim):  # the element at each new place is the one asked for
        at = axes.coordinates(dim)[a][index]
        wanted = indices.get(a, torch.arange(a.size))
        assert set(at[at >= 0].tolist()) == set(wanted.tolist())
        times = {int(e): int((wanted == e).sum()) for e in wanted}
        full = {int(e): int((axes.coordinates(dim)[a] == e).sum()) for e in wanted}
        others = {b: len(i) for b, i in indices.items() if b is not a}
        scale = axes.measure(dim, {**others, a: 1}) - axes.measure(dim, {**others, a: 0})
        for e in times:
            assert full[e] > 0 and int((at == e).sum()) == times[e] * scale
    sorted_once = {a: torch.unique(i) for a, i in indices.items()}
    masks = {a: torch.isin(torch.arange(a.size), i) for a, i in sorted_once.items()}
    assert torch.equal(axes.gathered(dim, sorted_once), axes.kept(dim, masks).nonzero()[:, 0])
