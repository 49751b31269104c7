"""The structural patterns of published architectures, each as the smallest network that has it.

What `nets.py` has already (dense concatenation, grouped convolutions, squeeze-excite, gated MLPs, attention by fused and
split projections ...) is not here again.  A factory in `PATTERNS` returns (model, example inputs).  Sizes that mean
different things differ, so that a dimension is known by its kind and size; `EXPECTED` says which ones a network must
offer, these and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from nets import GroupedAttention, PreNorm
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU that keep the size of the picture."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def picture(size: int = 8) -> Tensor:
    return torch.randn(2, 3, size, size)


# -- aggregation ------------------------------------------------------------------------------------------------------


class UNetPlusPlus(nn.Module):
    """Nested skip connections: node (i, j) reads every node of its level before it, and the one below, upsampled."""

    def __init__(self, widths=(6, 7, 9)):
        super().__init__()
        a, b, c = widths
        self.x00, self.x10, self.x20 = conv(3, a), conv(a, b), conv(b, c)
        self.x01, self.x11 = conv(a + b, 8), conv(b + c, 10)
        self.x02 = conv(a + 8 + 10, 11)
        self.heads = nn.ModuleList([nn.Conv2d(8, 2, 1), nn.Conv2d(11, 2, 1)])

    def forward(self, x):
        x00 = self.x00(x)
        x10 = self.x10(F.max_pool2d(x00, 2))
        x20 = self.x20(F.max_pool2d(x10, 2))
        x01 = self.x01(torch.cat([x00, up(x10)], 1))
        x11 = self.x11(torch.cat([x10, up(x20)], 1))
        x02 = self.x02(torch.cat([x00, x01, up(x11)], 1))
        return [head(t) for head, t in zip(self.heads, (x01, x02))]


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def unet_plus_plus():
    return UNetPlusPlus(), picture()


class Exponential(nn.Module):
    """Sparse aggregation: layer i reads the layers at i - 1, i - 2, i - 4, ... (SparseNet), concatenated."""

    def __init__(self):
        super().__init__()
        widths = [7]
        self.stem, self.layers = conv(3, 7), nn.ModuleList()
        for i in range(1, 6):
            self.layers.append(conv(sum(widths[j] for j in self.read(i)), 5 + i))
            widths.append(5 + i)
        self.head = nn.Linear(sum(widths[j] for j in self.read(6)), 4)

    @staticmethod
    def read(i):
        return [i - 2**k for k in range(i.bit_length()) if i >= 2**k]

    def forward(self, x):
        seen = [self.stem(x)]
        for i, layer in enumerate(self.layers, 1):
            seen.append(layer(torch.cat([seen[j] for j in self.read(i)], 1)))
        return self.head(torch.cat([seen[j] for j in self.read(len(seen))], 1).mean((2, 3)))


def exponential_aggregation():
    return Exponential(), picture(6)


class Tree(nn.Module):
    """Hierarchical aggregation (DLA): a root joins what both subtrees made, and children handed down to it."""

    def __init__(self, levels, inputs, outputs, handed=0):
        super().__init__()
        self.levels = levels
        if levels == 1:
            self.left, self.right = conv(inputs, outputs), conv(outputs, outputs)
            self.root = conv(2 * outputs + handed, outputs, 1)
        else:
            self.left = Tree(levels - 1, inputs, outputs)
            self.right = Tree(levels - 1, outputs, outputs, handed + outputs)

    def forward(self, x, children=()):
        if self.levels > 1:
            left = self.left(x)
            return self.right(left, [*children, left])
        left = self.left(x)
        right = self.right(left)
        return self.root(torch.cat([right + left, left, *children], 1))


def tree_aggregation():
    return nn.Sequential(conv(3, 6), Tree(2, 6, 10), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)), picture(
        6
    )


class TwoInputCell(nn.Module):
    """A cell of NASNet or DARTS: reads the two cells before it, joins its inner nodes."""

    def __init__(self, before, last, width):
        super().__init__()
        self.pre0, self.pre1 = conv(before, width, 1), conv(last, width, 1)
        self.left, self.right = conv(width, width, 3, groups=width), conv(width, width, 1)

    def forward(self, before, last):
        a, b = self.pre0(before), self.pre1(last)
        first = self.left(a) + b
        return torch.cat([first, self.right(b) + a, F.avg_pool2d(first, 3, 1, 1)], 1)


class TwoInputCells(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv(3, 9)
        self.cells = nn.ModuleList([TwoInputCell(9, 9, 5), TwoInputCell(9, 15, 6), TwoInputCell(15, 18, 7)])
        self.head = nn.Linear(21, 4)

    def forward(self, x):
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last.mean((2, 3)))


def two_input_cells():
    return TwoInputCells(), picture(6)


# -- channels ---------------------------------------------------------------------------------------------------------


class Shuffle(nn.Module):
    """ShuffleNet V2: half of the channels pass, the others are convolved, then both are interleaved."""

    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(conv(half, half, 1), conv(half, half, 3, groups=half), conv(half, half, 1))

    def forward(self, x):
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, self.branch(changed)], 1)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def split_shuffle():
    net = nn.Sequential(conv(3, 20), Shuffle(20), Shuffle(20), conv(20, 9, 1), nn.Flatten(), nn.Linear(9 * 16, 4))
    return net, picture(4)


class SelectiveKernel(nn.Module):
    """Branches of different kernels, weighted for each channel by a softmax over the branches."""

    def __init__(self, width, reduced):
        super().__init__()
        self.branches = nn.ModuleList([conv(width, width, 3), conv(width, width, 5)])
        self.reduce, self.select = conv(width, reduced, 1), nn.Conv2d(reduced, 2 * width, 1)

    def forward(self, x):
        x = torch.stack([branch(x) for branch in self.branches], 1)  # (b, 2, c, h, w)
        score = self.select(self.reduce(x.sum(1).mean((2, 3), keepdim=True)))
        b, c, h, w = score.shape
        score = score.view(b, 2, c // 2, h, w).softmax(1)
        return (x * score).sum(1)


def selective_kernel():
    return nn.Sequential(conv(3, 10), SelectiveKernel(10, 6), nn.Conv2d(10, 4, 1)), picture(6)


class Paths(nn.Module):
    """Each half of the channels goes its own way; a number that nothing else reads says how many ways there are (SKNet)."""

    def __init__(self, channels=20, paths=2):
        super().__init__()
        self.channels, self.paths = channels, paths
        self.ways = nn.ModuleList(conv(channels // paths, 9, 3 + 2 * i) for i in range(paths))

    def forward(self, x):
        return sum(way(part) for way, part in zip(self.ways, x.split(self.channels // self.paths, 1)))


def paths_by_number():
    return nn.Sequential(conv(3, 20), Paths(), nn.Conv2d(9, 4, 1)), picture(6)


class SpatialAttention(nn.Module):
    """CBAM: a map from the mean and the maximum over the channels."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        return x * self.mix(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


