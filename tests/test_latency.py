"""Latency is learnt on the device.  Here the device is one whose clock is computed from what runs, so that nothing depends on
the machine: `Clocked` adds up a cost for every operator that a model or a single call really dispatches."""

from __future__ import annotations

import functools
import json
import time

import numpy as np
import pytest
import torch
from nets import NETS, assert_same, fingerprint, non_trivial, outputs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dmscale
from dmscale import BudgetError, DmscaleError
from dmscale import latency as latencies
from dmscale.latency import Cache, Meter, rising
from dmscale.tracer import _VIEWS

aten = torch.ops.aten
CPU = torch.device("cpu")


class Clocked(TorchDispatchMode):
    """Milliseconds of what runs inside: `launch` an operator, `work` a multiply-accumulate, `write` a byte of the others."""

    def __init__(self, launch, work, write):
        super().__init__()
        self.launch, self.work, self.write, self.ms = launch, work, write, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out if isinstance(out, torch.Tensor) else next((o for o in out if isinstance(o, torch.Tensor)), None)
        if func in _VIEWS or first is None or func is aten.empty.memory_format:
            return out
        name = func._overloadpacket.__name__
        if name == "convolution":
            weight = args[1]
            macs = (args[0] if args[6] else first).numel() * weight[0].numel()
        elif name in ("mm", "bmm", "addmm", "baddbmm"):
            macs = first.numel() * args[-2].shape[-1]
        elif name.startswith("_scaled_dot_product"):
            macs = 2 * args[0].numel() * args[1].shape[-2]
        else:
            self.ms += self.launch + self.write * first.numel() * first.element_size()
            return out
        self.ms += self.launch + self.work * macs
        return out


class FakeMeter(Meter):
    """Measures on `Clocked`; whole models are slower by `busy`."""

    def __init__(self, launch=1e-3, work=1e-6, write=1e-6, busy=2.5):
        super().__init__(CPU)
        self.settings, self.busy = (launch, work, write), busy
        self.measured = []

    @property
    def name(self):
        return f"fake {self.settings}"

    def operators(self, instance, points):
        self.measured.append(instance.path)
        with torch.no_grad():
            return [self._clocked(latencies._stand_alone(instance, sizes, CPU)) for sizes in points]

    def pointwise(self, sizes):
        launch, _, write = self.settings
        return [launch + write * n for n in sizes]

    def models(self, models, example_inputs):
        self.measured.append("models")
        return [self.busy * self._clocked(lambda m=m: outputs(m.eval(), example_inputs)) for m in models]

    def _clocked(self, call):
        with Clocked(*self.settings) as clock:
            call()
        return clock.ms


def trace(name, **options):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    return dmscale.trace(non_trivial(model), inputs, **options)


@functools.cache
def space(name):
    over = trace(name)
    over.measure_latency(meter=FakeMeter(), cache=False)
    return over


SOME = ["conv_chain", "grouped", "conv_transpose", "residual_conv", "fused_attention", "gqa_native", "gqa_by_expand",
        "residual_stack", "dense_concat", "glu_by_chunk"]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_what_is_predicted_is_measured_on_the_exported_model(name):
    """On a device without noise or steps, of structures that were not measured before."""
    over, meter = space(name), FakeMeter()
    assert not over.latency.unmeasured
    # where one group is left, or one query for each key, PyTorch repeats nothing: operators less than in the full model
    allowed = 0.2 if name.startswith("gqa") else 0.1
    for seed in range(100, 106):
        predicted, measured = over.latency.compare(over, over.sample(seed=seed), meter)
        assert predicted == pytest.approx(measured, rel=allowed)
    predicted, measured = over.latency.calibration[0]
    assert predicted == pytest.approx(over.cost()["latency"]) and predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", SOME)
def test_latency_rises_with_every_size_and_is_one_function(name):
    over = space(name)
    metric = over.costs.metrics["latency"]
    rng = np.random.default_rng(0)
    full = np.append(over.vector(over.full()), 1)
    low = np.append(over.vector(dmscale.budget.smallest(over)), 1)
    rows = np.stack([rng.integers(np.minimum(low, full), full + 1) for _ in range(20)])
    at = metric.count(rows)
    np.testing.assert_allclose(at, metric.real(rows.astype(np.float64)))
    np.testing.assert_allclose(at, over.costs.many(rows[:, :-1], "latency"))
    for j in range(len(full) - 1):
        more = rows.copy()
        more[:, j] = np.minimum(more[:, j] + 1, full[j])
        assert (metric.count(more) >= at - 1e-12).all()
    for row, value in zip(rows[:5], at):
        soft = over.costs.soft(torch.tensor(row[:-1], dtype=torch.float64), "latency")
        assert float(soft) == pytest.approx(value)


