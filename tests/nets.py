"""Small networks, one for each pattern that a real one may hold, and what the tests ask of any network.

A factory in `NETS` returns (model, example inputs).  Sizes that mean different things differ, so that a dimension
is known by its kind and size; `EXPECTED` says which ones each network offers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

# -- what is asked of any network -------------------------------------------------------------------------------------


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point outputs of `model` without gradients, in order."""
    with torch.no_grad():
        return floats_of(run(model, inputs))


def run(model: nn.Module, inputs: Any) -> Any:
    """`model` on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def floats_of(out: Any) -> list[Tensor]:
    """The floating-point tensors of an output, whatever holds them."""
    if dataclasses.is_dataclass(out) and not hasattr(out, "keys"):
        out = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    out = dict(out) if hasattr(out, "keys") else out
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference as a share of the largest expected magnitude; shapes must agree."""
    assert [t.shape for t in got] == [t.shape for t in expected]
    scale = max(float(t.abs().max()) for t in expected)
    assert scale > 0, "all outputs are zero: nothing is compared"
    worst = max(float((a - b).abs().max()) for a, b in zip(got, expected)) / scale
    assert worst == worst, "an output is NaN"
    return worst


@contextlib.contextmanager
def countable() -> Iterator[None]:
    """Attention by plain matrix products, the only form that PyTorch's counter sees."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def counted_macs(model: nn.Module, inputs: Any) -> int:
    """MACs of one forward, by PyTorch's counter (two FLOPs a MAC)."""
    with countable(), FlopCounterMode(display=False) as counter:
        outputs(model, inputs)
    return counter.get_total_flops() // 2


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def non_trivial(model: nn.Module) -> nn.Module:
    """In evaluation mode, with nothing constant: zeros and ones of an initialisation would hide a wrong slice."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        for p in model.parameters():
            if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                constant = float(p.flatten()[0])
                p.uniform_(0.5, 1.5).mul_(constant) if constant > 0.1 else p.uniform_(-0.2, 0.2)
    return model.eval()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a user may notice of a model: classes, attributes, hooks, modes, and every tensor with its identity."""
    modules = {}
    for path, module in model.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks") or k.endswith("_hooks_with_kwargs")}
        plain = {k: v for k, v in vars(module).items() if type(v) in (int, float, bool, str, tuple, type(None))}
        modules[path] = (type(module), list(vars(module)), list(module._modules), hooks, plain)
    tensors = {
        n: (id(t), t.requires_grad, t.detach().clone()) for n, t in model.named_parameters(remove_duplicate=False)
    }
    tensors |= {n: (id(t), False, t.detach().clone()) for n, t in model.named_buffers()}
    return {"modules": modules, "tensors": tensors}


def assert_same(before: dict[str, Any], after: dict[str, Any], values: bool = True) -> None:
    """Two fingerprints of one model agree; without `values` the elements of its tensors may have been trained."""
    assert before["modules"] == after["modules"]
    assert list(before["tensors"]) == list(after["tensors"])
    for name, (identity, grad, value) in before["tensors"].items():
        other_identity, other_grad, other = after["tensors"][name]
        assert (identity, grad, value.shape) == (other_identity, other_grad, other.shape), name
        assert not values or value.is_meta or torch.equal(value, other), name


def kinds(space: Any) -> Counter[tuple[str, int]]:
    """How many dimensions there are of each (kind, size); the axes linked to one count with sizes of their own."""
    found: Counter[tuple[str, int]] = Counter()
    for d in space.dimensions.values():
        found.update((d.kind, a.size) for a in d.axes) if d.axes else found.update([(d.kind, d.size)])
    return found


# -- convolutions -----------------------------------------------------------------------------------------------------


def conv_chain():
    """Convolutions, BatchNorm, a flatten-to-linear head; nothing residual, so nothing can be skipped."""
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    layers += [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12 * 16, 20), nn.ReLU(), nn.Linear(20, 5)]
    return nn.Sequential(*layers), torch.randn(2, 3, 8, 8)


def grouped():
    """A grouped convolution of 4 groups, each with 6 channels in and 5 out."""
    net = nn.Sequential(nn.Conv2d(3, 24, 1), nn.ReLU(), nn.Conv2d(24, 20, 3, groups=4), nn.ReLU(), nn.Conv2d(20, 5, 1))
    return net, torch.randn(2, 3, 6, 6)


def depthwise_multiplier():
    """A depthwise convolution that makes three channels of each."""
    net = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 30, 3, groups=10), nn.ReLU(), nn.Conv2d(30, 5, 1))
    return net, torch.randn(2, 3, 6, 6)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.reduce, self.expand = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x * self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(x.mean((2, 3)))


