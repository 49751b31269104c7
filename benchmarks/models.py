"""What the core's figures are taken on: four networks of random weights and real shapes, and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dmscale.sources import allow_missing_torchvision_operators


def clock() -> Callable[[], float]:
    """Seconds: of this process alone where it runs a single thread, else of the wall."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def timm_model(name: str, size: int = 224, batch: int = 1) -> tuple[nn.Module, Any]:
    """A timm model by name and one image batch (batch, 3, size, size)."""
    allow_missing_torchvision_operators()
    import timm

    return timm.create_model(name), (torch.randn(batch, 3, size, size),)


def llama(layers: int = 4, hidden: int = 256, batch: int = 1, length: int = 64) -> tuple[nn.Module, Any]:
    """A small Llama with grouped queries, and token ids (batch, length)."""
    allow_missing_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=length, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 1024, (batch, length))}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet50": lambda: timm_model("resnet50"),
    "efficientnet_b0": lambda: timm_model("efficientnet_b0"),
    "deit_tiny": lambda: timm_model("deit_tiny_patch16_224"),
    "llama, 4 layers": llama,
}
