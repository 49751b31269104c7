"""Forwards that are not layers in a row: values and sizes that decide on branches, tensors written to, sizes of one.

Each keeps what design.md section 4 promises at every structure, the smallest included, and through a search.
"""

from __future__ import annotations

import functools
import math
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from nets import counted_macs, difference, non_trivial, outputs, run
from torch import Tensor, nn
from torch.distributions import Distribution, Normal, kl_divergence
from torch.nn.utils import parametrizations, weight_norm

import dmscale
from dmscale import ExportError, arrivals, certify


def traced(model: nn.Module, *inputs: Tensor) -> dmscale.SearchSpace:
    torch.manual_seed(0)
    return dmscale.trace(non_trivial(model), inputs)


def assert_exact(space: dmscale.SearchSpace, seeds: int = 6) -> None:
    """Gated equals exported for random structures and for the smallest one."""
    smallest = space.structure({n: d.lowest for n, d in space.dimensions.items()})
    for structure in (*(space.sample(seed=seed) for seed in range(seeds)), smallest):
        small = space.export(structure, verify=False)
        got, expected = outputs(small, space.example_inputs), outputs(space.gate(structure), space.example_inputs)
        assert difference(got, expected) <= 1e-4


def searched(space: dmscale.SearchSpace, budget: str, steps: int = 4) -> nn.Module:
    """The export, which verifies itself, after a search in training mode."""
    search = dmscale.Search(space, budget, steps)
    optimizer = torch.optim.SGD(space.model.parameters(), 0.01)
    search.attach(optimizer)
    search.model.train()
    for _ in range(steps):
        run(search.model, space.example_inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return search.export()


# -- tensors that a forward writes to ---------------------------------------------------------------------------------


class ScaledByNorm(nn.Module):
    """Features divided by their length over the channels, as detectors do with their first scale."""

    def __init__(self, affine: bool):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, affine=affine)
        self.scale, self.head = nn.Parameter(torch.rand(16) + 0.5), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-6)
        return self.head(x * self.scale[:, None, None])


@pytest.mark.parametrize("affine", [True, False])
def test_a_search_runs_where_a_sum_follows_a_batch_norm_and_its_statistics_move(affine):
    space = traced(ScaledByNorm(affine), torch.randn(4, 3, 6, 6))
    assert_exact(space)
    before = space.model.norm.running_mean.clone()
    small = searched(space, "60% params")
    assert small.conv.out_channels < 16
    assert not torch.equal(space.model.norm.running_mean, before)
    assert not torch.equal(small.norm.running_mean, before[: small.norm.num_features])


class MaskedWeight(nn.Conv2d):
    """A causal convolution that zeroes its own weight, as PixelCNN is often written."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, self.weight.shape[2] // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def test_a_weight_that_its_forward_writes_to_is_gated_at_its_input():
    torch.manual_seed(0)
    masked = [MaskedWeight(1, 16, 5, padding=2), nn.ReLU(), MaskedWeight(16, 12, 3, padding=1), nn.ReLU()]
    space = traced(nn.Sequential(*masked, nn.Conv2d(12, 3, 1)), torch.randn(2, 1, 8, 8))
    assert {n: d.size for n, d in space.dimensions.items()} == {"0": 16, "2": 12}
    assert_exact(space)
    small = searched(space, "50% params")
    outputs(small, space.example_inputs)  # writes: the last step has moved what it zeroes
    assert float((small[2].weight * (1 - small[2].mask)).detach().abs().max()) == 0


# -- sizes of one -----------------------------------------------------------------------------------------------------


class Squeezed(nn.Module):
    """A classifier over `squeeze()` of everything that is one."""

    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3)), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).squeeze())


@pytest.mark.parametrize("batch", [1, 3])
def test_what_squeeze_would_take_away_keeps_two_elements(batch):
    space = traced(Squeezed(), torch.randn(batch, 3, 6, 6))
    assert {d.size: d.minimum for d in space.dimensions.values()} == {16: 1, 12: 2}
    assert_exact(space)
    wider = dmscale.expand(space.model, space.example_inputs, width=1.5)
    assert wider.head.in_features == 18


# -- what decides on branches -----------------------------------------------------------------------------------------


class EarlyExit(nn.Module):
    """Returns the answer of the first classifier that is sure."""

    def __init__(self, sure: float):
        super().__init__()
        self.sure = sure
        self.blocks = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 12)])
        self.exits = nn.ModuleList([nn.Linear(16, 5), nn.Linear(12, 5)])

    def forward(self, x):
        for block, leave in zip(self.blocks, self.exits):
            x = F.relu(block(x))
            answer = leave(x)
            if not self.training and answer.softmax(-1).max() > self.sure:
                break
        return answer


def test_classes_of_an_early_exit_that_the_example_does_not_take_stay():
    space = traced(EarlyExit(sure=1.0), torch.randn(2, 8))
    assert {d.size for d in space.dimensions.values()} == {16, 12}
    assert "branch" in space.frozen["exits.0"]
    space.model.sure = 0.0  # the exit is taken now
    assert_exact(space)


class InSlots(nn.Module):
    __slots__ = ("width",)

    def __init__(self):
        super().__init__()
        self.width = 16
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(F.relu(self.body(x)) * self.width)


def test_attributes_in_slots_are_copied():
    space = traced(InSlots(), torch.randn(2, 4))
    assert {d.size for d in space.dimensions.values()} == {16}
    assert_exact(space)


# -- what sizes decide ------------------------------------------------------------------------------------------------


class BySize(nn.Module):
    """A network of one width, which does `what` with its features and their number."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.body, self.head = nn.Linear(6, 32), nn.Linear(32, 3)

    def forward(self, x):
        x = F.relu(self.body(x))
        return self.head(self.what(x, x.shape[1]))


def fails_unless_a_multiple_of_eight(x, n):
    assert n % 8 == 0
    return x


def both_in_steps_and_above(x, n):
    assert n % 8 == 0
    return x * 2 if n > 20 else x


