"""Modules that values choose: experts of a mixture, of which an example may reach a few only, and each with some rows.

What one expert takes and gives, every other one of its container does, whether the example reaches it or not: its axes
must follow, or it would keep the old width and fail on the first example that does.  And how many rows each one gets no
structure says: its MACs are those of as many as the example has sent there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from . import axes, running
from .tracer import Record, Tracer


@dataclass(frozen=True, eq=False)
class Example:
    """What a module of a container was called with, and what it gave."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


def alternatives(model: nn.Module, path: str) -> list[str]:
    """Paths of the modules that the one at `path` could stand for: of its class, with parameters of its names, in its list.

    They may differ in size, as those of an exported model do.

    `path` itself is one of them; none where it is in no `ModuleList` or `ModuleDict`.
    """
    parent = path.rpartition(".")[0]
    container = model.get_submodule(parent)
    if not path or not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        return []
    own = model.get_submodule(path)
    return [
        f"{parent}.{name}" if parent else name for name, child in container.named_children()
        if type(child) is type(own) and _ranks(child) == _ranks(own)
    ]  # fmt: skip


def _ranks(module: nn.Module) -> dict[str, int]:
    return {name: p.dim() for name, p in module.named_parameters()}


class Examples:
    """Of each list of alternatives in `model` the first call."""

    def __init__(self, model: nn.Module):
        # found before a trace runs, which would see every shape that is compared
        found = {path: alternatives(model, path) for path, _ in model.named_modules()}
        self.alternatives = {path: others for path, others in found.items() if len(others) > 1}
        self.of: dict[str, Example] = {}

    def note(self, path: str, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """The module at `path` was called with `args` and `kwargs` and gave `out`."""
        if path in self.alternatives:
            self.of.setdefault(self.alternatives[path][0], Example(path, args, kwargs, out))


def call_others(tracer: Tracer, model: nn.Module, examples: Examples) -> None:
    """Call every module that values kept from being called with what one of its alternatives was called with.

    Args:
        tracer: it is running.
        model: the model that it runs.
        examples: from the run of the model.
    """
    called = {call.path for call in tracer.record.calls}
    for example in examples.of.values():
        for path in examples.alternatives[example.path]:
            if path not in called:
                out = model.get_submodule(path)(*example.args, **example.kwargs)
                for own, other in zip(running.tensors_in(out), running.tensors_in(example.out)):
                    for p, q in zip(tracer.dims(own), tracer.dims(other)):
                        axes.unify(p, q)


def routed(record: Record, model: nn.Module) -> list[str]:
    """Paths of the modules that get as many rows as values say, and of their alternatives."""
    places = {a: place for made, place in record.by_values.items() for a in axes.atoms((made,))}
    found: dict[str, None] = {}
    for term in record.terms:
        for place in {places[a] for dim in term.dims for a in axes.atoms(dim) if a in places}:
            path = _chosen_by(model, place, term.path)
            if path is not None and path not in found:
                found.update(dict.fromkeys(alternatives(model, path) or [path]))
    return list(found)


def _chosen_by(model: nn.Module, place: str, path: str) -> str | None:
    """The module on the way from `place`, where rows were picked, down to `path` that they were picked for."""
    start = len(place.split(".")) if place else 0
    parts = path.split(".")
    if parts[:start] != (place.split(".") if place else []) or len(parts) <= start:
        return None
    while start + 1 < len(parts) and isinstance(
        model.get_submodule(".".join(parts[: start + 1])), (nn.ModuleList, nn.ModuleDict)
    ):
        start += 1
    return ".".join(parts[: start + 1])
