"""How much each element matters: what a search gathers while the network trains.

An importance is an estimate of the loss that the removal of an element would cost, up to a factor that all elements share.
It is averaged over steps and never trained.  The choices:

    taylor      (m dL/dm)^2: DMS eq. 4; a second-order estimate, the curvature being that of the empirical Fisher information
    fisher      (dL/dm)^2: the same at m = 1; an element that is masked keeps a score, so that it may come back
    snip        |m dL/dm| (Lee et al., 2019)
    magnitude   sum of the squared weights at the element
    activation  mean square of the activation that the element carries where a module takes it in, or else gives it, summed up
                over what it carries (a head: its channels); of a block, of what it adds
    index       falls with the position: the last elements go first
    a function  of the search, that returns member -> scores

What a module takes in counts where it is taken in for a step: with gradients enabled, in evaluation mode only if nothing has
run in training mode since the last step.  Means of that, and what a function says, are averaged over the processes that train
together, whose gradients are averaged already: all must find one structure.

For blocks "residual" and "similarity" are further choices: |f(x)|^2 / |x|^2 and 1 - cos(x, x + f(x)) of a block x + f(x).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import attachment, axes, blocks, running
from .errors import DmscaleError, SearchError
from .layout import Layout
from .space import SearchSpace

GRADIENT: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "taylor": lambda m, g: (m * g).square(),
    "fisher": lambda m, g: g.square(),
    "snip": lambda m, g: (m * g).abs(),
}
KINDS = (*GRADIENT, "magnitude", "activation", "index")
DEPTH_KINDS = (*KINDS, "residual", "similarity")


def check(kind: Any, depth_kind: Any) -> None:
    """Refuse a kind that does not exist.

    Raises:
        SearchError: it is neither a known name nor a function.
    """
    if not callable(kind) and kind not in KINDS:
        raise SearchError(f"importance={kind!r} is none of {', '.join(KINDS)}, nor a function of the search")
    if depth_kind is not None and depth_kind not in DEPTH_KINDS:
        raise SearchError(f"depth_importance={depth_kind!r} is none of {', '.join(DEPTH_KINDS)}")


class Meter:
    """One step's importance of every element, (E,), by the kinds asked for.

    Args:
        space, layout: whose elements.
        model: the gated model; what measures activations hangs its hooks there.
        kind: of widths and heads.
        depth_kind: of blocks; as `kind` by default.
    """

    def __init__(self, space: SearchSpace, layout: Layout, model: nn.Module, kind: Any, depth_kind: str | None):
        check(kind, depth_kind)
        self.space, self.layout, self.kind, self.depth_kind = space, layout, kind, depth_kind or kind
        self._activations = _watch_activations(space, model) if "activation" in (self.kind, self.depth_kind) else {}
        watched = self.depth_kind in ("residual", "similarity", "activation")
        self._blocks = _watch_blocks(space, model, self.depth_kind) if watched else {}
        self._fixed: dict[str, Tensor] = {}

    @property
    def kinds(self) -> dict[str, Any]:
        """The kinds asked for, by the argument of `Search`."""
        return {"importance": self.kind, "depth_importance": self.depth_kind}

    def measure(self, search: Any, mask: Tensor, gradient: Tensor) -> Tensor:
        """Importance of this step, (E,), from the mask and the loss's gradient by it, both (E,)."""
        widths = self._of(self.kind, search, mask, gradient)
        if self.depth_kind == self.kind:
            return widths
        return torch.where(self.layout.in_depth, self._of(self.depth_kind, search, mask, gradient), widths)

    def _given(self, kind: Callable[[Any], Any], search: Any) -> dict[str, Any]:
        """What the user's function says, by member.

        Raises:
            SearchError: it is no dict of as many finite numbers as a member has elements, or says anything of what is none.
        """
        said = kind(search)
        if not isinstance(said, Mapping):
            raise SearchError(
                f"importance= gives a {type(said).__name__}; it must give a dict: member -> a score an element"
            )
        try:
            scores = self.space._checked_scores(said)
        except DmscaleError as error:
            raise SearchError(f"importance= gives {error}") from error
        wrong = [member for member, s in scores.items() if not np.isfinite(s).all()]
        if wrong:
            raise SearchError(f"importance= gives infinite scores of {wrong[0]!r}: no average of them would be finite")
        return scores

    def _of(self, kind: Any, search: Any, mask: Tensor, gradient: Tensor) -> Tensor:
        if callable(kind):
            return attachment.average_over_all(self.layout.flat(self._given(kind, search), mask.device))
        if kind in GRADIENT:
            return GRADIENT[kind](mask, gradient)
        if kind in ("activation", "residual", "similarity"):
            means = {n: torch.stack([w.mean() for w in each]) for n, each in self._blocks.items()}
            if kind == "activation":
                means |= {m: w.mean() for m, w in self._activations.items()}
            return attachment.average_over_all(self.layout.flat(means, mask.device))
        if kind == "magnitude":  # weights move while the network trains
            return self.layout.flat({m: s.square() for m, s in self.space.magnitudes().items()}, mask.device)
        if kind not in self._fixed:
            places = torch.arange(self.layout.elements, device=mask.device) - self.layout.start[self.layout.segment]
            self._fixed[kind] = 1 - places / self.layout.element_size
        return self._fixed[kind]


