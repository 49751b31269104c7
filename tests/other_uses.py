"""A file whose functions do more with `int` than to call it."""

from __future__ import annotations

import torch
from torch import nn


class Uses(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.use, self.first, self.last = use, nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x):
        if self.use == "converts":
            rows = torch.arange(int(x.shape[0]), device=x.device).to(int)
            return self.last(self.first(x)[rows])
        if self.use == "hands on":
            return self.last(self.first(x)) if is_of(len(x), int) else x
        return self.last(self.first(x)) if type(len(x)) is int else x


def is_of(value, kind):
    return type(value) is kind
