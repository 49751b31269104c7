"""How long a model takes: measured, and predicted for every structure of a search space.

Three things make wall-clock times of small networks lie, and each has its remedy here.  The first calls pay
for memory and kernels that later ones reuse: they are not counted.  Other processes slow some calls at
random: the median over many calls ignores them.  And the machine drifts (clock speed, temperature, a
neighbour's job), which would favour whichever model was measured at the better moment: models to be compared
take turns, call by call, in an order that rotates.

Latency is no polynomial of the sizes: kernels have steps, and small ones cost what their launch costs.  So it is learnt on the
user's device, in two parts.  Every contraction of the trace (convolutions, matrix products, attention as one fused call) runs
alone, with its own geometry, dtype and layout, at a few sizes of its free axes; between these sizes the table is interpolated
linearly in each size.  The rest of the network is fitted: with

    latency = a * sum of the tables + b * bytes that other operators write + c * number of other operators + d

a pointwise operator measured at two sizes says what b and c are about.  Whole exported structures then decide, by least
squares of the relative error over non-negative coefficients: one common factor is free (a busy machine, a faster runtime), and
departures from it cost a little, because few and noisy measurements would else explain themselves by chance.  Tables are made to
rise with every size, so that a budget can be met by taking elements away.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import attachment, axes, cost
from .axes import Axis, Dim
from .errors import DmscaleError
from .optional import require
from .polynomial import Poly
from .progress import progress_bar
from .running import arguments, evaluating, is_empty, tensors_in
from .sizes import extent_in
from .tracer import Instance, Operand

if TYPE_CHECKING:
    from .space import SearchSpace
    from .structure import Structure


def measure_latency(model: nn.Module, example_inputs: Any, repeats: int = 50, warmup: int = 5) -> float:
    """The median time in ms of one forward pass of `model`, in evaluation mode and without gradients.

    `example_inputs` is a tensor, a tuple, or a dict of keyword arguments, on the model's device; its batch is
    the batch that is timed.  The model's own training mode is restored.

    Raises:
        DmscaleError: `repeats` is not positive, or `warmup` is negative.

    >>> measure_latency(nn.Linear(4, 4), torch.zeros(1, 4)) > 0
    True
    """
    return compare_latency([model], example_inputs, repeats, warmup)[0]


@torch.no_grad()
def compare_latency(
    models: Sequence[nn.Module],
    example_inputs: Any,
    repeats: int = 50,
    warmup: int = 5,
    clock: Callable[[], float] | None = None,
    beside: Reference | None = None,
) -> list[float]:
    """The median times in ms of several models on the same inputs, measured in turns.

    As `measure_latency`, which see; each of the `repeats` rounds calls every model once.  `clock` gives seconds, by default
    those of the wall; `beside` corrects for a busy machine.
    """
    clock = clock or time.perf_counter
    if repeats < 1 or warmup < 0:
        raise DmscaleError(f"repeats must be at least 1 and warmup 0 or more, got {repeats} and {warmup}")
    args, kwargs = arguments(example_inputs)
    wait = _finish_queued_work((args, kwargs))
    times: list[list[float]] = [[] for _ in models]
    with evaluating(*models):
        for turn in range(warmup + repeats):
            for i in range(len(models)):
                k = (i + turn) % len(models)  # nobody always runs after the same neighbour's cache
                wait()
                start = clock()
                models[k](*args, **kwargs)
                wait()
                took = 1000 * (clock() - start)
                times[k].append(took / (beside.slowdown() if beside else 1))
    return [_settled(of_model[warmup:], beside) for of_model in times]


def _settled(times: Sequence[float], beside: Reference | None) -> float:
    """The time of several measurements that counts: the median; of corrected ones the lower quartile."""
    return float(np.quantile(times, 0.25)) if beside else statistics.median(times)


class Reference:
    """A fixed piece of work that is timed beside every measurement, so that what slows both can be divided out.

    Other processes slow a thread down even in its own processor time: they share caches, memory and the core's other half.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self._a, self._x = torch.randn(160, 160), torch.randn(2**17)
        self._least = min(self._seconds() for _ in range(200))

    def slowdown(self) -> float:
        """How much longer it takes now than it took at best."""
        took = self._seconds()
        self._least = min(self._least, took)
        return took / self._least

    def _seconds(self) -> float:
        start = self.clock()
        torch.mm(self._a, self._a)
        torch.relu(self._x)
        return self.clock() - start


