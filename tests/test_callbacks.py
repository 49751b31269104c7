"""Callbacks see every entry of the history, and a resumed search continues their files."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest
import torch
from rich.console import Console as RichConsole
from torch import nn

import dmscale
from dmscale import SearchError, callbacks

STEPS = 12


def searching(*watching):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
    search = dmscale.Search(
        dmscale.trace(model, torch.randn(2, 8), verify=False), "50% macs", STEPS, log_every=2, callbacks=watching
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    search.attach(optimizer)
    return search, optimizer


def train(search, optimizer, until=STEPS):
    while search.step < until:
        torch.manual_seed(search.step)
        loss = search.model(torch.randn(16, 8)).square().mean()
        loss.backward()
        search.note(loss=loss, rate=0.5)
        optimizer.step()
        optimizer.zero_grad()
    return search


class Listener(callbacks.Callback):
    def __init__(self):
        self.records, self.ends = [], []

    def on_step(self, search, record):
        assert record is search.history[-1]
        self.records.append(record)

    def on_end(self, search):
        assert search.done
        self.ends.append(search.structure)


def test_every_entry_of_the_history_is_told_and_the_end_once():
    early, late = Listener(), Listener()
    search, optimizer = searching(early)
    search.callbacks.append(late)
    train(search, optimizer)
    assert early.records == late.records == search.history
    assert [r["step"] for r in search.history] == [2, 4, 6, 8, 10, 12]
    assert all(r["loss"] > 0 and r["rate"] == 0.5 for r in search.history)
    assert early.ends == [search.structure]
    assert "loss" not in searching()[0].history


def test_callbacks_do_not_change_a_search():
    assert train(*searching(Listener())).structure == train(*searching()).structure


def test_names_of_the_record_cannot_be_noted():
    search, _ = searching()
    with pytest.raises(SearchError, match="'cost'.*another name"):
        search.note(loss=1.0, cost=2.0)


@pytest.mark.parametrize("kind", [callbacks.CSV, callbacks.JSONL])
def test_a_resumed_search_continues_its_file(kind, tmp_path):
    """Stopped at step 9, saved at step 5; the last line torn as by a kill."""
    whole, path = tmp_path / "whole", tmp_path / "folder" / "log"
    expected = train(*searching(kind(whole)))

    search, optimizer = searching(kind(path))
    train(search, optimizer, 5)
    search.save(tmp_path / "s.ckpt", optimizer)
    train(search, optimizer, 9)
    path.write_text(path.read_text()[:-7])
    again, optimizer = searching(kind(path))
    again.load(tmp_path / "s.ckpt", optimizer)
    train(again, optimizer)
    assert path.read_text() == whole.read_text()
    if kind is callbacks.JSONL:
        assert [json.loads(line) for line in path.read_text().splitlines()] == expected.history
    else:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        assert [float(r["cost/macs"]) for r in rows] == [r["cost"]["macs"] for r in expected.history]
        assert [int(r["sizes/0"]) for r in rows] == [r["sizes"]["0"] for r in expected.history]
        assert [float(r["loss"]) for r in rows] == [r["loss"] for r in expected.history]

    train(*searching(kind(path)))  # a new search begins a new file
    assert path.read_text() == whole.read_text()


@pytest.mark.parametrize("kind", [callbacks.CSV, callbacks.JSONL])
def test_a_new_search_begins_its_file_anew(kind, tmp_path):
    """Whatever an earlier one, which made its entries more often, has left there."""
    often, optimizer = searching(kind(tmp_path / "a"))
    often.log_every = 1
    train(often, optimizer)
    train(*searching(kind(tmp_path / "a")))
    train(*searching(kind(tmp_path / "b")))
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_the_console_prints_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    search = train(*searching(callbacks.Console(RichConsole(file=out, width=200), lines=3)))
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 and lines[-1].startswith(f"step {STEPS} of {STEPS}: macs ")
    assert "target 50.0%" in lines[-1] and f"loss {search.history[-1]['loss']:.4g}" in lines[-1]


def test_the_console_draws_one_line_on_a_terminal():
    out = io.StringIO()
    train(*searching(callbacks.Console(RichConsole(file=out, width=200, force_terminal=True))))
    assert f"{STEPS}/{STEPS}" in out.getvalue() and "target 50.0%" in out.getvalue() and "loss" in out.getvalue()


def test_tensorboard_gets_every_number(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    search = train(*searching(callbacks.TensorBoard(tmp_path)))
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    for name in ("cost/macs", "target/macs", "loss", "sizes/0"):
        assert [e.step for e in events.Scalars(name)] == [r["step"] for r in search.history]
        assert [e.value for e in events.Scalars(name)] == pytest.approx(
            [callbacks.scalars(r)[name] for r in search.history]
        )


def test_a_missing_tensorboard_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "tensorboard.backend", raising=False)
    with pytest.raises(dmscale.DmscaleError, match=r"dmscale\[tensorboard\]"):
        callbacks.TensorBoard(tmp_path)
