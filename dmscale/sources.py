"""Models by name, for the command line: `timm:NAME`, `torchvision:NAME`, `hf:PATH`, `file.py:name`.

Nothing is downloaded: a model has random weights unless a local file brings others.
"""

import difflib
import importlib.util
import inspect
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import DmscaleError
from .optional import require


class SourceError(DmscaleError):
    """A model or data specification cannot be read; the message names it and the remedy."""


@dataclass(frozen=True)
class Source:
    """A model and what to call it with.

    `inputs` is a tensor, a tuple of positional arguments or a dict of keyword arguments, with a batch of
    one so that costs are per example.  `mean` and `std` are per channel, for pixels in [0, 1]: what the
    model expects.
    """

    model: nn.Module
    inputs: Any
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the first image among the inputs; `SourceError` if there is none."""
        values = self.inputs.values() if isinstance(self.inputs, dict) else self.inputs
        for value in [values] if isinstance(values, Tensor) else values:
            if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
                return tuple(value.shape[1:])  # type: ignore[return-value]
        raise SourceError(
            "this model takes no images (B, C, H, W); give --data file.py:loader with batches of your own"
        )


def parse_shape(text: str) -> tuple[int, ...]:
    """`"1x3x224x224"` as `(1, 3, 224, 224)`; `SourceError` for anything but positive numbers."""
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise SourceError(f"--input {text!r} is not a shape; write it with the batch first, as 1x3x224x224 or 1x128")
    return tuple(int(part) for part in parts)


def load_model(
    spec: str,
    *,
    shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    weights: Path | None = None,
) -> Source:
    """The model that `spec` names, with example inputs.

    `shape` is that of the example input, batch first; the model is built for it where its builder has a
    size.  `classes` sizes the classification head.  `weights` is a local state dict (safetensors, or a
    torch file of plain tensors).

    Raises:
        SourceError: there is no such model, or it cannot be built; the message says what to write instead.
        MissingPackageError: the library that has it is not installed.
    """
    kind, _, name = spec.partition(":")
    readers = {"timm": _timm, "torchvision": _torchvision, "hf": _transformers}
    if kind in readers and name:
        source = readers[kind](spec, name, shape, classes)
    elif ".py:" in spec:
        if classes is not None:
            raise SourceError(f"{spec}: --classes has no effect on a factory of your own; set the classes in it")
        source = _factory(spec, shape)
    else:
        raise SourceError(
            f"model {spec!r} is none of timm:NAME, torchvision:NAME, hf:PATH_OR_CONFIG, file.py:factory"
            + _how_to_write(spec, readers)
        )
    if weights is not None:
        _load_weights(spec, source.model, weights)
    return source


_WEIGHT_FILES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}


def _how_to_write(spec: str, kinds: Iterable[str]) -> str:
    """What a specification without a colon, or with nothing behind it, may have meant."""
    name = spec.rstrip(":")
    if name in kinds:
        return f"; a model is missing behind {name}:"
    if spec.endswith(".py"):
        return f"; name the function in it that makes the model, as {spec}:make"
    if Path(spec).suffix in _WEIGHT_FILES:
        return (
            "; a file of weights needs the model that they belong to, with --weights FILE, and a pickled module a "
            "file.py:factory that loads it (one of TorchScript cannot be resized)"
        )
    if Path(spec).is_dir():
        return f"; did you mean hf:{spec}?"
    return f"; did you mean timm:{spec}?" if ":" not in spec and "/" not in spec else ""


def allow_missing_torchvision_operators() -> None:
    """Let torchvision, which timm and transformers import too, be imported where its compiled operators do not fit torch.

    Such an installation, a CUDA wheel of torchvision beside a CPU build of torch, has no
    `torchvision::nms`, and registering a fake kernel for it at import fails.  Only the two schemas are
    missing, and only detection models call them.  A torchvision whose operators load is left alone: they
    would clash with a schema defined twice.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        return
    for library in sorted(Path(found.submodule_search_locations[0]).glob("_C*")):
        try:
            torch.ops.load_library(library)
        except OSError:  # what torchvision itself catches: built against another torch
            continue
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _timm(spec: str, name: str, shape: tuple[int, ...] | None, classes: int | None) -> Source:
    allow_missing_torchvision_operators()
    timm = require("timm", "timm", spec)
    if not timm.is_model(name):
        raise _unknown_name(spec, name, timm.list_models(), "timm")
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if shape is not None and len(shape) == 4:
        options["in_chans"] = shape[1]
        if config is not None and config.fixed_input_size:  # convolutional models have no size to set
            options["img_size"] = shape[2:]
    model = build(spec, lambda: timm.create_model(name, pretrained=False, **options))
    config = model.pretrained_cfg
    shape = shape or (1, *config.get("input_size", (3, 224, 224)))
    return Source(model, torch.randn(shape), tuple(config["mean"]), tuple(config["std"]))


