"""Save an exported model as safetensors, and load it into the user's own class.

The file holds the weights, and in its metadata the plan of the export (attributes set, blocks removed) and, when given,
the structure.  `load` calls the user's factory for a fresh full-size model, replays the plan and puts the tensors in.
Without dmscale an exported model is saved and loaded with `torch.save` and `torch.load` like any other module.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import export
from .errors import DmscaleError, ExportError
from .known import describe
from .structure import Structure

_CONSTANT = "constant: "
"""Stands before the names of what modules hold as plain attributes."""


def save(model: nn.Module, path: str | os.PathLike[str], structure: Structure | None = None) -> None:
    """Write `model` (exported by dmscale, or any module) to a safetensors file, whole or not at all.

    Args:
        model: its parameters and buffers are written, with what `load` needs to make the small network of the full one.
        path: the file; its folder is made.
        structure: kept beside the weights, for `dmscale.storage.structure_of`.
    Raises:
        OSError: the file cannot be written; an earlier file of that name is left as it was.
    """
    path = Path(path)
    tensors, tied = {}, {}
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    everything = model.state_dict() | dict(
        model.named_buffers()
    )  # also buffers that are not persistent: they were sliced
    for name, t in everything.items():
        key = (t.data_ptr(), tuple(t.shape), t.stride())
        if t.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = t.detach().contiguous()
    plan = getattr(model, export.PLAN, {"attributes": [], "blocks": []})
    metadata = {"format": "pt", "dmscale_plan": json.dumps(plan), "tied": json.dumps(tied)}
    for name, t in export.constants(model).items():  # no part of a state, and a factory may not have made them yet
        tensors[_CONSTANT + name] = t.detach().clone(memory_format=torch.contiguous_format)
    if structure is not None:
        metadata["structure"] = structure.to_json()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, str(temporary), metadata)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], model_factory: Callable[[], Any]) -> nn.Module:
    """Rebuild a saved model from the factory of the full one.

    Args:
        path: a file that `save` wrote.
        model_factory: returns a fresh model of the class and configuration that was traced, alone or as (model, inputs) as the
            command line takes it.
    Returns:
        the model with the saved weights, on the factory's device and in its dtypes.
    Raises:
        DmscaleError: the file is missing or no file of `save`, or the factory makes no model.
        ExportError: names or shapes do not fit the factory's model; every misfit is named with both shapes.
    """
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DmscaleError(f"{path} cannot be read as safetensors ({error})") from error
    if "dmscale_plan" not in metadata:
        raise DmscaleError(f"{path} was not written by dmscale.save; it has no plan of an export")
    tensors |= {name: tensors[first] for name, first in json.loads(metadata["tied"]).items()}
    constants = {n.removeprefix(_CONSTANT): tensors.pop(n) for n in [*tensors] if n.startswith(_CONSTANT)}
    model = export.replay(_made_by(model_factory), json.loads(metadata["dmscale_plan"]), constants)
    _check(model, tensors, str(path))
    for name, t in tensors.items():
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        old = getattr(owner, leaf)
        if isinstance(old, nn.Parameter):
            if old.shape != t.shape:
                with torch.no_grad():
                    old.set_(t.to(old.device, old.dtype))  # in place: tied parameters stay tied
            else:
                with torch.no_grad():
                    old.copy_(t)
        else:
            owner._buffers[leaf] = t.to(old.device, old.dtype)
    for module_ in model.modules():
        describe(module_)
    export._refresh_flat_weights(model)
    return model


def _made_by(factory: Callable[[], Any]) -> nn.Module:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise DmscaleError(
            f"model_factory is a {type(factory).__name__}; give a function that makes a fresh full model: lambda: make_model()"
        )
    made = factory()
    model = made[0] if isinstance(made, tuple) and len(made) == 2 else made
    if not isinstance(model, nn.Module):
        raise DmscaleError(f"model_factory returns a {type(made).__name__}; it must return a model or (model, inputs)")
    return model


def structure_of(path: str | os.PathLike[str]) -> Structure | None:
    """The structure stored in a file of `save`, if one was given."""
    with safe_open(str(path), framework="pt") as f:
        text = (f.metadata() or {}).get("structure")
    return Structure.from_json(text) if text else None


def _check(model: nn.Module, tensors: dict[str, torch.Tensor], path: str) -> None:
    own = model.state_dict() | dict(model.named_buffers())
    misfits = [f"'{n}' is in the file, not in the model" for n in tensors if n not in own]
    misfits += [f"'{n}' is in the model, not in the file" for n in own if n not in tensors]
    for name in own.keys() & tensors.keys():
        a, b = tuple(own[name].shape), tuple(tensors[name].shape)
        if len(a) != len(b) or any(x < y for x, y in zip(a, b)):
            misfits.append(f"'{name}' has shape {b} in the file, {a} in the factory's model")
    if misfits:
        shown = "\n  ".join(misfits[:20]) + (f"\n  and {len(misfits) - 20} more" if len(misfits) > 20 else "")
        raise ExportError(f"{path} does not fit the model of the factory:\n  {shown}")