def spatial_attention():
    return nn.Sequential(conv(3, 10), SpatialAttention(), nn.Conv2d(10, 4, 1)), picture(6)


class MeanGate(nn.Module):
    """A gate from the mean over the channels alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * (self.scale * x.mean(1, keepdim=True)).sigmoid()


def channel_mean():
    return nn.Sequential(conv(3, 10), MeanGate(), nn.Conv2d(10, 4, 1)), picture(6)


def pixel_unshuffle():
    net = nn.Sequential(conv(3, 7), nn.PixelUnshuffle(2), conv(28, 9), nn.Conv2d(9, 4, 1))
    return net, picture(6)


class Haar(nn.Module):
    """One level of the Haar transform as a fixed depthwise convolution: four channels from each.

    The four bands are an axis too: a band can go, from all channels.
    """

    def __init__(self, channels):
        super().__init__()
        low, high = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
        filters = torch.stack([torch.outer(a, b) / 2 for a in (low, high) for b in (low, high)])[
            :, None
        ]  # (4, 1, 2, 2)
        self.channels = channels
        self.register_buffer("filters", filters.repeat(channels, 1, 1, 1))

    def forward(self, x):
        return F.conv2d(x, self.filters, stride=2, groups=self.channels)


class HaarFromOne(nn.Module):
    """The same from the four filters alone, repeated by the number of channels that arrives."""

    def __init__(self):
        super().__init__()
        low, high = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
        self.register_buffer(
            "filters", torch.stack([torch.outer(a, b) / 2 for a in (low, high) for b in (low, high)])[:, None]
        )

    def forward(self, x):
        return F.conv2d(x, self.filters.repeat(x.shape[1], 1, 1, 1), stride=2, groups=x.shape[1])


def haar():
    return nn.Sequential(conv(3, 7), Haar(7), conv(28, 9), nn.Conv2d(9, 4, 1)), picture(6)


def haar_from_one():
    return nn.Sequential(conv(3, 7), HaarFromOne(), conv(28, 9), nn.Conv2d(9, 4, 1)), picture(6)


class RepVgg(nn.Module):
    """A 3x3, a 1x1 and an identity branch, each with a BatchNorm of its own."""

    def __init__(self, width):
        super().__init__()
        self.dense, self.point = (nn.Conv2d(width, width, k, padding=k // 2, bias=False) for k in (3, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x):
        branches = (self.dense(x), self.point(x), x)
        return sum(norm(branch) for norm, branch in zip(self.norms, branches)).relu()


def repvgg():
    return nn.Sequential(conv(3, 10), RepVgg(10), nn.Conv2d(10, 13, 3), RepVgg(13), nn.Conv2d(13, 4, 1)), picture(6)


# -- norms and parametrisations ---------------------------------------------------------------------------------------


def instance_norm():
    norms = nn.InstanceNorm2d(10, affine=True), nn.InstanceNorm2d(13), nn.InstanceNorm2d(9, track_running_stats=True)
    net = nn.Sequential(
        nn.Conv2d(3, 10, 3), norms[0], nn.ReLU(), nn.Conv2d(10, 13, 3), norms[1], nn.ReLU(), nn.Conv2d(13, 9, 1), norms[2],
        nn.ReLU(), nn.Conv2d(9, 4, 1),
    )  # fmt: skip
    return net, picture()


class ManualLayerNorm(nn.Module):
    """As a user would write it; `unbiased` variances divide by one less."""

    def __init__(self, width, form):
        super().__init__()
        self.form, self.weight, self.bias = (
            form,
            nn.Parameter(torch.rand(width) + 0.5),
            nn.Parameter(torch.randn(width)),
        )

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        if self.form == "var":
            variance = x.var(-1, keepdim=True, unbiased=False)
        else:
            variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


def manual_layer_norm():
    return nn.Sequential(nn.Linear(8, 18), ManualLayerNorm(18, "var"), nn.GELU(), nn.Linear(18, 4)), torch.randn(3, 8)


def layer_norm_by_squares():
    return nn.Sequential(nn.Linear(8, 18), ManualLayerNorm(18, "mean"), nn.GELU(), nn.Linear(18, 4)), torch.randn(3, 8)


class ChannelsFirstNorm(ManualLayerNorm):
    """LayerNorm over the channels of a picture, as ConvNeXt had it first."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias[:, None, None]


