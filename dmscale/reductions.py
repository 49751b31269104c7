"""Reductions over a part of an axis, wherever a forward calls them.

A mean, variance or maximum over channels depends on how many there are, and is seldom in a module of its own (a hand
written LayerNorm, GRN, CBAM).  What the k kept of N elements give follows from one call of the same function:

- sum, norm:        f(m x)
- mean:             f(m x) N / k
- variance:         f(m (x - mean_kept)) (N - c) / (k - c), c the correction; its square root for a deviation
- maximum, minimum: f(x with what is removed at -inf, +inf)

`Numbering` names such a call by the module that makes it, the function and how many of that function came before in the
same forward; a trace notes the name, and `MaskedForward` finds the call again by counting in the same way.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import axes
from .axes import Dim

SUMS = frozenset({"sum", "nansum", "norm", "linalg_vector_norm"})
MEANS = frozenset({"mean"})
SPREADS = frozenset({"var", "std"})
EXTREMA = {"amax": -math.inf, "max": -math.inf, "amin": math.inf, "min": math.inf}
FUNCTIONS = SUMS | MEANS | SPREADS | EXTREMA.keys()
"""Names of the torch functions that have a form for a part of an axis."""

_COMPOSITE = ("torch.functional", "torch.nn.functional")  # Python bodies: one call outside a trace, many inside


@dataclass(frozen=True)
class Place:
    """The call number `index` of `function` in one forward of module `module`."""

    module: str
    function: str
    index: int


@dataclass(frozen=True, eq=False)
class ReductionSite:
    """Reduce over the kept elements of `dims` (position -> axes) at `place`; `over` are all positions that go."""

    place: Place
    dims: tuple[tuple[int, Dim], ...]
    over: tuple[int, ...]


class Numbering:
    """Counts reductions in every module that runs."""

    def __init__(self) -> None:
        self._open: list[tuple[str, Counter[str]]] = []

    def enter(self, path: str) -> None:
        """A module's forward begins."""
        self._open.append((path, Counter()))

    def leave(self) -> None:
        """The innermost forward ends."""
        self._open.pop()

    def place(self, function: str) -> Place | None:
        """The name of a call that is about to be made; None where it cannot be found again."""
        if not self._open or _inside_composite():
            return None
        path, counts = self._open[-1]
        place = Place(path, function, counts[function])
        for _, outer in self._open:  # the forwards around it see the call too
            outer[function] += 1
        return place


def _inside_composite() -> bool:
    """Whether the call comes from the body of a function of PyTorch's, which only a trace sees through."""
    frame = sys._getframe(2)
    for _ in range(40):
        if frame is None or frame.f_code.co_name in ("_call_impl", "forward"):
            return False
        if frame.f_globals.get("__name__") in _COMPOSITE:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_composite(function: Any) -> bool:
    """Whether `function` is one with a Python body that a trace sees through."""
    return getattr(function, "__module__", None) in _COMPOSITE


class MaskedForward:
    """The forward of a module with some of its reductions taken over what is kept; replaces `module.forward`.

    Args:
        forward: the module's own.
        masks: axes -> mask, (size,).
        sites: what to mask.
    """

    def __init__(self, forward: Callable[..., Any], masks: Callable[[Dim], Tensor], sites: Sequence[ReductionSite]):
        self.forward, self.masks = forward, masks
        self.sites = {(s.place.function, s.place.index): s for s in sites}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Masking(self.masks, self.sites):
            return self.forward(*args, **kwargs)


def attach(module: nn.Module, masks: Callable[[Dim], Tensor], sites: Sequence[ReductionSite]) -> None:
    """Let `module` reduce over what `masks` keep, at `sites`."""
    module.__dict__["forward"] = MaskedForward(module.forward, masks, sites)


class _Masking(TorchFunctionMode):
    def __init__(self, masks: Callable[[Dim], Tensor], sites: Mapping[tuple[str, int], ReductionSite]):
        super().__init__()
        self.masks, self.sites, self.counts = masks, sites, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in FUNCTIONS or is_composite(func):
            return func(*args, **kwargs)
        site = self.sites.get((name, self.counts[name]))
        self.counts[name] += 1
        if site is None:
            return func(*args, **kwargs)
        x, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        # what is computed around the one call must not be counted by the forwards around this one
        with torch._C.DisableTorchFunction():
            x, finish = _masked(name, x, site, self.masks, rest, kwargs)
        out = func(x, *rest, **kwargs)
        with torch._C.DisableTorchFunction():
            return finish(out)


def _masked(
    name: str, x: Tensor, site: ReductionSite, masks: Callable[[Dim], Tensor], rest: Sequence[Any], kwargs: dict
) -> tuple[Tensor, Callable[[Any], Any]]:
    """What to call the function on, and what to do with its result."""
    mask, share = torch.ones((), dtype=x.dtype, device=x.device), torch.ones((), device=x.device)
    for position, dim in site.dims:
        m = masks(dim)
        share = share * m.sum() / m.numel()
        mask = mask * m.to(x.dtype).view([-1 if i == position else 1 for i in range(x.dim())])
    if name in EXTREMA:
        return x.masked_fill(mask < 0.5, EXTREMA[name]), lambda out: out
    if name in SUMS:
        return x * mask, lambda out: out
    if name in MEANS:
        return x * mask, lambda out: out / share.to(out.dtype)
    total = math.prod(x.shape[i] for i in site.over)
    mean = (x * mask).sum(site.over, keepdim=True) / (share * total).to(x.dtype)
    correction = _correction(rest, kwargs)
    factor = (total - correction) / (share * total - correction)
    factor = factor.sqrt() if name == "std" else factor
    return (x - mean) * mask, lambda out: out * factor.to(out.dtype)


def _correction(rest: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """What is taken off the number of elements: var(dim, unbiased), var(unbiased), var(dim, correction=)."""
    if kwargs.get("correction") is not None:
        return float(kwargs["correction"])
    flags = [a for a in rest[:2] if isinstance(a, bool)]
    return float(kwargs.get("unbiased", flags[0] if flags else True))


def site_of(place: Place, dims: Sequence[Dim], over: Sequence[Dim]) -> ReductionSite:
    """The site of a reduction over the dimensions `over` of a tensor of `dims`."""
    positions = tuple(i for i, d in enumerate(dims) if any(d is o for o in over))
    return ReductionSite(place, tuple((i, dims[i]) for i in positions if axes.is_free(dims[i])), positions)
