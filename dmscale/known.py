"""The registry of what the mechanism cannot find out by itself: one entry per fact, with its reason."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import running
from .tree import walk

# Attributes of PyTorch's own layers that describe their parameters and that their own forwards do not read (a linear layer
# multiplies by whatever its weight is): attribute -> (parameter, dimension).
DESCRIPTIVE: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"in_features": ("weight", 1), "out_features": ("weight", 0)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.EmbeddingBag: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
}


CACHES = frozenset({"attention_bias_cache"})
"""Dicts of a module that hold what its forward computed from parameters of before (LeViT and its kin in timm and
transformers, by device): a copy starts without them, or it would go on with elements that it no longer has."""


def quiet(model: nn.Module, modules: Sequence[tuple[str, nn.Module]] | None = None) -> nn.Module:
    """Switch off the key-value cache of a transformers model, on a copy of it; `modules` is its `walk`, where that is known.

    A cache is an output that holds keys by head; as an output it would fix the heads, which nobody wants to fix.
    """
    for config in _caching(walk(model) if modules is None else modules):
        config.use_cache = False
    return model


def keeps_cache(model: nn.Module) -> bool:
    """Whether a forward of `model` makes a key-value cache by default."""
    return bool(_caching(walk(model)))


def _caching(modules: Sequence[tuple[str, nn.Module]]) -> list[Any]:
    having = [m for _, m in modules if "config" in m.__dict__ or hasattr(type(m), "config")]
    return [c for c in (getattr(module, "config", None) for module in having) if getattr(c, "use_cache", False)]


PER_LAYER = ("layer_types", "attention_layers", "mlp_layer_types")
"""Lists of a transformers config that have one entry for each layer."""


def recount(model: nn.Module, container: str, sources: Sequence[int]) -> None:
    """Tell the transformers configs above a stack of layers how many there are now, in place.

    The forwards of transformers run `layers[: config.num_hidden_layers]`, look each one's kind up in `layer_types`, and
    a cache has room for as many; removing layers does no harm there, adding them does.

    Args:
        model: holds the stack, already deepened.
        container: path of the stack.
        sources: for each layer the position of the one that it was, or is a copy of, before.
    """
    before = len(set(sources))
    parts = container.split(".")
    for path in (".".join(parts[:i]) for i in range(len(parts) + 1)):
        config: Any = getattr(model.get_submodule(path), "config", None)
        if not any(c.__module__.startswith("transformers.") for c in type(config).__mro__):
            continue
        key = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
        if getattr(config, key, None) != before:
            continue
        own = copy.copy(config)
        own.__dict__[key] = len(sources)
        for name in PER_LAYER:
            entries = getattr(own, name, None)
            if isinstance(entries, (list, tuple)) and len(entries) == before:
                own.__dict__[name] = type(entries)([entries[i] for i in sources])
        for module in model.modules():
            if module.__dict__.get("config") is config:
                module.__dict__["config"] = own


@functools.cache
def described(cls: Any) -> dict[str, tuple[str, int]]:
    """Attribute -> (parameter, dimension) of what a layer of PyTorch's says of its parameters."""
    return {
        attribute: place
        for kind, said in DESCRIPTIVE.items()
        if issubclass(cls, kind)
        for attribute, place in said.items()
    }


def describe(module: nn.Module) -> None:
    """Bring the descriptive attributes of a PyTorch layer in line with its parameters."""
    if isinstance(module, (nn.modules.conv._ConvNd, *DESCRIPTIVE)):
        with (
            torch.no_grad(),
            running.evaluating(module),
        ):  # a look at a parametrised weight computes it: spectral norm iterates
            _describe(module)


def _describe(module: Any) -> None:
    if isinstance(module, nn.modules.conv._ConvNd) and module.weight is not None:
        a, b = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = a, b * module.groups
        else:
            module.out_channels, module.in_channels = a, b * module.groups
            if module.kernel_size != (size := tuple(module.weight.shape[2:])):  # of features that it took whole
                module.kernel_size = size
        return
    cls: Any = type(module)
    for attribute, (parameter, dim) in described(cls).items():
        tensor = getattr(module, parameter, None)
        if tensor is None:
            tensor = getattr(module, "running_mean", None)
        if tensor is not None and getattr(module, attribute, None) != tensor.shape[dim]:
            setattr(module, attribute, tensor.shape[dim])


BY_PRODUCTS = frozenset(
    {
        "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions", "decoder_hidden_states",
        "decoder_attentions", "cross_attentions", "hidden_states", "attentions", "past_key_values",
        "text_model_output", "vision_model_output", "vision_outputs", "qformer_outputs", "language_model_outputs",
        "image_hidden_states", "last_hidden_state", "mems", "state", "pixel_decoder_last_hidden_state",
        "pixel_decoder_hidden_states", "transformer_decoder_last_hidden_state", "transformer_decoder_hidden_states",
    }
)  # fmt: skip
"""Fields of a transformers `ModelOutput` that are inner activations handed out beside the result.

As outputs they would fix the residual width of every encoder-decoder and of both towers of CLIP, which nobody means.  Their axes
stay free; a gated model hands out the kept elements, as the exported one does.
"""


def is_result(key: Any) -> bool:
    """Whether field `key` of a `ModelOutput` is what its model is for: `logits`, `class_queries_logits`."""
    return "logits" in str(key)


def is_by_product(output: Any, key: str) -> bool:
    """Whether field `key` of a model's `output` is an inner activation and not a result."""
    has_result = any(is_result(k) for k in output) if key in BY_PRODUCTS else False
    return has_result and type(output).__module__.startswith("transformers.")


def builds_from(model: nn.Module) -> str | None:
    """The attribute that holds the one settings object from which the class of `model` builds it, if it is such a class.

    Only the library can say that its constructors take nothing else: those of transformers do.
    """
    config_class = getattr(type(model), "config_class", None)
    return "config" if config_class is not None and isinstance(getattr(model, "config", None), config_class) else None