def channels_first_norm():
    return nn.Sequential(nn.Conv2d(3, 14, 3), ChannelsFirstNorm(14, ""), nn.GELU(), nn.Conv2d(14, 4, 1)), picture(6)


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2: each channel by its norm over the picture, against the mean norm of all channels."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        norm = x.norm(p=2, dim=(1, 2), keepdim=True)  # (b, 1, 1, c)
        return x + self.weight * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + self.bias


class ResponseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(3, 14), GlobalResponseNorm(14), nn.Linear(14, 4)

    def forward(self, x):
        return self.down(self.norm(F.gelu(self.up(x))))


def global_response_norm():
    return ResponseNet(), torch.randn(2, 5, 5, 3)


def weight_norm():
    first, second = (parametrizations.weight_norm(layer) for layer in (nn.Linear(8, 12), nn.Linear(12, 15)))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(15, 4)), torch.randn(3, 8)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised over its inputs by a batch norm (BiT, NFNet)."""

    def __init__(self, *sizes, affine, **options):
        super().__init__(*sizes, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)) if affine else None
        self.shift = nn.Parameter(torch.zeros(self.out_channels)) if affine else None

    def forward(self, x):
        gain = None if self.gain is None else (self.gain * 0.7).view(-1)
        weight = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(weight, None, None, gain, self.shift, training=True, momentum=0.0, eps=1e-2)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, groups=self.groups)


def weight_standardisation():
    return nn.Sequential(
        Standardised(3, 12, 3, affine=False), nn.ReLU(), Standardised(12, 15, 3, affine=True), nn.ReLU(),
        Standardised(15, 16, 1, affine=False), nn.ReLU(), nn.Conv2d(16, 4, 1),
    ), picture(6)  # fmt: skip


class Sideways(nn.Module):
    """Tokens of three scales mixed by a convolution of size one over their stack: the width is its spatial axis (CoaT)."""

    def __init__(self):
        super().__init__()
        self.scales, self.mix = nn.ModuleList(nn.Linear(6, 14) for _ in range(3)), nn.Conv1d(3, 1, 1)
        self.head = nn.Linear(14, 4)

    def forward(self, x):
        return self.head(self.mix(torch.stack([scale(x) for scale in self.scales], 1)).squeeze(1))


def sideways_convolution():
    return Sideways(), torch.randn(2, 6)


def spectral_norm():
    first, second = nn.Linear(8, 12), parametrizations.spectral_norm(nn.Linear(12, 15))
    return nn.Sequential(
        first, nn.ReLU(), second, nn.ReLU(), nn.Linear(15, 11), nn.ReLU(), nn.Linear(11, 4)
    ), torch.randn(3, 8)


# -- attention --------------------------------------------------------------------------------------------------------


def mqa_by_expand():
    """Multi-query attention: one key-value head for all query heads."""
    return PreNorm(GroupedAttention(groups=1, repeats=3)), torch.randn(2, 7, 6)


def mqa_native():
    return PreNorm(GroupedAttention(groups=1, repeats=3, native=True)), torch.randn(2, 7, 6)


class RotaryAttention(nn.Module):
    """Rotary positions of pairs or of halves of the head dim, from tables of the module that must shrink with it."""

    def __init__(self, interleaved, width=20, heads=3, head_dim=8):
        super().__init__()
        self.interleaved, self.heads, self.head_dim = interleaved, heads, head_dim
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.proj = nn.Linear(heads * head_dim, width)
        angle = torch.arange(16)[:, None] * (0.5 ** torch.arange(head_dim // 2))  # (16, d / 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def rotated(self, x):
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        if self.interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t(x).view(b, n, self.heads, -1).transpose(1, 2) for t in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, scale=0.3)
        return self.proj(x.transpose(1, 2).flatten(2))


class Stream(nn.Module):
    """An attention block in a residual stream of 20, between an embedding and a head."""

    def __init__(self, attention):
        super().__init__()
        self.embed, self.norm, self.attn, self.head = nn.Linear(6, 20), nn.LayerNorm(20), attention, nn.Linear(20, 5)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attn(self.norm(x)))


class RotaryInPart(RotaryAttention):
    """A part of each head is rotated; queries, keys and values are laid out by one attribute."""

    def __init__(self, rotated=8, width=20, heads=3, head_dim=12):
        super().__init__(False, width, heads, rotated)
        self.head_dim = head_dim
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.proj = nn.Linear(heads * head_dim, width)

    def rotated(self, x):
        n = 2 * self.cos.shape[1]
        return torch.cat([super().rotated(x[..., :n]), x[..., n:]], -1)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (t(x).view(b, n, -1, self.head_dim).transpose(1, 2) for t in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, scale=0.3)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


def rotary_in_part():
    return Stream(RotaryInPart()), torch.randn(2, 7, 6)


def rotary_interleaved():
    return Stream(RotaryAttention(True)), torch.randn(2, 7, 6)


def rotary_tables():
    return Stream(RotaryAttention(False)), torch.randn(2, 7, 6)


class BiasedAttention(nn.Module):
    """Scores with a bias for each head: ALiBi slopes, a table of relative positions (Swin), buckets (T5)."""

    def __init__(self, form, width=20, heads=4, head_dim=6, tokens=7):
        super().__init__()
        self.form, self.heads = form, heads
        self.qkv, self.proj = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)
        i = torch.arange(tokens)
        self.register_buffer("distance", i[None] - i[:, None])  # (n, n)
        if form == "alibi":
            self.register_buffer("slopes", 0.5 ** torch.arange(1, heads + 1))
        elif form == "table":
            self.table = nn.Parameter(torch.randn(2 * tokens - 1, heads))
            self.register_buffer("index", self.distance + tokens - 1)
        else:
            self.buckets = nn.Embedding(5, heads)

    def bias(self, n):
        if self.form == "alibi":
            return self.slopes[:, None, None] * -self.distance.abs()
        if self.form == "table":
            return self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1)
        return self.buckets(self.distance.abs().clamp(max=4)).permute(2, 0, 1)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * 0.3 + self.bias(n)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1))


def alibi():
    return Stream(BiasedAttention("alibi")), torch.randn(2, 7, 6)


def relative_position_table():
    return Stream(BiasedAttention("table")), torch.randn(2, 7, 6)


def relative_position_buckets():
    return Stream(BiasedAttention("buckets")), torch.randn(2, 7, 6)


class EinsumAttention(nn.Module):
    """Projections and products by einsum, with weights that have a dimension for the heads."""

    def __init__(self, width=20, heads=3, head_dim=6):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, width, heads, head_dim) / 4)
        self.out = nn.Parameter(torch.randn(heads, head_dim, width) / 4)

    def forward(self, x):
        q, k, v = torch.einsum("bnc,tchd->tbnhd", x, self.qkv)
        weight = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(0.3).softmax(-1)
        return torch.einsum("bhnm,bmhd,hdc->bnc", weight, v, self.out)


def einsum_attention():
    return Stream(EinsumAttention()), torch.randn(2, 7, 6)


class WidthByShape(nn.Module):
    """Attention with rotated heads that joins them by the width of what came in."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, head_dim = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("angles", torch.rand(7, head_dim // 2))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # (b, h, n, d)
        cos, sin = torch.cat([self.angles.cos()] * 2, -1), torch.cat([self.angles.sin()] * 2, -1)
        q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
        weight = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
        return self.out((weight @ v).transpose(1, 2).reshape(b, n, c))