def squeeze_excite():
    return SqueezeExcite(), torch.randn(2, 3, 8, 8)


def pixel_shuffle():
    net = nn.Sequential(nn.Conv2d(3, 9 * 4, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(9, 3, 3, padding=1))
    return net, torch.randn(2, 3, 4, 4)


def conv_transpose():
    net = nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.ConvTranspose2d(10, 14, 2, stride=2), nn.BatchNorm2d(14), nn.ReLU(),
        nn.Conv2d(14, 3, 1),
    )  # fmt: skip
    return net, torch.randn(2, 3, 6, 6)


class Dense(nn.Module):
    """Each layer reads all before it; BatchNorm over what was concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(7 + 5 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(7 + 5 * i, 5, 3, padding=1) for i in range(3))
        self.head = nn.Linear(22, 4)

    def forward(self, x):
        parts = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs):
            parts.append(conv(norm(torch.cat(parts, 1)).relu()))
        return self.head(torch.cat(parts, 1).mean((2, 3)))


def dense_concat():
    return Dense(), torch.randn(2, 3, 6, 6)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, 14, 3, padding=1), nn.BatchNorm2d(14), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(14, 18, 3, padding=1), nn.GroupNorm(1, 18), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(18, 13, 2, stride=2)
        self.mix2 = nn.Sequential(nn.Conv2d(13 + 14, 12, 3, padding=1), nn.ReLU())
        self.up1 = nn.ConvTranspose2d(12, 9, 2, stride=2)
        self.mix1 = nn.Sequential(nn.Conv2d(9 + 8, 10, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        b = self.mix2(torch.cat([self.up2(c), b], 1))
        return self.head(self.mix1(torch.cat([self.up1(b), a], 1)))


def unet():
    return UNet(), torch.randn(2, 3, 16, 16)


# -- linear layers and norms ------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(6, 8)


class GluByChunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.out = nn.Linear(8, 2 * 14), nn.Linear(14, 4)

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.out(F.silu(a) * b)


def glu_by_chunk():
    return GluByChunk(), torch.randn(3, 8)


class GluByTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 14), nn.Linear(8, 14), nn.Linear(14, 4)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def glu_by_two():
    return GluByTwo(), torch.randn(3, 8)


def layer_norm():
    return nn.Sequential(nn.Linear(8, 18), nn.LayerNorm(18), nn.GELU(), nn.Linear(18, 4)), torch.randn(3, 8)


def layer_norm_plain():
    """Without a weight to rescale."""
    net = nn.Sequential(nn.Linear(8, 18), nn.LayerNorm(18, elementwise_affine=False), nn.GELU(), nn.Linear(18, 4))
    return net, torch.randn(3, 8)


def rms_norm():
    return nn.Sequential(nn.Linear(8, 18), nn.RMSNorm(18), nn.GELU(), nn.Linear(18, 4)), torch.randn(3, 8)


class OwnRmsNorm(nn.Module):
    """As a user would write it."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


def own_rms_norm():
    return nn.Sequential(nn.Linear(8, 18), OwnRmsNorm(18), nn.GELU(), nn.Linear(18, 4)), torch.randn(3, 8)


def group_norm():
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 5, 1))
    return net, torch.randn(2, 3, 6, 6)


class Buffers(nn.Module):
    """Buffers that have an element for each channel, one of them of integers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 15), nn.Linear(15, 4)
        self.register_buffer("scale", torch.rand(15) + 0.5)
        self.register_buffer("sign", torch.randint(0, 2, (1, 15)))

    def forward(self, x):
        return self.last(self.first(x) * self.scale + self.sign)


def buffers():
    return Buffers(), torch.randn(3, 8)


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(8, 17), nn.Linear(17, 17), nn.Linear(17, 4)

    def forward(self, x):
        return self.head(self.shared(self.shared(self.stem(x)).relu()).relu())


def called_twice():
    return Twice(), torch.randn(3, 8)


class SharedParameter(nn.Module):
    """One parameter under two names, as `tie_weights` leaves it."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(8, 11), nn.Linear(11, 16), nn.Linear(11, 16)
        self.b.weight = self.a.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.a(x).relu() * self.b(x).sigmoid())


def shared_parameter():
    return SharedParameter(), torch.randn(3, 8)


class Branch(nn.Module):
    """What runs depends on values, of the input and of a hidden layer: no trace without values can follow."""

    def __init__(self):
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        if x.abs().max() > 1:
            x = x / x.abs().max()
        x = self.stem(x)
        x = x.relu() if float(x.sum()) > 0 else x.tanh()
        return self.head(self.hidden(x).relu())


def branch_on_value():
    return Branch(), torch.randn(3, 8)


