"""Certification: a dimension is offered only if it survives a trial.

Half of everything is removed at once, exported, run, and compared with the gated model; if that fails, dimensions are
tried in ever smaller groups until the ones at fault are known.  What lies in a block that goes is not tried: where nothing
like it stays in another block, half of every width is removed before, with all blocks in place.  A trial runs on weights that
leave nothing trivial: layers initialised to zero or one would hide a wrong slice.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import running
from .clone import clone, own_copy
from .errors import TraceError
from .known import keeps_cache, quiet
from .tracing import empty_caches, failed_forward

if TYPE_CHECKING:
    from .space import SearchSpace
    from .structure import Structure


def certify(space: SearchSpace) -> None:
    """Freeze, with the reason, every dimension of `space` whose export fails or differs from its gated model.

    Raises:
        TraceError: the model does not run, or memory is short.
    """
    try:
        _certify(space)
        if space.dimensions and keeps_cache(space.model) and not _runs_with_cache(space):
            space.trace_with_cache()
            _certify(space)
    except Exception as error:
        if not running.is_out_of_memory(error):
            raise
        needed = 4e-9 * sum(p.numel() for p in space.model.parameters())
        raise TraceError(
            f"no memory for the trial of {type(space.model).__name__}, which runs it in float32 ({needed:.1f} GB of weights) "
            "beside a network of half its widths. Trace with verify=False: an export is verified all the same, in the model's "
            "own precision where there is no memory for more"
        ) from error


def _certify(space: SearchSpace, above_zero: bool = False) -> None:
    model, inputs = trial_model(space, above_zero)
    before = None
    while before != space.dimensions:  # once, where nothing fails: other blocks may go where a dimension less is tried
        by_rounding = 0.0
        if _untried(space):
            by_rounding = _certify_those(
                space, model, inputs, lambda: [n for n, d in space.dimensions.items() if d.kind != "depth"]
            )
        before = dict(space.dimensions)
        by_rounding = by_rounding or _certify_those(space, model, inputs, lambda: list(space.dimensions))
        if by_rounding == float("inf") and not above_zero:
            return _certify(space, above_zero=True)
        _certify_training(space, model, inputs)
        if by_rounding:
            space.trace.notes.append(f"what is found was not tried: {unsteady(by_rounding)}")
            return


def _untried(space: SearchSpace) -> list[str]:
    """The dimensions inside blocks and experts that go in a trial of everything, unlike any inside one beside it that stays."""
    structure = _halved(space, list(space.dimensions))
    found: list[str] = []
    for part, of_each in space.parts.items():
        stays = [path for i in structure.kept[part] for path in of_each[i]]
        tried = {form for path in stays for form in _inside(space, path)}
        for path in [path for paths in of_each for path in paths if path not in stays]:
            found += [name for form, name in _inside(space, path).items() if form not in tried]
    return found


def _inside(space: SearchSpace, path: str) -> dict[Any, str]:
    """What a dimension is like, apart from where its block stands -> its name, of those whose axes are all in one block."""
    return {
        (d.kind, d.size, d.lowest, d.multiple, tuple(m[len(path) :] for m in d.members)): name
        for name, d in space.dimensions.items()
        if d.members and all(m.startswith(path) and m[len(path) : len(path) + 1] in ("", ".", " ") for m in d.members)
    }


def _certify_those(space: SearchSpace, model: nn.Module, inputs: Any, chosen: Callable[[], list[str]]) -> float:
    """Freeze what fails.  Returns what rounding makes of the outputs where that is too much for a trial, else 0."""
    names, in_double = chosen(), False
    while names and (failure := _trial(space, model, inputs, names)) is not None:
        if failure.startswith(_DIFFER) and not in_double:  # two that are near each other may change places by rounding
            in_double = True
            if (precise := _in_double(model, inputs)) is not None:
                model, inputs = precise
                continue
        outputs = _outputs(model, inputs)
        if outputs is None:
            continue
        no_numbers = any(bool(t.isnan().any()) for t in outputs)
        by_rounding = float("inf") if no_numbers else shaken(space, model, inputs, _halved(space, names))
        if by_rounding > 1e-4:
            return by_rounding
        turns = space.turns
        # what is likely to fail stands together, which takes fewer trials
        likely = sorted(names, key=lambda n: (n not in turns, space.dimensions[n].kind != "depth"))
        bad = at_fault(functools.partial(_trial, space, model, inputs), likely)
        if not bad:
            name, others, failure = _at_fault_together(space, model, inputs, names)
            bad = {name: f"together with {others}, {failure}"}
        for name, reason in bad.items():
            if name in space.dimensions:
                turn = turns.get(name)
                if turn is not None and turn.minimum is not None:
                    space.hold(name, turn)
                else:
                    size, at = space.dimensions[name].size, ""
                    if turn is not None:
                        at = f" at {turn.at} of {size}, where its forward decides otherwise"
                    space.take_out([name], f"failed its trial{at}: {reason}")
        names = chosen()
    return 0.0


def _certify_training(space: SearchSpace, model: nn.Module, inputs: Any) -> None:
    """Freeze stacks that training needs: the forward writes to what a block gives, which is its input once it has gone.

    The outputs are the same, but what has been written to may have been saved for the backward.
    """
    trains: bool | None = None
    for name, stack in list(space.stacks.items()):
        if name not in space.dimensions or not any(stack.modified):
            continue
        scores = {name: [float(not written) for written in stack.modified]}
        for left in {space.dimensions[name].lowest, stack.modified.count(False)}:
            if not _trains(space.build(space.structure({name: left}, scores), model), inputs):
                trains = _trains(model, inputs) if trains is None else trains
                if trains:
                    space.take_out(
                        [name], "the forward writes to its output, which would be an input that training needs"
                    )
                break


def _trains(model: nn.Module, inputs: Any) -> bool:
    """Whether gradients of a copy of `model` can be taken."""
    copy = clone(model, own_copy)
    args, kwargs = running.arguments(inputs)
    with running.uncompiled(), running.evaluating(copy), repeatable(copy), torch.enable_grad():
        try:
            outputs = [
                t for t in running.tensors_in(copy(*args, **kwargs)) if t.is_floating_point() and t.requires_grad
            ]
            if outputs:
                torch.stack([t.sum().float() for t in outputs]).sum().backward()
        except RuntimeError as error:
            running.raise_if_short(error)
            return False
    return True


def _runs_with_cache(space: SearchSpace) -> bool:
    """Whether what is exported makes its own cache: a network may lay one out by numbers that nothing else reads."""
    return _runs(space.build(_halved(space, list(space.dimensions))), space.example_inputs)


def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        with running.uncompiled(), running.evaluating(model), repeatable(model):
            running.outputs(model, inputs)
    except Exception as error:
        running.raise_if_short(error)
        return False
    return True


def trial_model(space: SearchSpace, above_zero: bool = False) -> tuple[nn.Module, Any]:
    """A copy of the space's model on which nothing is trivial, in evaluation mode, and the inputs for it.

    Half precision becomes float32: a trial is about indices, not about rounding.

    Args:
        space: of a model that runs.
        above_zero: whether buffers of zeros become positive: a variance may be among them, of which roots are taken.
    """
    model = clone(space.model, own_copy) if space.writes_parameters else space.model
    model = clone(model, functools.partial(_non_trivial, above_zero=above_zero))
    model.eval()  # a statement, here and wherever a mode is set: a class of its own kind may return nothing
    model = model if space.trace.cached else quiet(model)
    return _in_precision(model, space.example_inputs, torch.float32)


def _in_precision(model: nn.Module, inputs: Any, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """`model` and its inputs; copies where there is less than this precision in its parameters."""
    if not any(_is_below(p, dtype) for p in model.parameters()):
        return model, inputs

    def raised(t: Tensor) -> Tensor:
        twin = t.detach().to(dtype) if _is_below(t, dtype) else t.detach().clone()
        return nn.Parameter(twin, requires_grad=False) if isinstance(t, nn.Parameter) else twin

    return clone(model, raised), running.map_tensors(raised, inputs)


def _in_double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any] | None:
    """`model` and its inputs in float64; None where it does not run so: it casts, has no memory, or its device no float64."""
    try:
        precise = _in_precision(model, inputs, torch.float64)
        return precise if _runs(*precise) else None
    except Exception:
        return None


def _is_below(t: Tensor, dtype: torch.dtype) -> bool:
    return t.is_floating_point() and t.dtype.itemsize < dtype.itemsize


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor] | None:
    """Those of the model itself; None where it did not run for what the trace had left in a cache, which has been emptied.

    Raises:
        TraceError: it does not: a trace without values lets pass what a kernel may refuse, integers given to a linear layer say.
    """
    try:
        return running.outputs(model, inputs)
    except Exception as failure:
        running.raise_if_short(failure)
        if empty_caches():
            return None
        raise failed_forward(model, failure) from failure


def at_fault(
    trial: Callable[[Sequence[str]], str | None], names: Sequence[str], failure: str | None = None
) -> dict[str, str]:
    """Dimension -> what happened, for those of `names` that fail a trial on their own; found by bisection.

    `trial` takes some names, which fail together, and returns what happened, or None; `failure` is that of `names`, if known.
    """
    if len(names) == 1:
        failure = failure or trial(names)
        return {names[0]: failure} if failure else {}
    found: dict[str, str] = {}
    for half in (names[: len(names) // 2], names[len(names) // 2 :]):
        failure = trial(half)
        if failure is not None:
            found |= at_fault(trial, half, failure)
    return found


def _at_fault_together(space: SearchSpace, model: nn.Module, inputs: Any, names: Sequence[str]) -> tuple[str, str, str]:
    """The last of the shortest run of `names` that fails, those before it in words, and what happened."""
    names = sorted(names, key=lambda n: space.dimensions[n].kind == "depth")  # blocks go before widths
    low, high = 0, len(names)  # names[:low] passes, names[:high] fails
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _trial(space, model, inputs, names[:middle]) is not None else (middle, high)
    failure = _trial(space, model, inputs, names[:high]) or _DIFFER
    return names[high - 1], names[0] if high == 2 else "others", failure


def _trial(space: SearchSpace, model: nn.Module, inputs: Any, names: Sequence[str]) -> str | None:
    """Remove about half of the named dimensions; None if exported and gated agree, else what happened."""
    structure = _halved(space, names)
    try:
        small = space.build(structure, model)
        error = compare(space._gate(model, structure), small, inputs)
    except Exception as failure:
        running.raise_if_short(failure)
        return f"{type(failure).__name__}: {str(failure).splitlines()[0][:200] if str(failure) else ''}"
    return None if error <= 1e-4 else f"{_DIFFER} by {error:.1e}"


_DIFFER = "exported and gated model differ"


def unsteady(by_rounding: float) -> str:
    """Why two models cannot be compared whose outputs differ so much where weights differ by rounding."""
    if by_rounding == float("inf"):
        return "outputs on example_inputs are no numbers (NaN), so two models cannot be compared"
    return f"outputs differ by {by_rounding:.0e} where weights differ by rounding, so two models cannot be compared"


def shaken(space: SearchSpace, model: nn.Module, inputs: Any, structure: Structure) -> float:
    """Relative difference that weights which differ by rounding make in the outputs of a structure, gated and exported.

    The smaller of the two: inf only where both have outputs that are no numbers, 0 where one does not run.
    """
    other = clone(model, _rounded)
    try:
        return min(
            compare(space._gate(model, structure), space._gate(other, structure), inputs),
            compare(space.build(structure, model), space.build(structure, other), inputs),
        )
    except Exception as failure:
        running.raise_if_short(failure)
        return 0.0


def compare_in(space: SearchSpace, structure: Structure, small: nn.Module, dtype: torch.dtype) -> float:
    """`compare` of an exported model in a higher precision than its own; inf if it has that already, or does not run in it."""
    try:
        model, inputs = _in_precision(space.model, space.example_inputs, dtype)
        if model is not space.model:
            return compare(space._gate(model, structure), _in_precision(small, inputs, dtype)[0], inputs)
    except Exception:  # a forward that casts to a precision of its own, or no memory for this one
        pass
    return float("inf")


def _rounded(t: Tensor) -> Tensor:
    """A parameter of which each element is off by up to four units in its last place; a copy of a buffer."""
    if not isinstance(t, nn.Parameter) or not t.is_floating_point():
        return own_copy(t)
    generator = torch.Generator().manual_seed(t.numel())
    noise = (torch.rand(t.shape, generator=generator) * 2 - 1).to(t.device, t.dtype)
    return nn.Parameter(t.detach() * (1 + 4 * torch.finfo(t.dtype).eps * noise), requires_grad=t.requires_grad)


def _halved(space: SearchSpace, names: Sequence[str]) -> Structure:
    """About half of everything: an odd number of a width, for what holds of a half may hold of round numbers only.

    Widths of one size get different ones: what keeps them equal, if they must be, would not show else; nor would it where one
    element is left, which is broadcast, so more stay if more than two are there.  Where the forward decides by a size, one at
    which it decides otherwise.  Of blocks and experts the first goes and the last stays: what others keep for it by its number
    would be missed.
    """
    rng, turns = random.Random(0), space.turns
    sizes: dict[str, float] = {}
    alike: Counter[int] = Counter()
    for n in names:
        d = space.dimensions[n]
        half = d.size // 2
        if d.kind != "depth":
            half -= (half + 1) % 2 + 2 * (alike[d.size] % 3)
            if half < 2 < d.size:
                half = d.size - 1 if d.size > 4 and alike[d.size] % 2 else min(3, d.size - 1) - alike[d.size] % 2
            alike[d.size] += 1
        sizes[n] = turns[n].at if n in turns else max(d.lowest, half)
    scores = {m: [rng.random() for _ in range(t)] for n in names for m, t in space._members(space.dimensions[n])}
    for m in space.parts.keys() & scores.keys():
        scores[m][0], scores[m][-1] = -1.0, 1.0
    return space.structure(sizes, scores)


def compare(gated: nn.Module, small: nn.Module, example_inputs: Any) -> float:
    """Relative error of `small` against `gated` in evaluation mode; both are left in the mode they were in."""
    error, drawn = _compare(gated, small, example_inputs, contextlib.nullcontext())
    if drawn and not error <= tolerance(gated):  # noise is made in the order of memory, which a mask may change
        error, _ = _compare(gated, small, example_inputs, _InOrder())
    if drawn and not error <= tolerance(gated):  # of fewer elements each one gets another number
        error, _ = _compare(gated, small, example_inputs, _Even())
    return error


def _compare(
    gated: nn.Module, small: nn.Module, example_inputs: Any, noise: contextlib.AbstractContextManager[Any]
) -> tuple[float, bool]:
    found, drawn = [], False
    for model in (gated, small):
        with running.uncompiled(), running.evaluating(model), repeatable(model), noise:
            start = torch.get_rng_state()
            found.append(running.outputs(model, example_inputs))
            drawn |= not torch.equal(start, torch.get_rng_state())
    return running.relative_error(found[1], found[0]), drawn


class _InOrder(TorchDispatchMode):
    """Random numbers in the order of the elements, wherever these lie in memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        given = running.map_tensors(lambda t: t.contiguous(), (args, kwargs or {}))
        out = func(*given[0], **given[1])
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            return args[0].copy_(out)
        return out


