"""One model of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Entry:
    """A model and what to call it with.

    name: "timm:resnet18", "hf:llama".
    family: how docs/zoo.md groups it.
    build: makes (model, inputs): random weights, the smallest sensible inputs (a tensor, tuple or dict).
    requires: package beyond the dev extra; the entry is skipped where it is missing.
    """

    name: str
    family: str
    build: Callable[[], tuple[nn.Module, Any]]
    requires: str = ""