# -- residual stacks --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, hidden, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x, seen):
        seen.append(self.layer_idx)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks that know their position; the model checks that they come in order."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 18)
        self.blocks = nn.ModuleList(Block(18, 22, i) for i in range(5))
        self.head = nn.Linear(18, 4)

    def forward(self, x):
        x, seen = self.stem(x), []
        for block in self.blocks:
            x = block(x, seen)
        assert seen == list(range(len(self.blocks))), seen
        return self.head(x)


def residual_stack():
    return Stack(), torch.randn(3, 8)


class Bottleneck(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.reduce, self.norm = nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.expand, self.last = nn.Conv2d(hidden, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.last(self.expand(self.norm(self.reduce(x)).relu()))).relu()


def residual_conv():
    """A small ResNet: a removable stack between a stem and a head."""
    blocks = nn.Sequential(*(Bottleneck(16, 10) for _ in range(4)))
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip
    return net, torch.randn(4, 3, 8, 8)


# -- attention --------------------------------------------------------------------------------------------------------


class FusedAttention(nn.Module):
    """q, k and v from one linear layer, as vision transformers do."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (3, b, h, n, d)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))


class SplitAttention(nn.Module):
    """Separate projections, softmax by hand, the scale a constant of the module."""

    def __init__(self, width=24, heads=3):
        super().__init__()
        self.heads, self.head_dim, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, self.heads, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))


class GroupedAttention(nn.Module):
    """`groups` key-value heads, each for `repeats` query heads; rotary positions by halves of the head dim."""

    def __init__(self, width=24, groups=3, repeats=2, head_dim=8, native=False, rotary=False):
        super().__init__()
        self.groups, self.repeats, self.head_dim = groups, repeats, head_dim
        self.native, self.rotary = native, rotary
        self.q, self.proj = nn.Linear(width, groups * repeats * head_dim), nn.Linear(groups * repeats * head_dim, width)
        self.k, self.v = nn.Linear(width, groups * head_dim), nn.Linear(width, groups * head_dim)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, -1, self.head_dim).transpose(1, 2)  # (b, groups repeats, n, d)
        k, v = (layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.k, self.v))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        if self.native:
            x = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        else:
            k, v = (self.repeated(t) for t in (k, v))
            x = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))

    def repeated(self, t):
        b, groups, n, d = t.shape
        return t[:, :, None].expand(b, groups, self.repeats, n, d).reshape(b, groups * self.repeats, n, d)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: the first half of the head dim with the second, (b, h, n, d)."""
    n, d = x.shape[-2:]
    angle = torch.arange(n)[:, None] * (0.5 ** torch.arange(d // 2))  # (n, d / 2)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)  # (n, d)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class PreNorm(nn.Module):
    """An attention block in a residual stream, between an embedding and a head."""

    def __init__(self, attention):
        super().__init__()
        self.embed, self.norm, self.attn = nn.Linear(6, 24), nn.LayerNorm(24), attention
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attn(self.norm(x)))


def fused_attention():
    return PreNorm(FusedAttention()), torch.randn(2, 7, 6)


def split_attention():
    return PreNorm(SplitAttention()), torch.randn(2, 7, 6)


def gqa_by_expand():
    return PreNorm(GroupedAttention()), torch.randn(2, 7, 6)


def gqa_native():
    return PreNorm(GroupedAttention(native=True)), torch.randn(2, 7, 6)


def rotary_half():
    return PreNorm(GroupedAttention(rotary=True)), torch.randn(2, 7, 6)


class MultiheadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 3, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def multihead_attention():
    return PreNorm(MultiheadAttention()), torch.randn(2, 7, 6)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with PyTorch's own layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 24)
        layer = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)))


def transformer_encoder():
    return Encoder(), torch.randn(2, 7, 6)


