"""Masks, and the arithmetic of the gates with them: functions of autograd that make and keep as few tensors as they can.

What a search knows of its masks, that they are zeros and ones and how many, is left out of the computation: products with
ones, counts, scales.  Each function has one backward of its own, where a chain of PyTorch's would have one for every factor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import axes, calls, remaking
from .axes import Axis, Dim


class Masks(nn.Module):
    """The masks of a gated model, one parameter for each free axis and each stack of blocks.

    Being parameters they collect gradients over micro-batches, are reduced by DDP and unscaled by a GradScaler like all
    others; a search reads them once per optimizer step.

    What is known of a mask holds until somebody changes it in place: loads a state, broadcasts, averages.  A copy knows
    nothing, since it may be changed in ways that leave no trace (through `.data`).
    """

    def __init__(self, widths: Mapping[Axis, Tensor], depths: Mapping[str, Tensor], trainable: bool):
        super().__init__()
        self.widths = dict(zip(widths, (nn.Parameter(m, requires_grad=trainable) for m in widths.values())))
        self.depths = dict(zip(depths, (nn.Parameter(m, requires_grad=trainable) for m in depths.values())))
        self.settled = False  # whether blocks that are out are so for good
        self._hard: dict[Axis, int] = {}
        self._decided: dict[str, list[bool]] = {}
        self._told_at: dict[Axis | str, int] = {}  # versions of the masks when `hard` and `decided` were set
        self._found: dict[Dim, dict[Axis, Tensor]] = {}
        self._combinations: dict[Dim, _Combination | None] = {}
        self._computed: dict[Any, Tensor] = {}  # from masks that are known: as long as they are
        self._list = nn.ParameterList([*self.widths.values(), *self.depths.values()])

    @property
    def hard(self) -> dict[Axis, int]:
        """Axes whose masks are known to be zeros and ones -> how many ones.  To be set again whenever such a mask changes."""
        return {a: ones for a, ones in self._hard.items() if self._told_at[a] == self.widths[a]._version}

    @hard.setter
    def hard(self, known: dict[Axis, int]) -> None:
        self._hard = known
        self._computed.clear()
        self._told_at |= {a: mask._version for a, mask in self.widths.items()}

    @property
    def decided(self) -> dict[str, list[bool]]:
        """Stacks whose gates are known to be zero or one -> which are one.  To be set again whenever such a gate changes."""
        return {n: ones for n, ones in self._decided.items() if self._told_at[n] == self.depths[n]._version}

    @decided.setter
    def decided(self, known: dict[str, list[bool]]) -> None:
        self._decided = known
        self._told_at |= {n: mask._version for n, mask in self.depths.items()}

    @property
    def outdated(self) -> bool:
        """Whether a mask has been changed since `hard` and `decided` were set, or they never were."""
        return self._told_at != {k: mask._version for k, mask in (*self.widths.items(), *self.depths.items())}

    def __getstate__(self) -> dict[str, Any]:
        unknown = {"settled": False, "_hard": {}, "_decided": {}, "_told_at": {}, "_computed": {}}
        return self.__dict__ | unknown

    def is_in(self, stack: str, block: int) -> bool | None:
        """Whether the gate of a block is one; None where it is not known to be zero or one."""
        ones = self._decided.get(stack)
        return None if ones is None or self._told_at[stack] != self.depths[stack]._version else ones[block]

    def forward(self, dim: Dim) -> Tensor:
        """The mask of `dim`, (size(dim),)."""
        own = self._of(dim)
        if calls.is_transformed() or not own:
            return axes.kept(dim, own)
        first, mask = next(iter(own.items()))
        if first.size == axes.size(dim):
            return mask
        if dim not in self._combinations:
            self._combinations[dim] = _Combination(dim, list(own)) if axes.is_multilinear(dim) else None
        combination = self._combinations[dim]
        with calls.unseen():
            if combination is None:
                return axes.kept(dim, own)
            return _Combined.apply(self, dim, combination, *own.values())

    def share(self, dim: Dim, power: float) -> Tensor:
        """(k / N) ** power for k kept of the N elements of `dim`, ()."""
        mask, kept = self(dim), self.count(dim)
        with calls.unseen():
            if kept is None:
                return mask.mean() ** power
            share = kept / axes.size(dim)
            value = self.while_known((dim, "share", power), dim, lambda: mask.new_full((), share**power))
            return _Share.apply(value, share, power, mask)

    def is_whole(self, dim: Dim) -> bool:
        """Whether the mask of `dim` is known to be ones: a gate need not multiply with it then, only give its gradient."""
        return self.count(dim) == axes.size(dim)

    def count(self, dim: Dim) -> int | None:
        """How many ones the mask of `dim` holds, where it is known to be zeros and ones."""
        # a compiled model would be compiled anew at every change of what is known, and fuses the products anyway
        if calls.is_transformed() or not self._are_hard(self._of(dim)):
            return None
        return int(axes.measure(dim, self._hard))  # type: ignore[call-overload]

    def _are_hard(self, own: Mapping[Axis, Tensor]) -> bool:
        return all(a in self._hard and self._told_at[a] == mask._version for a, mask in own.items())

    def _of(self, dim: Dim) -> dict[Axis, Tensor]:
        if calls.is_transformed():
            return {a: self.widths[a] for a in axes.atoms(dim) if a in self.widths}
        if dim not in self._found:
            self._found[dim] = {a: self.widths[a] for a in axes.atoms(dim) if a in self.widths}
        return self._found[dim]

    def while_known(self, key: Any, dim: Dim, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` makes of the masks of `dim`, remembered under `key` while they are known; without gradient."""
        own = self._of(dim)
        if not self._are_hard(own):
            return compute()
        found, like = self._computed.get(key), next(iter(own.values()))
        if found is None or found.device != like.device or found.dtype != like.dtype:  # the model has moved
            with torch.inference_mode(False), torch.no_grad():  # a step may need what a validation came by first
                found = self._computed[key] = compute()
        return found


