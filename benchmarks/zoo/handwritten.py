"""Networks that no model library has: graphs, video, sound, recurrent ones.  Plain PyTorch, as a user would write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GraphLayer(nn.Module):
    """Messages along edges, summed at their targets by `index_add`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.update = nn.Sequential(nn.Linear(width + hidden, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """x (nodes, width), edges (2, E) of node numbers -> (nodes, width)."""
        source, target = edges
        message = self.message(torch.cat([x[source], x[target]], -1))
        received = torch.zeros(x.shape[0], message.shape[1], device=x.device, dtype=x.dtype)
        received = received.index_add(0, target, message)
        return x + self.norm(self.update(torch.cat([x, received], -1)))


class GraphNet(nn.Module):
    """Message passing, then a mean over the nodes of each graph by `scatter_add`."""

    def __init__(self, features: int = 9, width: int = 32, hidden: int = 48, layers: int = 3, classes: int = 5):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.layers = nn.ModuleList(GraphLayer(width, hidden) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        """x (nodes, features), edges (2, E), graph (nodes,): the number of each node's graph -> (2, classes)."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, edges)
        pooled = x.new_zeros(2, x.shape[1]).scatter_add(0, graph[:, None].expand(-1, x.shape[1]), x)
        return self.head(pooled)


class VideoBlock(nn.Module):
    """A residual pair of 3-d convolutions, the second one factorised over space and time."""

    def __init__(self, width: int, stride: int = 1, into: int | None = None):
        super().__init__()
        into = into or width
        self.conv1 = nn.Conv3d(width, into, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(into)
        self.space = nn.Conv3d(into, into, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(into, into, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn2 = nn.BatchNorm3d(into)
        self.short = nn.Identity() if into == width and stride == 1 else nn.Conv3d(width, into, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.time(self.space(y))) + self.short(x))


class VideoNet(nn.Module):
    """Conv3d stages, pooled over time and space."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (3, 7, 7), (1, 2, 2), (1, 3, 3))
        self.stages = nn.Sequential(VideoBlock(16), VideoBlock(16), VideoBlock(16, 2, 32), VideoBlock(32))
        self.head = nn.Linear(32, classes)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, classes)."""
        return self.head(F.adaptive_avg_pool3d(self.stages(self.stem(clip)), 1).flatten(1))


class Causal(nn.Module):
    """A dilated causal residual block of a temporal convolutional network, with weight normalisation."""

    def __init__(self, width: int, hidden: int, dilation: int):
        super().__init__()
        self.pad = 2 * dilation
        normed = nn.utils.parametrizations.weight_norm
        self.conv1 = normed(nn.Conv1d(width, hidden, 3, dilation=dilation))
        self.conv2 = nn.Conv1d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T)."""
        return x + self.conv2(F.gelu(self.conv1(F.pad(x, (self.pad, 0)))))


class TemporalNet(nn.Module):
    """A TCN on raw sound: strided Conv1d stem, exponentially dilated blocks, a mean over time."""

    def __init__(self, classes: int = 12, width: int = 32):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, width, 25, 5), nn.BatchNorm1d(width), nn.ReLU())
        self.blocks = nn.Sequential(*(Causal(width, 48, 2**i) for i in range(4)))
        self.head = nn.Linear(width, classes)

    def forward(self, sound: Tensor) -> Tensor:
        """(B, 1, samples) -> (B, classes)."""
        return self.head(self.blocks(self.stem(sound)).mean(-1))


class RecurrentNet(nn.Module):
    """Token ids -> embedding -> recurrent layers -> the last step's class."""

    def __init__(self, cell: type[nn.RNNBase], bidirectional: bool = False, vocabulary: int = 100, classes: int = 4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 24)
        self.rnn = cell(24, 32, num_layers=2, batch_first=True, bidirectional=bidirectional)  # type: ignore[call-arg]
        self.head = nn.Linear(64 if bidirectional else 32, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) of int64 -> (B, classes)."""
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


class Mixture(nn.Module):
    """A feed-forward layer of experts in a list that is looped over, two for each token, chosen by a router."""

    def __init__(self, width: int, hidden: int, experts: int = 6, chosen: int = 2):
        super().__init__()
        self.chosen, self.norm, self.router = chosen, nn.RMSNorm(width), nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width)."""
        y = self.norm(x).flatten(0, 1)
        weight, number = self.router(y).softmax(-1).topk(self.chosen, -1)
        out = torch.zeros_like(y)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(number == i)
            out[row] += weight[row, place, None] * expert(y[row])
        return x + out.view(x.shape)


class MixtureNet(nn.Module):
    """Token ids -> embedding -> layers of experts -> logits."""

    def __init__(self, vocabulary: int = 100, width: int = 32, layers: int = 3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Mixture(width, 48) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) of int64 -> (B, T, vocabulary)."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class MixedOperation(nn.Module):
    """Alternative operations, of which architecture parameters say how much each counts (DARTS)."""

    def __init__(self, width: int):
        super().__init__()
        kernels = (1, 3, 5)
        self.operations = nn.ModuleList(
            [
                nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, k, padding=k // 2), nn.BatchNorm2d(width))
                for k in kernels
            ]
        )
        self.operations.extend([nn.MaxPool2d(3, 1, 1), nn.Identity()])
        self.alpha = nn.Parameter(torch.randn(len(self.operations)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W)."""
        parts = [a * operation(x) for a, operation in zip(self.alpha.softmax(0), self.operations)]
        return torch.stack(parts).sum(0)


class Supernet(nn.Module):
    """A stem, mixed operations, classes."""

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width))
        self.cells = nn.Sequential(*(MixedOperation(width) for _ in range(3)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        return self.head(self.cells(self.stem(x)).mean((-2, -1)))
