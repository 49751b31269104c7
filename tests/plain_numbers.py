"""A file whose functions take sizes for plain numbers, and do nothing else with `int` and `float` (`plainly.py`)."""

from __future__ import annotations

import math

import torch
from torch import nn


class OverPlaces(nn.Module):
    """Attention over the places of an image, whose scale takes the channels for a plain number (VQGAN)."""

    def __init__(self, as_a):
        super().__init__()
        self.as_a, self.first, self.last = as_a, nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)
        self.q, self.k, self.v = (nn.Conv2d(12, 8, 1) for _ in range(3))
        self.out = nn.Conv2d(8, 12, 1)

    def forward(self, x):
        x = self.first(x)
        q, k, v = (m(x) for m in (self.q, self.k, self.v))
        b, c, h, w = q.shape
        scores = torch.bmm(q.reshape(b, c, h * w).permute(0, 2, 1), k.reshape(b, c, h * w))
        if self.as_a == "int":
            scores = scores * (int(c) ** (-0.5))
        elif self.as_a == "float" and isinstance(c, int) and isinstance(self.as_a, (str, float)):
            scores = scores * math.sqrt(1.0 / float(c))
        else:
            scores = scores * math.pow(c, -0.5)
        v = torch.bmm(v.reshape(b, int(c), h * w), scores.softmax(2).permute(0, 2, 1))
        return self.last(x + self.out(v.reshape(b, c, h, w)))
