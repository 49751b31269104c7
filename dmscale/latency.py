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

the coefficients, none of them negative, are those that explain whole exported structures best (least squares of the relative
error).  Tables are made to rise with every size, so that a budget can be met by taking elements away.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import axes, cost
from .axes import Axis, Dim
from .errors import DmscaleError
from .optional import require
from .polynomial import Poly
from .progress import progress_bar
from .running import arguments, evaluating, tensors_in
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
    models: Sequence[nn.Module], example_inputs: Any, repeats: int = 50, warmup: int = 5
) -> list[float]:
    """The median times in ms of several models on the same inputs, measured in turns.

    As `measure_latency`, which see; each of the `repeats` rounds calls every model once.
    """
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
                start = time.perf_counter()
                models[k](*args, **kwargs)
                wait()
                times[k].append(1000 * (time.perf_counter() - start))
    return [statistics.median(of_model[warmup:]) for of_model in times]


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

RUNTIMES = ("torch", "onnx")


class Meter:
    """Measures on a device: single operators, and whole models as they are deployed.

    Args:
        device: where the tensors are.
        runtime: what runs whole models: "torch", or "onnx" for ONNX Runtime on the CPU (operators are timed in torch then,
            and the fit of the rest maps one to the other).
        repeats: measurements of which the median is taken.
    """

    def __init__(self, device: torch.device, runtime: str = "torch", repeats: int = 7):
        if runtime not in RUNTIMES:
            raise DmscaleError(f"runtime={runtime!r} is none of {', '.join(RUNTIMES)}")
        if runtime == "onnx" and device.type != "cpu":
            raise DmscaleError(f"runtime='onnx' measures on the CPU, and the model is on {device}")
        self.device, self.runtime, self.repeats = device, runtime, repeats

    @property
    def name(self) -> str:
        """What measurements depend on beside the operator: device, threads, versions."""
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor(self.device)
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{where}{threads}, torch {torch.__version__}"

    @torch.no_grad()
    def operators(self, instance: Instance, points: Sequence[Sizes]) -> list[float] | None:
        """Milliseconds of one call of `instance` at each of several sizes, in turns; None if it cannot run alone."""
        try:
            calls = [_stand_alone(instance, sizes, self.device) for sizes in points]
            wait = _finish_queued_work([torch.empty(0, device=self.device)])
            bursts = [_burst(call, wait) for call in calls]
            times: list[list[float]] = [[] for _ in calls]
            for turn in range(self.repeats):
                for i in range(len(calls)):
                    k = (i + turn) % len(calls)
                    wait()
                    start = time.perf_counter()
                    for _ in range(bursts[k]):
                        calls[k]()
                    wait()
                    times[k].append(1000 * (time.perf_counter() - start) / bursts[k])
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        return [statistics.median(t) for t in times]

    def models(self, models: Sequence[nn.Module], example_inputs: Any) -> list[float]:
        """Median milliseconds of one forward of each model, in turns."""
        if self.runtime == "onnx":
            with tempfile.TemporaryDirectory() as folder:
                sessions = [_OnnxSession(m, example_inputs, Path(folder) / f"{i}.onnx") for i, m in enumerate(models)]
                return compare_latency(sessions, example_inputs, 2 * self.repeats, 3)
        return compare_latency(models, example_inputs, 2 * self.repeats, 3)


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


def _burst(call: Callable[[], Any], wait: Callable[[], None], at_least: float = 3e-4) -> int:
    """How many calls last `at_least` seconds; warms up."""
    call()
    wait()
    start = time.perf_counter()
    call()
    wait()
    return max(1, min(64, int(at_least / max(time.perf_counter() - start, 1e-9))))


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
        self.path = None if path is False else Path(path)
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

    def bind(self, space: SearchSpace) -> LatencyMetric:
        """The metric over the cost variables of `space`."""
        return LatencyMetric(self, space)


