"""The networks of the benchmarks: ordinary modules, written as their users write them; nothing in them knows dmscale."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from . import data

# -- CIFAR ResNets, with the names of akamaster/pytorch_resnet_cifar10, whose weights they take ------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the resolution halves the shortcut takes every second pixel and pads channels."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """Depth 6 n + 2: a stem and three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int) -> nn.Module:
    """ResNet-`depth` with the pretrained weights of the data folder."""
    net = CifarResNet((depth - 2) // 6)
    state = load_file(str(data.file(f"weights/cifar10_resnet{depth}.safetensors")))
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected and all(n.endswith("num_batches_tracked") for n in missing), (missing, unexpected)
    return net


# -- Fashion-MNIST -----------------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project; beside an identity where the shape allows (MobileNetV2)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
        super().__init__()
        hidden = inputs * expand
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class ThinMobileNet(nn.Module):
    """MobileNetV2's plan for 28x28 grey pictures, a quarter as wide."""

    def __init__(self, classes: int = 10):
        super().__init__()
        plan = [(4, 16, 3, 2), (4, 24, 3, 2), (4, 40, 2, 1)]  # expansion, channels, blocks, stride of the first
        layers: list[nn.Module] = []
        inputs = 12
        for expand, outputs, blocks, stride in plan:
            rest = (InvertedResidual(outputs, outputs, 1, expand) for _ in range(blocks - 1))
            layers.append(nn.Sequential(InvertedResidual(inputs, outputs, stride, expand), *rest))
            inputs = outputs
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.stages = nn.Sequential(*layers)
        self.last = nn.Sequential(nn.Conv2d(inputs, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU6())
        self.classifier = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.last(self.stages(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.proj(y.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, each beside an identity."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """Patches of 4x4 of a 28x28 picture, 49 tokens, mean over them."""

    def __init__(self, dim: int = 96, blocks: int = 6, heads: int = 6, hidden: int = 288, classes: int = 10):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 4, 4)
        self.position = nn.Parameter(0.1 * torch.randn(1, 49, dim))
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, hidden) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


# -- segmentation ------------------------------------------------------------------------------------------------------


class DoubleConv(nn.Sequential):
    """Twice 3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        )  # fmt: skip


class UNet(nn.Module):
    """Three levels down and up with skip concatenations; one score a pixel for each of two classes."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.down1, self.down2 = DoubleConv(1, width), DoubleConv(width, 2 * width)
        self.down3 = DoubleConv(2 * width, 4 * width)
        self.bottom = DoubleConv(4 * width, 8 * width)
        self.grow3 = nn.ConvTranspose2d(8 * width, 4 * width, 2, 2)
        self.up3 = DoubleConv(8 * width, 4 * width)
        self.grow2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up2 = DoubleConv(4 * width, 2 * width)
        self.grow1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up1 = DoubleConv(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.down3(F.max_pool2d(b, 2))
        y = self.bottom(F.max_pool2d(c, 2))
        y = self.up3(torch.cat([self.grow3(y), c], 1))
        y = self.up2(torch.cat([self.grow2(y), b], 1))
        y = self.up1(torch.cat([self.grow1(y), a], 1))
        return self.head(y)


# -- language ----------------------------------------------------------------------------------------------------------


def llama(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocabulary: int, context: int, tied: bool = False
) -> nn.Module:
    """A Llama of transformers with grouped queries and random weights."""
    from dmscale.sources import allow_missing_torchvision_operators

    allow_missing_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context, use_cache=False,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def stories260k() -> nn.Module:
    """Karpathy's stories260K as a transformers Llama, with its pretrained weights."""
    net = llama(layers=5, hidden=64, heads=8, kv_heads=4, ffn=172, vocabulary=512, context=512, tied=True)
    net.load_state_dict(_as_transformers(load_file(str(data.file("weights/stories260k.safetensors")))), strict=False)
    return net


_NAMES = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    "tok_embeddings": "embed_tokens",
}  # fmt: skip


def _as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's own names as those of transformers; neighbouring rotary pairs as two halves of each head of 8."""
    out = {}
    for name, t in state.items():
        if name.endswith(("wq.weight", "wk.weight")):
            t = t.view(-1, 4, 2, t.shape[1]).transpose(1, 2).reshape(t.shape)
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        out["model." + name] = t
    return out