class TiedEmbeddings(nn.Module):
    """The output layer is the embedding; the vocabulary stays, the residual width may shrink."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(30, 18), nn.Linear(18, 26), nn.Linear(26, 18)
        self.head = nn.Linear(18, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(self.up(x).relu()))


class Positions(nn.Module):
    """Tables of positions that are longer than the example: what lies beyond it is no width."""

    def __init__(self):
        super().__init__()
        self.embed, self.learned = nn.Linear(6, 18), nn.Parameter(torch.randn(1, 32, 18))
        self.register_buffer("fixed", torch.randn(32, 18))
        self.register_buffer("ids", torch.arange(32)[None])
        self.table, self.head = nn.Embedding(32, 18), nn.Linear(18, 5)

    def forward(self, x):
        n = x.shape[1]
        x = self.embed(x) + self.learned[:, :n] + self.fixed[:n] + self.table(self.ids[:, :n])
        return self.head(x.relu())


def positions():
    return Positions(), torch.randn(2, 7, 6)


def tied_embeddings():
    return TiedEmbeddings(), torch.randint(0, 30, (2, 9))


# -- inputs and outputs of other forms --------------------------------------------------------------------------------


class DictOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return {"a": self.a(x), "b": [self.b(x), None]}


def dict_output():
    return DictOutput(), torch.randn(3, 8)


class KeywordInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 16), nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, *, left, right, scale=1.0):
        return self.head((self.left(left) + self.right(right) * scale).relu())


def keyword_inputs():
    return KeywordInputs(), {"left": torch.randn(3, 8), "right": torch.randn(3, 6), "scale": 0.5}


@dataclasses.dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


class DataclassOutput(DictOutput):
    def forward(self, x):
        x = self.stem(x).relu()
        return Output(self.a(x), [self.b(x)])


def dataclass_output():
    return DataclassOutput(), torch.randn(3, 8)


# -- recurrent nets ---------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Conv1d in front of a recurrent layer; the cell may be frozen, the rest may not."""

    def __init__(self, cell):
        super().__init__()
        self.conv1, self.norm, self.conv2 = (
            nn.Conv1d(4, 14, 3, padding=1),
            nn.BatchNorm1d(14),
            nn.Conv1d(14, 10, 3, padding=1),
        )
        self.cell = cell(10, 12, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.conv2(self.norm(self.conv1(x)).relu()).relu()  # (b, c, t)
        out, _ = self.cell(x.transpose(1, 2))
        return self.head(self.hidden(out[:, -1]).relu())


def conv_gru():
    return Recurrent(nn.GRU), torch.randn(2, 4, 9)


def conv_lstm():
    return Recurrent(nn.LSTM), torch.randn(2, 4, 9)


# -- the list ---------------------------------------------------------------------------------------------------------

W, H, D = "width", "heads", "depth"
EXPECTED: dict[Callable[[], tuple[nn.Module, Any]], dict[tuple[str, int], int]] = {
    conv_chain: {(W, 12): 3, (W, 20): 1},
    grouped: {(W, 4): 1, (W, 6): 1, (W, 5): 1},
    depthwise_multiplier: {(W, 10): 1, (W, 3): 1},
    squeeze_excite: {(W, 16): 1, (W, 6): 1},
    pixel_shuffle: {(W, 9): 1},
    conv_transpose: {(W, 10): 1, (W, 14): 1},
    dense_concat: {(W, 7): 1, (W, 5): 3},
    unet: {(W, n): 1 for n in (8, 14, 18, 13, 12, 9, 10)},
    mlp: {(W, 32): 1},
    glu_by_chunk: {(W, 14): 1},
    glu_by_two: {(W, 14): 1},
    layer_norm: {(W, 18): 1},
    layer_norm_plain: {(W, 18): 1},
    rms_norm: {(W, 18): 1},
    own_rms_norm: {(W, 18): 1},
    group_norm: {(W, 4): 1, (W, 6): 1},
    buffers: {(W, 15): 1},
    called_twice: {(W, 17): 1},
    shared_parameter: {(W, 11): 1, (W, 16): 1},
    branch_on_value: {(W, 16): 1, (W, 12): 1},
    residual_stack: {(W, 18): 1, (W, 22): 5, (D, 5): 1},
    residual_conv: {(W, 16): 1, (W, 10): 4, (D, 4): 1},
    fused_attention: {(W, 24): 1, (H, 3): 1, (W, 8): 1},
    split_attention: {(W, 24): 1, (H, 3): 1, (W, 8): 2},
    gqa_by_expand: {(W, 24): 1, (H, 3): 1, (H, 2): 1, (W, 8): 2},
    gqa_native: {(W, 24): 1, (H, 3): 1, (H, 2): 1, (W, 8): 2},
    rotary_half: {(W, 24): 1, (H, 3): 1, (H, 2): 1},
    multihead_attention: {(H, 24): 1, (H, 3): 1},  # PyTorch's layer has head_dim = width / heads: they shrink together
    transformer_encoder: {(W, 24): 1, (W, 3): 3, (W, 40): 3, (D, 3): 1},
    positions: {(W, 18): 1},
    tied_embeddings: {(W, 18): 1, (W, 26): 1},
    dict_output: {(W, 16): 1},
    keyword_inputs: {(W, 16): 1},
    dataclass_output: {(W, 16): 1},
    conv_gru: {(W, 14): 1, (W, 10): 1, (W, 12): 1, (W, 16): 1},
    conv_lstm: {(W, 14): 1, (W, 10): 1, (W, 12): 1, (W, 16): 1},
}
"""Each network and, by (kind, size), the dimensions that it must offer: these and no others."""

NETS = {factory.__name__: factory for factory in EXPECTED}
