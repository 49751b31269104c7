"""Deeper without a change of the function: copies of residual blocks that start as the identity.

A copy stands behind the block that it is a copy of, and what its residual branches add is zero: block(x) = x + 0.  What
to set to zero is read from the trace: the parameters that a branch was made of since its last contraction, those of the
last module first (the scale of a BatchNorm, a layer scale, else a projection with its bias).  As few as possible are
zero, since two zeros in a row would never get a gradient.  Behind its own block an identity holds more often than
anywhere else: relu(x + 0) = x for what a block that ends with the same relu puts out.

Every copy is tried on what it will get in the network, and a block that is not the identity there (a normalisation
follows the addition) is not copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import blocks, running
from .clone import clone, own_copy
from .cost import holders
from .export import get_attribute, set_attribute
from .gates import replace_first
from .known import quiet, recount
from .sizes import Attribute
from .tracing import is_settings

if TYPE_CHECKING:
    from .blocks import Blocks
    from .space import SearchSpace

ADDED = "_dmscale_copy_of"
"""Marks a block that was put in, with the path of its source, while an expansion is under way."""

_IDENTITY = 1e-6  # relative: x + 0 is x to the last bit, and a cast or a mask may round


class NoIdentity(Exception):
    """A stack cannot be deepened; the message says why."""


def sources(space: SearchSpace, model: nn.Module, stack: Blocks) -> dict[str, tuple[str, ...]]:
    """Block of `stack` -> the parameters (of `model`) whose zeros make a copy of it the identity behind it.

    Blocks for which there are none are left out.

    Raises:
        NoIdentity: there is no such block.
    """
    if any(stack.streams):
        raise NoIdentity("its blocks renew several tensors, of which no zeros are looked for")
    found: dict[str, tuple[str, ...]] = {}
    runner = quiet(clone(model))

    def try_copy(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            zeros = _zeros(space, model, path, args, kwargs, out)
            if zeros is not None:
                found[path] = zeros

        return hook

    for path in stack.paths:
        runner.get_submodule(path).register_forward_hook(try_copy(path), with_kwargs=True)
    with running.evaluating(runner), torch.random.fork_rng([]):
        args, kwargs = running.arguments(space.example_inputs)
        running.call(runner, args, kwargs)
    if not found:
        raise NoIdentity(
            f"no zeros make a block of '{stack.container or 'the model'}' the identity: something (a normalisation, an "
            "activation) follows the addition"
        )
    if len(dict(model.get_submodule(stack.container).named_children())) < 2 and _counts_positions(
        model, stack.paths[0]
    ):
        raise NoIdentity(f"of the single block of '{stack.container}' it is not known which ints count its position")
    return {path: found[path] for path in stack.paths if path in found}


def _counts_positions(model: nn.Module, path: str) -> bool:
    return any(type(v) is int and v == 0 for m in model.get_submodule(path).modules() for v in vars(m).values())


def _zeros(
    space: SearchSpace, model: nn.Module, path: str, args: tuple, kwargs: dict, out: Any
) -> tuple[str, ...] | None:
    """The fewest parameters whose zeros make the block at `path` hand on its input, tried on its own output."""
    groups = _last_parameters(space, path)
    x = next(iter(running.tensors_in(out)), None)
    if not groups or x is None:
        return None
    args, kwargs = replace_first((args, kwargs), lambda _: x)
    parameters = dict(model.named_parameters())

    def is_identity(names: Sequence[str]) -> bool:
        gone = {id(parameters[n]) for n in names}
        twin = quiet(clone(model.get_submodule(path), lambda t: _zero(t) if id(t) in gone else t))
        twin.eval()
        own_args, own_kwargs = running.map_tensors(lambda t: t, (args, kwargs))  # lists that a block may append to
        try:
            y = running.tensors_in(running.call(twin, own_args, own_kwargs))[0]
        except Exception:  # a block that cannot run twice in one forward
            return False
        return y.dtype == x.dtype and running.relative_error([y], [x]) <= _IDENTITY

    chosen: list[tuple[str, ...]] = []
    for group in groups:
        chosen.append(group)
        if is_identity([n for g in chosen for n in g]):
            break
    else:
        return None
    for group in reversed(chosen):  # the ones that act last stay zero: what is before them keeps its weights
        fewer = [g for g in chosen if g is not group]
        if fewer and is_identity([n for g in fewer for n in g]):
            chosen = fewer
    return tuple(n for g in chosen for n in g)


def _last_parameters(space: SearchSpace, path: str) -> list[tuple[str, ...]]:
    """What the branches of the block were made of since their last contractions: by module, the last one first."""
    record = space.trace.record
    call = next(c for c in record.calls if c.path == path)
    parameters = {n for n, _ in space.model.named_parameters()}
    by_module: dict[str, list[str]] = {}
    for value in blocks.branches(call, record):
        for name in value.params & parameters:
            if name.startswith(path + ".") and not _shared(space, name, path):
                by_module.setdefault(name.rpartition(".")[0], []).append(name)
    groups = [tuple(sorted(names)) for names in by_module.values()]
    return sorted(groups, key=lambda names: -max(record.read.get(n, 0) for n in names))


def _shared(space: SearchSpace, name: str, path: str) -> bool:
    """Whether a parameter is tied to one outside of the block."""
    aliases = space.trace.aliases
    first = aliases.get(name, name)
    names = [first, *(a for a, f in aliases.items() if f == first)]
    return not all(n.startswith(path + ".") for n in holders(space, names))


def _zero(t: Tensor) -> Tensor:
    twin = torch.zeros_like(t)
    return nn.Parameter(twin, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else twin


def spread(count: int, over: int) -> list[int]:
    """How many copies each of `over` blocks gets, evenly."""
    return [(i + 1) * count // over - i * count // over for i in range(over)]


def deepen(
    space: SearchSpace, model: nn.Module, container: str, copies: Mapping[str, int],
    zeros: Mapping[str, tuple[str, ...]], names: dict[int, str],
) -> nn.Module:  # fmt: skip
    """A copy of `model` that shares its parameters, with `copies[path]` more of each block of `container`.

    Args:
        space: of the original model.
        zeros: block -> its parameters that are zero in a copy.
        names: id of a tensor -> the original parameter or buffer; those of the copies are added.
    """
    twin = clone(model)
    inside: dict[str, list[nn.Module]] = {}
    order: list[int] = []
    for i, child in enumerate(dict(twin.get_submodule(container).named_children())):
        path = f"{container}.{child}" if container else child
        made = [_copy(space, twin, path, zeros.get(path, ()), names) for _ in range(copies.get(path, 0))]
        inside[child] = made
        order += [i] * (1 + len(made))
    blocks.insert(twin, container, inside)
    recount(twin, container, order)
    return twin


def _copy(space: SearchSpace, model: nn.Module, path: str, zeros: Sequence[str], names: dict[int, str]) -> nn.Module:
    own = dict(model.get_submodule(path).named_parameters(prefix=path))
    gone = {id(own[n]) for n in zeros}

    def replace(t: Tensor) -> Tensor:
        name = names.get(id(t))
        if name is not None and _shared(space, name, path):
            return t
        new = _zero(t) if id(t) in gone else own_copy(t)
        if name is not None:
            names[id(new)] = name
        return new

    block = clone(model.get_submodule(path), replace)
    block.__dict__[ADDED] = path
    return block


def counters(model: nn.Module, container: str, before: int) -> Iterator[Attribute]:
    """Ints above a stack that equal the number of its blocks before: one of them may say how many of them to run."""
    parts = container.split(".")
    for path in (".".join(parts[:i]) for i in range(len(parts) + 1)):
        for key, value in vars(model.get_submodule(path)).items():
            if type(value) is int and value == before and not key.startswith("_"):
                yield Attribute(path, (key,))
            elif not key.startswith("_") and is_settings(value):
                for name, entry in vars(value).items():
                    if type(entry) is int and entry == before:
                        yield Attribute(path, (key, name))


def counted_anew(model: nn.Module, attribute: Attribute, more: int) -> nn.Module:
    """A copy that shares the parameters, with `attribute` larger by `more`."""
    twin = clone(model)
    set_attribute(twin, attribute, get_attribute(twin, attribute) + more)
    return twin


def run_added(model: nn.Module, example_inputs: Any) -> tuple[Any, bool]:
    """What the model returns in evaluation mode, and whether every block that was put in ran."""
    runner = clone(model)
    added = {path for path, m in runner.named_modules() if ADDED in m.__dict__}
    ran: set[str] = set()
    for path in added:
        runner.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: ran.add(path))
    with running.evaluating(runner):
        args, kwargs = running.arguments(example_inputs)
        return running.call(runner, args, kwargs), ran == added