DECIDED = {
    "above": (lambda x, n: x * 2 if n > 8 else x, 9, 1),
    "at least": (lambda x, n: x * 2 if n >= 8 else x, 8, 1),
    "maximum": (lambda x, n: x * max(n, 5).bit_length() if n < 4 else x, 4, 1),
    "another number": (lambda x, n: x * 2 if n == 11 else x, 12, 1),
    "in steps": (fails_unless_a_multiple_of_eight, 8, 8),
    "in steps and above": (both_in_steps_and_above, 24, 8),
    "of a part": (lambda x, n: x * 2 if n // 2 > 7 else x, 16, 1),
    "which does not matter": (lambda x, n: x * 1 if n == 1 else x, 1, 1),
    "which is always so": (lambda x, n: x if n > 0 and n % 1 == 0 and n <= 32 else x * 2, 1, 1),
}


@pytest.mark.parametrize("name", DECIDED)
def test_a_width_keeps_to_the_sizes_at_which_the_forward_decides_as_it_does(name):
    what, minimum, multiple = DECIDED[name]
    space = traced(BySize(what), torch.randn(3, 6))
    (d,) = space.dimensions.values()
    assert (d.lowest, d.multiple) == (minimum, multiple)
    assert_exact(space, seeds=12)


class Shortcut(nn.Module):
    """A projection where the number of channels changes; where it does not the input itself is added."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv, self.project = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(y + (self.project(x) if x.shape[1] != y.shape[1] else x))


def test_two_widths_that_differ_never_become_equal():
    space = traced(nn.Sequential(nn.Conv2d(3, 12, 1), Shortcut(12, 20), nn.Conv2d(20, 2, 1)), torch.randn(2, 3, 5, 5))
    assert space.dimensions
    assert_exact(space)
    equal = space.structure({n: 8 for n in space.dimensions})
    assert (
        difference(outputs(space.export(equal), space.example_inputs), outputs(space.gate(equal), space.example_inputs))
        <= 1e-4
    )


# -- operators of recommenders and of sequences of unlike lengths ------------------------------------------------------


class Bags(nn.Module):
    def __init__(self, mode: str):
        super().__init__()
        self.table, self.body, self.head = nn.EmbeddingBag(30, 12, mode=mode), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, index, offsets):
        return self.head(F.relu(self.body(self.table(index, offsets))))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_the_width_of_a_table_of_bags_is_free(mode):
    space = traced(Bags(mode), torch.randint(0, 30, (9,)), torch.tensor([0, 4]))
    assert {d.size for d in space.dimensions.values()} == {12, 10}
    assert_exact(space)
    assert searched(space, "60% params").table.embedding_dim < 12


class Packed(nn.Module):
    """A recurrent network on sequences of unlike lengths."""

    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.table, self.rnn = nn.Embedding(20, 10), kind(10, 8, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.table(tokens), lengths, batch_first=True, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(out)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_leave_both_widths_of_a_recurrent_network_free(kind):
    space = traced(Packed(kind), torch.randint(0, 20, (3, 5)), torch.tensor([3, 5, 2]))
    assert {d.size for d in space.dimensions.values()} == {10, 8}
    assert_exact(space)
    assert searched(space, "60% params").rnn.hidden_size < 8


# -- losses and distances inside of a forward ---------------------------------------------------------------------------


class Quantised(nn.Module):
    """Features replaced by the nearest of a code book, and how far they were from it."""

    def __init__(self, nearest, loss):
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(8, 16), nn.Embedding(32, 16), nn.Linear(16, 4)
        self.nearest, self.loss = nearest, loss

    def forward(self, x):
        z = self.encoder(x)
        q = self.codes(self.nearest(z, self.codes.weight))
        return self.decoder(z + (q - z).detach()) + self.loss(q, z)


def by_products(z, codes):
    return (z.square().sum(-1, keepdim=True) - 2 * z @ codes.t() + codes.square().sum(-1)).argmin(-1)


LOSSES = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "summed": lambda q, z: F.mse_loss(q, z, reduction="sum") / 100,
    "each": lambda q, z: F.mse_loss(q, z, reduction="none").sum(-1, keepdim=True),
    "as said before": lambda q, z: F.mse_loss(q, z, size_average=False) / 100,
    "smooth": lambda q, z: F.smooth_l1_loss(q, z, beta=0.3),
    "huber": lambda q, z: F.huber_loss(q, z, delta=0.3),
    "module": nn.MSELoss(),
    "dist": lambda q, z: torch.dist(q, z),
    "dist of order 1": lambda q, z: torch.dist(q, z, 1),
    "by keyword": lambda q, z: torch.dist(input=q, other=z) + F.mse_loss(input=q, target=z),
}


@pytest.mark.filterwarnings("ignore:size_average")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_inside_of_a_forward_is_that_of_what_is_kept(loss):
    space = traced(Quantised(by_products, LOSSES[loss]), torch.randn(6, 8))
    assert sorted((d.size, d.kind) for d in space.dimensions.values()) == [(16, "width"), (32, "width")]
    assert_exact(space)
    assert not space.cost().uncounted
    searched(space, "60% params")


@pytest.mark.parametrize("rows", [6, 40])  # by differences, and, where there are many, by products
@pytest.mark.parametrize("order", [2.0, 1.0])
def test_distances_of_rows_are_those_of_what_is_kept(rows, order):
    def nearest(z, codes):
        return torch.cdist(z, codes, p=order).argmin(-1)

    space = traced(Quantised(nearest, F.mse_loss), torch.randn(rows, 8))
    assert sorted(d.size for d in space.dimensions.values()) == [16, 32]
    assert_exact(space)
    searched(space, "60% params")


def test_what_is_compared_with_a_tensor_of_another_rank_stays():
    """The mask of the one would lie across other dimensions of the other."""
    space = traced(Quantised(by_products, lambda q, z: torch.dist(q[0], z)), torch.randn(6, 8))
    assert [d.size for d in space.dimensions.values()] == [32]
    assert "of another rank" in str(space)
    assert_exact(space)


class LogSumExp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        y = self.up(x)
        return self.head(y) + y.logsumexp(-1, keepdim=True) + torch.logsumexp(y, dim=(0, 1))


def test_a_log_sum_exp_over_a_width_is_that_of_what_is_kept():
    space = traced(LogSumExp(), torch.randn(4, 8))
    assert [d.size for d in space.dimensions.values()] == [16]
    assert_exact(space)
    searched(space, "50% params")


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(8, 12)
        self.both, self.head = nn.Bilinear(16, 12, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.both(self.a(x), self.b(x)))


def test_both_inputs_of_a_bilinear_layer_are_free():
    space = traced(TwoInputs(), torch.randn(4, 8))
    assert sorted(d.size for d in space.dimensions.values()) == [10, 12, 16]
    assert_exact(space)
    assert space.cost().macs == 4 * (8 * 16 + 8 * 12 + 10 * 16 * 12 + 10 * 3) and not space.cost().uncounted
    searched(space, "40% macs")


# -- parts of a width that a forward cuts by a share of its size --------------------------------------------------------


class Shifted(nn.Module):
    """A temporal shift: an eighth of the channels comes from the next image, an eighth from the last one."""

    def __init__(self, cut, held=False):
        super().__init__()
        self.a, self.b, self.head, self.cut = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 12, 3), nn.Linear(12, 4), [cut]
        self.share, self.held = 8, held

    def forward(self, x):
        x = self.a(x)
        return self.head(self.b(self.cut[0](x, self.share if self.held else 8)).relu().mean((2, 3)))


def shift(x, share):
    nt, c, h, w = x.shape
    x, fold = x.view(-1, 4, c, h, w), c // share
    out = torch.zeros_like(x)
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    return out.view(nt, c, h, w)


def four_parts(x, share):
    c = x.shape[1]
    a, b, d = x[:, : c // share], x[:, c // share : c // 4], x[:, c // 4 : c - c // 4]
    return torch.cat([b.relu(), d, a, x[:, c - c // 4 :].sigmoid()], 1)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("cut", [shift, four_parts])
def test_parts_that_several_sizes_tell_of_keep_one_share(cut, held):
    """Each equation relates three axes or more; together they say how all of them are related.

    So they do where a module holds the share, which stays what it is.
    """
    space = traced(Shifted(cut, held), torch.randn(8, 3, 8, 8))
    parts = [d for d in space.dimensions.values() if len(d.axes) > 2]
    assert len(parts) == 1 and parts[0].size == 4 and sum(a.size for a in parts[0].axes) == 32
    assert_exact(space)
    searched(space, "50% macs")


# -- layers that are parametrised already -----------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention whose projections have weight norm: their biases are gated beside a parametrised weight."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (parametrizations.weight_norm(nn.Linear(5, 16)) for _ in range(3))
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(((q @ k.mT) * 0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def test_a_gate_on_a_parametrised_layer_leaves_the_users_alone():
    space = traced(Attending(), torch.randn(2, 3, 5))
    assert set(space.dimensions) == {"q head_dim", "v head_dim"}
    assert_exact(space)
    assert not hasattr(type(space.model.q), "bias")  # which PyTorch would look up there from now on
    outputs(space.model, space.example_inputs)


@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
def test_weight_norm_along_what_is_removed_is_gated_at_its_magnitude(norm):
    """A vocoder: transposed convolutions keep a norm for each input channel, and 0 / 0 is no zero."""
    up = [
        norm(nn.ConvTranspose1d(16, 8, 4, 2, 1)),
        nn.LeakyReLU(),
        norm(nn.ConvTranspose1d(8, 4, 4, 2, 1)),
        nn.LeakyReLU(),
    ]
    model = nn.Sequential(norm(nn.Conv1d(5, 16, 3)), nn.LeakyReLU(), *up, norm(nn.Conv1d(4, 1, 3)))
    space = traced(model, torch.randn(2, 5, 6))
    assert {n: d.size for n, d in space.dimensions.items()} == {"0": 16, "2": 8, "4": 4}
    assert_exact(space)


class Raw(nn.Module):
    """Parameters of its own, and a child: no leaf."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.randn(fan_in, fan_out)), nn.GELU()

    def forward(self, x):
        return self.act(x @ self.weight)


def test_masks_are_not_held_by_a_container_that_would_run_them():
    space = traced(nn.Sequential(Raw(5, 16), Raw(16, 12), Raw(12, 3)), torch.randn(2, 5))
    assert len(space.dimensions) == 2
    assert_exact(space)


class Positive(nn.Linear):
    """A linear layer of positive weights: none is zero where its parameter is."""

    def forward(self, x):
        return F.linear(x, F.softplus(self.weight), self.bias)


class LinearAttention(nn.Module):
    """Attention by features, elu + 1: zero queries do not make zero features."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (4, -1)) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = torch.einsum("bnhd,bhde->bnhe", q, torch.einsum("bnhd,bnhe->bhde", k, v))
        return self.out((context / torch.einsum("bnhd,bhd->bnh", q, k.sum(1)).unsqueeze(-1)).flatten(2))


@pytest.mark.parametrize(
    ("model", "x", "free"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), Positive(16, 3)), torch.randn(4, 5), {"0"}),
        (LinearAttention, torch.randn(2, 6, 5), {"q head_dim", "v head_dim"}),
    ],
    ids=["positive", "linear attention"],
)
def test_what_is_not_zero_where_its_weight_is_is_gated_elsewhere(model, x, free):
    space = traced(model(), x)
    assert set(space.dimensions) == free
    assert_exact(space)


# -- sizes that nothing else tells ------------------------------------------------------------------------------------


class Fields(nn.Module):
    """Embeddings of fields side by side, by a product of two numbers (DeepFM)."""

    def __init__(self, fields=5, width=8):
        super().__init__()
        self.fields, self.width, self.embedding = fields, width, nn.Embedding(50, width)
        self.last = nn.Linear(fields * width, 3)

    def forward(self, x):
        return self.last(self.embedding(x).view(-1, self.fields * self.width))


class Pictures(nn.Module):
    """Maps as a vector, by a product with one number twice."""

    def __init__(self, channels=12, side=4):
        super().__init__()
        self.channels, self.side, self.conv = channels, side, nn.Conv2d(3, channels, 3)
        self.last = nn.Linear(channels * side**2, 3)

    def forward(self, x):
        return self.last(self.conv(x).view(-1, self.channels * self.side * self.side))


class PrivateHeads(nn.Module):
    """Heads that only private names, or a namespace, tell."""

    def __init__(self, namespace):
        super().__init__()
        self._heads, self._width, self.first, self.last = 4, 6, nn.Linear(5, 24), nn.Linear(24, 3)
        self.sizes = types.SimpleNamespace(heads=4, width=6) if namespace else None

    def forward(self, x):
        heads, width = (self.sizes.heads, self.sizes.width) if self.sizes else (self._heads, self._width)
        return self.last(self.first(x).view(-1, heads, width).transpose(1, 2).reshape(-1, heads * width))


@pytest.mark.parametrize(
    ("model", "x", "sizes"),
    [
        (Fields, torch.randint(50, (2, 5)), [8]), (Pictures, torch.randn(2, 3, 6, 6), [12]),
        (lambda: PrivateHeads(False), torch.randn(2, 5), [4, 6]), (lambda: PrivateHeads(True), torch.randn(2, 5), [4, 6]),
    ],
    ids=["fields", "pictures", "private", "namespace"],
)  # fmt: skip
def test_sizes_that_one_equation_tells_of_follow(model, x, sizes):
    space = traced(model(), x)
    assert sorted(d.size for d in space.dimensions.values()) == sizes
    assert_exact(space)


SECTIONS = {
    "hsplit": lambda x: torch.hsplit(x, 2), "hsplit by name": lambda x: torch.hsplit(x, sections=2),
    "tensor_split": lambda x: x.tensor_split(2, 1), "by name": lambda x: torch.tensor_split(x, sections=2, dim=-1),
}  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_stay_equal(name):
    space = traced(Cut(SECTIONS[name]), torch.randn(4, 5))
    assert [d.size for d in space.dimensions.values()] == [8, 8]
    assert_exact(space)


@pytest.mark.parametrize(
    ("cut", "free"),
    [
        (lambda x: x.tensor_split((4, 10), 1), {"first (3)", "second"}),
        (lambda x: torch.tensor_split(x, 3, 1), {"second"}),
    ],
)
def test_unequal_sections_stay_and_so_do_those_before_a_plain_index(cut, free):
    space = traced(Cut(cut), torch.randn(4, 5))
    assert set(space.dimensions) == free
    assert_exact(space)


class Cut(nn.Module):
    """Parts of a layer, each scaled by its number."""

    def __init__(self, cut):
        super().__init__()
        self.cut, self.first, self.second, self.last = [cut], nn.Linear(5, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        parts = self.cut[0](self.first(x))
        return self.last(F.relu(self.second(torch.cat([part * (i + 1) for i, part in enumerate(parts)], 1))))


def test_a_trial_finds_parts_that_must_be_equal(monkeypatch):
    """All halved alike they would stay so."""
    monkeypatch.delitem(arrivals._HANDLERS, "tensor_split")
    arrivals._route.cache_clear()
    space = traced(Cut(SECTIONS["tensor_split"]), torch.randn(4, 5))
    arrivals._route.cache_clear()
    assert set(space.dimensions) == {"second"} and any("trial" in reason for reason in space.frozen.values())


class Projected(nn.Module):
    """An LSTM with a projection, which its kernel does not see where it is as long as the hidden state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(5, 16, proj_size=8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.lstm(x)[0][:, -1])


def test_a_projection_stays_shorter_than_what_it_is_of():
    space = traced(Projected(), torch.randn(2, 4, 5))
    assert [d.size for d in space.dimensions.values()] == [8]
    for size in range(1, 9):
        space.export(space.structure({n: size for n in space.dimensions}))


# -- gradients --------------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """The log likelihood under a mixture: a log softmax and a log of a sum of exponentials over a width."""

    def __init__(self):
        super().__init__()
        self.body, self.weights, self.means = nn.Linear(5, 12), nn.Linear(12, 6), nn.Linear(12, 6)

    def forward(self, x):
        h = self.body(x).relu()
        parts = -((self.means(h) - x[:, :1]) ** 2) + F.log_softmax(self.weights(h) * 40, -1)
        return torch.logsumexp(parts, -1, keepdim=True)


class Deviations(nn.Module):
    """Features divided by their deviation, which is zero of a row of zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 12, bias=False), nn.Linear(12, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(h / (h.std(-1, keepdim=True) + 1e-3))


@pytest.mark.parametrize(
    ("model", "x"), [(Mixture, torch.randn(4, 5)), (Deviations, torch.eye(5)[:4] * torch.tensor([[0.0]] + [[1.0]] * 3))]
)
def test_gradients_of_a_gated_model_are_numbers(model, x):
    space = traced(model(), x)
    assert space.dimensions
    assert_exact(space)
    gated = space.gate(space.sample(1))
    gated(x).square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in gated.parameters() if p.grad is not None)
    searched(space, "60% params")


class Correlated(nn.Module):
    """How features of two views go together, one by one: the diagonal of a product, behind a diagonal matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, x, y):
        p, q = (self.second(self.first(v).relu() @ torch.diag_embed(self.scale)) for v in (x, y))
        return self.last((p.T @ q).diagonal())


