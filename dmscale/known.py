"""The registry of what the mechanism cannot find out by itself: one entry per fact, with its reason."""

from __future__ import annotations

from typing import Any

from torch import nn

# Attributes of PyTorch's own layers that describe their parameters but that no forward reads (a linear layer multiplies
# by whatever its weight is), so no trace sees them: attribute -> (parameter, dimension).
DESCRIPTIVE: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"in_features": ("weight", 1), "out_features": ("weight", 0)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
}


def quiet(model: nn.Module) -> nn.Module:
    """Switch off the key-value cache of a transformers model, on a copy of it.

    A cache is an output that holds keys by head; as an output it would fix the heads, which nobody wants to fix.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    return model


def describe(module: nn.Module) -> None:
    """Bring the descriptive attributes of a PyTorch layer in line with its parameters."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.weight is not None:
        a, b = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = a, b * module.groups
        else:
            module.out_channels, module.in_channels = a, b * module.groups
        return
    for cls, attributes in DESCRIPTIVE.items():
        if isinstance(module, cls):
            for attribute, (parameter, dim) in attributes.items():
                tensor = getattr(module, parameter, None)
                if tensor is None:
                    tensor = getattr(module, "running_mean", None)
                if tensor is not None and getattr(module, attribute, None) != tensor.shape[dim]:
                    setattr(module, attribute, tensor.shape[dim])


BY_PRODUCTS = frozenset(
    {
        "encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions", "decoder_hidden_states",
        "decoder_attentions", "cross_attentions", "hidden_states", "attentions", "past_key_values",
    }
)  # fmt: skip
"""Fields of a transformers `ModelOutput` that are inner activations handed out beside the result.

As outputs they would fix the residual width of every encoder-decoder, which is not what their users mean.  Their axes
stay free; a gated model hands out the kept elements, as the exported one does.
"""


def is_by_product(output: Any, key: str) -> bool:
    """Whether field `key` of a model's `output` is an inner activation and not a result."""
    return key in BY_PRODUCTS and type(output).__module__.startswith("transformers.") and "logits" in output


def builds_from(model: nn.Module) -> str | None:
    """The attribute that holds the one settings object from which the class of `model` builds it, if it is such a class.

    Only the library can say that its constructors take nothing else: those of transformers do.
    """
    config_class = getattr(type(model), "config_class", None)
    return "config" if config_class is not None and isinstance(getattr(model, "config", None), config_class) else None