def test_the_gradient_is_that_of_finite_differences():
    over = space("residual_conv")
    full = torch.tensor(over.vector(over.full()), dtype=torch.float64)
    values = full * torch.empty(len(full), dtype=torch.float64).uniform_(0.31, 0.97)
    at = values.clone().requires_grad_()
    over.costs.soft(at, "latency").backward()
    h = 1e-7
    numeric = torch.stack(
        [(over.costs.soft(values + s, "latency") - over.costs.soft(values - s, "latency")) / (2 * h)
         for s in h * torch.eye(len(values), dtype=torch.float64)]
    )  # fmt: skip
    torch.testing.assert_close(at.grad, numeric, rtol=1e-4, atol=1e-6)
    assert bool((at.grad > 0).all())


@pytest.mark.parametrize("shape", [(), (6,), (4, 4), (3, 2, 5)])
def test_tables_are_made_to_rise(shape):
    rng = np.random.default_rng(1)
    for _ in range(20):
        noisy = rng.uniform(1, 2, shape)
        table = rising(noisy)
        assert all((np.diff(table, axis=k) > 0).all() for k in range(len(shape)))
        assert table.max() <= noisy.max() * 1.002 and table.min() >= noisy.min()
        already = np.sort(noisy.reshape(-1)).reshape(shape)  # rising along every axis
        np.testing.assert_allclose(rising(already), already, rtol=5e-3)


@pytest.mark.parametrize("name", ["residual_conv", "fused_attention"])
@pytest.mark.parametrize("target", ["70% latency", "60% macs, 80% latency"])
def test_a_latency_budget_is_met(name, target):
    over = space(name)
    wanted = dmscale.budget.parse(target, over).targets
    for seed in range(2):
        cost = over.cost(over.fit(over.sample(seed=seed), target))
        used = max(cost[m] / t for m, t in wanted.items())
        assert 0.9 <= used <= 1


def test_a_latency_budget_says_milliseconds():
    over = space("residual_conv")
    full = over.cost()["latency"]
    assert dmscale.budget.parse(f"{0.8 * full:.6f} ms latency", over).targets["latency"] == pytest.approx(0.8 * full)
    assert dmscale.budget.parse(f"{800 * full:.3f} us latency", over).targets["latency"] == pytest.approx(
        0.8 * full, rel=1e-2
    )
    alone = dmscale.budget.parse(f"{0.8 * full:.6f} ms", over)  # nothing else is in milliseconds
    assert alone.targets["latency"] == pytest.approx(0.8 * full)
    assert str(dmscale.budget.parse({"latency": 0.5}, over)).endswith(" ms")
    with pytest.raises(BudgetError, match="latency is of the whole model"):
        dmscale.budget.parse("50% latency in 0", over)
    with pytest.raises(BudgetError, match="k is no unit of latency"):
        dmscale.budget.parse("3k latency", over)
    with pytest.raises(BudgetError, match="latency.*below what is reachable"):
        dmscale.budget.parse("0.1% latency", over)