def test_a_diagonal_has_one_axis():
    space = traced(Correlated(), torch.randn(8, 5), torch.randn(8, 5))
    assert sorted(d.size for d in space.dimensions.values()) == [12, 16] and not space.trace.record.unknown
    assert_exact(space)


# -- caches outside of modules ----------------------------------------------------------------------------------------

TABLES: dict = {}


@functools.lru_cache(None)
def ramp(length: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 1, length, device=device)


class Cached(nn.Module):
    """Adds a table that is kept outside of the module, alone or with another one, or by a function that remembers."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.first(x).relu()
        n = h.shape[-1]
        if self.how == "function":
            return self.last(h + ramp(n, h.device))
        if n not in TABLES:
            table = torch.ones_like(h[0]) * 0.5
            TABLES[n] = table if self.how == "alone" else (table, h.new_ones(n))
        return self.last(h + (TABLES[n] if self.how == "alone" else sum(TABLES[n])))


@pytest.mark.parametrize("how", ["alone", "together", "function"])
def test_a_trace_leaves_nothing_without_elements_in_a_cache(how):
    TABLES.clear()
    torch.manual_seed(0)
    model, x = Cached(how), torch.randn(2, 5)
    space = dmscale.trace(model, x)
    assert ("first" in space.dimensions) == (how != "function")  # which freezes what it makes
    assert_exact(space)
    again = dmscale.trace(model, x)
    assert_exact(again)
    model(x)
    tables = [t for held in TABLES.values() for t in (held if isinstance(held, tuple) else (held,))]
    assert not any(t.is_meta for t in tables)


class _Patches(nn.Module):
    """Sizes go through a function that remembers its results, as in einops."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(4, 16)
        self.c, self.d = nn.Linear(16, 2), nn.Linear(16, 2)

    def forward(self, x):
        y, z = (at(x).reshape(_split(x.shape[0], at.weight.shape[0])) for at in (self.a, self.b))
        return self.c(y.flatten(1)) + self.d(z.flatten(1))


@functools.lru_cache
def _split(rows, channels):
    return rows, channels // 4, 4


def test_what_a_function_remembers_of_sizes_is_not_that_of_others():
    net, x = _Patches().eval(), torch.randn(3, 4)
    net(x)  # on plain numbers
    space = dmscale.trace(net, x)
    assert sorted(d.size for d in space.dimensions.values()) == [4, 4], space.frozen
    assert_exact(space)
    assert type(_split) is functools._lru_cache_wrapper and _split(6, 8) == (6, 2, 4)


@torch.jit.script
def _snake(x):
    shape = x.shape
    x = x.reshape(shape[0], shape[1], -1)
    return (x + x.softmax(-1).sin() ** 2).reshape(shape)


