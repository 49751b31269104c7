"""The tree of modules that a model is."""

from __future__ import annotations

from torch import nn


def walk(model: nn.Module, again: bool = False) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module, parents first, as `named_modules` gives them, whose generators take ten times as long.

    Args:
        model: the module at path "".
        again: whether a module that stands in several places is given at each.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        place = path, module = todo.pop()
        if not again:
            if id(module) in seen:
                continue
            seen.add(id(module))
        found.append(place)
        if module._modules:  # most have none
            prefix = f"{path}." if path else ""
            todo += [(prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None]
    return found


def once(places: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Of `walk(model, again=True)` what `walk(model)` gives: each module at its first place."""
    first: dict[int, tuple[str, nn.Module]] = {}
    for place in places:
        first.setdefault(id(place[1]), place)
    return list(first.values())