def test_a_search_ends_on_its_latency():
    over = space("residual_conv")
    search = dmscale.Search(over, "70% latency", 8)
    optimizer = torch.optim.SGD(over.model.parameters(), 1e-3)
    search.attach(optimizer)
    while not search.done:
        search.model(over.example_inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert over.cost(search.structure)["latency"] <= 0.7 * over.cost()["latency"]


def test_a_budget_measures_when_it_has_to(monkeypatch):
    over = trace("conv_chain")
    calls = []

    def learn(space, **options):
        calls.append(options)
        return latencies_learn(space, **(options | {"meter": FakeMeter(), "cache": False}))

    latencies_learn = latencies.learn
    monkeypatch.setattr(latencies, "learn", learn)
    dmscale.budget.parse("50% macs", over)
    assert not calls and over.latency is None
    dmscale.budget.parse("90% latency", over)
    dmscale.budget.parse("80% latency", over)
    assert len(calls) == 1
    over.freeze([next(iter(over.dimensions))], "by the test")  # the tables stay good
    assert dmscale.budget.parse("90% latency", over) and len(calls) == 1


def test_measurements_are_kept_by_machine_and_call(tmp_path):
    over, path = trace("residual_conv"), tmp_path / "kept" / "latency.json"
    first, second, other = FakeMeter(), FakeMeter(), FakeMeter(launch=5e-3)
    a = over.measure_latency(meter=first, cache=path)
    b = over.measure_latency(meter=second, cache=path)
    assert first.measured and not second.measured
    assert a.coefficients == b.coefficients and a.calibration == b.calibration
    over.measure_latency(meter=other, cache=path)
    assert len(other.measured) == len(first.measured)
    assert set(json.loads(path.read_text())) == {first.name, other.name}
    assert first.measured.count("2.0") <= 1 and len(list(path.parent.iterdir())) == 1
    path.write_text('{"fake": [1')  # damaged: measured anew, and written
    again = FakeMeter()
    over.measure_latency(meter=again, cache=path)
    assert again.measured and json.loads(path.read_text())


def test_where_measurements_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DMSCALE_CACHE", str(tmp_path))
    assert Cache(None, "m").path == tmp_path / "latency.json"
    assert Cache(tmp_path / "own.json", "m").path == tmp_path / "own.json"
    assert Cache(False, "m").path is None
    monkeypatch.setenv("DMSCALE_CACHE", "off")
    assert Cache(None, "m").path is None
    monkeypatch.delenv("DMSCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache(None, "m").path == tmp_path / "dmscale" / "latency.json"
    full = Cache(tmp_path / "latency.json" / "below a file.json", "m")
    (tmp_path / "latency.json").write_text("{}")
    full.known["x"] = 1.0
    full.save()  # cannot be written: no reason to stop


@pytest.mark.parametrize(
    "settings, by",
    [(dict(launch=1.0), "launches"), (dict(launch=0.0, write=1e-9), None), (dict(launch=0.0, work=1e-6), None)],
)
def test_what_bounds_a_model_is_said(settings, by):
    over = trace("residual_conv")
    bound = over.measure_latency(meter=FakeMeter(busy=1.0, **settings), cache=False).explain(over)
    assert bound.by == by
    assert bound.full == pytest.approx(over.cost()["latency"])
    assert bound.operators + bound.memory + bound.launches == pytest.approx(bound.full)
    assert ("narrowing saves at most" in str(bound)) == (by is not None)
    with pytest.raises(BudgetError, match="below what is reachable") as caught:
        dmscale.budget.parse("0.01% latency", over)
    assert f"Latency is {bound}" in str(caught.value)


def test_an_operator_that_does_not_run_alone_is_estimated():
    class Shy(FakeMeter):
        def operators(self, instance, points):
            return None if instance.path == "3" else super().operators(instance, points)

    over = trace("conv_chain")
    found = over.measure_latency(meter=Shy(), cache=False)
    assert found.unmeasured == ["convolution in 3"]
    predicted, measured = found.compare(over, over.sample(seed=5), FakeMeter())
    assert predicted == pytest.approx(measured, rel=0.3)


def test_real_measurements_of_a_real_model_leave_it_alone(tmp_path):
    """Times are asserted by nobody; that all of it runs, and that nothing of it stays on the model, is."""
    over = trace("fused_attention")
    before, threads = fingerprint(over.model), torch.get_num_threads()
    found = over.measure_latency(threads=1, calibration=2, repeats=1, cache=tmp_path / "l.json", progress=False)
    assert_same(before, fingerprint(over.model))
    assert torch.get_num_threads() == threads
    assert found.unmeasured == [] and all((t.ms > 0).all() for t in found.tables)
    assert over.cost()["latency"] > 0 and min(found.coefficients) >= 0
    assert "1 threads" in found.machine
    own = Meter(CPU, repeats=1, clock=time.process_time)
    assert "process_time" in own.name


def test_what_cannot_be_measured_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    over = dmscale.trace(model, torch.zeros(2, 8, device="meta"))
    with pytest.raises(DmscaleError, match="meta device: give it weights"):
        dmscale.budget.parse("50% latency", over)
    with pytest.raises(DmscaleError, match="runtime='tensorrt' is none of torch, onnx"):
        space("conv_chain").measure_latency(runtime="tensorrt")
    with pytest.raises(DmscaleError, match="calibration=0"):
        space("conv_chain").measure_latency(calibration=0)


def test_what_slows_a_reference_too_is_divided_out():
    """On a machine that others make up to three times slower, for a while."""
    clock, rounds = [0.0], [0]

    def work(cost):
        clock[0] += cost * (3.0 if 40 < rounds[0] < 400 else 1.0)

    class Beside(latencies.Reference):
        def _seconds(self):
            start = self.clock()
            work(1e-4)
            return self.clock() - start

    class Model(torch.nn.Module):
        def __init__(self, cost):
            super().__init__()
            self.cost = cost

        def forward(self, x):
            rounds[0] += 1
            work(self.cost)

    models = [Model(2e-3), Model(5e-3)]
    found = latencies.compare_latency(
        models, torch.zeros(1), repeats=100, clock=lambda: clock[0], beside=Beside(lambda: clock[0])
    )
    assert found == pytest.approx([2.0, 5.0])
    rounds[0] = 0
    assert latencies.compare_latency(models, torch.zeros(1), 100, clock=lambda: clock[0]) == pytest.approx([6.0, 15.0])


def test_a_steady_meter_measures_and_is_another_machine_to_the_cache():
    meter = Meter(CPU, repeats=2, steady=True)
    assert meter.name != Meter(CPU).name and all(t > 0 for t in meter.pointwise([1024, 4096]))
