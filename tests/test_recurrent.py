"""Recurrent layers: a trace that counts repeated steps notes what one that runs them all does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dmscale
from dmscale import recurrent, tracing
from dmscale.tracing import Trace

LAYERS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(6, 8),
    "lstm, projected": lambda: nn.LSTM(6, 8, num_layers=2, proj_size=4, bidirectional=True, batch_first=True),
    "lstm, no bias": lambda: nn.LSTM(6, 8, num_layers=3, bias=False, dropout=0.5),
    "gru": lambda: nn.GRU(6, 8, batch_first=True),
    "gru, both ways": lambda: nn.GRU(6, 8, num_layers=2, bidirectional=True),
    "tanh": lambda: nn.RNN(6, 8, bidirectional=True, bias=False, batch_first=True),
    "relu": lambda: nn.RNN(6, 8, num_layers=2, nonlinearity="relu"),
}


class Around(nn.Module):
    """A recurrent layer between linear ones, which make its axes free where they can be."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(5, 6), layer, nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.layer(self.before(x))
        return self.after(out.relu())


def noted(trace: Trace) -> list[Any]:
    """All that is counted, and the axes of every parameter as they are in the end.

    Activations as a bag: parts of a state are joined in the order in which a C++ compiler evaluates arguments.
    """
    r = trace.record
    counted = [(n.op, n.path, repr(n.dims)) for n in r.terms]
    counted += sorted((n.element, n.path, repr(n.dims)) for n in r.activations)
    instances = [(i.start, i.end, i.operator, repr(i.args), repr(i.dims)) for i in r.instances]
    calls = [(c.path, c.start, c.end) for c in r.calls]
    return [counted, instances, calls, {n: repr(d) for n, d in trace.slots.items()}, [str(e) for e in r.equations]]


def both(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: torch.Tensor) -> tuple[Trace, Trace]:
    counted = tracing.read(model, x)
    monkeypatch.setattr(recurrent, "is_layer", lambda *call: False)
    return counted, tracing.read(model, x)


@pytest.mark.parametrize("shape", [(5, 7, 5), (1, 2, 5), (2, 1, 5), (9, 5)])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_that_are_counted_are_noted_as_those_that_run(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Around(LAYERS[name]()), torch.randn(shape)
    model(x)  # the lazy layer learns its width
    counted, run = both(monkeypatch, model.eval(), x)
    assert counted.on == run.on == "meta"
    assert noted(counted) == noted(run)


@pytest.mark.parametrize("name", LAYERS)
def test_a_longer_sequence_runs_no_more_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Around(LAYERS[name]())
    model(torch.randn(5, 5, 5))
    ran = [sum(tracing.read(model, torch.randn(t, t, 5)).record.operators.values()) for t in (6, 60)]
    assert ran[0] == ran[1]


def test_a_layer_whose_dropout_is_on_or_whose_sequence_is_packed_runs_as_it_is() -> None:
    x, h = torch.empty(3, 2, 6, device="meta"), torch.empty(1, 2, 8, device="meta")
    sizes = torch.tensor([2, 1])
    assert recurrent.is_layer("gru", (x, h, [], True, 1, 0.5, False, False, False), {})
    assert not recurrent.is_layer("gru", (x, h, [], True, 1, 0.5, True, False, False), {})
    assert not recurrent.is_layer("gru", (x, sizes, h, [], True, 1, 0.5, False, False), {})
    assert not recurrent.is_layer("gru", (torch.empty(3, 2, 6), h, [], True, 1, 0.0, False, False, False), {})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_order_of_batch_and_time_writes_nothing(kind):
    """Transposing, in place too, is a view: not one of the activations that a forward writes."""
    costs = []
    for batch_first in (True, False):
        model, x = kind(6, 10, batch_first=batch_first), torch.randn(3, 5, 6)
        costs.append(dmscale.trace(model, x if batch_first else x.transpose(0, 1)).cost())
    assert costs[0] == costs[1]