class _Snake(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.c(self.b(_snake(self.a(x))).softmax(1))


def test_sizes_are_seen_in_a_scripted_function():
    net, x = _Snake().eval(), torch.randn(2, 3, 4, 4)
    space = dmscale.trace(net, x)
    assert set(space.dimensions) == {"a", "b"}, space.frozen
    assert_exact(space)
    assert isinstance(_snake, torch.jit.ScriptFunction)


class _Merged(nn.Module):
    """Two layers in training, one in evaluation, whose weight the forward replaces."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.both, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        if self.training:
            return self.out(self.b(self.a(x)).relu())
        self.both.weight.data = self.b.weight.data @ self.a.weight.data
        self.both.bias.data = self.b.bias.data + self.b.weight.data @ self.a.bias.data
        return self.out(self.both(x).relu())


def test_a_parameter_whose_data_the_forward_replaces_is_left_alone_by_a_trace():
    net, x = _Merged().eval(), torch.randn(2, 4)
    with torch.no_grad():
        net.b.bias.zero_(), net(x)  # a trial makes it something else
    before = {name: t.clone() for name, t in net.state_dict().items()}
    space = dmscale.trace(net, x)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert space.dimensions and space.writes_parameters
    assert_exact(space)


def test_a_sparse_buffer_is_copied():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(2, 4)
    net.register_buffer("heads", torch.eye(3).to_sparse())
    space = dmscale.trace(net, x)
    assert set(space.dimensions) == {"0"}, space.frozen
    small = space.export(space.uniform(0.5))
    assert small.heads.layout is torch.sparse_coo and small.heads is not net.heads


class _Latent(nn.Module):
    """Noise is made in the order of memory, in which the channels come last here, but for a masked input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 4), nn.Conv1d(4, 2, 1)

    def forward(self, x):
        y = self.b(self.a(x).relu()).transpose(1, 2)
        y = y if y.shape[2] > 99 or self.a.weight.shape[0] < 8 else y.contiguous()
        return y, self.c(y + torch.randn_like(y))


def test_noise_in_another_order_of_memory_is_no_difference():
    net, x = _Latent().eval(), torch.randn(2, 5, 3)
    space = dmscale.trace(net, x)
    assert "a" in space.dimensions, space.frozen
    space.export(space.uniform(0.5))


def test_a_recurrent_layer_is_free_where_values_decide():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            y = self.rnn(x)[0]
            return self.out(y if float(x.sum()) < 1e9 else -y)

    net, x = Net().eval(), torch.randn(2, 5, 4)
    space = dmscale.trace(net, x)
    assert set(space.dimensions) == {"rnn"} and not space.cost().uncounted, space.frozen
    assert_exact(space)


def test_a_buffer_of_zeros_may_be_a_variance():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("variance", torch.zeros(8))

        def forward(self, x):
            return self.b(self.a(x) / (self.variance + 1e-3).sqrt())

    space = dmscale.trace(Norm().eval(), torch.randn(2, 4))
    assert set(space.dimensions) == {"a"}, space.frozen


@torch.jit.script
def _gated(x, channels):
    n = channels[0]
    return torch.tanh(x[:, :n]) * torch.sigmoid(x[:, n:])


class _WaveNet(nn.Module):
    """Sizes go through a tensor, in WaveGlow and in what was made of it."""

    def __init__(self, how, channels=12):
        super().__init__()
        self.channels, self.how = channels, how
        self.first, self.inner, self.last = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 24, 3, padding=1), nn.Conv1d(12, 2, 1)

    def forward(self, x):
        both = self.inner(self.first(x))
        if self.how == "legacy":
            return self.last(_gated(both, torch.IntTensor([self.channels])))
        number = torch.tensor(self.channels)
        if self.how == "item":
            return self.last(both[:, : torch.tensor([self.channels]).item()] * both[:, number:])
        if self.how == "one element":
            number = torch.tensor([self.channels])
            return self.last(both[:, :number] * both[:, number:])
        assert isinstance(torch.arange(2), torch.LongTensor) and torch.LongTensor(3).shape == (3,)
        return self.last(_gated(both, torch.tensor([self.channels])) / (number + 1))


@pytest.mark.parametrize("how", ["legacy", "item", "one element", "computed with"])
def test_sizes_are_followed_through_a_tensor(how):
    net, x = _WaveNet(how).eval(), torch.randn(2, 3, 5)
    space = dmscale.trace(net, x)
    assert ("inner" in space.dimensions) == (how != "computed with"), space.frozen
    assert "first" in space.dimensions
    assert_exact(space)
    assert torch.IntTensor([2]).dtype == torch.int32 and "carried" not in str(type(torch.IntTensor))


@functools.lru_cache(None)
def head_shape(batch: int, length: int, heads: int, width: int) -> tuple[int, ...]:
    return batch, length, heads, width // heads


class Remembered(nn.Module):
    """Attention of two layers whose shapes a function remembers by equal numbers, as einops does."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (
            t.view(head_shape(*x.shape[:2], self.heads, t.shape[-1])).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


def test_what_functions_remember_of_equal_numbers_is_not_taken_for_sizes():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 16), Remembered(), Remembered(), nn.Linear(16, 3)), torch.randn(2, 7, 5)
    head_shape.cache_clear()
    model(x)  # from here on the function would answer with plain numbers
    space = dmscale.trace(model, x)
    assert sum(d.kind == "heads" for d in space.dimensions.values()) == 2
    assert_exact(space)
    assert all(type(n) is int for n in head_shape(2, 7, 4, 16))  # and not with sizes of a trace afterwards


class LikeAnother(nn.Module):
    """A result that is given the form of another tensor."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.mix, self.last = how, nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(getattr(self.mix(h.flatten(0, 1)), self.how)(h))


@pytest.mark.parametrize("how", ["reshape_as", "view_as"])
def test_the_form_of_another_tensor_follows(how):
    space = traced(LikeAnother(how), torch.randn(2, 7, 5))
    assert space.dimensions.keys() == {"first"}
    assert_exact(space)


class AcrossFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 16), nn.BatchNorm1d(7), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_what_statistics_of_a_batch_are_taken_over_stays():
    """Those of a batch norm over tokens: in training all features are in them, removed ones too."""
    space = traced(AcrossFeatures(), torch.randn(2, 7, 5))
    assert not space.dimensions
    assert "statistics" in space.frozen["first"]


class WrittenTo(nn.Module):
    """The result of what a gate stands behind, which the forward then writes to."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(5, 16), nn.Linear(16, 3)
        self.norm = nn.RMSNorm(16)
        self.blocks = nn.Sequential(*[Residual() for _ in range(3)])

    def forward(self, x):
        h = self.first(x)
        if self.how == "norm":
            return self.last(self.norm(h).relu_())
        if self.how == "blocks":
            return self.last(self.blocks(h).mul_(2))
        scores = h @ h.transpose(1, 2) * (1 / math.sqrt(h.shape[-1]))
        return self.last(scores.masked_fill_(torch.ones(7, 7).triu(1).bool(), -1e9).softmax(-1) @ h)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("how", ["norm", "blocks", "scores"])
def test_a_search_runs_where_a_forward_writes_to_what_a_gate_gives(how):
    model = WrittenTo(how)
    if how != "norm":
        del model.norm
    if how != "blocks":
        del model.blocks
    space = traced(model, torch.randn(2, 7, 5))
    assert ("blocks depth" in space.dimensions) == (how == "blocks")
    assert_exact(space)
    searched(space, "60% params")


class PartlyRotated(nn.Module):
    """Heads of which the first half is rotated; sizes are written as heads * head_dim."""

    def __init__(self):
        super().__init__()
        self.heads, self.head_dim, self.rotated = 4, 8, 4
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("cos", torch.randn(7, 4))

    def rotate(self, x):
        turned, rest = x[..., : self.rotated], x[..., self.rotated :]
        a, b = turned.chunk(2, -1)
        return torch.cat([turned * self.cos + torch.cat([-b, a], -1), rest], -1)

    def forward(self, x):
        q, k, v = (f(x).view(2, 7, self.heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = (self.rotate(q) @ self.rotate(k).transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(2, 7, self.heads * self.head_dim))


def test_heads_that_are_rotated_in_part_are_free():
    space = traced(nn.Sequential(nn.Linear(5, 32), PartlyRotated(), nn.Linear(32, 3)), torch.randn(2, 7, 5))
    assert {"1 heads", "1 head_dim"} <= space.dimensions.keys(), space.frozen
    assert_exact(space)


class SaysItsSize(nn.Module):
    """What a layer says of its weight is a factor, as of embeddings in many transformers."""

    def __init__(self, how):
        super().__init__()
        self.how, self.table, self.last = how, nn.Embedding(11, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.table(x)
        if self.how == "in place":
            h *= self.table.embedding_dim**0.5
            return self.last(h)
        return self.last(h * math.sqrt(self.table.embedding_dim))


@pytest.mark.parametrize("how", ["in place", "plain"])
def test_what_a_layer_says_of_its_weight_follows(how):
    space = traced(SaysItsSize(how), torch.randint(0, 11, (2, 7)))
    assert space.dimensions.keys() == {"table"}
    assert_exact(space)
    searched(space, "60% params")


class Barred(nn.Module):
    """Classes that may not be chosen have no finite logit."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.first(x).relu()).masked_fill(torch.tensor([True, False, False]), -math.inf)


