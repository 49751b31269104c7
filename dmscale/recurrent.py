"""Recurrent layers, step by step until a step has nothing new to say: a trace does not take longer for a longer sequence.

PyTorch has one operator for a whole LSTM, GRU or RNN, and composes it of the steps of its cell.  What a trace notes of an
operator depends on nothing but what is known of the tensors that it takes.  So once a step starts from a state of which the
same is known as of the one before, all others are its repetitions: they are noted as often, and not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import axes
from .sizes import Extent, Operation, SizedInt
from .tracer import Tracer

State = tuple[Tensor, ...]
_Cell = Callable[[Tensor, State, Sequence[Any]], State]


def _lstm(x: Tensor, state: State, weights: Sequence[Any]) -> State:
    h, c = state
    w_ih, w_hh, b_ih, b_hh, *projection = weights
    gates = F.linear(h, w_hh, b_hh).add_(F.linear(x, w_ih, b_ih))
    i, f, g, o = gates.unsafe_chunk(4, 1)
    i, f, g, o = i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
    c = (f * c).add_(i * g)
    h = o * c.tanh()
    return (torch.matmul(h, projection[0].t()) if projection else h), c


def _gru(x: Tensor, state: State, weights: Sequence[Any]) -> State:
    (h,) = state
    w_ih, w_hh, b_ih, b_hh = weights
    of_x = F.linear(x, w_ih, b_ih).unsafe_chunk(3, 1)
    of_h = F.linear(h, w_hh, b_hh).unsafe_chunk(3, 1)
    reset = of_h[0].add_(of_x[0]).sigmoid_()
    update = of_h[1].add_(of_x[1]).sigmoid_()
    new = of_x[2].add(of_h[2].mul_(reset)).tanh_()
    return ((h - new).mul_(update).add_(new),)


def _simple(activation: Callable[[Tensor], Tensor]) -> _Cell:
    def cell(x: Tensor, state: State, weights: Sequence[Any]) -> State:
        (h,) = state
        w_ih, w_hh, b_ih, b_hh = weights
        return (activation(F.linear(h, w_hh, b_hh).add_(F.linear(x, w_ih, b_ih))),)

    return cell


_CELLS: dict[str, _Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _simple(torch.tanh),
    "rnn_relu": _simple(torch.relu),
}
"""Name of a function of PyTorch -> the step that it composes, operator for operator (ATen/native/RNN.cpp)."""


def is_layer(name: str, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether a call of the function `name` runs a recurrent layer as `layer` does: no packed sequence, no dropout."""
    if name not in _CELLS or len(args) != 9 or kwargs or not isinstance(args[2], (tuple, list)):
        return False
    x, _, _, _, _, dropout, training, _, _ = args
    return x.is_meta and x.dim() == 3 and 0 not in x.shape and not (dropout and training)


def keep_apart(tracer: Tracer, h: Tensor, c: Tensor) -> None:
    """The projection of an LSTM keeps its share of the hidden size: the kernel takes one that is as long for none at all.

    h, c: its last states, (layers, B, projection) and (layers, B, hidden).
    """
    projected, hidden = h.shape[-1], c.shape[-1]
    if projected != hidden:
        share = Operation("//", Operation("*", Extent(tracer.dims(c)[-1]), projected), hidden)
        tracer.equate(SizedInt(projected, share), tracer.dims(h)[-1])


def layer(
    tracer: Tracer, name: str, x: Tensor, hx: Any, flat: Sequence[Tensor], biases: bool, layers: int, dropout: float,
    training: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the function `name` gives: the outputs (T, B, D), or (B, T, D) with `batch_first`, and each part of the last state."""
    directions = 2 if bidirectional else 1
    each = len(flat) // (layers * directions)
    x = x.transpose(0, 1) if batch_first else x
    states = list(zip(*(part.unbind(0) for part in (hx if isinstance(hx, (tuple, list)) else (hx,)))))
    last: list[State] = []
    for i in range(layers):
        steps, joined = x.unbind(0), []
        for j in range(directions):
            k = i * directions + j
            own = flat[k * each : (k + 1) * each]
            weights = own if biases else [*own[:2], None, None, *own[2:]]
            outputs, state = _run(tracer, _CELLS[name], steps[::-1] if j else steps, states[k], weights)
            joined.append(torch.stack(outputs[::-1] if j else outputs, 0))
            last.append(state)
        x = torch.cat(joined, 2) if bidirectional else joined[0]
    ends = tuple(torch.stack(parts, 0) for parts in zip(*last))
    if batch_first:
        x = x.transpose(0, 1) if name == "lstm" else x.transpose_(0, 1)
    return x, *ends


def _run(
    tracer: Tracer, cell: _Cell, steps: Sequence[Tensor], state: State, weights: Sequence[Any]
) -> tuple[list[Tensor], State]:
    """The output of every step, and the last state."""
    outputs: list[Tensor] = []
    for i, x in enumerate(steps):
        before, start = state, tracer.op
        state = cell(x, state, weights)
        outputs.append(state[0])
        if all(_alike(tracer, a, b) for a, b in zip(before, state)):
            again = len(steps) - i - 1
            tracer.repeat(start, again)
            return outputs + [state[0]] * again, state
    return outputs, state


def _alike(tracer: Tracer, a: Tensor, b: Tensor) -> bool:
    """Whether the same is known of two tensors, as far as any rule looks."""
    v, w = tracer.value(a), tracer.value(b)
    return (
        a.shape == b.shape and a.stride() == b.stride()
        and (v.params, v.data, v.zeroed, v.said, v.dtype) == (w.params, w.data, w.zeroed, w.said, w.dtype)
        and all(map(axes.same, v.dims, w.dims))
    )  # fmt: skip