class _Combination:
    """How the elements of a dimension go with those of the axes that it is made of.

    elements: for each axis, which of its elements every element of the dimension has, (N,); one past the last for none.
    places: for each axis, which elements of the dimension each of its own is in, (size, as many for each).
    """

    @torch.inference_mode(False)  # made once, for steps and validations
    def __init__(self, dim: Dim, own: Sequence[Axis]):
        self.elements: list[Tensor] = []
        self.places: list[Tensor] = []
        coordinates = axes.coordinates(dim)
        for a in own:
            at = coordinates[a]
            inside = (at >= 0).nonzero()[:, 0]
            self.elements.append(torch.where(at < 0, a.size, at))
            self.places.append(inside[at[inside].argsort(stable=True)].view(a.size, -1))

    def mask(self, own: Sequence[Tensor], without: int | None = None) -> Tensor:
        """The mask of the dimension from those of its axes, (N,); `without` the factor of one of these."""
        out = own[0].new_ones(len(self.elements[0]))
        if self.elements[0].device != out.device:
            self._move(out)
        for i, (mask, at) in enumerate(zip(own, self.elements)):
            if i != without:
                out = out * torch.cat([mask, mask.new_ones(1)])[at]
        return out

    @torch.inference_mode(False)
    def _move(self, like: Tensor) -> None:
        self.elements, self.places = (
            [like.new_empty(t.shape, dtype=t.dtype).copy_(t) for t in ts] for ts in (self.elements, self.places)
        )

    def collect(self, i: int, values: Tensor) -> Tensor:
        """The sum of `values` (N,) over all that each element of axis number `i` is in, (size,)."""
        return values[self.places[i]].sum(1)


class _Combined(torch.autograd.Function):
    """The mask of a dimension as a function of the masks of the axes that it is made of."""

    @staticmethod
    def forward(ctx: Any, masks: Masks, dim: Dim, combination: _Combination, *own: Tensor) -> Tensor:
        ctx.save_for_backward(*own)
        ctx.masks, ctx.dim, ctx.combination = masks, dim, combination
        return masks.while_known(dim, dim, lambda: combination.mask(own)).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        own, grads = ctx.saved_tensors, []  # read once: activation checkpointing hands out what was saved a single time
        for i, wanted in enumerate(ctx.needs_input_grad[3:]):
            by = functools.partial(ctx.combination.mask, own, i)
            # not from memory where a second derivative is asked for
            others = by() if torch.is_grad_enabled() else ctx.masks.while_known((ctx.dim, "without", i), ctx.dim, by)
            grads.append(ctx.combination.collect(i, grad * others) if wanted else None)
        return None, None, None, *grads