class _Even(TorchDispatchMode):
    """The same number in place of random ones, for every element."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            for t in running.tensors_in(out):
                if "dropout" in func.__name__:  # which gives a share of what it takes
                    t.copy_(args[0] * 0.4)
                elif t.is_floating_point() or t.is_complex():
                    t.fill_(0.4)
        return out


@contextlib.contextmanager
def repeatable(model: nn.Module) -> Iterator[None]:
    """Inside, the same random numbers each time and no autocast; outside, random numbers go on as if nothing had been."""
    with torch.random.fork_rng([]), torch.autocast(_device_type(model), enabled=False):
        torch.manual_seed(0)
        yield


def _device_type(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def tolerance(model: nn.Module) -> float:
    """The relative error that rounding explains: 1e-4 in float32, 16 units in the last place of half precisions."""
    kinds = [t.dtype for t in model.parameters() if t.is_floating_point()]
    return max([1e-4, *(16 * torch.finfo(d).eps for d in kinds if d.itemsize < 4)])


def _non_trivial(t: Tensor, above_zero: bool = False) -> Tensor:
    """`t` itself if its elements differ, else random ones around its constant: ones of a norm, zeros of a gate."""
    if t.layout is not torch.strided:  # a sparse table
        return t
    first = t.detach().flatten()[:64]  # almost always enough to see that they differ
    if not t.is_floating_point() or t.numel() < 2 or bool((first != first[0]).any()) or bool((t != first[0]).any()):
        return t if isinstance(t, nn.Parameter) else t.detach().clone()
    c = float(first[0])
    generator = torch.Generator().manual_seed(t.numel())
    noise = torch.rand(t.shape, generator=generator) - 0.5
    least = 0.5 if above_zero and not isinstance(t, nn.Parameter) else 0
    values = c * (1 + noise) if abs(c) >= 0.1 else 0.4 * (noise + least)
    values = values.to(t.device, t.dtype)
    return nn.Parameter(values, requires_grad=False) if isinstance(t, nn.Parameter) else values