def test_what_is_infinite_in_both_models_is_no_difference():
    space = traced(Barred(), torch.randn(2, 5))
    assert space.dimensions.keys() == {"first"}
    space.export(space.uniform(0.5))


class OneKeyHead(nn.Module):
    """With one key head the values are taken to have one too, which nothing else says."""

    def __init__(self):
        super().__init__()
        self.k, self.v, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(2, 3)
        self.mix = nn.ParameterList([nn.Parameter(torch.randn(4, 3)) for _ in range(2)])

    def forward(self, x):
        k, v = (f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.k, self.v))
        if k.shape[1] == 1:
            v = v.view(v.shape[0], 1, 7, 2)
        k, v = (torch.einsum("bhnd,hj->bjnd", t, w) for t, w in zip((k, v), self.mix))
        return self.last((k * v).sum(1))


def test_a_trial_does_not_take_everything_to_one():
    space = traced(OneKeyHead(), torch.randn(2, 7, 5))
    for name in space.dimensions:
        space.export(space.structure({name: space.dimensions[name].lowest}))
    assert_exact(space)


class EinopsLike(nn.Module):
    """A layer that keeps a private copy of the items of its table of sizes."""

    def __init__(self, **sizes):
        super().__init__()
        self.sizes = sizes
        self._sizes = tuple(sizes.items())

    def forward(self, x):
        return x.unflatten(-1, (dict(self._sizes)["heads"], -1)).transpose(1, 2)


class WithLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.split = EinopsLike(heads=4)
        self.q, self.k, self.v = (nn.Linear(5, 16) for _ in range(3))
        self.last = nn.Linear(16, 3)
        self.again = lambda y: y @ self.last.weight  # it is a copy's own in a copy

    def forward(self, x):
        q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.again(self.last(y)).sum(-1)


def test_private_copies_of_sizes_and_functions_that_enclose_the_model_follow():
    model = WithLayer()
    space = traced(model, torch.randn(2, 7, 5))
    assert any(d.kind == "heads" for d in space.dimensions.values())
    assert_exact(space)
    small = space.export(space.uniform(0.5))
    assert small.split._sizes == (("heads", 2),) == tuple(small.split.sizes.items())
    assert small.again.__closure__[0].cell_contents is small


class Unsteady(nn.Module):
    """What rounding decides: whether probabilities sum to one or to a little less; or no numbers at all."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.first(x)
        if self.how == "decided by rounding":
            h = h * (h.detach().softmax(-1).sum(-1, keepdim=True) >= 1)
        return self.last(h if self.how == "decided by rounding" else h.square().neg().sqrt())


@pytest.mark.parametrize(("how", "said"), [("decided by rounding", "rounding"), ("no numbers", "NaN")])
def test_what_rounding_decides_is_said_and_not_searched(how, said):
    torch.manual_seed(0)
    space = dmscale.trace(Unsteady(how), torch.randn(64, 5))
    assert space.dimensions.keys() == {"first"} and said in str(space)
    assert said in space.to_dict()["notes"][0]
    with pytest.raises(ExportError, match=f"{said}.*verify=False"):
        space.export(space.uniform(0.5))
    assert space.export(space.uniform(0.5), verify=False).first.out_features == 8


class Amplifies(nn.Module):
    """Differences of large numbers, each made larger: what float32 rounds off is all that is left in the end."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 64), nn.Linear(64, 3)

    def forward(self, x):
        y = self.last(self.first(x).relu())  # fewer terms are added up in another order
        for _ in range(12):
            y = (y * 7.3).sin()
        return y


def test_what_rounding_in_float32_decides_is_compared_in_float64():
    torch.manual_seed(0)
    space = traced(Amplifies(), torch.randn(64, 5))
    assert not space.trace.notes and space.dimensions.keys() == {"first"}
    structure = space.structure({"first": 23}, {"first": torch.rand(64)})
    assert certify.compare(space.gate(structure), space.build(structure), space.example_inputs) > 1e-4
    small = space.export(structure)
    assert small.first.weight.dtype is torch.float32
    with torch.no_grad():
        small.first.weight[0] *= 1.01
    assert certify.compare_in(space, structure, small, torch.float64) > 1e-4


def test_without_float64_what_rounding_decides_is_said(monkeypatch):
    """As on a device that has none."""
    raised = certify._in_precision

    def without(model, inputs, dtype):
        if dtype is torch.float64:
            raise TypeError("no float64 here")
        return raised(model, inputs, dtype)

    monkeypatch.setattr(certify, "_in_precision", without)
    space = traced(Amplifies(), torch.randn(64, 5))
    assert "rounding" in space.trace.notes[0] and space.dimensions.keys() == {"first"}
    with pytest.raises(ExportError, match="rounding.*verify=False"):
        space.export(space.structure({"first": 23}, {"first": torch.rand(64)}))


class GivenScale(nn.Module):
    """Attention with the usual scale, or twice that, worked out by the forward."""

    def __init__(self, factor):
        super().__init__()
        self.heads, self.head_size, self.factor = 2, 8, factor
        self.qkv, self.out = nn.Linear(5, 48), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.factor / math.sqrt(self.head_size), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("factor", [1, 2.0])
def test_a_scale_of_attention_by_the_size_of_a_head_follows(factor):
    space = traced(GivenScale(factor), torch.randn(2, 7, 5))
    assert sorted(d.size for d in space.dimensions.values()) == [2, 8], space.frozen
    assert_exact(space)
    searched(space, "60% params")


class CountsItsBlocks(nn.Module):
    """Blocks that the forward takes by their numbers, up to one that it holds."""

    def __init__(self, also=False):
        super().__init__()
        self.layers, self.also = 4, also
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList([Residual() for _ in range(4)])
        if also:
            self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(4)])

    def forward(self, x):
        x = self.first(x)
        for i in range(self.layers):
            x = self.blocks[i](self.norms[i](x) if self.also else x)
        return self.last(x)


def test_a_number_of_blocks_that_a_forward_counts_up_to_follows():
    space = traced(CountsItsBlocks(), torch.randn(2, 5))
    assert space.dimensions["blocks depth"].size == 4
    assert_exact(space)
    small = space.export(space.uniform(0.5, depth=True))
    assert small.layers == len(small.blocks) < 4
    assert "blocks depth" not in traced(CountsItsBlocks(also=True), torch.randn(2, 5)).dimensions


class Moded(Residual):
    """A block of a class that sets its mode and returns nothing, as those of OpenMMLab do."""

    def train(self, mode=True):
        super().train(mode)


def test_a_class_may_return_nothing_when_its_mode_is_set():
    class Model(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)

    model = Model(nn.Linear(5, 16), Moded(), Moded(), nn.Linear(16, 3))
    space = dmscale.trace(model, torch.randn(2, 5))
    assert_exact(space)
    searched(space, "60% params")
    batches = [(torch.randn(2, 5), torch.tensor([0, 1]))]
    found = dmscale.scale(
        model, batches[0][0], batches, nn.CrossEntropyLoss(), budget="60% params", steps=4, finetune_steps=2,
        distill="logits",
    )  # fmt: skip
    assert found.cost.params < space.cost().params and found.model.training
    assert dmscale.expand(model, torch.randn(2, 5), depth=2)


class Rectified(Residual):
    def forward(self, x):
        return super().forward(x).relu()