def _finish_queued_work(inputs: Any) -> Callable[[], None]:
    """What to call before reading the clock: on an accelerator a call returns before its work is done."""
    queued = {tensor.device for tensor in tensors_in(inputs) if tensor.device.type != "cpu"}

    def wait() -> None:
        for device in queued:
            torch.accelerator.synchronize(device)

    return wait


# -- measuring --------------------------------------------------------------------------------------------------------

Sizes = Mapping[Axis, int]
"""Sizes of the free factors of an instance's dimensions."""

_POINTS = {0: 1, 1: 6, 2: 4, 3: 3}
"""Number of free sizes of an operator -> how many values of each are tried; two of each where there are more."""

_POINTWISE_BYTES = (1024, 2**20)

_DEPARTURE = 0.03
"""A coefficient that departs by all of the common factor costs as much as so large a relative error of every model."""

RUNTIMES = ("torch", "onnx")


class Meter:
    """Measures on a device: single operators, and whole models as they are deployed.

    Args:
        device: where the tensors are.
        runtime: what runs whole models: "torch", or "onnx" for ONNX Runtime on the CPU (operators are timed in torch then,
            and the fit of the rest maps one to the other).
        repeats: measurements of which the median is taken.
        clock: gives seconds; the wall's by default.  On a crowded machine `time.process_time` counts only what this process
            gets, which is its latency on an idle one if it runs a single thread on the CPU.
        steady: whether a fixed piece of work is timed beside each measurement, and its slowdown divided out; for a busy CPU.
    """

    def __init__(
        self,
        device: torch.device,
        runtime: str = "torch",
        repeats: int = 7,
        clock: Callable[[], float] = time.perf_counter,
        steady: bool = False,
    ):
        if runtime not in RUNTIMES:
            raise DmscaleError(f"runtime={runtime!r} is none of {', '.join(RUNTIMES)}")
        if runtime == "onnx" and device.type != "cpu":
            raise DmscaleError(f"runtime='onnx' measures on the CPU, and the model is on {device}")
        self.device, self.runtime, self.repeats, self.clock = device, runtime, repeats, clock
        self.beside = Reference(clock) if steady else None

    @property
    def name(self) -> str:
        """What measurements depend on beside the operator: device, threads, versions."""
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor(self.device)
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        clock = "" if self.clock is time.perf_counter else f", {getattr(self.clock, '__name__', 'own clock')}"
        return f"{where}{threads}, torch {torch.__version__}{clock}{', steady' if self.beside else ''}"

    @torch.no_grad()
    def operators(self, instance: Instance, points: Sequence[Sizes]) -> list[float] | None:
        """Milliseconds of one call of `instance` at each of several sizes, in turns; None if it cannot run alone."""
        try:
            calls = [_stand_alone(instance, sizes, self.device) for sizes in points]
            return self._in_turns(calls)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None

    def _in_turns(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        wait = _finish_queued_work([torch.empty(0, device=self.device)])
        bursts = [_burst(call, wait, self.clock) for call in calls]
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(self.repeats):
            for i in range(len(calls)):
                k = (i + turn) % len(calls)
                wait()
                start = self.clock()
                for _ in range(bursts[k]):
                    calls[k]()
                wait()
                took = 1000 * (self.clock() - start) / bursts[k]
                times[k].append(took / (self.beside.slowdown() if self.beside else 1))
        return [_settled(t, self.beside) for t in times]

    @torch.no_grad()
    def pointwise(self, sizes: Sequence[int]) -> list[float]:
        """Milliseconds of an activation function that writes so many bytes, in turns."""
        tensors = [torch.randn(n // 4, device=self.device) for n in sizes]
        return self._in_turns([lambda t=t: torch.relu(t) for t in tensors])  # type: ignore[misc]

    def models(self, models: Sequence[nn.Module], example_inputs: Any) -> list[float]:
        """Median milliseconds of one forward of each model, in turns."""
        if self.runtime == "onnx":
            with tempfile.TemporaryDirectory() as folder:
                sessions = [_OnnxSession(m, example_inputs, Path(folder) / f"{i}.onnx") for i, m in enumerate(models)]
                return compare_latency(sessions, example_inputs, 2 * self.repeats, 3, self.clock, self.beside)
        return compare_latency(models, example_inputs, 2 * self.repeats, 3, self.clock, self.beside)


class _OnnxSession(nn.Module):
    """A model exported to ONNX, called like the model."""

    def __init__(self, model: nn.Module, example_inputs: Any, path: Path):
        super().__init__()
        require("onnxscript", "onnx", "latency under ONNX Runtime")
        runtime = require("onnxruntime", "onnx", "latency under ONNX Runtime")
        args, kwargs = arguments(example_inputs)
        with evaluating(model):
            torch.onnx.export(model, args, path, kwargs=kwargs, dynamo=True, verbose=False)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [i.name for i in self._session.get_inputs()]
        self._feed = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors_in((args, kwargs)))}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.run(None, self._feed)


def _burst(
    call: Callable[[], Any], wait: Callable[[], None], clock: Callable[[], float], at_least: float = 3e-4
) -> int:
    """How many calls last `at_least` seconds; warms up."""
    call()
    wait()
    start = clock()
    call()
    wait()
    return max(1, min(64, int(at_least / max(clock() - start, 1e-9))))


def _processor(device: torch.device) -> str:
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _shape(dims: Sequence[Dim], sizes: Sizes) -> list[int]:
    return [int(np.prod([sizes.get(a, a.size) for a in axes.factors(dim)], dtype=np.int64)) for dim in dims]


def _stand_alone(instance: Instance, sizes: Sizes, device: torch.device) -> Callable[[], Any]:
    """A call of `instance` on random tensors of other sizes."""
    args, kwargs = _filled(instance.args, sizes, device), _filled(instance.kwargs, sizes, device)
    if instance.function is torch.ops.aten.convolution.default:
        x, weight = args[0], args[1]
        channels = _shape(instance.dims, sizes)[1] if args[6] else x.shape[1]  # transposed: (in, out / groups, ...)
        args = (*args[:8], channels // weight.shape[1])
    return lambda: instance.function(*args, **kwargs)


def _filled(tree: Any, sizes: Sizes, device: torch.device) -> Any:
    if isinstance(tree, Operand):
        shape = _shape(tree.dims, sizes)
        t = torch.empty([shape[i] for i in tree.order], dtype=tree.dtype, device=device)
        t = t.normal_() if tree.dtype.is_floating_point or tree.dtype.is_complex else t.fill_(1)
        return t.permute([tree.order.index(i) for i in range(len(shape))])
    if isinstance(tree, (tuple, list)):
        return type(tree)(_filled(x, sizes, device) for x in tree)
    if isinstance(tree, dict):
        return {k: _filled(x, sizes, device) for k, x in tree.items()}
    return device if isinstance(tree, torch.device) else tree


def _spelt(tree: Any, sizes: Sizes) -> str:
    """A call's arguments as text: the key of a measurement."""
    if isinstance(tree, Operand):
        return f"{str(tree.dtype)[6:]}{_shape(tree.dims, sizes)}{''.join(map(str, tree.order))}".replace(" ", "")
    if isinstance(tree, (tuple, list)):
        return "(" + ",".join(_spelt(x, sizes) for x in tree) + ")"
    if isinstance(tree, dict):
        return "".join(f",{k}={_spelt(x, sizes)}" for k, x in tree.items())
    return str(tree)


def _key(instance: Instance, sizes: Sizes) -> str:
    return f"{instance.operator}{_spelt(instance.args, sizes)}{_spelt(instance.kwargs, sizes)}"


class Cache:
    """Measurements in a JSON file, by machine and call; a damaged file is measured anew.

    Args:
        path: the file; by default `latency.json` in the folder that the environment variable DMSCALE_CACHE names, else in
            dmscale's folder of the user's cache (XDG_CACHE_HOME, ~/.cache).  False, or DMSCALE_CACHE=off, keeps nothing.
        machine: what the measurements belong to.
    """

    def __init__(self, path: str | os.PathLike[str] | bool | None, machine: str):
        folder = os.environ.get("DMSCALE_CACHE", "")
        if path is None or path is True:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmscale"
            path = False if folder.lower() == "off" else (Path(folder) if folder else base) / "latency.json"
        self.path = None if isinstance(path, bool) else Path(path)
        self.machine = machine
        self.known: dict[str, float] = self._read().get(machine, {})

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            found = json.loads(self.path.read_text()) if self.path else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and all(isinstance(v, dict) for v in found.values()) else {}

    def save(self) -> None:
        """Add what is known to the file, in one piece; a folder that cannot be written is no reason to stop."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            everything = self._read()
            everything[self.machine] = everything.get(self.machine, {}) | self.known
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(everything, file)
            os.replace(file.name, self.path)
        except OSError:
            pass


# -- the model of latency ---------------------------------------------------------------------------------------------


@dataclass
class Table:
    """One operator instance at a grid of its free sizes: `ms` has one dimension for each of `factors`.

    factors: the axes (atoms or sums) whose sizes vary.
    grid: their sizes, ascending, one array each.
    """

    instance: Instance
    factors: tuple[Axis, ...]
    grid: tuple[np.ndarray, ...]
    ms: np.ndarray
    measured: bool = True


@dataclass
class Latency:
    """What `SearchSpace.measure_latency` learnt: tables of the operators, and the coefficients of everything else.

    coefficients: of the tables' sum, of the bytes and the number of other operators (ms each), and the constant.
    calibration: (predicted, measured) ms of the whole models that the coefficients were fitted to, the full one first.
    """

    machine: str
    runtime: str
    tables: list[Table]
    coefficients: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    calibration: list[tuple[float, float]] = field(default_factory=list)

    @property
    def unmeasured(self) -> list[str]:
        """Operators that do not run alone: taken to be as fast for each MAC as the others are on average."""
        return [f"{t.instance.operator} in {t.instance.path or 'the model'}" for t in self.tables if not t.measured]

    def compare(self, space: SearchSpace, structure: Structure, meter: Meter | None = None) -> tuple[float, float]:
        """(predicted, measured) ms of a structure, exported and run now."""
        device = next((p.device for p in space.model.parameters()), torch.device("cpu"))
        meter = meter or Meter(device, self.runtime)
        return space.cost(structure)["latency"], meter.models([space.build(structure)], space.example_inputs)[0]

    def explain(self, space: SearchSpace) -> Bound:
        """Where the time of the full model goes, and what narrowing it can save."""
        metric = self.bind(space)
        narrow = space.structure({n: d.lowest for n, d in space.dimensions.items() if d.kind != "depth"})
        rows = np.stack([np.append(space.vector(s), 1) for s in (space.full(), narrow)]).astype(np.float64)
        with torch.no_grad():
            parts = metric.parts(torch.from_numpy(rows)).numpy() * np.array(self.coefficients)
        full, least = parts
        return Bound(
            float(full.sum()), float(full[0]), float(full[1]), float(full[2:].sum()), float(least.sum()),
            float(least[1] / max(least.sum(), 1e-12)),
        )  # fmt: skip

    def bind(self, space: SearchSpace) -> LatencyMetric:
        """The metric over the cost variables of `space`."""
        return LatencyMetric(self, space)


@dataclass(frozen=True)
class Bound:
    """Predicted ms of the full model, of which `operators` in contractions, `memory` in bytes that others write, `launches`
    however narrow it is; and with all widths at their minimum (`narrowest`), where memory takes `memory_share`."""

    full: float
    operators: float
    memory: float
    launches: float
    narrowest: float
    memory_share: float

    @property
    def by(self) -> str | None:
        """ "launches" or "memory" where narrowing cannot save half of the time, else None."""
        if self.narrowest <= 0.5 * self.full:
            return None
        return "memory" if self.memory_share > 0.5 else "launches"

    def __str__(self) -> str:
        text = (
            f"{self.full:.3g} ms: contractions {self.operators / self.full:.0%}, other operators' memory "
            f"{self.memory / self.full:.0%}, fixed {self.launches / self.full:.0%}; with all widths at their minimum "
            f"{self.narrowest:.3g} ms ({self.narrowest / self.full:.0%})"
        )
        if self.by is None:
            return text
        return (
            f"{text}. Bound by {self.by}: narrowing saves at most {1 - self.narrowest / self.full:.0%}; take blocks out, "
            "fuse operators (torch.compile, ONNX Runtime) or use a larger batch"
        )


class LatencyMetric:
    """Latency in ms over the cost variables of a space: see `cost.Metric`.

    Piecewise linear in each operator's sizes, so differentiable almost everywhere; it rises with every variable.
    """

    def __init__(self, latency: Latency, space: SearchSpace):
        self.latency = latency
        variables = {v: i for i, v in enumerate(space.variables)}
        inside, free = space.block_of_operator(), space.free_axes
        groups: dict[tuple[int, ...], list[Table]] = {}
        for table in latency.tables:
            groups.setdefault(table.ms.shape, []).append(table)
        self._groups = [_Group(tables, variables, free, inside) for tables in groups.values()]
        fused = [(t.instance.start, t.instance.end) for t in latency.tables]
        self._rest = [cost.Monomials(p, variables) for p in _other_operators(space, fused)]
        self._tensors: dict[tuple[torch.device, torch.dtype], LatencyMetric] = {}

    def parts(self, values: Tensor) -> Tensor:
        """What the coefficients are of, at vectors (S, V + 1): tables' sum, other bytes, other operators, one, (S, 4)."""
        tables = values.new_zeros(len(values))
        for group in self._groups:
            tables = tables + group.sum(values)
        rest = [torch.stack([m.soft(row) for row in values]) if values.requires_grad else _real(m, values)
                for m in self._rest]  # fmt: skip
        return torch.stack([tables, *rest, torch.ones_like(tables)], 1)

    def at(self, values: Tensor) -> Tensor:
        """Milliseconds at vectors (S, V + 1), (S,)."""
        return self.parts(values) @ values.new_tensor(self.latency.coefficients)

    def real(self, values: np.ndarray) -> np.ndarray:
        """Milliseconds at real sizes (S, V + 1), (S,)."""
        with torch.no_grad():
            return self.at(torch.from_numpy(values.astype(np.float64))).numpy()

    count = real

    def soft(self, values: Tensor) -> Tensor:
        """Milliseconds at one vector of real sizes (V + 1,): a differentiable scalar."""
        return self.at(values[None])[0]


def _real(m: cost.Monomials, values: Tensor) -> Tensor:
    return torch.from_numpy(m.real(values.detach().cpu().double().numpy())).to(values)


class _Group:
    """Tables of one grid shape, interpolated together."""

    def __init__(self, tables: Sequence[Table], variables: Mapping[Hashable, int], free: set[Axis], inside: Any):
        self.shape = tables[0].ms.shape
        one = len(variables)
        self.grid = [torch.tensor(np.stack(g)) for g in zip(*(t.grid for t in tables))]  # of each factor (I, G)
        self.ms = torch.tensor(np.stack([t.ms.reshape(-1) for t in tables]))  # (I, G ** K)
        gates = [inside(t.instance.end) for t in tables]
        most = max(map(len, gates), default=0)
        filled = [[*(variables[g] for g in of_one), *[one] * (most - len(of_one))] for of_one in gates]
        self.gates = torch.tensor(filled, dtype=torch.long).reshape(len(tables), most)
        polys = [extent_in((a,), free) for t in tables for a in t.factors]
        width = max((len(m) for p in polys for m in p.terms), default=0)
        rows = [
            (i, c, [*(variables[v] for v in m), *[one] * (width - len(m))])
            for i, p in enumerate(polys) for m, c in p.terms.items()
        ]  # fmt: skip
        self.owner = torch.tensor([i for i, _, _ in rows], dtype=torch.long)
        self.coefficient = torch.tensor([float(c) for _, c, _ in rows], dtype=torch.float64)
        self.index = torch.tensor([r for _, _, r in rows], dtype=torch.long).reshape(len(rows), width)
        self.factors = len(polys)

    def sum(self, values: Tensor) -> Tensor:
        """Gated milliseconds of all tables at vectors (S, V + 1), (S,)."""
        ms, gate = self.ms.to(values), values[:, self.gates.to(values.device)].prod(2)
        at = torch.zeros(len(values), len(ms), dtype=torch.long, device=values.device)
        corners = [(at, torch.ones_like(gate))]
        for k, (low, share) in enumerate(self._cells(values)):
            after = int(np.prod(self.shape[k + 1 :], dtype=np.int64))
            corners = [
                (at + (low + up) * after, weight * (share if up else 1 - share))
                for at, weight in corners for up in (0, 1)
            ]  # fmt: skip
        rows = torch.arange(len(ms), device=values.device)
        found = sum(weight * ms[rows, at] for at, weight in corners)
        return (found * gate).sum(1)

    def _cells(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each factor the cell of the grid that its size lies in, and where in it, (S, I) each."""
        if not self.shape:
            return
        terms = self.coefficient.to(values).expand(len(values), -1)
        for column in self.index.to(values.device).T:
            terms = terms * values[:, column]
        sizes = values.new_zeros(len(values), self.factors)
        sizes = sizes.index_add(1, self.owner.to(values.device), terms).reshape(len(values), -1, len(self.grid))
        for k, grid in enumerate(self.grid):
            points, x = grid.to(values), sizes[:, :, k]
            inner = (x.detach()[:, :, None] >= points[:, 1:-1]).sum(2)
            start = points.expand(len(x), -1, -1).gather(2, inner[:, :, None])[:, :, 0]
            end = points.expand(len(x), -1, -1).gather(2, inner[:, :, None] + 1)[:, :, 0]
            yield inner, ((x - start) / (end - start)).clamp(min=0)


def _other_operators(space: SearchSpace, fused: Sequence[tuple[int, int]]) -> tuple[Poly, Poly]:
    """Bytes that the operators outside of the tables write, and their number."""
    covered = {op for start, end in fused for op in range(start + 1, end + 1)}
    inside, free = space.block_of_operator(), space.free_axes
    written, number = [], []
    for op, element, dims, _ in space.trace.record.activations:
        if op not in covered:
            gate = [Poly.variable(g) for g in inside(op)]
            written.append(cost.product([*(extent_in(d, free) for d in dims), *gate]) * element)
            number.append(cost.product(gate))
    return cost.total(written), cost.total(number)


# -- learning it ------------------------------------------------------------------------------------------------------


def learn(
    space: SearchSpace, *, runtime: str, threads: int | None, calibration: int, repeats: int, cache: Any, progress: bool,
    meter: Meter | None,
) -> Latency:  # fmt: skip
    """Measure operators and a few whole models of `space`: what `SearchSpace.measure_latency` does, which see."""
    if is_empty(space.model):
        raise DmscaleError(
            "latency is measured, and the model is on the meta device: give it weights with model.to_empty(device='cpu') "
            "before the trace"
        )
    if calibration < 1:
        raise DmscaleError(f"calibration={calibration}: at least the full model has to be measured")
    device = next((p.device for p in space.model.parameters()), torch.device("cpu"))
    meter = meter or Meter(device, runtime, repeats)
    with _threads(threads), progress_bar(progress) as bar:
        store = Cache(cache, meter.name)
        instances = space.trace.record.instances
        shown = bar.add_task("latency of operators", total=len(instances))
        tables = []
        for instance in instances:
            tables.append(_table(space, instance, meter, store))
            bar.advance(shown)
        _estimate_missing(space, tables)
        found = Latency(meter.name, meter.runtime, tables)
        shown = bar.add_task("latency of models", total=1)
        structures = _calibration_structures(space, calibration)
        alone = _pointwise(meter, store)
        measured = _measured_models(space, structures, found, meter, store)
        bar.advance(shown)
        store.save()
    _fit_coefficients(space, found, structures, measured, alone)
    return found


def share(space: SearchSpace) -> None:
    """Let what the first process has measured hold for all that train together: their budgets would else differ.

    Every process must call it; the first one measures if it has not yet.

    Raises:
        DmscaleError: on every process, if the first cannot measure, or if a process has another model.
    """
    if not attachment.several_processes():
        return
    told: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            found = space.latency or space.measure_latency()
            told = [(found.machine, found.runtime, [(t.ms, t.measured) for t in found.tables], found.coefficients,
                     found.calibration)]  # fmt: skip
        except DmscaleError as error:
            told = [error]
    torch.distributed.broadcast_object_list(told, src=0)
    if isinstance(told[0], DmscaleError):
        raise told[0]
    machine, runtime, measured, coefficients, calibration = told[0]
    empty = [_empty_table(space, instance) for instance in space.trace.record.instances]
    if [t.ms.shape for t in empty] != [ms.shape for ms, _ in measured]:
        raise DmscaleError(
            "the processes have traced different models: the latency that the first one measured fits no other"
        )
    tables = [replace(t, ms=ms, measured=done) for t, (ms, done) in zip(empty, measured)]
    space.use_latency(Latency(machine, runtime, tables, coefficients, calibration))


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _table(space: SearchSpace, instance: Instance, meter: Meter, store: Cache) -> Table:
    """Measure one operator instance, or take from the cache what is known."""
    empty = _empty_table(space, instance)
    combinations = [dict(zip(empty.factors, (int(n) for n in sizes))) for sizes in itertools.product(*empty.grid)]
    keys = [_key(instance, sizes) for sizes in combinations]
    missing = [(k, sizes) for k, sizes in zip(keys, combinations) if k not in store.known]
    if missing:
        times = meter.operators(instance, [sizes for _, sizes in missing])
        if times is None:
            return empty
        store.known.update({k: t for (k, _), t in zip(missing, times)})
    ms = np.array([store.known[k] for k in keys]).reshape(empty.ms.shape)
    return replace(empty, ms=rising(ms), measured=True)


def _empty_table(space: SearchSpace, instance: Instance) -> Table:
    """The sizes at which an operator instance is to be measured."""
    factors = _free_factors(space, instance)
    points = _POINTS.get(len(factors), 2)
    grid = tuple(_spaced(*_range(space, a), points) for a in factors)
    return Table(instance, factors, grid, np.zeros([len(g) for g in grid]), measured=False)


def _free_factors(space: SearchSpace, instance: Instance) -> tuple[Axis, ...]:
    free = space.free_axes
    found: dict[Axis, None] = {}
    for operand in _operands([*instance.args, *instance.kwargs.values()]):
        for dim in operand.dims:
            for a in axes.factors(dim):
                if any(leaf in free for leaf in axes.atoms((a,))):
                    found[a] = None
    return tuple(found)


def _operands(tree: Any) -> Iterator[Operand]:
    for x in tree:
        if isinstance(x, Operand):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _operands(x)


def _range(space: SearchSpace, a: Axis) -> tuple[int, int]:
    """The smallest and the full size of a factor."""
    lowest: dict[Hashable, int] = {x: d.count(x.size, d.lowest) for d in space.dimensions.values() for x in d.axes}
    return int(extent_in((a,), space.free_axes).evaluate(lowest)), a.size


def _spaced(low: int, high: int, points: int) -> np.ndarray:
    """Sizes from `low` to `high`, evenly spaced; at least two, so that there is something to interpolate between."""
    found = np.unique(np.linspace(low, high, points).round().astype(np.int64))
    return found if len(found) > 1 else np.array([low, low + 1])


def rising(ms: np.ndarray, slope: float = 1e-3) -> np.ndarray:
    """Measurements on a grid made strictly rising along every axis: the middle between the least rising table above and
    the greatest one below, and a slope of that share of the largest."""
    above, below = ms, ms
    for k in range(ms.ndim):
        above = np.maximum.accumulate(above, axis=k)
        below = np.flip(np.minimum.accumulate(np.flip(below, k), axis=k), k)
    steps = sum(np.indices(ms.shape)) if ms.ndim else 0
    return (above + below) / 2 + slope * float(ms.max()) * steps / max(sum(ms.shape) - ms.ndim, 1)


def _macs(space: SearchSpace, instance: Instance) -> float:
    inside = [t for t in space.trace.record.terms if instance.start < t.op <= instance.end]
    return float(sum(np.prod([axes.size(d) for d in t.dims], dtype=np.float64) for t in inside))


def _estimate_missing(space: SearchSpace, tables: Sequence[Table]) -> None:
    """Operators that do not run alone are given the mean speed of the others, in proportion to their sizes."""
    done = [t for t in tables if t.measured]
    macs = sum(_macs(space, t.instance) for t in done)
    rate = sum(float(t.ms.flat[-1]) for t in done) / macs if macs else 1e-8  # ms a MAC
    for t in tables:
        if not t.measured:
            share = np.ones(())
            for g in t.grid:
                share = share[..., None] * (g / g[-1])
            t.ms = rising(rate * _macs(space, t.instance) * share)


def _calibration_structures(space: SearchSpace, count: int) -> list[Structure]:
    """The full model, uniform ones, random ones in turn: different in width, depth and balance."""
    out = [space.full()]
    for i in range(count - 1):
        share = (0.4, 0.75, 0.2, 0.55)[i // 2 % 4]
        out.append(space.sample(seed=i) if i % 2 else space.uniform(share))
    return out


def _measured_models(
    space: SearchSpace, structures: Sequence[Structure], found: Latency, meter: Meter, store: Cache
) -> list[float]:
    """Milliseconds of exported structures, measured in turns unless all are known."""
    plan = ";".join(_key(t.instance, {}) for t in found.tables) + str(space.costs.metrics["activations"].real(
        np.append(space.vector(space.full()), 1)[None].astype(np.float64)))  # fmt: skip
    keys = [
        f"{meter.runtime} {hashlib.sha256((plan + str(space.vector(s).tolist())).encode()).hexdigest()[:24]}"
        for s in structures
    ]
    if any(k not in store.known for k in keys):
        times = meter.models([space.build(s) for s in structures], space.example_inputs)
        store.known.update(zip(keys, times))
    return [store.known[k] for k in keys]


def _pointwise(meter: Meter, store: Cache) -> tuple[float, float]:
    """ms for each byte that a pointwise operator writes, and for each such operator however small."""
    small, large = _POINTWISE_BYTES
    keys = [f"pointwise {n}" for n in _POINTWISE_BYTES]
    if any(k not in store.known for k in keys):
        store.known.update(zip(keys, meter.pointwise(_POINTWISE_BYTES)))
    a, b = (store.known[k] for k in keys)
    return max((b - a) / (large - small), 0.0), a


def _fit_coefficients(
    space: SearchSpace, found: Latency, structures: Sequence[Structure], measured: Sequence[float],
    alone: tuple[float, float],
) -> None:  # fmt: skip
    """Least squares of the relative error: a common factor of what was measured alone, and departures from it."""
    metric = found.bind(space)
    vectors = np.stack([np.append(space.vector(s), 1) for s in structures]).astype(np.float64)
    with torch.no_grad():
        parts = metric.parts(torch.from_numpy(vectors)).numpy()
    guess = np.array([1.0, *alone, 0.0])
    relative = parts / np.array(measured)[:, None]
    # columns: the common factor, then its departure for each part, in units of the guess (of the smallest time for the constant)
    unit = np.where(guess > 0, guess, min(measured))
    columns = np.concatenate([(relative @ guess)[:, None], relative * unit], 1)
    penalty = np.eye(5)[1:] * _DEPARTURE * np.sqrt(len(measured)) * columns[:, :1].mean()
    x = _non_negative(np.concatenate([columns, penalty]), np.append(np.ones(len(measured)), np.zeros(4)))
    coefficients = x[0] * guess + x[1:] * unit
    found.coefficients = tuple(float(c) for c in coefficients)  # type: ignore[assignment]
    found.calibration = [(float(p), float(m)) for p, m in zip(parts @ coefficients, measured)]


def _non_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |a x - b|, for a few columns: the best of all supports."""
    best, least = np.zeros(a.shape[1]), float(b @ b)
    for support in itertools.product((False, True), repeat=a.shape[1]):
        chosen = np.array(support)
        if not chosen.any():
            continue
        x = np.zeros(a.shape[1])
        x[chosen] = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
        error = float(np.sum((a @ x - b) ** 2))
        if (x >= 0).all() and error < least - 1e-12:
            best, least = x, error
    return best