def _torchvision(spec: str, name: str, shape: tuple[int, ...] | None, classes: int | None) -> Source:
    allow_missing_torchvision_operators()
    models = require("torchvision", "torchvision", spec).models
    if name not in models.list_models():
        raise _unknown_name(spec, name, models.list_models(), "torchvision")
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # the default of detection and segmentation models is a download
    if shape is not None and builder.__module__.endswith("vision_transformer"):
        options["image_size"] = shape[-1]
    model = build(spec, lambda: builder(weights=None, **options))
    # Inception's auxiliary head needs more than the usual 224 pixels.
    size = 299 if name == "inception_v3" else 224
    return Source(model, torch.randn(shape or (1, 3, size, size)))


def _transformers(spec: str, name: str, shape: tuple[int, ...] | None, classes: int | None) -> Source:
    path = Path(name)
    config_file = path / "config.json" if path.is_dir() else path
    if not config_file.is_file():
        raise SourceError(
            f"{spec}: there is no {config_file}; hf: takes a local config.json or a local folder with one "
            "(models are not downloaded)"
        )
    allow_missing_torchvision_operators()  # transformers imports torchvision with the models, where there is one
    transformers = require("transformers", "transformers", spec)
    options: dict[str, Any] = {} if classes is None else {"num_labels": classes}
    config = build(spec, lambda: transformers.AutoConfig.from_pretrained(config_file, local_files_only=True, **options))
    if shape is not None and len(shape) == 4:
        for key, value in (("image_size", shape[-1]), ("num_channels", shape[1])):
            if hasattr(config, key):
                setattr(config, key, value)
    architecture = build(spec, lambda: getattr(transformers, (config.architectures or [""])[0], None))
    if path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("*.bin"))):
        # float32 whatever the file holds: the search trains, and half precision is slow on a CPU.
        reader = (architecture or transformers.AutoModel).from_pretrained
        model = build(spec, lambda: reader(path, config=config, local_files_only=True, dtype=torch.float32))
    elif architecture is not None:
        model = build(spec, lambda: architecture(config))
    else:
        model = build(spec, lambda: transformers.AutoModel.from_config(config))
    return Source(model, _transformers_inputs(spec, model, shape))