class WrittenBehind(nn.Module):
    """Two branches of blocks, of which all but the last give what a ReLU needs again, and a sum in place on one of them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        self.left, self.right = (nn.Sequential(Rectified(), Residual()) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        left, right = self.left(x), self.right(x)
        left += right
        return self.last(left)


def test_blocks_stay_where_training_needs_what_the_forward_writes_to():
    space = traced(WrittenBehind(), torch.randn(2, 5))
    assert "right depth" in space.dimensions and "writes to its output" in space.frozen["left depth"]
    for structure in (space.structure({n: d.lowest for n, d in space.dimensions.items()}), space.sample(seed=0)):
        run(space.export(structure).train(), space.example_inputs).sum().backward()
    searched(space, "60% params")


SHARED: dict[str, Tensor] = {}


class Keeper:
    def __init__(self, kept):
        self.kept = kept

    def __call__(self, module, args, out):
        self.kept["first"] = out


def keeps_globally(module, args, out):
    SHARED["first"] = out


class Hooked(nn.Module):
    """Takes the features of a layer from where a hook has left them, as DPT does with those of its ViT."""

    def __init__(self, how):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(32, 3)
        kept = self.kept = SHARED if how == "in a global dict" else {}
        hooks = {
            "through the model": lambda module, args, out: self.kept.update(first=out),
            "in an enclosed dict": lambda module, args, out: kept.update(first=out),
            "in a global dict": keeps_globally,
            "in an object": Keeper(kept),
        }
        self.first.register_forward_hook(hooks[how])

    def forward(self, x):
        y = self.middle(self.first(x).relu())
        return self.last(torch.cat([y, self.kept["first"]], -1))


@pytest.mark.parametrize(
    "how", ["through the model", "in an enclosed dict", "in a global dict", "in an object"]
)  # fmt: skip
def test_hooks_of_a_copy_leave_what_they_keep_with_the_copy(how):
    model, x = Hooked(how), torch.randn(2, 5)
    model(x).sum().backward()  # what is left behind has a history then
    left = model.kept["first"]
    space = traced(model, x)
    assert sorted(d.size for d in space.dimensions.values()) == [16, 16], space.frozen
    assert_exact(space)
    small = searched(space, "60% params")
    assert model.kept["first"] is left
    small(x)
    assert small.kept["first"].shape[1] == small.first.out_features and model.kept["first"] is left


class Lengthened(nn.Module):
    """A shortcut whose channels are made as many as the block's by zeros, as BlazeFace and thin ResNets do."""

    def __init__(self, width, more, before=0):
        super().__init__()
        self.more, self.before = more, before
        self.conv = nn.Conv2d(width, before + width + more, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x) + F.pad(x, (0, 0, 0, 0, self.before, self.more)))


def test_zeros_that_lengthen_a_shortcut_are_as_many_as_the_channels_that_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Lengthened(8, 4), Lengthened(12, 6, 2), nn.Conv2d(20, 2, 1))
    space = traced(model, torch.randn(2, 3, 8, 8))
    assert sorted(d.size for d in space.dimensions.values()) == [2, 4, 6, 8], space.frozen
    assert_exact(space)
    small = searched(space, "60% params")
    assert small[1].more == small[1].conv.out_channels - small[1].conv.in_channels


class KernelInParts(nn.Module):
    """A depthwise convolution whose kernel is made of all but the first of its nine weights (pixel differences)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
        self.weight = nn.Parameter(torch.randn(16, 1, 3, 3))

    def forward(self, x):
        flat = self.weight.flatten(2)
        kernel = torch.cat([flat[:, :, 1:], -flat[:, :, 1:], flat[:, :, :1].new_zeros(flat.shape[0], 1, 9)], -1)
        y = self.first(x)
        return self.last(F.conv2d(y, kernel.unflatten(-1, (5, 5)), padding=2, groups=y.shape[1]))


def test_what_cannot_be_cut_is_fixed_and_what_stands_beside_it_is_not():
    space = traced(KernelInParts(), torch.randn(2, 3, 8, 8))
    assert [d.size for d in space.dimensions.values()] == [16], space.frozen
    assert_exact(space)


class ActsWith(Residual):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


def test_blocks_that_hold_one_activation_have_a_depth():
    act = nn.GELU()
    model = nn.Sequential(nn.Linear(5, 16), nn.Sequential(*[ActsWith(act) for _ in range(3)]), nn.Linear(16, 3))
    space = traced(model, torch.randn(2, 5))
    assert space.dimensions["1 depth"].size == 3
    assert_exact(space)
    searched(space, "60% params")


class PutsInto(nn.Module):
    """Attention whose mask, half of whose scores and whose maxima are put into tensors that are there already."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1])
        mask = torch.tril(mask, out=mask)
        y = self.first(x)
        scores = (y @ y.mT).masked_fill(mask == 0, -1e9).softmax(-1) @ self.middle(y)
        half, most, where = torch.empty_like(scores), torch.empty(0), torch.empty(0, dtype=torch.long)
        with torch.no_grad():
            torch.mul(scores.detach(), 0.5, out=half)
            torch.max(scores.detach(), 1, out=(most, where))
        return self.last(scores + half + most[:, None])


def test_results_that_are_put_into_other_tensors_are_followed():
    space = traced(PutsInto(), torch.randn(2, 4, 5))
    assert sorted(space.dimensions) == ["first", "middle"], space.frozen
    assert_exact(space)
    searched(space, "60% params")


# -- numbers of blocks that others go by ------------------------------------------------------------------------------


class TakesItsOwn(nn.Module):
    """A block that takes by its number what the network has made for it: its keys and values of a prefix."""

    def __init__(self, number):
        super().__init__()
        self.layer_idx, self.inner = number, nn.Linear(16, 16)

    def forward(self, x, prefixes):
        return x + self.inner(x) * prefixes[self.layer_idx]


class Prefixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)
        self.prefixes = nn.Parameter(torch.randn(3, 1))
        self.blocks = nn.ModuleList([TakesItsOwn(i) for i in range(3)])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, self.prefixes)
        return self.last(x)


def test_blocks_that_take_by_their_number_what_stays_when_they_go_are_no_depth():
    space = traced(Prefixed(), torch.randn(2, 5))
    assert "trial" in space.frozen["blocks depth"] and len(space.dimensions) == 1
    assert_exact(space)


# -- transforms of torch.func -----------------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """Three networks in stacked weights, run by `vmap` as the tutorial of PyTorch does: on a network that is not registered."""

    def __init__(self):
        super().__init__()
        members = [nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(3)]
        weights, _ = torch.func.stack_module_state(members)
        self.names, self.weights = list(weights), nn.ParameterList(weights.values())
        self.__dict__["base"] = members[0].to("meta")

    def forward(self, x):
        weights = dict(zip(self.names, self.weights))
        return torch.vmap(lambda w: torch.func.functional_call(self.base, w, (x,)))(weights).mean(0)


class ByRow(nn.Module):
    """A network for each row of a set, and calls that are counted on both sides of it."""

    def __init__(self):
        super().__init__()
        self.net, self.last = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12)), nn.Linear(12, 3)

    def forward(self, x):
        x = x.unflatten(0, (2, -1))
        inner = torch.vmap(lambda row: self.net(row.softmax(-1)))(x)
        return self.last(inner.softmax(-1))


class Force(nn.Module):
    """The gradient of an energy by its input."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 1)

    def forward(self, x):
        return torch.func.grad(lambda x: self.last(torch.tanh(self.first(x))).sum())(x)


@pytest.mark.parametrize(("net", "sizes", "macs"), [
    (Ensemble, [3, 16], 3 * 4 * (5 * 16 + 16 * 4)),
    (ByRow, [12, 16], 4 * (5 * 16 + 16 * 12 + 12 * 3)),
    (Force, [16], 4 * (2 * 5 * 16 + 2 * 16)),
])  # fmt: skip
def test_what_a_transform_hides_is_counted_and_free(net, sizes, macs):
    space = traced(net(), torch.randn(4, 5))
    assert sorted(d.size for d in space.dimensions.values()) == sizes, space.frozen
    assert space.cost().macs == macs
    assert_exact(space)
    searched(space, "70% params")


# -- squares of one axis ----------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A weight with something of low rank on it, which is run on an identity to see it, and the norms of its rows."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(12, 16), nn.Linear(12, 4, bias=False), nn.Linear(4, 16, bias=False)
        self.magnitude = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x):
        added = self.up(self.down(torch.eye(self.down.weight.shape[1]))).T
        norm = torch.linalg.norm(self.base.weight + added, dim=1)
        return (self.base(x) + self.up(self.down(x))) * (self.magnitude / norm)


class Reflected(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.u = 12, nn.Parameter(torch.randn(12))

    def forward(self, x):
        return x @ (torch.eye(self.width) - 0.2 * torch.outer(self.u, self.u))


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T + weight.tril(-1) * 0.5


class Triangular(nn.Module):
    """Where a triangle beside the diagonal is cut out, numbers of rows and columns matter."""

    def forward(self, weight):
        return weight.tril(1)


def layer_of(parametrization):
    layer = nn.Linear(12, 12)
    nn.utils.parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


@pytest.mark.parametrize(("layer", "sizes"), [
    (LowRank, [4, 12, 16]), (Reflected, [12]), (lambda: layer_of(Symmetric()), [12]), (lambda: layer_of(Triangular()), []),
])  # fmt: skip
def test_rows_and_columns_of_a_square_are_one_axis(layer, sizes):
    last = 16 if layer is LowRank else 12
    space = traced(nn.Sequential(nn.Linear(5, 12), layer(), nn.ReLU(), nn.Linear(last, 3)), torch.randn(2, 5))
    assert sorted(d.size for d in space.dimensions.values()) == sizes, space.frozen
    assert_exact(space)
    if sizes:
        searched(space, "70% params")


# -- sparse tensors, and results that are written where `out=` says ---------------------------------------------------


class Spread(nn.Module):
    """Features of nodes, summed over their neighbours twice, in the layout that `to` gives the adjacency."""

    def __init__(self, to, product):
        super().__init__()
        self.first, self.last, self.to, self.product = nn.Linear(5, 16), nn.Linear(16, 3), to, product

    def forward(self, x, adjacency):
        adjacency = getattr(adjacency, self.to)()
        return self.last(self.product(adjacency, torch.relu(self.product(adjacency, self.first(x)))))


@pytest.mark.parametrize("to", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("product", [torch.sparse.mm, torch.spmm, torch.matmul])
def test_a_width_goes_through_products_with_sparse_matrices(to, product):
    space = traced(Spread(to, product), torch.randn(7, 5), torch.eye(7) + torch.eye(7).roll(1, 0))
    assert [d.size for d in space.dimensions.values()] == [16], space.frozen
    assert space.cost().macs == 7 * (5 * 16 + 2 * 7 * 16 + 16 * 3)
    assert_exact(space)
    searched(space, "70% params")


class Filled(nn.Module):
    """Rows of groups counted up into a part of a tensor, and a product written where it is to be."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x, group):
        starts = group.new_zeros(5)
        torch.cumsum(torch.zeros_like(starts[1:]).scatter_add_(0, group, torch.ones_like(group)), 0, out=starts[1:])
        y = self.last(torch.relu(self.first(x)))
        with torch.no_grad():
            weights = torch.empty(len(x), len(x))
            torch.mm(x, x.T, out=weights)
        return weights @ y / (1 + starts[group, None])