class _Share(torch.autograd.Function):
    """share ** power, whose value is known, as a function of the mask (N,) of which `share` is the mean."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: float, power: float, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.share, ctx.power = share, power
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        share = mask.mean() if torch.is_grad_enabled() else ctx.share  # for a second derivative
        slope = grad * (ctx.power * share ** (ctx.power - 1) / mask.numel())
        return None, None, None, slope.expand(mask.shape)


def along(factor: Tensor, like: Tensor, place: int | None) -> Tensor:
    """A mask that broadcasts along dimension `place` of `like`, a scalar where that is None; in its dtype."""
    factor, last = factor.to(like.dtype), like.dim() - 1
    return factor if place is None or place == last else factor.view([-1, *[1] * (last - place)])


class Product(remaking.Remade):
    """x times masks along `places` (and a scalar, place None), of which those known to be `ones` only get their gradient.

    Saves x and the masks alone, and makes one tensor, where a chain of products makes and saves one for each mask; none if
    all are ones.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: list[int | None], ones: list[bool], *factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *factors)
        ctx.places, ctx.ones, ctx.remakes = places, ones, not all(ones)
        return _times(x, places, ones, factors)

    @staticmethod
    def again(ctx: Any) -> Tensor:
        x, *factors = ctx.saved_tensors
        return _times(x, ctx.places, ctx.ones, factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, *factors = ctx.saved_tensors
        places, wanted = ctx.places, ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(factors)
        if any(wanted[3:]):
            masked = sorted(p for p in places if p is not None)
            others = [i for i in range(x.dim()) if i not in masked]
            product = calls.slope(grad, x)
            product = product.sum(others, dtype=calls.PRECISE.get(x.dtype)) if others else product
            for i, factor in enumerate(factors):
                if wanted[3 + i]:
                    grads[i] = _collected(product, masked, i, places, ctx.ones, factors).to(factor.dtype)
        return _times(grad, places, ctx.ones, factors) if wanted[0] else None, None, None, *grads


def _times(x: Tensor, places: Sequence[int | None], ones: Sequence[bool], factors: Sequence[Tensor]) -> Tensor:
    """x times all factors that are not known to be ones; x itself if there are none."""
    out = x
    for place, one, factor in zip(places, ones, factors):
        if not one:
            by = along(factor, x, place)
            out = out * by if out is x or torch.is_grad_enabled() else out.mul_(by)
    return out


def _collected(
    product: Tensor, masked: list[int], own: int, places: Sequence[int | None], ones: Sequence[bool],
    factors: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """The gradient of factor `own`: `product` (its dimensions being `masked`) times all other factors, summed up."""
    over = []
    for i, (place, one, factor) in enumerate(zip(places, ones, factors)):
        if i != own:
            at = None if place is None else masked.index(place)
            product = product if one else product * along(factor, product, at)
            over += [] if at is None else [at]
    return product.sum(over) if over else product


class KeptInput(remaking.Remade):
    """m (x - mean of the kept) sqrt(N / k) along dimension `at`, saving its result only (which the operator saves too).

    With `input_kept`, where x is kept anyway, it saves that, and the result is made again for the operator and for itself.
    The gradient of a mask element that is exactly zero needs the input: it is zero here, and comes from the other places
    where the axis is consumed.

    `known` is the number of ones, if there is nothing else but zeros.  If all are ones x stays as it is: what follows
    subtracts the mean itself.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, at: int, centred: bool, over_space: bool, known: int | None, input_kept: bool
    ) -> Tensor:
        over = [at, *range(at + 1, x.dim())] if over_space else [at]
        ctx.at, ctx.over, ctx.centred, ctx.known = at, over, centred, known
        ctx.places = x.shape[at + 1 :].numel() if over_space else 1
        ctx.remakes, ctx.made = input_kept and known != mask.numel(), None
        if known == mask.numel():
            ctx.save_for_backward(x, mask)
            return x
        count = known or mask.sum()
        factor = mask * (mask.numel() / count) ** 0.5
        mean = _weighted(x, mask / (count * ctx.places), at, over) if centred else None
        y = _rest(x, mean, along(factor, x, at))
        if input_kept:
            ctx.save_for_backward(x, mask, factor, mean)
        else:
            ctx.save_for_backward(y, mask, factor)
        return y

    @staticmethod
    def again(ctx: Any) -> Tensor:
        if ctx.made is None:  # kept until the backward of this function, which comes next
            x, _, factor, mean = ctx.saved_tensors
            ctx.made = _rest(x, mean, along(factor, x, ctx.at))
        return ctx.made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        y, mask, *rest = ctx.saved_tensors
        at, own = ctx.at, not torch.is_grad_enabled()  # whether what is made here may be written to
        if ctx.known == mask.numel():
            centred = y - y.mean(ctx.over, keepdim=True) if ctx.centred else y
            along_it = _summed(grad, centred, at, own and ctx.centred)
            # what follows does not see a shift: the gradient of the mean is zero
            return grad, torch.sub(along_it, along_it.mean(), alpha=0.5).to(mask.dtype), None, None, None, None, None
        if ctx.remakes and not own:  # for a second derivative
            y = KeptInput.apply(y, mask, at, ctx.centred, len(ctx.over) > 1, ctx.known, False)
        elif ctx.remakes:
            y, ctx.made = _rest(y, rest[1], along(rest[0], y, at)) if ctx.made is None else ctx.made, None
        factor, count = rest[0], ctx.known or mask.sum()
        if ctx.centred:
            grad = grad - _weighted(grad, mask / (count * ctx.places), at, ctx.over)
        grad_mask = _summed(grad, y, at, own and ctx.remakes)  # (N,)
        through_count = grad_mask.sum() / (2 * count)
        if ctx.known is None:  # else it is zero where the mask is
            grad_mask = grad_mask * torch.where(mask > 1e-6, 1 / mask.clamp(min=1e-6), 0)
        by = along(factor, grad, at)
        grad_x = grad.mul_(by) if own and ctx.centred else grad * by
        return grad_x, (grad_mask - through_count).to(mask.dtype), None, None, None, None, None


def _rest(x: Tensor, mean: Tensor | None, factor: Tensor) -> Tensor:
    """(x - mean) * factor, a new tensor."""
    return x * factor if mean is None else (x - mean).mul_(factor)


def _weighted(x: Tensor, weights: Tensor, at: int, over: Sequence[int]) -> Tensor:
    """Sum of x * weights (N,) along dimension `at`, and over all of `over`, which are kept as ones."""
    if list(over) == [x.dim() - 1] and x.dtype == weights.dtype and not torch.is_autocast_enabled(x.device.type):
        return (x @ weights)[..., None]  # no tensor of the size of x
    return (x * along(weights, x, at)).sum(list(over), keepdim=True)


def _summed(a: Tensor, b: Tensor, at: int, write: bool) -> Tensor:
    """Sum of a * b over all dimensions of `b` but `at`, (N,), in float32 at least; `b` is written to if it may be."""
    others = [i for i in range(b.dim()) if i != at]
    product = b.mul_(a) if write and not b.is_complex() else calls.slope(a, b)
    return product.sum(others, dtype=calls.PRECISE.get(b.dtype))


class Kept(torch.autograd.Function):
    """lerp(0, y, gate) for a gate known to be zero or one."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, keep: bool) -> Tensor:
        ctx.save_for_backward(y)
        ctx.keep, ctx.gate_dtype = keep, gate.dtype
        return y if keep else torch.zeros_like(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return grad if ctx.keep else None, calls.inner(grad, y).to(ctx.gate_dtype), None


class Chosen(torch.autograd.Function):
    """lerp(x, y, gate) for a gate known to be zero or one: hands on one of the two and so writes no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, keep: bool) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.keep, ctx.gate_dtype = keep, gate.dtype
        return y if keep else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        x, y = ctx.saved_tensors
        slope = calls.inner(grad, y - x).to(ctx.gate_dtype)
        return (None, grad, slope, None) if ctx.keep else (grad, None, slope, None)