def _transformers_inputs(spec: str, model: Any, shape: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Keyword arguments for a Hugging Face model, from its configuration: tokens, an image, or audio."""
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 224
        size = (size, size) if isinstance(size, int) else tuple(size)
        return {name: torch.randn(shape or (1, getattr(vision, "num_channels", 3), *size))}
    if name == "input_ids":
        text = config.get_text_config()
        length = min(128, getattr(text, "max_position_embeddings", None) or 128)
        tokens = torch.randint(text.vocab_size, shape or (1, length))
        return {name: tokens, "decoder_input_ids": tokens} if config.is_encoder_decoder else {name: tokens}
    if name == "input_values":
        return {name: torch.randn(shape or (1, 16000))}  # one second of audio at the usual 16 kHz
    raise SourceError(
        f"{spec}: no example can be made for the input {name!r} of {type(model).__name__}; "
        "write a file.py:factory that returns (model, dict of keyword arguments)"
    )


def _factory(spec: str, shape: tuple[int, ...] | None) -> Source:
    made = build(spec, load_function(spec))
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        model, inputs = made
    elif isinstance(made, nn.Module) and shape is not None:
        return Source(made, torch.randn(shape))
    elif isinstance(made, nn.Module):
        raise SourceError(f"{spec} returns a model alone; return (model, inputs), or give --input 1x3x224x224")
    else:
        raise SourceError(f"{spec} returns {type(made).__name__}; it must return a model or (model, inputs)")
    if not isinstance(inputs, (Tensor, tuple, dict)):
        raise SourceError(f"{spec}: the inputs are a {type(inputs).__name__}; return a tensor, a tuple or a dict")
    return Source(model, inputs if shape is None else torch.randn(shape))


def load_function(spec: str) -> Callable[[], Any]:
    """The function that `file.py:name` names; as for `python file.py`, its folder becomes importable."""
    file, _, name = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise SourceError(f"{spec}: there is no file {file}")
    module_name = f"_dmscale_user_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None  # holds for every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses, pickling and DataLoader workers look the module up
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    build(spec, lambda: module_spec.loader.exec_module(module))  # type: ignore[union-attr]
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(_functions_of(module)) or "no function"
        raise SourceError(f"{spec}: {path.name} has no function {name!r}; it has {there}")
    if isinstance(function, nn.Module):
        raise SourceError(
            f"{spec} is a {type(function).__name__} itself; name a function that makes it and returns (model, inputs)"
        )
    if needed := _required(function):
        raise SourceError(f"{spec} takes arguments ({', '.join(needed)}) and is called without any; give them defaults")
    return function


def _required(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments without which a function cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of builtins
        return []
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in given]


def _functions_of(module: ModuleType) -> list[str]:
    """Names of the public functions and classes that the file itself defines."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def build(spec: str, make: Callable[[], Any]) -> Any:
    """`make()`, with whatever other people's code raises shown as an error of this specification."""
    try:
        return make()
    except DmscaleError:
        raise
    except Exception as error:
        raise SourceError(f"{spec} could not be built: {type(error).__name__}: {error}") from error


def _unknown_name(spec: str, name: str, known: list[str], library: str) -> SourceError:
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    close += [other for other in known if name in other and other not in close][: 4 - len(close)]
    hint = f"did you mean {', '.join(close)}?" if close else f"{library} lists its models in list_models()"
    return SourceError(f"{spec}: {library} has no model {name!r}; {hint}")


def _load_weights(spec: str, model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise SourceError(f"--weights: there is no file {path}")
    state = _read_weights(path)
    for key in ("state_dict", "model"):  # where training scripts put it in a checkpoint
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise SourceError(
            f"--weights {path} do not fit {spec} (--classes and --input size the model): {_misfits(model, state)}"
        ) from error


def _read_weights(path: Path) -> Any:
    if path.suffix != ".safetensors" and _is_torchscript(path):
        raise SourceError(f"--weights {path} is a TorchScript archive; save the state_dict() of the Python module")
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"--weights {path} cannot be read as a state dict: it is no file of torch.save, or holds more than "
            "tensors, a whole pickled module say. Load it where its code is, then torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise SourceError(f"--weights {path} cannot be read as a state dict of plain tensors: {first}") from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _misfits(model: nn.Module, state: Any) -> str:
    """At most five of the keys that do not fit, and how many there are."""
    if not isinstance(state, Mapping):
        return f"they are a {type(state).__name__}, no state dict"
    own = model.state_dict()
    found = [f"{key} is missing" for key in own if key not in state]
    found += [f"{key} is not of the model" for key in state if key not in own]
    for key in own.keys() & state.keys():
        here, there = tuple(own[key].shape), tuple(getattr(state[key], "shape", ()))
        found += [f"{key} has shape {there}, the model's {here}"] if here != there else []
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