def test_results_may_be_written_where_out_says():
    space = traced(Filled(), torch.randn(6, 5), torch.tensor([0, 0, 1, 2, 2, 3]))
    assert [d.size for d in space.dimensions.values()] == [16], space.frozen
    assert_exact(space)
    searched(space, "70% params")


class PadsUp(nn.Module):
    """Features that are padded with zeros up to a width that nothing else is made of."""

    def __init__(self, width):
        super().__init__()
        self.width, self.inner = width, nn.Linear(16, 16)

    def forward(self, x):
        if x.shape[-1] < self.width:
            x = torch.cat([x, x.new_zeros(*x.shape[:-1], self.width - x.shape[-1])], -1)
        return x + self.inner(x)


def test_a_number_that_is_only_compared_with_a_width_follows_it():
    space = traced(nn.Sequential(nn.Linear(5, 16), PadsUp(16), nn.Linear(16, 3)), torch.randn(2, 5))
    assert [d.size for d in space.dimensions.values() if d.kind == "width"] == [16], space.frozen
    assert_exact(space)
    assert space.export(space.uniform(0.5))[1].width == 8
    # one of another size, a bound, is left as it is
    assert traced(nn.Sequential(nn.Linear(5, 16), PadsUp(8), nn.Linear(16, 3)), torch.randn(2, 5)).dimensions


class InParts(nn.Module):
    """A layer that takes its input in parts where that is large, as the networks of videos do, and may use how large it is."""

    def __init__(self, bound, uses=False):
        super().__init__()
        self.inner, self.bound, self.uses = nn.Linear(16, 12), bound, uses

    def forward(self, x):
        memory = x.shape[0] * x.shape[1] * 2 / 2**4
        if memory > self.bound:
            return torch.cat([self.inner(part) for part in x.split(1)])
        return self.inner(x) * (math.ceil(memory) if self.uses else 1)


@pytest.mark.parametrize(
    ("bound", "uses", "sizes"), [(100, False, [12, 16]), (1.5, False, [12, 16]), (100, True, [12])]
)
def test_a_share_of_a_size_that_is_compared_with_a_bound_is_free_unless_it_is_used(bound, uses, sizes):
    space = traced(nn.Sequential(nn.Linear(5, 16), InParts(bound, uses), nn.Linear(12, 3)), torch.randn(2, 5))
    assert sorted(d.size for d in space.dimensions.values()) == sizes, space.frozen
    assert_exact(space)


class FoldsTime(nn.Module):
    """Parts of channels become steps of time, of which the first are left out: the cut is inside such a part."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 24, 1), nn.Conv1d(12, 2, 1)

    def forward(self, x):
        x = self.first(x).unflatten(1, (-1, 2)).permute(0, 1, 3, 2).flatten(2)
        return self.last(x[:, :, 1:])


def test_what_cannot_be_cut_is_fixed_alone():
    space = traced(FoldsTime(), torch.randn(2, 3, 5))
    assert [d.size for d in space.dimensions.values()] == [12], space.frozen
    assert_exact(space)
    searched(space, "70% params")


class Frozen(OrderedDict):
    """Settings that are read as attributes or as entries, and of which none can be set: those of diffusers."""

    def __init__(self, **values):
        super().__init__(**values)
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        raise TypeError("frozen")


class Easy(dict):
    """Settings whose attributes are their entries."""

    def __init__(self, **values):
        super().__init__(**values)
        self.__dict__ = self


class Sized(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self._settings = settings
        self.first, self.last = nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, x):
        y = self.first(x).view(len(x), self._settings.heads, self._settings["size"])
        z = x.new_zeros(len(x), self._settings.heads, self._settings["size"]) + y
        return self.last(z.reshape(len(x), -1))


@pytest.mark.parametrize("kind", [Frozen, Easy])
def test_sizes_may_be_in_a_dict_of_a_class_of_its_own(kind):
    settings = kind(heads=4, size=6, bounds=[1, 2], name="a")
    space = traced(Sized(settings), torch.randn(2, 5))
    assert sorted(d.size for d in space.dimensions.values()) == [4, 6], space.frozen
    assert_exact(space)
    small = space.export(space.uniform(0.5))
    assert (small._settings.heads, small._settings["heads"], small._settings["size"]) == (2, 2, 3)
    assert type(small._settings) is kind and list(small._settings) == list(settings)
    assert (settings.heads, settings["size"]) == (4, 6) and type(settings["size"]) is int
    searched(space, "70% params")


# -- blocks that renew several tensors --------------------------------------------------------------------------------


class TwoStreams(nn.Module):
    """Text and image attend to both and are renewed together; the order of the outputs is another one (Flux, SD3)."""

    def __init__(self, as_list: bool = False):
        super().__init__()
        self.as_list = as_list
        self.mix = nn.ModuleDict({n: nn.Linear(12, 12) for n in ("image", "text")})
        self.up = nn.ModuleDict({n: nn.Linear(12, 20) for n in ("image", "text")})
        self.down = nn.ModuleDict({n: nn.Linear(20, 12) for n in ("image", "text")})

    def forward(self, image, text, time):
        both = torch.cat([self.mix["text"](text), self.mix["image"](image)], 1)
        scores = (both @ both.transpose(1, 2)).softmax(-1) @ both
        text = text + scores[:, : text.shape[1]] * time
        image = image + scores[:, text.shape[1] :]
        text = text + self.down["text"](self.up["text"](text).relu())
        image = image + self.down["image"](self.up["image"](image).relu())
        return [text, image] if self.as_list else (text, image)


class Diffusion(nn.Module):
    def __init__(self, as_list: bool = False):
        super().__init__()
        self.image, self.text, self.time = nn.Linear(4, 12), nn.Linear(3, 12), nn.Linear(2, 12)
        self.blocks = nn.ModuleList(TwoStreams(as_list) for _ in range(4))
        self.last = nn.Linear(12, 4)

    def forward(self, image, text, time):
        image, text, time = self.image(image), self.text(text), self.time(time).unsqueeze(1)
        for block in self.blocks:
            text, image = block(image, text, time=time)
        return self.last(image) + text.mean(1, keepdim=True)[..., :1]


@pytest.mark.parametrize("as_list", [False, True])
def test_blocks_that_renew_several_tensors_have_a_depth(as_list):
    space = traced(Diffusion(as_list), torch.randn(2, 6, 4), torch.randn(2, 5, 3), torch.randn(2, 2))
    assert space.dimensions["blocks depth"].size == 4
    assert space.stacks["blocks depth"].streams == (((0, 1), (1, 0)),) * 4
    assert_exact(space)
    small = searched(space, "30% macs", 8)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in space.model.parameters())
    only = dmscale.trace(space.model, space.example_inputs, only="blocks depth")
    for importance in ("residual", "similarity"):
        search = dmscale.Search(only, "55% macs", 6, depth_importance=importance)
        optimizer = torch.optim.SGD(only.model.parameters(), 0.01)
        search.attach(optimizer)
        while not search.done:
            run(search.model, only.example_inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(search.export().blocks) == 2


class Swapping(TwoStreams):
    """The outputs change places: without a block they would not."""

    def forward(self, image, text, time):
        new_text, new_image = super().forward(image, text, time)
        return new_image, new_text


class Crossed(Diffusion):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Swapping() for _ in range(4))


def test_blocks_whose_outputs_change_places_have_none():
    space = traced(Crossed(), torch.randn(2, 6, 4), torch.randn(2, 6, 3), torch.randn(2, 2))
    assert "blocks depth" not in space.dimensions
    assert_exact(space)


class KeysAndValues(nn.Module):
    """Parameters with names that PyTorch's own containers have for something else."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.keys, self.values = nn.Parameter(torch.randn(12, 9)), nn.Parameter(torch.randn(9, 3))

    def forward(self, x):
        return (self.first(x) @ self.keys).relu() @ self.values