def rotated_width_by_shape():
    """All of width, heads and head size change together, so head size stays and the others keep one share."""
    return nn.Sequential(nn.Linear(6, 24), WidthByShape(24, 3), WidthByShape(24, 3), nn.Linear(24, 5)), torch.randn(
        2, 7, 6
    )


class ShapeOfAPart(nn.Module):
    """A table of positions, as many as there are tokens in the last channel of what is embedded (BART)."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions, self.head = nn.Linear(6, 14), nn.Embedding(9, 14), nn.Linear(14, 5)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.positions(torch.arange(x[:, :, -1].shape[1], device=x.device)))


def shape_of_a_part():
    return ShapeOfAPart(), torch.randn(2, 7, 6)


class NormAct(nn.Module):
    """A norm without a bias that ends with an activation: what is behind it is no multiple of what it gives (MobileNetV5)."""

    def __init__(self, width, centred):
        super().__init__()
        self.weight, self.centred = nn.Parameter(torch.ones(width)), centred

    def forward(self, x):
        if self.centred:
            return F.gelu(F.layer_norm(x, (x.shape[-1],), self.weight))
        return F.gelu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight)


def norm_with_activation():
    layers = nn.Linear(6, 14), NormAct(14, True), nn.Linear(14, 17), NormAct(17, False), nn.Linear(17, 5)
    return nn.Sequential(*layers), torch.randn(2, 7, 6)


class NormOfAny(nn.Module):
    """One norm for tokens and for what they are pooled to (BLIP)."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(6, 14), nn.LayerNorm(14), nn.Linear(14, 5)

    def forward(self, x):
        x = self.norm(self.embed(x))
        return self.head(x) + self.head(self.norm(x[:, 0])).unsqueeze(1)


def norm_of_any_rank():
    return NormOfAny(), torch.randn(2, 7, 6)


class RelativeShift(nn.Module):
    """Scores for each distance become scores for each place by a view of other rows: heads are not concerned."""

    def __init__(self, width=20, heads=3, head_dim=5):
        super().__init__()
        self.heads = heads
        self.q, self.v = nn.Linear(width, heads * head_dim), nn.Linear(width, heads * head_dim)
        self.distances, self.out = (
            nn.Parameter(torch.randn(heads, head_dim, 13) / 2),
            nn.Linear(heads * head_dim, width),
        )

    def forward(self, x):
        q, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.v))
        scores = F.pad(q @ self.distances, (1, 0))  # (b, h, 7, 14)
        b, h, n, m = scores.shape
        scores = scores.view(b, h, m, n)[:, :, 1:].reshape(b, h, n, m - 1)[..., :n]
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def relative_shift():
    return Stream(RelativeShift()), torch.randn(2, 7, 6)


