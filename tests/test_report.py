"""Tables, pictures and times say what was measured."""

import io
import sys
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from dmscale.errors import DmscaleError
from dmscale.latency import compare_latency, measure_latency
from dmscale.optional import MissingPackageError
from dmscale.report import Row, comparison_markdown, comparison_table, plot_comparison, plot_history

ROWS = [
    Row("cnn", "dense", None, (99.0, 98.0, 98.5), 1_040_000, 42_000, 3.5),
    Row("cnn", "DMS", 0.25, (98.0, 98.0, 98.0), 259_000, 10_400, 1.5),
    Row("cnn", "uniform", 0.25, (97.0, 98.0, 96.0), 258_000, 10_500, 1.25),
]


def history(num_dimensions, steps=20):
    """A search that halves everything."""
    sizes = {f"block{i}": 16 for i in range(num_dimensions)}
    return [
        {
            "step": step,
            "cost": {"macs": 1 - step / 40, "params": 1 - step / 50},
            "target": {"macs": 0.5, "params": 0.6},
            "sizes": {name: size - size * step // 40 for name, size in sizes.items()},
        }
        for step in range(steps)
    ]


def shown(table):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_mean_and_spread_are_those_of_the_seeds():
    assert ROWS[0].mean == 98.5
    assert ROWS[0].spread == pytest.approx(0.5)
    assert Row("cnn", "dense", None, (99.0,), 1, 1, 1.0).spread is None


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_the_table_holds_every_number(form):
    if form == "table":
        text = shown(comparison_table(ROWS, "a title", "a caption"))
        assert "a title" in text
    else:
        text = comparison_markdown(ROWS, "a caption")
    lines = {
        name: next(line for line in text.splitlines() if "cnn" in line and name in line)
        for name in ("dense", "uniform")
    }
    assert all(word in lines["dense"] for word in ("98.50 ± 0.50", "1.04M", "42k", "3.50"))
    assert all(word in lines["uniform"] for word in ("25%", "97.00 ± 1.00", "-1.50", "258k", "24.8%", "10.5k", "1.25"))
    assert "a caption" in text


def test_the_best_method_of_a_budget_stands_out():
    text = comparison_markdown(ROWS)
    assert "**DMS**" in text and "**98.00 ± 0.00**" in text
    assert "**uniform**" not in text and "**dense**" not in text


def test_the_table_fits_eighty_columns():
    rows = [*ROWS, Row("vit", "uniform+depth", 0.25, (48.0, 98.0), 123_456_789, 123_456_789, 123.45)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(rows))
    assert "…" not in console.export_text()


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_comparison_is_drawn(tmp_path, seeds):
    rows = [Row(r.model, r.method, r.budget, r.accuracies[:seeds], r.macs, r.params, r.latency) for r in ROWS]
    other = [Row("vit", r.method, r.budget, r.accuracies, r.macs, r.params, r.latency) for r in rows]
    plot_comparison(rows + other, tmp_path / "comparison.png")
    assert is_picture(tmp_path / "comparison.png")


def test_a_comparison_of_unknown_methods_without_a_dense_row_is_drawn(tmp_path):
    rows = [Row("cnn", name, 0.5, (90.0,), 100.0, 10.0, 1.0) for name in "abcdef"]
    plot_comparison(rows, tmp_path / "comparison.png", "six strangers")
    assert is_picture(tmp_path / "comparison.png")


@pytest.mark.parametrize("num_dimensions", [1, 5, 200])
def test_a_search_is_drawn(tmp_path, num_dimensions):
    plot_history(history(num_dimensions), tmp_path / "search.png", "a search")
    assert is_picture(tmp_path / "search.png")


def test_a_search_has_one_panel_for_each_kind(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    panels = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: panels.extend(self.axes))
    kinds = {"block0": "depth", "block1": "width", "block2": "width"}
    plot_history(history(3), tmp_path / "search.png", kinds=kinds)
    assert [panel.get_ylabel() for panel in panels] == ["share of full cost", "widths", "depths"]
    assert [len(panel.get_lines()) for panel in panels[1:]] == [2, 1]


def test_an_empty_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no step"):
        plot_history([], tmp_path / "search.png")


def test_a_missing_matplotlib_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"dmscale\[plot\]"):
        plot_comparison(ROWS, tmp_path / "comparison.png")


def test_drawing_leaves_pyplot_alone(tmp_path):
    plot_history(history(2), tmp_path / "search.png")
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


class Sleeper(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.modes = []

    def forward(self, x, scale=1.0):
        self.modes.append((self.training, torch.is_grad_enabled()))
        time.sleep(self.seconds)
        return x * scale


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves: wall-clock times of a busy machine are nothing that a test can assert."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_latency_is_in_milliseconds(clock):
    assert measure_latency(Sleeper(0.01), torch.zeros(1), repeats=3, warmup=1) == pytest.approx(10)


def test_latencies_come_in_the_order_of_the_models(clock):
    times = compare_latency([Sleeper(0.012), Sleeper(0.002), Sleeper(0.006)], torch.zeros(1), 3, 1)
    assert times == pytest.approx([12, 2, 6])


def test_a_stall_of_the_machine_does_not_count(clock):
    stalls = iter([0.01, 0.01, 5.0, 0.01, 0.01])
    model = Sleeper(0.0)
    model.register_forward_pre_hook(lambda *_: time.sleep(next(stalls)))
    assert measure_latency(model, torch.zeros(1), repeats=5, warmup=0) == pytest.approx(10)


def test_latency_is_measured_in_evaluation_mode_and_restores_every_mode():
    model = nn.Sequential(Sleeper(0.0), Sleeper(0.0))
    model[1].eval()
    measure_latency(model, torch.zeros(1), repeats=4, warmup=2)
    assert model[0].modes == [(False, False)] * 6
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize("inputs", [torch.ones(1), (torch.ones(1), 2.0), {"x": torch.ones(1), "scale": 2.0}])
def test_latency_takes_inputs_of_every_form(inputs):
    assert measure_latency(Sleeper(0.0), inputs, repeats=1, warmup=0) > 0


def test_latency_refuses_to_measure_nothing():
    with pytest.raises(DmscaleError, match="repeats"):
        measure_latency(Sleeper(0.0), torch.zeros(1), repeats=0)