def test_a_parameter_may_have_the_name_of_a_method_of_a_container():
    space = traced(KeysAndValues(), torch.randn(4, 5))
    assert sorted(d.size for d in space.dimensions.values()) == [9, 12], space.frozen
    assert_exact(space)
    searched(space, "60% params")


class Elastic(nn.Module):
    """As many rows of a weight as `whole` says, of a multiple of the width that arrives."""

    def __init__(self, whole):
        super().__init__()
        self.first, self.wide, self.last = nn.Linear(5, 12), nn.Linear(12, 24), nn.Linear(24, 3)
        self.whole = whole

    def forward(self, x):
        x = self.first(x)
        y = F.linear(x, self.wide.weight[: self.whole(x.shape[1] * 2)], None)
        return F.linear(y.relu(), self.last.weight[:, : y.shape[1]])


@pytest.mark.parametrize("whole", [round, math.floor, math.ceil, math.trunc])
def test_a_whole_number_made_whole_is_itself(whole):
    space = traced(Elastic(whole), torch.randn(4, 5))
    ((name, d),) = space.dimensions.items()
    assert (name, d.size) == ("first", 12), space.frozen
    assert_exact(space)
    structure = space.uniform(0.5)
    assert space.cost(structure).macs == counted_macs(space.export(structure), torch.randn(4, 5))


class OfChannels(nn.Module):
    """Moments over all elements of a channel, whose number is a quotient."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.first(x)
        elements = x.numel() / x.size(1)
        mean = x.sum((0, 2, 3), keepdim=True) / elements
        variance = 1.0 / elements * (x - mean).square().sum((0, 2, 3), keepdim=True) * elements / (elements - 1)
        return self.last((x - mean) / (variance + 1e-5).sqrt())


def test_sizes_that_cancel_are_not_fixed_by_their_quotient():
    space = traced(OfChannels(), torch.randn(4, 3, 5, 5))
    assert [d.size for d in space.dimensions.values()] == [12], space.frozen
    assert_exact(space)
    searched(space, "60% params")


class Announced(nn.Module):
    """A class that wants to be told the name of every class that is derived from it."""

    known: dict = {}

    def __init_subclass__(cls, name, **kwargs):
        super().__init_subclass__(**kwargs)
        Announced.known[name] = cls


class Tall(Announced, name="tall"):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 12)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_a_class_that_is_told_of_its_subclasses_is_told_of_none():
    model = nn.Sequential(nn.Linear(5, 12), Tall())
    space = traced(model, torch.randn(4, 5))
    assert [d.size for d in space.dimensions.values()] == [12], space.frozen
    assert_exact(space)
    searched(space, "60% params")
    assert Announced.known == {"tall": Tall} and isinstance(space.gate(space.uniform(0.5))[1], Tall)


def test_channels_are_free_where_a_convolution_is_padded_with_the_other_end():
    round_ = functools.partial(nn.Conv2d, kernel_size=3, padding=(1, 0), padding_mode="circular")
    model = nn.Sequential(round_(3, 8), nn.BatchNorm2d(8), round_(8, 10), nn.ReLU(), nn.Conv2d(10, 4, 1))
    space = traced(model, torch.randn(2, 3, 9, 9))
    assert sorted(d.size for d in space.dimensions.values()) == [8, 10], space.frozen
    assert_exact(space)
    searched(space, "60% params")


class Latent(nn.Module):
    """Noise for every latent, in evaluation too, and dropout that is never turned off."""

    def __init__(self):
        super().__init__()
        self.first, self.mean, self.spread = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(12, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = F.dropout(self.first(x).relu(), 0.3, training=True)
        return self.last(self.mean(x) + torch.randn_like(self.mean(x)) * self.spread(x).exp())


class Bayesian(nn.Module):
    """Weights that are drawn."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.spread = nn.Parameter(torch.rand(12, 5))

    def forward(self, x):
        return self.last(F.linear(x, self.first.weight + self.spread * torch.randn(self.spread.shape)).relu())


@pytest.mark.parametrize(("cls", "sizes"), [(Latent, [8, 12]), (Bayesian, [12])])
def test_a_width_may_have_noise_of_its_own(cls, sizes):
    """No two structures draw the same numbers for it: what is compared is what they do with the same number for all."""
    space = traced(cls(), torch.randn(4, 5))
    assert sorted(d.size for d in space.dimensions.values()) == sizes, space.frozen
    for seed in range(4):
        structure = space.sample(seed)
        small = space.export(structure)
        with certify._Even():
            assert difference(outputs(small, torch.ones(4, 5)), outputs(space.gate(structure), torch.ones(4, 5))) < 1e-5
    searched(space, "60% params")


class Distributed(nn.Module):
    """A latent as a distribution of torch, which asks of its arguments whether each one is in its domain."""

    def __init__(self):
        super().__init__()
        self.first, self.mean, self.spread = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(12, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        latent = Normal(self.mean(x), F.softplus(self.spread(x)) + 1e-3)
        return self.last(latent.rsample()) + kl_divergence(latent, Normal(0.0, 1.0)).sum(-1, keepdim=True)


def test_what_distributions_ask_of_values_fixes_no_size(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile turns it off for good
    space = traced(Distributed(), torch.randn(4, 5))
    assert sorted(d.size for d in space.dimensions.values()) == [8, 12], space.frozen
    for seed in range(4):
        space.export(space.sample(seed))
    searched(space, "60% params")
    assert Normal._validate_args


class SizedByTensor(nn.Module):
    """Rows laid out as images, whose sizes are elements of a tensor (the sampling of Deformable DETR)."""

    def __init__(self):
        super().__init__()
        self.heads, self.first, self.last = 4, nn.Linear(5, 32), nn.Linear(32, 3)

    def forward(self, x, shapes):
        b, n, _ = x.shape
        x = self.first(x).view(b, n, self.heads, -1)
        heads, size = x.shape[2:]
        pieces = []
        for piece, (h, w) in zip(x.split([int(h * w) for h, w in shapes], dim=1), shapes):
            piece = piece.flatten(2).transpose(1, 2).reshape(b * heads, size, h, w)
            pieces.append(piece.repeat(h // h, 1, 1, 1).mean((2, 3)))
        return self.last(sum(pieces).view(b, heads * size))


def test_a_size_that_is_an_element_of_a_tensor_keeps_its_place_among_sizes():
    space = traced(SizedByTensor(), torch.randn(2, 20, 5), torch.tensor([[4, 4], [2, 2]]))
    assert sorted(d.size for d in space.dimensions.values()) == [4, 8], space.frozen
    assert_exact(space)


class TextCNN(nn.Module):
    """Kernels that are as wide as the features of a word, of which none is beside another (Kim, 2014)."""

    def __init__(self, words=20, width=12, channels=6):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.convs = nn.ModuleList(nn.Conv2d(1, channels, (k, width)) for k in (2, 3))
        self.last = nn.Linear(2 * channels, 3)

    def forward(self, x):
        x = self.embed(x).unsqueeze(1)
        x = [conv(x).squeeze(3).relu() for conv in self.convs]
        return self.last(torch.cat([F.max_pool1d(i, i.size(2)).squeeze(2) for i in x], 1))


def test_what_a_kernel_takes_whole_is_summed_over():
    space = traced(TextCNN(), torch.randint(20, (2, 7)))
    assert sorted(d.size for d in space.dimensions.values()) == [6, 6, 12], space.frozen
    assert_exact(space)
    structure = space.sample(seed=1)
    small = space.export(structure)
    assert [c.kernel_size for c in small.convs] == [tuple(c.weight.shape[2:]) for c in small.convs]
    assert space.cost(structure).macs == counted_macs(small, space.example_inputs)
    searched(space, "60% params")