class GroupsAndHeads(nn.Module):
    """Groups of a convolution and heads that do not divide each other: 48 as 4 x 12 and as 6 x 8 (WavLM, SqueezeBERT)."""

    def __init__(self, width=48, groups=4, heads=6):
        super().__init__()
        self.heads, self.width = heads, width
        self.mix = nn.Conv1d(width, width, 3, padding=1, groups=groups)
        self.gate, self.bias = nn.Linear(width // heads, 1), nn.Parameter(torch.randn(heads, 1))

    def forward(self, x):
        b, n, _ = x.shape
        x.new_zeros(b, 1, n).expand(-1, self.heads, -1)  # nobody reads it: no weight says how many heads it has
        y = self.mix(x.transpose(1, 2)).transpose(1, 2).reshape(b, n, self.heads, -1)
        y = y * (self.gate(y) + self.bias).sigmoid()
        return y.view(b, n, self.width)


def groups_and_heads():
    return nn.Sequential(nn.Linear(6, 48), GroupsAndHeads(), nn.Linear(48, 5)), torch.randn(2, 7, 6)


class UnequalChunks(nn.Module):
    """Channels in chunks of which the last is smaller: 45 in three of 12 and one of 9 keep one share of each (EdgeNeXt)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv(3, 45), nn.Conv2d(45, 5, 1)
        self.convs = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))

    def forward(self, x):
        chunks, y, out = self.first(x).chunk(len(self.convs) + 1, dim=1), None, []
        for layer, part in zip(self.convs, chunks):
            y = layer(part if y is None else part + y)
            out.append(y)
        return self.last(torch.cat([*out, chunks[-1]], 1))


def unequal_chunks():
    return UnequalChunks(), picture()


class LatentAttention(nn.Module):
    """Keys and values from a narrow latent; a part of each head is rotated, as complex numbers, in place (DeepSeek)."""

    def __init__(self, width=20, heads=3, plain=8, rotated=6, value=5, latent=10):
        super().__init__()
        self.sizes, self.parts, self.latent = [plain, rotated], [plain, value], latent
        self.q = nn.Linear(width, heads * (plain + rotated))
        self.down, self.up = nn.Linear(width, latent + rotated), nn.Linear(latent, heads * (plain + value))
        self.out = nn.Linear(heads * value, width)
        self.register_buffer("angles", torch.rand(7, rotated // 2))

    def forward(self, x):
        b, n, _ = x.shape
        plain, turned = self.q(x).view(b, n, -1, sum(self.sizes)).transpose(1, 2).split(self.sizes, -1)
        latent, shared = self.down(x).split([self.latent, self.sizes[1]], -1)
        key, value = self.up(latent).view(b, n, -1, sum(self.parts)).transpose(1, 2).split(self.parts, -1)
        query = torch.cat([plain, self.turn(turned)], -1)
        keys = key.new_empty(*key.shape[:-1], sum(self.sizes))
        keys[..., : self.sizes[0]].copy_(key)
        keys[..., self.sizes[0] :].copy_(self.turn(shared.unsqueeze(1)).expand(-1, key.shape[1], -1, -1))
        weight = (query @ keys.transpose(-2, -1) * 0.3).softmax(-1)
        return self.out((weight @ value).transpose(1, 2).reshape(b, n, -1))

    def turn(self, x):
        x = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(x * torch.polar(torch.ones_like(self.angles), self.angles)).flatten(-2)


def latent_attention():
    return Stream(LatentAttention()), torch.randn(2, 7, 6)


class MultiheadAttentions(nn.Module):
    """PyTorch's layer three times: as it comes, with its scores wanted, and with keys and values of other widths."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 24), nn.LayerNorm(24)
        self.plain, self.scores = (nn.MultiheadAttention(24, 4, batch_first=True) for _ in range(2))
        self.cross = nn.MultiheadAttention(24, 4, kdim=10, vdim=9, batch_first=True)
        self.key, self.value, self.head = nn.Linear(6, 10), nn.Linear(6, 9), nn.Linear(24, 5)

    def forward(self, x):
        key, value, x = self.key(x), self.value(x), self.embed(x)
        y = self.norm(x)
        x = x + self.plain(y, y, y, need_weights=False)[0]
        x = x + self.scores(x, x, x)[0]
        return self.head(x + self.cross(x, key, value, need_weights=False)[0])


def multihead_attentions():
    return MultiheadAttentions(), torch.randn(2, 7, 6)


# -- residual streams -------------------------------------------------------------------------------------------------


class Feed(nn.Module):
    """x + scale * f(norm(x)), the scale a parameter of some form."""

    def __init__(self, width, hidden, form=""):
        super().__init__()
        self.form = form
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        if form == "layer_scale":
            self.gamma = nn.Parameter(1e-4 * torch.ones(width))
        elif form == "weights":
            self.alpha = nn.Parameter(torch.ones(2))
        elif form == "low_rank":
            self.low, self.high = nn.Linear(width, 5, bias=False), nn.Linear(5, width, bias=False)

    def forward(self, x):
        y = self.down(F.gelu(self.up(self.norm(x))))
        if self.form == "layer_scale":
            return x + self.gamma * y
        if self.form == "weights":
            a, b = self.alpha.softmax(0)
            return a * x + b * y
        if self.form == "low_rank":
            return x + y + self.high(self.low(x))
        return x + y


def feeds(form):
    net = nn.Sequential(nn.Linear(6, 18), *(Feed(18, 22, form) for _ in range(3)), nn.Linear(18, 5))
    return net, torch.randn(2, 7, 6)


def layer_scale():
    return feeds("layer_scale")


def learned_residual_weights():
    """LAuReL-RW: both summands weighted.  Without the block the stream would lose its weight: no depth."""
    return feeds("weights")


def low_rank_residual():
    """LAuReL-LR: a low-rank product beside the identity."""
    return feeds("low_rank")


class TiedLayers(nn.Module):
    """One block called over and over (ALBERT)."""

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(6, 18), Feed(18, 22), nn.Linear(18, 5)

    def forward(self, x):
        x = self.embed(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


def tied_layers():
    return TiedLayers(), torch.randn(2, 7, 6)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.embed, self.blocks = nn.Linear(6, 18), nn.ModuleList(Feed(18, 22) for _ in range(3))
        self.head = nn.Linear(18, 5)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def checkpointed():
    return Checkpointed(False), torch.randn(2, 7, 6)


def checkpointed_reentrant():
    return Checkpointed(True), torch.randn(2, 7, 6)


class MaskedTokens(nn.Module):
    """Only training reads the token that stands for masked ones; what is normalised then is what always is."""

    def __init__(self):
        super().__init__()
        self.embed, self.token = nn.Linear(6, 18), nn.Parameter(torch.randn(18))
        self.feed, self.norm, self.head = Feed(18, 22), MeanGate(), nn.Linear(18, 5)

    def forward(self, x):
        x = self.embed(x)
        if self.training:
            x = torch.cat([x[:, :-1], self.token.expand(x.shape[0], 1, -1)], 1)
        return self.head(self.norm(self.feed(x).transpose(1, 2)).transpose(1, 2))


def token_of_training():
    return MaskedTokens(), torch.randn(2, 7, 6)


class BareParameters(nn.Module):
    """Weights without a module: a class token, a matrix, a bias in a ParameterDict, a list of scales."""

    def __init__(self):
        super().__init__()
        self.token, self.weight = nn.Parameter(torch.randn(1, 1, 12)), nn.Parameter(torch.randn(12, 15))
        self.embed = nn.Linear(6, 12)
        self.biases = nn.ParameterDict({"first": torch.randn(15)})
        self.scales = nn.ParameterList([torch.rand(15) + 0.5])
        self.head = nn.Linear(15, 5)

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)
        x = (x @ self.weight + self.biases["first"]).relu() * self.scales[0]
        return self.head(x[:, 0])


def bare_parameters():
    return BareParameters(), torch.randn(2, 7, 6)


class NestedOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.boxes, self.classes = conv(3, 9), nn.Conv2d(9, 4, 1), nn.Conv2d(9, 6, 1)
        self.mask = nn.Sequential(conv(9, 7), nn.Conv2d(7, 2, 1))

    def forward(self, x):
        x = self.stem(x)
        return {
            "detection": {"boxes": [self.boxes(x)], "classes": (self.classes(x), {"size": 6})},
            "masks": {"low": self.mask(x)},
        }


def nested_output():
    return NestedOutput(), picture(6)


# -- recurrent layers -------------------------------------------------------------------------------------------------


class RecurrentStack(nn.Module):
    """Two recurrent layers; the last hidden state is the result."""

    def __init__(self, cell, **options):
        super().__init__()
        self.embed, self.cell = nn.Linear(6, 9), cell(9, 12, batch_first=True, **options)
        self.head = nn.Linear(24 if options.get("bidirectional") else 12, 4)

    def forward(self, x):
        return self.head(self.cell(self.embed(x).relu())[0][:, -1])


def lstm_two_layers():
    return RecurrentStack(nn.LSTM, num_layers=2), torch.randn(2, 5, 6)


def gru_both_ways():
    return RecurrentStack(nn.GRU, bidirectional=True), torch.randn(2, 5, 6)


class OwnCell(nn.Module):
    """An LSTM cell over time, as PyTorch's cell and as a sum of four equal pieces."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(6, 11)
        self.x, self.h, self.head = nn.Linear(11, 4 * 13), nn.Linear(13, 4 * 13, bias=False), nn.Linear(13, 4)

    def forward(self, x):
        state, h, c = None, x.new_zeros(x.shape[0], self.h.in_features), 0.0
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            i, f, g, o = (self.x(state[0]) + self.h(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def lstm_cells():
    return OwnCell(), torch.randn(2, 3, 6)


# -- mixtures of experts ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Nine experts in two tensors, of which a router chooses two for each row; `route` gives weights and numbers."""

    def __init__(self, route, experts=9, width=12, hidden=20):
        super().__init__()
        self.num_experts, self.top_k, self.groups, self.route = experts, 2, 3, route
        self.router = nn.Linear(width, experts)
        self.register_buffer("correction", torch.randn(experts) / 4)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / 3)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 3)
        self.bias = nn.Parameter(torch.randn(experts, hidden) / 3)