class LatencyMetric:
    """Latency in ms over the cost variables of a space: see `cost.Metric`.

    Piecewise linear in each operator's sizes, so differentiable almost everywhere; it rises with every variable.
    """

    def __init__(self, latency: Latency, space: SearchSpace):
        self.latency = latency
        variables = {v: i for i, v in enumerate(space.variables)}
        inside = _gates(space)
        free = {a for d in space.dimensions.values() for a in d.axes}
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
    return torch.from_numpy(m.real(values.detach().double().cpu().numpy())).to(values)


class _Group:
    """Tables of one grid shape, interpolated together."""

    def __init__(self, tables: Sequence[Table], variables: Mapping[Hashable, int], free: set[Axis], inside: Any):
        self.shape = tables[0].ms.shape
        one = len(variables)
        rank = len(self.shape)
        self.grid = torch.tensor(np.array([np.stack(t.grid) if rank else np.zeros((0, 1)) for t in tables]))  # (I, K, G)
        self.ms = torch.tensor(np.stack([t.ms.reshape(-1) for t in tables]))  # (I, G ** K)
        gates = [inside(t.instance.end) for t in tables]
        self.gate = torch.tensor([variables[g[0]] if g else one for g in gates])
        polys = [_extent(a, free) for t in tables for a in t.factors]
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
        grid, ms, gate = self.grid.to(values), self.ms.to(values), values[:, self.gate.to(values.device)]
        at = torch.zeros(len(values), len(ms), dtype=torch.long, device=values.device)
        corners = [(at, torch.ones_like(gate))]
        for k, (low, share) in enumerate(self._cells(values, grid)):
            after = int(np.prod(self.shape[k + 1 :], dtype=np.int64))
            corners = [
                (at + (low + up) * after, weight * (share if up else 1 - share))
                for at, weight in corners for up in (0, 1)
            ]  # fmt: skip
        rows = torch.arange(len(ms), device=values.device)
        found = sum(weight * ms[rows, at] for at, weight in corners)
        return (found * gate).sum(1)

    def _cells(self, values: Tensor, grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each factor the cell of the grid that its size lies in, and where in it, (S, I) each."""
        if not self.shape:
            return
        terms = self.coefficient.to(values).expand(len(values), -1)
        for column in self.index.to(values.device).T:
            terms = terms * values[:, column]
        sizes = values.new_zeros(len(values), self.factors)
        sizes = sizes.index_add(1, self.owner.to(values.device), terms).reshape(len(values), *grid.shape[:2])
        for k in range(len(self.shape)):
            points, x = grid[:, k], sizes[:, :, k]
            inner = (x.detach()[:, :, None] >= points[:, 1:-1]).sum(2) if points.shape[1] > 2 else torch.zeros_like(x).long()
            start = points.expand(len(x), -1, -1).gather(2, inner[:, :, None])[:, :, 0]
            end = points.expand(len(x), -1, -1).gather(2, inner[:, :, None] + 1)[:, :, 0]
            yield inner, ((x - start) / (end - start)).clamp(min=0)


def _extent(a: Axis, free: set[Axis]) -> Poly:
    from .space import extent_in

    return extent_in((a,), free)


def _gates(space: SearchSpace) -> Any:
    from .space import block_finder

    return block_finder(space)


def _other_operators(space: SearchSpace, fused: Sequence[tuple[int, int]]) -> tuple[Poly, Poly]:
    """Bytes that the operators outside of the tables write, and their number."""
    from .space import extent_in

    covered = {op for start, end in fused for op in range(start + 1, end + 1)}
    inside, free = _gates(space), {a for d in space.dimensions.values() for a in d.axes}
    written, number = [], []
    for op, element, dims, _ in space.trace.record.activations:
        if op not in covered:
            gate = [Poly.variable(g) for g in inside(op)]
            written.append(cost.product([*(extent_in(d, free) for d in dims), *gate]) * element)
            number.append(cost.product(gate))
    return cost.total(written), cost.total(number)
