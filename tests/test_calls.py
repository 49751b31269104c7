"""Gates at calls of torch functions: what depends on the size of an axis, written in a forward and not as a layer."""

import copy
import math
import sys
from math import sqrt

import numpy as np
import other_uses
import plain_numbers
import pytest
import torch
import torch.nn.functional as F
from nets import counted_macs, difference, non_trivial, outputs
from torch import nn

from dmscale import certify, trace


class Between(nn.Module):
    """conv -> `middle` -> conv: all that `middle` does is over the channels, which are free."""

    def __init__(self, middle, width=8):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, width, 1), middle, nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Does(nn.Module):
    """A module whose forward is one function of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class LayerNormByHand(nn.Module):
    """Mean and variance over channels, as ConvNeXt's first code has it."""

    def __init__(self, width=8):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-6) * self.weight[:, None, None] + self.bias[:, None, None]


class GlobalResponse(nn.Module):
    """Global response normalisation (ConvNeXt V2, equation 3)."""

    def __init__(self, width=8):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(1, width, 1, 1)) for _ in range(2))

    def forward(self, x):
        norm = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + self.bias + self.weight * (x * (norm / (norm.mean(dim=1, keepdim=True) + 1e-6)))


class Attention(nn.Module):
    """Attention with the default scale; the value's size is its own, so that head sizes are free."""

    def __init__(self, width=12, heads=2, size=6):
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)

    def forward(self, x):
        q, k, v = (t(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for t in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Linear(nn.Module):
    """Linear attention: softmax over the head size of the queries, over the tokens of the keys."""

    def __init__(self, width=12):
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(width, 8),
            nn.Linear(width, 8),
            nn.Linear(width, 10),
            nn.Linear(10, 12),
        )

    def forward(self, x):
        q, k, v = self.q(x).softmax(-1), self.k(x).softmax(1), self.v(x)
        return self.out(q @ (k.transpose(1, 2) @ v))


FUNCTIONS = {
    "mean": lambda x: x * x.mean(1, keepdim=True),
    "mean over channels and space": lambda x: x / (1 + x.square().mean((1, 2, 3), keepdim=True)),
    "var": lambda x: x * torch.rsqrt(torch.var(x, 1, keepdim=True) + 1),
    "var, the old arguments": lambda x: x * (x.var(1, False, True) + 1),
    "var_mean": lambda x: (x - torch.var_mean(x, dim=1, correction=0, keepdim=True)[1]) * 2,
    "std": lambda x: x + x.std(dim=1, keepdim=True),
    "softmax": lambda x: x * x.softmax(1),
    "F.softmax": lambda x: x * F.softmax(x, dim=1),
    "log_softmax": lambda x: x * F.log_softmax(x, 1).clamp(min=-50),
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "mean as a sum": lambda x: x - x.sum(1, keepdim=True) / x.shape[1],
    "mean of squares as a sum": lambda x: (
        x * torch.rsqrt((x * x).sum((1, 2), keepdim=True) / (x.shape[1] * x.size(2)) + 1)
    ),
    "several in one forward": lambda x: (
        x.softmax(1) + x.mean(1, keepdim=True) * x.mean((2, 3), keepdim=True) + x.softmax(2)
    ),
}
MODELS = {
    **{name: lambda f=f: Between(Does(f)) for name, f in FUNCTIONS.items()},
    "layer norm by hand": lambda: Between(LayerNormByHand()),
    "global response": lambda: Between(GlobalResponse()),
}


def kept_word(model, x, structures=4):
    """Exported equals gated on random structures, with the counted MACs; returns the space."""
    space = trace(non_trivial(model), x)
    for seed in range(structures):
        structure = space.sample(seed=seed)
        small = space.export(structure)
        assert difference(outputs(small, x), outputs(space.gate(structure), x)) <= 1e-4
        assert space.cost(structure).macs == counted_macs(small, x)
    return space


@pytest.mark.parametrize("name", MODELS)
def test_what_depends_on_the_number_of_channels_is_gated(name):
    space = kept_word(MODELS[name](), torch.randn(2, 3, 5, 5))
    assert space.dimensions["first"].size == 8


def test_head_sizes_are_free_under_the_default_scale():
    model = nn.Sequential(nn.Linear(3, 12), Attention(), nn.Linear(12, 2))
    space = kept_word(model, torch.randn(2, 5, 3))
    kinds = sorted(d.kind for d in space.dimensions.values() if "1" in d.name)
    assert kinds == ["heads", "width", "width"]  # the size of q and k, that of v


class ByHand(nn.Module):
    """Attention as it is written out by hand; `scores` makes its scores of q and k (b, heads, n, size)."""

    def __init__(self, scores, width=12, heads=2, size=6):
        super().__init__()
        self.heads, self.size, self.scores = heads, size, scores
        self.q, self.k, self.v = (nn.Linear(width, heads * size) for _ in range(3))
        self.out = nn.Linear(heads * size, width)

    def forward(self, x):
        q, k, v = (t(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2) for t in (self.q, self.k, self.v))
        return self.out((self.scores(self, q, k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


SCALES = {
    "math.sqrt of an attribute": lambda a, q, k: q @ k / math.sqrt(a.size),
    "a size of a tensor": lambda a, q, k: (q @ k) * (1.0 / math.sqrt(q.size(-1))),
    "a power": lambda a, q, k: (q * a.size**-0.5) @ k,
    "twice the size": lambda a, q, k: q @ k / math.sqrt(2 * q.shape[-1]),
    "all of it": lambda a, q, k: 3 * (q @ k / a.size**0.5 / math.sqrt(a.heads * a.size)),
    "a root by its own name": lambda a, q, k: q @ k / sqrt(a.size),
    "a root of a root, twice": lambda a, q, k: torch.div(q, math.sqrt(math.sqrt(a.size))) @ (k / a.size**0.25),
    "one number, and its negative": lambda a, q, k: (lambda t: (q * t) @ k - (q * -t) @ k)(a.size**-0.5),
    "one number, twice": lambda a, q, k: (lambda t: (q / t) @ k.mul(1 / t))(math.sqrt(a.size) ** 0.5),
    "by numpy": lambda a, q, k: (q / np.power(a.size, 0.25)) @ k * (1 / np.sqrt(np.sqrt(q.shape[-1]))),
    "a tensor of a number": lambda a, q, k: q * torch.tensor(a.size**-0.5, dtype=q.dtype) @ k + torch.tensor(0.5),
    "from the left": lambda a, q, k: a.size**-0.5 * (q @ k),
    "the number by a tensor": lambda a, q, k: q @ k * (a.size**-0.5 / torch.full((), 2.0)),
    "a whole size": lambda a, q, k: (q.shape[-1] * q) @ (k / a.size) / a.size**0.5,
    "a tensor of the size": lambda a, q, k: q @ k / torch.sqrt(torch.tensor(a.size)),
    "of another kind": lambda a, q, k: q @ k / torch.sqrt(torch.tensor([q.shape[-1]], dtype=q.dtype).to(q.device)),
    "a power of it": lambda a, q, k: q @ k * q.new_tensor(q.size(-1)) ** -0.5 + torch.ones(1).sqrt(),
    "by its constructor": lambda a, q, k: (q * torch.rsqrt(torch.FloatTensor([a.size]))) @ k,
    "full of a number": lambda a, q, k: q @ k / torch.full([], q.size(-1) ** 0.5, dtype=q.dtype),
    "full of the size": lambda a, q, k: q @ k / torch.full((), a.size).sqrt(),
    "beside a constant": lambda a, q, k: 0.5 * (q * 2.0) @ k / math.sqrt(a.size) * 1.0,
}


@pytest.mark.parametrize("name", SCALES)
def test_head_sizes_are_free_under_a_scale_written_by_hand(name):
    model = nn.Sequential(nn.Linear(3, 12), ByHand(SCALES[name]), nn.Linear(12, 2))
    space = kept_word(model, torch.randn(2, 5, 3))
    assert sorted(d.kind for d in space.dimensions.values() if "1" in d.name) == ["heads", "width", "width"]
    assert math.sqrt(4) == 2 and type(math.sqrt).__name__ == "builtin_function_or_method"


@pytest.mark.parametrize("as_a", ["int", "float", "power"])
def test_a_size_stays_one_as_a_plain_number(as_a):
    if as_a != "power" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 does not tell a call of int from another use")
    space = kept_word(plain_numbers.OverPlaces(as_a), torch.randn(2, 3, 4, 4))
    assert sorted(d.size for d in space.dimensions.values()) == [8, 12], space.frozen
    assert not vars(plain_numbers).keys() & {"int", "float"}


@pytest.mark.parametrize("use", ["converts", "compares", "hands on"])
def test_what_a_forward_does_with_int_itself_is_left_alone(use):
    """`x.to(int)` and `type(n) is int` take no other class for it."""
    space = kept_word(other_uses.Uses(use), torch.randn(6, 5))
    assert [d.size for d in space.dimensions.values()] == [16], space.frozen


class ScaledFirst(nn.Module):
    """Tokens times the root of the width, as the first transformer has them, before the width says what it is the size of."""

    def __init__(self, late):
        super().__init__()
        self.width, self.heads, self.late = 12, 2, late
        self.tokens, self.q, self.k, self.last = (
            nn.Embedding(7, 12),
            nn.Linear(12, 8),
            nn.Linear(12, 8),
            nn.Linear(12, 4),
        )

    def forward(self, x):
        x = self.tokens(x) * math.sqrt(self.width)
        if self.late == "never":
            return self.last(x)
        q, k = ((t(x) * (self.width * self.heads) ** -0.5).unflatten(-1, (self.heads, -1)) for t in (self.q, self.k))
        x = x + torch.einsum("bthd,bshd->bts", q, k).softmax(-1) @ x
        return self.last(x.reshape(*x.shape[:2], self.width))


@pytest.mark.parametrize("late", ["later", "never"])
def test_a_size_may_be_a_factor_before_it_is_known_what_it_is_the_size_of(late):
    space = kept_word(ScaledFirst(late), torch.randint(7, (2, 5)))
    assert 12 in [d.size for d in space.dimensions.values()], space.frozen


ELSEWHERE = {
    "added": lambda a, q, k: (lambda t: q @ k / t + k.norm() * (t + 1))(math.sqrt(a.size)),
    "in other arithmetic of numpy": lambda a, q, k: q @ k / np.log2(a.size),
    "a tensor of it, added": lambda a, q, k: (lambda t: q @ k / t.sqrt() + t)(torch.tensor(a.size)),
    "added to a number of numpy": lambda a, q, k: q @ k / float(np.int64(2) + a.size),
    "filled in": lambda a, q, k: (lambda t: (q @ k / t).masked_fill(q @ k > 0, t))(math.sqrt(a.size)),
    "a scalar of a sum": lambda a, q, k: (lambda t: torch.add(q @ k / t, k.mean(), alpha=t))(math.sqrt(a.size)),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_number_made_of_a_size_fixes_it_where_it_is_no_factor(name):
    space = kept_word(nn.Sequential(nn.Linear(3, 12), ByHand(ELSEWHERE[name]), nn.Linear(12, 2)), torch.randn(2, 5, 3))
    assert any(reason.startswith("its size is fixed in 1") for reason in space.frozen.values()), space.frozen


def test_a_scale_that_is_another_in_the_next_call_fixes_its_size():
    """One module, called with heads of two sizes: the third product of a call is no longer one product."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(3, 8), nn.Linear(3, 6), Does(lambda x: x / math.sqrt(x.shape[-1]))
            self.c, self.d = nn.Linear(8, 2), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.scale(self.a(x))) + self.d(self.scale(self.b(x)))

    space = kept_word(Twice(), torch.randn(4, 3))
    assert not space.dimensions and "its size is fixed in scale (power)" in space.frozen.values()


def test_a_product_masks_what_no_weight_can_make_zero():
    """A row of zero weights is no zero behind a softmax over tokens: the product of activations is masked itself."""
    space = kept_word(nn.Sequential(nn.Linear(3, 12), Linear(), nn.Linear(12, 2)), torch.randn(2, 5, 3))
    assert {d.size for d in space.dimensions.values()} == {12, 8, 10}


@pytest.mark.parametrize("middle", [LayerNormByHand(), Does(lambda x: x / math.sqrt(x.shape[1]))])
def test_masks_of_calls_learn(middle):
    x = torch.randn(2, 3, 5, 5)
    space = trace(non_trivial(Between(middle)), x)
    (width,) = (d.axes[0] for d in space.dimensions.values())

    from dmscale import gates

    def loss(mask):
        gated = gates.attach(space.model, space.sites, {width: mask}, {}, trainable=True)
        return gated(x).square().sum(), gates.masks_of(gated).widths[width]

    mask = torch.rand(8) * 0.5 + 0.5
    value, parameter = loss(mask)
    value.backward()
    step = torch.zeros(8)
    step[3] = 1e-3
    slope = (loss(mask + step)[0].item() - loss(mask - step)[0].item()) / 2e-3
    assert float(parameter.grad[3]) == pytest.approx(slope, rel=0.02)


def test_a_copy_of_a_gated_model_runs_alone():
    x = torch.randn(2, 3, 5, 5)
    space = trace(non_trivial(Between(LayerNormByHand())), x)
    gated = space.gate(space.uniform(0.5))
    twin = copy.deepcopy(gated)
    with torch.no_grad():
        expected = gated(x)
        for p in gated.parameters():
            p.zero_()
        assert torch.equal(twin(x), expected)


def test_calls_inside_attention_layers_of_torch_are_not_counted():
    """Run by itself `nn.MultiheadAttention` shows a mode nothing of its inside: the softmax behind it is still the first."""

    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.wide, self.last = nn.Linear(8, 10), nn.Linear(10, 2)

        def forward(self, x):
            x = self.inner(x)
            x = x + self.attention(x, x, x, need_weights=True)[0]
            return self.last(self.wide(x).softmax(-1))

    space = kept_word(Behind(), torch.randn(2, 5, 3))
    assert space.dimensions["wide"].size == 10


# -- depth that a forward counts on --------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed, self.linear = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(torch.relu(self.embed(x)))


class Stack(nn.Module):
    """Four blocks; `between(model, i, x)` is what the loop does before block i."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.between = between

    def forward(self, x):
        x = self.first(x)
        for i, block in enumerate(self.blocks):
            x = block(self.between(self, i, x))
        return self.last(x)


@pytest.mark.parametrize(
    "between, depth",
    [
        (lambda model, i, x: x, True),
        (lambda model, i, x: x * 2, False),  # as often as there are blocks: the trial tells
        (lambda model, i, x: torch.cat([x, x[:, :1]], 1) if i == 2 else x, False),  # tokens that join half-way
        (lambda model, i, x: x + model.blocks[0].embed(x) if i == 0 else x, False),
    ],
)
def test_blocks_that_a_forward_counts_or_reaches_into_stay(between, depth):
    space = kept_word(Stack(between), torch.randn(2, 5, 3))
    assert ("blocks depth" in space.dimensions) == depth


class Beside(nn.Module):
    """Two blocks, each with an input of its own, found by its position."""

    def __init__(self, last=False):
        super().__init__()
        self.narrow, self.wide = nn.Linear(3, 8), nn.Linear(3, 8)
        self.blocks = nn.ModuleList([Block(), nn.Sequential(nn.Linear(8, 8), nn.ReLU())][:: -1 if last else 1])
        self.last = nn.Linear(16, 2)

    def forward(self, x):
        inputs = self.narrow(x), self.wide(x)
        return self.last(torch.cat([block(inputs[i]) for i, block in enumerate(self.blocks)], -1))


@pytest.mark.parametrize("last", [False, True])
def test_blocks_that_stand_beside_one_another_are_not_tried(last, monkeypatch):
    """With one gone the other would be given its input; no trial is needed to say so."""
    tried = []
    trial = certify._trial
    monkeypatch.setattr(certify, "_trial", lambda *args: tried.append(args[-1]) or trial(*args))
    space = kept_word(Beside(last), torch.randn(2, 5, 3))
    assert not [d for d in space.dimensions.values() if d.kind == "depth"] and len(tried) == 1


def test_blocks_that_are_called_from_the_last_to_the_first_are_a_stack():
    class Reversed(Stack):
        def forward(self, x):
            x = self.first(x)
            for block in reversed(self.blocks):
                x = block(x)
            return self.last(x)

    assert "blocks depth" in kept_word(Reversed(None), torch.randn(2, 5, 3)).dimensions


class NormsItself(nn.Module):
    """Two layers and a normalisation between them, all in one forward."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.groups, self.width = norm, 4, 16
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return self.last(torch.relu(self.norm(self, self.first(x).transpose(1, 2)).transpose(1, 2)))


def over_last(function):
    return lambda net, x: function(net, x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(("norm", "sizes"), [
    (over_last(lambda net, x: F.layer_norm(x, x.shape[-1:])), [16]),
    (over_last(lambda net, x: F.layer_norm(x, (net.width,), 1 + net.weight, bias=net.bias, eps=1e-3)), [16]),
    (over_last(lambda net, x: F.rms_norm(x, (x.size(-1),))), [16]),
    (over_last(lambda net, x: F.rms_norm(x, (x.size(-1),), net.weight, eps=1e-3)), [16]),
    (over_last(lambda net, x: torch.rms_norm(x, (x.size(-1),), net.weight)), [16]),
    (lambda net, x: F.group_norm(x, net.groups), [4, 4]),
    (lambda net, x: F.group_norm(x, net.groups, 1 + net.weight, net.bias, eps=1e-3), [4, 4]),
    (lambda net, x: F.group_norm(x, 4, net.weight), [4]),
    (lambda net, x: F.group_norm(x, 1, None, net.bias), [16]),
])  # fmt: skip
def test_a_normalisation_in_a_forward_that_does_more_keeps_count(norm, sizes):
    space = kept_word(NormsItself(norm), torch.randn(2, 7, 5))
    assert sorted(d.size for d in space.dimensions.values()) == sizes, space.frozen


class Attends(nn.Module):
    """Queries and keys of unit mean square, as in the speed runs of small GPTs."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x):
        x = F.rms_norm(x, (x.size(-1),))
        q, k, v = (t(x).unflatten(-1, (self.heads, -1)) for t in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (F.rms_norm(q, (q.size(-1),)), F.rms_norm(k, (k.size(-1),)), v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_each_of_several_normalisations_keeps_count():
    space = kept_word(nn.Sequential(nn.Linear(5, 32), Attends(), nn.Linear(32, 3)), torch.randn(2, 7, 5))
    assert sorted(d.size for d in space.dimensions.values() if d.kind != "depth") == [4, 8, 8, 32], space.frozen


@pytest.mark.parametrize("reduction", [
    lambda x: x * (x > -9).all(-1, keepdim=True),
    lambda x: x * torch.any(x > 1, dim=-1, keepdim=True),
    lambda x: x + torch.sigmoid(x).prod(-1, keepdim=True),
    lambda x: x * torch.count_nonzero(x > 0, dim=-1)[..., None],
    lambda x: x + bool(torch.isnan(x).any()),
    lambda x: x if torch.isfinite(x).all() else -x,
    lambda x: x * x.new_ones(()).softmax(-1),  # of one number
    lambda x: x + x[..., 16::2].sum(),  # of none
])  # fmt: skip
def test_what_is_gone_has_no_say_in_a_reduction(reduction):
    space = kept_word(nn.Sequential(nn.Linear(5, 16), Does(reduction), nn.Linear(16, 3)), torch.randn(2, 7, 5))
    assert [d.size for d in space.dimensions.values()] == [16], space.frozen


@pytest.mark.parametrize("measure", [
    lambda x: F.normalize(x.exp(), dim=-1),
    lambda x: F.normalize(input=x.sigmoid(), p=1, dim=2),
    lambda x: x / torch.linalg.norm(x.exp(), dim=-1, keepdim=True),
    lambda x: x * F.cosine_similarity(x.sigmoid(), x.exp(), dim=-1)[..., None],
    lambda x: x * F.cosine_similarity(x.sigmoid(), x[0, 0].exp(), dim=-1)[..., None],
    lambda x: x * F.pairwise_distance(x.sigmoid(), x.exp())[..., None],
])  # fmt: skip
def test_lengths_and_angles_of_what_no_weight_makes_zero_are_over_what_is_kept(measure):
    space = kept_word(nn.Sequential(nn.Linear(5, 16), Does(measure), nn.Linear(16, 3)), torch.randn(2, 7, 5))
    assert [d.size for d in space.dimensions.values()] == [16], space.frozen


def test_a_softmax_with_noise_is_over_what_is_kept():
    model = nn.Sequential(nn.Linear(5, 16), Does(lambda x: F.gumbel_softmax(x, 0.5, dim=-1)), nn.Linear(16, 3))
    x = torch.randn(2, 7, 5)
    space = trace(non_trivial(model), x)
    assert [d.size for d in space.dimensions.values()] == [16], space.frozen
    for seed in range(4):
        structure = space.sample(seed=seed)
        with certify._Even():
            assert difference(outputs(space.export(structure), x), outputs(space.gate(structure), x)) <= 1e-4