class GroupedExperts(Experts):
    """Rows sorted by expert, and a product for each group of them."""

    def forward(self, x):
        weight, number = self.route(self, self.router(x))
        number, order = number.flatten().sort()
        ends = torch.histc(number.float(), self.num_experts, 0, self.num_experts - 1).cumsum(0, dtype=torch.int32)
        y = torch._grouped_mm(x[order // self.top_k], self.up, ends) + self.bias[number]
        y = torch._grouped_mm(y.relu(), self.down, ends) * weight.flatten()[order, None]
        return y[order.argsort()].view(*weight.shape, -1).sum(1)


class PickedExperts(Experts):
    """The matrices of each row, picked by number."""

    def forward(self, x):
        weight, number = self.route(self, self.router(x))
        y = torch.einsum("td,tkdh->tkh", x, self.up[number]) + self.bias[number]
        return torch.einsum("tkh,tkhd,tk->td", y.relu(), self.down[number], weight)


class DenseExperts(Experts):
    """Every expert for every row, weighted; `route` gives a weight for each."""

    def forward(self, x):
        weight = self.route(self, self.router(x))
        y = torch.bmm(x.expand(self.num_experts, -1, -1), self.up) + self.bias[:, None]
        return (torch.bmm(y.relu(), self.down) * weight.t()[..., None]).sum(0)


def of_probabilities(experts, logits):
    """Mixtral: the largest probabilities, normalised."""
    weight, number = logits.softmax(-1).topk(experts.top_k)
    return weight / weight.sum(-1, keepdim=True), number


def of_logits(experts, logits):
    """GPT-OSS: a softmax of the largest logits."""
    weight, number = torch.topk(logits, experts.top_k, dim=-1)
    return weight.softmax(-1), number


def in_groups(experts, logits):
    """DeepSeek-V3: the largest sigmoids with a correction, among those of the best two of three groups."""
    score = logits.sigmoid()
    choice = score + experts.correction
    best = choice.view(-1, experts.groups, experts.num_experts // experts.groups).topk(2)[0].sum(-1)
    mask = torch.zeros_like(best).scatter_(1, best.topk(2, sorted=False)[1], 1).bool()
    mask = (
        mask.unsqueeze(-1)
        .expand(-1, experts.groups, experts.num_experts // experts.groups)
        .reshape(-1, experts.num_experts)
    )
    number = choice.masked_fill(~mask, float("-inf")).topk(experts.top_k, sorted=False)[1]
    return score.gather(1, number), number


def one_by_one(experts, logits):
    """PhiMoE: the largest, then the largest of the others."""
    first, number = logits.max(-1, keepdim=True)
    second, other = logits.scatter(-1, number, float("-inf")).max(-1, keepdim=True)
    return torch.cat([first, second], -1).softmax(-1), torch.cat([number, other], -1)


def one_hot(experts, logits):
    """Weights of the chosen, as one-hot vectors."""
    weight, number = logits.softmax(-1).topk(experts.top_k)
    return (F.one_hot(number, experts.num_experts) * weight[..., None]).sum(1)


def compared(experts, logits):
    weight, number = logits.sigmoid().topk(experts.top_k)
    every = torch.arange(experts.num_experts)
    return ((number[..., None] == every) * weight[..., None]).sum(-2)


def scattered(experts, logits):
    weight, number = logits.topk(experts.top_k)
    return torch.full_like(logits, float("-inf")).scatter(-1, number, weight).softmax(-1)


def switch(experts, logits):
    """Switch: one expert, by its probability."""
    weight = logits.softmax(-1)
    return F.one_hot(weight.argmax(-1), experts.num_experts) * weight.amax(-1, keepdim=True)


def everyone(experts, logits):
    return logits.softmax(-1)


def mixture(kind, route):
    net = nn.Sequential(nn.Linear(5, 12), kind(route), nn.ReLU(), nn.Linear(12, 3))
    return net, torch.randn(16, 5)


def experts_grouped():
    return mixture(GroupedExperts, of_probabilities)


def experts_by_logits():
    return mixture(GroupedExperts, of_logits)


def experts_in_groups():
    return mixture(GroupedExperts, in_groups)


def experts_one_by_one():
    return mixture(GroupedExperts, one_by_one)


def einsum_experts():
    return mixture(PickedExperts, of_logits)


def experts_one_hot():
    return mixture(DenseExperts, one_hot)


def experts_compared():
    return mixture(DenseExperts, compared)


def experts_scattered():
    return mixture(DenseExperts, scattered)


def experts_switch():
    return mixture(DenseExperts, switch)


def experts_dense():
    return mixture(DenseExperts, everyone)


class Codebook(nn.Module):
    """Vector quantisation: each row becomes the nearest of seven."""

    def __init__(self):
        super().__init__()
        self.book = nn.Embedding(7, 10)

    def forward(self, x):
        distance = (x[:, None] - self.book.weight).square().sum(-1)
        return self.book(distance.argmin(-1))


def codebook():
    return nn.Sequential(nn.Linear(5, 10), Codebook(), nn.Linear(10, 3)), torch.randn(40, 5)


# -- the list ---------------------------------------------------------------------------------------------------------

W, H, D = "width", "heads", "depth"
EXPECTED: dict[Callable[[], tuple[nn.Module, Any]], dict[tuple[str, int], int]] = {
    unet_plus_plus: {(W, n): 1 for n in (6, 7, 9, 8, 10, 11)},
    exponential_aggregation: {(W, 7): 2, (W, 6): 1, (W, 8): 1, (W, 9): 1, (W, 10): 1},
    tree_aggregation: {(W, 6): 1, (W, 10): 4},
    two_input_cells: {(W, 9): 1, (W, 5): 1, (W, 6): 1, (W, 7): 1},
    split_shuffle: {(W, 10): 3, (W, 5): 2, (W, 9): 1},
    selective_kernel: {(W, 10): 2, (W, 6): 1},
    paths_by_number: {(W, 10): 2, (W, 9): 1},
    spatial_attention: {(W, 10): 1},
    channel_mean: {(W, 10): 1},
    pixel_unshuffle: {(W, 7): 1, (W, 9): 1},
    haar: {(W, 7): 1, (W, 9): 1, (W, 4): 1},
    haar_from_one: {(W, 7): 1, (W, 9): 1, (W, 4): 1},
    repvgg: {(W, 10): 1, (W, 13): 1},
    instance_norm: {(W, 10): 1, (W, 13): 1, (W, 9): 1},
    manual_layer_norm: {(W, 18): 1},
    layer_norm_by_squares: {(W, 18): 1},
    channels_first_norm: {(W, 14): 1},
    global_response_norm: {(W, 14): 1},
    weight_norm: {(W, 12): 1, (W, 15): 1},
    weight_standardisation: {(W, 12): 1, (W, 15): 1, (W, 16): 1},
    sideways_convolution: {(W, 14): 1, ("choice", 3): 1},
    spectral_norm: {(W, 12): 1, (W, 15): 1, (W, 11): 1},
    mqa_by_expand: {(W, 24): 1, (H, 3): 1, (W, 8): 2},
    mqa_native: {(W, 24): 1, (H, 3): 1, (W, 8): 2},
    rotary_interleaved: {(W, 20): 1, (H, 3): 1, (W, 4): 1, (W, 8): 1},
    rotary_tables: {(W, 20): 1, (H, 3): 1, (W, 4): 1, (W, 8): 1},
    rotary_in_part: {(W, 20): 1, (H, 3): 1, (W, 4): 2, (W, 12): 1},
    alibi: {(W, 20): 1, (H, 4): 1, (W, 6): 1},
    relative_position_table: {(W, 20): 1, (H, 4): 1, (W, 6): 1},
    relative_position_buckets: {(W, 20): 1, (H, 4): 1, (W, 6): 1},
    einsum_attention: {(W, 20): 1, (H, 3): 1, (W, 6): 1},
    rotated_width_by_shape: {(H, 3): 2, (H, 24): 2, (W, 24): 1},
    shape_of_a_part: {(W, 14): 1},
    norm_with_activation: {(W, 14): 1, (W, 17): 1},
    norm_of_any_rank: {(W, 14): 1},
    relative_shift: {(W, 20): 1, (H, 3): 1, (W, 5): 2},
    groups_and_heads: {(W, 2): 1, (W, 12): 1, (W, 4): 1},
    unequal_chunks: {(W, 9): 1, (W, 12): 4},
    latent_attention: {(W, 20): 1, (H, 3): 1, (W, 8): 1, (W, 3): 1, (W, 5): 1, (W, 10): 1},
    multihead_attentions: {(H, 24): 1, (W, 10): 1, (W, 9): 1, (H, 4): 3},
    layer_scale: {(W, 18): 1, (W, 22): 3, (D, 3): 1},
    learned_residual_weights: {(W, 18): 1, (W, 22): 3},
    low_rank_residual: {(W, 18): 1, (W, 22): 3, (W, 5): 3, (D, 3): 1},
    tied_layers: {(W, 18): 1, (W, 22): 1},
    checkpointed: {(W, 18): 1, (W, 22): 3, (D, 3): 1},
    checkpointed_reentrant: {(W, 18): 1, (W, 22): 3, (D, 3): 1},
    token_of_training: {(W, 18): 1, (W, 22): 1},
    bare_parameters: {(W, 12): 1, (W, 15): 1},
    nested_output: {(W, 9): 1, (W, 7): 1},
    lstm_two_layers: {(W, 9): 1, (W, 12): 1},
    gru_both_ways: {(W, 9): 1, (W, 12): 1},
    lstm_cells: {(W, 11): 1, (W, 13): 1},
    experts_grouped: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    experts_by_logits: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    experts_in_groups: {(W, 3): 2, (W, 12): 2, (W, 20): 1},
    experts_one_by_one: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    einsum_experts: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    experts_one_hot: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    experts_compared: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    experts_scattered: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    experts_switch: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    experts_dense: {(W, 9): 1, (W, 12): 2, (W, 20): 1},
    codebook: {(W, 7): 1, (W, 10): 1},
}
"""Each network and, by (kind, size), the dimensions that it must offer: these and no others."""

PATTERNS = {factory.__name__: factory for factory in EXPECTED}