@dataclass
class _Watch:
    """A running sum of what a hook sees in the forwards of a step, emptied by `mean`.

    trained: whether it is of forwards in training mode, which displace those in evaluation mode: validation, as a rule, but
        a search may run in evaluation mode throughout, so that statistics of BatchNorm stay.
    """

    total: Any = 0.0
    count: int = 0
    trained: bool = False
    last: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32))

    def add(self, value: Tensor, training: bool) -> None:
        if training and not self.trained:
            self.total, self.count, self.trained = 0.0, 0, True
        if training == self.trained:
            self.total, self.count = self.total + value.detach().float(), self.count + 1

    def mean(self) -> Tensor:
        if self.count:
            self.last = self.total / self.count
            self.total, self.count, self.trained = 0.0, 0, False
        return self.last


_Part = tuple["_Watch", Tensor | None]
"""What to add to of an activation, and the element that each of its positions belongs to, -1 for none; None for its own."""


def _watch_activations(space: SearchSpace, model: nn.Module) -> dict[str, _Watch]:
    """Member -> the mean square of each of its elements, wherever a module takes them in; of one that none does, gives them.

    Raises:
        SearchError: of some dimension no module does either.
    """
    member = {a: (m, a.size) for d in space.dimensions.values() for m, a in zip(d.members, d.axes)}
    watches: dict[str, _Watch] = {}
    for given in (False, True):
        known = set(watches)
        for call in space.trace.record.calls:
            value = call.result if given else call.source
            for position, dim in enumerate(value.dims if value is not None and call.path else ()):
                parts: list[_Part] = []
                for a in [a for a in axes.atoms(dim) if a in member and member[a][0] not in known]:
                    name, size = member[a]
                    watch = watches.setdefault(name, _Watch(last=torch.zeros(size, dtype=torch.float32)))
                    parts.append((watch, axes.coordinates(dim)[a] if axes.size(dim) != size else None))
                if parts:
                    _on_activation(model.get_submodule(call.path), position, parts, given)
    # of a member that is linked to others the size is theirs; its elements go by their place
    missing = [n for n, d in space.dimensions.items() if d.kind != "depth" and watches.keys().isdisjoint(d.members)]
    if missing:
        raise SearchError(
            f"importance='activation' says nothing of {', '.join(map(repr, missing[:5]))}, which no module takes in or gives: "
            "choose another importance, or leave it alone (freeze= of trace)"
        )
    return watches


def _on_activation(module: nn.Module, position: int, parts: Sequence[_Part], given: bool) -> None:
    def see(values: Any) -> None:
        if torch.is_grad_enabled():
            x = running.tensors_in(values)[0].detach()
            squares = x.float().square().mean([i for i in range(x.dim()) if i != position])
            for watch, at in parts:
                watch.add(squares if at is None else _by_element(squares, at, len(watch.last)), module.training)

    # as it comes, before a gate changes it
    if given:
        module.register_forward_hook(lambda module, args, out: see(out), prepend=True)
    else:
        module.register_forward_pre_hook(lambda module, *given: see(given), with_kwargs=True, prepend=True)


def _by_element(values: Tensor, at: Tensor, size: int) -> Tensor:
    """The sum of the values (N,) that belong to each element, (size,)."""
    inside = (at >= 0).nonzero()[:, 0]
    return values.new_zeros(size).index_add_(0, at[inside].to(values.device), values[inside.to(values.device)])


def _watch_blocks(space: SearchSpace, model: nn.Module, kind: str) -> dict[str, list[_Watch]]:
    """Stack -> what each of its blocks adds to its input, seen before its gate."""
    watches: dict[str, list[_Watch]] = {}
    for name, stack in space.stacks.items():
        watches[name] = [_Watch() for _ in stack.paths]
        for i, watch in enumerate(watches[name]):
            _on_block(model.get_submodule(stack.paths[i]), kind, watch, stack, i)
    return watches


def _on_block(module: nn.Module, kind: str, watch: _Watch, stack: blocks.Blocks, block: int) -> None:
    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if not torch.is_grad_enabled():
            return
        x, y = (t.detach().float().flatten(1) for t in blocks.ends(stack, block, args, kwargs, out))
        if kind == "residual":
            value = ((y - x).square().sum(1) / x.square().sum(1).clamp(min=1e-12)).mean()
        elif kind == "activation":
            value = (y - x).square().mean()
        else:
            value = (1 - torch.cosine_similarity(x, y, dim=1)).mean().clamp(min=0)  # one may round above one
        watch.add(value, module.training)

    module.register_forward_hook(hook, with_kwargs=True, prepend=True)
